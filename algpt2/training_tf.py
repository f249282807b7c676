"""Training in TensorFlow, in the order of a run: the functions of training_pt.py.

The step is our own, in `strategy.run` inside `tf.function`: Keras' `fit` fails under
tf.distribute. Everything random is a function of (seed, step, replica) and every position in the
data one of the step, so a checkpoint is weights, optimizer state and a step number.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from . import optimizers_tf, report
from .batches import global_rows, process_rows
from .checkpoints import (
    Checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
from .console import log, process_index
from .errors import PeerGoneError, UserError, describe
from .guard import MIN_STEPS, Hint, StepGuard, check_finite
from .kernels_tf_algpt2 import LOSS_ROWS_CPU
from .loop import (
    Hooks,
    Metrics,
    StopRequest,
    check_cut,
    check_stop,
    last_checkpoint,
    run_loop,
    step_lr_factor,
)
from .memory import check_memory, keep_freed_memory, memory_bytes
from .mirror import checkpoint_here, copy_or_warn
from .modeling_tf_algpt2 import TFALGPT2LMHeadModel
from .options import ModelOptions, OptimOptions, TFTrainOptions
from .remote import local_folder
from .report import RunReport
from .runs import check_model_fits, peak_lr, source_folder, text_totals
from .sampling_tf import sample_texts
from .scoring import text_metrics
from .tfrecords import PackedRows
from .tokenization_algpt2 import TextTokenizer
from .tpu import build_strategy

OPTIMIZER_FILE = "optimizer.safetensors"
CHECKED_BATCHES = 8  # of an evaluation: to ask all workers takes 4 ms of a core
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


# --- processes and devices -----------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """This process among those that train together, the devices of all, the number format."""

    rank: int
    count: int
    strategy: tf.distribute.Strategy
    dtype: str  # float32 or mixed_bfloat16

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
        if self.rank == 0:
            try:
                answer = {"value": function()}
            except UserError as error:
                answer = {"error": str(error)}
        data = np.frombuffer(json.dumps(answer).encode(), np.uint8).astype(np.int32)
        size = int(self.sum(np.array([len(data) * (self.rank == 0)], np.int32))[0])
        data = self.sum(data if self.rank == 0 else np.zeros(size, np.int32))
        answer = json.loads(data.astype(np.uint8).tobytes())
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]

    def barrier(self) -> None:
        """Return when every process is here."""
        self.sum(np.zeros(1, np.int32))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Process 0 runs the body before the others: it packs, they find what it packed."""
        if self.rank > 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()


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


# --- model ---------------------------------------------------------------------------------------


def build_model(
    options: ModelOptions,
    tokenizer: TextTokenizer | None,
    seq_len: int | None,
    dtype: str = "float32",
    seed: int = 0,
) -> TFALGPT2LMHeadModel:
    """The model of `--config` with random weights or that of `--checkpoint`.

    Raises:
        UserError: unknown config or checkpoint, vocabulary or seq_len that does not fit.
    """
    from .configuration_algpt2 import ALGPT2Config

    source = source_folder(options) or options.checkpoint
    try:
        config = ALGPT2Config.from_pretrained(source)
        check_memory(config.stored_parameters())
        if tokenizer is not None:
            exact = not options.checkpoint
            check_model_fits(config.to_dict(), tokenizer, seq_len, exact=exact)
        if options.checkpoint and not options.from_scratch:
            model = TFALGPT2LMHeadModel.from_pretrained(source, dtype=dtype)
        else:
            model = TFALGPT2LMHeadModel(config, dtype=dtype, seed=seed)
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            model = add_embeddings(model, tokenizer.vocab_size, dtype)
    except UserError:
        raise
    except Exception as error:  # a damaged file can make transformers raise anything
        reason = describe(error)[:500]
        raise UserError(f"cannot load a GPT-2 or ALGPT2 from {source}: {reason}") from error
    model.transformer.gradient_checkpointing = options.gradient_checkpointing
    return model


