"""Kills, signals, other process counts, full and read-only disks: a run ends as if nothing was.

    python3 benchmarks/faults.py kills signals processes disks [--short]

Each trial runs a command to its end once, then again with faults; weights, optimizer state and
metrics (but for times) have to be equal byte for byte.
"""

import contextlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .harness import (
    Command,
    difference,
    folder_difference,
    kill_often,
    lines_of,
    make_workspace,
    metrics,
    pack_text,
    result,
    trainer,
    wait_for,
    wait_for_lines,
    workers_of,
)

STOPPED = 75
ROWS = 4000  # of the workspace's shards
# script, processes, steps of a run, kills of a run, runs, seconds within which a kill falls
KILLS = [
    ("train_pt.py", 1, 2400, 10, 5, 0.8),
    ("train_tf.py", 1, 1500, 7, 3, 1.5),
    ("train_tfrecords.py", 2, 1200, 7, 3, 1.5),
]


def kills(space: Path, short: bool, seed: int) -> Iterator[dict]:
    """SIGKILL at random moments."""
    for script, n, steps, per_run, runs, seconds in KILLS[:1] if short else KILLS:
        optimizers = ["AdamW", "Muon", "Adafactor", "SGD", "AdamW"]
        lost, total, half = [], 0, 0
        for i in range(1 if short else runs):
            draw = random.Random(seed + i)
            steps, per_run = (1200, 3) if short else (steps, per_run)
            changes = {"max_steps": steps, "optimizer": optimizers[i], "seed": seed + i}
            clean, run = space / f"clean-{script}-{i}", space / f"killed-{script}-{i}"
            environments = workers_of(n) if n > 1 else [{}]
            codes = Command(trainer(script, space, clean, **changes), environments).run(space)
            if any(codes):
                raise SystemExit(f"{script} without any fault: exit codes {codes}")
            command = Command(trainer(script, space, run, **changes), environments)
            count, unfinished, wrong = kill_often(command, run, per_run, draw, seconds=seconds)
            total, half = total + count, half + unfinished
            wrong = wrong or [*filter(None, [difference(run, clean)])]
            lost += [f"run {i}: {message}" for message in wrong] * count
        what = script + (f", {n} workers" if n > 1 else "")
        epochs = f"{steps * 4 / ROWS:.1f} epochs"
        note = f"{epochs} a run; {half} kills in a checkpoint's write"
        yield result("SIGKILL", what, total, lost, note)
    yield packing_kills(space, 4 if short else 24, seed)


def packing_kills(space: Path, n_kills: int, seed: int) -> dict:
    """SIGKILL of make_tfrecords.py with two workers."""
    draw, total, lost, n = random.Random(seed), 0, [], 0
    text = space / "more-text"
    text.mkdir()
    sources = sorted((space / "text").iterdir())
    for i in range(12_000):
        os.link(sources[i % len(sources)], text / f"{i:05}.txt")

    def command(out: Path) -> Command:
        return Command(["make_tfrecords.py", f"--path={text}", f"--save_path={out}", "--dedup",
                        "--seq_len=64", f"--tokenizer={space / 'tokenizer'}", "--n_shards=8",
                        "--valid_fraction=0.1", "--workers=2"])  # fmt: skip

    clean = space / "packed-clean"
    start = time.monotonic()
    if any(command(clean).run(space)):
        raise SystemExit("make_tfrecords.py failed without any fault")
    seconds = time.monotonic() - start
    while total < n_kills:
        out, killed = space / f"packed-{n}", 0
        n += 1
        while True:
            process = command(out)
            process.start(space)
            if killed < 4 and not _ended(process, draw.uniform(0.2, 0.9) * seconds):
                process.signal(signal.SIGKILL)
                process.wait()
                killed += 1
                continue
            codes = process.wait()
            break
        wrong = [f"exit codes {codes}"] if any(codes) else []
        for split in ("train", "valid"):
            wrong = wrong or [*filter(None, [folder_difference(out / split, clean / split)])]
        lost, total = lost + wrong[:1] * killed, total + killed
        shutil.rmtree(out)
    return result("SIGKILL", "make_tfrecords.py, 2 workers", total, lost)


