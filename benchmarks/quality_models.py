"""train_pt.py for the rows of quality.py: the same script, with architectures that are on trial.

    python3 -m benchmarks.quality_models --config CONFIG ...     # every flag of train_pt.py

A configuration of model_type "algpt2-trial" has ALGPT2's keys and those of `TrialConfig`. With all
of them at their defaults, and at initialization with most of them set, the model is ALGPT2.
There is no KV cache: what is on trial is trained and evaluated only.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import train_pt
from algpt2.configuration_algpt2 import ALGPT2Config
from algpt2.kernels_algpt2 import Conv1D, head_cross_entropy
from algpt2.modeling_algpt2 import ALGPT2LMHeadModel, ALGPT2Model
from algpt2.runs.checkpoints import find_checkpoint
from algpt2.system.console import log
from algpt2.system.script import run_script


class TrialConfig(ALGPT2Config):
    """ALGPT2's configuration, and what is on trial.

    Args:
        own: pieces that each layer has of its own though its block is shared: "norms" (both layer
            norms), "biases" (of all four projections), "scales" (a vector on the output of
            attention and of MLP before it is added; starts at 1).
        layer_embedding: a vector for each layer, added to its input; starts at 0. A learned form
            of the Universal Transformer's step embedding (arXiv:1807.03819).
        reinject: at each pass through the loop but the first the embedded input is added again,
            times a vector of that pass that starts at 0 (Parcae, arXiv:2604.12946, has a matrix).
        streams: residual streams n of the loop; see `HyperConnection`. 0: the plain loop.
        attn_map, mlp_map: index of the stored attention and MLP for each layer; None: layer_map.
        lora_rank: rank r of an addition A B to all four projections, own for each layer; B starts
            at 0 (Relaxed Recursive Transformers, arXiv:2410.20672).
        input_size: width of the input embedding alone; the head has its own weight, V x C
            (Leviathan, arXiv:2601.22040).
        hashes, buckets: k and m of a `HashEmbedding` for input and head; 0: a plain table.
        teacher: folder of a run whose model teaches this one; see `TrialLMHeadModel`.
        teacher_share: share of the teacher's term in the training loss.
    """

    model_type = "algpt2-trial"

    own: list[str] | None = None
    layer_embedding: bool = False
    reinject: bool = False
    streams: int = 0
    attn_map: list[int] | None = None
    mlp_map: list[int] | None = None
    lora_rank: int = 0
    input_size: int | None = None
    hashes: int = 0
    buckets: int = 0
    teacher: str | None = None
    teacher_share: float = 0.5
    use_cache: bool = False

    def maps(self) -> tuple[list[int], list[int]]:
        """Stored attention and stored MLP of each layer."""
        shared = self.block_of_layers()
        return self.attn_map or shared, self.mlp_map or shared

    def passes(self) -> list[list[int]]:
        """The layers of the loop, one list for each pass through its blocks.

        The loop goes from the first to the last layer whose block is used more than once; a pass
        ends where the blocks start again: 0 1 2 1 2 3 has the passes [1, 2] and [3, 4].
        """
        blocks = self.block_of_layers()
        looped = [layer for layer, block in enumerate(blocks) if blocks.count(block) > 1]
        found: list[list[int]] = []
        for layer in range(looped[0], looped[-1] + 1) if looped else ():
            if not found or blocks[layer] <= blocks[layer - 1]:
                found.append([])
            found[-1].append(layer)
        return found

    def flops_per_token(self, seq_len: int) -> int:
        """As ALGPT2's, with those of LoRA, gates, the input's projection, and a teacher of the same
        shape, which has a forward pass only."""
        width, inner, rank = self.n_embd, self.inner_size, self.lora_rank
        lora = self.n_layer * rank * (4 * width + 2 * width + 2 * (width + inner))
        gates = self.streams and len(self.passes()) * 3 * self.streams**2 * width
        projection = (self.input_size or 0) * width
        plain = super().flops_per_token(seq_len)
        teacher = plain // 3 if self.teacher else 0
        return plain + teacher + 6 * (lora + gates + projection)


class OwnTensors(nn.Module):
    """A parameter for each of several layers (or passes), called by the number of the layer."""

    def __init__(self, layers: Iterable[int], make: Callable[[], Tensor]) -> None:
        super().__init__()
        self.places = {layer: place for place, layer in enumerate(layers)}
        # Not one tensor of them all: weight decay and Muon tell matrices from vectors.
        self.tensors = nn.ParameterList(make() for _ in self.places)

    def forward(self, layer: int) -> Tensor:
        return self.tensors[self.places[layer]]


def own_vectors(layers: Iterable[int], size: int, start: float) -> OwnTensors:
    """A vector for each layer, all with the same start."""
    return OwnTensors(layers, lambda: torch.full((size,), start))


class OwnProjection(nn.Module):
    """A shared projection with a bias and a low-rank addition of each layer, (..., K) -> (..., N).

    Which layer it serves is set before the call: the forward pass of attention is ALGPT2's.
    """

    def __init__(self, shared: nn.Module, layers: list[int], own_bias: bool, rank: int) -> None:
        super().__init__()
        self.shared, self.layer = shared, layers[0]
        inputs, outputs = shared.nx, shared.nf
        self.own_bias = own_vectors(layers, outputs, 0.0) if own_bias else None
        if own_bias:
            shared.bias = None
        self.down = self.up = None
        if rank:
            self.down = OwnTensors(layers, lambda: torch.randn(inputs, rank) / math.sqrt(inputs))
            self.up = OwnTensors(layers, lambda: torch.zeros(rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.shared.bias if self.own_bias is None else self.own_bias(self.layer)
        y = F.linear(x, self.shared.weight.T, bias)
        if self.down is None:
            return y
        return y + x @ self.down(self.layer) @ self.up(self.layer)


class HyperConnection(nn.Module):
    """n residual streams around one pass of the loop, (..., n, C) -> (..., n, C).

    After Hyperloop Transformers (arXiv:2604.21254), where streams meet between passes only, with
    the gates of mHC (arXiv:2512.24880). With z the normalized streams, flattened to n C, and f the
    pass:

        pre, post, keep = gates(z), each n numbers for each token
        x      = sum over i of pre_i Y_i
        Y_i   <- keep_i Y_i + post_i (f(x) + v - x)        v: the vector of this pass

    It starts as the plain loop: pre = 1 / n, post = keep = 1, v = 0, all streams the same. They
    part as soon as the gates read their input: `weight` is random, `strength` starts at 0 (0.01 in
    mHC).
    """

    def __init__(self, streams: int, width: int) -> None:
        super().__init__()
        self.streams, size = streams, streams * width
        self.weight = nn.Parameter(torch.randn(size, 3 * streams) / math.sqrt(size))
        self.strength = nn.Parameter(torch.zeros(3))
        start = [-math.log(streams - 1 + 1e-9)] * streams + [0.0] * (2 * streams)
        self.offset = nn.Parameter(torch.tensor(start))  # pre = sigmoid; post, keep = 2 sigmoid
        self.vector = nn.Parameter(torch.zeros(width))

    def gates(self, streams: Tensor) -> tuple[Tensor, ...]:
        """`pre`, `post` and `keep`, each (..., n, 1)."""
        z = F.rms_norm(flat := streams.flatten(-2), flat.shape[-1:])
        strength = self.strength.repeat_interleave(self.streams)
        gate = torch.sigmoid(z @ self.weight * strength + self.offset)
        pre, post, keep = gate.unsqueeze(-1).split(self.streams, dim=-2)
        return pre, 2 * post, 2 * keep

    def forward(self, streams: Tensor, function: Any) -> Tensor:
        pre, post, keep = self.gates(streams)
        x = (pre * streams).sum(-2)
        return keep * streams + post * (function(x) + self.vector - x).unsqueeze(-2)


class HashEmbedding(nn.Module):
    """Tokens as mixtures of k of m shared vectors, ids (...) -> (..., C).

    Hash Embeddings (arXiv:1709.03933): which k is drawn once, their weights are learned. V k + m C
    parameters, and unlike a factorization with E = k the table, and so the logits, can have rank C.
    """

    def __init__(self, vocab_size: int, hashes: int, buckets: int, width: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        chosen = torch.rand(vocab_size, buckets, generator=draw, device="cpu").argsort(1)
        self.register_buffer("chosen", chosen[:, :hashes].contiguous())
        # Embeddings: Muon leaves them to AdamW.
        self.codes, self.buckets = nn.Embedding(vocab_size, hashes), nn.Embedding(buckets, width)

    @torch.no_grad()
    def reset_codes(self) -> None:
        """Codes such that the table starts with the spread of the buckets."""
        self.codes.weight.normal_(0.0, self.codes.embedding_dim**-0.5)

    def table(self) -> Tensor:
        """The embeddings of all tokens, (V, C)."""
        return (self.codes.weight.unsqueeze(1) @ self.buckets(self.chosen)).squeeze(1)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table())


class TrialModel(ALGPT2Model):
    """ALGPT2's layers with what `TrialConfig` asks for, (B, T) -> (B, T, C)."""

    config_class = TrialConfig

    def __init__(self, config: TrialConfig) -> None:
        super().__init__(config)
        layers, width, own = config.n_layer, config.n_embd, config.own or ()
        self.attn_map, self.mlp_map = config.maps()
        for i, block in enumerate(self.h):
            if i not in self.attn_map:
                del block.attn, block.ln_1
            if i not in self.mlp_map:
                del block.mlp, block.ln_2
        self.norms = self.scales = self.embeddings = self.again = self.connections = None
        if "norms" in own:
            for block in self.h:
                block.ln_1 = block.ln_2 = None
            eps = config.layer_norm_epsilon
            self.norms = nn.ModuleList(nn.LayerNorm(width, eps=eps) for _ in range(2 * layers))
        if "biases" in own or config.lora_rank:
            self.own_projections("biases" in own, config.lora_rank)
        if "scales" in own:
            self.scales = own_vectors(range(2 * layers), width, 1.0)
        if config.layer_embedding:
            self.embeddings = own_vectors(range(layers), width, 0.0)
        passes = config.passes()
        if config.reinject:
            self.again = own_vectors(range(1, len(passes)), width, 0.0)
        if config.streams:
            n = config.streams
            self.connections = nn.ModuleList(HyperConnection(n, width) for _ in passes)
        if config.hashes:
            self.wte = HashEmbedding(config.vocab_size, config.hashes, config.buckets, width)
        if config.input_size:
            self.wte = nn.Embedding(config.vocab_size, config.input_size)
            self.wpe = nn.Embedding(config.n_positions, config.input_size)
            self.projection_layer = nn.Linear(config.input_size, width)

    def own_projections(self, own_bias: bool, rank: int) -> None:
        """Give all projections their pieces for the layers that use them."""
        for i, block in enumerate(self.h):
            for name, used in (("attn", self.attn_map), ("mlp", self.mlp_map)):
                layers = [layer for layer, stored in enumerate(used) if stored == i]
                half = getattr(block, name, None)
                for key, child in list(half.named_children()) if half is not None else ():
                    if isinstance(child, Conv1D):
                        setattr(half, key, OwnProjection(child, layers, own_bias, rank))

    def layer(self, x: Tensor, layer: int) -> Tensor:
        """One of the L layers, (B, T, C) -> (B, T, C)."""
        if self.embeddings is not None:
            x = x + self.embeddings(layer)
        attn, mlp = self.h[self.attn_map[layer]], self.h[self.mlp_map[layer]]
        for module in (attn.attn.c_attn, attn.attn.c_proj, mlp.mlp.c_fc, mlp.mlp.c_proj):
            module.layer = layer
        norms = (attn.ln_1, mlp.ln_2) if self.norms is None else self.norms[2 * layer :]
        y = attn.attn(norms[0](x), layer, None, None)[0]
        x = x + (y if self.scales is None else y * self.scales(2 * layer))
        y = mlp.mlp(norms[1](x))
        return x + (y if self.scales is None else y * self.scales(2 * layer + 1))

    def loop(self, x: Tensor, layers: Iterable[int]) -> Tensor:
        """Several layers in turn."""
        for layer in layers:
            x = self.layer(x, layer)
        return x

    def looped(self, x: Tensor) -> Tensor:
        """All passes of the loop, (B, T, C) -> (B, T, C)."""
        start, streams = x, None
        if self.connections is not None:
            streams = x.unsqueeze(-2).expand(*x.shape[:-1], self.config.streams, -1)
        for i, layers in enumerate(self.config.passes()):

            def one_pass(x: Tensor, i: int = i, layers: list[int] = layers) -> Tensor:
                if self.again is not None and i:
                    x = x + self.again(i) * start
                return self.loop(x, layers)

            if streams is None:
                x = one_pass(x)
            else:
                streams = self.connections[i](streams, one_pass)
        return x if streams is None else streams.mean(-2)

    def forward(
        self, input_ids: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last layer norm; ALGPT2's other arguments must be None."""
        if given := sorted(name for name, value in kwargs.items() if value is not None):
            raise ValueError(f"expected input_ids alone, got {', '.join(given)}")
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.drop(self.wte(input_ids) + self.wpe(positions))
        if self.projection_layer is not None:
            x = self.projection_layer(x)
        layers, passes = range(self.config.n_layer), self.config.passes()
        if not passes:
            x = self.loop(x, layers)
        else:
            x = self.loop(x, layers[: passes[0][0]])
            x = self.looped(x)
            x = self.loop(x, layers[passes[-1][-1] + 1 :])
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x))


