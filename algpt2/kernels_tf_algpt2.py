"""Functions of modeling_tf_algpt2.py with gradients of their own, fused by XLA where that helps.

Each computes, to rounding, what its plain form in TensorFlow computes, so this file says nothing
about the model.

    B batch   T time   S time with the cached past   V vocab_size   E embedding_size   C n_embd
    H heads   N rows, all positions of a batch
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

# The loss holds float32 logits of so many rows at a time.
LOSS_ROWS_CPU = 256
LOSS_ROWS = 2048
# The graph holds each piece of the loss, so tracing takes longer with more of them.
MAX_PIECES = 128


def for_tpu() -> bool:
    """True where a program for TPUs is traced: under a TPUStrategy, or for a dry run of it."""
    if isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy):
        return True
    return getattr(tf.distribute.get_replica_context(), "for_tpu", False)


@functools.cache
def has_xla() -> bool:
    """False where TensorFlow cannot compile for this host: tensorflow-tpu has no XLA for CPUs."""
    try:
        with tf.init_scope(), tf.device("CPU"):
            tf.function(tf.zeros, jit_compile=True)([])
    except tf.errors.NotFoundError:  # no transfer manager for platform Host
        return False
    return True


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have XLA make one pass of a chain of element-wise operations, which TensorFlow runs one by
    one. Matrix products stay outside: on a CPU XLA's are slower. A TPU compiles the whole step.
    """
    compiled = tf.function(function, jit_compile=True)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return (function if for_tpu() or not has_xla() else compiled)(*arguments)

    return call


def static_shape(x: tf.Tensor) -> list[Any]:
    """The size of each axis: an integer where it is known while tracing, else a scalar tensor."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]


# --- activation ----------------------------------------------------------------------------------


@fused
def _gelu(x: tf.Tensor) -> tf.Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1 + tf.tanh(inner))


@fused
def _d_gelu(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    scale = math.sqrt(2 / math.pi)
    t = tf.tanh(scale * (x + 0.044715 * x * x * x))
    slope = scale * (1 + 3 * 0.044715 * x * x)
    return dy * 0.5 * (1 + t + x * (1 - t * t) * slope)


@tf.custom_gradient
def gelu_new(x: tf.Tensor) -> tf.Tensor:
    """GPT-2's GELU (tanh form, arXiv:1606.08415); its gradient holds the input only."""
    return _gelu(x), lambda dy: _d_gelu(x, dy)


ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "gelu": lambda x: tf.nn.gelu(x, approximate=False),
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}


