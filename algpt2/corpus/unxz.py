"""xz decompression; as a script, in a process of its own: `python unxz.py < FILE.xz`.

The script decompresses while its reader is busy, up to `AHEAD_CHUNKS` chunks of `CHUNK_BYTES`
ahead. It needs only the standard library.
"""

import lzma
import os
import queue
import signal
import sys
import threading
from typing import BinaryIO

CHUNK_BYTES, AHEAD_CHUNKS = 1 << 20, 64
DAMAGED, FAILED = 1, 2  # exit codes: the input's fault, or this process's (out of memory)


class XzStream:
    """Concatenated and padded xz streams as one stream; `lzma.LZMAFile` stops at the padding.

    Raises (while it is read):
        EOFError, lzma.LZMAError: cut off, or damaged.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._rest, self._is_first = file, b"", True
        self._decompressor: lzma.LZMADecompressor | None = None

    def read(self, n: int) -> bytes:
        """Up to `n` bytes; empty at the end."""
        while True:
            if self._decompressor is None and not self._start_stream():
                return b""
            if self._decompressor.needs_input and not self._rest:
                self._rest = self._file.read(CHUNK_BYTES)
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
            content = self._file.read(CHUNK_BYTES)
            if not content:
                if self._is_first:
                    raise EOFError("it is empty")
                return False
            self._rest = content.lstrip(b"\0")
        self._is_first = False
        self._decompressor = lzma.LZMADecompressor()
        return True


def main() -> None:
    """Decompress standard input to standard output; an error goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the reader answers Ctrl-C
    chunks: queue.Queue[bytes | Exception] = queue.Queue(AHEAD_CHUNKS)
    stream = XzStream(sys.stdin.buffer)

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
                is_input = isinstance(chunk, (EOFError, OSError, lzma.LZMAError))
                sys.exit(DAMAGED if is_input else FAILED)
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    except BrokenPipeError:  # nobody reads any more
        os._exit(0)


if __name__ == "__main__":
    main()
