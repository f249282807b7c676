"""ALGPT2 in Keras 3 on TensorFlow: the modules of modeling_algpt2.py, same names, same order.

    B batch   T time   S time with the cached past   V vocabulary   E embedding_size   C n_embd
    H heads   D = C / H   L layers   K stored blocks   N = B T

A layer's name is its name in the weight files and its arrays have the layout that they have there,
so a variable `transformer.h.0.attn.c_attn.weight` is the tensor of that name in model.safetensors:
no table, no transposition. transformers has no TensorFlow models any more; this one also loads
gpt2, distilgpt2 and any other GPT-2 checkpoint.
"""

import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf

if TYPE_CHECKING:  # transformers' configurations import torch where it is installed
    from .configuration_algpt2 import ALGPT2Config

Cache = list[tuple[tf.Tensor, tf.Tensor]]  # for each of the L layers: key, value (B, H, S, D)

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

# Rows of float32 logits that the loss holds at a time; as in modeling_algpt2.py.
LOSS_ROWS_CPU = 256
LOSS_ROWS = 2048
# Pieces stand in the graph one by one: of 512 rows of 1,024 tokens, 2,048 took minutes to trace.
MAX_PIECES = 128

# XLA makes one pass of chains of element-wise operations, which TensorFlow runs one by one: on CPU
# GELU with its gradient takes a fifth of the time. Matrix products stay outside: XLA's are slower.
fused = tf.function(jit_compile=True)


# --- functions with gradients of their own -------------------------------------------------------


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
    """GPT-2's GELU (tanh form, arXiv:1606.08415); backward holds nothing but its input."""
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
    others = [*range(x.shape.rank - 1)]
    d_weight, d_bias = tf.reduce_sum(dy * normal, others), tf.reduce_sum(dy, others)
    return (d_normal - mean - normal * along) * rsqrt, d_weight, d_bias


