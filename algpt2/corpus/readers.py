"""Reading a part of a corpus: raw texts out of files, tables and archives.

A raw text is bytes that should be UTF-8, or a string that may hold lone surrogates, or None where a
row has no text; documents.py makes documents of them. If a file changed since it was listed, the
reader stops: the shards would match no version of the text.
"""

import codecs
import contextlib
import functools
import io
import json
import os
import re
import stat
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from .archives import (
    BLOCK,
    BUFFER_BYTES,
    ZIP_ERRORS,
    TarStream,
    byte_range,
    decompressed,
    is_tar_header,
    look_ahead,
    open_zip,
)
from .docstrings import read_docstrings
from .parts import (
    BYTES,
    COMPRESSED,
    Broken,
    ChangedInput,
    CorpusCounts,
    Part,
    Reading,
    file_stamp,
    file_suffix,
    is_hidden,
    member_kind,
    saved_dataset,
    split_suffix,
    unreadable,
)
from .words import unix_line_ends

SMALL_BYTES = 1 << 16  # a file is read with one call up to this size
LONG_BYTES = 1 << 24  # a longer line of JSON is decoded in less memory
MAX_DEPTH = 4  # of archives in archives
HEAD_BYTES = 8000  # that tell text from other content; a NUL among them is git's rule for binary
# First bytes of content that is no UTF-8 text; UTF-32's mark begins with UTF-16's.
FORMATS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz", b"BZh91AY&SY": "bzip2", b"PK\3\4": "zip", b"PAR1": "parquet",
    b"%PDF-": "PDF",
}  # fmt: skip

RawTexts = Iterator[bytes | str | None]


class _LimitReached(Exception):
    pass


