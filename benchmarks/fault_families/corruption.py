"""Damage to what a run left behind: is it named, and does the run still end with the right bytes?

    python3 benchmarks/faults.py corruption [--short] [--seed 0]

A run of six steps is stopped at step 4 with two complete checkpoints (3 and 4). For each fault the
run's folder and its packed shards are put back, one thing in them is damaged, and the same command
is given again. Two outcomes count as survived:

    used    the run ends with the weights, optimizer state and metrics of a run that nothing
            happened to; what was damaged and left out is named in a warning
    error   one line that names what is wrong, exit code 2, and every complete checkpoint is there

Everything else (a traceback, other bytes at the end, damage that nobody was told of) is lost.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algpt2.errors import UserError, describe
from algpt2.runs.checkpoints import newest_checkpoint

from .harness import ENVIRONMENT, load_script, row

STEPS, STOPPED_AT, NEWEST, OLDER = 6, 4, "checkpoint-00000004", "checkpoint-00000003"
LAST = f"checkpoint-{STEPS:08}"
MARKER, CARD, LOCK = "training_state.json", "README.md", ".lock"
OF_THE_CLOCK = {"elapsed_s", "tokens_per_s", "input_wait"}
WORDS = "the a one model token layer block shared learns reads writes of and in text small".split()
N_FLIPS = 4  # single flipped bits a file
HANG_SECONDS = 300  # a run takes a few


# --- what is damaged -----------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """Text, a tokenizer of 300 entries, a model's config, and packed shards in `folder`."""
    from algpt2 import tokenization_algpt2
    from algpt2.configuration_algpt2 import ALGPT2Config
    from algpt2.options import PackOptions
    from algpt2.shards.packing import pack

    draw = random.Random(0)
    for split, n_files in (("train", 20), ("valid", 4)):
        (folder / "text" / split).mkdir(parents=True)
        for i in range(n_files):
            text = " ".join(draw.choice(WORDS) for _ in range(150))
            (folder / "text" / split / f"{i}.txt").write_text(text)
    texts = [path.read_text() for path in sorted((folder / "text/train").iterdir())]
    tokenizer = tokenization_algpt2.train(texts, vocab_size=300)
    tokenization_algpt2.save(tokenizer, folder / "tokenizer")
    ALGPT2Config(
        vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2, embedding_size=16,
        bos_token_id=299, eos_token_id=299, architectures=["ALGPT2LMHeadModel"],
    ).save_pretrained(folder / "config")  # fmt: skip
    tokenizer = tokenization_algpt2.load_tokenizer(str(folder / "tokenizer"))
    for split, n_shards in (("train", 2), ("valid", 1)):
        paths = (str(folder / "text" / split),), str(folder / split)
        pack(PackOptions(*paths, seq_len=16, workers=1, n_shards=n_shards), tokenizer)


def flags(folder: Path, **changes: Any) -> list[str]:
    """The command of the run in `folder`."""
    options = {
        "config": folder / "config", "tokenizer": folder / "tokenizer", "lr": 1e-2, "device": "cpu",
        "train_path": folder / "train", "val_path": folder / "valid", "save_dir": folder / "run",
        "max_steps": STEPS, "save_steps": 1, "eval_steps": 3, "logging_steps": 1, "wandb": "off",
        "sample_steps": 2, "max_length": 4, "n_samples": 1,
    } | changes  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


