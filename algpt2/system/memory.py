"""Memory: how much this machine has, and what the allocator does with freed pieces of it."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

from ..errors import UserError


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of handing each large array back to the kernel.

    Page faults of temporaries otherwise take up to half of a small model's step on a CPU, and a
    third of the time of writing shards. No effect where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Have glibc hand back what `keep_freed_memory` kept: behind something of hundreds of MB."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def check_memory(n_parameters: int) -> None:
    """`UserError` if a model's weights alone, in float32, are more than the memory here."""
    n_bytes, memory = 4 * n_parameters, memory_bytes()
    if n_bytes > memory:
        raise UserError(
            f"the model has {n_parameters:,} parameters, {n_bytes / 1e9:,.1f} GB, and this machine "
            f"{memory / 1e9:,.1f} GB of memory: expected a smaller --config or --checkpoint"
        )


def memory_bytes() -> int:
    """Memory of this machine, or of the container that this process runs in."""
    if sys.platform == "win32":
        return 2**62
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory
