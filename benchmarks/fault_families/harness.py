"""What the fault families share: a small corpus, commands, kills, and when two runs are equal."""

import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from algpt2 import ALGPT2Config

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"elapsed_s", "tokens_per_s", "input_wait", "peak_memory_gb"}  # differ from run to run
POLL_S = 0.005
LIMIT_S = 300  # no step of a trial takes as long


def row(family: str, what: str, injected: int, lost: int, note: str) -> dict[str, Any]:
    """One line of the table; `injected` and `lost` count faults."""
    return {
        "family": family, "what": what, "injected": injected, "survived": injected - lost,
        "lost": lost, "note": note,
    }  # fmt: skip


def result(
    family: str, what: str, injected: int, lost: list[str], note: str = ""
) -> dict[str, Any]:
    """One line of the table; `lost` has one message for each fault that was not survived."""
    note = "; ".join([*filter(None, [note]), *lost[:3]])
    return row(family, what, injected, len(lost), note)


@dataclass
class Command:
    """One process or several, each a session of its own, with their output in files."""

    args: Sequence[str]
    environments: Sequence[dict[str, str]] = ({},)
    processes: list[subprocess.Popen] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)

    def start(self, folder: Path) -> None:
        """Start all processes; their output goes to `folder`."""
        self.processes, self.outputs = [], []
        for i, environment in enumerate(self.environments):
            self.outputs.append(folder / f"output-{i}.txt")
            with self.outputs[-1].open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, *self.args], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
                    env=os.environ | ENVIRONMENT | environment, start_new_session=True,
                )  # fmt: skip
            self.processes.append(process)

    def is_running(self) -> bool:
        """Whether every process still runs."""
        return all(process.poll() is None for process in self.processes)

    def signal(self, number: int) -> None:
        """Send a signal to every process and what it has started."""
        for process in self.processes:
            # torchrun's processes are no group of its own: killed, it leaves them at work.
            apart = children(process.pid) if number == signal.SIGKILL else []
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            for pid in apart:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait(self) -> list[int]:
        """Exit codes of all processes."""
        return [process.wait(LIMIT_S) for process in self.processes]

    def run(self, folder: Path) -> list[int]:
        """Start and wait."""
        self.start(folder)
        return self.wait()

    def output(self) -> str:
        """What all processes have written."""
        return "\n".join(path.read_text(errors="replace") for path in self.outputs)


def children(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    try:
        pids = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return pids + [other for child in pids for other in children(child)]


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3",
    "WANDB_MODE": "disabled",
}  # fmt: skip


def workers_of(n: int) -> list[dict[str, str]]:
    """The TF_CONFIG of `n` processes on free ports of this machine."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return [
        {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses},
                                  "task": {"type": "worker", "index": i}})}
        for i in range(n)
    ]  # fmt: skip


def load_script(name: str) -> ModuleType:
    """A script of the root, by its path: benchmarks/train_pt.py would hide it from an import."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_workspace(folder: Path, seed: int) -> None:
    """In `folder`: text/, a tokenizer, shards/ of 16 tokens a row, a config of 20,000 weights."""
    from algpt2 import tokenization_algpt2
    from algpt2.corpus.documents import documents

    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(200)]
    (folder / "text").mkdir(parents=True)
    for i in range(400):
        text = " ".join(draw.choices(words, k=300))
        (folder / "text" / f"{i:04}.txt").write_text(text)
    tokenizer = tokenization_algpt2.train(documents(str(folder / "text")), vocab_size=300)
    tokenization_algpt2.save(tokenizer, folder / "tokenizer")
    pack_text(folder, "shards", 4000)
    ALGPT2Config(
        vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2, embedding_size=16,
        bos_token_id=299, eos_token_id=299, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        architectures=["ALGPT2LMHeadModel"],
    ).save_pretrained(folder / "config")  # fmt: skip


