"""The record and the manifest of packed shards: only this module knows the format.

A shard is a TFRecord file. Each record is a standard `tf.train.Example` with a single bytes feature
`tokens`: seq_len + 1 little-endian uint16 or uint32. All records have the same size, so that a
shard is an array of records and the place of row i is computed:

    head     length and its checksum (TFRecord framing), then the tags and lengths of the Example
    tokens   seq_len + 1 token ids
    crc      masked crc32c of the Example

`manifest.json` beside the shards describes them, and is written last.
"""

import functools
import hashlib
import json
import os
import re
import reprlib
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np

from ..errors import UserError
from ..system.console import Progress
from ..system.files import CHECKSUM, content_sha256, errors_name, json_text, write_record
from ..system.parallel import run_tasks
from ..system.remote import RemotePath, as_path

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
FEATURE = b"tokens"
BLOCK_BYTES = 1 << 20  # of records assembled in memory at a time
OPEN_SHARDS = 256  # memory maps open at a time: each needs a file descriptor

T = TypeVar("T")


# --- the record ----------------------------------------------------------------------------------


@functools.lru_cache
def record_head(seq_len: int, dtype: str) -> bytes:
    """The constant bytes before the tokens of each record."""
    n_bytes = (seq_len + 1) * np.dtype(dtype).itemsize
    # From the inside out: BytesList.value, Feature.bytes_list, map entry, Features, Example.
    prefix, size = b"", n_bytes
    for tag, before in ((b"\x0a", b""), (b"\x0a", b""), (b"\x12", _field(b"\x0a", FEATURE)),
                        (b"\x0a", b""), (b"\x0a", b"")):  # fmt: skip
        prefix = before + tag + _varint(size) + prefix
        size = n_bytes + len(prefix)
    length = struct.pack("<Q", size)
    checksum = _mask(np.uint32(google_crc32c.value(length)))
    return length + struct.pack("<I", int(checksum)) + prefix


@functools.lru_cache
def record_dtype(seq_len: int, dtype: str) -> np.dtype:
    """The numpy dtype of one record; a shard is an array of it."""
    return np.dtype(
        [
            ("head", np.uint8, (len(record_head(seq_len, dtype)),)),
            ("tokens", np.dtype(dtype).newbyteorder("<"), (seq_len + 1,)),
            ("crc", "<u4"),
        ]
    )


def build_records(rows: np.ndarray) -> np.ndarray:
    """Records of `rows` (n, seq_len + 1), uint16 or uint32: (n,) of `record_dtype`."""
    dtype, seq_len = rows.dtype.name, rows.shape[1] - 1
    head = record_head(seq_len, dtype)
    records = np.empty(len(rows), record_dtype(seq_len, dtype))
    records["head"] = np.frombuffer(head, np.uint8)
    records["tokens"] = rows
    data = records.view(np.uint8).reshape(len(rows), -1)
    n_framing = 12  # length and its checksum are not part of the Example
    crc_of_prefix = google_crc32c.value(head[n_framing:])
    crc = [google_crc32c.extend(crc_of_prefix, record[len(head) : -4]) for record in data]
    records["crc"] = _mask(np.array(crc, np.uint32))
    return records


def _field(tag: bytes, value: bytes) -> bytes:
    return tag + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _mask(crc: np.ndarray) -> np.ndarray:
    """TFRecord's masked checksum, wrapping at 32 bits."""
    rotated = (crc >> np.uint32(15)) | (crc << np.uint32(17))
    return (rotated.astype(np.uint64) + np.uint64(0xA282EAD8)).astype(np.uint32)


