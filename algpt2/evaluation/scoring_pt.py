"""A PyTorch model as `scoring.Model`: one function from rows of tokens to log-probabilities."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels_algpt2 import loss_rows
from ..modeling_algpt2 import ALGPT2LMHeadModel
from ..system.processes_pt import Processes
from .scoring import Model


def evaluation_model(
    model: nn.Module, processes: Processes, context: int, batch_size: int
) -> Model:
    """A causal language model of transformers as `scoring.Model`.

    Scores are float32 (float64 for a float64 model), matrix products have the run's precision, and
    the processes share the rows.

    Args:
        context: tokens that a window reads at most.
        batch_size: rows of `context` tokens per forward pass, over all processes.
    """
    model.eval()

    def score(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = np.array_split(np.arange(len(rows)), processes.count)[processes.rank]
        scores = score_rows(model, rows[own], processes) if len(own) else None
        if processes.count > 1:
            scores = _gather(scores, own, (2, len(rows), rows.shape[1] - 1), processes)
        log_probs, is_likeliest = scores.cpu().numpy()
        return log_probs, is_likeliest.astype(bool)

    return Model(score, context, batch_size * context)


@torch.no_grad()
def score_rows(model: nn.Module, rows: np.ndarray, processes: Processes) -> Tensor:
    """Rows (B, T + 1) to (2, B, T): log-probabilities of tokens 1 to T in nats, and 1 where the
    token is the likeliest, else 0."""
    tokens = torch.from_numpy(rows).to(processes.device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
    pieces, start = [], 0
    with processes.autocast():
        for logits in _logits(model, inputs):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            label = labels[start : start + len(logits)]
            log_probs = -nn.functional.cross_entropy(logits, label, reduction="none")
            pieces.append(torch.stack([log_probs, (logits.argmax(-1) == label).to(log_probs)]))
            start += len(logits)
    return torch.cat(pieces, 1).view(2, *inputs.shape)


def _logits(model: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """Logits (rows, V) of all positions, a few rows at a time where the model allows it."""
    rows = loss_rows(inputs.device.type)
    if not isinstance(model, ALGPT2LMHeadModel):
        yield from model(inputs, use_cache=False).logits.flatten(0, 1).split(rows)
        return
    hidden = model.transformer(inputs, use_cache=False).last_hidden_state
    if model.dense is not None:
        hidden = model.dense(hidden)
    for piece in hidden.flatten(0, 1).split(rows):
        yield model.lm_head(piece)


def _gather(
    scores: Tensor | None, own: np.ndarray, shape: tuple[int, ...], processes: Processes
) -> Tensor:
    """The scores of all rows: each process adds the scores of its `own` rows to zeros (exact)."""
    dtype = torch.float32 if scores is None else scores.dtype
    gathered = torch.zeros(shape, dtype=dtype, device=processes.device)
    if scores is not None:
        gathered[:, own] = scores
    dist.all_reduce(gathered)
    return gathered
