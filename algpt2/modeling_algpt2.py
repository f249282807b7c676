"""ALGPT2 in PyTorch: K stored blocks applied in L layers, embeddings of width E before width C.

    B batch   T time   S time with the cached past   V vocab_size   E embedding_size   C n_embd
    H heads   D = C / H   I inner size of the MLP   L layers   K stored blocks

Names and weight layouts are GPT-2's, so a stock GPT-2 checkpoint loads as it is (K = L, E = C).
Read from top to bottom: attention, MLP, block, model, language model. The sections marked "skip
when reading" are transformers' machinery; kernels_algpt2.py holds the fast products and the loss.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import (
    ALL_ATTENTION_FUNCTIONS,
    PreTrainedModel,
    slice_logits_to_keep,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, can_return_tuple, logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_algpt2 import AUTO_MAP, MASK_BUFFERS, UNINDEXED, ALGPT2Config
from .kernels_algpt2 import Conv1D, LMHead, activation, head_cross_entropy

logger = logging.get_logger(__name__)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain PyTorch, which also returns its weights; the default is PyTorch's SDPA.

    Args:
        query: (B, H, T, D).
        key, value: (B, H, S, D).
        attention_mask: added to the scores, (B, 1, T, S).
    Returns:
        Mixed values (B, T, H, D) and attention weights (B, H, T, S).
    """
    scores = query @ key.transpose(-1, -2) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights  # (B, H, T, D) -> (B, T, H, D)


class ResidualConv1D(Conv1D):
    """A projection onto the residual stream; `_init_weights` scales the weights of this class."""


class ALGPT2Attention(nn.Module):
    """Causal self-attention, (B, T, C) -> (B, T, C).

    Several layers share it, so the call says which layer it serves: `layer_index`.
    """

    is_causal = True

    def __init__(self, config: ALGPT2Config) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.n_embd // config.n_head
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = ResidualConv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        x: Tensor,
        layer_index: int,
        past_key_values: Cache | None,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (
            part.view(heads).transpose(1, 2)  # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
            for part in self.c_attn(x).split(x.shape[-1], dim=-1)  # (B, T, 3 C) -> 3 (B, T, C)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, layer_index)  # (B, H, S, D)
        scaling = self.head_dim**-0.5 if self.config.scale_attn_weights else 1.0
        if self.config.scale_attn_by_inverse_layer_idx:
            scaling /= layer_index + 1
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.attn_pdrop if self.training else 0.0
        x, weights = attend(
            self, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
        )  # (B, T, H, D)
        return self.resid_dropout(self.c_proj(x.flatten(-2))), weights  # (B, T, C)


class ALGPT2MLP(nn.Module):
    """(B, T, C) -> (B, T, I) -> (B, T, C)."""

    def __init__(self, config: ALGPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.inner_size, config.n_embd)
        self.c_proj = ResidualConv1D(config.n_embd, config.inner_size)
        self.act = activation(config.activation_function)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.c_fc(x))  # (B, T, I)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class ALGPT2Block(GradientCheckpointingLayer):
    """One stored block, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ALGPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = ALGPT2Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = ALGPT2MLP(config)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = x + self.attn(self.ln_1(x), **kwargs)[0]
        return x + self.mlp(self.ln_2(x))


class ALGPT2PreTrainedModel(PreTrainedModel):
    """The base of both models: GPT-2's initialisation, and transformers' flags."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initialisation, with one more factor.

        With r = initializer_range and s = residual_init_scale:

            wte, wpe                    normal, std r
            projection_layer, dense     weight normal, std r; bias 0
            c_attn, c_fc                weight normal, std r; bias 0
            c_proj (attention, MLP)     weight normal, std r s; bias 0
            ln_1, ln_2, ln_f            weight 1, bias 0
        """
        # This function decides by the module that holds the weight. GPT-2's decides by its parent,
        # a module without parameters, which transformers 5 takes as initialised in code outside
        # its own package.
        std = self.config.initializer_range
        if isinstance(module, ResidualConv1D):
            std *= self.config.residual_init_scale
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def save_pretrained(self, *arguments: Any, **kwargs: Any) -> None:
        """As transformers' own; config.json names the code that all Auto classes find beside it."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(*arguments, **kwargs)

    # Skip when reading: what transformers asks of a model.
    config: ALGPT2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _no_split_modules = ["ALGPT2Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ALGPT2Block,
        "attentions": OutputRecorder(ALGPT2Attention, index=1),
    }
    _keys_to_ignore_on_load_unexpected = [MASK_BUFFERS]  # noqa: RUF012


