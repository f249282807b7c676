"""Documents as a deterministic stream, from anywhere text lies.

    folder | file | glob     text files (one document each), .jsonl, .parquet; .gz, .zst, .xz, .bz2
                             of them; .tar, .tar.gz (.xz, .zst, .bz2) and .zip of all these
    hf:NAME[:SPLIT]          a dataset of the Hugging Face hub or a local folder, streamed; also
                             hf:NAME:CONFIG:SPLIT
    docs:[train|valid|all]   the docstrings of the installed packages: text without a download

A corpus is a list of parts, in the order of the sources and of the sorted paths. A part can be
sent to another process and read there on its own: a run of small files, a piece of a large one, an
archive or a run of its members. Where parts are cut depends on the files alone. Nothing is skipped
silently: a `CorpusReport` counts what is not a document.
"""

import codecs
import glob
import hashlib
import itertools
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from .archives import Broken, TarStream
from .console import log
from .docstrings import SPLITS, hash_fraction, package_versions
from .errors import UserError
from .files import cache_dir
from .readers import (
    BYTES,
    ZIP_ERRORS,
    BrokenInput,
    ChangedInput,
    PartReader,
    Reading,
    file_stamp,
    file_suffix,
    is_hidden,
    member_kind,
    named_kind,
    split_suffix,
    unreadable,
)

__all__ = [
    "BrokenInput",
    "ChangedInput",
    "CorpusReport",
    "Part",
    "Reading",
    "cache_dir",
    "count_words",
    "describe_parts",
    "describe_sources",
    "documents",
    "first_bytes",
    "hash_fraction",
    "list_parts",
    "no_document",
    "read_parts",
]

RUN_FILES, RUN_BYTES = 1000, 64 << 20  # a run of small files or members has no more
PIECE_BYTES = 64 << 20  # of a large table or text of lines; a parquet file's pieces are row groups
WORDS_BYTES = 1 << 20  # looked at together


class _Counted:
    """Words or line ends of a report's documents, counted when asked for: it is faster by the
    mebibyte than by the document."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"counted_{name}"

    def __get__(self, report: "CorpusReport | None", owner: type) -> int:
        if report is None:
            return 0  # the field's default
        report.count_now()
        return getattr(report, self.name)

    def __set__(self, report: "CorpusReport", value: int) -> None:
        report.count_now()
        setattr(report, self.name, value)


@dataclass
class CorpusReport:
    """What a stream of documents has come to so far; filled while the stream is read."""

    files: int = 0
    documents: int = 0
    text_bytes: int = 0  # of the documents as UTF-8
    words: int = _Counted()  # separated by white space
    line_ends: int = _Counted()
    empty: int = 0  # files, rows or lines without anything but white space: no documents
    short: int = 0  # documents of fewer characters than the minimum, left out
    undecodable: int = 0  # documents in which bytes that are not UTF-8 became U+FFFD
    n_broken: int = 0  # damaged files, members and lines left out
    broken: list[str] = field(default_factory=list)  # where and what, of the first thousand
    other_files: Counter[str] = field(default_factory=Counter)  # suffix -> files that are not text

    def __new__(cls, *args: Any, **kwargs: Any) -> "CorpusReport":
        report = super().__new__(cls)
        report.uncounted, report.uncounted_bytes = [], 0
        return report

    def count(self, raw: bytes) -> None:
        """Count a document, given as UTF-8."""
        self.documents += 1
        self.text_bytes += len(raw)
        self.uncounted.append(raw)
        self.uncounted_bytes += len(raw)
        if self.uncounted_bytes >= WORDS_BYTES:
            self.count_now()

    def count_now(self) -> None:
        """Count words and line ends of the documents that wait for it."""
        if self.uncounted:
            text = b"\n".join(self.uncounted)
            self.counted_words += count_words(text)
            self.counted_line_ends += count_line_ends(text) - (len(self.uncounted) - 1)
            self.uncounted, self.uncounted_bytes = [], 0

    def summary(self) -> str:
        """One line for people."""
        parts = [
            f"{self.documents:,} documents",
            f"{self.text_bytes / 1e6:,.1f} MB of text",
            f"{self.words:,} words",
        ]
        if self.files:
            parts.insert(0, f"{self.files:,} files")
        if self.empty:
            parts.append(f"{self.empty:,} empty ones left out")
        if self.short:
            parts.append(f"{self.short:,} short ones left out")
        if self.undecodable:
            parts.append(f"{self.undecodable:,} with undecodable bytes (now U+FFFD)")
        if self.n_broken:
            parts.append(f"{self.n_broken:,} broken ones left out ({self._broken()})")
        if self.other_files:
            parts.append(f"{self.other_files.total():,} other files not read ({self._others()})")
        return ", ".join(parts)

    def add(self, other: "CorpusReport | dict[str, Any]") -> None:
        """Add what another stream, or its `asdict`, came to."""
        for field_ in fields(self):
            value = other[field_.name] if isinstance(other, dict) else getattr(other, field_.name)
            mine = getattr(self, field_.name)
            if isinstance(mine, Counter):
                mine.update(value)
            else:
                setattr(self, field_.name, mine + value)

    def _broken(self) -> str:
        return "; ".join(self.broken[:3]) + ("; ..." if self.n_broken > 3 else "")

    def _others(self) -> str:
        named = [f"{suffix or 'no suffix'}: {n:,}" for suffix, n in self.other_files.most_common(5)]
        return ", ".join(named)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a corpus that can be read on its own.

    kind: `text`, a run of text files; `lines`, `jsonl`, `parquet`, `tar`, `zip`, `stream` (a tar or
    text, compressed): one file or a piece of it; `hf`, `docs`: what `name` says.
    """

    kind: str
    name: str  # the file's path, of a run the folder, or what follows the colon
    source: str = ""  # what the user gave
    files: str = (
        ""  # of a run: paths below `name`, with NUL between them (a fifth of a tuple's memory)
    )
    stamps: array = field(default_factory=lambda: array("Q"))  # `file_stamp` of each file
    size: int = 0  # bytes on disk
    n_files: int | None = None  # that begin in it; None: shows when it is read
    start: int = 0  # of a piece: byte, parquet row group or zip member
    stop: int | None = None

    @property
    def is_file(self) -> bool:
        return self.kind not in ("hf", "docs")

    @property
    def paths(self) -> list[str]:
        """The files of a run."""
        return [self.name + path for path in self.files.split("\0")]

    def head(self, n: int) -> "Part":
        """A run's first `n` files; other parts stay whole."""
        if self.kind != "text" or n >= self.n_files:
            return self
        size = sum(os.stat(path).st_size for path in self.paths[:n])  # noqa: PTH116
        files = "\0".join(self.files.split("\0")[:n])
        return Part("text", self.name, self.source, files, self.stamps[:n], size, n)


