"""Phase 1 of packing: tasks of documents to files of tokens, in any order, by any workers.

A task is a run of the corpus's parts, cut by a rule that knows nothing of workers. It leaves in
the work folder, the last only when the others are complete:

    00000.tokens       the tokens of its documents, each behind its control code
    00000.documents    one `DOCUMENT` per document, where documents are picked or shuffled
    00000.json         what was read: counts, number of tokens
"""

import hashlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .batches import permutation
from .corpus import CorpusReport, Part, describe_parts, read_parts
from .encoders import Encode, build_encoder
from .errors import UserError
from .files import describe_file, read_record, write_record
from .tfrecords import write_file
from .tokenization_algpt2 import TextTokenizer

TASK_FILES, TASK_BYTES = 4096, 64 << 20  # a task has at most so many files, and about so much text
OPEN_FILES = 64  # of tokens
BATCH_BYTES = 1 << 18  # of text whose tokens are written at once
# What the encoders are compared on: at most the first 64 KiB of 16 tasks, half a second of one
# core, or 1/1000 of the text, which takes a tenth of the time of packing it.
SAMPLE_TASKS, SAMPLE_BYTES, SAMPLE_SHARE = 16, (1 << 14, 1 << 16), 1000

DOCUMENT = np.dtype(
    [
        ("tokens", "<u4"),  # the control code before it included
        ("words", "<u4"),
        ("line_ends", "<u4"),
        ("text_bytes", "<u8"),
        ("hash", "S16"),  # the start of the text's sha256: equal texts, and the split
    ]
)


@dataclass(frozen=True)
class Task:
    """A run of parts; at most `limit` files of them are read (None: all)."""

    index: int
    parts: tuple[Part, ...]
    limit: int | None = None


@dataclass(frozen=True)
class Context:
    """What all tasks share; it is sent to the workers."""

    work: Path
    tokenizer: TextTokenizer
    encoder: str  # the name that `choose_encoder` gave
    start_id: int | None  # token before each document
    reading: dict[str, Any]  # options of `corpus.read_parts`
    with_documents: bool  # write DOCUMENT records
    max_tokens: float  # no task needs more
    detokenizer: str | None = None  # of `DETOKENIZERS`, before encoding
    plan: str = ""  # hash of all else that decides a task's tokens


def cut_tasks(parts: Iterable[Part], n_files: int | None) -> list[Task]:
    """The tasks of a corpus of these parts, of which `n_files` files are read (None: all)."""
    tasks: list[Task] = []
    run: list[Part] = []
    n_run, size, left = 0, 0, n_files
    parts = iter(parts)

    def close(limit: int | None = None) -> None:
        nonlocal run, n_run, size
        if run:
            tasks.append(Task(len(tasks), tuple(run), limit))
        run, n_run, size = [], 0, 0

    for part in parts:
        if left == 0 and part.n_files != 0:  # 0: it belongs to a file that has begun before
            break
        if part.n_files is None and (left is not None or not part.is_file):
            close()
            # How many files there are shows when they are read: what is limited stays together.
            run = [part] if left is None else [part, *parts]
            close(left)
            continue
        n = part.n_files or 1
        if n_run + n > TASK_FILES or size + part.size > TASK_BYTES:
            close()
        run.append(part)
        n_run, size = n_run + n, size + part.size
        if left is not None:
            if part.n_files > left:
                close(n_run - n + left)
            left = max(0, left - part.n_files)
    close()
    return tasks


