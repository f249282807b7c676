"""Tasks on a Ray cluster, against a Ray of a few lines: no test needs the real one."""

import functools
import operator
import os
import signal
import sys
import types
from pathlib import Path

import pytest

from algpt2.errors import UserError
from algpt2.system.parallel import AHEAD, TasksStopped, run_tasks

CORES = 2
double = functools.partial(operator.mul, 2)


class FakeRay(types.ModuleType):
    """A cluster of `CORES` cores that runs a task when its result is asked for."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause):
                super().__init__("remote traceback")
                self.cause = cause

    def __init__(self):
        super().__init__("ray")
        self.log, self.in_flight, self.most, self.cancelled = [], set(), 0, 0
        self.gone = False  # all nodes

    def init(self, address, **_):
        self.log.append(address)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the real one puts a handler too

    def shutdown(self):
        self.log.append("shutdown")

    def cluster_resources(self):
        return {} if self.gone else {"CPU": float(CORES)}

    def get_runtime_context(self):
        return types.SimpleNamespace(gcs_address="auto")

    def remote(self, *, max_retries):
        assert max_retries > 0

        def decorate(function):
            def submit(*args):
                reference = functools.partial(function, *args)
                self.in_flight.add(reference)
                self.most = max(self.most, len(self.in_flight))
                return reference

            return types.SimpleNamespace(remote=submit)

        return decorate

    def wait(self, references, **_):
        return ([], references) if self.gone else (references, [])

    def get(self, reference):
        self.in_flight.remove(reference)
        try:
            return reference()
        except self.exceptions.RayError:
            raise
        except Exception as error:
            raise self.exceptions.RayTaskError(error) from error

    def cancel(self, reference):
        self.cancelled += reference in self.in_flight
        self.in_flight.discard(reference)


@pytest.fixture
def ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    handler = signal.getsignal(signal.SIGTERM)
    yield fake
    assert signal.getsignal(signal.SIGTERM) == handler
    assert fake.log == ["auto", "shutdown"]
    assert not fake.in_flight


def on_ray(function, tasks):
    return run_tasks(function, tasks, workers=1, ray="auto")


def test_results_come_in_order_and_the_tasks_in_flight_are_bounded(ray):
    assert list(on_ray(double, range(1000))) == [2 * i for i in range(1000)]
    assert ray.most == AHEAD * CORES


def test_a_caller_that_stops_leaves_no_task_running(ray):
    results = on_ray(double, range(1000))
    assert [next(results) for _ in range(3)] == [0, 2, 4]
    results.close()
    assert ray.cancelled == AHEAD * CORES - 1  # one had been taken out


def fail(error, task):
    if task == 3:
        raise error
    return task


def test_the_error_of_a_task_is_that_of_a_local_one(ray):
    with pytest.raises(UserError, match=r"^line 7 is broken$"):
        list(on_ray(functools.partial(fail, UserError("line 7 is broken")), range(1000)))
    assert ray.cancelled


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FakeRay.exceptions.RayError("node\ndied"), r"failed \(node died\): .* repeat the command"),
        (FileNotFoundError(2, "No such file", "/a/b"), "No such file: /a/b.* at the same paths"),
        (RuntimeError("Traceback:\nNo module named 'x'"), r"\(No module named 'x'\): expected"),
    ],
)
def test_a_failing_cluster_is_a_line_that_says_what_to_do(ray, error, message):
    with pytest.raises(TasksStopped, match=message):
        list(on_ray(functools.partial(fail, error), range(5)))


def test_a_cluster_without_nodes_is_not_waited_for_forever(ray):
    results = on_ray(double, range(5))
    next(results)
    ray.gone = True
    with pytest.raises(TasksStopped, match="lost its head or all its nodes: finished"):
        next(results)


def test_tasks_run_in_the_folder_of_the_command(ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = on_ray(os.path.abspath, ["a"])
    assert next(results) == str(tmp_path / "a")
    results.close()


def test_ray_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TasksStopped, match=r"pip install -r requirements-ray\.txt"):
        list(on_ray(double, [1, 2]))
    assert (Path(__file__).parents[2] / "requirements-ray.txt").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster at --ray 127.0.0.1:1: Connection refused"),
        ("ray://127.0.0.1:10001", "on a node of the cluster"),
    ],
)
def test_a_cluster_that_does_not_answer(monkeypatch, address, message):
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    with pytest.raises(TasksStopped, match=message):
        list(run_tasks(double, [1, 2], workers=1, ray=address))