class TrialLMHeadModel(ALGPT2LMHeadModel):
    """The language model; with a teacher, training minimizes

        (1 - s) cross-entropy + s KL(teacher || model)          s = teacher_share

    in nats per token (arXiv:1503.02531 at temperature 1). Evaluation is cross-entropy alone.
    """

    config_class = TrialConfig

    def __init__(self, config: TrialConfig) -> None:
        super().__init__(config)
        self.transformer = TrialModel(config)
        self._teacher: list[nn.Module] = []  # not a part of this model: in a list, not registered
        if config.hashes:
            self.lm_head = None
        self.post_init()
        if config.hashes:
            self.transformer.wte.reset_codes()

    def teacher(self) -> nn.Module:
        """The model that `config.teacher` names, read when it is first needed."""
        if not self._teacher:
            folder = find_checkpoint(Path(self.config.teacher), log)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._teacher.append(model.to(self.device).eval().requires_grad_(False))
        return self._teacher[0]

    def _loss_and_logits(
        self, x: Tensor, labels: Tensor | None, shift_labels: Tensor | None, skip_logits: bool,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        if not self.config.hashes:
            return super()._loss_and_logits(x, labels, shift_labels, skip_logits, **kwargs)
        table = self.transformer.wte.table()
        if skip_logits:
            return head_cross_entropy(x, table, shift_labels), None
        return None, F.linear(x, table)

    def forward(
        self, input_ids: Tensor | None = None, shift_labels: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """As ALGPT2's."""
        if not (self.training and self.config.teacher and shift_labels is not None):
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels
            return super().forward(input_ids, **kwargs)
        with torch.no_grad():
            target = self.teacher()(input_ids, use_cache=False).logits.float().softmax(-1)
        logits = super().forward(input_ids, use_cache=False).logits.float().flatten(0, 1)
        hard = F.cross_entropy(logits, shift_labels.flatten())
        # KL without the teacher's entropy, which has no gradient.
        soft = F.cross_entropy(logits, target.flatten(0, 1))
        share = self.config.teacher_share
        return CausalLMOutputWithPast(loss=(1 - share) * hard + share * soft)


AutoConfig.register(TrialConfig.model_type, TrialConfig, exist_ok=True)
AutoModelForCausalLM.register(TrialConfig, TrialLMHeadModel, exist_ok=True)

if __name__ == "__main__":
    run_script(train_pt.main)