class PartReader:
    """Reads parts one after the other, at most `limit` files of them (None: all).

    Raises (while its texts are read):
        ChangedInput: a file changed or is gone.
        BrokenInput: damage, or a table or row without text, unless `reading.skip_broken` counts it.
    """

    def __init__(self, reading: Reading, counts: CorpusCounts, limit: int | None = None) -> None:
        self.reading, self.counts, self.left = reading, counts, limit

    def read(self, part: Part) -> RawTexts:
        """The raw texts of a part."""
        texts = getattr(self, f"_read_{part.kind}_part", self._read_file_part)(part)
        try:
            yield from self._guarded(texts)
        except _LimitReached:
            return
        except FileNotFoundError as error:
            raise _changed(error.filename or part.name, "it is gone") from None

    def _begin_file(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise _LimitReached
            self.left -= 1
        self.counts.files += 1

    def _guarded(self, texts: RawTexts) -> RawTexts:
        """The texts up to the place of damage, which is counted or stops the command."""
        try:
            yield from texts
        except Broken as error:
            self.counts.add_broken(error, self.reading)

    # Files: each part is opened here.

    def _read_text_part(self, part: Part) -> RawTexts:
        for path, stamp in zip(part.paths, part.stamps, strict=True):
            is_compressed = not path.endswith(".txt") and file_suffix(path) in COMPRESSED
            if self.reading.line_by_line or is_compressed:
                yield from self._guarded(self._read_one(path, stamp, "text"))
            else:
                self._begin_file()
                try:
                    raw = _read_whole(path, stamp)
                except Broken as error:
                    self.counts.add_broken(error, self.reading)
                else:
                    yield from self._guarded(self._read_text(raw, path))

    def _read_file_part(self, part: Part) -> RawTexts:
        """A file in one piece: compressed, or small."""
        return self._read_one(part.name, part.stamps[0], part.kind)

    def _read_one(self, path: str, stamp: int, kind: str) -> RawTexts:
        with _unchanged(path, stamp) as file:
            is_whole = not self.reading.is_sample
            yield from self._read_stream(kind, file, path, path, is_whole=is_whole)

    def _read_lines_part(self, part: Part) -> RawTexts:
        with _unchanged(part.name, part.stamps[0]) as file:
            if not part.start:
                self._begin_file()
            head = file.read(HEAD_BYTES)
            file.seek(0)
            kind = self._text_kind(head, part.name)
            lines = _lines_between(file, part.start, part.stop)
            if kind == "jsonl":
                yield from self._read_rows(lines, part.name, part.start)
            else:
                yield from map(_plain, lines)

    def _read_jsonl_part(self, part: Part) -> RawTexts:
        if part.stop is None:
            yield from self._read_file_part(part)
            return
        with _unchanged(part.name, part.stamps[0]) as file:
            if not part.start:
                self._begin_file()
            lines = _lines_between(file, part.start, part.stop)
            yield from self._read_rows(lines, part.name, part.start)

    def _read_parquet_part(self, part: Part) -> RawTexts:
        if not part.start:
            self._begin_file()
        with _unchanged(part.name, part.stamps[0]):
            yield from self._read_table(part.name, part.name, part.start, part.stop)

    def _read_tar_part(self, part: Part) -> RawTexts:
        if part.stop is None:
            yield from self._read_file_part(part)
            return
        with _unchanged(part.name, part.stamps[0]) as file:
            run = byte_range(file, part.start, part.stop)
            tar = TarStream(run, part.name, first=part.start, is_cut=True)
            yield from self._read_members(tar, 0)

    def _read_zip_part(self, part: Part) -> RawTexts:
        with _unchanged(part.name, part.stamps[0]):
            archive = _zip_file(part.name, part.stamps[0])
            members = archive.infolist()[part.start : part.stop]
            yield from self._read_zip(archive, members, part.name, 0)

    def _read_docs_part(self, part: Part) -> RawTexts:
        return read_docstrings(part.name)

    def _read_hf_part(self, part: Part) -> RawTexts:
        import datasets

        # NAME, NAME:SPLIT or NAME:CONFIG:SPLIT
        name = part.name
        dataset, *rest = [name] if Path(name).exists() else name.split(":")
        split = rest.pop() if rest else "train"
        try:
            if saved_dataset(dataset):
                rows = datasets.load_from_disk(dataset)
                rows = rows[split] if isinstance(rows, dict) else rows
            else:
                rows = datasets.load_dataset(dataset, *rest, split=split, streaming=True)
            for number, row in enumerate(rows):
                try:
                    text = _field(row, self.reading.text_key, f"hf:{name}, row {number}")
                except Broken as error:
                    self.counts.add_broken(error, self.reading)
                else:
                    yield text
        except UserError:
            raise
        except Exception as error:  # the hub, its HTTP client and each builder raise their own
            raise UserError(f"hf:{name}: {type(error).__name__}: {error}") from None

    # Streams: files and members alike.

    def _read_stream(
        self, kind: str, file: BinaryIO, name: str, where: str, depth: int = 0, *,
        is_whole: bool = False,
    ) -> RawTexts:  # fmt: skip
        """The texts in `file`, decompressed if its name says so.

        Args:
            depth: of archives in archives.
            is_whole: `file` is a file on disk that is read to its end, by nobody else.
        """
        stream = decompressed(file, split_suffix(name)[1], where, is_whole=is_whole)
        if kind == "stream":
            head, stream = look_ahead(stream, BLOCK)
            kind = "tar" if is_tar_header(head) else "text"
        if kind in ("tar", "zip") and depth >= MAX_DEPTH:
            raise Broken(f"{where}: more than {MAX_DEPTH} archives in one another")
        if kind == "tar":
            tar = TarStream(stream, where)
            try:
                yield from self._read_members(tar, depth + 1)
            finally:
                self.counts.add(CorpusCounts(other_files=tar.others))
        elif kind == "zip":
            archive = open_zip(io.BytesIO(stream.read()), where)
            yield from self._read_zip(archive, archive.infolist(), where, depth + 1)
        else:
            self._begin_file()
            if kind == "parquet":
                yield from self._read_table(io.BytesIO(stream.read()), where)
                return
            head, stream = look_ahead(stream, HEAD_BYTES)
            if "jsonl" in (self._text_kind(head, where), kind):
                yield from self._read_rows(stream, where)
            elif self.reading.line_by_line:
                yield from map(_plain, stream)
            else:
                yield _plain(stream.read())

    def _read_text(self, raw: bytes, where: str) -> RawTexts:
        """A text in memory: a document, or the rows of JSON lines."""
        if self._text_kind(raw[:HEAD_BYTES], where) == "jsonl":
            yield from self._read_rows(io.BytesIO(raw), where)
        else:
            yield _plain(raw)

    def _text_kind(self, head: bytes, where: str) -> str:
        """What text is by its first bytes, whatever its name: `text`, or `jsonl`.

        JSON lines begin with an object that has the text's key, or with two objects.
        """
        found = next((FORMATS[mark] for mark in FORMATS if head.startswith(mark)), None)
        if found is None and b"\0" in head:
            found = "binary data, or UTF-16 without a mark (NUL bytes)"
        if found:
            raise Broken(f"{where}: expected UTF-8 text, found {found}: convert or rename it")
        head = _plain(head)
        if not head.startswith(b"{"):
            return "text"
        first, line_end, rest = head.partition(b"\n")
        if not line_end and len(head) > HEAD_BYTES // 2:  # the line is cut
            return "jsonl" if re.match(rb'\{ *"', first) else "text"
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(first)
            if self.reading.text_key in row or rest.lstrip().startswith(b"{"):
                return "jsonl"
        return "text"

    def _read_members(self, tar: TarStream, depth: int) -> RawTexts:
        for member in tar:
            name = member.name
            kind = self._member_kind(name)
            if kind == "text" and not self.reading.line_by_line and name.endswith(".txt"):
                self._begin_file()
                raw = tar.read()
                where = f"{tar.where}, byte {member.header:,}: {name}"
                yield from self._guarded(self._read_text(raw, where))
            elif kind is not None:
                where = f"{tar.where}, byte {member.header:,}: {name}"
                yield from self._guarded(self._read_stream(kind, tar.open(), name, where, depth))

    def _read_zip(
        self, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], path: str, depth: int
    ) -> RawTexts:
        for member in members:
            if stat.S_ISLNK(member.external_attr >> 16):
                self.counts.add_other("(link)")
                continue
            if member.is_dir() or (kind := self._member_kind(member.filename)) is None:
                continue
            where = f"{path}, byte {member.header_offset:,}: {member.filename}"
            yield from self._guarded(self._read_zip_member(archive, member, kind, where, depth))

    def _read_zip_member(
        self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, kind: str, where: str, depth: int
    ) -> RawTexts:
        try:
            content = io.BytesIO(archive.read(member))
        except ZIP_ERRORS as error:
            raise Broken(f"{where}: {error}") from None
        yield from self._read_stream(kind, content, member.filename, where, depth)

    def _member_kind(self, name: str) -> str | None:
        if is_hidden(name):
            return None
        kind = member_kind(name)
        if kind is None:
            self.counts.add_other(file_suffix(name))
        return kind

    def _read_rows(self, lines: Iterator[bytes], where: str, start: int = 0) -> RawTexts:
        """The texts of lines of JSON; the first line begins at byte `start` of the file."""
        number, position = 0, start
        for raw in _split_at_returns(lines):
            number += 1
            at = f"{where}, byte {position:,}" if start else f"{where}, line {number}"
            position += len(raw)
            raw, encoding = raw.removeprefix(codecs.BOM_UTF8), BYTES
            if len(raw) > LONG_BYTES:
                # In a string with an emoji each character takes four bytes; as latin-1, one.
                raw, encoding = _unescaped(raw), ("latin-1",)
            key = (self.reading.text_key or "").encode(*BYTES).decode(*encoding)
            line, raw = raw.decode(*encoding), b""
            try:
                row = json.loads(line) if not line.isspace() else {key: None}
                if not isinstance(row, dict):
                    raise ValueError(f"got a {type(row).__name__}")
                if self.reading.text_key is not None:
                    _field(row, key, at)
            except (ValueError, RecursionError) as error:
                broken = Broken(f"{at}: expected a JSON object, {error}")
                self.counts.add_broken(broken, self.reading)
                continue
            except Broken as error:  # of this row alone
                self.counts.add_broken(error, self.reading)
                continue
            if self.reading.text_key is None and not line.isspace():
                yield line.encode(*encoding)
                continue
            line = ""  # of gigabytes, perhaps
            text = row.pop(key)
            yield text if encoding is BYTES or text is None else text.encode(*encoding)
        self.counts.empty += not start and not number  # a table without a row

    def _read_table(
        self, source: str | BinaryIO, where: str, start: int = 0, stop: int | None = None
    ) -> RawTexts:
        """The texts of the row groups [start, stop) of a parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        key = self.reading.text_key
        try:
            with pq.ParquetFile(source, page_checksum_verification=True) as file:
                _check_column(file.schema_arrow.names, key, where)
                column_type = file.schema_arrow.field(key).type
                groups = list(range(file.num_row_groups))[start:stop]
                for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[key]):
                    column = batch.column(0)
                    if pa.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    # As bytes: parquet does not check that its strings are UTF-8.
                    yield from column.cast(pa.large_binary()).to_pylist()
        except pa.ArrowNotImplementedError:
            raise Broken(f"{where}: column {key!r} holds {column_type}, not text") from None
        except (pa.ArrowException, OSError, KeyError, IndexError, ValueError) as error:
            raise Broken(f"{where}: not a parquet file that can be read ({error})") from None


# --- files and lines -----------------------------------------------------------------------------


@functools.lru_cache(1)  # its list of members is read once per process, not once per part
def _zip_file(path: str, stamp: int) -> zipfile.ZipFile:
    return open_zip(path, path)


def _read_whole(path: str, stamp: int) -> bytes:
    """A file's bytes in four system calls where it is small."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            content = os.read(descriptor, SMALL_BYTES)
            if len(content) == SMALL_BYTES:
                os.lseek(descriptor, 0, os.SEEK_SET)
                with io.FileIO(descriptor, closefd=False) as file:
                    content = file.readall()
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, error) from None
    if file_stamp(status) != stamp or len(content) != status.st_size:
        raise _changed(path, f"it has {status.st_size:,} bytes now")
    return content


