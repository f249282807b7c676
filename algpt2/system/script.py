"""How a script starts and ends: exit codes, signals, what libraries print at import."""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import (
    EXIT_NON_FINITE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    NonFiniteError,
    PeerGoneError,
    UserError,
    describe,
)

_left: list[bool] = []
_leaving = threading.Lock()
_stderr = [2]  # the last is where people read
_watchers: list[int] = []  # a line to each: the process is about to end, as it should

# Prints a file unless a line comes first; the end of the process that would send it ends `read`.
_WATCH = """
read -r line || { cat "$0"; echo "error: a library ended this process; what it said is above"; } >&2
rm -f "$0"
"""


def run_script(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a script's `main(argv)` and exit with the code it returns (None: 0).

    What a user or the machine caused becomes one line and an exit code: `UserError`, `OSError`
    (disk full, no permission) 2, `NonFiniteError` 3, `PeerGoneError` 75. `--debug` on the command
    line shows the traceback as well. SIGTERM and SIGINT end it at once, code 75, wherever nothing
    else listens: whatever a command writes is left such that the same command goes on.
    """
    _listen()
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    if "--debug" not in sys.argv:  # TensorFlow's C++ talks of what is no error of anyone's
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        code = main(None) or 0
    except PeerGoneError as error:
        print(describe(error), file=sys.stderr)
        code = EXIT_STOPPED
    except (UserError, OSError, NonFiniteError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(f"error: {describe(error)}", file=sys.stderr)
        code = EXIT_NON_FINITE if isinstance(error, NonFiniteError) else EXIT_USER_ERROR
    sys.stdout.flush()
    sys.stderr.flush()
    if code or _left:
        # Not sys.exit: threads of W&B or a prefetcher must not hold a failed command open.
        os._exit(code)


def _listen() -> None:
    """Have `_leave` answer SIGTERM and SIGINT, and a thread see to it that a library which blocks
    the main one (waiting for other workers, compiling) does not put that off."""
    numbers, received = (signal.SIGTERM, signal.SIGINT), []
    for number in numbers:
        signal.signal(number, _leave)
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)

    def watch() -> None:
        while True:
            number = receiver.recv(1)[0]
            if number in numbers and signal.getsignal(number) is _leave:
                _leave(number, None)
            elif number in numbers:
                if received:  # the training loop has heard of the first
                    os._exit(128 + number)
                received.append(number)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _leave(number: int, frame: Any) -> None:
    if not _leaving.acquire(blocking=False):  # the main thread and that of `_listen` both hear it
        return
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):  # not print: it may be what the signal interrupted
        os.write(_stderr[-1], f"\nstopped by {name}: the same command continues\n".encode())
        for watcher in _watchers:
            os.write(watcher, b"\n")
    os._exit(EXIT_STOPPED)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stderr, of C++ code neither, but for what `_leave` says.

    If the process dies meanwhile, a shell that watches it prints what was hidden.
    """
    hidden, path = tempfile.mkstemp(prefix="algpt2-stderr-")
    command = ["sh", "-c", _WATCH, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as watcher:
        _watchers.append(watcher.stdin.fileno())
        _stderr.append(os.dup(2))
        os.dup2(hidden, 2)
        os.close(hidden)
        try:
            yield
        finally:
            os.dup2(_stderr[-1], 2)
            os.close(_stderr.pop())
            os.write(_watchers.pop(), b"\n")


def import_tensorflow() -> None:
    """Import it without the lines that it prints at any log level; `--debug` shows them."""
    with contextlib.nullcontext() if "--debug" in sys.argv else quiet():
        # TensorFlow 2.18 for TPUs crashes unless these two have loaded their OpenSSL before it.
        for name in ("ssl", "hashlib", "tensorflow"):
            importlib.import_module(name)


def leave_threads() -> None:
    """Have `run_script` end the process at once: a thread hangs, and its library waits for it."""
    _left.append(True)