# --- the manifest --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One file of records."""

    file: str  # name inside the folder
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The description of a folder of shards: the content of its `manifest.json`.

    Every token is accounted for: tokens = 1 + (n_rows + dropped_rows) * seq_len + left_over_tokens.
    """

    format_version: int
    seq_len: int  # tokens that a row predicts; its record holds one more
    dtype: str  # uint16 or uint32
    vocab_size: int
    eot_id: int
    tokenizer_sha256: str  # fingerprint of the tokenizer
    sources: list  # identity of the text: listing.identify_sources
    options: dict  # all other options that decide the bytes of the shards
    shards: tuple[Shard, ...]
    documents: int
    text_bytes: int  # of the documents as UTF-8
    words: int  # separated by white space
    line_ends: int
    tokens: int  # of all documents, with the control code that starts each
    left_over_tokens: int  # at the end of the text, too few for another row
    dropped_rows: int  # beyond equal shards, or beyond n_examples
    duplicates: int  # documents left out as copies of earlier documents
    encoder: dict  # name, version and comparison: encoders.choose_encoder

    @property
    def n_rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """One hash for the content of all shards."""
        return hashlib.sha256("".join(s.sha256 for s in self.shards).encode()).hexdigest()

    @property
    def detokenizer(self) -> str | None:
        """Name of the detokenizer, or None; all names if joined texts differ."""
        texts = self.options.get("joined", [self.options])
        names = sorted({str(options.get("detokenizer") or "no") for options in texts})
        return None if names == ["no"] else " and ".join(names)

    def __str__(self) -> str:
        """One line for people: the numbers of the text, the rows, and the tokens left out."""
        n_shards, bytes_per_token = len(self.shards), self.text_bytes / self.tokens
        parts = [
            f"{self.documents:,} documents, {self.text_bytes:,} bytes",
            f"{self.words:,} words",
            f"{self.tokens:,} tokens ({bytes_per_token:.2f} bytes per token)",
            f"{self.n_rows:,} rows of {self.seq_len} tokens",
            f"{n_shards:,} shards of {self.shards[0].rows:,} rows" if n_shards > 1 else "1 shard",
            f"{self.left_over_tokens:,} tokens left over",
        ]
        if self.duplicates:
            parts.insert(1, f"{self.duplicates:,} copies left out")
        if self.dropped_rows:
            limit = self.options.get("n_examples")
            reason = "that do not divide by the shards" + (
                f" or --n_examples {limit} cut" if limit else ""
            )
            parts.append(f"{self.dropped_rows:,} rows dropped {reason}")
        return ", ".join(parts)


# Smallest and largest value of a field; all other numbers are from 0 to 2**62.
RANGES = {
    "seq_len": (1, 2**28),
    "vocab_size": (1, 2**32),
    "eot_id": (0, 2**32 - 1),
    "documents": (1, 2**62),
    "rows": (1, 2**40),
}


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest in `folder`, every field checked.

    Raises:
        UserError: no manifest, another format version, or a damaged field, which is named.
    """
    path = as_path(folder) / MANIFEST_FILE
    try:
        return parse_manifest(path.read_bytes(), path)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no packed shards: it has no {MANIFEST_FILE}") from None


