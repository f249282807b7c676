"""ALGPT2 in Keras 3 on TensorFlow: the modules of modeling_algpt2.py, same names, same order.

    B batch   T time   S time with the cached past   V vocab_size   E embedding_size   C n_embd
    H heads   D = C / H   I inner size of the MLP   L layers   K stored blocks

A layer's name is its name in the weight files, and its arrays have the layout that they have there:
a variable `transformer.h.0.attn.c_attn.weight` is the tensor of that name in model.safetensors. So
loading needs no table and no transposition. transformers has no TensorFlow models any more; this
one also loads gpt2, distilgpt2 and any other GPT-2 checkpoint. kernels_tf_algpt2.py holds the
fused functions and the loss.
"""

import functools
import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from .errors import untied_warning
from .kernels_tf_algpt2 import (
    LOSS_ROWS,
    LOSS_ROWS_CPU,
    activation,
    causal_softmax,
    dropout,
    embed,
    head_cross_entropy,
    layer_norm,
    masked_softmax,
    static_shape,
)

if TYPE_CHECKING:  # transformers' configurations import torch where it is installed
    from .configuration_algpt2 import ALGPT2Config

Cache = list[tuple[tf.Tensor, tf.Tensor]]  # for each of the L layers: key, value (B, H, S, D)


# --- layers --------------------------------------------------------------------------------------


class Module(keras.layers.Layer):
    """A layer whose name and variables are those of the weight files.

    Parameters are float32. A layer that multiplies matrices casts to the policy's compute dtype
    itself; norms, softmax and the residual stream stay in float32, as under torch.autocast.
    """

    def __init__(self, config: "ALGPT2Config", name: str, policy: Any, seed: int) -> None:
        super().__init__(name=name, dtype=policy, autocast=False)
        self.config, self.init_seed = config, seed

    def child(self, name: str, kind: type["Module"], *sizes: int) -> Any:
        """A new layer of class `kind` whose name is `{name of this layer}.{name}`."""
        return kind(*sizes, self.config, f"{self.name}.{name}", self.dtype_policy, self.init_seed)

    def parameter(self, kind: str, shape: Sequence[int], std: float, mean: float = 0.0) -> Any:
        """The variable `{name of this layer}.{kind}`, normal with `std` around `mean`."""
        name = f"{self.name}.{kind}"
        seed = (zlib.crc32(name.encode()) + self.init_seed) % 2**31
        initializer = (
            keras.initializers.RandomNormal(mean, std, seed=seed)
            if std
            else keras.initializers.Constant(mean)
        )
        self.built = True
        return self.add_weight(name=name, shape=shape, initializer=initializer, autocast=False)

    def cast(self, *tensors: Any) -> list[tf.Tensor]:
        """The tensors in the dtype of matrix products."""
        return [tf.cast(tensor, self.compute_dtype) for tensor in tensors]


class Embedding(Module):
    """Token or position embedding, (B, T) -> (B, T, E): `weight` (n, E)."""

    def __init__(self, n: int, size: int, config: "ALGPT2Config", *arguments: Any) -> None:
        super().__init__(config, *arguments)
        self.weight = self.parameter("weight", (n, size), config.initializer_range)

    def call(self, ids: tf.Tensor) -> tf.Tensor:
        return embed(tf.convert_to_tensor(self.weight), ids)


class Conv1D(Module):
    """GPT-2's projection, (..., n_in) -> (..., n_out): `weight` (n_in, n_out), `bias` (n_out,)."""

    residual = False

    def __init__(self, n_out: int, n_in: int, config: "ALGPT2Config", *arguments: Any) -> None:
        super().__init__(config, *arguments)
        std = config.initializer_range * (config.residual_init_scale if self.residual else 1)
        self.weight = self.parameter("weight", (n_in, n_out), std)
        self.bias = self.parameter("bias", (n_out,), 0.0)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        x, weight, bias = self.cast(x, self.weight, self.bias)
        # TensorFlow computes a product with a batch axis as many small ones.
        rows = tf.reshape(x, [-1, weight.shape[0]])  # (B T, n_in)
        y = tf.matmul(rows, weight)
        return tf.reshape(tf.nn.bias_add(y, bias), [*static_shape(x)[:-1], weight.shape[1]])


class ResidualConv1D(Conv1D):
    """A projection onto the residual stream, whose initial weights are scaled."""

    residual = True