class Harness:
    """The run before the fault, and what it has to become.

    Args:
        main: of train_pt.py or train_tf.py.
    """

    def __init__(self, folder: Path, main: Callable[[list[str]], int | None]) -> None:
        self.main, self.folder, self.kept = main, folder / "now", folder / "kept"
        self.folder.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            make_data(self.folder)
            self._train()
            self.expected = final_state(self.folder / "run")
            shutil.rmtree(self.folder / "run")
            while newest_step(self.folder / "run") < STOPPED_AT:
                self._train(max_minutes=1e-9)
        self.folder.rename(self.kept)

    def _train(self, **changes: Any) -> None:
        def hangs(*_: Any) -> None:
            raise RuntimeError(f"it hangs: not ended after {HANG_SECONDS} s")

        signal.signal(signal.SIGALRM, hangs)
        signal.alarm(HANG_SECONDS)
        try:
            self.main(flags(self.folder, **changes))
        finally:
            signal.alarm(0)

    def outcome(self, fault: "Fault", seed: int) -> tuple[bool, str]:
        """Whether a fault is survived, and how; or what is wrong."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.kept, self.folder, symlinks=True)
        fault.apply(self.folder / "run", random.Random(seed))
        before, printed = newest_step(self.folder / "run"), io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                self._train()
        except (UserError, OSError) as error:
            return self._judge_error(fault, describe(error), before)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return False, f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
        return self._judge_end(fault, printed.getvalue())

    def _judge_error(self, fault: "Fault", line: str, before: int) -> tuple[bool, str]:
        if not any(name in line for name in fault.names.split("|")):
            return False, f"an error that does not name {fault.names}: {line}"
        if newest_step(self.folder / "run") < before:
            return False, f"an error, and a checkpoint is gone: {line}"
        if not fault.may_stop:
            return False, f"an error where the run could go on: {line}"
        return True, "error"

    def _judge_end(self, fault: "Fault", printed: str) -> tuple[bool, str]:
        state = final_state(self.folder / "run")
        wrong = [name for name, value in self.expected.items() if state.get(name) != value]
        if wrong:
            is_told = any("warning" in x and wrong[0] in x for x in printed.splitlines())
            if wrong == ["metrics.jsonl"] and is_told:
                return True, "used"  # the curve's file was damaged, and the user knows
            return False, f"other bytes at the end: {', '.join(wrong)}"
        if fault.is_told and not any(
            "warning" in line and fault.names in line for line in printed.splitlines()
        ):
            return False, f"nobody was told of {fault.names}"
        if fault.resumes_at and f"continuing at step {fault.resumes_at}" not in printed:
            return False, f"did not continue at step {fault.resumes_at}"
        return True, "used"


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    with contextlib.suppress(UserError):
        if found := newest_checkpoint(run, lambda message: None):
            return found.step
    return 0


def final_state(run: Path) -> dict[str, Any]:
    """What the end of a run is measured by: bytes where no clock goes in."""
    state = {p.name: p.read_bytes() for p in (run / LAST).glob("*") if p.is_file()}
    state.pop(CARD, None)
    marker = json.loads(state.pop(MARKER, b"{}"))
    state["step"] = [marker.get(key) for key in ("step", "tokens", "data")]
    with contextlib.suppress(OSError, ValueError):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        state["metrics.jsonl"] = [
            {key: value for key, value in line.items() if key not in OF_THE_CLOCK} for line in lines
        ]
    return state


# --- the faults ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One thing that happens to the folder of a run (or to the shards beside it)."""

    family: str
    what: str
    apply: Callable[[Path, random.Random], Any]
    names: str = ""  # what the warning or error has to name, one of A|B
    is_told: bool = False  # going on without a warning would be silence
    may_stop: bool = True  # an error is as good as going on
    resumes_at: int | None = None


Damage = Callable[[Path, random.Random], Any]


def flip(path: Path, draw: random.Random) -> None:
    """One bit at a seeded place."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    """The end is missing."""
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(1, len(data) - 1)])


def append(path: Path, draw: random.Random) -> None:
    """Garbage behind the end."""
    path.write_bytes(path.read_bytes() + draw.randbytes(100))


def garble(path: Path, draw: random.Random) -> None:
    """A block of zeros, as a file system leaves it after a power cut."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(max(1, len(data) - 64))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    path.write_bytes(data)


def replace_by_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "note").write_bytes(draw.randbytes(10))


def replace_by_link(path: Path, draw: random.Random) -> None:
    """The very same content, elsewhere."""
    elsewhere = path.parents[1] / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def replace_by_pipe(path: Path, draw: random.Random) -> None:
    """Reading it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


DAMAGES: dict[str, Damage] = {
    **{f"flipped bit {i + 1}": flip for i in range(N_FLIPS)}, "cut off": cut,
    "garbage behind": append, "zeros inside": garble, "a folder instead": replace_by_folder,
    "a link instead": replace_by_link, "a pipe instead": replace_by_pipe, "empty": empty,
    "missing": remove,
}  # fmt: skip


def all_faults(kept: Path) -> Iterator[Fault]:
    """Every fault, on every file of the run's folder and of its shards."""
    run = kept / "run"
    for path in sorted((run / NEWEST).iterdir()):
        yield from faults_of_newest(path.name)
    for path in sorted((run / OLDER).iterdir()):
        yield from faults_of_older(path.name)
    for name in ("run.json", "metrics.jsonl", "samples.jsonl", LOCK):
        yield from faults_of_run_file(name)
    for folder in ("train", "valid"):
        for path in sorted((kept / folder).iterdir()):
            yield from faults_of_shards(f"{folder}/{path.name}")
    yield from faults_of_folders()
    yield from foreign_things()


