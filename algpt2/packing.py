"""Text to packed shards: documents, one stream of tokens, rows of seq_len + 1, equal shards.

The folder's life, each step whole or not at all, so that a killed run repeats to the same bytes:

    .packing/plan.json     what is being packed; other options in the same folder are an error
    .packing/tokens        phase 1: the stream of all documents' tokens
    0.tfrecord ...         phase 2: the rows
    manifest.json          last: from here on the folder is finished, and .packing is removed
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import changed_options, write_json
from .corpus import CorpusReport, describe_sources, documents
from .errors import UserError, describe
from .options import PackOptions
from .report import Progress, log
from .tfrecords import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    Shard,
    open_rows,
    read_manifest,
    write_file,
    write_manifest,
    write_shard,
)
from .tokenization_algpt2 import TextTokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WORK_FOLDER, PLAN_FILE, TOKENS_FILE = ".packing", "plan.json", "tokens"
BATCH_CHARACTERS = 1 << 20  # of text encoded in one call


def pack(
    sources: str | Sequence[str],
    tokenizer: TextTokenizer,
    save_path: str | Path,
    *,
    seq_len: int,
    files_per_tfrecord: int = PackOptions.files_per_tfrecord,
    use_control_codes: bool = PackOptions.use_control_codes,
    control_codes: Sequence[str] | None = None,
    n_examples: int | None = None,
    n_files: int | None = None,
    line_by_line: bool = False,
    text_key: str = PackOptions.text_key,
    overwrite: bool = False,
) -> Manifest:
    """Pack the documents of `sources` into the folder `save_path`; done already: say so.

    Each document starts with `control_codes[0]` (None: the tokenizer's end of text) unless
    `use_control_codes` is off. Shards hold equal numbers of rows, one shard for every
    `files_per_tfrecord` documents. At most `n_examples` rows are written, and reading stops soon
    after there are as many.

    Raises:
        UserError: text too short for one row, an unknown control code, a folder that holds
            something else or shards of other options, or that cannot be written.
        OSError: disk full; repeat the command when there is space.
    """
    sources, save_path = [sources] if isinstance(sources, str) else list(sources), Path(save_path)
    options = {
        "files_per_tfrecord": files_per_tfrecord,
        "use_control_codes": use_control_codes,
        "control_codes": None if control_codes is None else list(control_codes),
        "n_examples": n_examples,
        "n_files": n_files,
        "line_by_line": line_by_line,
        "text_key": text_key,
    }
    start_id = _start_id(tokenizer, control_codes) if use_control_codes else None
    plan = _plan(sources, tokenizer, seq_len, options)
    with _locked(save_path):
        if overwrite:
            _remove_packing(save_path, plan)
        if finished := _finished(save_path, plan):
            log(f"{save_path} is done: {summary(finished)}")
            return finished
        return _pack(sources, tokenizer, save_path, plan, start_id)


def _plan(
    sources: list[str], tokenizer: TextTokenizer, seq_len: int, options: dict[str, Any]
) -> dict[str, Any]:
    """All that decides the bytes of the shards: the fields of the manifest known beforehand."""
    return {
        "format_version": FORMAT_VERSION,
        "seq_len": seq_len,
        "dtype": np.dtype(tokenizer.dtype).name,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "tokenizer_sha256": tokenizer.fingerprint,
        "sources": describe_sources(sources, n_files=options["n_files"]),
        "options": options,
    }


def _pack(
    sources: list[str],
    tokenizer: TextTokenizer,
    save_path: Path,
    plan: dict[str, Any],
    start_id: int | None,
) -> Manifest:
    """Both phases; the manifest of the finished folder."""
    report, start_s = CorpusReport(), time.monotonic()
    reading = {name: plan["options"][name] for name in ("n_files", "line_by_line", "text_key")}
    texts = documents(sources, **reading, report=report)
    n_examples = plan["options"]["n_examples"]
    max_tokens = math.inf if n_examples is None else n_examples * plan["seq_len"] + 1
    work = _open_work(save_path, plan)
    try:
        _write_tokens(work, encode_documents(texts, tokenizer, start_id), report, max_tokens)
        manifest = _write_shards(save_path, plan, report)
    except UserError:  # another command is needed: nothing may stand in its way
        _remove_shards(save_path)
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)
    seconds = max(1e-9, time.monotonic() - start_s)
    log(f"read {report.summary()}")
    log(f"{save_path}: {summary(manifest)}")
    log(f"{seconds:.1f} s, {report.text_bytes / 1e6 / seconds:.2f} MB/s")
    return manifest


def summary(manifest: Manifest) -> str:
    """One line for people: what a folder of shards holds, and what is not in its rows."""
    n_shards, bytes_per_token = len(manifest.shards), manifest.text_bytes / manifest.tokens
    parts = [
        f"{manifest.documents:,} documents, {manifest.text_bytes:,} bytes",
        f"{manifest.words:,} words",
        f"{manifest.tokens:,} tokens ({bytes_per_token:.2f} bytes per token)",
        f"{manifest.n_rows:,} rows of {manifest.seq_len} tokens",
        f"{n_shards:,} shards of {manifest.shards[0].rows:,} rows" if n_shards > 1 else "1 shard",
        f"{manifest.left_over_tokens:,} tokens left over",
    ]
    if manifest.dropped_rows:
        limit = manifest.options.get("n_examples")
        reason = "that do not divide by the shards" + (
            f" or --n_examples {limit} cut" if limit else ""
        )
        parts.append(f"{manifest.dropped_rows:,} rows dropped {reason}")
    return ", ".join(parts)


# --- phase 1: documents to tokens ----------------------------------------------------------------


def encode_documents(
    texts: Iterable[str], tokenizer: TextTokenizer, start_id: int | None
) -> Iterator[np.ndarray]:
    """The token stream in blocks (n,): each document's tokens behind `start_id` (None: alone)."""
    start = np.array([] if start_id is None else [start_id], tokenizer.dtype)
    for batch in _batches(texts):
        pairs = ((start, ids) for ids in tokenizer.encode_batch(batch))
        stream = np.concatenate(list(itertools.chain.from_iterable(pairs)))
        yield stream.astype(np.dtype(tokenizer.dtype).newbyteorder("<"), copy=False)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, n_characters = [], 0
    for text in texts:
        batch.append(text)
        n_characters += len(text)
        if n_characters >= BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _write_tokens(
    work: Path, stream: Iterable[np.ndarray], report: CorpusReport, max_tokens: float
) -> None:
    """Write the stream to the work folder; stop at the block that reaches `max_tokens`."""

    def blocks() -> Iterator[np.ndarray]:
        n_tokens, n_bytes = 0, 0
        with Progress("encode", unit="B") as progress:
            for block in stream:
                yield block
                n_tokens += len(block)
                progress.update(report.text_bytes - n_bytes, f"{report.documents:,} documents")
                n_bytes = report.text_bytes
                if n_tokens >= max_tokens:
                    return

    write_file(work / TOKENS_FILE, blocks())


def _start_id(tokenizer: TextTokenizer, control_codes: Sequence[str] | None) -> int:
    """Id of the code that starts each document, the first; the others only have to exist."""
    if control_codes is None:
        return tokenizer.eot_id
    missing = [code for code in control_codes if tokenizer.token_to_id(code) is None]
    if missing or not control_codes:
        raise UserError(
            f"the tokenizer has no control code {', '.join(missing) or '(none given)'}: pass"
            " --control_codes that it has, or train one with train_tokenizer.py --control_codes"
        )
    return tokenizer.token_to_id(control_codes[0])


# --- phase 2: tokens to shards -------------------------------------------------------------------


def cut_rows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """All complete rows (n, seq_len + 1) of a stream, as a view; each starts with the last token
    of the one before, so that every token but the first is predicted exactly once."""
    if len(tokens) <= seq_len:
        return np.empty((0, seq_len + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def _write_shards(save_path: Path, plan: dict[str, Any], report: CorpusReport) -> Manifest:
    path = save_path / WORK_FOLDER / TOKENS_FILE
    seq_len, options = plan["seq_len"], plan["options"]
    tokens = np.memmap(path, np.dtype(plan["dtype"]).newbyteorder("<"), mode="r")
    rows = cut_rows(tokens, seq_len)
    if not len(rows):
        raise UserError(
            f"the text is too short for one row: {report.documents:,} documents make"
            f" {len(tokens):,} tokens, expected at least {seq_len + 1:,} (--seq_len {seq_len} and"
            " one); take more text or a smaller --seq_len"
        )
    n_rows = min(len(rows), options["n_examples"] or len(rows))
    n_shards = min(n_rows, math.ceil(report.documents / options["files_per_tfrecord"]))
    size = n_rows // n_shards
    shards: list[Shard] = []
    with Progress("write", total=n_shards * size, unit=" rows") as progress:
        for i in range(n_shards):
            path = save_path / f"{i}.tfrecord"
            shards.append(write_shard(path, rows[i * size : (i + 1) * size]))
            progress.update(size)
    manifest = Manifest(
        **plan,
        shards=tuple(shards),
        documents=report.documents,
        text_bytes=report.text_bytes,
        words=report.words,
        line_ends=report.line_ends,
        tokens=len(tokens),
        left_over_tokens=len(tokens) - 1 - len(rows) * seq_len,
        dropped_rows=len(rows) - n_shards * size,
    )
    write_manifest(save_path, manifest)
    return manifest


# --- the folder ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(save_path: Path) -> Iterator[None]:
    """Make the folder and hold it: two writers would destroy each other's shards."""
    try:
        save_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder --save_path {save_path} ({describe(error)}): choose another"
        ) from None
    if fcntl is None:
        yield
        return
    descriptor = os.open(save_path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{save_path} is being packed by another process") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _finished(save_path: Path, plan: dict[str, Any]) -> Manifest | None:
    """The manifest, if the folder holds the shards of `plan`, complete; None if unfinished.

    Raises:
        UserError: the folder holds something else.
    """
    work = save_path / WORK_FOLDER
    if (save_path / MANIFEST_FILE).exists():
        manifest = read_manifest(save_path)
        _check_plan(save_path, {name: getattr(manifest, name) for name in plan}, plan)
        open_rows(save_path)
        shutil.rmtree(work, ignore_errors=True)  # of a run killed behind its last step
        return manifest
    if (work / PLAN_FILE).exists():
        _check_plan(save_path, _read_plan(work), plan)
        return None
    others = sorted(path.name for path in save_path.iterdir() if not path.name.startswith("."))
    if others:
        raise UserError(
            f"{save_path} holds other files ({', '.join(others[:3])}): expected an empty folder or"
            " shards of the same command; choose another --save_path"
        )
    return None


def _check_plan(save_path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changes = changed_options(old, new, ignore=("sources", "tokenizer_sha256", "format_version"))
    before, after = str(old.get("tokenizer_sha256")), new["tokenizer_sha256"]
    if before != after:
        changes.append(f"tokenizer: sha256 {before[:12]} -> {after[:12]}")
    if old.get("sources") != new["sources"]:
        before, after = _name_sources(old.get("sources")), _name_sources(new["sources"])
        changes.append(f"text: {before} -> {after}" if before != after else f"files of {after}")
    if changes:
        raise UserError(
            f"{save_path} holds shards of another command ({'; '.join(changes[:6])}): choose"
            " another --save_path, repeat that command, or --overwrite to remove them"
        )


def _name_sources(sources: Any) -> str:
    described = sources if isinstance(sources, list) else []
    return " ".join(str(s.get("source")) for s in described if isinstance(s, dict)) or "unknown"


def _read_plan(work: Path) -> dict[str, Any]:
    path = work / PLAN_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: pack again with --overwrite") from None


def _open_work(save_path: Path, plan: dict[str, Any]) -> Path:
    work = save_path / WORK_FOLDER
    try:
        work.mkdir(exist_ok=True)
        write_json(work / PLAN_FILE, plan)
    except OSError as error:
        raise UserError(f"cannot write to --save_path {save_path} ({describe(error)})") from None
    (work / TOKENS_FILE).unlink(missing_ok=True)  # of a killed run: no space for two
    return work


def _remove_packing(save_path: Path, plan: dict[str, Any]) -> None:
    """Remove what an earlier command packed here; files of others stay."""
    manifest = save_path / MANIFEST_FILE
    if not manifest.exists() and not (save_path / WORK_FOLDER / PLAN_FILE).exists():
        return
    # The plan first: killed in between, the folder is still known as ours.
    _open_work(save_path, plan)
    manifest.unlink(missing_ok=True)
    _remove_shards(save_path)


def _remove_shards(save_path: Path) -> None:
    for path in save_path.glob("*.tfrecord"):
        if path.stem.isdigit():
            path.unlink()