class Linear(Module):
    """`nn.Linear`, (..., n_in) -> (..., n_out): `weight` (n_out, n_in), `bias` (n_out,)."""

    def __init__(self, n_in: int, n_out: int, config: "ALGPT2Config", *arguments: Any) -> None:
        super().__init__(config, *arguments)
        self.weight = self.parameter("weight", (n_out, n_in), config.initializer_range)
        self.bias = self.parameter("bias", (n_out,), 0.0)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        x, weight, bias = self.cast(x, self.weight, self.bias)
        rows = tf.reshape(x, [-1, weight.shape[1]])  # (B T, n_in)
        y = tf.matmul(rows, weight, transpose_b=True)
        return tf.reshape(tf.nn.bias_add(y, bias), [*static_shape(x)[:-1], weight.shape[0]])


class LayerNorm(Module):
    """Layer norm, (B, T, C) -> (B, T, C): `weight` (C,), `bias` (C,)."""

    def __init__(self, size: int, config: "ALGPT2Config", *arguments: Any) -> None:
        super().__init__(config, *arguments)
        self.weight = self.parameter("weight", (size,), 0.0, mean=1.0)
        self.bias = self.parameter("bias", (size,), 0.0)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        weight, bias = tf.convert_to_tensor(self.weight), tf.convert_to_tensor(self.bias)
        return layer_norm(x, weight, bias, self.config.layer_norm_epsilon)


# --- the model -----------------------------------------------------------------------------------


class TFALGPT2Attention(Module):
    """Causal self-attention, (B, T, C) -> (B, T, C).

    Several layers share it, so the call says which layer it serves: `layer_index`.
    """

    def __init__(self, config: "ALGPT2Config", *arguments: Any) -> None:
        super().__init__(config, *arguments)
        self.c_attn = self.child("c_attn", Conv1D, 3 * config.n_embd, config.n_embd)
        self.c_proj = self.child("c_proj", ResidualConv1D, config.n_embd, config.n_embd)

    def call(
        self,
        x: tf.Tensor,
        layer_index: int,
        past: tuple[tf.Tensor, tf.Tensor] | None = None,
        attention_mask: tf.Tensor | None = None,
        seed: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
        config = self.config
        head_dim = config.n_embd // config.n_head
        heads = [*static_shape(x)[:-1], 3, config.n_head, head_dim]
        qkv = tf.reshape(self.c_attn(x), heads)  # (B, T, 3 C) -> (B, T, 3, H, D)
        query, key, value = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))  # (B, H, T, D)
        if past is not None:
            past_key, past_value = past
            key = tf.concat([past_key, key], 2)  # (B, H, S, D)
            value = tf.concat([past_value, value], 2)  # (B, H, S, D)
        scaling = head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scaling /= layer_index + 1
        scores = tf.matmul(query, key, transpose_b=True)  # (B, H, T, S)
        if past is None and attention_mask is None:
            weights = causal_softmax(scores, scaling)
        else:  # S grows from call to call, and XLA would compile each time
            weights = masked_softmax(scores, scaling, attention_mask)
        weights = dropout(weights, config.attn_pdrop, seed, 3 * layer_index + 1)
        mixed = tf.transpose(tf.matmul(weights, value), [0, 2, 1, 3])  # (B, T, H, D)
        x = self.c_proj(tf.reshape(mixed, static_shape(x)))  # (B, T, C)
        return dropout(x, config.resid_pdrop, seed, 3 * layer_index + 2), (key, value)


class TFALGPT2MLP(Module):
    """(B, T, C) -> (B, T, I) -> (B, T, C)."""

    def __init__(self, config: "ALGPT2Config", *arguments: Any) -> None:
        super().__init__(config, *arguments)
        self.c_fc = self.child("c_fc", Conv1D, config.inner_size, config.n_embd)
        self.c_proj = self.child("c_proj", ResidualConv1D, config.n_embd, config.inner_size)
        self.act = activation(config.activation_function)

    def call(self, x: tf.Tensor, layer_index: int, seed: tf.Tensor | None = None) -> tf.Tensor:
        x = self.act(self.c_fc(x))  # (B, T, I)
        x = self.c_proj(x)  # (B, T, C)
        return dropout(x, self.config.resid_pdrop, seed, 3 * layer_index + 3)


