"""Archives as streams: decompression and members; nothing is written, no link is followed.

Only regular files are read: links, devices and folders of a tar are passed over. The name of a
member tells its kind by its suffix and is never opened, so absolute paths and ".." are harmless.
Anything damaged or cut off is a `Broken` that says where; no archive ends early in silence.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from ..errors import describe
from ..system.parallel import TasksStopped
from . import decompression
from .parts import Broken

BLOCK = 512  # bytes; a tar consists of blocks
BUFFER_BYTES = 1 << 20  # read at once
MAX_NAME_BYTES = 1 << 20  # of a long name or a pax header; anything longer is damage
# Type flags of POSIX ustar, pax and GNU tar.
REGULAR, LONG_NAME, PAX, PASSED_OVER = b"0\0" + b"7", b"L", b"x", b"gXKVNM"
TYPE_NAMES = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"6": "pipe"}
# Exceptions of zipfile for an archive or member that is damaged, encrypted or of unknown method.
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError
)  # fmt: skip


# --- bytes ---------------------------------------------------------------------------------------


class _Readable(io.RawIOBase):
    def readable(self) -> bool:
        return True


class _Range(_Readable):
    """The bytes [start, stop) of a file."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        self._file, self._left = file, stop - start
        file.seek(start)

    def readinto(self, buffer: memoryview) -> int:
        n = self._file.readinto(memoryview(buffer)[: min(len(buffer), self._left)])
        self._left -= n
        return n


class _Prefixed(_Readable):
    """Bytes that were read ahead, then the rest of their stream."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head, self._stream = head, stream

    def readinto(self, buffer: memoryview) -> int:
        if not self._head:
            return self._stream.readinto1(buffer)  # not more: damage may come next
        n = min(len(self._head), len(buffer))
        buffer[:n], self._head = self._head[:n], self._head[n:]
        return n


class _Process:
    """An .xz that another process decompresses, ahead of its reader (decompression.py).

    A thread would wait for Python's lock, longest while a tokenizer is loaded.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._name = file.name
        command = [sys.executable, "-I", "-S", decompression.__file__]
        self._process = subprocess.Popen(
            command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
            pipesize=BUFFER_BYTES,
        )  # fmt: skip

    def read(self, n: int) -> bytes:
        """Up to `n` bytes; empty at the end.

        Raises:
            EOFError: the file is damaged or cut off.
            TasksStopped: the process was killed or ran out of memory; the file may be good.
        """
        content = self._process.stdout.read(n)
        if not content and (code := self._process.wait()):
            if code != decompression.DAMAGED:
                raise TasksStopped(
                    f"the process that decompresses {self._name} was killed or failed (out of"
                    " memory?): finished tasks are kept; repeat the command"
                )
            raise EOFError(self._process.stderr.read().decode(errors="replace").strip())
        return content

    def close(self) -> None:
        """Stop the process, finished or not."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()


class _Decompressed(_Readable):
    """The bytes of a decompressor; its errors become `Broken`."""

    def __init__(self, stream: Any, where: str) -> None:
        self._stream, self._where, self._broken = stream, where, ""

    def readinto(self, buffer: memoryview) -> int:
        if self._broken:  # again, for a reader that looked ahead
            raise Broken(self._broken)
        try:
            content = self._stream.read(len(buffer))
        except decompression.ERRORS as error:
            if isinstance(error, OSError) and error.errno:  # of the disk, not of the data
                raise
            reason = describe(error)
            self._broken = f"{self._where}: cannot be decompressed ({reason})"
            raise Broken(self._broken) from None
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if isinstance(self._stream, _Process):
            self._stream.close()
        super().close()


def byte_range(file: BinaryIO, start: int, stop: int) -> BinaryIO:
    """The bytes [start, stop) of a seekable file as a stream."""
    return io.BufferedReader(_Range(file, start, stop), BUFFER_BYTES)


def look_ahead(stream: BinaryIO, n: int) -> tuple[bytes, BinaryIO]:
    """The first `n` bytes of a stream, fewer before damage, and the stream with them."""
    head = b""
    with contextlib.suppress(Broken):  # which the stream raises again
        while len(head) < n and (content := stream.read1(n - len(head))):
            head += content
    return head, io.BufferedReader(_Prefixed(head, stream), BUFFER_BYTES)


def decompressed(
    file: BinaryIO, compression: str | None, where: str, *, is_whole: bool = False
) -> BinaryIO:
    """`file` decompressed (None: as it is); damaged or cut off, it raises `Broken`.

    Args:
        is_whole: `file` is a file on disk that nobody else reads, so that a process may.
    """
    if compression is None:
        return file
    in_process = is_whole and compression == "xz"
    stream = _Process(file) if in_process else decompression.DecompressedStream(file, compression)
    return io.BufferedReader(_Decompressed(stream, where), BUFFER_BYTES)


def open_zip(file: str | BinaryIO, where: str) -> zipfile.ZipFile:
    """A zip file with its list of members; `Broken` if the list is damaged."""
    try:
        return zipfile.ZipFile(file)
    except ZIP_ERRORS as error:
        raise Broken(f"{where}: not a zip file that can be read ({error})") from None


# --- tar -----------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A regular file in a tar: `header` and `start` are bytes from the start of the stream."""

    name: str
    header: int  # where its first header lies
    start: int  # where its content lies
    size: int  # bytes of it
    end: int  # where the next member's header lies