def _ended(command: Command, seconds: float) -> bool:
    """Whether the command ends within so many seconds."""
    try:
        command.processes[0].wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def signals(space: Path, short: bool, seed: int) -> Iterator[dict]:
    """SIGTERM and SIGINT save and stop, in an evaluation too; a second one exits at once."""
    with contextlib.redirect_stdout(io.StringIO()):
        pack_text(space, "val", 1200)
    several = ("train_pt.py", 1), ("train_tf.py", 1), ("train_tfrecords.py", 2)
    for script, n in several[:1] if short else several:
        steps, draw = 400, random.Random(seed)
        every = "eval_batches" if script == "train_tfrecords.py" else "eval_steps"
        changes = {"max_steps": steps, every: 100, "val_path": space / "val"}
        clean, run = space / f"signal-clean-{script}", space / f"signal-{script}"
        environments = workers_of(n) if n > 1 else [{}]
        if any(Command(trainer(script, space, clean, **changes), environments).run(space)):
            raise SystemExit(f"{script} failed without any fault")
        lost, sent, slowest, cut = [], 0, 0.0, 0
        command = Command(trainer(script, space, run, **changes), environments)
        for trial in range(4 if short else 12):
            number, twice = (signal.SIGTERM, signal.SIGINT)[trial % 2], trial % 4 == 3
            seconds, wrong = _stop(command, run, number, twice, trial % 3 > 0, draw)
            slowest, sent = max(slowest, seconds), sent + 1 + twice
            lost += [f"signal {number}: {wrong}"] if wrong else []
            cut += "evaluation (or sample) is cut" in command.output()
        if slowest > 10:
            lost.append(f"it took {slowest:.1f} s to stop")
        wrong = any(command.run(space)) or difference(run, clean)
        lost += [f"afterwards: {wrong}"] if wrong else []
        note = f"stopped within {slowest:.1f} s; {cut} in an evaluation"
        yield result("SIGTERM, SIGINT", script, sent, lost, note)


def _stop(
    command: Command, run: Path, number: int, twice: bool, in_evaluation: bool, draw: random.Random
) -> tuple[float, str | None]:
    """Start the command, send a signal to one of its processes as it trains or, if that is next,
    evaluates; seconds until the end, and what was wrong."""
    before = lines_of(run)
    is_cut = before % 100 == 99  # the start begins with the evaluation
    goal = (before // 100 + 1) * 100 - 1 if in_evaluation else before + 1
    command.start(run.parent)

    def is_time() -> bool:
        return lines_of(run) >= goal and (not is_cut or "continuing at" in command.output())

    if not wait_for(is_time, command):
        return 0.0, f"ended by itself: {command.output()[-200:]}"
    time.sleep(draw.uniform(0, 0.2))
    for _ in range(1 + twice):
        draw.choice(command.processes).send_signal(number)
    start = time.monotonic()
    codes = command.wait()
    seconds = time.monotonic() - start
    # The second signal may come when the run has stopped already because of the first.
    expected = (STOPPED, 128 + number) if twice else (STOPPED,)
    if any(code not in expected for code in codes):
        return seconds, f"exit codes {codes}: {command.output()[-200:]}"
    if codes[0] == STOPPED and not re.search(f"stopped (at step .*{run}|by SIG)", command.output()):
        return seconds, f"it says {command.output()[-200:]!r}"
    return seconds, None


def processes(space: Path, short: bool, seed: int) -> Iterator[dict]:
    """A run continued on 1, 2 and 4 processes has the losses of one process."""
    if short:
        return
    counts, steps = [1, 2, 4, 1], 240
    for script in ("train_pt.py", "train_tfrecords.py"):
        clean, run = space / f"counts-clean-{script}", space / f"counts-{script}"
        if any(Command(trainer(script, space, clean, max_steps=steps)).run(space)):
            raise SystemExit(f"{script} failed without any fault")
        lost = []
        for i, count in enumerate(counts):
            args = trainer(script, space, run, max_steps=steps)
            if script == "train_pt.py" and count > 1:
                args = ["-m", "torch.distributed.run", "--standalone",
                        f"--nproc_per_node={count}", *args]  # fmt: skip
            several = script != "train_pt.py" and count > 1
            command = Command(args, workers_of(count) if several else [{}])
            command.start(space)
            goal = steps * (i + 1) // len(counts)
            if i < len(counts) - 1:
                wait_for_lines(run, goal, command)
                command.signal(signal.SIGKILL)
                command.wait()
            elif any(command.wait()):
                lost.append(f"on {count}: {command.output()[-300:]}")
        pairs = list(zip(metrics(run), metrics(clean), strict=False))
        worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)
        if len(pairs) < steps or worst > 1e-5 or any(a["tokens"] != b["tokens"] for a, b in pairs):
            lost.append(f"{len(pairs)} steps, losses differ by {worst:.1e}")
        note = f"largest difference of a loss {worst:.0e}"
        yield result("1, 2, 4, 1 processes", script, len(counts) - 1, lost, note)


