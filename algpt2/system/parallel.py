"""Tasks in this process, in worker processes or on a Ray cluster: the same results, in order."""

import collections
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError, describe
from .memory import keep_freed_memory
from .script import quiet

Task, Result = TypeVar("Task"), TypeVar("Result")

# On a Ray cluster:
ROOT = Path(__file__).resolve().parents[2]  # the workers import this project from here
RETRIES = 3  # of a task whose node or process died, which Ray notices within half a minute
AHEAD = 8  # tasks in flight per core: work continues while a task is repeated, memory stays flat
CONNECT_S, WAIT_S, CANCEL_S = 10, 10, 60


class TasksStopped(UserError):
    """Workers died or cannot be reached; finished tasks are good, the same command continues."""


def available_cores() -> int:
    """Cores that this process may use."""
    with contextlib.suppress(AttributeError):  # macOS, Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    ray: str | None = None,
) -> Iterator[Result]:
    """`function(task)` for each task, yielded in their order; tasks and results are pickled.

    Args:
        workers: processes; 1: the tasks run in this process.
        ray: address of a Ray cluster (`auto`, `host:port`) that runs the tasks instead.

    Raises:
        TasksStopped: a worker was killed, or Ray is not installed or does not answer.
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
        raise TasksStopped(
            "a worker process was killed (out of memory?): finished tasks are kept; repeat the"
            f" command, with fewer --workers than {workers} if it was memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Set up a worker: a single thread that ends with its parent process, which answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# --- a Ray cluster -------------------------------------------------------------------------------


def _on_ray(
    function: Callable[[Task], Result], tasks: Sequence[Task], address: str
) -> Iterator[Result]:
    """Tasks in order, a bounded number in flight; Ray repeats the tasks of a node that dies.

    Not `ray.util.multiprocessing.Pool`: when a node dies, its actors end the whole run.
    """
    with _connected(address) as ray:
        run = ray.remote(max_retries=RETRIES)(_as_worker)
        cores = _cores(ray)
        if not cores:
            raise TasksStopped(f"the Ray cluster at --ray {address} has no CPU")
        pending: collections.deque[Any] = collections.deque()
        try:
            for task in tasks:
                if len(pending) >= AHEAD * cores:
                    result = _result(ray, pending[0])
                    pending.popleft()
                    yield result
                pending.append(run.remote(str(Path.cwd()), function, task))
            for reference in pending:
                yield _result(ray, reference)
            pending.clear()
        finally:
            _cancel(ray, pending)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected to the cluster and silent on the console; then disconnected."""
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # not 20 retries of 40 s each
    try:
        import ray
    except ImportError:
        raise TasksStopped("--ray needs Ray: pip install -r requirements-ray.txt") from None
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _check_answers(address)
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        with quiet():
            ray.init(
                address, log_to_driver=False, logging_level="ERROR",
                runtime_env={"env_vars": environment},
            )  # fmt: skip
        # Ray prints forty lines of log for each node that dies, in spite of log_to_driver.
        with contextlib.suppress(KeyError):
            sys.modules["ray._private.worker"].print_to_stdstream = lambda *_, **__: None
    except (OSError, RuntimeError, ValueError) as error:
        raise TasksStopped(f"no Ray cluster at --ray {address}: {describe(error)}") from None
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # ray.init has replaced it
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """`OSError` at once if nothing answers; Ray would try for minutes."""
    if address.startswith("ray://"):
        raise ValueError("run the command on a node of the cluster, with auto or host:port")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


def _cores(ray: Any) -> int:
    return int(ray.cluster_resources().get("CPU", 0))


def _answers(address: str) -> bool:
    try:
        _check_answers(address)
    except OSError:
        return False
    return True


def _as_worker(folder: str, function: Callable[[Task], Result], task: Task) -> Result:
    """Do a task on a node of the cluster, as a local worker does that was started in `folder`."""
    keep_freed_memory()
    os.chdir(folder)
    return function(task)


def _result(ray: Any, reference: Any) -> Any:
    """The result of a task; its error is raised.

    Raises:
        TasksStopped: the cluster failed, or has lost its head or all nodes.
    """
    misses = 0
    while not ray.wait([reference], timeout=WAIT_S)[0]:
        head = ray.get_runtime_context().gcs_address
        misses = 0 if _answers(head) and _cores(ray) else misses + 1
        if misses == 3:  # Ray ends this process after 60 s without a head
            raise TasksStopped(
                "the Ray cluster has lost its head or all its nodes: finished tasks are kept;"
                " repeat the command when they are back, or without --ray"
            )
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, FileNotFoundError) or "No module named" in str(cause):
            reason = describe(cause)
            if not isinstance(cause, OSError):
                reason = str(cause).strip().splitlines()[-1]
            raise TasksStopped(
                f"a node of the Ray cluster lacks something ({reason}): expected the packages of"
                f" requirements.txt on all, and {ROOT}, the text, the tokenizer and --save_path at"
                " the same paths"
            ) from None
        raise cause from error
    except ray.exceptions.RayError as error:
        reason = describe(error)[:200]
        raise TasksStopped(
            f"the Ray cluster failed ({reason}): finished tasks are kept; repeat the command"
        ) from None


def _cancel(ray: Any, references: Collection[Any]) -> None:
    """End the tasks and wait, so that no task writes into a folder that its caller has left."""
    if references and _answers(ray.get_runtime_context().gcs_address):
        for reference in references:
            ray.cancel(reference)
        ray.wait([*references], num_returns=len(references), timeout=CANCEL_S)
