"""Documents as a deterministic stream, from anywhere text lies.

    folder | file | glob     text files (one document each), .jsonl, .parquet; .gz and .zst of them
    hf:NAME[:SPLIT]          a dataset of the Hugging Face hub or a local folder, streamed; also
                             hf:NAME:CONFIG:SPLIT
    docs:[train|valid|all]   the docstrings of the installed packages: text without a download

A corpus is a list of parts, in the order of the sources and of the sorted paths; each part can be
read on its own. Nothing is skipped silently: a `CorpusReport` counts what is not a document.
"""

import codecs
import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from .docstrings import SPLITS, cache_dir, hash_fraction, package_versions, read_docstrings
from .errors import UserError

__all__ = [
    "CorpusReport",
    "Part",
    "cache_dir",
    "describe_sources",
    "documents",
    "first_bytes",
    "hash_fraction",
    "list_parts",
    "no_document",
    "read_parts",
]

# What a folder is searched for; .json is left to the command line, as it is often configuration.
FOLDER_SUFFIXES = {"", ".txt", ".text", ".md", ".jsonl", ".ndjson", ".parquet"}
TABLES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# Never text, even when named on the command line or by a glob; any other suffix then is text.
BINARY_SUFFIXES = set(
    ".7z .arrow .bin .bmp .bz2 .gif .h5 .ico .jpeg .jpg .mp3 .mp4 .npy .npz .pdf .pkl .png .pt"
    " .pth .pyc .rar .safetensors .so .tar .tfrecord .tgz .txz .wav .webp .xz .zip".split()
)
BYTES = ("utf-8", "surrogateescape")  # arguments of encode and decode


@dataclass
class CorpusReport:
    """What a stream of documents has come to so far; filled while the stream is read."""

    files: int = 0
    documents: int = 0
    text_bytes: int = 0  # of the documents as UTF-8
    words: int = 0  # separated by white space
    line_ends: int = 0
    empty: int = 0  # files, rows or lines without anything but white space: no documents
    undecodable: int = 0  # documents in which bytes that are not UTF-8 became U+FFFD
    other_files: Counter[str] = field(default_factory=Counter)  # suffix -> files that are not text

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
        if self.undecodable:
            parts.append(f"{self.undecodable:,} with undecodable bytes (now U+FFFD)")
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

    def _others(self) -> str:
        named = [f"{suffix or 'no suffix'}: {n:,}" for suffix, n in self.other_files.most_common(5)]
        return ", ".join(named)


@dataclass(frozen=True)
class Part:
    """A piece of a corpus that can be read on its own: a file, a hub dataset or a docs: split."""

    kind: str  # text, jsonl, parquet, hf or docs
    name: str  # the file's path, or what follows the colon

    @property
    def is_file(self) -> bool:
        return self.kind not in ("hf", "docs")


def documents(
    sources: str | Sequence[str],
    *,
    n_files: int | None = None,
    line_by_line: bool = False,
    text_key: str = "text",
    report: CorpusReport | None = None,
) -> Iterator[str]:
    """The documents of `sources` in a fixed order: valid Unicode, never empty.

    A text file is one document (`line_by_line`: each of its lines), a row of a table has it in
    `text_key`. At most `n_files` files are read; where there are none (hf:, docs:) a document
    counts as a file. Sources that do not exist or hold no text are a `UserError` of this call;
    broken files, and a corpus without any document, are one while the stream is read.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    for source in sources:
        next(list_parts([source]))  # all sources are looked at before the first is read for hours
    report = CorpusReport() if report is None else report
    return _stream(sources, n_files, line_by_line, text_key, report)


def _stream(
    sources: Sequence[str],
    n_files: int | None,
    line_by_line: bool,
    text_key: str,
    report: CorpusReport,
) -> Iterator[str]:
    before = report.documents
    yield from read_parts(
        list_parts(sources, report),
        line_by_line=line_by_line,
        text_key=text_key,
        limit=n_files,
        report=report,
    )
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
    limit: int | None = None,
    report: CorpusReport,
) -> Iterator[str]:
    """The documents of some parts; at most `limit` files, or documents where there are none."""
    left = limit
    for part in parts:
        if left == 0:
            break
        report.files += part.is_file
        n_read = 0
        texts = _clean(READERS[part.kind](part.name, text_key, line_by_line), line_by_line, report)
        for text in itertools.islice(texts, None if part.is_file else left):
            n_read += 1
            yield text
        if left is not None:
            left -= 1 if part.is_file else n_read


def _clean(
    raw_texts: Iterator[str | None], line_by_line: bool, report: CorpusReport
) -> Iterator[str]:
    """Documents out of what a reader found, counted; lone surrogates stand for bad bytes."""
    if line_by_line:
        raw_texts = itertools.chain.from_iterable(map(_lines, raw_texts))
    for text in raw_texts:
        if not text or text.isspace():
            report.empty += 1
            continue
        try:
            n_bytes = len(text.encode())
        except UnicodeEncodeError:
            text = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
            n_bytes = len(text.encode())
            report.undecodable += 1
        report.documents += 1
        report.text_bytes += n_bytes
        report.words += count_words(text)
        report.line_ends += text.count("\n")
        yield text


# Runs of what `str.split` takes for white space are found in bytes, twice as fast as by splitting.
_ASCII_SPACE = bytes(0x20 if chr(byte).isspace() and byte < 128 else 0x78 for byte in range(256))
_OTHER_SPACE = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


def count_words(text: str) -> int:
    """len(text.split()) without the list."""
    if not text.isascii() and _OTHER_SPACE.search(text):
        return sum(1 for _ in _WORD.finditer(text))
    marks = text.encode().translate(_ASCII_SPACE)
    return marks.count(b" x") + marks.startswith(b"x")


_WORD = re.compile(r"\S+")


def _lines(text: str | None) -> list[str]:
    return [line.removesuffix("\r") for line in (text or "").removesuffix("\n").split("\n")]


def first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The texts up to `max_bytes` of UTF-8; the last one is cut there."""
    left = max_bytes
    for text in texts:
        raw = text.encode()
        yield text if len(raw) <= left else raw[:left].decode(errors="ignore")
        left -= len(raw)
        if left <= 0:
            return