def sample(tasks: Sequence[Task], reading: dict[str, Any]) -> Iterator[bytes]:
    """The first documents of some tasks all over the corpus."""
    step = math.ceil(len(tasks) / SAMPLE_TASKS)
    size = sum(part.size for task in tasks for part in task.parts)
    low, high = SAMPLE_BYTES
    for task in tasks[::step]:
        left = min(high, max(low, size // SAMPLE_SHARE // SAMPLE_TASKS))
        options = {**reading, "is_sample": True, "limit": task.limit}
        for text in read_parts(task.parts, **options, report=CorpusReport()):
            yield text[:left].decode(errors="ignore").encode()  # no character is cut
            left -= len(text)
            if left <= 0:
                break


# --- one task ------------------------------------------------------------------------------------


def encode_task(
    context: Context, task: Task, *, tick: Callable[[CorpusReport], None] | None = None
) -> dict[str, Any]:
    """Do a task, unless it was done before; returns the content of its .json.

    Args:
        tick: called after each batch with what was read so far.

    Raises:
        UserError: what `corpus.read_parts` raises.
        OSError: disk full.
    """
    base = context.work / f"{task.index:05d}"
    key = [context.plan, context.encoder, describe_parts(task.parts), task.limit]
    if (result := _earlier_result(base, context, key)) is not None:
        return result
    report = CorpusReport()
    found: list[np.ndarray] = []
    encode = build_encoder(context.tokenizer, context.encoder, context.detokenizer)
    texts = read_parts(task.parts, **context.reading, limit=task.limit, report=report)
    batches = encode_documents(
        _counted(texts, report) if context.with_documents else zip(texts, itertools.repeat(None)),
        encode, context.start_id, context.tokenizer.dtype,
    )  # fmt: skip
    n_tokens = 0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal n_tokens
        for block, documents in batches:
            found.append(documents)
            yield block
            n_tokens += len(block)
            if tick is not None:
                tick(report)
            if n_tokens >= context.max_tokens:
                return

    # Not durable: it is soon removed, and its checksums tell if it was lost. On the disk, it would
    # be written twice.
    files = {".tokens": write_file(base.with_suffix(".tokens"), blocks(), durable=False)}
    if context.with_documents:
        path = base.with_suffix(".documents")
        files[".documents"] = write_file(path, found, durable=False)
    result = {"key": key, "tokens": n_tokens, "report": asdict(report), "files": files}
    write_record(base.with_suffix(".json"), result, durable=False)
    return read_record(base.with_suffix(".json"))


def _earlier_result(base: Path, context: Context, key: list[Any]) -> dict[str, Any] | None:
    """A task's .json, if it and the files that it names are whole and of this text and these
    options (`key`)."""
    try:
        result = read_record(base.with_suffix(".json"))
        _check_result(result, context, key)
        files = {
            suffix: list(describe_file(base.with_suffix(suffix))) for suffix in result["files"]
        }
    except (FileNotFoundError, UserError):  # not done, or damaged since: again
        return None
    return result if files == result["files"] else None


def _check_result(result: dict[str, Any], context: Context, key: list[Any]) -> None:
    """`UserError` unless a task's .json is of this text and these options (`key`), and has the
    fields and types that `encode_task` writes."""
    empty = asdict(CorpusReport())
    try:
        report, files = result["report"], result["files"]
        sound = result["key"] == key
        sound &= files.keys() == {".tokens", ".documents"} or not context.with_documents
        sound &= report.keys() == empty.keys() and type(result["tokens"]) is int
        numbers = [*report["other_files"].values(), result["tokens"]]
        numbers += [report[name] for name, value in empty.items() if type(value) is int]
        sound &= all(type(n) is int and n >= 0 for n in numbers)
        sound &= type(report["broken"]) is list and all(type(x) is str for x in report["broken"])
        n_bytes = result["tokens"] * np.dtype(context.tokenizer.dtype).itemsize
        sound &= files[".tokens"][0] == n_bytes and files.keys() <= {".tokens", ".documents"}
    except (KeyError, TypeError, AttributeError, IndexError):
        sound = False
    if not sound:
        raise UserError("a task's result is damaged")


def _counted(
    texts: Iterable[bytes], report: CorpusReport
) -> Iterator[tuple[bytes, tuple[int, int, int, bytes]]]:
    """Each text with its own words, line ends, bytes and hash."""
    words = line_ends = text_bytes = 0
    for text in texts:
        digest = hashlib.sha256(text).digest()[:16]
        yield (
            text,
            (
                report.words - words,
                report.line_ends - line_ends,
                report.text_bytes - text_bytes,
                digest,
            ),
        )
        words, line_ends, text_bytes = report.words, report.line_ends, report.text_bytes


def encode_documents(
    texts: Iterable[tuple[bytes, Any]], encode: Encode, start_id: int | None, dtype: type
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The token stream in blocks (n,), each document's tokens behind `start_id` (None: alone),
    with the block's `DOCUMENT` records; `texts` are pairs of a text and its counts or None."""
    dtype = np.dtype(dtype).newbyteorder("<")
    start = np.array([] if start_id is None else [start_id], dtype)
    for batch in _batches(texts):
        ids = encode([text for text, _ in batch])
        parts = [part for tokens in ids for part in (start, tokens)]
        # In one pass: an array of its own in between would cost more than the conversion.
        stream = np.concatenate(parts, dtype=dtype, casting="unsafe")
        documents = [
            (len(tokens) + len(start), *counts)
            for tokens, (_, counts) in zip(ids, batch, strict=True)
            if counts is not None
        ]
        yield stream, np.array(documents, DOCUMENT)


def _batches(texts: Iterable[tuple[bytes, Any]]) -> Iterator[list[tuple[bytes, Any]]]:
    batch, n_bytes = [], 0
    for pair in texts:
        batch.append(pair)
        n_bytes += len(pair[0])
        if n_bytes >= BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


# --- all tasks together --------------------------------------------------------------------------


@dataclass(frozen=True)
class Segments:
    """Stretches of the stored tokens, in the order in which they are packed."""

    starts: np.ndarray  # (n,) int64: place of the first token among all stored ones
    lengths: np.ndarray  # (n,) int64

    @classmethod
    def of_stream(cls, n_tokens: int) -> "Segments":
        """All stored tokens as they lie."""
        return cls(np.array([0]), np.array([n_tokens]))

    @property
    def n_tokens(self) -> int:
        """Tokens of all stretches."""
        return int(self.lengths.sum())

    def cut(self, start: int, stop: int) -> "Segments":
        """The segments of the tokens `start` to `stop` of this stream."""
        ends = np.cumsum(self.lengths)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        starts, lengths = (
            self.starts[first : last + 1].copy(),
            self.lengths[first : last + 1].copy(),
        )
        lengths[-1] -= ends[last] - stop
        before = start - (ends[first] - self.lengths[first])
        starts[0] += before
        lengths[0] -= before
        return Segments(starts, lengths)


class TokenStore:
    """The token files of finished tasks as one array.

    Args:
        sizes: tokens of each task.
    """

    def __init__(self, work: Path, sizes: Sequence[int], dtype: str) -> None:
        self.work, self.sizes, self.dtype = work, tuple(sizes), dtype
        self._files: dict[int, BinaryIO] = {}  # by task, at most OPEN_FILES
        weakref.finalize(self, _close, self._files)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.work, self.sizes, self.dtype)

    def read(self, segments: Segments) -> np.ndarray:
        """The tokens of the segments (n_tokens,)."""
        ends = np.cumsum(self.sizes)
        tokens = np.empty(segments.n_tokens, np.dtype(self.dtype).newbyteorder("<"))
        place = 0
        for start, length in zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True):
            task = int(np.searchsorted(ends, start, side="right"))
            while length:
                n = min(length, int(ends[task]) - start)
                inside = start - int(ends[task]) + self.sizes[task]
                self._read_into(tokens[place : place + n], task, inside)
                place, start, length, task = place + n, start + n, length - n, task + 1
        return tokens

    def _open(self, task: int) -> BinaryIO:
        if task not in self._files:
            if len(self._files) == OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            path = self.work / f"{task:05d}.tokens"
            self._files[task] = path.open("rb", buffering=0)
        return self._files[task]

    def _read_into(self, tokens: np.ndarray, task: int, start: int) -> None:
        """Fill `tokens` from `start` on in a task's file. Not through a memory map: the pages that
        were read would count as this process's memory, gigabytes of a large shard."""
        file = self._open(task)
        file.seek(start * tokens.itemsize)
        left = memoryview(tokens).cast("B")
        while left:
            if not (n := file.readinto(left)):
                raise OSError(f"{file.name} is cut off: it was whole when this command began")
            left = left[n:]

    def documents(self) -> np.ndarray:
        """The `DOCUMENT` records of all tasks in order."""
        paths = [self.work / f"{task:05d}.documents" for task in range(len(self.sizes))]
        return np.concatenate([np.fromfile(path, DOCUMENT) for path in paths])


def _close(files: dict[int, BinaryIO]) -> None:
    for file in files.values():
        file.close()


class StreamRows:
    """Rows of a token stream, (n_rows, seq_len + 1), read block by block: `rows[i:j]`.

    Each row starts with the last token of the one before, so that every token but the first is
    predicted exactly once.
    """

    def __init__(self, store: TokenStore, segments: Segments, seq_len: int) -> None:
        self.store, self.segments, self.seq_len = store, segments, seq_len
        self.shape = ((segments.n_tokens - 1) // seq_len, seq_len + 1)
        self.dtype = np.dtype(store.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        tokens = self.store.read(self.segments.cut(start * self.seq_len, stop * self.seq_len + 1))
        return np.lib.stride_tricks.sliding_window_view(tokens, self.seq_len + 1)[:: self.seq_len]


# --- which documents, in which order -------------------------------------------------------------


def order_documents(
    documents: np.ndarray, *, dedup: bool, valid_fraction: float, shuffle_seed: int | None
) -> tuple[dict[str, np.ndarray], int]:
    """Indices of the documents of each split in the order of packing, and how many are copies.

    The splits are {"": all} or, with `valid_fraction`, {"train": ..., "valid": ...}: a document's
    hash alone decides, by the rule of docs:. Of equal texts the first stays.
    """
    keep = np.ones(len(documents), bool)
    if dedup:
        keep[:] = False
        keep[np.unique(documents["hash"], return_index=True)[1]] = True
    order = np.arange(len(documents))
    if shuffle_seed is not None:
        order = permutation(len(documents), shuffle_seed, 0)
    order = order[keep[order]]
    splits = {"": order}
    if valid_fraction:
        is_valid = _fractions(documents["hash"])[order] < valid_fraction
        splits = {"train": order[~is_valid], "valid": order[is_valid]}
    return splits, int(len(documents) - keep.sum())


def _fractions(hashes: np.ndarray) -> np.ndarray:
    """`hash_fraction` of each text, of the first six bytes of its hash (big-endian)."""
    digits = (
        np.ascontiguousarray(hashes)
        .view(np.uint8)
        .reshape(len(hashes), 16)[:, :6]
        .astype(np.float64)
    )
    return digits @ (256.0 ** -np.arange(1, 7))


def segments_of(documents: np.ndarray, order: np.ndarray) -> Segments:
    """Where the documents `order` lie among the stored tokens; neighbours are joined."""
    ends = np.cumsum(documents["tokens"], dtype=np.int64)[order]
    lengths = documents["tokens"][order].astype(np.int64)
    starts = ends - lengths
    breaks = np.flatnonzero(np.r_[True, starts[1:] != ends[:-1]])
    return Segments(starts[breaks], np.add.reduceat(lengths, breaks))