def add_embeddings(model: TFALGPT2LMHeadModel, vocab_size: int, dtype: str) -> TFALGPT2LMHeadModel:
    """The model with rows for new control codes in its token tables: the mean of the others."""
    state, n_new = model.state_dict(), vocab_size - model.config.vocab_size
    for name in {"transformer.wte.weight", "lm_head.weight"} & state.keys():
        mean = tf.reduce_mean(state[name], 0, keepdims=True)
        state[name] = tf.concat([state[name], tf.repeat(mean, n_new, 0)], 0)
    model.config.vocab_size = vocab_size
    larger = TFALGPT2LMHeadModel(model.config, dtype=dtype)
    larger.load_state_dict(state)
    return larger


# --- optimizer -----------------------------------------------------------------------------------


def build_optimizer(model: TFALGPT2LMHeadModel, optim: OptimOptions, lr: float) -> Any:
    """The optimizer of `--optimizer`; weight decay on matrices only. Sources: optimizers_tf.py."""
    if optim.optimizer == "AdamW":
        optimizer = optimizers_tf.AdamW(
            lr, weight_decay=optim.weight_decay, beta_1=optim.beta1, beta_2=optim.beta2,
            epsilon=1e-8,
        )  # fmt: skip
    elif optim.optimizer == "SGD":
        optimizer = optimizers_tf.SGD(
            lr, momentum=float(optim.momentum), weight_decay=optim.weight_decay
        )
    elif optim.optimizer == "Adafactor":
        optimizer = optimizers_tf.Adafactor(
            lr, optim.weight_decay, optim.beta1, optim.relative_update_scale
        )
    else:
        optimizer = optimizers_tf.Muon(
            lr, weight_decay=optim.weight_decay, momentum=optim.momentum, adam_beta_1=optim.beta1,
            adam_beta_2=optim.beta2, epsilon=1e-8, exclude_layers=[r"\.wte\.", r"\.wpe\."],
        )  # fmt: skip
    optimizer.build(model.trainable_variables)
    return optimizer


def state_tensors(model: TFALGPT2LMHeadModel, optimizer: Any) -> dict[str, np.ndarray]:
    """The optimizer's state as `{parameter name}/{slot}`, as training_pt.py writes it."""
    # PyTorch's AdamW counts steps in float32, transformers' Adafactor in a Python number.
    is_adafactor = isinstance(optimizer, optimizers_tf.Adafactor)
    step = np.array(optimizer.iterations.numpy(), np.float64 if is_adafactor else np.float32)
    tensors = {}
    for i, name in enumerate(model.named_parameters()):
        slots = {s: v[i] for s, v in optimizer.slots.items() if v[i] is not None}
        tensors |= {f"{name}/{slot}": variable.numpy() for slot, variable in slots.items()}
        if slots and "momentum_buffer" not in slots:
            tensors[f"{name}/step"] = step
    return tensors


def load_state_tensors(
    model: TFALGPT2LMHeadModel, optimizer: Any, tensors: dict[str, np.ndarray], step: int
) -> None:
    """Inverse of `state_tensors`.

    Args:
        step: of the run; the optimizer's own, which skipped steps are not in, goes before it.
    Raises:
        UserError: a tensor belongs to no parameter of the model, or a state is missing.
    """
    counted = [int(value) for key, value in tensors.items() if key.endswith("/step")]
    optimizer.iterations.assign(max(counted, default=step))
    left = {key for key in tensors if not key.endswith(("/step", "/RMS"))}
    for i, name in enumerate(model.named_parameters()):
        for slot, variables in optimizer.slots.items():
            key = f"{name}/{slot}"
            if variables[i] is not None:
                if key not in left:
                    raise UserError(f"the optimizer state is of another optimizer: it has no {key}")
                if tensors[key].shape != tuple(variables[i].shape):
                    raise UserError(
                        f"the optimizer state is of another model: {key} is of shape "
                        f"{tensors[key].shape}, expected {tuple(variables[i].shape)}"
                    )
                variables[i].assign(tensors[key])
                left.remove(key)
    if left:
        raise UserError(f"the optimizer state is of another model: it has {min(left)}")