def documents(
    sources: str | Sequence[str],
    *,
    n_files: int | None = None,
    line_by_line: bool = False,
    text_key: str = "text",
    min_length: int = 0,
    skip_broken: bool = False,
    report: CorpusReport | None = None,
) -> Iterator[str]:
    """The documents of `sources` in a fixed order: valid Unicode, never empty.

    A text file is one document (`line_by_line`: each of its lines), a row of a table has it in
    `text_key`; one of fewer than `min_length` characters is left out. At most `n_files` files are
    read, in archives too; where there are none (hf:, docs:) a document counts as a file. Sources
    that do not exist or hold no text are a `UserError` of this call; broken files (`skip_broken`
    counts them instead), files that change meanwhile, and a corpus without any document, are one
    while the stream is read.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    for source in sources:
        # All sources are looked at before the first is read for hours.
        next(list_parts([source], skip_broken=skip_broken))
    report = CorpusReport() if report is None else report
    reading = Reading(text_key, line_by_line, min_length, skip_broken)
    return _stream(sources, n_files, reading, report)


def _stream(
    sources: Sequence[str], n_files: int | None, reading: Reading, report: CorpusReport
) -> Iterator[str]:
    before = report.documents
    parts = list_parts(
        sources, report, line_by_line=reading.line_by_line, skip_broken=reading.skip_broken
    )
    yield from map(bytes.decode, _read(parts, reading, n_files, report))
    if report.documents == before:
        raise no_document(sources, report)


def no_document(sources: Sequence[str], report: CorpusReport) -> UserError:
    """The error of a corpus that was read and has no document."""
    return UserError(f"no document in {', '.join(sources)}: {report.summary()}")


def read_parts(
    parts: Iterable[Part],
    *,
    line_by_line: bool = False,
    text_key: str = "text",
    min_length: int = 0,
    skip_broken: bool = False,
    is_sample: bool = False,
    limit: int | None = None,
    report: CorpusReport,
) -> Iterator[bytes]:
    """The documents of some parts as UTF-8; at most `limit` files, or documents where there are
    none.

    `line_by_line` has to be what `list_parts` was told. UTF-8 takes a quarter of the memory that a
    long text takes as a string with a single emoji in it.
    """
    reading = Reading(text_key, line_by_line, min_length, skip_broken, is_sample)
    return _read(parts, reading, limit, report)


def _read(
    parts: Iterable[Part], reading: Reading, limit: int | None, report: CorpusReport
) -> Iterator[bytes]:
    reader = PartReader(reading, report, limit)
    n_logged = len(report.broken)
    for part in parts:
        if reader.left == 0 and part.n_files != 0:  # 0: it goes on with a file that has begun
            break
        texts = _clean(reader.read(part), reading, report)
        if part.is_file or reader.left is None:
            yield from texts
        else:
            for text in itertools.islice(texts, reader.left):
                reader.left -= 1
                yield text
        for message in report.broken[n_logged:]:
            log(f"left out: {message}")
        n_logged = len(report.broken)


def _clean(
    raw_texts: Iterator[bytes | str | None], reading: Reading, report: CorpusReport
) -> Iterator[bytes]:
    """Documents out of what a reader found, valid UTF-8, counted."""
    if reading.line_by_line:
        raw_texts = itertools.chain.from_iterable(map(_lines, raw_texts))
    for raw in raw_texts:
        text = _utf8(raw, report)
        del raw  # of gigabytes, perhaps
        if _is_blank(text):
            report.empty += 1
        elif reading.min_length and _is_shorter(text, reading.min_length):
            report.short += 1
        else:
            report.count(text)
            yield text
        del text  # before the next is read


def _utf8(raw: bytes | str | None, report: CorpusReport) -> bytes:
    """A raw text as valid UTF-8; lone surrogates stand for bad bytes."""
    try:
        if not isinstance(raw, bytes):
            return (raw or "").encode()
        if not raw.isascii():
            for _ in _decoded(raw):
                pass
        return raw
    except UnicodeError:
        text = raw.decode(*BYTES) if isinstance(raw, bytes) else raw
        report.undecodable += 1
        return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text).encode()


def _is_blank(text: bytes) -> bool:
    """True if UTF-8 has nothing but white space, as `str.isspace` sees it."""
    text = text.lstrip(_ASCII_SPACE)  # no copy where there is none
    return not text or (text[0] > 127 and all(map(str.isspace, filter(None, _decoded(text)))))


def _is_shorter(text: bytes, n_characters: int) -> bool:
    """True if UTF-8 has fewer characters; one has at most four bytes."""
    return len(text) < 4 * n_characters and len(text.decode()) < n_characters


def _decoded(text: bytes) -> Iterator[str]:
    """UTF-8 as strings, of a long text one for each mebibyte; `UnicodeError` if it is not UTF-8."""
    if len(text) <= WORDS_BYTES:
        yield text.decode()
        return
    decode = codecs.getincrementaldecoder("utf-8")().decode
    for start in range(0, len(text), WORDS_BYTES):
        stop = start + WORDS_BYTES
        yield decode(text[start:stop], stop >= len(text))


def _lines(raw: bytes | str | None) -> list[bytes]:
    if not isinstance(raw, bytes):
        raw = (raw or "").encode("utf-8", "surrogatepass")
    return [line.removesuffix(b"\r") for line in raw.removesuffix(b"\n").split(b"\n")]


# --- words ---------------------------------------------------------------------------------------

_ASCII_SPACE = bytes(byte for byte in range(128) if chr(byte).isspace())  # 9-13, 28-31, 32


def _wide_space() -> dict[int, tuple[int, np.ndarray]]:
    """White space beyond ASCII: first byte -> bytes in all, and a table of the other one or two."""
    tables = {}
    for character in filter(str.isspace, map(chr, range(128, 0xD800))):
        first, *others = character.encode()
        _, table = tables.setdefault(first, (len(others) + 1, np.zeros(2**16, bool)))
        table[int.from_bytes(bytes(others), "big")] = True
    return tables


_WIDE_SPACE = _wide_space()
_FIRST_WIDE = np.uint8(min(_WIDE_SPACE))


def count_words(raw: bytes) -> int:
    """len(raw.decode().split()) of valid UTF-8, six times as fast and without the list."""
    if len(raw) < 256:  # less than what numpy's calls cost
        return len(raw.decode().split())
    n_words, start = 0, 0
    while start < len(raw):
        stop = start + WORDS_BYTES
        while stop < len(raw) and raw[stop] & 0xC0 == 0x80:
            stop += 1  # not inside a character
        space = _is_space(raw[start:stop])
        n_words += int(np.count_nonzero(space[1:] > space[:-1]))  # ends of words
        # A word that goes on behind the cut ends there.
        n_words += bool(not space[-1] and (stop >= len(raw) or _is_space(raw[stop : stop + 4])[0]))
        start = stop
    return n_words


def count_line_ends(raw: bytes) -> int:
    """raw.count(b"\\n"), faster where there are many."""
    if len(raw) < 1 << 14:
        return raw.count(b"\n")
    values = np.frombuffer(raw, np.uint8)
    starts = range(0, len(raw), WORDS_BYTES)
    return sum(int(np.count_nonzero(values[i : i + WORDS_BYTES] == 10)) for i in starts)


def _is_space(raw: bytes) -> np.ndarray:
    """Whether each byte (n,) belongs to white space, as `str.split` sees it."""
    values = np.frombuffer(raw, np.uint8)
    space = values - np.uint8(9) < 5  # below 9 it wraps; 1.4 times as fast as `translate`
    space |= values - np.uint8(28) < 5
    if raw.isascii():
        return space
    values = np.frombuffer(raw + b"\0\0", np.uint8)
    leads = np.flatnonzero(values >= _FIRST_WIDE)  # one pass over all bytes, the others over few
    for first, (n_bytes, table) in _WIDE_SPACE.items():
        if first not in raw:
            continue
        at = leads[values[leads] == first]
        others = values[at + 1].astype(np.uint16)
        if n_bytes == 3:
            others = others << 8 | values[at + 2]
        found = at[table[others]]
        for i in range(n_bytes):
            space[found + i] = True
    return space


def first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The texts up to `max_bytes` of UTF-8; the last one is cut there."""
    left = max_bytes
    for text in texts:
        raw = text.encode()
        yield text if len(raw) <= left else raw[:left].decode(errors="ignore")
        left -= len(raw)
        if left <= 0:
            return


