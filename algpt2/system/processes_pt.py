"""The processes that torchrun started, their device and number format."""

import atexit
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from .. import kernels_algpt2
from ..errors import UserError, describe
from ..kernels_algpt2 import has_compiler
from ..options import OptimOptions, TrainOptions
from .console import MainFirst, is_main_process, torchrun_number, torchrun_process
from .memory import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Processes(MainFirst):
    """This process among those that train together, its device and its number format."""

    rank: int
    count: int
    device: torch.device
    dtype: torch.dtype

    @property
    def low_precision(self) -> bool:
        """Whether matrix products run in less than float32."""
        return self.dtype != torch.float32

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over all processes."""
        if self.count > 1:
            dist.all_reduce(value)
            value /= self.count
        return value

    def any(self, flag: bool) -> bool:
        """True on every process as soon as it is on one."""
        if self.count == 1:
            return flag
        return self.mean(torch.tensor(float(flag), device=self.device)).item() > 0

    def on_main(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on process 0, on every process."""
        values = [function() if is_main_process() else None]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Return when every process is here."""
        if self.count > 1:
            dist.barrier()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context in which matrix products run in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def start_processes(options: TrainOptions) -> Processes:
    """Join the processes that torchrun started (or be the only one) and choose device and dtype.

    Raises:
        UserError: the device is not there, batch_size does not divide among the processes, or the
            environment is not torchrun's.
    """
    rank, count = torchrun_process()
    if options.optim.batch_size % count:
        raise UserError(
            f"--batch_size {options.optim.batch_size} is the batch of all processes: expected a "
            f"multiple of {count} processes"
        )
    transformers.utils.logging.disable_progress_bar()  # a bar a checkpoint
    device = _device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        kernels_algpt2.COMPILES = options.compile is not False
    else:
        keep_freed_memory()
    if count > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except ValueError as error:  # of the environment
            raise UserError(
                f"WORLD_SIZE={count}: {describe(error)}; start several processes with torchrun"
            ) from error
        # Its threads must end before the interpreter does: left alone, 2 of 40 runs aborted there.
        atexit.register(dist.destroy_process_group)
    return Processes(rank, count, device, _dtype(options.optim, device))


def compiles(options: TrainOptions, device: torch.device) -> bool:
    """Whether torch.compile runs: as `--compile` says, else on CUDA where its compilers are."""
    if options.compile is not None:
        return options.compile
    return has_compiler(device)


def _device(name: str) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        name = f"cuda:{torchrun_number('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not usable here ({reason}); try cpu") from None
    return device


def _dtype(optim: OptimOptions, device: torch.device) -> torch.dtype:
    if optim.fp16:
        return torch.float16
    if optim.precision != "auto":
        return DTYPES[optim.precision]
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32  # CPUs without AMX: bf16 is 100x slower