def layer_norm(x: tf.Tensor, weight: tf.Tensor, bias: tf.Tensor, epsilon: float) -> tf.Tensor:
    """Layer norm over the last axis in float32; backward holds nothing but its input."""

    @tf.custom_gradient
    def apply(x: tf.Tensor, weight: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        y = _layer_norm(x, weight, bias, epsilon)
        return y, lambda dy: _d_layer_norm(x, weight, dy, epsilon)

    return apply(x, weight, bias)


@fused
def _causal_softmax(scores: tf.Tensor, scaling: float) -> tf.Tensor:
    return _masked_softmax(scores, scaling, None)


@fused
def _d_softmax(weights: tf.Tensor, d_weights: tf.Tensor, scaling: float) -> tf.Tensor:
    p, d_p = (tf.cast(x, tf.float32) for x in (weights, d_weights))
    d_scores = p * (d_p - tf.reduce_sum(p * d_p, -1, keepdims=True)) * scaling
    return tf.cast(d_scores, weights.dtype)


def causal_softmax(scores: tf.Tensor, scaling: float) -> tf.Tensor:
    """Attention weights (B, H, T, T) of square scores: each position and those before it."""

    @tf.custom_gradient
    def apply(scores: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        weights = _causal_softmax(scores, scaling)
        return weights, lambda d_weights: _d_softmax(weights, d_weights, scaling)

    return apply(scores)


def _masked_softmax(
    scores: tf.Tensor, scaling: float, attention_mask: tf.Tensor | None
) -> tf.Tensor:
    """Attention weights (B, H, T, S) in float32, rounded to the dtype of the scores.

    Args:
        attention_mask: (B, S), 0 for padding.
    """
    n_queries, n_keys = tf.shape(scores)[-2], tf.shape(scores)[-1]
    ages = tf.range(n_keys)[None, :] - tf.range(n_queries)[:, None]
    visible = ages <= n_keys - n_queries
    if attention_mask is not None:
        visible = visible & tf.cast(attention_mask, tf.bool)[:, None, None, :]
    masked = tf.where(visible, tf.cast(scores, tf.float32) * scaling, tf.float32.min)
    return tf.cast(tf.nn.softmax(masked), scores.dtype)


@tf.custom_gradient
def embed(weight: tf.Tensor, ids: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """Rows `ids` (...) of `weight` (V, E), with a dense gradient: head and embedding share it."""

    def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, None]:
        rows = tf.reshape(dy, [-1, dy.shape[-1]])
        return tf.math.unsorted_segment_sum(rows, tf.reshape(ids, [-1]), weight.shape[0]), None

    return tf.gather(weight, ids), gradient


def dropout(x: tf.Tensor, rate: float, seed: tf.Tensor | None, site: int) -> tf.Tensor:
    """Dropout as a function of the seed (2,) of the step and the place in the model.

    `seed=None`: none, as in evaluation.
    """
    if seed is None or not rate:
        return x
    seed = tf.random.experimental.stateless_fold_in(tf.cast(seed, tf.int32), site)
    return tf.nn.experimental.stateless_dropout(x, rate, seed, rng_alg="philox")


# --- the model -----------------------------------------------------------------------------------


class Module(keras.layers.Layer):
    """A layer whose name and variables are those of the weight files.

    Parameters are float32; what multiplies matrices casts to the policy's compute dtype itself,
    so that norms, softmax and the residual stream stay in float32 as under torch.autocast.
    """

    def __init__(self, config: "ALGPT2Config", name: str, policy: Any, seed: int) -> None:
        super().__init__(name=name, dtype=policy, autocast=False)
        self.config, self.rest = config, (policy, seed)

    def parameter(self, kind: str, shape: Sequence[int], std: float, mean: float = 0.0) -> Any:
        """The variable `{name of this layer}.{kind}`, normal with `std` around `mean`."""
        name = f"{self.name}.{kind}"
        seed = (zlib.crc32(name.encode()) + self.rest[1]) % 2**31
        initializer = (
            keras.initializers.RandomNormal(mean, std, seed=seed)
            if std
            else keras.initializers.Constant(mean)
        )
        self.built = True
        return self.add_weight(name=name, shape=shape, initializer=initializer, autocast=False)

    def cast(self, *tensors: Any) -> list[tf.Tensor]:
        """In the dtype of matrix products."""
        return [tf.cast(tensor, self.compute_dtype) for tensor in tensors]


class Embedding(Module):
    """`weight` (n, E)."""

    def __init__(self, n: int, size: int, config: "ALGPT2Config", *rest: Any) -> None:
        super().__init__(config, *rest)
        self.weight = self.parameter("weight", (n, size), config.initializer_range)

    def call(self, ids: tf.Tensor) -> tf.Tensor:
        return embed(tf.convert_to_tensor(self.weight), ids)


class Conv1D(Module):
    """GPT-2's projection: `weight` (in, out), `bias` (out,)."""

    residual = False

    def __init__(self, n_out: int, n_in: int, config: "ALGPT2Config", *rest: Any) -> None:
        super().__init__(config, *rest)
        std = config.initializer_range * (config.residual_init_scale if self.residual else 1)
        self.weight = self.parameter("weight", (n_in, n_out), std)
        self.bias = self.parameter("bias", (n_out,), 0.0)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        x, weight, bias = self.cast(x, self.weight, self.bias)
        # As one matrix: a product with a batch axis is many small ones to TensorFlow.
        y = tf.matmul(tf.reshape(x, [-1, weight.shape[0]]), weight)
        return tf.reshape(tf.nn.bias_add(y, bias), [*_shape(x)[:-1], weight.shape[1]])


class ResidualConv1D(Conv1D):
    """A projection onto the residual stream: a class, because its initialisation is its own."""

    residual = True


class Linear(Module):
    """`weight` (out, in) and `bias` (out,)."""

    def __init__(self, n_in: int, n_out: int, config: "ALGPT2Config", *rest: Any) -> None:
        super().__init__(config, *rest)
        self.weight = self.parameter("weight", (n_out, n_in), config.initializer_range)
        self.bias = self.parameter("bias", (n_out,), 0.0)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        x, weight, bias = self.cast(x, self.weight, self.bias)
        y = tf.matmul(tf.reshape(x, [-1, weight.shape[1]]), weight, transpose_b=True)
        return tf.reshape(tf.nn.bias_add(y, bias), [*_shape(x)[:-1], weight.shape[0]])


class LayerNorm(Module):
    """`weight` and `bias` (C,)."""

    def __init__(self, size: int, config: "ALGPT2Config", *rest: Any) -> None:
        super().__init__(config, *rest)
        self.weight = self.parameter("weight", (size,), 0.0, mean=1.0)
        self.bias = self.parameter("bias", (size,), 0.0)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        weight, bias = tf.convert_to_tensor(self.weight), tf.convert_to_tensor(self.bias)
        return layer_norm(x, weight, bias, self.config.layer_norm_epsilon)


class TFALGPT2Attention(Module):
    """Causal self-attention. Which layer it serves comes with the call: blocks are shared."""

    def __init__(self, config: "ALGPT2Config", name: str, *rest: Any) -> None:
        super().__init__(config, name, *rest)
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd, config, f"{name}.c_attn", *rest)
        self.c_proj = ResidualConv1D(config.n_embd, config.n_embd, config, f"{name}.c_proj", *rest)

    def call(
        self,
        x: tf.Tensor,
        layer: int,
        past: tuple[tf.Tensor, tf.Tensor] | None = None,
        attention_mask: tf.Tensor | None = None,
        seed: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
        config = self.config
        head_dim = config.n_embd // config.n_head
        heads = tf.reshape(self.c_attn(x), [*_shape(x)[:-1], 3, config.n_head, head_dim])
        query, key, value = tf.unstack(tf.transpose(heads, [2, 0, 3, 1, 4]))  # (B, H, T, D)
        if past is not None:
            key, value = (tf.concat(pair, 2) for pair in zip(past, (key, value), strict=True))
        scaling = head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scaling /= layer + 1
        scores = tf.matmul(query, key, transpose_b=True)  # (B, H, T, S)
        if past is None and attention_mask is None:
            weights = causal_softmax(scores, scaling)
        else:  # S grows from call to call: XLA would compile each time
            weights = _masked_softmax(scores, scaling, attention_mask)
        weights = dropout(weights, config.attn_pdrop, seed, 3 * layer + 1)
        mixed = tf.transpose(tf.matmul(weights, value), [0, 2, 1, 3])
        x = self.c_proj(tf.reshape(mixed, _shape(x)))  # (B, T, C)
        return dropout(x, config.resid_pdrop, seed, 3 * layer + 2), (key, value)


class TFALGPT2MLP(Module):
    """C -> I -> C."""

    def __init__(self, config: "ALGPT2Config", name: str, *rest: Any) -> None:
        super().__init__(config, name, *rest)
        activation = config.activation_function
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"expected activation_function to be one of {[*ACTIVATIONS]}, got {activation!r}"
            )
        self.c_fc = Conv1D(config.inner_size, config.n_embd, config, f"{name}.c_fc", *rest)
        self.c_proj = ResidualConv1D(
            config.n_embd, config.inner_size, config, f"{name}.c_proj", *rest
        )
        self.act = ACTIVATIONS[activation]

    def call(self, x: tf.Tensor, layer: int, seed: tf.Tensor | None = None) -> tf.Tensor:
        x = self.c_proj(self.act(self.c_fc(x)))
        return dropout(x, self.config.resid_pdrop, seed, 3 * layer + 3)


class TFALGPT2Block(Module):
    """One stored block, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: "ALGPT2Config", name: str, *rest: Any) -> None:
        super().__init__(config, name, *rest)
        self.ln_1 = LayerNorm(config.n_embd, config, f"{name}.ln_1", *rest)
        self.attn = TFALGPT2Attention(config, f"{name}.attn", *rest)
        self.ln_2 = LayerNorm(config.n_embd, config, f"{name}.ln_2", *rest)
        self.mlp = TFALGPT2MLP(config, f"{name}.mlp", *rest)

    def call(
        self,
        x: tf.Tensor,
        layer: int,
        past: tuple[tf.Tensor, tf.Tensor] | None = None,
        attention_mask: tf.Tensor | None = None,
        seed: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
        mixed, present = self.attn(
            self.ln_1(x), layer=layer, past=past, attention_mask=attention_mask, seed=seed
        )
        x += tf.cast(mixed, x.dtype)
        return x + tf.cast(self.mlp(self.ln_2(x), layer=layer, seed=seed), x.dtype), present


class TFALGPT2Model(Module):
    """Token ids to hidden states after the last layer norm, (B, T) -> (B, T, C)."""

    def __init__(self, config: "ALGPT2Config", name: str, *rest: Any) -> None:
        super().__init__(config, name, *rest)
        config.check()
        size, width = config.embedding_size, config.n_embd
        self.wte = Embedding(config.vocab_size, size, config, f"{name}.wte", *rest)
        self.wpe = Embedding(config.n_positions, size, config, f"{name}.wpe", *rest)
        self.projection_layer = None
        if config.is_factorized:
            self.projection_layer = Linear(size, width, config, f"{name}.projection_layer", *rest)
        self.h = [
            TFALGPT2Block(config, f"{name}.h.{i}", *rest) for i in range(config.num_hidden_groups)
        ]
        self.ln_f = LayerNorm(width, config, f"{name}.ln_f", *rest)
        self.gradient_checkpointing = False

    def call(
        self,
        input_ids: tf.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        seed: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, Cache]:
        if position_ids is None:
            position_ids = self._positions(input_ids, past_key_values)
        x = dropout(
            self.wte(input_ids) + self.wpe(position_ids), self.config.embd_pdrop, seed, 0
        )  # (B, T, E)
        if self.projection_layer is not None:
            x = tf.cast(self.projection_layer(x), tf.float32)  # (B, T, C)
        presents = []
        for layer, block in enumerate(self.config.block_of_layers()):
            past = past_key_values[layer] if past_key_values else None

            def apply(x: tf.Tensor, block=self.h[block], layer=layer, past=past) -> Any:
                return block(x, layer=layer, past=past, attention_mask=attention_mask, seed=seed)

            x, present = (tf.recompute_grad(apply) if self.gradient_checkpointing else apply)(x)
            presents.append(present)
        return self.ln_f(x), presents

    def _positions(self, input_ids: tf.Tensor, past: Cache | None) -> tf.Tensor:
        """Positions (1, T) that follow those in the cache."""
        length = _shape(input_ids)[1]
        start = _shape(past[0][0])[2] if past else 0
        limit = self.config.n_positions
        if isinstance(length, int) and isinstance(start, int) and start + length > limit:
            raise ValueError(
                f"expected at most n_positions={limit} positions, got {start + length}; "
                "shorten the input or slide a window over it"
            )
        return tf.range(start, start + length)[None]


class TFCausalLMOutput(NamedTuple):
    """What the language model returns; None for what was not asked for."""

    loss: tf.Tensor | None
    logits: tf.Tensor | None
    past_key_values: Cache | None


class TFALGPT2LMHeadModel(keras.Model):
    """The language model: C -> E through `dense`, E -> V with the token embedding's weight.

    Args:
        dtype: "float32", or "mixed_bfloat16" for matrix products in bfloat16.
        seed: of the random weights; GPT-2's initialisation as in modeling_algpt2.py.
    """

    def __init__(
        self, config: "ALGPT2Config", dtype: str = "float32", seed: int = 0, name: str = "algpt2"
    ) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.config = config
        rest = (self.dtype_policy, seed)
        size, width = config.embedding_size, config.n_embd
        self.transformer = TFALGPT2Model(config, "transformer", *rest)
        self.dense = Linear(width, size, config, "dense", *rest) if config.is_factorized else None
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, size, config, "lm_head", *rest)
        on_cpu = not tf.config.list_logical_devices("GPU") + tf.config.list_logical_devices("TPU")
        self.loss_rows = LOSS_ROWS_CPU if on_cpu else LOSS_ROWS
        self.built = True

    def call(
        self,
        input_ids: tf.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        shift_labels: tf.Tensor | None = None,
        loss_weights: tf.Tensor | None = None,
        use_cache: bool = False,
        skip_logits: bool = False,
        seed: tf.Tensor | None = None,
    ) -> TFCausalLMOutput:
        """Logits (B, T, V) and, given labels, the cross-entropy in nats.

        Args:
            past_key_values: key and value (B, H, S, D) for each of the L layers.
            attention_mask: 1 for tokens and 0 for padding (B, S).
            position_ids: (B, T); None: counted on from the cache. Padding on the left needs them.
            shift_labels: ids (B, T) of the next tokens; the loss is their mean.
            loss_weights: (B, T); the loss is the sum so weighted instead.
            skip_logits: with `shift_labels`: without holding the logits, which are then None.
            seed: (2,) integers: dropout as a function of them; None: no dropout.
        Raises:
            ValueError: more than `n_positions` positions; `skip_logits` without `shift_labels`.
        """
        if skip_logits and shift_labels is None:
            raise ValueError("expected shift_labels with skip_logits=True; give the next tokens")
        x, presents = self.transformer(
            input_ids, past_key_values=past_key_values, attention_mask=attention_mask,
            position_ids=position_ids, seed=seed,
        )  # fmt: skip
        if self.dense is not None:
            x = self.dense(x)  # (B, T, E)
        head = self.lm_head if self.lm_head is not None else self.transformer.wte
        x, weight = (tf.cast(tensor, self.compute_dtype) for tensor in (x, head.weight))
        loss = logits = None
        if shift_labels is not None:
            loss = head_cross_entropy(x, weight, shift_labels, loss_weights, self.loss_rows)
        if not skip_logits:
            flat = tf.matmul(tf.reshape(x, [-1, weight.shape[1]]), weight, transpose_b=True)
            logits = tf.reshape(flat, [*_shape(x)[:-1], weight.shape[0]])
        return TFCausalLMOutput(loss, logits, presents if use_cache else None)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, dtype: str = "float32", **config_keys: Any
    ) -> "TFALGPT2LMHeadModel":
        """The model of a checkpoint folder or a name on the Hugging Face hub, GPT-2 or ALGPT2.

        Args:
            config_keys: in place of the configuration's, such as `attn_pdrop=0.0`.
        Raises:
            OSError: no config.json or no safetensors there.
            ValueError: another kind of model, or arrays missing, left over or of another shape.
        """
        from .configuration_algpt2 import ALGPT2Config

        config = ALGPT2Config.from_pretrained(source, **config_keys)
        model = cls(config, dtype=dtype)
        model.load_state_dict(read_weights(source))
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, generation_config.json and model.safetensors as PyTorch does."""
        from safetensors.tensorflow import save_file
        from transformers import GenerationConfig

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = ["ALGPT2LMHeadModel"]
        self.config.save_pretrained(folder)
        GenerationConfig.from_model_config(self.config).save_pretrained(folder)
        save_file(self.state_dict(), folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def named_parameters(self) -> dict[str, Any]:
        """Variables by their names in the weight files."""
        return {variable.name: variable for variable in self.trainable_variables}

    def num_parameters(self) -> int:
        """Parameters stored."""
        return sum(math.prod(v.shape) for v in self.trainable_variables)

    def state_dict(self) -> dict[str, tf.Tensor]:
        """The parameters as float32 tensors."""
        return {n: tf.convert_to_tensor(v.numpy()) for n, v in self.named_parameters().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Assign arrays by name; names of the original and of bare GPT-2 trunks are understood.

        Raises:
            ValueError: an array is missing, left over, or of another shape.
        """
        parameters, state = self.named_parameters(), rename_weights(state)
        if self.lm_head is None:
            state.pop("lm_head.weight", None)  # a copy of the embedding
        missing, extra = parameters.keys() - state.keys(), state.keys() - parameters.keys()
        if missing or extra:
            raise ValueError(
                f"the weights are of another model: missing {sorted(missing)[:3]}, left over "
                f"{sorted(extra)[:3]}; expected those of its config.json"
            )
        for name, variable in parameters.items():
            if tuple(state[name].shape) != tuple(variable.shape):
                raise ValueError(
                    f"expected {name} of shape {tuple(variable.shape)} as config.json says, got "
                    f"{tuple(state[name].shape)}"
                )
            variable.assign(tf.cast(state[name], tf.float32))


# --- the loss ------------------------------------------------------------------------------------


def head_cross_entropy(
    hidden: tf.Tensor, weight: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor | None, rows: int
) -> tf.Tensor:
    """Mean cross-entropy of `hidden @ weight.T` (float32 scalar), a few rows of logits at a time.

    Both gradients are computed forward while a piece of the logits is there.

    Args:
        hidden: (..., E); weight: (V, E); labels: (...) ids.
        weights: (...) of each position in a sum; None: 1 / N, the mean.
        rows: of logits at a time (more where MAX_PIECES of them would not do).
    """
    hidden = tf.reshape(hidden, [-1, hidden.shape[-1]])
    labels = tf.cast(tf.reshape(labels, [-1]), tf.int32)
    n_rows = _shape(hidden)[0]
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
            logits = tf.matmul(x, weight, transpose_b=True)
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
    """Weighted sum of cross-entropies of logits (n, V), and its gradient in their dtype."""
    x = tf.cast(logits, tf.float32)
    x -= tf.reduce_max(x, -1, keepdims=True)
    p = tf.exp(x)
    total = tf.reduce_sum(p, -1, keepdims=True)
    is_label = tf.range(logits.shape[-1]) == labels[:, None]
    wanted = tf.reduce_sum(tf.where(is_label, x, 0.0), -1)
    loss = tf.reduce_sum(weights * (tf.math.log(total[:, 0]) - wanted))
    d_logits = weights[:, None] * (p / total - tf.cast(is_label, tf.float32))
    return loss, tf.cast(d_logits, logits.dtype)


# --- weight files --------------------------------------------------------------------------------


def read_weights(source: str | Path) -> dict[str, tf.Tensor]:
    """The arrays of a folder's safetensors (one file, or several with an index), or of the hub's.

    Raises:
        OSError: none there.
    """
    from safetensors.tensorflow import load_file
    from transformers.utils import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    path = cached_file(str(source), WEIGHTS_FILE, **optional)
    if path is not None:
        return load_file(path)
    index = cached_file(str(source), INDEX_FILE, **optional)
    if index is None:
        raise OSError(
            f"expected {WEIGHTS_FILE} in {source}; AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...) in PyTorch makes one of a pytorch_model.bin"
        )
    files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    weights: dict[str, tf.Tensor] = {}
    for file in sorted(set(files)):
        weights |= load_file(cached_file(str(source), file))
    return weights


def rename_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The names of this file's variables for those of a weight file.

    Stock GPT-2 files may lack `transformer.`; files of the original ALGPT2 lack the block's index;
    older ones hold causal masks, which are left out.
    """
    from .configuration_algpt2 import MASK_BUFFERS, UNINDEXED

    renamed = {}
    for name, array in state.items():
        if not re.match(r"(transformer|dense|lm_head)\.", name):
            name = f"transformer.{name}"
        if not re.search(MASK_BUFFERS, name):
            renamed[re.sub(rf"\bh\.{UNINDEXED}", r"h.0.\1.", name)] = array
    return renamed


def _shape(x: tf.Tensor) -> list[Any]:
    """Sizes as integers where they are known when tracing, else as scalar tensors."""
    dynamic = tf.shape(x)
    return [dynamic[i] if n is None else n for i, n in enumerate(x.shape)]
