"""The scales and the rows of quality.py: what is trained, as data."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

LAYERS = 12  # virtual layers of every arm unless its row says otherwise: GPT-2 small's


@dataclass(frozen=True)
class Scale:
    """What all runs of a scale share."""

    vocab_size: int
    seq_len: int  # tokens a row, and positions
    n_embd: int  # width C of the unshared model
    n_head: int
    n_tokens: int  # training tokens of a run, about 20 for each parameter of the unshared model
    batch_size: int  # rows a step
    lr: dict[str, float]  # where the sweep of an optimizer starts
    n_layer: int = LAYERS
    warmup: float = 0.05  # share of the steps
    precision: str = "fp32"  # on a GPU; on a CPU it is that always
    flags: tuple[str, ...] = ()  # more of train_pt.py

    @property
    def n_steps(self) -> int:
        """Optimizer steps of a run."""
        return math.ceil(self.n_tokens / (self.batch_size * self.seq_len))

    def config(self) -> dict[str, Any]:
        """config.json of the unshared model: GPT-2 without dropout."""
        return {
            "model_type": "algpt2", "architectures": ["ALGPT2LMHeadModel"],
            "vocab_size": self.vocab_size, "n_positions": self.seq_len, "n_embd": self.n_embd,
            "n_layer": self.n_layer, "n_head": self.n_head, "num_hidden_groups": self.n_layer,
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
            "bos_token_id": self.vocab_size - 1, "eos_token_id": self.vocab_size - 1,
        }  # fmt: skip


SCALES = {
    # A test's: a few steps in a second.
    "tiny": Scale(300, 16, 24, 2, 16 * 4 * 12, 4, {"AdamW": 4e-3}, n_layer=4),
    # Rows of 128 tokens: attention over 256 takes 40 % of a step at this width, and 27 % over 128.
    "S": Scale(2048, 128, 48, 3, 8_000_000, 16,
               {"AdamW": 4e-3, "Muon": 8e-3, "Adafactor": 8e-3}),
    # As S, a vocabulary small enough that four blocks of twelve are less than half of the model.
    "M": Scale(3072, 256, 80, 5, 25_000_000, 16,
               {"AdamW": 4e-3, "Muon": 8e-3, "Adafactor": 8e-3}),
    "L": Scale(8192, 512, 256, 4, 200_000_000, 64,
               {"AdamW": 2e-3, "Muon": 4e-3, "Adafactor": 4e-3},
               precision="bf16", flags=("--compile",)),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One arm: how it differs from the unshared model of its scale."""

    name: str
    about: str
    config: dict[str, Any] = field(default_factory=dict)  # keys of config.json
    optimizer: str = "AdamW"
    flags: dict[str, Any] = field(default_factory=dict)  # of train_pt.py, in place of the usual
    seeds: int = 1  # of the best learning rate; 2 for every row that carries a claim
    group: str = "shared"  # how the figure draws it: baseline, shared, other
    start: str | None = None  # row whose best run gives the weights that this one starts from
    share: float = 1.0  # of the scale's tokens; the rest are those of `start`
    teacher: str | None = None  # row whose best run teaches this one
    lr: float | None = None  # where the sweep starts; None: at the rate of the scale


# --- layer maps ----------------------------------------------------------------------------------


