"""ALGPT2 to stock GPT-2 and back: the algebra, on NumPy arrays, without a framework.

Every ALGPT2 equals a GPT-2 with more parameters. A GPT-2 is close to an ALGPT2 with fewer.

    V vocab_size   P n_positions   E embedding_size   C n_embd   L n_layer   K stored blocks

Names are those of the weight files: `transformer.h.0.attn.c_attn.weight`, Linear weights (out, in),
Conv1D weights (in, out). Sums and products are float64, results float32.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError

Tensors = dict[str, np.ndarray]

WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
LN_F_BIAS = "transformer.ln_f.bias"
PROJECTION, DENSE = "transformer.projection_layer", "dense"
FOLD_TOLERANCE = 1e-6  # largest residual of least squares, relative to the bias of dense

# Keys of a config.json that decide what a block computes.
BLOCK_KEYS = (
    "n_embd", "n_head", "n_inner", "activation_function", "layer_norm_epsilon",
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
)  # fmt: skip
GPT2_KEYS = (
    *BLOCK_KEYS, "vocab_size", "n_positions", "n_layer", "attn_pdrop", "embd_pdrop", "resid_pdrop",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


# --- ALGPT2 -> GPT-2 -----------------------------------------------------------------------------


def gpt2_config(config: Any) -> dict[str, Any]:
    """Arguments of the `GPT2Config` for `gpt2_tensors`; a factorized model becomes untied."""
    untied = config.is_factorized or not config.tie_word_embeddings
    return {key: getattr(config, key) for key in GPT2_KEYS} | {
        "tie_word_embeddings": not untied, "architectures": ["GPT2LMHeadModel"],
        "dtype": "float32", "n_ctx": config.n_positions,
    }  # fmt: skip


def gpt2_tensors(config: Any, tensors: Tensors) -> Tensors:
    """The weights of a stock GPT-2 that has the logits of an ALGPT2.

    Each layer gets a copy of its block. The token table (V, C) is wte @ projection, the position
    table (P, C) wpe @ projection + its bias, the head (V, C) wte @ dense. GPT-2's head has no bias,
    so the bias b (E,) of dense moves into ln_f's bias as delta (C,) with dense.weight @ delta = b.
    Least squares solve this, as E <= C.

    Args:
        config: the ALGPT2Config.
        tensors: every weight by its name.
    Raises:
        UserError: dense is so close to a lower rank that no delta gives its bias.
    """
    result = {}
    for layer_index, block_index in enumerate(config.block_of_layers()):
        for name, value in block_tensors(tensors, block_index).items():
            result[f"transformer.h.{layer_index}.{name}"] = value
    result |= {k: v for k, v in tensors.items() if k.startswith("transformer.ln_f.")}
    wte, wpe = tensors[WTE], tensors[WPE]
    head = wte if config.tie_word_embeddings else tensors[HEAD]
    if config.is_factorized:
        weight, bias = _linear(tensors, PROJECTION)
        wte, wpe = wte @ weight.T, wpe @ weight.T + bias
        weight, bias = _linear(tensors, DENSE)
        head = head @ weight
        delta = np.linalg.lstsq(weight, bias)[0]
        if np.linalg.norm(weight @ delta - bias) > FOLD_TOLERANCE * np.linalg.norm(bias):
            raise UserError(
                "the bias of dense is outside the range of its weight, so that no GPT-2 has these "
                "logits: train the checkpoint a little, or give dense a zero bias"
            )
        result[LN_F_BIAS] = result[LN_F_BIAS] + delta
    result |= {WTE: wte, WPE: wpe}
    if config.is_factorized or not config.tie_word_embeddings:
        result[HEAD] = head
    return {name: np.ascontiguousarray(value, np.float32) for name, value in result.items()}


def block_tensors(tensors: Tensors, block_index: int) -> Tensors:
    """The weights of one stored block by their names within it."""
    prefix = f"transformer.h.{block_index}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _linear(tensors: Tensors, name: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(tensors[f"{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))


# --- GPT-2 -> ALGPT2 -----------------------------------------------------------------------------


def check_start(source: Any, target: Any) -> None:
    """Raise `UserError` unless a GPT-2 with configuration `source` can start `target`."""
    pairs = {key: (getattr(source, key), getattr(target, key)) for key in BLOCK_KEYS}
    pairs["n_inner"] = tuple(config.n_inner or 4 * config.n_embd for config in (source, target))
    pairs["vocab_size"] = source.vocab_size, target.vocab_size
    if mismatches := [f"{key} {a} and {b}" for key, (a, b) in pairs.items() if a != b]:
        raise UserError(
            f"--init_from and --config differ ({', '.join(mismatches)}): choose a --config with "
            "the values of --init_from"
        )
    if source.n_positions < target.n_positions:
        raise UserError(
            f"--init_from has {source.n_positions:,} positions, --config needs "
            f"{target.n_positions:,}: choose a --config of at most {source.n_positions:,}"
        )
    tied = target.tie_word_embeddings and not target.is_factorized
    if tied and not source.tie_word_embeddings:
        raise UserError(
            "--init_from has a head of its own, but --config uses the token table as head: choose "
            "a factorized --config or tie_word_embeddings=false"
        )


def start_tensors(source: Any, tensors: Tensors, target: Any, blocks: Sequence[str]) -> Tensors:
    """The first weights of an ALGPT2, made from the weights of a GPT-2.

    The logits stay the same if the GPT-2 equals an ALGPT2 of this configuration: K = L and E = C,
    or tables of rank E whose heads share their column space. Otherwise stored blocks are means of
    layers, and tables become their nearest tables of rank E.

    Args:
        source: the GPT2Config.
        tensors: the weights of the GPT-2, with the names and shapes of `gpt2_tensors`.
        target: the ALGPT2Config.
        blocks: `mean`, `first` or `last` of the layers that a stored block stands for; or K
            numbers of layers of the GPT-2.
    Raises:
        UserError: `blocks` has another form, or `check_start` refuses.
    """
    check_start(source, target)
    result = {k: v for k, v in tensors.items() if k.startswith("transformer.ln_f.")}
    for block_index, layers in enumerate(layers_of_blocks(source.n_layer, target, blocks)):
        parts = [block_tensors(tensors, layer) for layer in layers]
        for name in parts[0]:
            mean = np.mean([part[name] for part in parts], axis=0, dtype=np.float64)
            result[f"transformer.h.{block_index}.{name}"] = mean
    wte, wpe = tensors[WTE], tensors[WPE][: target.n_positions]
    head = tensors.get(HEAD, wte)
    if target.is_factorized:
        result |= factorize(wte, wpe, head, target.embedding_size, target.tie_word_embeddings)
    else:
        result |= {WTE: wte, WPE: wpe} | ({} if target.tie_word_embeddings else {HEAD: head})
    return {name: np.ascontiguousarray(value, np.float32) for name, value in result.items()}


def layers_of_blocks(n_layers: int, target: Any, blocks: Sequence[str]) -> list[list[int]]:
    """For each stored block of `target`, the layers of the GPT-2 whose mean it becomes.

    Layer i of L stands at i / L, so that models of unequal depth lie over each other.

    Args:
        n_layers: depth of the GPT-2.
    Raises:
        UserError: `blocks` has another form than `start_tensors` says.
    """
    n_blocks, n_target = target.num_hidden_groups, target.n_layer
    if len(blocks) == n_blocks and all(b.isdecimal() and int(b) < n_layers for b in blocks):
        return [[int(b)] for b in blocks]
    if len(blocks) != 1 or blocks[0] not in ("mean", "first", "last"):
        raise UserError(
            f"--init_blocks {' '.join(blocks)}: expected mean, first, last or {n_blocks} numbers "
            f"of layers from 0 to {n_layers - 1}, one for each stored block"
        )
    stands_for: list[set[int]] = [set() for _ in range(n_blocks)]
    block_of = target.block_of_layers()
    for i in range(max(n_layers, n_target)):
        layer, virtual = (i * n // max(n_layers, n_target) for n in (n_layers, n_target))
        stands_for[block_of[virtual]].add(layer)
    choose = {"mean": slice(None), "first": slice(1), "last": slice(-1, None)}[blocks[0]]
    return [sorted(layers)[choose] for layers in stands_for]


def factorize(wte: np.ndarray, wpe: np.ndarray, head: np.ndarray, rank: int, tied: bool) -> Tensors:
    """Tables (V, E) and (P, E), projection, dense and an untied head, nearest to GPT-2's tables.

    The E directions are the leading right singular vectors of both tables together. Positions lose
    their mean and are weighted to count as much as tokens, since each position of a text adds one
    row of either table. The projection's bias holds the means outside these directions. A tied head
    is the token table; dense is then the least-squares solution of tokens @ dense = head.

    Args:
        wte, wpe, head: GPT-2's tables (V, C), (P, C) and (V, C).
        rank: E.
        tied: whether the ALGPT2's head is its token table.
    """
    wte, wpe, head = (table.astype(np.float64) for table in (wte, wpe, head))
    mean = wpe.mean(0)
    wpe = wpe - mean
    basis = _leading_directions(wte.T @ wte + wpe.T @ wpe * (len(wte) / len(wpe)), rank)  # (C, E)
    token_mean = wte.mean(0)
    bias = mean + token_mean - basis @ (basis.T @ token_mean)
    tokens = wte @ basis
    if tied:
        lm_head, dense = tokens, np.linalg.lstsq(tokens, head)[0]
    else:
        dense = _leading_directions(head.T @ head, rank).T
        lm_head = head @ dense.T
    result = {
        WTE: tokens, WPE: wpe @ basis, f"{PROJECTION}.weight": basis, f"{PROJECTION}.bias": bias,
        f"{DENSE}.weight": dense, f"{DENSE}.bias": np.zeros(rank),
    }  # fmt: skip
    return result | ({} if tied else {HEAD: lm_head})


def _leading_directions(gram: np.ndarray, rank: int) -> np.ndarray:
    """Eigenvectors (C, rank) of the largest eigenvalues of a symmetric matrix (C, C)."""
    return np.linalg.eigh(gram)[1][:, : -rank - 1 : -1]
