"""Phase 1 of packing: tasks of documents to files of tokens, in any order, by any workers.

A task is a run of the corpus's parts; where runs are cut does not depend on the workers. A task
writes into the work folder:

    00000.tokens       the tokens of its documents, each behind its control code
    00000.documents    one `DOCUMENT` per document, if documents are picked or shuffled
    00000.json         last, when the others are complete: counts, number of tokens
"""

import hashlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..corpus.documents import read_batches
from ..corpus.listing import identify_parts
from ..corpus.parts import CorpusCounts, Part, Reading
from ..corpus.words import count_line_ends, count_words
from ..errors import UserError
from ..system.files import describe_file, read_record, write_record
from ..tokenization_algpt2 import TextTokenizer
from .batches import permutation
from .encoders import Encode, build_encoder
from .tfrecords import write_file

TASK_FILES, TASK_BYTES = 4096, 64 << 20  # a task has at most so many files, and about so much text
OPEN_FILES = 64  # token files held open at a time
BATCH_BYTES = 1 << 18  # of text whose tokens are written at once
# The encoders are compared on a sample: 1/1000 of the text (a tenth of the time of packing it), but
# 16 to 64 KiB of each of 16 tasks (half a second of one core).
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
    """The settings that all tasks share, sent to the workers."""

    work: Path
    tokenizer: TextTokenizer
    encoder: str  # the name that `choose_encoder` gave
    start_id: int | None  # token before each document
    reading: Reading
    with_documents: bool  # write DOCUMENT records
    max_tokens: float  # no task needs more
    detokenizer: str | None = None  # of `DETOKENIZERS`, before encoding
    plan: str = ""  # hash of all other options that decide a task's tokens


def cut_tasks(parts: Iterable[Part], n_files: int | None) -> list[Task]:
    """The tasks of a corpus of these parts; `n_files` files of it are read (None: all)."""
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
        if left == 0 and part.n_files != 0:  # 0: the part continues a file
            break
        if part.n_files is None and (left is not None or not part.is_file):
            close()
            # Its number of files is known when it is read: a limit on files needs a single task.
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