def disks(space: Path, short: bool, seed: int) -> Iterator[dict]:
    """A small file system that fills up or becomes read-only, and has space again."""
    if os.geteuid() or short:
        return

    def pack(run: Path) -> list[str]:
        return ["make_tfrecords.py", f"--path={space / 'text'}", f"--save_path={run}",
                "--seq_len=64", f"--tokenizer={space / 'tokenizer'}", "--n_shards=2"]  # fmt: skip

    def train(script: str) -> Callable[[Path], list[str]]:
        return lambda run: trainer(script, space, run, max_steps=1000, keep_last=5)

    commands = {"train_pt.py": train("train_pt.py"), "train_tf.py": train("train_tf.py"),
                "make_tfrecords.py": pack}  # fmt: skip
    for script, args in commands.items():
        compare = folder_difference if args is pack else difference
        clean = space / f"disk-clean-{script}"
        if any(Command(args(clean)).run(space)):
            raise SystemExit(f"{script} failed without any fault")
        lost, injected = [], 0
        for size in ("100k", "600k", "read-only"):
            mount = space / f"disk-{script}-{size}"
            mount.mkdir()
            first = "16m" if size == "read-only" else size
            _mount("-t", "tmpfs", "-o", f"size={first}", "tmpfs", str(mount))
            try:
                problem = _fill_up(Command(args(mount / "run")), mount, size)
                problem = problem or compare(mount / "run", clean)
            finally:
                subprocess.run(["umount", "-l", str(mount)], check=True)
            injected, lost = injected + 1, lost + ([f"{size}: {problem}"] if problem else [])
        yield result("full, read-only disk", script, injected, lost)


def _fill_up(command: Command, mount: Path, size: str) -> str | None:
    """Run on the small disk, then give it space; what went wrong, or None."""
    command.start(mount.parent)
    if size == "read-only":
        wait_for(lambda: any((mount / "run").glob("[!.]*")), command)
        for _ in range(200):  # busy while a file is open for writing
            if not subprocess.run(["mount", "-o", "remount,ro", str(mount)],
                                  capture_output=True).returncode:  # fmt: skip
                break
            time.sleep(0.01)
    code = command.wait()[0]
    output = command.output()
    if size == "read-only" and code == 0:
        return None  # it had done already
    if code != 2 or "Traceback" in output:
        return f"exit code {code}: {output[-300:]}"
    _mount("-o", "remount,rw,size=64m", str(mount))
    code = command.run(mount.parent)[0]
    return f"with space, exit code {code}: {command.output()[-300:]}" if code else None


def _mount(*args: str) -> None:
    subprocess.run(["mount", *args], check=True)


FAMILIES = {"kills": kills, "signals": signals, "processes": processes, "disks": disks}


def run(short: bool, seed: int, name: str) -> Iterator[dict]:
    """The lines of the table of the family `name`, one after the other."""
    with tempfile.TemporaryDirectory(prefix="algpt2-faults-") as folder:
        space = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            make_workspace(space, seed)
        yield from FAMILIES[name](space, short, seed)
