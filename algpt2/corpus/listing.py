"""A corpus as a list of parts, in the order of the sources and of the sorted paths."""

import glob
import hashlib
import itertools
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .archives import TarStream, open_zip
from .docstrings import SPLITS, package_versions
from .parts import (
    BYTES,
    Broken,
    CorpusCounts,
    Part,
    Reading,
    file_stamp,
    file_suffix,
    is_hidden,
    is_own_file,
    member_kind,
    named_kind,
    saved_dataset,
    split_suffix,
    unreadable,
)

RUN_FILES, RUN_BYTES = 1000, 64 << 20  # a run of small files or members has no more
PIECE_BYTES = 64 << 20  # of a large table or text of lines; a parquet file's pieces are row groups

Piece = tuple[int, int | None, int, int | None]  # start, stop, bytes, files that begin in it


def list_parts(
    sources: Sequence[str],
    reading: Reading = Reading(),  # noqa: B008  (it is frozen)
    counts: CorpusCounts | None = None,
) -> Iterator[Part]:
    """The parts of a corpus, lazily; `UserError` for a source that is missing or holds no text.

    `counts.other_files` counts the files that are not text. The headers of tars and zips that are
    not compressed are read here; damage among them is an error, or counted.
    """
    for source in sources:
        listing = _Listing(source, reading)
        part = None
        for part in listing.parts():
            yield part
        if counts is not None:
            counts.add(listing.counts)
        if part is None:
            raise listing.no_text()


class _Listing:
    """The parts of one source."""

    def __init__(self, source: str, reading: Reading) -> None:
        self.source, self.reading, self.counts = source, reading, CorpusCounts()

    def no_text(self) -> UserError:
        """The error of a source without any part."""
        n_others = sum(self.counts.other_files.values())
        others = f"{n_others:,} other files ({self.counts.other_suffixes()})"
        found = others if n_others else self.counts.broken_names() or "no file"
        return UserError(
            f"{self.source} holds no text: expected .txt, .md, .jsonl (or these as .gz, .zst, .xz),"
            f" .parquet, .tar, .zip or files without suffix, found {found};"
            " text with another suffix is read when its file or a glob names it"
        )

    def parts(self) -> Iterator[Part]:
        name = self.source.partition(":")[2]
        path = str(Path(self.source).expanduser())
        if self.source.startswith("docs:"):
            yield self._docs(name or "train")
        elif self.source.startswith("hf:"):
            yield self._hf(name)
        elif (saved := saved_dataset(path)) is not None:
            yield Part(
                "hf", path, self.source,
                stamps=array("Q", [file_stamp(os.stat(saved))]),  # noqa: PTH116
            )  # fmt: skip
        elif os.path.isdir(path):  # noqa: PTH112
            root = path.rstrip("/") + "/"
            yield from self._cut(root, self._in_folder(root))
        elif os.path.exists(path):  # noqa: PTH110
            yield from self._cut("", iter([(path, self._kind_of_named(path))]))
        elif glob.has_magic(self.source):
            yield from self._cut("", self._matches(path))
        elif "://" in self.source:
            raise UserError(
                f"{self.source}: text is not read from URLs: expected a file or folder of this"
                " machine, hf:NAME or docs:; download it first"
            )
        else:
            raise UserError(f"{self.source}: no such file or folder (nor a glob, hf:NAME or docs:)")

    def _docs(self, split: str) -> Part:
        if split not in SPLITS:
            raise UserError(f"{self.source}: expected docs:train, docs:valid or docs:all")
        return Part("docs", split, self.source)

    def _hf(self, name: str) -> Part:
        if not name:
            raise UserError("hf: needs the name of a dataset, such as hf:Skylion007/openwebtext")
        return Part("hf", name, self.source)

    # Paths and kinds of files, sorted.

    def _kind_of_named(self, path: str) -> str:
        if not os.path.isfile(path):  # noqa: PTH113
            raise UserError(f"{self.source} is a pipe or a device: expected a file or a folder")
        kind = named_kind(path)
        if kind is None:
            raise UserError(f"{self.source} is not a text file; expected text, .jsonl or .parquet")
        return kind

    def _matches(self, pattern: str) -> Iterator[tuple[str, str]]:
        seen: set[str] = set()  # a/**/b may match a folder inside another match
        for path in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207
            is_folder = os.path.isdir(path)  # noqa: PTH112
            if is_folder and pattern.endswith("**"):
                continue  # its files match themselves
            if is_folder:
                files = self._in_folder(path.rstrip("/") + "/")
            elif is_own_file(path):
                self.counts.add_other(file_suffix(path))
                continue
            elif os.path.isfile(path) and (kind := named_kind(path)):  # noqa: PTH113
                files = iter([(path, kind)])
            else:
                self.counts.add_other(file_suffix(path))
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
            self.counts.add_broken(unreadable(folder, error), self.reading)
            return
        if (status.st_dev, status.st_ino) in above:  # a link that leads back up
            return
        above |= {(status.st_dev, status.st_ino)}
        for name in names:
            path = folder + name
            if name.endswith("/"):
                yield from self._in_folder(path, above)
            elif (kind := member_kind(name)) and not is_own_file(path):
                yield path, kind
            else:
                self.counts.add_other(file_suffix(name))

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
                else:  # a pipe, a link to nowhere
                    self.counts.add_other(file_suffix(entry.name))
        return sorted(names)

    # Files to parts.

    def _cut(self, root: str, files: Iterator[tuple[str, str]]) -> Iterator[Part]:
        """Runs of text files, each other file by itself or in pieces; paths begin with `root`."""
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
                self.counts.add_broken(unreadable(path, error), self.reading)
                continue
            if kind == "text" and self.reading.line_by_line and status.st_size > PIECE_BYTES:
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
        """The parts of a file that is not in a run."""
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

    def _tar_runs(self, path: str) -> Iterator[Piece]:
        """Runs of members; an archive inside is a run of its own."""
        # Hardly more than a header is read before the next seek.
        with Path(path).open("rb", buffering=4096) as file:
            tar = TarStream(file, path)
            yield from self._runs((m.header, m.end, m.name, m.size) for m in tar)
            self.counts.add(CorpusCounts(other_files=tar.others))

    def _zip_runs(self, path: str) -> Iterator[Piece]:
        try:
            with open_zip(path, path) as archive:
                members = enumerate(archive.infolist())
                yield from self._runs((i, i + 1, m.filename, m.file_size) for i, m in members)
        except Broken as error:
            self.counts.add_broken(error, self.reading)

    def _runs(self, members: Iterator[tuple[int, int, str, int]]) -> Iterator[Piece]:
        """Runs of members, given as start, stop, name and bytes."""
        run: list[int] = []  # start, stop, bytes, files
        error = None
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
        except Broken as damage:
            error = damage
        if run:
            yield tuple(run)
        if error is not None:
            self.counts.add_broken(error, self.reading)