# --- sources to parts ----------------------------------------------------------------------------


def list_parts(
    sources: Sequence[str],
    report: CorpusReport | None = None,
    *,
    line_by_line: bool = False,
    skip_broken: bool = False,
) -> Iterator[Part]:
    """The parts of a corpus, lazily; `UserError` for a source that is missing or holds no text.

    `report.other_files` counts the files that were met and are not text. Of archives that are not
    compressed the headers are read here; damage among them is an error, or counted.
    """
    report = CorpusReport() if report is None else report
    for source in sources:
        listing = _Listing(source, line_by_line, skip_broken)
        found = False
        for part in listing.parts():
            found = True
            yield part
        report.add(listing.report)
        if not found:
            others = listing.report
            seen = f"{others.other_files.total():,} other files ({others._others()})"
            raise UserError(
                f"{source} holds no text: expected .txt, .md, .jsonl (or these as .gz, .zst, .xz),"
                " .parquet, .tar, .zip or files without suffix, found"
                f" {seen if others.other_files else others._broken() or 'no file'};"
                " text with another suffix is read when its file or a glob names it"
            )


class _Listing:
    """The parts of one source."""

    def __init__(self, source: str, line_by_line: bool, skip_broken: bool) -> None:
        self.source, self.line_by_line = source, line_by_line
        self.report = CorpusReport()
        self.reader = PartReader(Reading(skip_broken=skip_broken), self.report)

    def parts(self) -> Iterator[Part]:
        source = self.source
        scheme, colon, name = source.partition(":")
        path = str(Path(source).expanduser())
        if colon and scheme == "docs":
            if (name or "train") not in SPLITS:
                raise UserError(f"{source}: expected docs:train, docs:valid or docs:all")
            yield Part("docs", name or "train", source)
        elif colon and scheme == "hf":
            if not name:
                raise UserError(
                    "hf: needs the name of a dataset, such as hf:Skylion007/openwebtext"
                )
            yield Part("hf", name, source)
        elif os.path.isdir(path):  # noqa: PTH112
            root = path.rstrip("/") + "/"
            yield from self._cut(root, self._in_folder(root))
        elif os.path.exists(path):  # noqa: PTH110
            if not os.path.isfile(path):  # noqa: PTH113
                raise UserError(f"{source} is a pipe or a device: expected a file or a folder")
            if (kind := named_kind(path)) is None:
                raise UserError(f"{source} is not a text file; expected text, .jsonl or .parquet")
            yield from self._cut("", iter([(path, kind)]))
        elif glob.has_magic(source):
            yield from self._cut("", self._matches(path))
        elif "://" in source:
            raise UserError(
                f"{source}: text is not read from URLs: expected a file or folder of this machine,"
                " hf:NAME or docs:; fetch it first"
            )
        else:
            raise UserError(f"{source}: no such file or folder (nor a glob, hf:NAME or docs:)")

    # Paths and kinds of files, sorted.

    def _matches(self, pattern: str) -> Iterator[tuple[str, str]]:
        seen: set[str] = set()  # a/**/b may match a folder inside another match
        for path in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207
            is_folder = os.path.isdir(path)  # noqa: PTH112
            if is_folder and pattern.endswith("**"):
                continue  # its files match themselves
            if is_folder:
                files = self._in_folder(path.rstrip("/") + "/")
            elif os.path.isfile(path) and (kind := named_kind(path)):  # noqa: PTH113
                files = iter([(path, kind)])
            else:
                self.report.other_files[file_suffix(path)] += 1
                continue
            for file in files:
                if file[0] not in seen:
                    seen.add(file[0])
                    yield file

    def _in_folder(
        self, folder: str, above: frozenset[tuple[int, int]] = frozenset()
    ) -> Iterator[tuple[str, str]]:
        """Text files, tables and archives below `folder`, in the order of their sorted paths."""
        try:
            status = os.stat(folder)  # noqa: PTH116
            names = self._names_in(folder)
        except OSError as error:
            self.reader.count_broken(unreadable(folder, error))
            return
        if (status.st_dev, status.st_ino) in above:  # a link that leads back up
            return
        above |= {(status.st_dev, status.st_ino)}
        for name in names:
            path = folder + name
            if name.endswith("/"):
                yield from self._in_folder(path, above)
            elif kind := member_kind(name):
                yield path, kind
            else:
                self.report.other_files[file_suffix(name)] += 1

    def _names_in(self, folder: str) -> list[str]:
        """Files, and folders with a slash: "a.txt" comes before "a/b.txt"."""
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    is_dir, is_file = entry.is_dir(), entry.is_file()
                except OSError:  # a link to itself, or through a closed folder
                    is_dir = is_file = False
                if is_file or is_dir:
                    names.append(entry.name if is_file else entry.name + "/")
                    continue
                self.report.other_files[file_suffix(entry.name)] += 1  # a pipe, a link to nowhere
        return sorted(names)

    # Files to parts.

    def _cut(self, root: str, files: Iterator[tuple[str, str]]) -> Iterator[Part]:
        """Runs of text files, each other file by itself or in pieces; `root`: what paths share."""
        run: list[str] = []
        stamps, size = array("Q"), 0

        def close() -> Iterator[Part]:
            nonlocal stamps, size
            if run:
                yield Part("text", root, self.source, "\0".join(run), stamps, size, len(run))
                run.clear()
                stamps, size = array("Q"), 0

        for path, kind in files:
            try:
                status = os.stat(path)  # noqa: PTH116
            except OSError as error:
                self.reader.count_broken(unreadable(path, error))
                continue
            if kind == "text" and self.line_by_line and status.st_size > PIECE_BYTES:
                kind = "text" if split_suffix(path)[1] else "lines"
            if kind != "text":
                yield from close()
                yield from self._pieces(path, kind, status)
                continue
            if len(run) == RUN_FILES or size + status.st_size > RUN_BYTES:
                yield from close()
            run.append(path[len(root) :])
            stamps.append(file_stamp(status))
            size += status.st_size
        yield from close()

    def _pieces(self, path: str, kind: str, status: os.stat_result) -> Iterator[Part]:
        """The parts of one file that is no run."""
        stamps, size = array("Q", [file_stamp(status)]), status.st_size
        is_compressed = split_suffix(path)[1] is not None
        if kind in ("tar", "zip") and not is_compressed:
            pieces = (self._tar_runs if kind == "tar" else self._zip_runs)(path)
        elif kind in ("jsonl", "lines", "parquet") and size > PIECE_BYTES and not is_compressed:
            pieces = _row_groups(path, size) if kind == "parquet" else _byte_pieces(size)
        else:
            n_files = None if kind in ("tar", "zip", "stream") else 1
            pieces = iter([(0, None, size, n_files)])
        for start, stop, n_bytes, n_files in pieces:
            yield Part(kind, path, self.source, "", stamps, n_bytes, n_files, start, stop)

    def _tar_runs(self, path: str) -> Iterator["_Piece"]:
        """Runs of members; an archive inside is a run of its own."""
        # Hardly more than a header is read before the next seek.
        with Path(path).open("rb", buffering=4096) as file:
            tar = TarStream(file, path)
            sizes = ((m.header, m.end, m.name, m.size) for m in tar)
            yield from self._runs(sizes)
            self.report.other_files.update(tar.others)

    def _zip_runs(self, path: str) -> Iterator["_Piece"]:
        import zipfile

        try:
            with zipfile.ZipFile(path) as archive:
                members = enumerate(archive.infolist())
                sizes = ((i, i + 1, m.filename, m.file_size) for i, m in members)
                yield from self._runs(sizes)
        except ZIP_ERRORS as error:
            self.reader.count_broken(Broken(f"{path}: not a zip file that can be read ({error})"))

    def _runs(self, members: Iterator[tuple[int, int, str, int]]) -> Iterator["_Piece"]:
        """Runs of members, given as start, stop, name and bytes."""
        run: list[int] = []  # start, stop, bytes, files
        try:
            for start, stop, name, size in members:
                kind = None if is_hidden(name) else member_kind(name)
                is_archive = kind in ("tar", "zip", "stream")
                if run and (is_archive or run[3] == RUN_FILES or run[2] + size > RUN_BYTES):
                    yield tuple(run)
                    run = []
                if is_archive:
                    yield start, stop, size, None
                    continue
                run = run or [start, stop, 0, 0]
                run[1:] = stop, run[2] + size, run[3] + (kind is not None)
        except Broken as error:
            if run:
                yield tuple(run)
            self.reader.count_broken(error)
        else:
            if run:
                yield tuple(run)


