"""Packing on a Ray cluster of two nodes, with kills: the bytes of a local run every time.

    pip install -r requirements-ray.txt
    python3 benchmarks/faults.py ray [--short]

Both nodes are on this machine, one core each, on the loopback. A node is killed as a machine that
loses power: Ray's process and its workers, with SIGKILL.
"""

import contextlib
import importlib.util
import io
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .harness import Command, folder_difference, make_workspace, result, wait_for

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's address of a node is then 127.0.0.1
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1"}
FILES = 40_000  # of about 1.7 kB: 10 tasks
SHARDS = 8
OPTIONS = {
    "a folder": ["--path={space}/many"],
    "a folder, split and shuffled": ["--path={space}/many", "--valid_fraction=0.3",
                                     "--shuffle_documents"],
    "a .tar.xz, copies left out": ["--path={space}/text.tar.xz", "--dedup"],
}  # fmt: skip
MOMENTS = {"encoding": ".packing/0*.json", "writing": "**/*.tfrecord"}  # by files that are there
KILLS = ["encoding"] * 3 + ["writing"] * 2


@contextlib.contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster, of which a test has to kill the second node only."""
    os.environ |= LOOPBACK
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


def kill(node: Any) -> None:
    """The processes of a node and their children at once."""
    pids = [info.process.pid for infos in node.all_processes.values() for info in infos]
    for pid in pids.copy():
        pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def pack(space: Path, name: str, out: Path, address: str | None = None) -> Command:
    """The command that packs one of `OPTIONS`."""
    flags = [option.format(space=space) for option in OPTIONS[name]]
    flags += [f"--save_path={out}", f"--tokenizer={space / 'tokenizer'}", f"--n_shards={SHARDS}"]
    flags += [f"--ray={address}"] if address else ["--workers=1"]
    return Command(["make_tfrecords.py", *flags], [LOOPBACK])


def finish(command: Command, space: Path, out: Path, clean: Path) -> list[str]:
    """What is wrong with a run that is to end with the bytes of the local one."""
    code = command.wait()[0]
    output = command.output()
    wrong = [f"exit code {code}: {output[-300:]}"] if code else []
    splits = sorted(path.name for path in clean.iterdir() if path.is_dir()) or [""]
    for split in splits:
        wrong = wrong or [*filter(None, [folder_difference(out / split, clean / split)])]
    if "Traceback" in output or "raylet" in output:
        wrong.append(f"words of Ray on the console: {output[-300:]}")
    shutil.rmtree(out)
    return wrong


def same_bytes(space: Path, clean: dict[str, Path], cluster: Any) -> dict:
    """Each command on the cluster without any fault."""
    lost, out = [], space / "out"
    for name, folder in clean.items():
        command = pack(space, name, out, cluster.address)
        command.start(space)
        lost += finish(command, space, out, folder)
    return result("Ray, two nodes", "make_tfrecords.py, no fault", len(clean), lost)


def struck(
    space: Path,
    clean: dict[str, Path],
    address: str,
    moment: str,
    strike: Callable[[Command], None],
    address_again: str | None = None,
) -> tuple[int, list[str]]:
    """One run that is struck at a random moment, and repeated if it ended by that (None: locally).

    Returns its first exit code and what was wrong.
    """
    name, out = "a folder, split and shuffled", space / "out"
    command = pack(space, name, out, address)
    command.start(space)
    n_files = random.randint(1, SHARDS)
    wait_for(lambda: len([*out.glob(MOMENTS[moment])]) >= n_files, command)
    if not command.is_running():
        return 0, [f"it ended too early: {command.output()[-300:]}"]
    strike(command)
    code = command.wait()[0]
    wrong = []
    if code == 2 and "repeat the command" not in command.output():
        wrong.append(f"no clear line: {command.output()[-300:]}")
    if code:
        command = pack(space, name, out, address_again)
        command.start(space)
    return code, wrong + finish(command, space, out, clean[name])


def nodes_killed(space: Path, clean: dict[str, Path], cluster: Any) -> dict:
    """The node on which the command does not run."""
    codes, lost = [], []
    for moment in KILLS:
        (node,) = cluster.worker_nodes
        code, wrong = struck(space, clean, cluster.address, moment, lambda _, n=node: kill(n))
        codes, lost = [*codes, code], lost + wrong[:1]
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(**NODE)
    note = f"{codes.count(0)} of {len(codes)} commands went on by themselves"
    return result("SIGKILL", "one of two Ray nodes", len(codes), lost, note)


def commands_killed(space: Path, clean: dict[str, Path], cluster: Any) -> dict:
    """The command itself; the next one begins while the nodes may still end its tasks."""
    lost, address = [], cluster.address
    for moment in KILLS:
        strike = lambda command: command.signal(signal.SIGKILL)  # noqa: E731
        lost += struck(space, clean, address, moment, strike, address)[1][:1]
    return result("SIGKILL", "make_tfrecords.py --ray", len(KILLS), lost)


def head_killed(space: Path, clean: dict[str, Path], cluster: Any) -> dict:
    """The cluster's head: one line, and a local command finishes its work."""
    head = cluster.head_node
    code, lost = struck(space, clean, cluster.address, "encoding", lambda _: kill(head))
    if code != 2:
        lost.append(f"exit code {code} instead of 2")
    return result("SIGKILL", "the head of the Ray cluster", 1, lost[:1], "one line, exit code 2")


def run(short: bool = False, seed: int = 0) -> Iterator[dict]:
    """The lines of the table, one after the other; none without Ray."""
    if importlib.util.find_spec("ray") is None:
        print("not run: pip install -r requirements-ray.txt", file=sys.stderr)
        return
    random.seed(seed)
    with tempfile.TemporaryDirectory(prefix="algpt2-ray-") as folder:
        space = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            make_corpus(space, seed)
        clean = {name: space / f"clean-{i}" for i, name in enumerate(OPTIONS)}
        for name, out in clean.items():
            if any(pack(space, name, out).run(space)):
                raise SystemExit(f"make_tfrecords.py failed on {name} without any fault")
        with two_nodes() as cluster:
            yield same_bytes(space, clean, cluster)
            if not short:
                yield commands_killed(space, clean, cluster)
                yield nodes_killed(space, clean, cluster)
                yield head_killed(space, clean, cluster)


def make_corpus(space: Path, seed: int) -> None:
    """Many small files, which are few that have many names, and an archive of some."""
    make_workspace(space, seed)
    texts = sorted((space / "text").iterdir())
    (space / "many").mkdir()
    for i in range(FILES):
        os.link(texts[i % len(texts)], space / "many" / f"{i:05}.txt")
    with tarfile.open(space / "text.tar.xz", "w:xz", preset=0, dereference=True) as archive:
        for copy in range(2):
            archive.add(space / "text", f"copy-{copy}")
