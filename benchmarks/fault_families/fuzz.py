"""Hostile input: every reader gets mutated files and arguments; only success or one clear line.

    python3 benchmarks/faults.py fuzz [--short] [--seed 0]
    python3 benchmarks/faults.py --reproduce READER:N          # the traceback of one input

Whatever bytes a file holds, a reader either reads it or raises `UserError` (exit code 2; an
`OSError` of the operating system is one too). Any other exception, a file opened with pickle, a
second that passes in one input, or memory taken for a size that a file only claims, is lost.

Mutations are seeded: flipped bits, cuts, inserted and repeated bytes; and, of JSON, other types,
huge numbers, NaN, deep nesting, lone surrogates, missing and doubled keys.
"""

import contextlib
import copy
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import tarfile
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from algpt2.errors import UserError
from algpt2.runs.checkpoints import STATE_FILE

from .corruption import flags, make_data
from .harness import load_script, row

LIMIT_S = 10  # an input that takes longer hangs
LIMIT_BYTES = 1 << 30  # of peak memory more than before, over all inputs
SHORT = 40  # one of so many inputs
FAMILY = "hostile input"  # of the table

Read = Callable[[], Any]


# --- mutations -----------------------------------------------------------------------------------


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to four small changes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed) + 1)
        kind = draw.randrange(6)
        if kind <= 1 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            changed[at:at] = draw.choice(INSERTED)
        elif kind == 4:
            del changed[at : at + draw.randrange(1, 9)]
        else:
            changed[at:at] = changed[: draw.randrange(1, 200)]
    return bytes(changed)


INSERTED = (
    b"\0", b"\xff" * 8, b"9" * 30, b"-", b"1e999", b"NaN", b'"', b"{", b"[" * 2000, b"\xed\xa0\x80",
    b"\\ud800", b"\n", b"\r\n\r\n", b"null", b"\x80" * 10, b"9" * 5000, struct.pack("<Q", 2**60),
)  # fmt: skip


def strange_values(draw: random.Random) -> Any:
    """A value that no writer of ours would write."""
    nested: Any = []
    for _ in range(draw.choice((10, 500))):
        nested = [nested]
    return draw.choice((
        None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 2**64, 10**9, 10**12, 10**15, 10**400,
        -(10**400), 0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), "", "x", "\ud800",
        "\0", "../../etc/passwd", "/etc/passwd", "x" * 10_000, [], {}, [[]], {"": {}}, [None],
        ["\ud800"], {"a": 1}, [1, 2, 3], nested, "1", "NaN", "[]",
    ))  # fmt: skip