@contextlib.contextmanager
def _unchanged(path: str, stamp: int) -> Iterator[BinaryIO]:
    """An open file; `ChangedInput` if it differs from the listed file before or after reading."""
    try:
        file = Path(path).open("rb", buffering=BUFFER_BYTES)
    except OSError as error:
        raise unreadable(path, error) from None
    with file:
        _check_stamp(os.fstat(file.fileno()), path, stamp)
        try:
            yield file
        except (Broken, OSError) as error:
            _check_stamp(os.stat(path), path, stamp)  # noqa: PTH116  (perhaps that is why)
            raise error if isinstance(error, Broken) else unreadable(path, error) from None
        _check_stamp(os.stat(path), path, stamp)  # noqa: PTH116


def _check_stamp(status: os.stat_result, path: str, stamp: int) -> None:
    if file_stamp(status) != stamp:
        raise _changed(path, f"it has {status.st_size:,} bytes now")


def _changed(path: str, what: str) -> ChangedInput:
    return ChangedInput(
        f"{path} has changed since the files were listed ({what}): leave the corpus as it is while"
        " it is read, and start again"
    )


def _plain(raw: bytes) -> bytes:
    """A text file's bytes without a byte-order mark, with the line ends of Unix."""
    return unix_line_ends(raw.removeprefix(codecs.BOM_UTF8))


