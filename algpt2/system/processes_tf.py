"""The workers that TF_CONFIG lists, or this machine or TPU alone: devices and number format."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from ..errors import PeerGoneError, UserError, describe
from ..options import OptimOptions, TFTrainOptions
from .console import MainFirst, is_main_process, log, process_index
from .memory import keep_freed_memory
from .strategy_tf import build_strategy

GONE = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)


@contextmanager
def peers_may_go() -> Iterator[None]:
    """Raise `PeerGoneError` if another worker or the TPU goes while the body waits for it."""
    try:
        yield
    except GONE as error:
        reason = re.sub(r"\{\{.*?\}\} *", "", describe(error))[:160]
        raise PeerGoneError(
            f"a worker or the TPU is gone ({reason}): run the same command again, on all workers; "
            "it continues from the last checkpoint"
        ) from error


@dataclass(frozen=True)
class Processes(MainFirst):
    """This process among those that train together, the devices of all, the number format."""

    rank: int
    count: int
    strategy: tf.distribute.Strategy
    dtype: str  # float32 or mixed_bfloat16

    @property
    def low_precision(self) -> bool:
        """Whether matrix products run in less than float32."""
        return self.dtype != "float32"

    @property
    def n_replicas(self) -> int:
        """Devices of all processes."""
        return self.strategy.num_replicas_in_sync

    @property
    def n_hosts(self) -> int:
        """Machines that read: the processes, or the hosts of a pod that one process drives."""
        return max(self.count, getattr(self.strategy.extended, "num_hosts", 1))

    @property
    def n_local(self) -> int:
        """Devices of this process."""
        return self.n_replicas // self.count

    def distribute(self, pieces: Any) -> Any:
        """`pieces[i]` on the i-th device of this process."""
        if self.n_replicas == 1:
            return tf.convert_to_tensor(pieces[0])
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tf.convert_to_tensor(
                pieces[context.replica_id_in_sync_group % self.n_local]
            )
        )

    @peers_may_go()
    def sum(self, array: np.ndarray) -> np.ndarray:
        """Sum of arrays of one shape over all processes."""
        if self.count == 1:
            return array
        pieces = [array] + [np.zeros_like(array)] * (self.n_local - 1)
        total = self.strategy.reduce("SUM", self.distribute(pieces), axis=None)
        return np.asarray(total)

    def any(self, flag: bool) -> bool:
        """True on every process as soon as it is on one."""
        return bool(self.sum(np.array([flag], np.int32))[0])

    def on_main(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on process 0 (JSON), on every process; its `UserError` too."""
        if self.count == 1:
            return function()
        answer = {}
        if is_main_process():
            try:
                answer = {"value": function()}
            except UserError as error:
                answer = {"error": str(error)}
        data = np.frombuffer(json.dumps(answer).encode(), np.uint8).astype(np.int32)
        is_main = is_main_process()
        size = int(self.sum(np.array([len(data) * is_main], np.int32))[0])
        data = self.sum(data if is_main else np.zeros(size, np.int32))
        answer = json.loads(data.astype(np.uint8).tobytes())
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]

    def barrier(self) -> None:
        """Return when every process is here."""
        self.sum(np.zeros(1, np.int32))


def start_processes(options: TFTrainOptions, tpu: str | None = None) -> Processes:
    """Choose devices and number format; join the workers that TF_CONFIG lists.

    Raises:
        UserError: a device or TPU is not there, or batch_size does not divide among the devices.
    """
    _choose_devices(options)
    strategy = build_strategy(tpu, options.n_devices)
    if not isinstance(strategy, tf.distribute.TPUStrategy):
        tf.config.experimental.enable_op_determinism()  # a repeated command gives the same bytes
    keep_freed_memory()
    is_cluster = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    count = 1
    if is_cluster:
        cluster = strategy.cluster_resolver.cluster_spec().as_dict()
        count = max(1, sum(len(cluster.get(kind, ())) for kind in ("chief", "worker")))
    rank = process_index() if is_cluster else 0
    if options.optim.batch_size % strategy.num_replicas_in_sync:
        raise UserError(
            f"--batch_size {options.optim.batch_size} is the batch of all devices: expected a "
            f"multiple of {strategy.num_replicas_in_sync} devices"
        )
    return Processes(rank, count, strategy, _dtype(options.optim, strategy))


def _choose_devices(options: TFTrainOptions) -> None:
    gpus = tf.config.list_physical_devices("GPU")
    name = {"cuda": "gpu"}.get(options.device, options.device)
    if name not in ("auto", "cpu", "gpu") or (name == "gpu" and not gpus):
        raise UserError(
            f"--device {options.device} is not usable here: expected "
            f"{'auto, cpu or gpu' if gpus else 'auto or cpu'}"
        )
    n_devices = options.n_devices or 1
    try:
        if name == "cpu":
            tf.config.set_visible_devices([], "GPU")
        if (name == "cpu" or not gpus) and n_devices > 1:
            cpu = tf.config.list_physical_devices("CPU")[0]
            parts = [tf.config.LogicalDeviceConfiguration()] * n_devices
            tf.config.set_logical_device_configuration(cpu, parts)
    except RuntimeError:
        log("TensorFlow has started already: its devices stay as they are")
    if gpus and name != "cpu" and n_devices > len(gpus):
        raise UserError(f"--n_devices {n_devices}: expected at most {len(gpus)}, the GPUs here")


def _dtype(optim: OptimOptions, strategy: tf.distribute.Strategy) -> str:
    has_bf16 = isinstance(strategy, tf.distribute.TPUStrategy)
    for gpu in tf.config.list_logical_devices("GPU") and tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        has_bf16 = details.get("compute_capability", (0, 0)) >= (8, 0)
    if optim.precision == "bf16" or (optim.precision == "auto" and has_bf16):
        return "mixed_bfloat16"
    return "float32"