def faults_of_newest(name: str) -> Iterator[Fault]:
    """Of a file of the newest checkpoint: named, and the older one is used."""
    listed = name != CARD
    for what, damage in DAMAGES.items():
        yield Fault(
            "newest checkpoint", f"{name}: {what}", on(f"{NEWEST}/{name}", damage), NEWEST,
            # What has the same meaning (a flipped blank of JSON) may pass in silence.
            is_told=listed and name != MARKER, may_stop=False,
            resumes_at=None if name == MARKER else STOPPED_AT - listed,
        )  # fmt: skip

    def swap(run: Path, draw: random.Random) -> None:
        shutil.copyfile(run / OLDER / name, run / NEWEST / name)

    changes = name in ("model.safetensors", "optimizer.safetensors", MARKER)
    yield Fault("swapped files", f"{name} of the older checkpoint", swap, NEWEST, changes, False,
                STOPPED_AT - changes)  # fmt: skip


def faults_of_older(name: str) -> Iterator[Fault]:
    """Of a file of the older checkpoint: the newest is whole and used, nobody reads the other."""
    for what in ("flipped bit 1", "missing", "empty"):
        yield Fault("older checkpoint", f"{name}: {what}", on(f"{OLDER}/{name}", DAMAGES[what]),
                    may_stop=False, resumes_at=STOPPED_AT)  # fmt: skip
    if name != CARD:

        def both(run: Path, draw: random.Random) -> None:
            flip(run / NEWEST / "config.json", draw)
            remove(run / OLDER / name, draw)

        yield Fault("both checkpoints", f"{name} missing, the newer damaged", both, "run")


def faults_of_run_file(name: str) -> Iterator[Fault]:
    damages = {what: DAMAGES[what] for what in DAMAGES if name != LOCK or "instead" in what}
    for what, damage in damages.items():
        yield Fault("files of the run", f"{name}: {what}", on(name, damage), name)


def faults_of_shards(name: str) -> Iterator[Fault]:
    for what, damage in DAMAGES.items():
        # A folder whose manifest is gone is taken for text, and that is another run.
        names = name if "tfrecord" in name else f"{name.partition('/')[0]}|another run"
        yield Fault("packed shards", f"{name}: {what}", on(f"../{name}", damage), names)
    if name == "train/0.tfrecord":

        def swap(run: Path, draw: random.Random) -> None:
            a, b = run.parent / name, run.parent / "train/1.tfrecord"
            a.rename(run / "held")
            b.rename(a)
            (run / "held").rename(b)

        yield Fault("packed shards", "two shards swapped", swap, "train_records")
    if name.endswith("manifest.json"):

        def other(run: Path, draw: random.Random) -> None:
            there = {"train": "valid", "valid": "train"}[name.partition("/")[0]]
            shutil.copyfile(run.parent / there / "manifest.json", run.parent / name)

        yield Fault("packed shards", f"{name} of the other set", other)


def faults_of_folders() -> Iterator[Fault]:
    """Of whole folders: half-written, deleted, renamed."""

    def half(run: Path, draw: random.Random) -> None:
        folder = run / ".checkpoint-00000005.partial"
        shutil.copytree(run / NEWEST, folder)
        (folder / MARKER).unlink()
        cut(folder / "model.safetensors", draw)

    def half_named(run: Path, draw: random.Random) -> None:
        half(run, draw)
        (run / ".checkpoint-00000005.partial").rename(run / "checkpoint-00000005")

    def swap(run: Path, draw: random.Random) -> None:
        (run / NEWEST).rename(run / "held")
        (run / OLDER).rename(run / NEWEST)
        (run / "held").rename(run / OLDER)

    def delete_all(run: Path, draw: random.Random) -> None:
        for name in (NEWEST, OLDER):
            shutil.rmtree(run / name)

    def delete(run: Path, draw: random.Random) -> None:
        shutil.rmtree(run / NEWEST)

    family, told = "folders", True
    yield Fault(family, "half-written, hidden", half, may_stop=False, resumes_at=4)
    yield Fault(family, "half-written, named", half_named, "checkpoint-00000005", told, False, 4)
    yield Fault(family, "newest deleted", delete, may_stop=False, resumes_at=3)
    yield Fault(family, "all deleted", delete_all, "metrics.jsonl", told)
    yield Fault(family, "names swapped", swap, "no complete checkpoint")
    for n in range(1, 12):

        def lose(run: Path, draw: random.Random, n: int = n) -> None:
            for path in draw.sample(sorted((run / NEWEST).glob("[!R]*")), n):
                path.unlink()

        yield Fault(family, f"{n} files of the newest lost", lose, NEWEST, told, False, 3)


