"""Files and folders at a URL (gs://, s3://, memory:// ...): only this module knows fsspec.

An upload appears under its name when it is complete. Its size is compared, and its crc32c if the
store tells it (gs://). The store's library (gcsfs, s3fs) repeats failed requests for a minute.
"""

import base64
import contextlib
import fnmatch
import hashlib
import logging
import multiprocessing
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import google_crc32c

from ..errors import UserError, describe
from .console import Progress
from .files import cache_dir, remove

# Here a file appears when it is complete; elsewhere it gets a hidden name first and is renamed.
OBJECT_STORES = {"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "memory"}
# gcsfs needs a newer google-api-core than cloud-tpu-client allows: pip installs it only after
# requirements.txt, with a warning; both work.
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "az": "adlfs"}

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class RemoteError(OSError):
    """A request to a store failed; one line. The same command continues later."""


def is_remote(path: object) -> bool:
    """Whether a user's path is a URL."""
    return _URL.match(str(path)) is not None


def as_path(path: "str | Path | RemotePath") -> "Path | RemotePath":
    """A user's path, on disk or at a URL."""
    if isinstance(path, RemotePath):
        return path
    return RemotePath(str(path).rstrip("/")) if is_remote(path) else Path(path)


def local_folder(path: str | Path) -> Path:
    """The local folder of a user's path: the path itself, or for a URL a folder in the cache."""
    if not is_remote(path):
        return Path(path)
    url = str(path).rstrip("/")
    name = re.sub(r"[^\w.-]", "-", url.rpartition("/")[2])
    return cache_dir() / "remote" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class RemotePath:
    """A file or folder at a URL, with the methods of `pathlib.Path` that this project needs.

    Raises (every method):
        FileNotFoundError
        RemoteError: no bucket, no permission, no credentials, no network.
        UserError: a package is missing.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}") if name else self

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    def is_file(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self._info()["type"] == "file"
        return False

    def stat(self) -> SimpleNamespace:
        """`st_size`, the bytes of a file."""
        return SimpleNamespace(st_size=self._info()["size"])

    @contextlib.contextmanager
    def open(self, mode: str = "rb") -> Iterator[BinaryIO]:
        """A file to read, in order."""
        with self._errors_named("read") as (fs, path), fs.open(path, mode) as file:
            yield file

    def read_bytes(self) -> bytes:
        with self._errors_named("read") as (fs, path):
            return fs.cat_file(path)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def files(self) -> dict[str, int]:
        """Name, relative to this folder, and size of each file below it."""
        with self._errors_named("list") as (fs, path), contextlib.suppress(FileNotFoundError):
            fs.invalidate_cache()
            prefix = f"{path.rstrip('/')}/"
            return {
                name.removeprefix(prefix): info["size"]
                for name, info in sorted(fs.find(path, detail=True).items())
                if name.startswith(prefix) and not name.endswith("/")
            }
        return {}

    def glob(self, pattern: str) -> "list[RemotePath]":
        """The matching files that lie in this folder itself."""
        names = [name for name in self.files() if "/" not in name]
        return [self / name for name in fnmatch.filter(names, pattern)]

    def put(self, local: Path) -> None:
        """Upload the file `local` to here; with a progress bar, except in a worker process."""
        with self._errors_named("write", reading=False) as (fs, path):
            target = path
            names = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
            if OBJECT_STORES.isdisjoint(names):
                folder, _, name = path.rpartition("/")
                fs.makedirs(folder, exist_ok=True)
                target = f"{folder}/.{name}.partial"
            with _progress(f"upload {self.name}", local.stat().st_size) as callback:
                fs.put_file(str(local), target, callback=callback)
            fs.invalidate_cache()
            if problem := _difference(fs.info(target), local):
                fs.rm_file(target)
                raise OSError(f"the uploaded file has {problem}")
            if target != path:
                fs.mv(target, path)

    def get(self, local: Path) -> None:
        """Download this file to `local`, which appears when it is complete."""
        partial = local.with_name(f".{local.name}.{os.getpid()}.partial")
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._errors_named("read") as (fs, path):
                with _progress(f"download {self.name}", fs.info(path)["size"]) as callback:
                    fs.get_file(path, str(partial), callback=callback)
                if problem := _difference(fs.info(path), partial):
                    raise OSError(f"the downloaded file differs: the store has {problem}")
            partial.replace(local)
        finally:
            remove(partial)

    def unlink(self, missing_ok: bool = False) -> None:
        with self._errors_named("remove") as (fs, path):
            try:
                fs.rm_file(path)
            except FileNotFoundError:
                if not missing_ok:
                    raise
            fs.invalidate_cache()

    def _info(self) -> dict[str, Any]:
        with self._errors_named("read") as (fs, path):
            fs.invalidate_cache()
            return fs.info(path)

    @contextlib.contextmanager
    def _errors_named(self, verb: str, reading: bool = True) -> Iterator[tuple[Any, str]]:
        """fsspec's file system and path for this URL; its exceptions become a `RemoteError`."""
        try:
            yield _file_system(self.url)
        except (RemoteError, UserError):
            raise
        except Exception as error:  # each store's client raises its own exceptions
            if reading and isinstance(error, FileNotFoundError):
                raise
            reason = describe(error)[:300] or type(error).__name__
            raise RemoteError(
                f"cannot {verb} {self.url} ({reason}): expected a bucket that exists, and "
                "credentials that may read and write in it"
            ) from error


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.partition("://")[0]
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # a traceback with each failed request
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        missing = PACKAGES.get(protocol) or getattr(error.__cause__, "name", None) or error
        raise UserError(f"{url} needs another package: pip install {missing}") from None
    except ValueError as error:
        raise UserError(f"{url}: {describe(error)}; expected gs://, s3:// or a path") from None


def _difference(info: dict[str, Any], local: Path) -> str | None:
    """How the store's facts about a file differ from the file `local`; None if they agree."""
    if info["size"] != local.stat().st_size:
        return f"{info['size']:,} bytes, expected {local.stat().st_size:,}"
    if "crc32c" not in info:
        return None
    checksum = google_crc32c.Checksum()
    with local.open("rb") as file:
        while block := file.read(1 << 20):
            checksum.update(block)
    if base64.b64encode(checksum.digest()).decode() != info["crc32c"]:
        return f"another crc32c, {info['crc32c']}"
    return None


@contextlib.contextmanager
def _progress(description: str, n_bytes: int) -> Iterator[Any]:
    """A callback of fsspec that shows the progress of a transfer."""
    from fsspec.callbacks import Callback

    class Shown(Callback):
        def call(self, *args: object, **kwargs: object) -> None:
            progress.update(self.value - progress.done)

    if multiprocessing.parent_process() is not None:
        yield Callback()
        return
    with Progress(description, total=n_bytes, unit="B") as progress:
        yield Shown()
