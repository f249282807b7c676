"""The terms of listing and reading a corpus: parts, reading options, counts, kinds of files.

A part can be sent to another process and read there on its own: a run of small files, a piece of a
large file, an archive or a run of its members. Where parts are cut depends on the files alone.
"""

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UserError
from .words import count_line_ends, count_words

BYTES = ("utf-8", "surrogateescape")  # arguments of encode and decode
SKIP_HINT = "; --skip_broken leaves it out and counts it"
MAX_BROKEN = 1000  # messages about damage that are kept


class Broken(Exception):
    """Something is damaged or cut off; the message names file and byte."""


class BrokenInput(UserError):
    """Input is damaged or cut off: the same command with --skip_broken continues."""


class ChangedInput(UserError):
    """A file has changed since it was listed: the same command lists the files again."""


def unreadable(path: str, error: OSError) -> Broken:
    """A file that cannot be read, as damage; a missing file raises its `FileNotFoundError`."""
    if isinstance(error, FileNotFoundError):
        raise error
    return Broken(f"{path}: cannot be read ({error.strerror or error})")


@dataclass(frozen=True)
class Reading:
    """The options of reading; which text becomes a document."""

    text_key: str | None = "text"  # key of the text in tables; None: the row itself, as JSON
    line_by_line: bool = False  # each line is a document
    min_length: int = 0  # characters; shorter documents are left out
    skip_broken: bool = False  # leave out and count damaged input instead of stopping
    is_sample: bool = False  # only the first documents are wanted
    document_mark: str | None = None  # cuts documents; neither it nor its line is text
    end_of_text: str | None = None  # of the tokenizer: counted where a text has it, and data


@dataclass
class CorpusCounts:
    """Counts of a corpus, read and left out; filled while documents are read."""

    files: int = 0
    documents: int = 0
    text_bytes: int = 0  # of the documents as UTF-8
    words: int = 0  # separated by white space
    line_ends: int = 0
    empty: int = 0  # files, rows and lines of white space alone: no documents
    short: int = 0  # documents of fewer characters than the minimum, left out
    undecodable: int = 0  # documents in which bytes that are not UTF-8 became U+FFFD
    end_marks: int = 0  # literal end-of-text marks in the documents
    n_broken: int = 0  # damaged files, members and lines, left out
    broken: list[str] = field(default_factory=list)  # the first thousand: where, and what
    other_files: dict[str, int] = field(default_factory=dict)  # suffix -> files that are not text

    def add_texts(self, texts: Sequence[bytes], end_of_text: str | None = None) -> None:
        """Count documents, given as UTF-8; many together, as numpy's calls cost by the call."""
        joined = b"\n".join(texts)
        self.documents += len(texts)
        self.text_bytes += len(joined) - (len(texts) - 1)
        self.words += count_words(joined)
        self.line_ends += count_line_ends(joined) - (len(texts) - 1)
        self.end_marks += joined.count(end_of_text.encode()) if end_of_text else 0

    def add_other(self, suffix: str) -> None:
        """Count a file that is not text."""
        self.other_files[suffix] = self.other_files.get(suffix, 0) + 1

    def add_broken(self, error: Broken, reading: Reading) -> None:
        """Count damage; without `skip_broken` it is a `BrokenInput`."""
        if not reading.skip_broken:
            raise BrokenInput(f"{error}{SKIP_HINT}") from None
        self.n_broken += 1
        if len(self.broken) < MAX_BROKEN:
            self.broken.append(str(error))

    def add(self, counts: "CorpusCounts | dict[str, Any]") -> None:
        """Add the counts of another stream, or their `asdict`."""
        values = counts if isinstance(counts, dict) else vars(counts)
        for name in (field_.name for field_ in fields(self) if field_.name != "other_files"):
            setattr(self, name, getattr(self, name) + values[name])
        for suffix, n in values["other_files"].items():
            self.other_files[suffix] = self.other_files.get(suffix, 0) + n

    def __str__(self) -> str:
        """One line for people."""
        others = sum(self.other_files.values())
        pieces = [
            (self.files, f"{self.files:,} files"),
            (1, f"{self.documents:,} documents"),
            (1, f"{self.text_bytes / 1e6:,.1f} MB of text"),
            (1, f"{self.words:,} words"),
            (self.empty, f"{self.empty:,} empty documents left out"),
            (self.short, f"{self.short:,} short documents left out"),
            (self.undecodable, f"{self.undecodable:,} with undecodable bytes (now U+FFFD)"),
            (self.n_broken, f"{self.n_broken:,} broken inputs left out ({self.broken_names()})"),
            (others, f"{others:,} other files not read ({self.other_suffixes()})"),
        ]
        return ", ".join(text for n, text in pieces if n)

    def broken_names(self) -> str:
        """The first three messages about damage."""
        return "; ".join(self.broken[:3]) + ("; ..." if self.n_broken > 3 else "")

    def other_suffixes(self) -> str:
        """The five most frequent suffixes of files that are not text, with their numbers."""
        suffixes = sorted(self.other_files.items(), key=lambda item: -item[1])
        return ", ".join(f"{suffix or 'no suffix'}: {n:,}" for suffix, n in suffixes[:5])


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a corpus that can be read on its own.

    kind: `text`, a run of text files; `lines`, `jsonl`, `parquet`, `tar`, `zip`, `stream` (a tar or
    text, compressed): a file or a piece of a file; `hf`, `docs`: the source that `name` says.
    """

    kind: str
    name: str  # path of the file, folder of a run, or the source behind "hf:" and "docs:"
    source: str = ""  # as the user gave it
    files: str = ""  # of a run: paths below `name`, joined by NUL (a fifth of a tuple's memory)
    stamps: array = field(default_factory=lambda: array("Q"))  # `file_stamp` of each file
    size: int = 0  # bytes on disk
    n_files: int | None = None  # files that begin in this part; None: known when it is read
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


# --- kinds of files, by their names --------------------------------------------------------------

# Text in folders and archives. Not .json, often configuration: it is read if the user names it.
FOLDER_SUFFIXES = {"", ".txt", ".text", ".md", ".jsonl", ".ndjson", ".parquet", ".tar", ".zip"}
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet",
    ".tar": "tar", ".zip": "zip",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz", ".xsz": "xz"}
SHORT_SUFFIXES = {".tgz": ".gz", ".tzst": ".zst", ".tbz2": ".bz2", ".txz": ".xz"}  # of tars
COMPRESSED = COMPRESSIONS.keys() | SHORT_SUFFIXES.keys()
# Never text, even when named on the command line or by a glob; any other suffix then is text.
BINARY_SUFFIXES = set(
    ".7z .arrow .bin .bmp .gif .h5 .ico .jpeg .jpg .mp3 .mp4 .npy .npz .pdf .pkl .png .pt .pth .pyc"
    " .rar .safetensors .so .tfrecord .wav .webp".split()
)


# Files of this project that look like text, each with the file that lies beside it.
OWN_FILES = {
    "merges.txt": "vocab.json", "metrics.jsonl": "run.json", "samples.jsonl": "run.json",
    "README.md": "model.safetensors",
}  # fmt: skip
# Of a folder that `datasets` saved with `save_to_disk`.
SAVED_DATASET = ("state.json", "dataset_dict.json")


def is_own_file(path: str) -> bool:
    """True for a tokenizer's merges, a run's metrics and samples, and a model's card."""
    folder, name = os.path.split(path)
    beside = OWN_FILES.get(name)
    return beside is not None and os.path.isfile(os.path.join(folder, beside))  # noqa: PTH113, PTH118


