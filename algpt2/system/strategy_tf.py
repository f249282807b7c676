"""TensorFlow's strategy for this machine, for several workers, for a TPU host or a pod."""

import json
import os
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from ..errors import UserError, describe
from .console import log, process_index

if TYPE_CHECKING:
    import tensorflow as tf

HEALTHY_SECONDS, POLL_SECONDS = 600, 10  # a pod that is being created needs minutes
CONNECT_SECONDS = 20
MEET_SECONDS, PATIENCE_SECONDS = 0.2, 5  # between two looks for a worker; before a line says so
# Only a person ends these states; CREATING, REPAIRING and the like pass by themselves.
LOST_STATES = ("PREEMPTED", "TERMINATED", "DELETING", "STOPPED", "STOPPING", "HIDDEN", "HIDING")


def build_strategy(tpu: str | None, n_devices: int | None = None) -> "tf.distribute.Strategy":
    """Build the strategy for `--tpu`.

    Args:
        tpu: the name of a TPU or pod; "local" for the TPU attached to this machine; "none" or None
            for no TPU. Without a TPU, the workers in TF_CONFIG train together; without TF_CONFIG,
            all GPUs or logical CPU devices of this machine.
        n_devices: at most this many devices of this machine; None: all.
    Raises:
        UserError: the TPU cannot be reached or does not become healthy.
    """
    import tensorflow as tf

    if tpu in (None, "none"):
        if os.environ.get("TF_CONFIG"):
            meet_workers()
            handler = signal.getsignal(signal.SIGTERM)
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # TensorFlow's own handler does nothing
            return strategy
        kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
        devices = [device.name for device in tf.config.list_logical_devices(kind)][:n_devices]
        if len(devices) > 1:
            return tf.distribute.MirroredStrategy(devices)
        return tf.distribute.get_strategy()
    if tpu != "local":
        wait_until_healthy(tpu)
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        if tpu != "local":
            check_addresses(tpu, resolver.cluster_spec().as_dict().get("worker", []))
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--tpu {tpu} cannot be initialized ({describe(error)[:160]}): run this on a TPU host "
            "with the TensorFlow of its image (pip's has no TPU part), or use --tpu none"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def meet_workers() -> None:
    """Return when all workers of TF_CONFIG listen.

    TensorFlow waits for them too, but it holds Python's lock and ignores SIGTERM: no signal would
    end it. Until all have met, each worker listens on the port that TensorFlow will use.

    Raises:
        UserError: TF_CONFIG is not the JSON of a cluster, or this worker's port is not free.
    """
    rank, cluster = process_index(), json.loads(os.environ["TF_CONFIG"]).get("cluster", {})
    addresses = [*cluster.get("chief", ()), *cluster.get("worker", ())]
    if len(addresses) < 2:
        return
    try:
        listener = socket.create_server(("", int(addresses[rank].rpartition(":")[2])))
    except (OSError, ValueError, OverflowError, IndexError) as error:
        raise UserError(
            f"TF_CONFIG: worker {rank} of {', '.join(addresses)} cannot listen "
            f"({describe(error)}): expected host:port of this machine, a free port, for each worker"
        ) from None
    with listener:
        for address in addresses[:rank] + addresses[rank + 1 :]:
            _wait_for(address)


def _wait_for(address: str) -> None:
    """Return when a worker listens at "host:port"."""
    start_s, is_said = time.monotonic(), False
    while True:
        try:
            return _connect(address)
        except OSError as error:
            if not is_said and time.monotonic() - start_s > PATIENCE_SECONDS:
                # Not `log`, which only process 0 prints: each worker waits for another.
                print(f"waiting for the worker at {address} ({describe(error)})", file=sys.stderr)
                is_said = True
        time.sleep(MEET_SECONDS)


def _connect(address: str) -> None:
    """`OSError` unless something listens at "host:port"."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def wait_until_healthy(name: str) -> None:
    """Return when the TPU API says that the pod is ready and healthy.

    Raises:
        UserError: the API cannot be reached or does not know the pod; the pod is lost, or not
            healthy after HEALTHY_SECONDS.
    """
    client, end_s, seen = _tpu_client(name), time.monotonic() + HEALTHY_SECONDS, None
    while True:
        try:
            state, health = client.state(), client.health()
        except Exception as error:  # Google's client raises many kinds
            raise UserError(
                f"--tpu {name} is not found (... {describe(error)[-160:]}): expected a TPU "
                "of this project and zone, see `gcloud compute tpus tpu-vm list`; or use --tpu "
                "local or --tpu none"
            ) from error
        if state == "READY" and health in ("HEALTHY", None):
            return
        status = f"{state}, health {health}" if health else str(state)
        if state in LOST_STATES:
            raise UserError(
                f"--tpu {name} is {status} and will not come back by itself: create it again "
                "(gcloud compute tpus tpu-vm delete, then create) and run the same command"
            )
        if time.monotonic() > end_s:
            raise UserError(
                f"--tpu {name} is still {status} after {HEALTHY_SECONDS / 60:.0f} minutes: "
                "expected READY; run the same command when it is, or create the TPU again"
            )
        if status != seen:
            log(f"TPU {name} is {status}: waiting for READY")
        seen = status
        time.sleep(POLL_SECONDS)


def check_addresses(name: str, addresses: list[str]) -> None:
    """`UserError` unless each "host:port" answers: TensorFlow would wait for it forever."""
    for address in addresses:
        try:
            _connect(address.removeprefix("grpc://"))
        except OSError as error:
            raise UserError(
                f"--tpu {name}: its worker {address} does not answer ({describe(error)}): run this "
                "on worker 0 of the TPU, in its network"
            ) from error


def _tpu_client(name: str) -> Any:
    try:
        from cloud_tpu_client import Client

        return Client(name)
    except Exception as error:
        raise UserError(
            f"--tpu {name}: the Cloud TPU API is not available ({describe(error)[:200]}); use "
            "--tpu local on a TPU host, or --tpu none"
        ) from error