# ---------------------------------------------------------------------------- sources to parts


def list_parts(sources: Sequence[str], report: CorpusReport | None = None) -> Iterator[Part]:
    """The parts of a corpus, lazily; `UserError` for a source that is missing or holds no text.

    `report.other_files` counts the files that were met and are not text.
    """
    for source in sources:
        other_files: Counter[str] = Counter()
        found = False
        for part in _parts(source, other_files):
            found = True
            yield part
        if report is not None:
            report.other_files += other_files
        if not found:
            others = CorpusReport(other_files=other_files)
            seen = f"{other_files.total():,} other files ({others._others()})"
            raise UserError(
                f"{source} holds no text: expected .txt, .md, .jsonl (or these as .gz, .zst),"
                f" .parquet or files without suffix, found {seen if other_files else 'no file'};"
                " text with another suffix is read when its file or a glob names it"
            )


def _parts(source: str, other_files: Counter[str]) -> Iterator[Part]:
    scheme, colon, name = source.partition(":")
    path = Path(source).expanduser()
    if colon and scheme == "docs":
        if (name or "train") not in SPLITS:
            raise UserError(f"{source}: expected docs:train, docs:valid or docs:all")
        yield Part("docs", name or "train")
    elif colon and scheme == "hf":
        if not name:
            raise UserError("hf: needs the name of a dataset, such as hf:Skylion007/openwebtext")
        yield Part("hf", name)
    elif path.is_dir():
        yield from _folder_parts(path, other_files)
    elif path.exists():
        if (kind := _kind(path)) is None:
            raise UserError(f"{source} is not a text file; expected text, .jsonl or .parquet")
        yield Part(kind, str(path))
    elif glob.has_magic(source):
        yield from _glob_parts(str(path), other_files)
    else:
        raise UserError(f"{source}: no such file or folder (nor a glob, hf:NAME or docs:)")


def _glob_parts(pattern: str, other_files: Counter[str]) -> Iterator[Part]:
    seen: set[Part] = set()  # a/**/b may match a folder inside another match
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):  # noqa: PTH207
        if path.is_dir() and pattern.endswith("**"):
            continue  # its files match themselves
        if path.is_dir():
            parts = _folder_parts(path, other_files)
        elif kind := _kind(path):
            parts = iter([Part(kind, str(path))])
        else:
            other_files[path.suffix.lower()] += 1
            continue
        for part in parts:
            if part not in seen:
                seen.add(part)
                yield part


