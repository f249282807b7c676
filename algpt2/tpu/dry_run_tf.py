"""The training step of trainer_tf.py as the program that one core of a TPU slice would run."""

import warnings
from dataclasses import replace
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2

from ..errors import UserError
from ..kernels_tf_algpt2 import LOSS_ROWS
from ..options import RowOptions, TFRecordOptions, TFTrainOptions
from ..runs.run import count_steps
from ..runs.start import Start, check_rows_fit
from ..shards.inputs_tf import find_shards
from ..training.optimizers_tf import build_optimizer
from ..training.trainer_tf import build_model, build_step
from .dry_run import DryRun, Slice


def run(flags: TFRecordOptions, tpu: Slice) -> None:
    """`--dry_run`: print what a batch takes, or with `--find_batch` the largest batch that fits.

    Raises:
        UserError: as `prepare`; or the batch, or one row, does not fit.
    """
    trial = prepare(flags, tpu)
    if flags.find_batch:
        trial.find_batch()
    else:
        trial.check(tpu.rows_per_core(flags.optim.batch_size))


def prepare(flags: TFRecordOptions, tpu: Slice) -> DryRun:
    """The dry run of a train_tfrecords.py command; it reads the shards' seq_len, nothing else.

    Raises:
        UserError: no such model, shards that are not there, rows longer than its positions.
    """
    options = flags.train_options()
    config = Start.find(options.model).config()
    seq_len = _seq_len(flags.data, config)
    check_rows_fit(seq_len, config)
    program = StepProgram(options, seq_len, tpu.n_cores)
    flops = program.model.config.flops_per_token(seq_len) * seq_len
    optim = options.optim

    def steps(batch_size: int) -> int | None:
        if not (optim.max_steps or optim.n_tokens):
            return None
        return count_steps(replace(optim, batch_size=batch_size), 0, seq_len)

    return DryRun(tpu, program, seq_len, flops, grad_steps=optim.grad_steps, steps=steps)


def _seq_len(data: RowOptions, config: dict[str, Any]) -> int:
    """`--seq_len`; without it the shards' seq_len; without shards the model's context."""
    if data.seq_len:
        return data.seq_len
    try:
        return find_shards("--train_path", data.train_path).manifest.seq_len
    except UserError:
        if data.train_path != RowOptions.train_path:
            raise
        return config["n_positions"]


class SliceReplica(tf.distribute.ReplicaContext):
    """One replica among `n_replicas`; it uses the same all-reduce as TPUStrategy."""

    for_tpu = True  # see kernels_tf_algpt2.for_tpu

    def __init__(self, n_replicas: int) -> None:
        super().__init__(tf.distribute.get_strategy(), replica_id_in_sync_group=0)
        self.n_replicas = n_replicas

    def all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        """Sum or average each tensor of a nest over the replicas."""
        groups = tf.range(self.n_replicas)[None]
        is_mean = reduce_op == tf.distribute.ReduceOp.MEAN

        def reduce(tensor: tf.Tensor) -> tf.Tensor:
            total = gen_xla_ops.xla_all_reduce(tensor, groups, "Add", "CrossReplica")
            return total / self.n_replicas if is_mean else total

        return tf.nest.map_structure(reduce, value)


class StepProgram:
    """Model, optimizer and step of the options, built once and lowered for any batch."""

    def __init__(self, options: TFTrainOptions, seq_len: int, n_replicas: int) -> None:
        optim, dtype = options.optim, "float32"
        if optim.precision in ("auto", "bf16"):  # auto on a TPU
            dtype = "mixed_bfloat16"
        model = build_model(Start.find(options.model), dtype)
        model.loss_rows = LOSS_ROWS
        step = build_step(model, build_optimizer(model, optim, 1e-3), optim)

        @tf.function(jit_compile=True)
        def replica_step(rows: tf.Tensor, lr: tf.Tensor, seed: tf.Tensor, ok: tf.Tensor) -> Any:
            with SliceReplica(n_replicas):
                return step(rows, lr, seed, ok)

        self.model, self._step = model, replica_step
        self._row_shape = (optim.grad_steps, seq_len + 1)

    def specs(self, rows_per_core: int) -> list[tf.TensorSpec]:
        """Shapes and types of what the step takes: rows, lr, seed, ok."""
        grad_steps, n_tokens = self._row_shape
        return [
            tf.TensorSpec([grad_steps, rows_per_core, n_tokens], tf.int32),
            tf.TensorSpec([], tf.float32),
            tf.TensorSpec([2], tf.int32),
            tf.TensorSpec([], tf.bool),
        ]

    def lower(self, rows_per_core: int) -> bytes:
        """The serialized HLO module for `rows_per_core` rows per forward pass."""
        lower = self._step.experimental_get_compiler_ir(*self.specs(rows_per_core))
        # The CPU by name, whatever GPU is here. Without a name, or with the platform_name that the
        # warning asks for, TensorFlow draws a random number, which deterministic ops forbid.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            device = tf.config.list_logical_devices("CPU")[0].name
            return _with_the_devices_generator(lower(stage="hlo_serialized", device_name=device))


def _with_the_devices_generator(program: bytes) -> bytes:
    """The program with the random numbers that TensorFlow's `auto_select` is on a TPU.

    Lowered for a CPU it is philox. Every random number of the step is drawn with `auto_select`.
    """
    module = hlo_pb2.HloModuleProto.FromString(program)
    for computation in module.computations:
        for instruction in computation.instructions:
            if instruction.opcode == "rng-bit-generator":
                instruction.rng_algorithm = xla_data_pb2.RNG_DEFAULT
    return module.SerializeToString()