# --- one step ------------------------------------------------------------------------------------


def mean_loss(model: TFALGPT2LMHeadModel, rows: tf.Tensor, seed: tf.Tensor | None) -> tf.Tensor:
    """Mean cross-entropy in nats of the tokens of `rows`.

    Args:
        rows: (B, T + 1) token ids; position t predicts token t + 1.
        seed: (2,) of dropout; None: no dropout.
    """
    rows = tf.cast(rows, tf.int32)
    return model(rows[:, :-1], shift_labels=rows[:, 1:], skip_logits=True, seed=seed).loss


def build_step(
    model: TFALGPT2LMHeadModel, optimizer: Any, optim: OptimOptions, compiled: bool = False
) -> Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    """One optimizer step of one replica, for `strategy.run`; XLA can compile all of it.

    Args:
        compiled: compile loss and gradients with XLA; collectives and update stay outside.
    Returns:
        step(rows, lr, seed, ok, limits) with rows (grad_steps, B, T + 1) of this replica, lr
        scalar, seed (2,) int32 of the step, ok a scalar bool and limits (2,) the largest loss and
        norm; mean loss and gradient norm over all replicas, and whether both are finite and within
        the limits (and `ok` was). If not, weights and optimizer stay as they are.
    """

    def gradients(rows: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            loss = mean_loss(model, rows, seed)
        return loss, tape.gradient(loss, model.trainable_variables)

    if compiled:
        gradients = tf.function(gradients, jit_compile=True)

    def step(
        rows: tf.Tensor, lr: tf.Tensor, seed: tf.Tensor, ok: tf.Tensor, limits: Any = (np.inf,) * 2
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        context = tf.distribute.get_replica_context()
        seed = _fold(seed, context.replica_id_in_sync_group)
        shapes = [variable.shape for variable in model.trainable_variables]
        loss, grads = _accumulate(gradients, rows, seed, shapes)
        loss, *grads = context.all_reduce(tf.distribute.ReduceOp.MEAN, [loss, *grads])
        norm = tf.linalg.global_norm(grads)
        ok = ok & tf.math.is_finite(loss) & tf.math.is_finite(norm)
        ok = ok & (loss <= limits[0]) & (norm <= limits[1])
        if optim.max_grad_norm:
            scale = tf.minimum(1.0, optim.max_grad_norm / (norm + 1e-6))
            grads = [gradient * scale for gradient in grads]
        _update(optimizer, model.trainable_variables, grads, lr, ok)
        return loss, norm, ok

    return step


def _fold(seed: tf.Tensor, value: Any) -> tf.Tensor:
    return tf.random.experimental.stateless_fold_in(seed, tf.cast(value, tf.int32))


def _accumulate(
    gradients: Callable[..., Any], rows: tf.Tensor, seed: tf.Tensor, shapes: list[Any]
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Mean loss and gradients (of `shapes`) over the forward passes rows[0], rows[1] ..."""
    n = rows.shape[0]
    if n == 1:
        return gradients(rows[0], seed)

    def body(i: tf.Tensor, loss: tf.Tensor, sums: list[tf.Tensor]) -> tuple[Any, ...]:
        more, grads = gradients(rows[i], _fold(seed, i))
        return i + 1, loss + more / n, [a + b / n for a, b in zip(sums, grads, strict=True)]

    # From zero on, so that the program holds the model once.
    start = (tf.constant(0), tf.zeros([]), [tf.zeros(shape) for shape in shapes])
    _, loss, sums = tf.while_loop(lambda i, *_: i < n, body, start, maximum_iterations=n)
    return loss, sums


def _update(
    optimizer: Any, variables: list[Any], grads: list[tf.Tensor], lr: tf.Tensor, ok: tf.Tensor
) -> None:
    """The optimizer's update in every replica if `ok`; gradients and `ok` are the same in all."""

    def update_one(variable: Any, gradient: tf.Tensor, lr: tf.Tensor, ok: tf.Tensor) -> None:
        def take() -> tf.Tensor:
            optimizer.update_step(gradient, variable, lr)
            return ok

        tf.cond(ok, take, lambda: ok)

    def update(strategy: tf.distribute.Strategy, grads: list[Any], lr: Any, ok: Any) -> None:
        for variable, gradient in zip(variables, grads, strict=True):
            strategy.extended.update(
                variable.value, update_one, args=(gradient, lr, ok), group=False
            )

    strategy = tf.distribute.get_strategy()
    tf.__internal__.distribute.interim.maybe_merge_call(update, strategy, grads, lr, ok)
    optimizer.iterations.assign_add(tf.cast(ok, optimizer.iterations.dtype))


class Inputs(Protocol):
    """Where the tokens of a step come from."""

    seq_len: int
    wait_s: float  # seconds spent waiting for tokens

    def take(self, step: int) -> tuple[Any, int]:
        """Tokens (S, grad_steps, B / replicas, T + 1) on each replica; place of `step` in them."""

    def row_ids(self, step: int) -> list[int] | None:
        """Ids of the rows of `step`, of all replicas; None: not known without reading them."""


class RowInputs:
    """Rows in memory-mapped shards, in the order of batches.py: that of train_pt.py."""

    def __init__(self, rows: PackedRows, options: TFTrainOptions, processes: Processes) -> None:
        self.rows, self.options, self.processes = rows, options, processes
        self.seq_len, self.wait_s = rows.manifest.seq_len, 0.0
        self.first, self.tokens = -1, None

    def take(self, step: int) -> tuple[Any, int]:
        n_steps = self.options.steps_per_call
        if self.first < 0 or not self.first <= step < self.first + n_steps:
            self.first, self.tokens = step, self._read(step, n_steps)
        return self.tokens, step - self.first

    def row_ids(self, step: int) -> list[int]:
        optim = self.options.optim
        ids = [
            global_rows(i, n_rows=len(self.rows), batch_rows=optim.batch_size, seed=optim.seed)
            for i in range(step * optim.grad_steps, (step + 1) * optim.grad_steps)
        ]
        return np.concatenate(ids).tolist()

    def _read(self, step: int, n_steps: int) -> Any:
        optim, processes = self.options.optim, self.processes
        n_batches = n_steps * optim.grad_steps
        ids = [
            process_rows(
                step * optim.grad_steps + i, n_rows=len(self.rows), batch_rows=optim.batch_size,
                seed=optim.seed, process=processes.rank, n_processes=processes.count,
            )
            for i in range(n_batches)
        ]  # fmt: skip
        tokens = self.rows[np.array(ids)].astype(np.int32)
        shape = (n_steps, optim.grad_steps, processes.n_local, -1, tokens.shape[-1])
        return processes.distribute(np.moveaxis(tokens.reshape(shape), 2, 0))


@dataclass
class Trainer:
    """A model in training: what `train_steps` changes and a checkpoint holds."""

    model: TFALGPT2LMHeadModel
    optimizer: Any
    options: TFTrainOptions
    processes: Processes
    inputs: Inputs
    n_steps: int
    step: int = 0  # optimizer steps taken
    elapsed_s: float = 0.0  # of training, over all restarts
    saved_step: int | None = None  # its checkpoint is there and whole
    cut: Metrics | None = None  # of the last step, until it is evaluated and reported
    stop: StopRequest = field(default_factory=StopRequest)
    guard: StepGuard = field(init=False)  # judges each step before its update
    run_steps: Callable[..., Any] = field(init=False)  # several steps in one call

    def __post_init__(self) -> None:
        options = self.options
        step = build_step(self.model, self.optimizer, options.optim, options.compile)
        self.guard = StepGuard(options.optim.skip_outliers)
        strategy, n = self.processes.strategy, options.steps_per_call
        self.run_steps = _build_run(strategy, step, n, self.guard)

    @property
    def peak_lr(self) -> float:
        """Highest learning rate of the run."""
        return peak_lr(self.options.optim, self.options.model)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step predicts, over all processes."""
        optim = self.options.optim
        return optim.batch_size * optim.grad_steps * self.inputs.seq_len

    def hint(self) -> Hint:
        """What to say if the coming step is bad."""
        is_low = self.processes.dtype != "float32"
        return Hint(
            last_checkpoint(self.options.report.save_dir), self.inputs.row_ids(self.step), is_low
        )


def _build_run(
    strategy: tf.distribute.Strategy, step: Callable[..., Any], steps_per_call: int,
    guard: StepGuard,
) -> Callable[..., Any]:  # fmt: skip
    """`run(tokens, offset, lrs, seeds, window, in_row)`: len(lrs) steps; losses, norms and flags
    of each.

    `window` and `in_row` are the guard's before the first step. They go from step to step in here,
    so that a call of several steps judges each by all before it, as calls of one step do.
    """

    def one(tokens: tf.Tensor, i: tf.Tensor, *rest: tf.Tensor) -> Any:
        return step(tokens[i], *rest)

    @tf.function(reduce_retracing=True)
    def run(
        tokens: Any, offset: tf.Tensor, lrs: tf.Tensor, seeds: tf.Tensor, window: tf.Tensor,
        in_row: tf.Tensor,
    ) -> Any:  # fmt: skip
        n = tf.shape(lrs)[0]
        results = tf.TensorArray(tf.float32, n, element_shape=[3])
        for i in tf.range(n) if steps_per_call > 1 else range(1):
            rest = lrs[i], seeds[i], in_row <= guard.max_in_row, limits(window, guard.z)
            answer = strategy.run(one, args=(tokens, offset + i, *rest))
            # The same numbers in every replica: the first of this process.
            loss, norm, ok = (strategy.experimental_local_results(x)[0] for x in answer)
            results = results.write(i, tf.stack([loss, norm, tf.cast(ok, tf.float32)]))
            if guard.z is not None:
                longer = tf.concat([window[:, 1:], tf.stack([loss, norm])[:, None]], 1)
                window = tf.where(ok, longer, window)
            in_row = tf.where(ok, 0, in_row + 1)
        return results.stack()

    return run


def limits(window: tf.Tensor, z: float | None) -> tf.Tensor:
    """`StepGuard.limits` of a `StepGuard.window` as a tensor."""
    if z is None:
        return tf.constant([np.inf, np.inf], tf.float32)
    known = ~tf.math.is_nan(window)
    n = tf.reduce_sum(tf.cast(known[0], tf.float32))
    mean = tf.reduce_sum(tf.where(known, window, 0.0), 1) / n
    squares = tf.where(known, window - mean[:, None], 0.0) ** 2
    most = mean + z * tf.sqrt(tf.reduce_sum(squares, 1) / n)
    return tf.where(n >= MIN_STEPS, most, np.inf)


def open_run(
    save_dir: Path, run: dict[str, Any], overwrite: bool, processes: Processes
) -> tuple[dict[str, Any], Checkpoint | None]:
    """`report.open_run` and the newest complete checkpoint in save_dir, the same on every process.

    Raises:
        UserError: save_dir holds something else, or is not the same folder for every process.
    """

    def on_main() -> tuple[dict[str, Any], list[Any] | None]:
        opened = report.open_run(save_dir, run, overwrite)
        checkpoint = report.own_checkpoint(save_dir, run)
        return opened, [str(checkpoint.folder), checkpoint.state] if checkpoint else None

    opened, found = processes.on_main(on_main)
    if found is None:
        return opened, None
    checkpoint = Checkpoint(Path(found[0]), found[1])
    return opened, checkpoint_here(checkpoint, run["options"]["report"]["save_dir"])


def build_trainer(
    options: TFTrainOptions,
    tokenizer: TextTokenizer | None,
    inputs: Inputs,
    processes: Processes,
    n_steps: int,
    checkpoint: Checkpoint | None,
) -> Trainer:
    """Model and optimizer of a new run, or in the state of `checkpoint`."""
    source = options.model
    if checkpoint:
        source = replace(source, checkpoint=str(checkpoint.folder), from_scratch=False)
    with processes.strategy.scope():
        model = build_model(source, tokenizer, inputs.seq_len, processes.dtype, options.optim.seed)
        check_pass_fits(model, options, inputs.seq_len, processes)
        optimizer = build_optimizer(model, options.optim, peak_lr(options.optim, options.model))
    trainer = Trainer(model, optimizer, options, processes, inputs, n_steps)
    if checkpoint:
        load_state(trainer, checkpoint)
    return trainer


def check_pass_fits(
    model: TFALGPT2LMHeadModel, options: TFTrainOptions, seq_len: int, processes: Processes
) -> None:
    """`UserError` if the attention weights of one forward pass are more than the memory here.

    On CPUs only, where the kernel would kill the process; an accelerator's library says it itself.
    """
    if model.loss_rows != LOSS_ROWS_CPU:
        return
    config, batch_size = model.config, options.optim.batch_size
    n_held = 1 if options.model.gradient_checkpointing else config.n_layer
    item_bytes = 4 if processes.dtype == "float32" else 2
    row_bytes = n_held * config.n_head * seq_len**2 * item_bytes
    n_bytes, memory = batch_size // processes.count * row_bytes, memory_bytes()
    if n_bytes > memory:
        most = max(1, memory // row_bytes * processes.count // 2)  # half: there is more to hold
        rows = next(n for n in range(most, 0, -1) if batch_size % n == 0)
        raise UserError(
            f"--batch_size {batch_size}: a forward pass holds {n_bytes / 1e9:,.0f} GB of attention "
            f"weights, this machine {memory / 1e9:,.0f} GB of memory; the same steps in parts: "
            f"--batch_size {rows} --grad_steps {options.optim.grad_steps * batch_size // rows}"
        )


def train_step(trainer: Trainer) -> tuple[float, float]:
    """One optimizer step: mean loss in nats per token of the global batch, and gradient norm.

    Raises:
        NonFiniteError: loss or gradient is NaN or infinite; raised before the update.
    """
    return train_steps(trainer, 1)


def train_steps(trainer: Trainer, n: int) -> tuple[float, float]:
    """`n` optimizer steps; loss and gradient norm of the last.

    A step that `--skip_outliers` leaves out counts, but changes neither weights nor optimizer.

    Raises:
        NonFiniteError: of the first step whose loss or gradient is not finite; the weights are
            those before that step.
    """
    optim, guard, done = trainer.options.optim, trainer.guard, trainer.step + n
    while trainer.step < done:
        tokens, offset = trainer.inputs.take(trainer.step)
        steps = range(
            trainer.step, min(done, trainer.step - offset + trainer.options.steps_per_call)
        )
        factors = [step_lr_factor(step, optim, trainer.n_steps) for step in steps]
        lrs = np.array([trainer.peak_lr * factor for factor in factors], np.float32)
        seeds = np.array([step_seed(optim.seed, step) for step in steps], np.int32)
        numbers = (offset, lrs, seeds, guard.window(), guard.in_row)
        results = trainer.run_steps(tokens, *map(tf.constant, numbers))
        for loss, norm, ok in results.numpy().tolist():
            guard.record(trainer.step + 1, loss, norm, bool(ok), trainer.hint)
            trainer.step += 1
    return loss, norm


def step_seed(seed: int, step: int) -> np.ndarray:
    """Seed of the dropout of a step, (2,) int32; replicas and passes fold their number in."""
    state = np.random.SeedSequence([seed, step]).generate_state(2, np.uint32)
    return (state >> np.uint32(1)).astype(np.int32)


# --- evaluation ----------------------------------------------------------------------------------


@peers_may_go()
def evaluate(
    model: TFALGPT2LMHeadModel, rows: PackedRows, processes: Processes, batch_size: int,
    n_rows: int | None = None, check: Callable[[], None] = lambda: None,
    tick: Callable[[int], None] = lambda n: None,
) -> float:  # fmt: skip
    """Mean loss in nats over every token of the rows, each counted once.

    Args:
        n_rows: evaluate only this many rows, evenly spaced.
        tick: called with the number of rows done.
        check: called before each batch (of several processes before some), on all processes; it
            may raise.
    """
    ids = np.arange(len(rows))
    if n_rows is not None and n_rows < len(ids):
        ids = np.linspace(0, len(ids) - 1, n_rows).astype(np.int64)
    size = math.ceil(batch_size / processes.n_replicas)
    per_call = processes.n_replicas * size
    total = 0.0
    every = CHECKED_BATCHES if processes.count > 1 else 1
    for i, start in enumerate(range(0, len(ids), per_call)):
        if i % every == 0:
            check()
        # Every device takes as many rows each time: those that are too many weigh nothing.
        places = start + processes.rank * processes.n_local * size
        places = np.arange(places, places + processes.n_local * size)
        weights = (places < len(ids)).astype(np.float32)
        batch = rows[ids[np.minimum(places, len(ids) - 1)]].astype(np.int32)
        batch = batch.reshape(processes.n_local, size, -1)
        total += float(
            _eval_step(model, processes.strategy)(
                processes.distribute(batch),
                processes.distribute(weights.reshape(processes.n_local, size)),
            )
        )
        tick(min(per_call, len(ids) - start))
    return total / len(ids)


def validate(trainer: Trainer, rows: PackedRows, n_rows: int | None = None) -> dict[str, float]:
    """`val_loss` and what follows from it, of the model as it is now."""
    batch_size = trainer.options.optim.batch_size
    loss = evaluate(
        trainer.model, rows, trainer.processes, batch_size, n_rows, lambda: check_stop(trainer)
    )
    return text_metrics(loss, text_totals(rows.manifest))


@functools.lru_cache(maxsize=1)
def _eval_step(model: TFALGPT2LMHeadModel, strategy: tf.distribute.Strategy) -> Callable[..., Any]:
    """Weighted sum of the mean losses of rows (B, T + 1) over all replicas."""

    def step(rows: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        inputs, labels = rows[:, :-1], rows[:, 1:]
        weights = tf.repeat(weights[:, None] / labels.shape[1], labels.shape[1], axis=1)
        output = model(inputs, shift_labels=labels, loss_weights=weights, skip_logits=True)
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, output.loss)

    @tf.function
    def run(rows: Any, weights: Any) -> tf.Tensor:
        return strategy.experimental_local_results(strategy.run(step, args=(rows, weights)))[0]

    return run


# --- checkpoints ---------------------------------------------------------------------------------


def save_state(trainer: Trainer, tokenizer: TextTokenizer | None, state: dict[str, Any]) -> None:
    """Write `checkpoint-<step>` in save_dir (process 0) and remove checkpoints no longer kept.

    Args:
        state: what `training_state.json` holds besides step and times.
    Raises:
        OSError: no space or no permission.
        NonFiniteError: the last update left NaN or Inf in weights or optimizer; nothing written.
    """
    tensors = state_tensors(trainer.model, trainer.optimizer)
    everything = {n: v.numpy() for n, v in trainer.model.named_parameters().items()} | tensors
    bad = [name for name, array in everything.items() if not np.isfinite(array).all()]
    check_finite(bad, trainer.step, trainer.hint)

    def fill(folder: Path) -> None:
        trainer.model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save(folder)
        save_file(tensors, folder / OPTIMIZER_FILE)

    if trainer.processes.rank == 0:
        kept = trainer.options.report
        save_dir = local_folder(kept.save_dir)
        state = {
            **state, "elapsed_s": trainer.elapsed_s, "scaler": {},
            "tokens": trainer.step * trainer.tokens_per_step, "outliers": trainer.guard.state(),
            "cut": trainer.cut,
        }  # fmt: skip
        try:
            again = trainer.saved_step == trainer.step
            write_checkpoint(save_dir, trainer.step, fill, state, again=again)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"cannot write the checkpoint of step {trainer.step} in {kept.save_dir} "
                f"({describe(error)}); earlier ones are whole, the same command continues from them"
            ) from error
        prune_checkpoints(save_dir, kept.keep_last, kept.milestone_steps, trainer.step)
        copy_or_warn(kept, trainer.step)
    trainer.saved_step = trainer.step
    trainer.processes.barrier()


def load_state(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Optimizer state, step and outlier statistics of a checkpoint (the model was built from it).

    Raises:
        UserError: the state is not one of this model and optimizer.
    """
    try:
        tensors = load_file(checkpoint.folder / OPTIMIZER_FILE)
        trainer.step, trainer.elapsed_s = checkpoint.step, float(checkpoint.state["elapsed_s"])
        trainer.guard.load(checkpoint.state.get("outliers", {}))
        trainer.cut = check_cut(checkpoint.state.get("cut"), checkpoint.step)
        trainer.saved_step = checkpoint.step
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {describe(error)}"
        raise UserError(f"{checkpoint.folder} is damaged ({reason})") from error
    load_state_tensors(trainer.model, trainer.optimizer, tensors, checkpoint.step)


# --- the run -------------------------------------------------------------------------------------


def make_hooks(
    trainer: Trainer, tokenizer: TextTokenizer | None, val_rows: PackedRows, run: dict[str, Any],
    run_report: RunReport,
) -> Hooks:  # fmt: skip
    """The hooks of train_tf.py: validation, samples, checkpoints and reports of one run."""
    options, model, seen = trainer.options, trainer.model, {"wait_s": 0.0}
    seen["elapsed_s"] = trainer.elapsed_s

    def tick(n_steps: int, loss: float) -> None:
        run_report.progress.update(n_steps, f"loss {loss:.3f}")

    def write(line: dict[str, float]) -> None:
        """Metrics, and the share of the time since the last line that went by without tokens."""
        seconds = max(1e-9, trainer.elapsed_s - seen["elapsed_s"])
        waited = (trainer.inputs.wait_s - seen["wait_s"]) / seconds
        seen.update(elapsed_s=trainer.elapsed_s, wait_s=trainer.inputs.wait_s)
        run_report.metrics(line | {"input_wait": waited})

    def evaluate_now(last: bool) -> dict[str, float]:
        return validate(trainer, val_rows, None if last else options.data.n_eval_rows)

    def save() -> None:
        save_state(trainer, tokenizer, {key: run[key] for key in ("options", "data", "versions")})

    def sample() -> None:
        if trainer.processes.rank == 0 and tokenizer is not None:
            code = (options.data.control_codes or (None,))[0]
            arguments = (model, tokenizer, options.sample, options.optim.seed)
            texts = sample_texts(*arguments, code=code, check=trainer.stop.check)
            run_report.samples(trainer.step, options.sample.prompt, texts)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, variable in model.named_parameters().items():
            trainer.stop.check()
            yield f"weights/{name}", variable.numpy()

    def histograms() -> None:
        run_report.histograms(trainer.step, arrays())

    return Hooks(tick, write, evaluate_now, save, sample, histograms)


def fit(trainer: Trainer, hooks: Hooks) -> bool:
    """Train to the last step; False when stopped early, with the state saved.

    False as well when another worker or the TPU has gone: the last checkpoint stands.
    """

    def take(n: int) -> tuple[float, float]:
        return train_steps(trainer, n)

    try:
        with peers_may_go():
            return run_loop(trainer, hooks, take, trainer.options.steps_per_call)
    except PeerGoneError as error:
        log(f"step {trainer.step}: {error}")
        return False