def _folder_parts(
    folder: Path, other_files: Counter[str], above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[Part]:
    """Text files and tables below `folder`, in the order of their sorted paths."""
    status = folder.stat()
    above |= {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    # A folder sorts as its files' paths do: "a.txt" before "a/b.txt".
    for entry in sorted(visible, key=lambda e: e.name + "/" if e.is_dir() else e.name):
        path = Path(entry.path)
        if entry.is_dir():
            status = entry.stat()
            if (status.st_dev, status.st_ino) not in above:  # else a link that leads back up
                yield from _folder_parts(path, other_files, above)
        elif entry.is_file() and _inner_suffix(path) in FOLDER_SUFFIXES:
            yield Part(TABLES.get(_inner_suffix(path), "text"), str(path))
        else:
            other_files[path.suffix.lower()] += 1


def _inner_suffix(path: Path) -> str:
    """The suffix that tells the kind: of the file inside, where it is compressed."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def _kind(path: Path) -> str | None:
    """How to read a file that was named itself; None where it cannot be text."""
    suffix = _inner_suffix(path)
    return None if suffix in BINARY_SUFFIXES else TABLES.get(suffix, "text")


def describe_sources(sources: str | Sequence[str], *, n_files: int | None = None) -> list[dict]:
    """What identifies the data of each source, for a cache's key and a manifest: JSON values.

    Files: how many, their bytes, and one sha256 over every path (as given), size and time of
    change, so that millions of files need no million lines. docs: the packages' versions.
    """
    described = []
    for source in [sources] if isinstance(sources, str) else sources:
        if n_files == 0:
            break
        digest, n, size = hashlib.sha256(), 0, 0
        for part in itertools.islice(list_parts([source]), n_files):
            if part.is_file:
                stat = Path(part.name).stat()
                digest.update(f"{part.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(*BYTES))
                n, size = n + 1, size + stat.st_size
        if n:
            described.append(
                {"source": source, "files": n, "bytes": size, "sha256": digest.hexdigest()}
            )
            n_files = None if n_files is None else n_files - n
        elif part.kind == "docs":
            described.append({"source": source, "packages": package_versions()})
        else:
            described.append({"source": source})
    return described


# ---------------------------------------------------------------------------- reading one part
# Each reader yields the texts of a part. Bytes that are no UTF-8 come as lone surrogates (Python's
# "surrogateescape"), so that `_clean` alone decides about them.


def _read_text(path: str, text_key: str, line_by_line: bool) -> Iterator[str]:
    with _open(path) as file:
        lines = iter(file) if line_by_line else iter([file.read()])
        for raw in lines:
            yield raw.removeprefix(codecs.BOM_UTF8).decode(*BYTES)


def _read_jsonl(path: str, text_key: str, line_by_line: bool) -> Iterator[str | None]:
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            line = raw.removeprefix(codecs.BOM_UTF8).decode(*BYTES)
            try:
                row = json.loads(line) if not line.isspace() else {text_key: None}
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: expected a JSON object ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, got a {type(row).__name__}")
            yield _field(row, text_key, where)


def _read_parquet(path: str, text_key: str, line_by_line: bool) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_column(file.schema_arrow.names, text_key, path)
            column_type = file.schema_arrow.field(text_key).type
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                # As bytes: parquet does not vouch for its strings.
                for raw in column.cast(pa.large_binary()).to_pylist():
                    yield None if raw is None else raw.decode(*BYTES)
    except pa.ArrowNotImplementedError:
        raise UserError(f"{path}: column {text_key!r} holds {column_type}, not text") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file that can be read ({error})") from None


def _read_hub(name: str, text_key: str, line_by_line: bool) -> Iterator[str | None]:
    import datasets

    # NAME, NAME:SPLIT or NAME:CONFIG:SPLIT
    dataset, *rest = [name] if Path(name).exists() else name.split(":")
    split = rest.pop() if rest else "train"
    try:
        rows = datasets.load_dataset(dataset, *rest, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield _field(row, text_key, f"hf:{name}, row {number}")
    except UserError:
        raise
    except Exception as error:  # the hub, its HTTP client and each builder have their own
        raise UserError(f"hf:{name}: {type(error).__name__}: {error}") from None


def _field(row: dict[str, object], text_key: str, where: str) -> str | None:
    _check_column(row, text_key, where)
    text = row[text_key]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: expected text in {text_key!r}, got a {type(text).__name__}")
    return text


def _check_column(names: Collection[str], text_key: str, where: str) -> None:
    if text_key not in names:
        raise UserError(f"{where}: no {text_key!r} (the text's key) among {', '.join(names)}")


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed; damaged compression is a `UserError` that names the file."""
    compression = COMPRESSIONS.get(Path(path).suffix.lower())
    if compression is None:
        with Path(path).open("rb") as file:
            yield file
        return
    import pyarrow as pa  # its zstd notices a file that was cut off; `zstandard` 0.25 does not

    try:
        with pa.input_stream(path, compression=compression) as stream:
            yield io.BufferedReader(stream)
    except OSError as error:
        raise UserError(f"{path}: cannot be decompressed ({error})") from None


READERS: dict[str, Callable[[str, str, bool], Iterator[str | None]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "hf": _read_hub,
    "docs": lambda split, text_key, line_by_line: read_docstrings(split),
}
