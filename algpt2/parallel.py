"""Tasks in this process, in worker processes or on a Ray cluster: the same results, in order."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from .errors import UserError

Task, Result = TypeVar("Task"), TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may use."""
    with contextlib.suppress(AttributeError):  # macOS, Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    ray: str | None = None,
) -> Iterator[Result]:
    """`function(task)` for each task, yielded in their order; tasks and results are pickled.

    Args:
        workers: processes; one works in this process.
        ray: address of a Ray cluster (`auto`, `host:port`) that runs the tasks instead.

    Raises:
        UserError: a worker was killed, or Ray is not installed or does not answer.
    """
    if ray is not None:
        yield from _on_ray(function, tasks, ray)
    elif workers == 1 or len(tasks) < 2:
        yield from map(function, tasks)
    else:
        yield from _in_processes(function, tasks, min(workers, len(tasks)))


def _in_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    # Not fork: the process may run threads already (torch, tokenizers), which a fork breaks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from pool.map(function, tasks)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?): what is done is kept; repeat the"
            f" command, with fewer --workers than {workers} if it was memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """A worker does not outlive the process that started it, and is one thread. Ctrl-C reaches
    both: it is that process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _on_ray(
    function: Callable[[Task], Result], tasks: Sequence[Task], address: str
) -> Iterator[Result]:
    try:
        from ray.util.multiprocessing import Pool
    except ImportError:
        raise UserError("--ray needs Ray: pip install ray") from None
    try:
        pool = Pool(ray_address=address)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise UserError(f"no Ray cluster at --ray {address}: {error}") from None
    with pool:
        yield from pool.imap(function, tasks, chunksize=1)
