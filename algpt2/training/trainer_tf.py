"""Training in TensorFlow; trainer_pt.py is the same text in PyTorch, loop.py what both share.

The step is our own, in `strategy.run` inside `tf.function`: Keras' `fit` fails under
tf.distribute.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from safetensors.numpy import load_file, save_file

from ..errors import PeerGoneError, UserError, describe
from ..evaluation.sampling_tf import sample_texts
from ..modeling_tf_algpt2 import TFALGPT2LMHeadModel
from ..options import OptimOptions, TFTrainOptions
from ..runs.run import peak_lr
from ..runs.start import Start
from ..shards.batches import evenly_spaced
from ..shards.tfrecords import PackedRows
from ..system.console import log
from ..system.memory import check_memory
from ..system.processes_tf import Processes, peers_may_go
from . import loop, optimizers_tf
from .guard import MIN_STEPS, StepGuard
from .loop import Metrics
from .optimizers_tf import build_optimizer

CHECKED_BATCHES = 8  # of an evaluation: to ask all workers takes 4 ms of a core


# --- model ---------------------------------------------------------------------------------------


def build_model(start: Start, dtype: str = "float32", seed: int = 0) -> TFALGPT2LMHeadModel:
    """The model of `--config` with random weights or that of `--checkpoint`.

    Raises:
        UserError: unknown config or checkpoint, vocabulary or seq_len that does not fit.
    """
    from ..configuration_algpt2 import ALGPT2Config  # which imports torch where it is installed

    source, tokenizer = start.source, start.tokenizer
    try:
        config = ALGPT2Config.from_pretrained(source)
        check_memory(config.stored_parameters())
        start.check_fits(config.to_dict())
        if start.loads_weights:
            model = TFALGPT2LMHeadModel.from_pretrained(source, dtype=dtype, warn=log)
        else:
            model = TFALGPT2LMHeadModel(config, dtype=dtype, seed=seed)
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            model = add_embeddings(model, tokenizer.vocab_size, dtype)
        start.set_token_ids(model.config)
    except UserError:
        raise
    except Exception as error:  # a damaged file can make transformers raise anything
        reason = describe(error)[:500]
        raise UserError(f"cannot load a GPT-2 or ALGPT2 from {source}: {reason}") from error
    model.transformer.gradient_checkpointing = start.options.gradient_checkpointing
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


# --- loss ----------------------------------------------------------------------------------------


def mean_loss(model: TFALGPT2LMHeadModel, rows: tf.Tensor, seed: tf.Tensor | None) -> tf.Tensor:
    """Mean cross-entropy in nats of the tokens of `rows`.

    Args:
        rows: (B, T + 1) token ids; position t predicts token t + 1.
        seed: (2,) of dropout; None: no dropout.
    """
    rows = tf.cast(rows, tf.int32)
    return model(rows[:, :-1], shift_labels=rows[:, 1:], skip_logits=True, seed=seed).loss


def step_seed(seed: int, step: int) -> np.ndarray:
    """Seed of the dropout of a step, (2,) int32; replicas and passes fold their number in."""
    state = np.random.SeedSequence([seed, step]).generate_state(2, np.uint32)
    return (state >> np.uint32(1)).astype(np.int32)


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
    ids = evenly_spaced(len(rows), n_rows)
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


# --- step ----------------------------------------------------------------------------------------


def build_step(
    model: TFALGPT2LMHeadModel, optimizer: Any, optim: OptimOptions, compiled: bool | None = False
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

        # Forward and backward
        loss, grads = _accumulate(gradients, rows, seed, shapes)
        loss, *grads = context.all_reduce(tf.distribute.ReduceOp.MEAN, [loss, *grads])

        # Clip
        norm = tf.linalg.global_norm(grads)
        if optim.max_grad_norm:
            scale = tf.minimum(1.0, optim.max_grad_norm / (norm + 1e-6))
            grads = [gradient * scale for gradient in grads]

        # Step
        ok = ok & tf.math.is_finite(loss) & tf.math.is_finite(norm)
        ok = ok & (loss <= limits[0]) & (norm <= limits[1])
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


def build_run(
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


# --- trainer -------------------------------------------------------------------------------------


class Trainer(loop.Trainer):
    """A Keras model in training: on all devices of all processes, or of a TPU."""

    evaluate, sample_texts = staticmethod(evaluate), staticmethod(sample_texts)
    load_tensors, save_tensors = staticmethod(load_file), staticmethod(save_file)

    options: TFTrainOptions
    processes: Processes
    waited_s = 0.0  # for tokens, up to the last line of metrics

    def __post_init__(self) -> None:
        super().__post_init__()
        options, self.steps_per_call = self.options, self.options.steps_per_call
        step = build_step(self.model, self.optimizer, options.optim, options.compile)
        self.run_steps = build_run(self.processes.strategy, step, self.steps_per_call, self.guard)

    @staticmethod
    def build_parts(
        options: TFTrainOptions, start: Start, processes: Processes
    ) -> tuple[TFALGPT2LMHeadModel, Any]:
        with processes.strategy.scope():
            model = build_model(start, processes.dtype, options.optim.seed)
            lr = peak_lr(options.optim, options.model)
            return model, build_optimizer(model, options.optim, lr)

    def train_steps(self, n: int) -> tuple[float, float]:
        """Take `n` optimizer steps; loss and gradient norm of the last. If a step's numbers are not
        finite, the weights are those before that step."""
        guard, done = self.guard, self.step + n
        while self.step < done:
            tokens, offset = self.inputs.take(self.step)
            steps = range(self.step, min(done, self.step - offset + self.steps_per_call))
            lrs = np.array([self.peak_lr * self.lr_factor(step) for step in steps], np.float32)
            seeds = [step_seed(self.options.optim.seed, step) for step in steps]
            numbers = (offset, lrs, np.array(seeds, np.int32), guard.window(), guard.in_row)
            results = self.run_steps(tokens, *map(tf.constant, numbers))
            for loss, norm, ok in results.numpy().tolist():
                guard.record(self.step + 1, loss, norm, bool(ok), self.hint)
                self.step += 1
        return loss, norm

    def train(self) -> bool:
        """As the base; False as well when another worker or the TPU has gone: the last checkpoint
        stands."""
        try:
            with peers_may_go():
                return super().train()
        except PeerGoneError as error:
            log(f"step {self.step}: {error}")
            return False

    def write_metrics(self, line: Metrics) -> None:
        """`input_wait`: share of the time since the last line in which tokens were waited for."""
        waited_s, self.waited_s = self.inputs.wait_s - self.waited_s, self.inputs.wait_s
        super().write_metrics(line | {"input_wait": waited_s / max(1e-9, self.seconds)})

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: v.numpy() for name, v in self.model.named_parameters().items()}

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, variable in self.model.named_parameters().items():
            self.stop.check()
            yield f"weights/{name}", variable.numpy()

    def is_finite(self, tensor: np.ndarray) -> bool:
        return bool(np.isfinite(tensor).all())

    def state_tensors(self) -> dict[str, np.ndarray]:
        return optimizers_tf.state_tensors(self.model, self.optimizer)

    def load_state_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        optimizers_tf.load_state_tensors(self.model, self.optimizer, tensors, self.step)
