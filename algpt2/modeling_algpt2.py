"""ALGPT2 in PyTorch: K stored blocks applied in L layers, embeddings of width E before width C.

    B batch   T time   S time with the cached past   V vocabulary   E embedding_size   C n_embd
    H heads   D = C / H   L layers   K stored blocks   N = B T

Names and weight layouts are GPT-2's, so a stock GPT-2 checkpoint loads as it is (K = L, E = C).
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    pytorch_utils,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
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
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, can_return_tuple, logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_algpt2 import MASK_BUFFERS, UNINDEXED, ALGPT2Config

# Rows of float32 logits that the loss holds at a time. CPU: the fastest of 128 to 1,024 for V of 8k
# and 50k. Elsewhere the products must be large enough to fill the device (not tuned).
LOSS_ROWS_CPU = 512
LOSS_ROWS = 2048

# Up to so many rows (tokens that `generate` adds at a time), reading the weights takes longer than
# multiplying, and torch's float32 products on a CPU read them with one core; the two forms below
# with all. benchmarks/generate.py, two cores: 1.7 (gpt2) and 2.6 (algpt2) times the tokens/s of
# transformers' GPT-2, which were 1.0 and 1.4 without. The sums over pieces are small beside the
# weight as long as rows times pieces are beside K.
FEW_ROWS, MAX_PIECES = 16, 8

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
    """Attention with its weights: query (B, H, T, D) -> (B, T, H, D), weights (B, H, T, S)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def _few_rows(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # a graph would be one for so many rows and no others
    rows = x.numel() // x.shape[-1]
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    cpu = x.device.type == "cpu" and not torch.is_grad_enabled()
    return cpu and plain and 0 < rows <= FEW_ROWS


class Conv1D(pytorch_utils.Conv1D):
    """x @ weight + bias, (..., K) -> (..., N)."""

    def forward(self, x: Tensor) -> Tensor:
        # Pieces of the sum over K, in a batch: each core takes one.
        pieces = min(torch.get_num_threads(), MAX_PIECES) if _few_rows(x) else 1
        if pieces == 1 or self.nx % pieces:
            return super().forward(x)
        rows = x.reshape(-1, pieces, self.nx // pieces).transpose(0, 1)
        sums = torch.bmm(rows, self.weight.view(pieces, -1, self.nf)).sum(0)
        return (sums + self.bias).view(*x.shape[:-1], self.nf)


class LMHead(nn.Linear):
    """x @ weight.T, (..., E) -> (..., V)."""

    def forward(self, x: Tensor) -> Tensor:
        if not _few_rows(x):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        # At least two: torch gives the product with a single one to a single core.
        columns = rows.repeat(2, 1).T if len(rows) == 1 else rows.T
        logits = (self.weight @ columns).T[: len(rows)].contiguous()
        return logits.view(*x.shape[:-1], -1)


class ResidualConv1D(Conv1D):
    """A projection onto the residual stream: a class, because its initialisation is its own."""


class ALGPT2Attention(nn.Module):
    """Causal self-attention. Which layer it serves comes with the call: blocks are shared."""

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
        layer: int,
        past_key_values: Cache | None,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (
            part.view(heads).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(x.shape[-1], dim=-1)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, layer)  # (B, H, S, D)
        scaling = self.head_dim**-0.5 if self.config.scale_attn_weights else 1.0
        if self.config.scale_attn_by_inverse_layer_idx:
            scaling /= layer + 1
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.attn_pdrop if self.training else 0.0
        x, weights = attend(
            self, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return self.resid_dropout(self.c_proj(x.flatten(-2))), weights  # (B, T, C)


class ALGPT2MLP(nn.Module):
    """C -> I -> C."""

    def __init__(self, config: ALGPT2Config) -> None:
        super().__init__()
        name = config.activation_function
        if name not in ACT2FN:
            raise ValueError(f"expected activation_function to be one of {[*ACT2FN]}, got {name!r}")
        self.c_fc = Conv1D(config.inner_size, config.n_embd)
        self.c_proj = ResidualConv1D(config.n_embd, config.inner_size)
        # The same function to rounding, in one kernel instead of eight: half the time on CPU.
        self.act = nn.GELU(approximate="tanh") if name == "gelu_new" else ACT2FN[name]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


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
    """What transformers asks of a model: capabilities, initialisation, names in weight files."""

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
        # By the module that holds the weight: for code outside its own package transformers 5
        # takes a module without parameters for done, so GPT-2's way, by parent, does nothing.
        std = self.config.initializer_range
        if isinstance(module, ResidualConv1D):
            std *= self.config.residual_init_scale
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)


class ALGPT2Model(ALGPT2PreTrainedModel):
    """Token ids to hidden states after the last layer norm, (B, T) -> (B, T, C)."""

    # The head, in the weight file of a language model.
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
        self.h.register_load_state_dict_pre_hook(_rename_unindexed)
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
            input_ids: token ids (B, T), or `inputs_embeds` (B, T, E), without positions.
            past_key_values: a cache with one slot for each of the L layers.
            attention_mask: 1 for tokens and 0 for padding (B, S); or ready for use (B, 1, T, S).
            position_ids: (B, T); None: counted on from the cache. Padding on the left needs them.
            use_cache: None: the configuration's `use_cache`, but never while training.
        Raises:
            ValueError: not exactly one kind of input, or more than `n_positions` positions.
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
        if position_ids is None:
            position_ids = self._positions(x.shape[1], past_key_values, x.device)
        mask = create_causal_mask(self.config, x, attention_mask, past_key_values, position_ids)
        x = self.drop(x + self.wpe(position_ids))
        if self.projection_layer is not None:
            x = self.projection_layer(x)  # (B, T, C)
        for layer, block in enumerate(self.config.block_of_layers()):
            x = self.h[block](
                x, layer=layer, past_key_values=past_key_values, mask=mask,
                position_ids=position_ids, **kwargs,
            )  # fmt: skip
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x), past_key_values=past_key_values if use_cache else None
        )

    def _positions(self, length: int, past: Cache | None, device: torch.device) -> Tensor:
        """Positions (1, T) that follow those in the cache."""
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
            labels: ids (B, T), shifted here, so `labels=input_ids` will do; -100 is not counted.
            logits_to_keep: logits of the last so many positions; 0: of all.
            skip_logits: with `shift_labels` (every one counted), compute the loss in pieces
                without holding the logits, which the output then has as None.
            shift_labels: (in kwargs) ids (B, T) of the next tokens, already shifted.
        Raises:
            ValueError: `skip_logits` without `shift_labels`.
        """
        # Trainer takes arguments with "label" in their name for what every batch has, and without
        # one of them computes no eval_loss: so this one has no name here.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.transformer(
            input_ids, past_key_values=past_key_values, attention_mask=attention_mask,
            position_ids=position_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        x = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
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
        """The loss, None without labels, and the logits, None if skipped, of states (B, T, E)."""
        if skip_logits:
            if shift_labels is None or labels is not None:
                raise ValueError("expected shift_labels alone with skip_logits=True; shift them")
            return head_cross_entropy(x, self.lm_head.weight, shift_labels), None
        logits = self.lm_head(x)
        if shift_labels is not None:
            kwargs["shift_labels"] = shift_labels.contiguous()
        elif labels is None:
            return None, logits
        loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return loss, logits

    def _prepare_generated_length(self, generation_config: Any, **kwargs: Any) -> Any:
        """`generate` stops where the positions end: a pipeline wants 256 new tokens by default."""
        generation_config = super()._prepare_generated_length(generation_config, **kwargs)
        if generation_config.max_length > self.config.n_positions:
            logger.warning_once(f"texts end at the model's {self.config.n_positions} positions")
            generation_config.max_length = self.config.n_positions
        return generation_config


def head_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T` (float32 scalar), a few rows of logits at a time.

    Args:
        hidden: (..., E); weight: (V, E); labels: (...) ids, all counted.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    rows = LOSS_ROWS_CPU if device == "cpu" else LOSS_ROWS
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1, 1)
    return _HeadCrossEntropy.apply(hidden, weight, labels, rows, torch.is_grad_enabled())


class _HeadCrossEntropy(torch.autograd.Function):
    """The loss with its gradients, both computed forward while a piece of the logits is there.

    `F.linear_cross_entropy` does the same at the same speed (given `batch_chunk_size`; its default
    took 2 rows at a time, ten times slower), but in bfloat16 it rounds the loss to 3 digits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, with_gradients: bool
    ) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden, d_weight = torch.empty_like(hidden), None
        if with_gradients:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        pieces = (tensor.split(rows) for tensor in (hidden, labels, d_hidden))
        for x, y, d_x in zip(*pieces, strict=True):
            # On a CPU the transposed product is the faster one.
            p = (weight @ x.T).T if x.device.type == "cpu" else F.linear(x, weight)
            p = p.float()  # (rows, V), from here in place
            p -= p.amax(-1, keepdim=True)
            loss -= p.gather(-1, y).sum()
            total = p.exp_().sum(-1, keepdim=True)
            loss += total.log().sum()
            if with_gradients:
                p /= total
                p.scatter_add_(-1, y, p.new_full(y.shape, -1.0))  # softmax minus one-hot
                d_logits = p.to(weight.dtype)
                torch.mm(d_logits, weight, out=d_x)
                if d_logits is p:
                    d_weight.addmm_(p.T, x)
                else:
                    d_weight += d_logits.T @ x
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.n = len(hidden)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = d_loss / ctx.n
        return d_hidden.mul_(scale), d_weight.mul_(scale).to(d_hidden.dtype), None, None, None


class _UnindexedNames(WeightRenaming):
    """`h.ln_1...` in a file is `h.0.ln_1...` here; saved again it has the index."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return self


def _rename_unindexed(blocks: nn.ModuleList, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The same for `load_state_dict`, which knows nothing of transformers' renaming."""
    for key in list(state):
        if re.match(re.escape(prefix) + UNINDEXED, key):
            state[f"{prefix}0.{key.removeprefix(prefix)}"] = state.pop(key)


register_checkpoint_conversion_mapping(
    ALGPT2Config.model_type,
    [_UnindexedNames(rf"\bh\.{UNINDEXED}", r"h.0.\1.")],
    overwrite=True,
)
if not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
    AutoModel.register(ALGPT2Config, ALGPT2Model, exist_ok=True)
    AutoModelForCausalLM.register(ALGPT2Config, ALGPT2LMHeadModel, exist_ok=True)