def sample(tasks: Sequence[Task], reading: Reading) -> Iterator[bytes]:
    """The first documents of some tasks all over the corpus."""
    step = math.ceil(len(tasks) / SAMPLE_TASKS)
    size = sum(part.size for task in tasks for part in task.parts)
    low, high = SAMPLE_BYTES
    reading = replace(reading, is_sample=True)
    for task in tasks[::step]:
        left = min(high, max(low, size // SAMPLE_SHARE // SAMPLE_TASKS))
        counts = CorpusCounts()
        for (text,) in read_batches(task.parts, reading, counts, limit=task.limit, batch_bytes=1):
            yield text[:left].decode(errors="ignore").encode()  # no character is cut
            left -= len(text)
            if left <= 0:
                break


# --- one task ------------------------------------------------------------------------------------


def encode_task(
    context: Context, task: Task, *, tick: Callable[[CorpusCounts], None] | None = None
) -> dict[str, Any]:
    """Do a task, unless it was done before; returns the content of its .json.

    Args:
        tick: called after each batch with the counts up to there.

    Raises:
        UserError: as `PartReader`.
        OSError: disk full.
    """
    base = context.work / f"{task.index:05d}"
    key = [context.plan, context.encoder, identify_parts(task.parts), task.limit]
    if (result := _earlier_result(base, context, key)) is not None:
        return result
    counts, records = CorpusCounts(), []
    blocks = _encode_blocks(context, task, counts, records, tick)
    # Not durable, which would write them to the disk twice as often: they are soon removed, and
    # their checksums tell if a power cut lost them.
    files = {".tokens": write_file(base.with_suffix(".tokens"), blocks, durable=False)}
    if context.with_documents:
        path = base.with_suffix(".documents")
        files[".documents"] = write_file(path, records, durable=False)
    n_tokens = files[".tokens"][0] // np.dtype(context.tokenizer.dtype).itemsize
    result = {"key": key, "tokens": n_tokens, "counts": asdict(counts), "files": files}
    write_record(base.with_suffix(".json"), result, durable=False)
    return read_record(base.with_suffix(".json"))


def _encode_blocks(
    context: Context, task: Task, counts: CorpusCounts, records: list[np.ndarray],
    tick: Callable[[CorpusCounts], None] | None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """The tokens of a task in blocks (n,); fills `counts` and `records`."""
    encode = build_encoder(context.tokenizer, context.encoder, context.detokenizer)
    batches = read_batches(
        task.parts, context.reading, counts, limit=task.limit, batch_bytes=BATCH_BYTES
    )
    n_tokens, dtype = 0, context.tokenizer.dtype
    for batch in batches:
        block, lengths = encode_documents(batch, encode, context.start_id, dtype)
        if context.with_documents:
            records.append(document_records(batch, lengths))
        yield block
        n_tokens += len(block)
        if tick is not None:
            tick(counts)
        if n_tokens >= context.max_tokens:
            return


def encode_documents(
    texts: Sequence[bytes], encode: Encode, start_id: int | None, dtype: type
) -> tuple[np.ndarray, list[int]]:
    """The tokens of some documents as an array (n,), with `start_id` (unless None) before each
    document; and the number of tokens of each document."""
    dtype = np.dtype(dtype).newbyteorder("<")
    start = np.array([] if start_id is None else [start_id], dtype)
    ids = encode(texts)
    # Concatenated and converted in one pass: an array in between costs more than the conversion.
    block = np.concatenate([x for tokens in ids for x in (start, tokens)], dtype=dtype,
                           casting="unsafe")  # fmt: skip
    return block, [len(start) + len(tokens) for tokens in ids]


def document_records(texts: Sequence[bytes], lengths: Sequence[int]) -> np.ndarray:
    """The `DOCUMENT` record of each text (n,); `lengths` are their numbers of tokens."""
    records = [
        (length, count_words(text), count_line_ends(text), len(text),
         hashlib.sha256(text).digest()[:16])
        for text, length in zip(texts, lengths, strict=True)
    ]  # fmt: skip
    return np.array(records, DOCUMENT)


def _earlier_result(base: Path, context: Context, key: list[Any]) -> dict[str, Any] | None:
    """The .json of a task that was done before, if it is of this text and these options (`key`)
    and its files are whole."""
    try:
        result = read_record(base.with_suffix(".json"))
        _check_result(result, context, key)
        files = {
            suffix: list(describe_file(base.with_suffix(suffix))) for suffix in result["files"]
        }
    except (FileNotFoundError, UserError):  # not done, or damaged since: do it again
        return None
    return result if files == result["files"] else None


def _check_result(result: dict[str, Any], context: Context, key: list[Any]) -> None:
    """`UserError` unless a task's .json has this `key` and the fields and types that `encode_task`
    writes."""
    empty = asdict(CorpusCounts())
    try:
        counts, files = result["counts"], result["files"]
        sound = result["key"] == key
        sound &= files.keys() == {".tokens", ".documents"} or not context.with_documents
        sound &= counts.keys() == empty.keys() and type(result["tokens"]) is int
        numbers = [*counts["other_files"].values(), result["tokens"]]
        numbers += [counts[name] for name, value in empty.items() if type(value) is int]
        sound &= all(type(n) is int and n >= 0 for n in numbers)
        sound &= type(counts["broken"]) is list and all(type(x) is str for x in counts["broken"])
        n_bytes = result["tokens"] * np.dtype(context.tokenizer.dtype).itemsize
        sound &= files[".tokens"][0] == n_bytes and files.keys() <= {".tokens", ".documents"}
    except (KeyError, TypeError, AttributeError, IndexError):
        sound = False
    if not sound:
        raise UserError("a task's result is damaged")


# --- all tasks together --------------------------------------------------------------------------


@dataclass(frozen=True)
class Segments:
    """Stretches of the stored tokens, in the order in which they are packed."""

    starts: np.ndarray  # (n,) int64: place of the first token among all stored tokens
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
        """The segments that hold the tokens [start, stop) of this stream."""
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
        """Fill `tokens` with those from `start` on in a task's file. Not through a memory map: the
        pages of a large shard would count as gigabytes of this process's memory."""
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

    Each row starts with the last token of the row before, so that every token but the first is
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
    """Indices of the documents of each split in the order of packing, and the number of copies.

    The splits are {"": all} or, with `valid_fraction`, {"train": ..., "valid": ...}: a document's
    hash alone decides, by the rule of docs:. Of equal texts `dedup` keeps the first.
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
    """`hash_fraction` of each text: the first six bytes of its hash (big-endian) over 2**48."""
    digits = np.ascontiguousarray(hashes).view(np.uint8).reshape(len(hashes), 16)[:, :6]
    return digits.astype(np.float64) @ (256.0 ** -np.arange(1, 7))


def segments_of(documents: np.ndarray, order: np.ndarray) -> Segments:
    """Where the documents `order` lie among the stored tokens; neighbours are joined."""
    ends = np.cumsum(documents["tokens"], dtype=np.int64)[order]
    lengths = documents["tokens"][order].astype(np.int64)
    starts = ends - lengths
    breaks = np.flatnonzero(np.r_[True, starts[1:] != ends[:-1]])
    return Segments(starts[breaks], np.add.reduceat(lengths, breaks))
