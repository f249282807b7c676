"""ALGPT2's configuration: GPT-2's keys, the embedding size, and which block each layer uses.

GPT-2 is the special case `num_hidden_groups = n_layer`, `embedding_size = n_embd`. This file also
computes what follows from the shape alone: layer map, parameter counts, FLOPs.

Checkpoint folders hold copies of this file, kernels_algpt2.py and modeling_algpt2.py for
`trust_remote_code`. So the three import only each other, torch, transformers and its requirements,
and raise `ValueError`.

    T tokens of a sequence   E embedding_size   C n_embd   L n_layer
    K num_hidden_groups, the number of stored blocks
"""

import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GPT2Config
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

MAX_LAYERS, MAX_SIZE = 10_000, 2**24  # a configuration with more is damaged or hostile

# Where `trust_remote_code` finds the classes in a checkpoint's folder.
AUTO_MAP = {
    "AutoConfig": "configuration_algpt2.ALGPT2Config",
    "AutoModel": "modeling_algpt2.ALGPT2Model",
    "AutoModelForCausalLM": "modeling_algpt2.ALGPT2LMHeadModel",
}

# Names in weight files. A file of the original ALGPT2 names its block without an index:
# transformer.h.ln_1.weight. Older GPT-2 files hold causal masks as buffers.
UNINDEXED = r"(ln_1|attn|ln_2|mlp)\."
MASK_BUFFERS = r"\.attn\.(masked_)?bias$"