def _byte_pieces(size: int) -> Iterator[Piece]:
    for start in range(0, size, PIECE_BYTES):
        stop = min(size, start + PIECE_BYTES)
        yield start, stop, stop - start, int(start == 0)


def _row_groups(path: str, size: int) -> Iterator[Piece]:
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


# --- the identity of a corpus --------------------------------------------------------------------


def identify_sources(sources: str | Sequence[str], *, n_files: int | None = None) -> list[dict]:
    """The identity of each source's data, for the key of a cache and a manifest: JSON values."""
    sources = [sources] if isinstance(sources, str) else sources
    return identify_parts(list_parts(sources, Reading(skip_broken=True)), n_files)


def identify_parts(parts: Iterable[Part], n_files: int | None = None) -> list[dict]:
    """`identify_sources` of parts that are listed already.

    Files: how many, their bytes, and a single sha256 over every path (as given), size and time of
    change, so that millions of files need no million lines. docs: the versions of the packages.
    """
    identities = []
    for source, group in itertools.groupby(parts, lambda part: part.source):
        if n_files == 0:
            break
        digest, n, size = hashlib.sha256(), 0, 0
        for part in group:
            if part.kind == "docs":
                identities.append({"source": source, "packages": package_versions()})
            elif part.kind == "hf":
                stamps = {"sha256": hashlib.sha256(part.stamps).hexdigest()} if part.stamps else {}
                identities.append({"source": source, **stamps})
            elif n_files is None or n_files > 0 or part.n_files == 0:
                part = part if n_files is None else part.head(n_files)
                place = f"{part.kind}\0{part.name}\0{part.files}\0{part.start}\0{part.stop}\0"
                digest.update(place.encode(*BYTES) + part.stamps.tobytes())
                n, size = n + (part.n_files or 0), size + part.size
                n_files = None if n_files is None else max(0, n_files - (part.n_files or 0))
        if n or size:
            identities.append(
                {"source": source, "files": n, "bytes": size, "sha256": digest.hexdigest()}
            )
    return identities
