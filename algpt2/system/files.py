"""Files that are there whole or not at all, JSON with its checksum, locks, the cache folder."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHECKSUM = "sha256"  # key of a record's own, over all its other keys


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write JSON so that `path` is there whole or not at all, if `durable` also after a power
    cut."""
    write_text(path, json_text(value), durable=durable)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write text so that `path` is there whole or not at all; a link there is replaced."""
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)  # of a killed process; or a link, which would be written through
    with errors_name(path), partial.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    partial.replace(path)


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Put the file into an `OSError` of the body that names none: a disk that is full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_record(path: Path, content: dict[str, Any], *, durable: bool = True) -> None:
    """`write_json` of an object, with a checksum of itself in it."""
    write_json(path, content | {CHECKSUM: content_sha256(content)}, durable=durable)


def read_record(path: Path, *, required: bool = True) -> dict[str, Any]:
    """What `write_record` wrote, its checksum verified and still in it.

    Args:
        required: the checksum; else a record of earlier versions may lack it.
    Raises:
        UserError: not a JSON object, or its checksum is not that of its content.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        others = {key: value for key, value in content.items() if key != CHECKSUM}
        expected = content_sha256(others)
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged: it is not a JSON object") from None
    if content.get(CHECKSUM, None if required else expected) != expected:
        raise UserError(f"{path} is damaged: its {CHECKSUM} is not that of its content")
    return content


def content_sha256(content: dict[str, Any]) -> str:
    """The sha256 of an object, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_plain_file(path: Path) -> bool:
    """True for a regular file; a link to one is none."""
    return path.is_file() and not path.is_symlink()


def remove(path: Path) -> None:
    """Remove a file, a folder with all that it holds, or a link (never what it leads to)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    """The very text that `write_json` writes."""
    return json.dumps(value, indent=2) + "\n"


def describe_file(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256."""
    return path.stat().st_size, file_sha256(path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a folder, or a file that is made for this, alone among the processes of this machine.

    The lock ends with its process, however that ends, and a link is not followed (`OSError`).
    Not `filelock`, which cannot hold a folder: shards would get a lock file. Windows and file
    systems without locks give none.

    Args:
        busy: the message of the `UserError` if another process holds it; None: wait.
    """
    if fcntl is None:
        yield
        return
    if path.is_dir():
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = no_links(path, os.O_WRONLY | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError:  # no locks here
            pass
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """Where what took long is kept: $ALGPT2_CACHE, or ~/.cache/algpt2."""
    return Path(os.environ.get("ALGPT2_CACHE") or "~/.cache/algpt2").expanduser()


def append_json(path: Path, line: dict[str, Any]) -> None:
    """Append one line of JSON in a single write; a link is not written through (`OSError`)."""
    with errors_name(path), open(path, "a", encoding="utf-8", opener=no_links) as file:
        file.write(json.dumps(line) + "\n")


def no_links(path: str | Path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