def parse_manifest(text: bytes, path: str | Path | RemotePath) -> Manifest:
    """The manifest in UTF-8 that was read from `path`; see `read_manifest`."""
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not JSON") from None
    version = content.get("format_version") if isinstance(content, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {reprlib.repr(version)}, expected {FORMAT_VERSION};"
            " pack the text again"
        )
    manifest = from_json(Manifest, content, path)
    problem = _inconsistency(manifest)
    try:
        if not problem and content.get(CHECKSUM) != content_sha256(asdict(manifest)):
            problem = f"its {CHECKSUM} is not that of its content"
    except RecursionError:  # lists in lists, which could be read
        problem = "it is nested too deeply"
    if problem:
        raise UserError(f"{path} is damaged: {problem}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, whole or not at all, with a checksum of its content."""
    write_record(folder / MANIFEST_FILE, asdict(manifest))


def from_json(cls: type[T], content: Any, path: str | Path) -> T:
    """A `Manifest` or `Shard` from JSON that was read from `path`; numbers are in `RANGES`.

    Raises:
        UserError: a field is missing or of another type.
    """
    if type(content) is not dict:
        raise UserError(f"{path} is damaged: expected an object, got {reprlib.repr(content)}")
    values = {field.name: content.get(field.name) for field in fields(cls)}
    for field in fields(cls):
        value, expected = values[field.name], field.type
        low, high = RANGES.get(field.name, (0, 2**62))
        if field.name == "shards" and type(value) is list:
            values["shards"] = tuple(from_json(Shard, shard, path) for shard in value)
            continue
        if type(value) is not expected or (expected is int and not low <= value <= high):
            wanted = f"a number from {low} to {high}" if expected is int else expected.__name__
            raise UserError(
                f"{path} is damaged: {field.name} is {reprlib.repr(value)}, expected {wanted}"
            )
    return cls(**values)


def _inconsistency(manifest: Manifest) -> str | None:
    """A contradiction among the fields of a manifest, or None."""
    if manifest.dtype not in ("uint16", "uint32"):
        return f"dtype is {manifest.dtype!r}, expected uint16 or uint32"
    if manifest.vocab_size > 1 + np.iinfo(manifest.dtype).max:
        return f"vocab_size {manifest.vocab_size} does not fit {manifest.dtype}"
    if manifest.eot_id >= manifest.vocab_size:
        return f"eot_id {manifest.eot_id} is not below vocab_size {manifest.vocab_size}"
    if not manifest.shards:
        return "shards is empty"
    record_bytes = record_dtype(manifest.seq_len, manifest.dtype).itemsize
    for shard in manifest.shards:
        if not re.fullmatch(r"[^/\\\0]+", shard.file) or shard.file in (".", ".."):
            return f"file {shard.file!r} of a shard is not a file name"
        if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
            return f"sha256 of {shard.file} is {reprlib.repr(shard.sha256)}, expected 64 hex digits"
        if shard.bytes != shard.rows * record_bytes:
            return (
                f"bytes of {shard.file} is {shard.bytes}, expected {shard.rows} rows"
                f" of {record_bytes}"
            )
        if shard.rows != manifest.shards[0].rows:
            return f"rows of {shard.file} is {shard.rows}, expected {manifest.shards[0].rows}"
    if len({shard.file for shard in manifest.shards}) < len(manifest.shards):
        return "shards name a file twice"
    n_rows = manifest.n_rows + manifest.dropped_rows
    if manifest.tokens != 1 + n_rows * manifest.seq_len + manifest.left_over_tokens:
        return f"tokens is {manifest.tokens}: rows and left_over_tokens make another number"
    return None


# --- writing -------------------------------------------------------------------------------------


def write_file(
    path: Path, blocks: Iterable[bytes | np.ndarray], *, durable: bool = True
) -> tuple[int, str]:
    """Write `path`, which appears when it is complete; returns its size in bytes and its sha256.

    Args:
        durable: complete even after a power cut; if not, readers have to compare the sha256.

    Raises:
        OSError: no space, no permission; no half-written file stays behind.
    """
    # Named after the process: on a Ray cluster two machines may write the same file.
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    digest = hashlib.sha256()
    try:
        with errors_name(path), partial.open("wb") as file:
            for block in blocks:
                file.write(block)
                digest.update(block)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            n_bytes = file.tell()
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return n_bytes, digest.hexdigest()


def write_shard(path: Path, rows: np.ndarray) -> Shard:
    """Write `rows` (n, seq_len + 1), uint16 or uint32, as records; memory stays flat.

    Raises:
        OSError: as `write_file`.
    """
    record_bytes = record_dtype(rows.shape[1] - 1, rows.dtype.name).itemsize
    step = max(1, BLOCK_BYTES // record_bytes)
    blocks = (build_records(rows[i : i + step]) for i in range(0, len(rows), step))
    n_bytes, sha256 = write_file(path, blocks)
    return Shard(path.name, len(rows), n_bytes, sha256)


# --- reading -------------------------------------------------------------------------------------


class PackedRows:
    """The rows of a folder of shards, memory-mapped; made by `open_rows`.

    `rows[i]` is (seq_len + 1,), `rows[ids]` with an array of ids (n,) is (n, seq_len + 1), both
    copies in the stored dtype. Each record that is read is checked: `UserError` if it is damaged.
    """

    def __init__(self, folder: Path | str, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.files = [f"{folder}/{shard.file}" for shard in manifest.shards]
        self.record = record_dtype(manifest.seq_len, manifest.dtype)
        self._records = functools.lru_cache(OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return self.manifest.n_rows

    def __getitem__(self, ids: int | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise TypeError(f"row ids are integers, got {ids.dtype}")
        if np.any((ids < 0) | (ids >= len(self))):
            raise IndexError(f"row ids run from 0 to {len(self) - 1}")
        shard_ids, places = np.divmod(ids, self.manifest.shards[0].rows)
        rows = np.empty((*ids.shape, self.manifest.seq_len + 1), self.manifest.dtype)
        for shard_id in np.unique(shard_ids):
            here = shard_ids == shard_id
            rows[here] = self._read(int(shard_id), places[here])
        return rows

    def probe(self) -> str:
        """A hash over the first and last record of each shard: it shows, without reading the
        shards, whether they were exchanged since a run began.

        Raises:
            UserError: one of these records is damaged.
        """
        digest = hashlib.sha256()
        for shard_id, shard in enumerate(self.manifest.shards):
            digest.update(self.read_few(shard_id, np.array([0, shard.rows - 1])).tobytes())
        return digest.hexdigest()

    def read_few(self, shard_id: int, places: np.ndarray) -> np.ndarray:
        """The tokens (n, seq_len + 1) of a few records of a shard."""
        return self._read(shard_id, places)

    def _read(self, shard_id: int, places: np.ndarray) -> np.ndarray:
        return self._checked(shard_id, places, np.atleast_1d(self._records(shard_id)[places]))

    def _checked(self, shard_id: int, places: np.ndarray, records: np.ndarray) -> np.ndarray:
        """The tokens (n, seq_len + 1) of the records at some places of a shard."""
        bad = damaged_records(records, self.manifest.vocab_size)
        if bad.any():
            path, row = self.files[shard_id], int(np.atleast_1d(places)[bad.argmax()])
            raise UserError(f"{path}: row {row} is corrupt; copy the shard again, or pack it again")
        return records["tokens"]

    def _map(self, shard_id: int) -> np.ndarray:
        return np.memmap(self.files[shard_id], self.record, mode="r")


def damaged_records(records: np.ndarray, vocab_size: int) -> np.ndarray:
    """Whether each record (n,) has a wrong frame or checksum for its tokens, or unknown ids."""
    tokens = np.ascontiguousarray(records["tokens"])
    expected = build_records(tokens.astype(tokens.dtype.newbyteorder("=")))
    wrong = (records["head"] != expected["head"]).any(1) | (records["crc"] != expected["crc"])
    return wrong | (tokens >= vocab_size).any(1)


def open_rows(folder: str | Path) -> PackedRows:
    """The rows of the shards in `folder`; checks the size of every file, not its content.

    Raises:
        UserError: the manifest is missing or damaged; a shard is missing or has another size.
    """
    rows = PackedRows(Path(folder), read_manifest(folder))
    check_files(rows, lambda path: Path(path).stat().st_size if Path(path).is_file() else None)
    return rows


def check_files(rows: PackedRows, size_of: Callable[[str], int | None]) -> None:
    """`UserError` unless each shard has the size that the manifest lists (None: it is missing)."""
    for path, shard in zip(rows.files, rows.manifest.shards, strict=True):
        n_bytes = size_of(path)
        if n_bytes is None:
            raise UserError(f"{path} is missing: {rows.folder}/{MANIFEST_FILE} lists it")
        if n_bytes != shard.bytes:
            raise UserError(
                f"{path} is damaged: it has {n_bytes} bytes, expected {shard.bytes};"
                " copy it again, or pack again with --overwrite"
            )


# --- checking ------------------------------------------------------------------------------------


def verify(
    folder: str | Path, *, tokenizer_sha256: str | None = None, workers: int = 1
) -> tuple[Manifest, list[str]]:
    """Read everything in `folder`, a path or URL; its manifest, and a line for each problem.

    Checked are the manifest (each field, its checksum, its bytes), missing and foreign shards, and
    for every shard the size, the sha256, and the framing, crc and token ids of each record.

    Args:
        tokenizer_sha256: fingerprint of the expected tokenizer; None: any.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    folder = as_path(folder)
    manifest = read_manifest(folder)
    problems = []
    text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
    content = asdict(manifest)
    if text != json_text(content | {CHECKSUM: content_sha256(content)}):
        problems.append(f"{folder / MANIFEST_FILE}: not the bytes that were written")
    if tokenizer_sha256 not in (None, manifest.tokenizer_sha256):
        problems.append(
            f"{folder}: packed with the tokenizer {manifest.tokenizer_sha256[:12]}, expected"
            f" {tokenizer_sha256[:12]}"
        )
    listed = {shard.file for shard in manifest.shards}
    shards = sorted(folder.glob("*.tfrecord"), key=str)
    foreign = [path for path in shards if path.name not in listed]
    problems += [f"{path}: not in {MANIFEST_FILE}" for path in foreign]
    check = functools.partial(_check_shard, folder, manifest)
    with Progress("verify", total=len(listed), unit="shards") as progress:
        for found in run_tasks(check, manifest.shards, workers=workers):
            problems += found
            progress.update(1)
    return manifest, problems


def _check_shard(folder: Path | RemotePath, manifest: Manifest, shard: Shard) -> list[str]:
    path = folder / shard.file
    if not path.is_file():
        return [f"{path}: missing"]
    if (n_bytes := path.stat().st_size) != shard.bytes:
        return [f"{path}: {n_bytes:,} bytes, expected {shard.bytes:,}"]
    dtype = record_dtype(manifest.seq_len, manifest.dtype)
    step = max(1, BLOCK_BYTES // dtype.itemsize)
    digest, bad_rows = hashlib.sha256(), []
    with path.open("rb") as file:
        for first in range(0, shard.rows, step):
            raw = file.read(step * dtype.itemsize)
            digest.update(raw)
            records = np.frombuffer(raw, dtype)
            wrong = damaged_records(records, manifest.vocab_size)
            bad_rows += (first + np.flatnonzero(wrong)).tolist()
    if bad_rows:
        rows = ", ".join(map(str, bad_rows[:5])) + (" ..." if len(bad_rows) > 5 else "")
        return [f"{path}: {len(bad_rows):,} damaged records (rows {rows})"]
    if digest.hexdigest() != shard.sha256:
        return [f"{path}: all records are sound, but the manifest has another sha256"]
    return []
