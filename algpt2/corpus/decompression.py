"""Decompression of gzip, bzip2, xz and zstd, all alike: whatever comes before damage is read.

As a script it decompresses xz in a process of its own: `python decompression.py < FILE.xz`.

The script decompresses while its reader is busy, up to `AHEAD_CHUNKS` chunks of `CHUNK_BYTES`
ahead. It needs only the standard library.
"""

import bz2
import lzma
import os
import queue
import signal
import sys
import threading
import zlib
from typing import Any, BinaryIO

CHUNK_BYTES, AHEAD_CHUNKS = 1 << 20, 64
# A decompressor that finds damage drops what it made in that call: calls are small.
INPUT_BYTES, OUTPUT_BYTES = 1 << 14, 1 << 18
DAMAGED, FAILED = 1, 2  # exit codes: the input's fault, or this process's (out of memory)


class _Gzip:
    """zlib's decompressor with the methods of those of bz2 and lzma."""

    def __init__(self) -> None:
        self._zlib, self.needs_input = zlib.decompressobj(31), True

    def decompress(self, content: bytes, n: int) -> bytes:
        output = self._zlib.decompress(self._zlib.unconsumed_tail + content, n)
        self.needs_input = len(output) < n
        return output

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


class _Zstd:
    """The same for zstd, with windows of up to 2 GiB (zstd --long=31)."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        self._zstd = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

    def decompress(self, content: bytes, n: int) -> bytes:
        import zstandard

        try:
            return self._zstd.decompress(content)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None

    @property
    def eof(self) -> bool:
        return self._zstd.eof

    @property
    def unused_data(self) -> bytes:
        return self._zstd.unused_data


DECOMPRESSORS = {
    "gzip": _Gzip, "bz2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor, "zstd": _Zstd,
}  # fmt: skip
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of damage; OSError with errno: of a disk


class DecompressedStream:
    """Concatenated streams, with zeros between and behind them, as a single stream.

    Raises (while it is read, and behind all that comes before):
        EOFError and the decompressors' `ERRORS`: empty, cut off, or damaged.
    """

    def __init__(self, file: BinaryIO, compression: str) -> None:
        self._file, self._rest, self._is_first = file, b"", True
        self._new = DECOMPRESSORS[compression]
        self._decompressor: Any = None
        self._ready = b""  # zstd gives more than it was asked for

    def read(self, n: int) -> bytes:
        """Up to `n` bytes; empty at the end."""
        if not self._ready:
            self._ready = self._next(min(n, OUTPUT_BYTES))
        content, self._ready = self._ready[:n], self._ready[n:]
        return content

    def _next(self, n: int) -> bytes:
        while True:
            if self._decompressor is None and not self._start_stream():
                return b""
            if self._decompressor.needs_input and not self._rest:
                self._rest = self._file.read(INPUT_BYTES)
                if not self._rest:
                    raise EOFError("it is cut off")
            content = self._decompressor.decompress(self._rest, n)
            self._rest = b""
            if self._decompressor.eof:
                self._rest = self._decompressor.unused_data
                self._decompressor = None
            if content:
                return content

    def _start_stream(self) -> bool:
        """Pass over padding; False at the end of the file."""
        self._rest = self._rest.lstrip(b"\0")
        while not self._rest:
            content = self._file.read(INPUT_BYTES)
            if not content:
                if self._is_first:
                    raise EOFError("it is empty")
                return False
            self._rest = content.lstrip(b"\0")
        self._is_first = False
        self._decompressor = self._new()
        return True


def main() -> None:
    """Decompress standard input to standard output; an error goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the reader answers Ctrl-C
    chunks: queue.Queue[bytes | Exception] = queue.Queue(AHEAD_CHUNKS)
    stream = DecompressedStream(sys.stdin.buffer, "xz")

    def work() -> None:
        chunk: bytes | Exception = b"-"
        while chunk and not isinstance(chunk, Exception):
            try:
                chunk = stream.read(CHUNK_BYTES)
            except Exception as error:
                chunk = error
            chunks.put(chunk)

    threading.Thread(target=work, daemon=True).start()
    try:
        while chunk := chunks.get():
            if isinstance(chunk, Exception):
                print(str(chunk) or type(chunk).__name__, file=sys.stderr)
                is_input = isinstance(chunk, ERRORS)
                sys.exit(DAMAGED if is_input else FAILED)
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    except BrokenPipeError:  # nobody reads any more
        os._exit(0)


if __name__ == "__main__":
    main()