def foreign_things() -> Iterator[Fault]:
    """What somebody else put into save_dir."""
    for step in (2, 5, 6, 99):
        name = f"checkpoint-{step:08}"
        for what, make in FOREIGN.items():
            is_free = what == "a file" or step == 99
            yield Fault("foreign", f"{name} is {what}", at(name, make), name,
                        is_told=is_free and step > STOPPED_AT)  # fmt: skip
    for name in (".checkpoint-00000005.partial", ".run.json.partial", ".metrics.jsonl.partial"):
        for what, make in FOREIGN.items():
            yield Fault("foreign", f"{name} is {what}", at(name, make), "run")
    for name in OTHER_NAMES:
        for what in ("a file", "an empty folder"):
            make = at(name, FOREIGN[what])
            yield Fault("foreign", f"{name[:24]!r} is {what}", make, "checkpoint")
    for name in ("pytorch_model.bin", "adapter_config.json", "model.safetensors.index.json",
                 "tf_model.h5", "generation_config.json.bak", "vocab.txt"):  # fmt: skip
        yield Fault("foreign", f"{name} in the newest", at(f"{NEWEST}/{name}", FOREIGN["a file"]),
                    may_stop=False, resumes_at=STOPPED_AT)  # fmt: skip


def _copy_of_newest(path: Path, draw: random.Random) -> None:
    shutil.copytree(path.parent / NEWEST, path)


def _link_elsewhere(path: Path, draw: random.Random) -> None:
    elsewhere = path.parents[1] / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    path.symlink_to(elsewhere)


OTHER_NAMES = (
    "notes.txt", "checkpoint-4", "checkpoint-00000004.bak", "model.safetensors", "x" * 255,
    "line\nend", "caf\udce9", "checkpoint-000000000004", "checkpoint-\u0660" + "\u0660" * 7,
)  # fmt: skip
FOREIGN: dict[str, Damage] = {
    "a file": lambda path, draw: path.write_bytes(draw.randbytes(100)),
    "an empty folder": lambda path, draw: path.mkdir(),
    "a copy of the newest": _copy_of_newest,
    "a link to a folder": _link_elsewhere,
}


def on(name: str, damage: Damage) -> Callable[[Path, random.Random], Any]:
    """`damage` on a file of the run."""
    return lambda run, draw: damage(run / name, draw)


at = on


# --- the report ----------------------------------------------------------------------------------


def run(short: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Every fault (short: one of twelve) in PyTorch, one of forty in TensorFlow; a row a family."""
    rows = run_framework("pt", 12 if short else 1, seed)
    if not short:  # the two frameworks do not share a process
        os.environ |= ENVIRONMENT
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows += pool.submit(run_framework, "tf", 40, seed).result()
    return rows


def run_framework(framework: str, every: int, seed: int) -> list[dict[str, Any]]:
    """Each `every`-th fault with train_pt.py or train_tf.py."""
    script = load_script(f"train_{framework}")
    outcomes: dict[str, list[tuple[Fault, bool, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), script.main)
        for i, fault in enumerate(all_faults(harness.kept)):
            if (i + seed) % every == 0:
                outcome = (fault, *harness.outcome(fault, seed + i))
                outcomes.setdefault(fault.family, []).append(outcome)
    return [_row(f"{name}, train_{framework}.py", found) for name, found in outcomes.items()]


def _row(what: str, outcomes: list[tuple[Fault, bool, str]]) -> dict[str, Any]:
    lost = [f"{fault.what}: {how}" for fault, survived, how in outcomes if not survived]
    counts = Counter(how for _, _, how in outcomes)
    note = f"{counts['used']} ended with the same bytes, {counts['error']} one clear line"
    return row("corruption", what, len(outcomes), len(lost), "; ".join(lost) or note)