def sequence(blocks: int, layers: int = LAYERS) -> list[int]:
    """0 0 0 1 1 1: consecutive layers share (arXiv:2104.06022)."""
    return [layer * blocks // layers for layer in range(layers)]


def cycle(blocks: int, layers: int = LAYERS) -> list[int]:
    """0 1 0 1 0 1: the stack repeats (arXiv:2104.06022)."""
    return [layer % blocks for layer in range(layers)]


def cycle_rev(blocks: int, layers: int = LAYERS) -> list[int]:
    """0 1 0 1 1 0: as `cycle`, the last pass in reverse order (arXiv:2104.06022)."""
    return [*cycle(blocks, layers - blocks), *reversed(range(blocks))]


def sandwich(first: int, middle: int, last: int, layers: int = LAYERS) -> list[int]:
    """0 1 1 1 1 2: own blocks at both ends, equal runs of `middle` blocks (arXiv:2101.00234)."""
    runs = [first + block for block in sequence(middle, layers - first - last)]
    return [*range(first), *runs, *range(first + middle, first + middle + last)]


def middle(first: int, blocks: int, last: int, layers: int = LAYERS) -> list[int]:
    """0 1 2 1 2 3: own blocks at both ends, a cycle between them (arXiv:2507.10524)."""
    passes = [first + block for block in cycle(blocks, layers - first - last)]
    return [*range(first), *passes, *range(first + blocks, first + blocks + last)]


def mapped(layer_map: Sequence[int]) -> dict[str, Any]:
    """The keys of config.json for a layer map."""
    return {"num_hidden_groups": len({*layer_map}), "layer_map": list(layer_map)}


def one_over_visits(layer_map: Sequence[int]) -> dict[str, float]:
    """A residual scale 1 / (N sqrt(2 K)) of K blocks with N visits each (arXiv:2606.18524)."""
    blocks = len({*layer_map})
    return {"residual_init_scale": blocks / (len(layer_map) * math.sqrt(2 * blocks))}


# --- rows ----------------------------------------------------------------------------------------


# One of each kind, so that the first day's runs tell what the others are worth.
FIRST = (
    "unshared", "shared", "layers-1", "layers-4", "cycle-4", "cycle-2", "wide-2", "wide-1",
    "middle-1-2-1", "shared-own", "cycle-4-streams2", "middle-1-2-1-streams2", "attn1-mlp6",
    "unshared-muon", "shared-muon", "shared-1N", "unshared-init4", "shared-E8", "shared-hash3",
    "shared-E4", "cycle-3", "width-2of4", "layers-2", "shared-streams4", "sequence-4",
    "cycle-rev-4", "attn6-mlp3", "cycle-2-distilled", "shared-reinject", "shared-lora8",
    "unshared-dropout",
)  # fmt: skip


def rows(scale: Scale) -> dict[str, Row]:
    """All arms at a scale by name, in the order in which they run."""
    groups = (_first, _baselines, _maps, _own, _streams, _halves, _larger, _embeddings,
              _optimizers, _starts)  # fmt: skip
    found = {row.name: row for group in groups for row in group(scale)}
    first = [name for name in FIRST if name in found]
    return {name: found[name] for name in dict.fromkeys([*first, *found])}


def trial(**keys: Any) -> dict[str, Any]:
    """The keys of config.json for what only quality_models.py has."""
    return {"model_type": "algpt2-trial", "architectures": ["TrialLMHeadModel"], **keys}


def one_block(scale: Scale) -> dict[str, Any]:
    """The keys of config.json for one block in all layers."""
    return mapped([0] * scale.n_layer)


def _first(scale: Scale) -> Iterable[Row]:
    one = [0] * scale.n_layer
    yield Row("unshared", "GPT-2", seeds=3, group="baseline")
    yield Row("shared", "ALBERT: one block, GPT-2's residual scale", mapped(one), seeds=3)
    if "Muon" in scale.lr:
        yield Row("unshared-muon", "GPT-2, Muon", optimizer="Muon", seeds=2, group="baseline")
        yield Row("shared-muon", "one block, Muon", mapped(one), optimizer="Muon", seeds=2)
    small = mapped(one) | one_over_visits(one)
    yield Row("shared-1N", "one block, initial residual scale 1 / N", small, seeds=2)
    yield Row("unshared-init4", "GPT-2, initial std 0.08 in place of 0.02",
              {"initializer_range": 0.08}, group="baseline")  # fmt: skip


def _maps(scale: Scale) -> Iterable[Row]:
    """Stored blocks 2, 3, 4, 6 in every order (of as many as divide the layers)."""
    layers = scale.n_layer
    for order in (cycle, sequence, cycle_rev):
        for blocks in (2, 3, 4, 6):
            if layers % blocks == 0 and blocks < layers:
                name = order.__name__.replace("_", "-")
                about = f"{blocks} blocks: {order(blocks, layers)}"
                yield Row(f"{name}-{blocks}", about, mapped(order(blocks, layers)))
    if layers < LAYERS:
        return
    for order, sizes in (
        (sandwich, (1, 1, 1)), (middle, (1, 2, 1)), (sandwich, (1, 2, 1)), (middle, (2, 2, 2)),
    ):  # fmt: skip
        name = "-".join([order.__name__, *map(str, sizes)])
        layer_map = order(*sizes, layers=layers)
        about = f"own blocks at the ends, {len({*layer_map})} in all: {layer_map}"
        yield Row(name, about, mapped(layer_map))


def _own(scale: Scale) -> Iterable[Row]:
    """One block, and a little of its own for each visit."""
    one = one_block(scale)
    for name, about, keys in (
        ("norms", "own layer norms", {"own": ["norms"]}),
        ("scales", "own residual scales", {"own": ["scales"]}),
        ("own", "own layer norms, biases, residual scales", {"own": ["norms", "biases", "scales"]}),
        ("embedding", "an embedding for each layer", {"layer_embedding": True}),
        ("reinject", "the input again at each pass", {"reinject": True}),
        ("lora8", "LoRA of rank 8 for each layer", {"lora_rank": 8}),
    ):
        yield Row(f"shared-{name}", f"one block, {about}", one | trial(**keys))


def _streams(scale: Scale) -> Iterable[Row]:
    """Hyper-connections around each pass of the loop."""
    layers = scale.n_layer
    loops = {"shared": [0] * layers, "cycle-2": cycle(2, layers)}
    if layers == LAYERS:
        loops |= {"cycle-4": cycle(4), "middle-1-2-1": middle(1, 2, 1),
                  "middle-2-2-2": middle(2, 2, 2)}  # fmt: skip
    for name, layer_map in loops.items():
        for n in (2, 4):
            keys = mapped(layer_map) | trial(streams=n)
            yield Row(f"{name}-streams{n}", f"{name}, {n} residual streams", keys)


def _halves(scale: Scale) -> Iterable[Row]:
    """Attention shared and MLPs not, and the reverse."""
    one = [0] * scale.n_layer
    yield Row("shared-attn", "one attention, own MLPs", trial(attn_map=one))
    yield Row("shared-mlp", "one MLP, own attentions", trial(mlp_map=one))
    if scale.n_layer == LAYERS:  # both about as large as four blocks
        six = mapped(cycle(6))
        yield Row("attn1-mlp6", "one attention, cycle of 6 MLPs", six | trial(attn_map=one))
        yield Row("attn6-mlp3", "cycles of 6 attentions and 3 MLPs", six | trial(mlp_map=cycle(3)))


def _embeddings(scale: Scale) -> Iterable[Row]:
    """Factorized embeddings with one block, and with none shared; dropout."""
    one = one_block(scale)
    for part in (8, 4, 2):
        size = {"embedding_size": scale.n_embd // part}
        yield Row(f"shared-E{part}", f"one block, E = C / {part}", one | size)
        yield Row(f"unshared-E{part}", f"GPT-2, E = C / {part}", size, group="other")
    for hashes, buckets in ((3, 64), (6, 128)):  # at S of the sizes of E = C / 8 and C / 4
        size = trial(hashes=hashes, buckets=buckets, tie_word_embeddings=False)
        about = f"one block, tokens as mixtures of {hashes} of {buckets} vectors"
        yield Row(f"shared-hash{hashes}", about, one | size)
    size = trial(input_size=scale.n_embd // 4, tie_word_embeddings=False)
    yield Row("shared-inputE4", "one block, input embedding C / 4, own head", one | size)
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1)
    yield Row("unshared-dropout", "GPT-2, dropout 0.1", rates, group="other")
    yield Row("shared-dropout", "one block, dropout 0.1", one | rates)


def _baselines(scale: Scale) -> Iterable[Row]:
    """GPT-2 of fewer parameters: shallower, and narrower."""
    for layers in (1, 2, 3, 4, 6):
        if layers < scale.n_layer:
            size = {"n_layer": layers, "num_hidden_groups": layers}
            yield Row(f"layers-{layers}", f"GPT-2 of {layers} layers", size, group="baseline")
    for part in (2, 3):
        width = scale.n_embd * part // 4 // scale.n_head * scale.n_head
        about = f"GPT-2 of width {width}"
        yield Row(f"width-{part}of4", about, {"n_embd": width}, group="baseline")


def _larger(scale: Scale) -> Iterable[Row]:
    """36 to 49 % of the unshared parameters (at S), spent on width or depth: more FLOPs."""
    size = scale.n_embd // scale.n_head  # of a head
    for name, blocks, factor in (("wide-1", 1, 4 / 3), ("wide-2", 2, 4 / 3), ("wider-1", 1, 5 / 3)):
        heads = round(scale.n_head * factor)
        keys = {"embedding_size": scale.n_embd, "n_embd": heads * size, "n_head": heads}
        about = f"cycle of {blocks}, width {heads * size}, E = {scale.n_embd}"
        yield Row(name, about, mapped(cycle(blocks, scale.n_layer)) | keys)
    layers = 2 * scale.n_layer
    keys = {"n_layer": layers} | mapped(cycle(4, layers))
    yield Row("deep-4", f"4 blocks in {layers} layers", keys)


def _optimizers(scale: Scale) -> Iterable[Row]:
    """Adafactor with and without its first moment."""
    if "Adafactor" not in scale.lr:
        return
    for name, keys in (("unshared", {}), ("shared", one_block(scale))):
        group = "other" if name == "unshared" else "shared"
        for beta1 in ("0.9", "0"):
            yield Row(
                f"{name}-adafactor{'' if beta1 == '0.9' else '-no-momentum'}",
                f"{name}, Adafactor, beta1 = {beta1}", keys, "Adafactor", {"beta1": beta1},
                group=group,
            )  # fmt: skip


def _starts(scale: Scale) -> Iterable[Row]:
    """Weights of unshared blocks first, and teachers."""
    yield Row("unshared-third", "GPT-2, a third of the tokens at a constant rate", share=1 / 3,
              flags={"lr_schedule": "constant"}, group="other")  # fmt: skip
    for name, keys in (
        ("shared", one_block(scale)), ("cycle-2", mapped(cycle(2, scale.n_layer))),
    ):  # fmt: skip
        # Another order: with the same, it would begin with the rows that its start has seen.
        yield Row(f"{name}-tied", f"{name}, from the means of unshared-third's blocks", keys,
                  start="unshared-third", share=2 / 3, flags={"seed": 7})  # fmt: skip
        yield Row(f"{name}-distilled", f"{name}, half of the loss from the unshared model",
                  keys | trial(), teacher="unshared")  # fmt: skip