def is_tar_header(block: bytes) -> bool:
    """True if 512 bytes are the header of a tar's member: their checksum says so."""
    if len(block) < BLOCK or not block[0]:
        return False
    try:
        return _number(block[148:156]) == _checksum(block)
    except ValueError:
        return False


def _checksum(block: bytes) -> int:
    # The sum of all bytes, with blanks in the checksum. Without zeros it takes a third of the time.
    return sum(block.translate(None, b"\0")) - sum(block[148:156]) + 8 * 32


def _number(field: bytes) -> int:
    """A number in octal digits, or in GNU's binary format; other bytes raise `ValueError`."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


class TarStream:
    """The regular members of a tar in order, from a stream or a seekable file.

    >>> tar = TarStream(stream, "a.tar")
    >>> for member in tar:
    ...     content = tar.read()  # or tar.open(), or nothing: then the content is passed over

    Reads on behind end-of-archive blocks, as archives are sometimes concatenated. Links and devices
    are counted in `others`.

    Raises:
        Broken: a damaged header, a member that is cut off, or no end-of-archive block.
    """

    def __init__(self, stream: BinaryIO, where: str, *, first: int = 0, is_cut: bool = False):
        """Args:
        first: position of the stream's first byte in the archive.
        is_cut: the stream is a run of whole members, without an end-of-archive block.
        """
        self._stream, self.where, self._is_cut = stream, where, is_cut
        self._position = first  # of the stream
        self._member: Member | None = None
        self._size: int | None = None  # of a stream that can seek
        if stream.seekable():
            start = stream.tell()
            self._size = first + stream.seek(0, os.SEEK_END) - start
            stream.seek(start)
        self.others: dict[str, int] = {}

    def __iter__(self) -> Iterator[Member]:
        ended = self._is_cut
        while True:
            header = self._position
            block = self._read(BLOCK)
            if not block and ended:
                return
            if len(block) < BLOCK:
                raise self._broken(header, "cut off")
            if not block[0] and not block.strip(b"\0"):
                ended = True
                continue
            ended = self._is_cut
            if (member := self._parse(block, header)) is not None:
                self._member = member
                yield member
                if self._position < member.end:
                    self._pass_over(member.end - self._position)

    def read(self) -> bytes:
        """The content of the current member."""
        member = self._member
        content = self._read(member.end - member.start)  # with the padding, in a single read
        if len(content) < member.size:
            raise self._broken(member.header, f"{member.name} is cut off")
        return content[: member.size]

    def open(self) -> BinaryIO:
        """The content of the current member as a stream."""
        return io.BufferedReader(_Content(self, self._member.size), BUFFER_BYTES)

    def _parse(self, block: bytes, header: int) -> Member | None:
        """The member that begins with `block`; None if it is not a regular file."""
        long_name, long_size = None, None
        while True:
            try:
                if _number(block[148:156]) != _checksum(block):
                    raise ValueError
                size = _number(block[124:136])
            except ValueError:
                raise self._broken(self._position - BLOCK, "no tar header") from None
            kind = block[156:157]
            if kind == LONG_NAME:
                long_name = self._read_extra(size).rstrip(b"\0")
            elif kind == PAX:
                long_name, long_size = _pax(self._read_extra(size), long_name)
            elif kind in PASSED_OVER:
                self._pass_over(-(-size // BLOCK) * BLOCK)
            else:
                break
            block = self._read(BLOCK)
            if len(block) < BLOCK:
                raise self._broken(header, "cut off")
        name = long_name or _name(block)
        is_folder = kind == b"5" or (kind in b"0\0" and name.endswith(b"/"))
        size = 0 if kind in TYPE_NAMES or is_folder else size if long_size is None else long_size
        start = self._position
        end = start + -(-size // BLOCK) * BLOCK
        if kind in REGULAR and not is_folder:
            return Member(name.decode("utf-8", "surrogateescape"), header, start, size, end)
        self._pass_over(end - start)
        if not is_folder:
            what = f"({TYPE_NAMES.get(kind, 'special file')})"
            self.others[what] = self.others.get(what, 0) + 1
        return None

    def _read_extra(self, size: int) -> bytes:
        if size > MAX_NAME_BYTES:
            raise self._broken(self._position - BLOCK, "a name of megabytes")
        content = self._read(-(-size // BLOCK) * BLOCK)
        return content[:size]

    def _read(self, n: int) -> bytes:
        content = self._stream.read(n)
        self._position += len(content)
        return content

    def _read1(self, n: int) -> bytes:
        content = self._stream.read1(n)  # what there is before damage
        self._position += len(content)
        return content

    def _pass_over(self, n: int) -> None:
        """Move on by `n` bytes: with a seek where the stream can."""
        if self._size is not None and n > BLOCK and self._position + n <= self._size:
            self._stream.seek(n, os.SEEK_CUR)
            self._position += n
            return
        while n > 0:
            content = self._read(min(n, BUFFER_BYTES))
            if not content:
                raise self._broken(self._position, "cut off")
            n -= len(content)

    def _broken(self, position: int, reason: str) -> Broken:
        return Broken(f"{self.where}, byte {position:,}: {reason}")


class _Content(_Readable):
    """The content of a tar's current member; `Broken` if it is cut off."""

    def __init__(self, tar: TarStream, size: int) -> None:
        self._tar, self._left = tar, size

    def readinto(self, buffer: memoryview) -> int:
        content = self._tar._read1(min(len(buffer), self._left))
        if not content and self._left and len(buffer):
            raise self._tar._broken(self._tar._position, "cut off")
        buffer[: len(content)] = content
        self._left -= len(content)
        return len(content)


def _name(block: bytes) -> bytes:
    name, prefix = block[:100].split(b"\0", 1)[0], b""
    if block[257:263] == b"ustar\0":  # GNU's own format keeps times there
        prefix = block[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix else name


def _pax(content: bytes, name: bytes | None) -> tuple[bytes | None, int | None]:
    """Path and size of a pax header, "LENGTH KEY=VALUE\\n" each."""
    size = None
    while match := re.match(rb"(\d{1,9}) ([^=]+)=", content):
        value = content[match.end() : int(match[1]) - 1]
        if match[2] == b"path":
            name = value
        elif match[2] == b"size" and value.isdigit():
            size = int(value)
        content = content[max(match.end(), int(match[1])) :]
    return name, size
