"""Products, activation and loss of modeling_algpt2.py, in forms that run faster or hold less.

Each computes, to rounding, what its plain form in PyTorch computes, so this file says nothing about
the model. It travels in checkpoint folders beside modeling_algpt2.py.

    V vocab_size   E embedding_size   N rows, all positions of a batch
"""

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import pytorch_utils
from transformers.activations import ACT2FN

LOSS_ROWS_CPU, LOSS_ROWS = 512, 2048
LOSS_ROWS_COMPILED = 8192  # whose float32 logits stay in registers
COMPILES = True  # the loss on CUDA; --no_compile says False
COLUMNS = 128  # the compiled loss pads V to a multiple: tensor cores want aligned rows

# A product of few rows (the tokens that `generate` adds at a time) takes longer to read its weight
# than to multiply, and PyTorch's float32 products on a CPU read it with one core. The two products
# below read it with all cores; benchmarks/generate.py measures them. Partial sums (n_pieces, N,
# n_out) stay small beside a weight (n_in, n_out) while n_pieces N is small beside n_in.
FEW_ROWS, MAX_PIECES = 16, 8


def has_few_rows(x: Tensor) -> bool:
    """Whether the product of `x` (..., n_in) is one of few float32 rows on a CPU, in eager mode."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # a graph would hold for this number of rows only
    n_rows = x.numel() // x.shape[-1]
    is_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    is_inference_on_cpu = x.device.type == "cpu" and not torch.is_grad_enabled()
    return is_inference_on_cpu and is_float32 and 0 < n_rows <= FEW_ROWS


class Conv1D(pytorch_utils.Conv1D):
    """GPT-2's projection, x @ weight + bias: (..., n_in) -> (..., n_out)."""

    def forward(self, x: Tensor) -> Tensor:
        n_in, n_out = self.nx, self.nf
        # A batch of partial sums over n_in: each core takes one.
        n_pieces = min(torch.get_num_threads(), MAX_PIECES) if has_few_rows(x) else 1
        if n_pieces == 1 or n_in % n_pieces:
            return super().forward(x)
        pieces = x.reshape(-1, n_pieces, n_in // n_pieces).transpose(0, 1)
        weights = self.weight.view(n_pieces, -1, n_out)
        y = torch.bmm(pieces, weights).sum(0)  # (n_pieces, N, n_out) -> (N, n_out)
        return (y + self.bias).view(*x.shape[:-1], n_out)


class LMHead(nn.Linear):
    """The logits, x @ weight.T: (..., E) -> (..., V)."""

    def forward(self, x: Tensor) -> Tensor:
        if not has_few_rows(x):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        # Two columns at least: PyTorch gives the product with a single column to one core.
        columns = rows.repeat(2, 1).T if len(rows) == 1 else rows.T
        logits = (self.weight @ columns).T[: len(rows)].contiguous()  # (N, V)
        return logits.view(*x.shape[:-1], -1)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of this name in transformers; `gelu_new` in one kernel, not eight.

    Raises:
        ValueError: transformers has no such function.
    """
    if name not in ACT2FN:
        raise ValueError(f"expected activation_function to be one of {[*ACT2FN]}, got {name!r}")
    return nn.GELU(approximate="tanh") if name == "gelu_new" else ACT2FN[name]


def loss_rows(device: str) -> int:
    """The loss holds float32 logits of so many rows at a time on a device of this type."""
    return LOSS_ROWS_CPU if device == "cpu" else LOSS_ROWS


@torch.compiler.disable  # which cannot trace a gradient that the forward pass makes
def head_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the logits `hidden @ weight.T`, a few rows at a time.

    Args:
        hidden: states (..., E).
        weight: the head's (V, E).
        labels: ids (...); every label counts.
    Returns:
        A float32 scalar.
    """
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    hidden = hidden.to(dtype).reshape(-1, hidden.shape[-1])  # (N, E)
    labels = labels.reshape(-1, 1)
    if device == "cuda" and COMPILES and has_compiler(hidden.device):
        n_pieces = math.ceil(len(hidden) / LOSS_ROWS_COMPILED)
        function, n_rows = _CompiledHeadCrossEntropy, math.ceil(len(hidden) / n_pieces)
    else:
        function, n_rows = _HeadCrossEntropy, loss_rows(device)
        weight = weight.to(dtype)
    return function.apply(hidden, weight, labels, n_rows, torch.is_grad_enabled())


@functools.cache
def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile works here: on CUDA with Triton, which needs a C compiler and compute
    capability 7.0."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    c_compilers = filter(None, (os.environ.get("CC"), "gcc", "clang"))
    return any(map(shutil.which, c_compilers)) and torch.cuda.get_device_capability(device) >= (7,)


class _HeadCrossEntropy(torch.autograd.Function):
    """The loss and both gradients, computed in the forward pass while a piece's logits exist.

    `F.linear_cross_entropy` does the same, but in bfloat16 it rounds the loss to 3 digits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, n_rows: int, with_gradients: bool
    ) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden, d_weight = torch.empty_like(hidden), None
        if with_gradients:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        pieces = (tensor.split(n_rows) for tensor in (hidden, labels, d_hidden))
        for x, y, d_x in zip(*pieces, strict=True):
            # On a CPU the transposed product is the faster one (benchmarks/train_pt.py).
            p = (weight @ x.T).T if x.device.type == "cpu" else F.linear(x, weight)
            p = p.float()  # logits (n_rows, V), which become probabilities in place
            p -= p.amax(-1, keepdim=True)
            loss -= p.gather(-1, y).sum()
            total = p.exp_().sum(-1, keepdim=True)  # (n_rows, 1)
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


def piece_loss(
    x: Tensor, weight: Tensor, y: Tensor, n_columns: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy of a few rows in nats, and its gradient by their logits.

    Args:
        x: states (n, E).
        weight: (V + padding, E); the logits behind the first `n_columns` = V are -inf.
        y: labels (n, 1).
    Returns:
        A float32 scalar, and (n, V + padding) in the dtype of `weight`.
    """
    columns = torch.arange(len(weight), device=x.device)
    logits = torch.where(columns < n_columns, F.linear(x, weight).float(), -math.inf)
    log_sum = logits.logsumexp(-1, keepdim=True)  # (n, 1)
    loss = (log_sum - logits.gather(-1, y)).sum()
    if not with_gradient:
        return loss, None
    d_logits = (logits - log_sum).exp() - (columns == y).float()  # softmax minus one-hot
    return loss, d_logits.to(weight.dtype)


@functools.cache
def compiled_piece_loss() -> Callable:
    """`piece_loss` for CUDA, where the logits stay in registers.

    Its shapes are static: a graph for any number of rows could serve a piece in one start of a run
    and not in the next, and its sums round differently.
    """
    return torch.compile(piece_loss, dynamic=False)


class _CompiledHeadCrossEntropy(torch.autograd.Function):
    """`_HeadCrossEntropy` for CUDA: each piece reads its logits twice and writes their gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, n_rows: int, with_gradients: bool
    ) -> Tensor:
        ctx.n, ctx.n_columns = len(hidden), len(weight)
        padded = F.pad(weight.to(hidden.dtype), (0, 0, 0, -len(weight) % COLUMNS))
        piece = compiled_piece_loss()
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden, d_weight = torch.empty_like(hidden), None
        if with_gradients:
            d_weight = torch.zeros_like(padded, dtype=torch.float32)
        pieces = (tensor.split(n_rows) for tensor in (hidden, labels, d_hidden))
        for x, y, d_x in zip(*pieces, strict=True):
            part, d_logits = piece(x, padded, y, ctx.n_columns, with_gradients)
            loss += part
            if with_gradients:
                torch.mm(d_logits, padded, out=d_x)
                _add_product(d_weight, d_logits.T, x)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = d_loss / ctx.n
        d_weight = d_weight[: ctx.n_columns].mul_(scale)  # float32, as the weight
        return d_hidden.mul_(scale), d_weight, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to `total` in float32, without rounding the product to bfloat16 on CUDA."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b