def saved_dataset(folder: str) -> str | None:
    """The file that marks a folder of `save_to_disk`; None for any other folder."""
    paths = [os.path.join(folder, name) for name in SAVED_DATASET]  # noqa: PTH118
    return next(filter(os.path.isfile, paths), None)


def split_suffix(name: str) -> tuple[str, str | None]:
    """The suffix that tells the kind, without that of a compression; and the compression."""
    suffix = file_suffix(name)
    if suffix in SHORT_SUFFIXES:
        return ".tar", COMPRESSIONS[SHORT_SUFFIXES[suffix]]
    if suffix in COMPRESSIONS:
        return file_suffix(name[: -len(suffix)]), COMPRESSIONS[suffix]
    return suffix, None


def file_suffix(name: str) -> str:
    """ ".txt" of "a/b.TXT"; an eighth of the time of a Path, and there are millions of names."""
    dot = name.rfind(".")
    suffix = name[dot:].lower() if dot > name.rfind("/") + 1 else ""
    return "" if suffix == "." or " " in suffix else suffix  # "U.S. history" has none


def member_kind(name: str) -> str | None:
    """How to read a file of a folder or an archive; None: not text by its name.

    "stream": compressed, and only its bytes tell whether it is a tar or text.
    """
    if name.endswith(".txt"):  # most are
        return "text"
    suffix, compression = split_suffix(name)
    if suffix not in FOLDER_SUFFIXES:
        return None
    return KINDS.get(suffix) or ("stream" if compression and not suffix else "text")


def named_kind(name: str) -> str | None:
    """How to read a file that the user named; None: it cannot be text."""
    suffix, compression = split_suffix(name)
    if suffix in BINARY_SUFFIXES:
        return None
    return member_kind(name) or KINDS.get(suffix) or ("stream" if compression else "text")


def is_hidden(name: str) -> bool:
    """True if the name of a member, or of a folder on its path, starts with a dot."""
    if not name.startswith(".") and "/." not in name:
        return False
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def file_stamp(status: os.stat_result) -> int:
    """64 bits of a file's size and time of change."""
    return (status.st_mtime_ns + status.st_size * 0x9E3779B97F4A7C15) & (2**64 - 1)