class TFALGPT2Block(Module):
    """One stored block, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: "ALGPT2Config", *arguments: Any) -> None:
        super().__init__(config, *arguments)
        self.ln_1 = self.child("ln_1", LayerNorm, config.n_embd)
        self.attn = self.child("attn", TFALGPT2Attention)
        self.ln_2 = self.child("ln_2", LayerNorm, config.n_embd)
        self.mlp = self.child("mlp", TFALGPT2MLP)

    def call(
        self,
        x: tf.Tensor,
        layer_index: int,
        past: tuple[tf.Tensor, tf.Tensor] | None = None,
        attention_mask: tf.Tensor | None = None,
        seed: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
        mixed, present = self.attn(
            self.ln_1(x),
            layer_index=layer_index,
            past=past,
            attention_mask=attention_mask,
            seed=seed,
        )
        x += tf.cast(mixed, x.dtype)
        mixed = self.mlp(self.ln_2(x), layer_index=layer_index, seed=seed)
        return x + tf.cast(mixed, x.dtype), present


class TFALGPT2Model(Module):
    """Token ids to hidden states after the last layer norm, (B, T) -> (B, T, C)."""

    def __init__(self, config: "ALGPT2Config", *arguments: Any) -> None:
        super().__init__(config, *arguments)
        config.check()
        size, width = config.embedding_size, config.n_embd
        self.wte = self.child("wte", Embedding, config.vocab_size, size)
        self.wpe = self.child("wpe", Embedding, config.n_positions, size)
        self.projection_layer = None
        if config.is_factorized:
            self.projection_layer = self.child("projection_layer", Linear, size, width)
        self.h = [self.child(f"h.{i}", TFALGPT2Block) for i in range(config.num_hidden_groups)]
        self.ln_f = self.child("ln_f", LayerNorm, width)
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
            position_ids = self._positions(input_ids, past_key_values)  # (1, T)
        x = self.wte(input_ids) + self.wpe(position_ids)  # (B, T, E)
        x = dropout(x, self.config.embd_pdrop, seed, 0)
        if self.projection_layer is not None:
            x = tf.cast(self.projection_layer(x), tf.float32)  # (B, T, C)
        presents = []
        # This is the sharing: L layers apply K stored blocks. One block serves several layers, and
        # its gradient is the sum over them.
        for layer_index, block_index in enumerate(self.config.block_of_layers()):
            apply_block = functools.partial(
                self.h[block_index], layer_index=layer_index, attention_mask=attention_mask,
                past=past_key_values[layer_index] if past_key_values else None, seed=seed,
            )  # fmt: skip
            if self.gradient_checkpointing:
                apply_block = tf.recompute_grad(apply_block)
            x, present = apply_block(x)
            presents.append(present)
        return self.ln_f(x), presents

    def _positions(self, input_ids: tf.Tensor, past: Cache | None) -> tf.Tensor:
        """The T positions after the cache, (1, T)."""
        length = static_shape(input_ids)[1]
        start = static_shape(past[0][0])[2] if past else 0
        limit = self.config.n_positions
        if isinstance(length, int) and isinstance(start, int) and start + length > limit:
            raise ValueError(
                f"expected at most n_positions={limit} positions, got {start + length}; "
                "shorten the input or slide a window over it"
            )
        return tf.range(start, start + length)[None]


class TFCausalLMOutput(NamedTuple):
    """The outputs of the language model; an output that the call did not request is None."""

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
        size, width, policy = config.embedding_size, config.n_embd, self.dtype_policy
        self.transformer = TFALGPT2Model(config, "transformer", policy, seed)
        self.dense = self.lm_head = None
        if config.is_factorized:
            self.dense = Linear(width, size, config, "dense", policy, seed)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, size, config, "lm_head", policy, seed)
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
            position_ids: (B, T); None: the T positions after the cache. Padding on the left
                needs explicit positions.
            shift_labels: ids (B, T) of the next tokens; the loss is the mean over them.
            loss_weights: (B, T); the loss is the sum of cross-entropies times these weights.
            skip_logits: compute the loss of `shift_labels` only; the output's logits are None.
            seed: two integers (2,) that determine dropout; None: no dropout.
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
            logits = tf.reshape(flat, [*static_shape(x)[:-1], weight.shape[0]])  # (B, T, V)
        return TFCausalLMOutput(loss, logits, presents if use_cache else None)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, dtype: str = "float32", warn: Callable[[str], None] = print,
        **config_keys: Any,
    ) -> "TFALGPT2LMHeadModel":  # fmt: skip
        """The model of a checkpoint folder or a name on the Hugging Face hub, GPT-2 or ALGPT2.

        Args:
            warn: as in `load_state_dict`.
            config_keys: values that replace the configuration's, such as `attn_pdrop=0.0`.
        Raises:
            OSError: `source` has no config.json or no safetensors.
            ValueError: `source` is another kind of model, or an array is missing, unexpected or
                of another shape.
        """
        from .configuration_algpt2 import ALGPT2Config

        config = ALGPT2Config.from_pretrained(source, **config_keys)
        model = cls(config, dtype=dtype)
        model.load_state_dict(read_weights(source), warn)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, generation_config.json and model.safetensors as PyTorch does."""
        from safetensors.tensorflow import save_file
        from transformers import GenerationConfig
        from transformers.utils import SAFE_WEIGHTS_NAME

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = ["ALGPT2LMHeadModel"]
        self.config.save_pretrained(folder)
        GenerationConfig.from_model_config(self.config).save_pretrained(folder)
        save_file(self.state_dict(), folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def named_parameters(self) -> dict[str, Any]:
        """The variables by their names in the weight files."""
        return {variable.name: variable for variable in self.trainable_variables}

    def num_parameters(self) -> int:
        """The number of stored parameters."""
        return sum(math.prod(v.shape) for v in self.trainable_variables)

    def state_dict(self) -> dict[str, tf.Tensor]:
        """The parameters as float32 tensors."""
        return {n: tf.convert_to_tensor(v.numpy()) for n, v in self.named_parameters().items()}

    def load_state_dict(self, state: dict[str, Any], warn: Callable[[str], None] = print) -> None:
        """Assign arrays by name, after `rename_weights`.

        Args:
            warn: prints a line about a head that the tied table replaces.
        Raises:
            ValueError: an array is missing, unexpected, or of another shape.
        """
        parameters, state = self.named_parameters(), rename_weights(state)
        if self.lm_head is None:
            copy, table = state.pop("lm_head.weight", None), "transformer.wte.weight"
            if copy is not None and not np.array_equal(copy, state.get(table)):
                warn(untied_warning(self.name, "lm_head.weight", table))
        missing, extra = parameters.keys() - state.keys(), state.keys() - parameters.keys()
        if missing or extra:
            raise ValueError(
                f"the weights are of another model: missing {sorted(missing)[:3]}, left over "
                f"{sorted(extra)[:3]}; expected the weights of its config.json"
            )
        for name, variable in parameters.items():
            if tuple(state[name].shape) != tuple(variable.shape):
                raise ValueError(
                    f"expected {name} of shape {tuple(variable.shape)} as config.json says, got "
                    f"{tuple(state[name].shape)}"
                )
            variable.assign(tf.cast(state[name], tf.float32))


# --- weight files: skip when reading -------------------------------------------------------------


def read_weights(source: str | Path) -> dict[str, tf.Tensor]:
    """The arrays in the safetensors of a folder or a hub model: one file, or several and an index.

    Raises:
        OSError: `source` has no safetensors.
    """
    from safetensors.tensorflow import load_file
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    path = cached_file(str(source), SAFE_WEIGHTS_NAME, **optional)
    if path is not None:
        return load_file(path)
    index = cached_file(str(source), SAFE_WEIGHTS_INDEX_NAME, **optional)
    if index is None:
        raise OSError(
            f"expected {SAFE_WEIGHTS_NAME} in {source}; AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...) in PyTorch converts a pytorch_model.bin"
        )
    files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    weights: dict[str, tf.Tensor] = {}
    for file in sorted(set(files)):
        weights |= load_file(cached_file(str(source), file))
    return weights


def rename_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a weight file by the names of this file's variables.

    Files of a bare GPT-2 trunk lack `transformer.`, and files of the original ALGPT2 the block's
    index. Older files hold causal masks, which the result leaves out.
    """
    from .configuration_algpt2 import MASK_BUFFERS, UNINDEXED

    renamed = {}
    for name, array in state.items():
        if not re.match(r"(transformer|dense|lm_head)\.", name):
            name = f"transformer.{name}"
        if not re.search(MASK_BUFFERS, name):
            renamed[re.sub(rf"\bh\.{UNINDEXED}", r"h.0.\1.", name)] = array
    return renamed