def _split_at_returns(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Lines of JSON that end with \\n, also cut at every \\r: in a string it is escaped."""
    for line in lines:
        has_returns = line.find(b"\r", 0, -2) >= 0
        pieces = line.splitlines(keepends=True)[::-1] if has_returns else [line]
        del line
        while pieces:
            yield pieces.pop()  # the last reference to a line of gigabytes, perhaps


def _lines_between(file: BinaryIO, start: int, stop: int | None) -> Iterator[bytes]:
    """The lines that begin in the bytes [start, stop)."""
    position = start
    if start:
        file.seek(position := start - 1)
        while chunk := file.readline(BUFFER_BYTES):
            position += len(chunk)
            if chunk.endswith(b"\n"):
                break
            if stop is not None and position >= stop:  # within a line of an earlier piece
                return
    for line in file if stop is None or position < stop else ():
        yield line
        position += len(line)
        if stop is not None and position >= stop:
            return


def _unescaped(line: bytes) -> bytes:
    """A line of JSON with UTF-8 in the place of its \\u escapes; escapes of ASCII stay."""

    def replace(match: re.Match[bytes]) -> bytes:
        if match[0] == rb"\\":
            return match[0]
        text = json.loads(b'"%b"' % match[0])
        # A lone surrogate becomes a byte that is not UTF-8: later one U+FFFD, as without escapes.
        pieces = (b"\xff" if "\ud800" <= c <= "\udfff" else c.encode() for c in text)
        return b"".join(b"\\u%04x" % ord(p) if p < b"\x80" else p for p in pieces)

    return re.sub(rb"\\(?:\\|u[0-9a-fA-F]{4}(?:\\u[0-9a-fA-F]{4})*)", replace, line)


def _field(row: dict[str, object], text_key: str, where: str) -> str | None:
    _check_column(row, text_key, where)
    text = row[text_key]
    if text is not None and not isinstance(text, str):
        raise Broken(f"{where}: expected text in {text_key!r}, got a {type(text).__name__}")
    return text


def _check_column(names: Collection[str], text_key: str, where: str) -> None:
    n = sum(name == text_key for name in names)
    if n != 1:
        what = f"no {text_key!r}" if not n else f"{n} columns {text_key!r}"
        raise Broken(f"{where}: {what} (--text_key names another) among {', '.join(names)}")