class ALGPT2Model(ALGPT2PreTrainedModel):
    """Token ids to hidden states after the last layer norm, (B, T) -> (B, T, C)."""

    # A language model's weight file also holds its head.
    _keys_to_ignore_on_load_unexpected = [MASK_BUFFERS, r"^dense\.", r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: ALGPT2Config) -> None:
        super().__init__(config)
        config.check()
        size, width = config.embedding_size, config.n_embd
        self.wte = nn.Embedding(config.vocab_size, size)
        self.wpe = nn.Embedding(config.n_positions, size)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.projection_layer = nn.Linear(size, width) if config.is_factorized else None
        self.h = nn.ModuleList(ALGPT2Block(config) for _ in range(config.num_hidden_groups))
        self.h.register_load_state_dict_pre_hook(_add_block_index)
        self.ln_f = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Apply the model.

        Args:
            input_ids: token ids (B, T); or give `inputs_embeds`.
            past_key_values: a cache with one slot for each of the L layers.
            attention_mask: 1 for tokens and 0 for padding (B, S); or a finished mask (B, 1, T, S).
            position_ids: (B, T); None: the T positions after the cache. Padding on the left
                needs explicit positions.
            inputs_embeds: token embeddings (B, T, E), to which the model adds positions.
            use_cache: None: the configuration's `use_cache`, but never while training.
        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or more than
                `n_positions` positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected input_ids or inputs_embeds, got both or neither; give one")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and self.gradient_checkpointing:
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, E)
        # SDPA masks plain rows itself. Making a mask reads a value from the device to find packed
        # rows, and in a compiled graph it is a (B, 1, T, T) tensor, which flash attention refuses.
        is_sdpa = self.config._attn_implementation == "sdpa"
        is_plain = attention_mask is None and past_key_values is None and position_ids is None
        if position_ids is None:
            position_ids = self._positions(x.shape[1], past_key_values, x.device)  # (1, T)
        mask = None
        if not (is_plain and is_sdpa):
            mask = create_causal_mask(self.config, x, attention_mask, past_key_values, position_ids)
        x = self.drop(x + self.wpe(position_ids))
        if self.projection_layer is not None:
            x = self.projection_layer(x)  # (B, T, C)
        # This is the sharing: L layers apply K stored blocks. One block serves several layers, and
        # its gradient is the sum over them.
        for layer_index, block_index in enumerate(self.config.block_of_layers()):
            x = self.h[block_index](
                x, layer_index=layer_index, past_key_values=past_key_values, mask=mask,
                position_ids=position_ids, **kwargs,
            )  # fmt: skip
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x), past_key_values=past_key_values if use_cache else None
        )

    def _positions(self, length: int, past: Cache | None, device: torch.device) -> Tensor:
        """The `length` positions after the cache, (1, T)."""
        start = 0 if past is None else past.get_seq_length()
        if isinstance(start, int) and start + length > self.config.n_positions:
            raise ValueError(
                f"expected at most n_positions={self.config.n_positions} positions, got "
                f"{start + length}; shorten the input or slide a window over it"
            )
        return (torch.arange(length, device=device) + start).unsqueeze(0)


class ALGPT2LMHeadModel(ALGPT2PreTrainedModel, GenerationMixin):
    """The language model: C -> E through `dense`, E -> V with the token embedding's weight."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: ALGPT2Config) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        size, width = config.embedding_size, config.n_embd
        self.transformer = ALGPT2Model(config)
        self.dense = nn.Linear(width, size) if config.is_factorized else None
        self.lm_head = LMHead(size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) and, given labels, the mean cross-entropy in nats.

        Args:
            labels: ids (B, T); the model shifts them, so `labels=input_ids` trains. The loss
                ignores the label -100.
            logits_to_keep: compute logits of the last so many positions only; 0: of all.
            skip_logits: compute the loss of `shift_labels` a few rows at a time; the output's
                logits are None. Every label counts, so -100 must not occur.
            shift_labels: (in kwargs) ids (B, T) of the next tokens, already shifted.
        Raises:
            ValueError: `skip_logits` without `shift_labels`, or with `labels`.
        """
        # transformers' Trainer reports eval_loss only if each batch holds every argument with
        # "label" in its name. shift_labels comes in kwargs, so that batches need only `labels`.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.transformer(
            input_ids, past_key_values=past_key_values, attention_mask=attention_mask,
            position_ids=position_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        x = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)  # (B, T, C)
        if self.dense is not None:
            x = self.dense(x)  # (B, T, E)
        loss, logits = self._loss_and_logits(x, labels, shift_labels, skip_logits, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss_and_logits(
        self, x: Tensor, labels: Tensor | None, shift_labels: Tensor | None, skip_logits: bool,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """The loss (None without labels) and the logits (None if skipped) of states (B, T, E)."""
        if skip_logits:
            if shift_labels is None or labels is not None:
                raise ValueError("expected shift_labels alone with skip_logits=True; shift them")
            return head_cross_entropy(x, self.lm_head.weight, shift_labels), None
        logits = self.lm_head(x)  # (B, T, V)
        if shift_labels is not None:
            kwargs["shift_labels"] = shift_labels.contiguous()
        elif labels is None:
            return None, logits
        loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return loss, logits

    def _prepare_generated_length(self, generation_config: Any, **kwargs: Any) -> Any:
        """Let `generate` stop at `n_positions`: a pipeline asks for 256 new tokens by default."""
        generation_config = super()._prepare_generated_length(generation_config, **kwargs)
        if generation_config.max_length > self.config.n_positions:
            logger.warning_once(f"texts end at the model's {self.config.n_positions} positions")
            generation_config.max_length = self.config.n_positions
        return generation_config


# --- transformers' machinery: skip when reading --------------------------------------------------


class _BlockIndexRenaming(WeightRenaming):
    """Loads `h.ln_1...`, a name of the original ALGPT2, as `h.0.ln_1...`; saves the latter."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return self


def _add_block_index(blocks: nn.ModuleList, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """`_BlockIndexRenaming` for `load_state_dict`, which does not use transformers' renaming."""
    for key in list(state):
        if re.match(re.escape(prefix) + UNINDEXED, key):
            state[f"{prefix}0.{key.removeprefix(prefix)}"] = state.pop(key)


register_checkpoint_conversion_mapping(
    ALGPT2Config.model_type,
    [_BlockIndexRenaming(rf"\bh\.{UNINDEXED}", r"h.0.\1.")],
    overwrite=True,
)
if not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
    AutoModel.register(ALGPT2Config, ALGPT2Model, exist_ok=True)
    AutoModelForCausalLM.register(ALGPT2Config, ALGPT2LMHeadModel, exist_ok=True)
    # What `save_pretrained` writes then has this code beside it.
    ALGPT2Model.register_for_auto_class("AutoModel")
    ALGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")
# transformers' Trainer smooths the labels of the causal models in this table one place ahead.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ALGPT2Config.model_type] = ALGPT2LMHeadModel.__name__