class ALGPT2Config(GPT2Config):
    """GPT-2's configuration and four more keys; files of the original ALGPT2 have only the first.

    Args:
        embedding_size: width E of token and position embeddings; None: n_embd, no factorization.
        num_hidden_groups: stored blocks K. 1 is ALBERT, n_layer is GPT-2.
        layer_map: index of the stored block for each of the n_layer layers; None: equal runs of
            consecutive layers, `i * K // L`.
        residual_init_scale: factor on `initializer_range` for the two `c_proj` weights of a block;
            None: GPT-2's 1 / sqrt(2 n_layer).
    Raises:
        ValueError: a value is out of range, or two values do not fit together.
    """

    model_type = "algpt2"

    embedding_size: int | None = None
    num_hidden_groups: int = 1
    layer_map: list[int] | None = None
    residual_init_scale: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embedding_size is None:
            self.embedding_size = self.n_embd
        if self.residual_init_scale is None:
            self.residual_init_scale = 1 / math.sqrt(2 * max(1, self.n_layer))
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keys of a config.json; a stock GPT-2's become those of an ALGPT2 with K = L."""
        keys, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if keys.get("model_type", "gpt2") not in (cls.model_type, GPT2Config.model_type):
            raise ValueError(f"expected model_type gpt2 or algpt2, got {keys['model_type']!r}")
        if keys.get("model_type") == GPT2Config.model_type:
            n_layer = keys.get("n_layer", cls.n_layer)
            keys = {**keys, "model_type": cls.model_type, "num_hidden_groups": n_layer}
        return keys, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration; `kwargs` replace its keys before defaults are derived from them."""
        own = GPT2Config.__annotations__.keys() | cls.__annotations__.keys()
        given = {key: kwargs.pop(key) for key in own & kwargs.keys()}
        try:
            return super().from_dict({**config_dict, **given}, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"config.json: {error.__cause__ or error}; mend the key") from error

    def check(self) -> None:
        """Raise `ValueError` unless the values fit; models call it, as attributes can change."""
        self._check_sizes()
        self._check_numbers()
        self._check_layer_map()
        for key in ("add_cross_attention", "reorder_and_upcast_attn"):
            if getattr(self, key):
                raise ValueError(
                    f"expected {key}=false, got true: ALGPT2 does not support it; remove the key"
                )

    def _check_sizes(self) -> None:
        sizes = "vocab_size n_positions n_embd n_layer n_head embedding_size num_hidden_groups"
        for key in sizes.split() + ["n_inner"] * (self.n_inner is not None):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"expected {key} to be an integer above zero, got {value!r}")
            if value > (limit := MAX_LAYERS if key == "n_layer" else MAX_SIZE):
                raise ValueError(f"expected {key} of at most {limit:,}, got {value}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"expected n_embd to be a multiple of n_head, got n_embd={self.n_embd} and "
                f"n_head={self.n_head}; change one of them"
            )
        if self.embedding_size > self.n_embd:
            raise ValueError(
                f"expected embedding_size of at most n_embd={self.n_embd}, got "
                f"{self.embedding_size}; leave it out for an embedding that is not factorized"
            )

    def _check_numbers(self) -> None:
        for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"expected {key} from 0 to below 1, got {getattr(self, key)!r}")
        for key in ("initializer_range", "layer_norm_epsilon"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"expected {key} above zero, got {getattr(self, key)!r}")
        scale = self.residual_init_scale
        if not isinstance(scale, int | float) or not 0 <= scale < math.inf:
            raise ValueError(
                f"expected residual_init_scale of zero or more, got {scale!r}; "
                "leave it out for GPT-2's 1 / sqrt(2 n_layer)"
            )

    def _check_layer_map(self) -> None:
        n_layer, groups, layer_map = self.n_layer, self.num_hidden_groups, self.layer_map
        if layer_map is None:
            if n_layer % groups:
                raise ValueError(
                    f"expected n_layer to be a multiple of num_hidden_groups, got n_layer={n_layer}"
                    f" and num_hidden_groups={groups}; change one of them, or give a layer_map"
                )
            return
        # A block that no layer uses would never get a gradient.
        is_list = isinstance(layer_map, list | tuple) and all(type(i) is int for i in layer_map)
        if not is_list or len(layer_map) != n_layer or {*layer_map} != {*range(groups)}:
            raise ValueError(
                f"expected layer_map to name a stored block 0 to {groups - 1} for each of the "
                f"{n_layer} layers, and every block at least once, got {layer_map}"
            )

    def block_of_layers(self) -> list[int]:
        """For each of the L layers the index of the stored block that it applies."""
        if self.layer_map is not None:
            return list(self.layer_map)
        # ALBERT's float arithmetic is wrong from L = K = 22 on: layer 15 gets block 14.
        return [layer * self.num_hidden_groups // self.n_layer for layer in range(self.n_layer)]

    @property
    def inner_size(self) -> int:
        """Width of the MLP's hidden layer: `n_inner`, or 4 C."""
        return self.n_inner or 4 * self.n_embd

    @property
    def is_factorized(self) -> bool:
        """Whether `projection_layer` (E -> C) and `dense` (C -> E) exist."""
        return self.embedding_size != self.n_embd

    def block_parameters(self) -> int:
        """Parameters of one block: attention, MLP, two layer norms."""
        width, inner = self.n_embd, self.inner_size
        attention = width * 3 * width + 3 * width + width * width + width
        mlp = width * inner + inner + inner * width + width
        return attention + mlp + 4 * width

    def embedding_parameters(self) -> int:
        """Parameters of both embeddings, `projection_layer` and `dense`, and of an untied head."""
        size, width = self.embedding_size, self.n_embd
        tables = (self.vocab_size + self.n_positions) * size
        projections = self.is_factorized * (size * width + width + width * size + size)
        return tables + projections + (not self.tie_word_embeddings) * self.vocab_size * size

    def stored_parameters(self) -> int:
        """Parameters that are trained and saved: each stored block once."""
        blocks = self.num_hidden_groups * self.block_parameters()
        return self.embedding_parameters() + blocks + 2 * self.n_embd

    def virtual_parameters(self) -> int:
        """Parameters of the same model without sharing: a block for each layer."""
        blocks = self.n_layer * self.block_parameters()
        return self.embedding_parameters() + blocks + 2 * self.n_embd

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs of training (forward and backward) for one token in a sequence of T = `seq_len`.

        6 W + 12 L C T. W is the number of weights in matrix products: it includes the head, leaves
        out lookups, and counts a shared weight once for each layer that applies it. Attention
        scores count over all T positions, as if not causal; recomputation by gradient checkpointing
        does not count.
        """
        width = self.n_embd
        block = width * 3 * width + width * width + 2 * width * self.inner_size
        projections = self.is_factorized * 2 * self.embedding_size * width
        applied = self.n_layer * block + projections + self.vocab_size * self.embedding_size
        return 6 * applied + 12 * self.n_layer * width * seq_len


# The copy of this file in a checkpoint folder must not replace an installed package. transformers
# finds the copy by the "auto_map" in the folder's config.json.
if not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
    AutoConfig.register(ALGPT2Config.model_type, ALGPT2Config, exist_ok=True)