def activation(name: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """The activation function of this name in transformers.

    Raises:
        ValueError: `ACTIVATIONS` has no such function.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"expected activation_function to be one of {[*ACTIVATIONS]}, got {name!r}"
        )
    return ACTIVATIONS[name]


# --- layer norm ----------------------------------------------------------------------------------


def _normalize(x: tf.Tensor, epsilon: float) -> tuple[tf.Tensor, tf.Tensor]:
    x = tf.cast(x, tf.float32)
    x -= tf.reduce_mean(x, -1, keepdims=True)
    rsqrt = tf.math.rsqrt(tf.reduce_mean(x * x, -1, keepdims=True) + epsilon)
    return x * rsqrt, rsqrt


@fused
def _layer_norm(x: tf.Tensor, weight: tf.Tensor, bias: tf.Tensor, epsilon: float) -> tf.Tensor:
    return _normalize(x, epsilon)[0] * weight + bias


@fused
def _d_layer_norm(
    x: tf.Tensor, weight: tf.Tensor, dy: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, ...]:
    normal, rsqrt = _normalize(x, epsilon)
    d_normal = dy * weight
    mean = tf.reduce_mean(d_normal, -1, keepdims=True)
    along = tf.reduce_mean(d_normal * normal, -1, keepdims=True)
    row_axes = [*range(x.shape.rank - 1)]
    d_weight, d_bias = tf.reduce_sum(dy * normal, row_axes), tf.reduce_sum(dy, row_axes)
    return (d_normal - mean - normal * along) * rsqrt, d_weight, d_bias


def layer_norm(x: tf.Tensor, weight: tf.Tensor, bias: tf.Tensor, epsilon: float) -> tf.Tensor:
    """Layer norm of `x` (..., C) over the last axis in float32; its gradient holds `x` only.

    Args:
        weight, bias: (C,).
    """

    @tf.custom_gradient
    def apply(x: tf.Tensor, weight: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        y = _layer_norm(x, weight, bias, epsilon)
        return y, lambda dy: _d_layer_norm(x, weight, dy, epsilon)

    return apply(x, weight, bias)


# --- attention weights ---------------------------------------------------------------------------


def masked_softmax(
    scores: tf.Tensor, scaling: float, attention_mask: tf.Tensor | None
) -> tf.Tensor:
    """Causal attention weights (B, H, T, S): the T queries are the last of the S positions.

    The softmax is computed in float32 and rounded to the dtype of the scores.

    Args:
        scores: (B, H, T, S), before scaling.
        attention_mask: (B, S), 0 for padding.
    """
    n_queries, n_keys = tf.shape(scores)[-2], tf.shape(scores)[-1]
    distances = tf.range(n_keys)[None, :] - tf.range(n_queries)[:, None]  # (T, S)
    visible = distances <= n_keys - n_queries
    if attention_mask is not None:
        visible = visible & tf.cast(attention_mask, tf.bool)[:, None, None, :]  # (B, 1, T, S)
    masked = tf.where(visible, tf.cast(scores, tf.float32) * scaling, tf.float32.min)
    return tf.cast(tf.nn.softmax(masked), scores.dtype)


@fused
def _causal_softmax(scores: tf.Tensor, scaling: float) -> tf.Tensor:
    return masked_softmax(scores, scaling, None)


@fused
def _d_softmax(weights: tf.Tensor, d_weights: tf.Tensor, scaling: float) -> tf.Tensor:
    p, d_p = (tf.cast(x, tf.float32) for x in (weights, d_weights))
    d_scores = p * (d_p - tf.reduce_sum(p * d_p, -1, keepdims=True)) * scaling
    return tf.cast(d_scores, weights.dtype)


def causal_softmax(scores: tf.Tensor, scaling: float) -> tf.Tensor:
    """`masked_softmax` of square scores (B, H, T, T) without padding, fused."""

    @tf.custom_gradient
    def apply(scores: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        weights = _causal_softmax(scores, scaling)
        return weights, lambda d_weights: _d_softmax(weights, d_weights, scaling)

    return apply(scores)


# --- embedding and dropout -----------------------------------------------------------------------


@tf.custom_gradient
def embed(weight: tf.Tensor, ids: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """Rows `ids` (...) of `weight` (V, E): (..., E).

    The gradient is dense, because the head, which shares the weight, has a dense one.
    """

    def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, None]:
        rows = tf.reshape(dy, [-1, dy.shape[-1]])  # (N, E)
        return tf.math.unsorted_segment_sum(rows, tf.reshape(ids, [-1]), weight.shape[0]), None

    return tf.gather(weight, ids), gradient


def dropout(x: tf.Tensor, rate: float, seed: tf.Tensor | None, site: int) -> tf.Tensor:
    """Dropout as a function of the step's seed (2,) and of the place in the model.

    A TPU has a generator of its own, as deterministic; philox takes 12 times the step there.

    Args:
        seed: None: no dropout, as in evaluation.
        site: number of the place.
    """
    if seed is None or not rate:
        return x
    seed = tf.random.experimental.stateless_fold_in(tf.cast(seed, tf.int32), site)
    rng_alg = "auto_select" if for_tpu() else "philox"
    return tf.nn.experimental.stateless_dropout(x, rate, seed, rng_alg=rng_alg)


# --- the loss ------------------------------------------------------------------------------------


def head_cross_entropy(
    hidden: tf.Tensor, weight: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor | None, rows: int
) -> tf.Tensor:
    """Mean cross-entropy in nats of the logits `hidden @ weight.T`, a few rows at a time.

    Both gradients are computed in the forward pass while a piece's logits exist.

    Args:
        hidden: states (..., E).
        weight: the head's (V, E).
        labels: ids (...); every label counts.
        weights: (...): return the sum of cross-entropies times weights; None: 1 / N, the mean.
        rows: logits are held for so many rows at a time, or for N / MAX_PIECES if that is more.
    Returns:
        A float32 scalar.
    """
    hidden = tf.reshape(hidden, [-1, hidden.shape[-1]])  # (N, E)
    labels = tf.cast(tf.reshape(labels, [-1]), tf.int32)
    n_rows = static_shape(hidden)[0]
    if weights is None:
        weights = tf.fill([n_rows], 1 / tf.cast(n_rows, tf.float32))
    weights = tf.reshape(weights, [-1])

    @tf.custom_gradient
    def apply(hidden: tf.Tensor, weight: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        loss, d_hidden, d_weight = tf.zeros([]), [], tf.zeros_like(weight, tf.float32)
        starts, size = [0], None
        if isinstance(n_rows, int):
            size = max(rows, math.ceil(n_rows / MAX_PIECES))
            starts = range(0, n_rows, size)
        for start in starts:
            piece = slice(start, start + size if size else None)
            with tf.control_dependencies([d_weight]):  # one piece after the other
                x = tf.identity(hidden[piece])
            logits = tf.matmul(x, weight, transpose_b=True)  # (rows, V)
            piece_loss, d_logits = _piece_loss(logits, labels[piece], weights[piece])
            loss += piece_loss
            d_hidden.append(tf.matmul(d_logits, weight))
            d_weight += tf.cast(tf.matmul(d_logits, x, transpose_a=True), tf.float32)

        def gradient(d_loss: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            scale = tf.cast(d_loss, hidden.dtype)
            return tf.concat(d_hidden, 0) * scale, tf.cast(d_weight * d_loss, weight.dtype)

        return loss, gradient

    return apply(hidden, weight)


@fused
def _piece_loss(
    logits: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The weighted sum of cross-entropies of logits (rows, V), and its gradient in their dtype."""
    x = tf.cast(logits, tf.float32)
    x -= tf.reduce_max(x, -1, keepdims=True)
    p = tf.exp(x)
    total = tf.reduce_sum(p, -1, keepdims=True)
    is_label = tf.range(logits.shape[-1]) == labels[:, None]
    label_logits = tf.reduce_sum(tf.where(is_label, x, 0.0), -1)
    loss = tf.reduce_sum(weights * (tf.math.log(total[:, 0]) - label_logits))
    d_logits = weights[:, None] * (p / total - tf.cast(is_label, tf.float32))
    return loss, tf.cast(d_logits, logits.dtype)