def mutate_json(value: Any, draw: random.Random) -> Any:
    """One to three changes of structure, or of a value somewhere inside."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places = [*_places(value)]
        if not places or draw.random() < 0.02:
            return strange_values(draw)
        holder, key = draw.choice(places)
        kind = draw.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice(("", "\ud800", "x" * 1000, f"{key} ", "__class__"))] = holder[key]
        elif kind == 2:
            holder[key] = [holder[key]]
        elif kind == 3 and isinstance(holder, list):
            holder.extend(holder[:100])
        elif kind == 4 and type(holder[key]) in (int, float):
            holder[key] = draw.choice((-holder[key], holder[key] + 1, holder[key] * 10**9))
        else:
            holder[key] = strange_values(draw)
    return value


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in [*keys][:300]:
        yield value, key
        if isinstance(value[key], dict | list) and depth < 6:
            yield from _places(value[key], depth + 1)


def mutate_json_text(text: bytes, draw: random.Random, sign: bool = False) -> bytes:
    """Bytes or structure; with `sign`, the checksum is made to fit, as an attacker would."""
    if draw.random() < 0.3:
        return mutate_bytes(text, draw)
    value = mutate_json(json.loads(text), draw)
    if sign and isinstance(value, dict) and draw.random() < 0.9:
        from algpt2.system.files import content_sha256

        value.pop("sha256", None)
        with contextlib.suppress(ValueError):
            value["sha256"] = content_sha256(json.loads(json.dumps(value)))
    return json.dumps(value).encode()


# --- the readers ---------------------------------------------------------------------------------


class Fuzzer:
    """A folder with sound input of every kind, and the readers that get it mutated.

    Each key of `counts`, the inputs a reader gets, is a method: it mutates something with the given
    `Random` and returns what reads it.
    """

    counts: ClassVar[dict[str, int]] = {
        "record": 2000, "manifest": 3000, "config": 3000, "training_state": 2500, "run_json": 1500,
        "metrics": 1500, "safetensors": 1500, "optimizer": 400, "tokenizer": 2500, "jsonl": 1500,
        "gz": 600, "zip": 1200, "tar": 1500, "packing": 400, "options": 1600, "evaluation": 600,
        "commands": 60,
    }  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder, self.changed = folder, set[Path]()
        os.environ["ALGPT2_CACHE"] = str(folder / "cache")
        make_data(folder)
        from algpt2.tokenization_algpt2 import load_tokenizer

        self.train = load_script("train_pt").main
        with _own_signals():
            self.train(flags(folder, max_steps=1))
        self.checkpoint = folder / "run/checkpoint-00000001"
        self.sound_tokenizer = load_tokenizer(str(folder / "tokenizer"))
        self.tokenizer_files = [
            path for path in (folder / "tokenizer").iterdir() if not path.name.startswith(".")
        ]
        self.files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self._make_archives()

    def restore(self) -> None:
        """Every file that was mutated as it was."""
        for path in self.changed:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[path])
        self.changed.clear()

    def put(self, path: Path, data: bytes) -> None:
        self.changed.add(path)
        path.write_bytes(data)

    def mutate(self, path: Path, draw: random.Random, sign: bool = False) -> None:
        """A JSON file mutated."""
        self.put(path, mutate_json_text(self.files[path], draw, sign))

    def _make_archives(self) -> None:
        lines = [
            {"text": f"line {i} of the text", "n": i, "x": [None, {"y": 1.5}]} for i in range(9)
        ]
        jsonl = "".join(json.dumps(line) + "\n" for line in lines).encode()
        folder = self.folder / "archives"
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(jsonl)
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(jsonl))
        (folder / "a.txt.gz").write_bytes(gzip.compress(b"words of a text\n" * 50))
        with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", "words of a text\n" * 50)
            archive.writestr("b.jsonl", jsonl)
        for name in ("a.tar", "a.tar.gz", "a.tar.xz"):
            with tarfile.open(folder / name, f"w:{name[6:]}", format=tarfile.PAX_FORMAT) as archive:
                for i, content in enumerate((b"words of a text\n" * 50, jsonl, b"")):
                    member = tarfile.TarInfo(("a.txt", "b.jsonl", "long" * 40 + ".txt")[i])
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        self.files |= {path: path.read_bytes() for path in folder.iterdir()}

    # What training reads.

    def record(self, draw: random.Random) -> Read:
        from algpt2.shards.tfrecords import open_rows, verify

        path = self.folder / "train/0.tfrecord"
        data = bytearray(self.files[path])
        if draw.random() < 0.8:  # the size stays: what open_rows looks at
            for _ in range(draw.randint(1, 5)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        else:
            data = bytearray(mutate_bytes(bytes(data), draw))
        self.put(path, bytes(data))
        is_changed = data != self.files[path]

        def read() -> None:
            if draw.random() < 0.2:
                assert bool(verify(self.folder / "train")[1]) == is_changed, "damage not found"
                return
            rows = open_rows(self.folder / "train")
            rows.probe()
            rows[list(range(len(rows)))]
            assert not is_changed, "damage not found"

        return read

    def manifest(self, draw: random.Random) -> Read:
        from algpt2.shards.tfrecords import open_rows, verify

        self.mutate(self.folder / "train/manifest.json", draw, sign=True)

        def read() -> None:
            rows = open_rows(self.folder / "train")
            rows.probe()
            rows[0]
            verify(self.folder / "train")

        return read

    def config(self, draw: random.Random) -> Read:
        from algpt2.options import DataOptions, ModelOptions
        from algpt2.runs.start import Start, choose_seq_len, choose_tokenizer
        from algpt2.training.trainer_pt import build_model

        self.mutate(self.folder / "config/config.json", draw)
        options = ModelOptions(config=str(self.folder / "config"))
        data = DataOptions(tokenizer=str(self.folder / "tokenizer"))

        def read() -> None:
            start = Start.find(options)
            choose_tokenizer(start, data)
            choose_seq_len(start, DataOptions())
            start.config()
            build_model(replace(start, tokenizer=self.sound_tokenizer, seq_len=16))

        return read

    def training_state(self, draw: random.Random) -> Read:
        from algpt2.runs.checkpoints import newest_checkpoint

        self.mutate(self.checkpoint / STATE_FILE, draw, sign=True)

        def read() -> None:
            if (found := newest_checkpoint(self.folder / "run", lambda message: None)) is not None:
                self._resume(found)

        return read

    def run_json(self, draw: random.Random) -> Read:
        from algpt2.export import model_card
        from algpt2.runs.run import open_run

        run = self.folder / "run"
        self.mutate(run / "run.json", draw, sign=True)
        now = json.loads(self.files[run / "run.json"])

        def read() -> None:
            opened = open_run(run, now, overwrite=False)
            json.dumps(opened)
            model_card.write_card(self.checkpoint, run, 1)

        return read

    def metrics(self, draw: random.Random) -> Read:
        import plot_runs
        from algpt2.export import model_card
        from algpt2.runs.report import _keep_lines_until, log_before_and_after

        run = self.folder / "run"
        lines = self.files[run / "metrics.jsonl"].splitlines()
        lines[-1] = mutate_json_text(lines[-1], draw)
        self.put(run / "metrics.jsonl", b"\n".join(lines) + b"\n" * draw.randrange(2))

        def read() -> None:
            model_card.write_card(self.checkpoint, run, 1)
            log_before_and_after({"before": {}}, run)
            plot_runs.draw({"run": plot_runs.read_run(run)}, "tokens", 10)
            _keep_lines_until(run / "metrics.jsonl", 1 - (draw.random() < 0.5), 1)

        return read

    def safetensors(self, draw: random.Random) -> Read:
        from algpt2.options import ModelOptions
        from algpt2.runs.start import Start
        from algpt2.training.trainer_pt import build_model

        folder = self.folder / "weights"
        if not folder.exists():
            shutil.copytree(self.checkpoint, folder)
            (folder / STATE_FILE).unlink()
            self.files |= {path: path.read_bytes() for path in folder.iterdir()}
        self.put(
            folder / "model.safetensors", self._other_tensors(folder / "model.safetensors", draw)
        )
        options = ModelOptions(checkpoint=str(folder))
        parts = {"tokenizer": self.sound_tokenizer, "seq_len": 16}
        return lambda: build_model(replace(Start.find(options), **parts))

    def optimizer(self, draw: random.Random) -> Read:
        from algpt2.runs.checkpoints import read_checkpoint
        from algpt2.system.files import CHECKSUM, describe_file, write_record

        path, marker = self.checkpoint / "optimizer.safetensors", self.checkpoint / STATE_FILE
        self.put(path, self._other_tensors(path, draw))
        state = json.loads(self.files[marker])
        state["files"][path.name] = dict(zip(("bytes", "sha256"), describe_file(path), strict=True))
        state.pop(CHECKSUM)
        write_record(marker, state)
        self.changed.add(marker)
        return lambda: self._resume(read_checkpoint(self.checkpoint))

    def _other_tensors(self, path: Path, draw: random.Random) -> bytes:
        data = self.files[path]
        size = struct.unpack("<Q", data[:8])[0]
        if draw.random() < 0.3:
            return mutate_bytes(data[: 8 + size], draw) + data[8 + size :]
        header = json.dumps(mutate_json(json.loads(data[8 : 8 + size]), draw)).encode()
        claimed = draw.choice((*[len(header)] * 12, 2**60, 2**64 - 1, 0, 99_999))
        return struct.pack("<Q", claimed) + header + data[8 + size :]

    def _resume(self, checkpoint: Any) -> None:
        from algpt2.options import TrainOptions, parse
        from algpt2.runs.run import Run
        from algpt2.runs.start import Start
        from algpt2.shards.batches import RowInputs
        from algpt2.shards.tfrecords import open_rows
        from algpt2.system.processes_pt import start_processes
        from algpt2.training.trainer_pt import Trainer

        options = parse(TrainOptions, flags(self.folder)) if not self.options_ else self.options_
        self.options_ = options
        rows, processes = open_rows(self.folder / "valid"), start_processes(options)
        start = replace(Start.find(options.model), tokenizer=self.sound_tokenizer, seq_len=16)
        run = Run(self.folder / "run", {"steps": 9}, checkpoint)
        inputs = RowInputs(rows, options, processes)
        trainer = Trainer.build(options, start, inputs, rows, processes, run)
        with contextlib.suppress(ArithmeticError):  # weights that are NaN: said as such
            trainer.train_step()

    options_: Any = None

    def tokenizer(self, draw: random.Random) -> Read:
        from algpt2.tokenization_algpt2 import load_tokenizer

        folder = self.folder / "tokenizer"
        path = draw.choice(self.tokenizer_files)
        if path.suffix == ".json":
            self.mutate(path, draw)
        else:
            self.put(path, mutate_bytes(self.files[path], draw))
        if path.name in ("vocab.json", "merges.txt"):
            self.changed.add(folder / "tokenizer.json")
            (folder / "tokenizer.json").unlink()

        def read() -> None:
            tokenizer = load_tokenizer(str(folder))
            for ids in tokenizer.encode_batch(["words of a text \ud7ff\n", ""]):
                tokenizer.decode(ids.tolist())

        return read

    # Text.

    def jsonl(self, draw: random.Random) -> Read:
        lines = self.files[self.folder / "archives/a.jsonl"].splitlines(keepends=True)
        at = draw.randrange(len(lines))
        lines[at] = mutate_json_text(lines[at], draw) + b"\n"
        return self._documents("a.jsonl", b"".join(lines), draw)

    def gz(self, draw: random.Random) -> Read:
        name = draw.choice(("a.jsonl.gz", "a.txt.gz"))
        return self._documents(name, None, draw)

    def zip(self, draw: random.Random) -> Read:
        return self._documents("a.zip", None, draw)

    def tar(self, draw: random.Random) -> Read:
        return self._documents(draw.choice(("a.tar", "a.tar", "a.tar.gz", "a.tar.xz")), None, draw)

    def _documents(self, name: str, data: bytes | None, draw: random.Random) -> Read:
        from algpt2.corpus.documents import documents
        from algpt2.corpus.parts import Reading

        path = self.folder / "archives" / name
        self.put(path, mutate_bytes(self.files[path], draw) if data is None else data)
        skips = draw.random() < 0.5

        def read() -> None:
            for text in documents(str(path), Reading(skip_broken=skips)):
                text.encode()

        return read

    def packing(self, draw: random.Random) -> Read:
        """The state of a half-packed folder, which has to lead to the same shards or an error."""
        from algpt2.shards import packing

        text, folder = str(self.folder / "text/train"), self.folder / "half"
        if not folder.exists():
            self._pack_half(text, folder)
        path = draw.choice(self.half)
        self.mutate(path, draw, sign=True) if path.suffix == ".json" else self.put(
            path, mutate_bytes(self.files[path], draw)
        )
        for kept in self.half:
            self.changed.add(kept)

        def read() -> None:
            packing.pack(self._pack_options(text, folder), self.sound_tokenizer)

        def read_and_clean() -> None:
            try:
                read()
            finally:
                shutil.rmtree(folder)

        return read_and_clean

    @staticmethod
    def _pack_options(text: str, folder: Path) -> Any:
        from algpt2.options import PackOptions

        return PackOptions((text,), str(folder), seq_len=16, workers=1, dedup=True)

    def _pack_half(self, text: str, folder: Path) -> None:
        from algpt2.shards import packing

        class Killed(BaseException):
            pass

        def die(*args: Any) -> None:
            raise Killed

        write, packing._write_split = packing._write_split, die
        try:
            packing.pack(self._pack_options(text, folder), self.sound_tokenizer)
        except Killed:
            pass
        finally:
            packing._write_split = write
        self.half = [path for path in folder.rglob("*") if path.is_file()]
        self.files |= {path: path.read_bytes() for path in self.half}

    # Evaluation and the command line.

    def evaluation(self, draw: random.Random) -> Read:
        from algpt2.evaluation.results import ResultFiles

        path = self.folder / "run/evaluation.json"
        if path not in self.files:
            measure = {"name": "ppl", "value": 3.5, "unit": "per token", "over": "99 tokens"}
            record = {
                "checkpoint": "checkpoint-00000001", "set": "text", "text": "a.txt", "context": 16,
                "stride": 16, "precision": "float32", "measures": [measure], "sha256": "0" * 64,
                "n_eval_examples": None, "details": {"nats": 1.5},
            }  # fmt: skip
            self.files[path] = json.dumps({"evaluations": [record]}).encode()
        self.mutate(path, draw)

        def read() -> None:
            results = ResultFiles(path.parent)
            if results.evaluations:
                results.add(results.evaluations[0])

        return read

    def options(self, draw: random.Random) -> Read:
        from algpt2 import options

        classes = [getattr(options, name) for name in OPTION_CLASSES]
        cls = draw.choice(classes)
        argv = strange_arguments(cls, draw)
        return lambda: options.parse(cls, argv)

    def commands(self, draw: random.Random) -> Read:
        """Whole commands of train_pt.py with one strange number each: no more than two steps."""
        name = draw.choice(STRANGE_FLAGS)
        value = draw.choice(STRANGE_NUMBERS)
        changes = {"max_steps": 2, "save_dir": self.folder / "try", name: value}
        argv = flags(self.folder, **changes)

        def read() -> None:
            try:
                with _own_signals(), contextlib.suppress(ArithmeticError):
                    self.train(argv)
            finally:
                shutil.rmtree(self.folder / "try", ignore_errors=True)

        return read


OPTION_CLASSES = (
    "TokenizerOptions", "PackOptions", "TrainOptions", "TFTrainOptions", "TFRecordOptions",
    "PlotOptions", "ExportOptions",
)  # fmt: skip
STRANGE_NUMBERS = (
    "0", "-1", "1", "nan", "inf", "-inf", "1e308", "1e-308", str(2**31), str(2**63), str(10**30),
    "0x10", "1_000", "٣", "", " ", "None", "True", "[]", "\udcff", "9" * 5000,
)  # fmt: skip
# Those that a run of two steps reads, without the ones that only make it long.
STRANGE_FLAGS = (
    "lr", "warmup_steps", "min_lr_ratio", "decay_ratio", "weight_decay", "beta1", "beta2", "seed",
    "max_grad_norm", "n_eval_rows", "logging_steps", "eval_steps", "keep_last", "milestone_steps",
    "temperature", "top_k", "top_p", "repetition_penalty", "sliding_window_size", "seq_len",
    "batch_size", "grad_steps", "device", "precision", "optimizer", "tags", "prompt", "n_samples",
)  # fmt: skip


def strange_arguments(cls: type, draw: random.Random) -> list[str]:
    """Arguments as a shell could pass them: known flags with strange values, and noise."""
    from dataclasses import fields, is_dataclass

    names = []
    for field in fields(cls):
        inner = field.default_factory if is_dataclass(field.default_factory) else None
        names += [f.name for f in fields(inner)] if inner else [field.name]
    argv = []
    for _ in range(draw.randint(1, 4)):
        name = draw.choice(names)
        if draw.random() < 0.1:
            name = draw.choice(
                ("", "-", f"no_{name}", name.upper(), name[:-1], "ünïcode", "\udcff")
            )
        value = draw.choice(
            (*STRANGE_NUMBERS, "x", "../..", "-", "--", "a b", "\n", "%s", "{}", "\u2028")
        )
        argv += [f"--{name}={value}"] if draw.random() < 0.6 else [f"--{name}", value]
    return argv


# --- the report ----------------------------------------------------------------------------------


def run(short: bool = False, seed: int = 0, readers: Sequence[str] = ()) -> list[dict]:
    """Every reader's inputs (short: one of forty); a row for each reader, and one for memory."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        fuzzer = Fuzzer(Path(folder))
        before = _peak_bytes()
        for reader in readers or fuzzer.counts:
            count = fuzzer.counts[reader]
            rows.append(fuzz(fuzzer, reader, max(2, count // SHORT) if short else count, seed))
    grown = _peak_bytes() - before
    is_lost = int(grown > LIMIT_BYTES)
    return [*rows, row(FAMILY, "peak memory of all inputs", 1, is_lost, f"{grown >> 20} MiB more")]


def fuzz(fuzzer: Fuzzer, reader: str, count: int, seed: int) -> dict[str, Any]:
    """`count` inputs of one reader."""
    failures: Counter[str] = Counter()
    refused = 0
    for i in range(count):
        try:
            refused += not read_one(fuzzer, reader, i, seed)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failures[f"{_name(error)} (first: --reproduce {reader}:{i})"[:300]] += 1
            failures = _merged(failures)
    n_lost = failures.total()
    note = "; ".join(f"{n} x {name}" for name, n in failures.most_common()) or f"{refused} refused"
    return row(FAMILY, reader, count, n_lost, note)


def read_one(fuzzer: Fuzzer, reader: str, i: int, seed: int) -> bool:
    """True if the input was read, False if it was refused as it should be; else it raises."""
    read = getattr(fuzzer, reader)(random.Random(f"{seed} {reader} {i}"))
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT_S)
    try:
        read()
        return True
    except UserError:
        return False
    except OSError as error:
        if error.errno is None:
            raise
        return False
    finally:
        signal.alarm(0)
        fuzzer.restore()


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError  # an OSError without errno: it counts


def _name(error: BaseException) -> str:
    where = [f for f in traceback.extract_tb(error.__traceback__) if "algpt2" in f.filename]
    last = where[-1] if where else traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno} {str(error)[:60]!r}"


def _merged(failures: Counter[str]) -> Counter[str]:
    merged: Counter[str] = Counter()
    names: dict[str, str] = {}
    for name, n in failures.items():
        place = name.split(" '")[0].split(' "')[0]
        merged[names.setdefault(place, name)] += n
    return merged


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What readers print goes nowhere, but has to be printable as in a script."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    kept = os.environ.get("ALGPT2_CACHE")
    with open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere:  # noqa: PTH123
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    if kept is not None:
        os.environ["ALGPT2_CACHE"] = kept


def reproduce(name: str, seed: int) -> None:
    """Read one input, named READER:N, and let its exception through."""
    reader, _, i = name.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            fuzzer = Fuzzer(Path(folder))
        print("read" if read_one(fuzzer, reader, int(i), seed) else "refused")