def pack_text(folder: Path, name: str, n_rows: int) -> None:
    """So many rows of the text of a workspace, in shards."""
    import make_tfrecords

    make_tfrecords.main([
        f"--path={folder / 'text'}", f"--save_path={folder / name}", "--seq_len=16",
        f"--tokenizer={folder / 'tokenizer'}", "--n_shards=4", f"--n_examples={n_rows}",
    ])  # fmt: skip


def trainer(script: str, folder: Path, run: Path, **changes: Any) -> list[str]:
    """The command line of a run of `script` into `run`: a checkpoint every 50 steps."""
    flags = {
        "train_path": folder / "shards", "val_path": folder / "shards", "lr": 1e-3,
        "tokenizer": folder / "tokenizer", "save_dir": run, "batch_size": 4, "device": "cpu",
        "warmup_steps": 2, "wandb": "off",
    }  # fmt: skip
    if script == "train_tfrecords.py":
        flags |= {"config_path": folder / "config", "save_batches": 50, "log_batches": 1,
                  "eval_batches": 10**6, "steps_per_call": 1}  # fmt: skip
    else:
        flags |= {"config": folder / "config", "save_steps": 50, "logging_steps": 1,
                  "eval_steps": 10**6, "from_scratch": True}  # fmt: skip
    flags |= changes
    return [script, *(f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items())]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what measures time."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(s).items() if k not in TIMES} for s in lines]


def difference(run: Path, clean: Path) -> str | None:
    """What differs in two finished runs: metrics, weights, optimizer state; None if nothing."""
    if metrics(run) != metrics(clean):
        return "metrics.jsonl differs"
    steps = [line["step"] for line in metrics(run)]
    if steps != sorted(set(steps)):
        return "a step is twice in metrics.jsonl"
    newest = max(path.name for path in clean.glob("checkpoint-*"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        if (run / newest / name).read_bytes() != (clean / newest / name).read_bytes():
            return f"{newest}/{name} differs"
    return None


def folder_difference(run: Path, clean: Path) -> str | None:
    """What differs in two folders of files."""
    names = [sorted(p.name for p in folder.iterdir()) for folder in (run, clean)]
    if names[0] != names[1]:
        return f"files {names[0]} instead of {names[1]}"
    different = [n for n in names[1] if (run / n).read_bytes() != (clean / n).read_bytes()]
    return f"{', '.join(different)} differ" if different else None


def lines_of(run: Path) -> int:
    """Lines of metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition: Callable[[], bool], command: Command) -> bool:
    """Wait for a condition; False if the command ended before."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if not command.is_running() or time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def wait_for_lines(run: Path, n: int, command: Command) -> bool:
    """Wait until metrics.jsonl has so many lines."""
    return wait_for(lambda: lines_of(run) >= n, command)


def kill_often(
    command: Command, run: Path, n_kills: int, draw: random.Random, *, seconds: float
) -> tuple[int, int, list[str]]:
    """Kill a trainer `n_kills` times at random moments, starting it again each time.

    Every third kill waits for a checkpoint that is being written; one in ten hits the start-up; the
    others come up to `seconds` after a step that had not been taken before. Returns kills, those
    that left a half-written checkpoint, and what went wrong.
    """
    kills, half_written = 0, 0
    while kills < n_kills:
        before = lines_of(run)
        command.start(run.parent)
        if draw.random() < 0.1:
            time.sleep(draw.uniform(0, 4))
        elif not wait_for_lines(run, before + 1, command):
            break
        elif draw.random() < 0.33:
            wait_for(lambda: any(run.glob(".checkpoint-*.partial")), command)
            time.sleep(draw.uniform(0, 0.01))
        else:
            time.sleep(draw.uniform(0, seconds))
        if not command.is_running():
            break
        command.signal(signal.SIGKILL)
        command.wait()
        kills += 1
        half_written += any(run.glob(".checkpoint-*.partial"))
    else:
        command.start(run.parent)
    codes = command.wait()
    wrong = [] if not any(codes) else [f"exit codes {codes}: {command.output()[-300:]}"]
    return kills, half_written, wrong