_Piece = tuple[int, int | None, int, int | None]  # start, stop, bytes, files that begin in it


def _byte_pieces(size: int) -> Iterator[_Piece]:
    for start in range(0, size, PIECE_BYTES):
        stop = min(size, start + PIECE_BYTES)
        yield start, stop, stop - start, int(start == 0)


def _row_groups(path: str, size: int) -> Iterator[_Piece]:
    """Runs of a parquet file's row groups; the reader complains about a damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [
                file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)
            ]
    except (pa.ArrowException, OSError):
        yield 0, None, size, 1
        return
    start, n_bytes = 0, 0
    for i, group in enumerate(groups):
        n_bytes += group
        if n_bytes >= PIECE_BYTES or i == len(groups) - 1:
            yield start, i + 1, n_bytes, int(start == 0)
            start, n_bytes = i + 1, 0


# --- what a corpus is ----------------------------------------------------------------------------


def describe_sources(sources: str | Sequence[str], *, n_files: int | None = None) -> list[dict]:
    """What identifies the data of each source, for a cache's key and a manifest: JSON values."""
    return describe_parts(
        list_parts([sources] if isinstance(sources, str) else sources, skip_broken=True), n_files
    )


def describe_parts(parts: Iterable[Part], n_files: int | None = None) -> list[dict]:
    """`describe_sources` of parts that are listed already.

    Files: how many, their bytes, and one sha256 over every path (as given), size and time of
    change, so that millions of files need no million lines. docs: the packages' versions.
    """
    described = []
    for source, group in itertools.groupby(parts, lambda part: part.source):
        if n_files == 0:
            break
        digest, n, size = hashlib.sha256(), 0, 0
        for part in group:
            if part.kind == "docs":
                described.append({"source": source, "packages": package_versions()})
            elif part.kind == "hf":
                described.append({"source": source})
            elif n_files is None or n_files > 0 or part.n_files == 0:
                part = part if n_files is None else part.head(n_files)
                place = f"{part.kind}\0{part.name}\0{part.files}\0{part.start}\0{part.stop}\0"
                digest.update(place.encode(*BYTES) + part.stamps.tobytes())
                n, size = n + (part.n_files or 0), size + part.size
                n_files = None if n_files is None else max(0, n_files - (part.n_files or 0))
        if n or size:
            described.append(
                {"source": source, "files": n, "bytes": size, "sha256": digest.hexdigest()}
            )
    return described
