"""Text to packed shards: documents, one stream of tokens, rows of seq_len + 1, equal shards.

The folder's life, each step whole or not at all, so that a killed run goes on to the same bytes:

    .packing/plan.json     what is being packed; other options in the same folder are an error
    .packing/00000.json    phase 1 (token_store.py): a task whose tokens are there
    0.tfrecord ...         phase 2: the rows; .packing/0.json says that the shard is complete
    manifest.json          last: from here on the folder is finished, and .packing is removed

With a validation split the shards lie in train/ and valid/, each with its manifest.

A folder at a URL (gs://, s3:// ...) is packed in the cache: each shard is uploaded when it is
complete and its copy here removed, the manifest comes last. This machine needs room for the tokens
(2 or 4 bytes each) and one shard for each worker.
"""

import contextlib
import functools
import itertools
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .console import Progress, log
from .corpus import (
    BrokenInput,
    ChangedInput,
    CorpusReport,
    Part,
    describe_parts,
    list_parts,
    no_document,
)
from .detokenizers import detokenize
from .encoders import ENCODERS, choose_encoder
from .errors import UserError, describe
from .files import (
    CHECKSUM,
    content_sha256,
    describe_file,
    locked,
    read_record,
    remove,
    write_record,
)
from .memory import keep_freed_memory
from .options import PackOptions, changed_options
from .parallel import TasksStopped, available_cores, run_tasks
from .remote import RemotePath, as_path, local_folder
from .tfrecords import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    Shard,
    open_rows,
    read_manifest,
    shard_from_json,
    write_manifest,
    write_shard,
)
from .token_store import (
    Context,
    Segments,
    StreamRows,
    Task,
    TokenStore,
    cut_tasks,
    encode_task,
    order_documents,
    sample,
    segments_of,
)
from .tokenization_algpt2 import TextTokenizer

WORK_FOLDER, PLAN_FILE, ENCODER_FILE = ".packing", "plan.json", "encoder.json"
SPLITS = ("train", "valid")  # folders of a corpus that is split


@dataclass(frozen=True)
class Running:
    """How it is done: nothing here changes the bytes of the shards."""

    workers: int
    ray: str | None
    skip_broken: bool  # a task that is done had nothing broken, or left it out
    home: RemotePath | None = None  # where the shards go, if that is no folder of this machine


def pack(
    sources: str | Sequence[str],
    tokenizer: TextTokenizer,
    save_path: str | Path,
    *,
    seq_len: int,
    files_per_tfrecord: int = PackOptions.files_per_tfrecord,
    n_shards: int | None = None,
    use_control_codes: bool = PackOptions.use_control_codes,
    control_codes: Sequence[str] | None = None,
    n_examples: int | None = None,
    n_files: int | None = None,
    line_by_line: bool = False,
    text_key: str = PackOptions.text_key,
    detokenizer: str | None = None,
    min_length: int = 0,
    skip_broken: bool = False,
    dedup: bool = False,
    valid_fraction: float = 0.0,
    shuffle_documents: bool = False,
    seed: int = PackOptions.seed,
    workers: int | None = None,
    ray: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Pack the documents of `sources` into the folder `save_path`; done already: say so.

    Each document starts with `control_codes[0]` (None: the tokenizer's end of text) unless
    `use_control_codes` is off. Shards hold equal numbers of rows: `n_shards` of them, or one for
    every `files_per_tfrecord` documents. At most `n_examples` rows are written, and reading stops
    soon after there are as many. A `detokenizer` changes each document before it is encoded; what
    is counted, compared and split is the text before. Documents of fewer than `min_length`
    characters are left out, and with `skip_broken` what is damaged; both are counted. `dedup`
    leaves out copies of earlier ones, `shuffle_documents` orders them by `seed`, `valid_fraction`
    gives that share, chosen by the documents' hashes, a folder `valid` beside `train`. The bytes do
    not depend on `workers` (None: as many as cores) and `ray`. Returns the manifest (of `train`,
    where there are two). `save_path` may be a URL.

    Raises:
        BrokenInput: damaged files; what was done before is kept for the command with `skip_broken`.
        ChangedInput: a file changed meanwhile; the same command reads again the tasks that hold
            other files now.
        UserError: text too short for one row, an unknown control code, a folder that holds
            something else or shards of other options, or that cannot be written.
        OSError: disk full, or an upload that fails; repeat the command, it goes on.
    """
    sources, home = [sources] if isinstance(sources, str) else list(sources), as_path(save_path)
    save_path, home = local_folder(save_path), home if isinstance(home, RemotePath) else None
    if ray and home and "ALGPT2_CACHE" not in os.environ:
        raise UserError(
            f"--ray cannot pack straight into {home}: set ALGPT2_CACHE, on every node, to a folder"
            " that all of them see; the shards are made there"
        )
    options = {
        "files_per_tfrecord": files_per_tfrecord,
        "n_shards": n_shards,
        "use_control_codes": use_control_codes,
        "control_codes": None if control_codes is None else list(control_codes),
        "n_examples": n_examples,
        "n_files": n_files,
        "line_by_line": line_by_line,
        "text_key": text_key,
        "detokenizer": detokenizer,
        "min_length": min_length,
        "dedup": dedup,
        "valid_fraction": valid_fraction,
        "shuffle_seed": seed if shuffle_documents else None,
    }
    start_id = _start_id(tokenizer, control_codes) if use_control_codes else None
    report = CorpusReport()
    # Damage in an archive's list is an error of the work, not of a folder that is done.
    parts = list(list_parts(sources, report, line_by_line=line_by_line, skip_broken=True))
    plan = _plan(describe_parts(parts, n_files), tokenizer, seq_len, options)
    with _locked(save_path):
        if overwrite:
            _remove_packing(save_path, plan)
        if home is not None:
            finished = _meet_home(home, save_path, plan, overwrite)
        else:
            finished = _finished(save_path, plan)
        if finished:
            log(f"{home or save_path} is done: {summary(finished)}")
            return finished
        running = Running(workers or available_cores(), ray, skip_broken, home)
        return _pack(parts, report, tokenizer, save_path, plan, start_id, running)


def _plan(
    sources: list[dict], tokenizer: TextTokenizer, seq_len: int, options: dict[str, Any]
) -> dict[str, Any]:
    """All that decides the bytes of the shards: the fields of the manifest known beforehand."""
    return {
        "format_version": FORMAT_VERSION,
        "seq_len": seq_len,
        "dtype": np.dtype(tokenizer.dtype).name,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "tokenizer_sha256": tokenizer.fingerprint,
        "sources": sources,
        "options": options,
    }


def _pack(
    parts: list[Part],
    report: CorpusReport,
    tokenizer: TextTokenizer,
    save_path: Path,
    plan: dict[str, Any],
    start_id: int | None,
    running: Running,
) -> Manifest:
    """Both phases; the manifest of the finished folder."""
    start_s = time.monotonic()
    keep_freed_memory()  # of this process, which may be the only worker
    work, home = _open_work(save_path, plan), running.home
    try:
        store, encoder = _encode(parts, report, tokenizer, work, plan, start_id, running)
        splits, duplicates = _choose_documents(store, report, plan["options"])
        manifests = {
            name: _write_split(save_path / name, work, store, plan, running, counts, segments)
            for name, (counts, segments) in splits.items()
        }
        for name in reversed(manifests):  # train last: it finishes the folder
            manifest = Manifest(**manifests[name], duplicates=duplicates, encoder=encoder)
            write_manifest(save_path / name, manifest)
            if home is not None:
                (home / name / MANIFEST_FILE).put(save_path / name / MANIFEST_FILE)
            log(f"{(home or save_path) / name}: {summary(manifest)}")
    except (BrokenInput, TasksStopped):  # the same command goes on, or one with --skip_broken
        raise
    except UserError as error:  # another command is needed: nothing may stand in its way
        _remove_shards(save_path)
        if isinstance(error, ChangedInput):  # the same one lists anew; it knows its tasks again
            for name in (PLAN_FILE, ENCODER_FILE):
                (work / name).unlink(missing_ok=True)
        else:
            shutil.rmtree(work)
        if home is not None:
            _remove_from_home(home)
        raise
    shutil.rmtree(work)
    _remove_partial(save_path)  # of a worker that died, and whose task another one did
    if home is not None:
        _leave_home(home, save_path)
    seconds = max(1e-9, time.monotonic() - start_s)
    log(f"read {report.summary()}")
    workers = f"{running.workers} workers" if running.ray is None else f"Ray at {running.ray}"
    log(f"{seconds:.1f} s, {report.text_bytes / 1e6 / seconds:.2f} MB/s, {workers}")
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
    if manifest.duplicates:
        parts.insert(1, f"{manifest.duplicates:,} copies left out")
    if manifest.dropped_rows:
        limit = manifest.options.get("n_examples")
        reason = "that do not divide by the shards" + (
            f" or --n_examples {limit} cut" if limit else ""
        )
        parts.append(f"{manifest.dropped_rows:,} rows dropped {reason}")
    return ", ".join(parts)


# --- phase 1: documents to tokens ----------------------------------------------------------------


def _encode(
    parts: list[Part],
    report: CorpusReport,
    tokenizer: TextTokenizer,
    work: Path,
    plan: dict[str, Any],
    start_id: int | None,
    running: Running,
) -> tuple[TokenStore, dict[str, Any]]:
    """Run the tasks, whose reports are added to `report`; the stored tokens and who encoded."""
    if report.n_broken and not running.skip_broken:
        raise BrokenInput(f"{report.broken[0]}; --skip_broken leaves it out and counts it")
    options = plan["options"]
    reading = {name: options[name] for name in ("line_by_line", "text_key", "min_length")}
    reading["skip_broken"] = running.skip_broken
    tasks = cut_tasks(parts, options["n_files"])
    texts = sample(tasks, reading)
    if options["detokenizer"]:
        texts = (detokenize(text, options["detokenizer"]) for text in texts)
    encoder = _choose_encoder(work, tokenizer, texts)
    n_examples = options["n_examples"]
    context = Context(
        work=work,
        tokenizer=tokenizer,
        encoder=encoder["name"],
        start_id=start_id,
        reading=reading,
        with_documents=_picks_documents(options),
        max_tokens=math.inf if n_examples is None else n_examples * plan["seq_len"] + 1,
        detokenizer=options["detokenizer"],
        plan=content_sha256({**plan, "sources": None}),
    )
    sizes: list[int] = []
    on_disk = (sum(part.size for part in task.parts) or 1 for task in tasks)
    read = [*itertools.accumulate(on_disk)]  # bytes with so many tasks
    with Progress("encode", unit="B") as progress:
        for result in _encoded(context, tasks, running, progress):
            sizes.append(result["tokens"])
            report.add(result["report"])
            note = f"{report.documents:,} documents, task {len(sizes):,} of {len(tasks):,}"
            enough = min(1.0, sum(sizes) / context.max_tokens)
            total = round(report.text_bytes / max(read[len(sizes) - 1] / read[-1], enough))
            progress.update(report.text_bytes - progress.done, note, total)
            if sum(sizes) >= context.max_tokens:
                break
    if not report.documents:
        raise no_document([source["source"] for source in plan["sources"]], report)
    return TokenStore(work, tuple(sizes), plan["dtype"]), encoder


def _encoded(
    context: Context, tasks: list[Task], running: Running, progress: Progress
) -> Iterator[dict[str, Any]]:
    """The tasks' results in order; a single task shows its progress while it runs."""

    def tick(report: CorpusReport) -> None:
        progress.update(report.text_bytes - progress.done, f"{report.documents:,} documents")

    if len(tasks) == 1:
        return iter([encode_task(context, tasks[0], tick=tick)])
    function = functools.partial(encode_task, context)
    return run_tasks(function, tasks, workers=running.workers, ray=running.ray)


def _choose_encoder(work: Path, tokenizer: TextTokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """The encoder of this folder, compared on `texts`: once, so that all tasks have the same."""
    path = work / ENCODER_FILE
    with contextlib.suppress(FileNotFoundError, UserError):  # a damaged one is chosen again
        encoder = read_record(path).get("encoder")
        if isinstance(encoder, dict) and encoder.get("name") in ENCODERS:
            return encoder
    write_record(path, {"encoder": choose_encoder(tokenizer, texts)})
    return read_record(path)["encoder"]


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


# --- which documents -----------------------------------------------------------------------------


def _picks_documents(options: dict[str, Any]) -> bool:
    """Whether documents are looked at one by one; else the stream is packed as it lies."""
    return bool(
        options["dedup"] or options["valid_fraction"] or options["shuffle_seed"] is not None
    )


def _choose_documents(
    store: TokenStore, report: CorpusReport, options: dict[str, Any]
) -> tuple[dict[str, tuple[dict[str, int], Segments]], int]:
    """Of each split the counts of its text and its tokens; how many documents are copies."""
    if not _picks_documents(options):
        counts = {name: getattr(report, name) for name in COUNTS}
        return {"": (counts, Segments.of_stream(sum(store.sizes)))}, 0
    documents = store.documents()
    orders, duplicates = order_documents(
        documents,
        dedup=options["dedup"],
        valid_fraction=options["valid_fraction"],
        shuffle_seed=options["shuffle_seed"],
    )
    splits = {}
    for name, order in orders.items():
        if not len(order):
            raise UserError(
                f"--valid_fraction {options['valid_fraction']} of {len(documents):,} documents"
                f" leaves none for {name}/: expected more documents, or another fraction"
            )
        counts = {"documents": len(order)}
        counts |= {field: int(documents[field][order].sum()) for field in COUNTS[1:]}
        splits[name] = counts, segments_of(documents, order)
    return splits, duplicates


COUNTS = ("documents", "text_bytes", "words", "line_ends")  # fields of the manifest and the report


# --- phase 2: tokens to shards -------------------------------------------------------------------


def _write_split(
    folder: Path,
    work: Path,
    store: TokenStore,
    plan: dict[str, Any],
    running: Running,
    counts: dict[str, int],
    segments: Segments,
) -> dict[str, Any]:
    """Write the shards of one folder; the fields of its manifest."""
    seq_len, options = plan["seq_len"], plan["options"]
    n_all = max(0, segments.n_tokens - 1) // seq_len
    if not n_all:
        raise UserError(
            f"the text is too short for one row: {counts['documents']:,} documents make"
            f" {segments.n_tokens:,} tokens, expected at least {seq_len + 1:,} (--seq_len {seq_len}"
            " and one); take more text or a smaller --seq_len"
        )
    n_rows = min(n_all, options["n_examples"] or n_all)
    n_shards = options["n_shards"] or math.ceil(counts["documents"] / options["files_per_tfrecord"])
    if options["n_shards"] and n_rows < n_shards:
        raise UserError(
            f"--n_shards {n_shards} needs as many rows, the text makes {n_rows:,}: take more text,"
            " a smaller --seq_len or fewer shards"
        )
    n_shards = min(n_rows, n_shards)
    size = n_rows // n_shards
    folder.mkdir(exist_ok=True)
    places = [i * size * seq_len for i in range(n_shards)]
    tasks = [
        (folder / f"{i}.tfrecord", segments.cut(place, place + size * seq_len + 1))
        for i, place in enumerate(places)
    ]
    function = functools.partial(_write_shard, work, store, seq_len, running.home)
    shards: list[Shard] = []
    doing = "write and upload" if running.home else "write"
    with Progress(doing, total=n_shards * size, unit=" rows") as progress:
        for shard in run_tasks(function, tasks, workers=running.workers, ray=running.ray):
            shards.append(shard)
            progress.update(size)
    return {
        **plan,
        **counts,
        "shards": tuple(shards),
        "tokens": segments.n_tokens,
        "left_over_tokens": segments.n_tokens - 1 - n_all * seq_len,
        "dropped_rows": n_all - n_shards * size,
    }


def _write_shard(
    work: Path,
    store: TokenStore,
    seq_len: int,
    home: RemotePath | None,
    task: tuple[Path, Segments],
) -> Shard:
    """Write one shard, unless it is there and complete; with a `home` it moves there."""
    path, segments = task
    there = home and home / path.relative_to(work.parent).as_posix()
    done = work / f"shard-{path.parent.name if path.parent != work.parent else ''}-{path.stem}.json"
    with contextlib.suppress(FileNotFoundError, UserError):  # not done, or damaged since: again
        shard = shard_from_json(read_record(done).get("shard"), done)
        if there and there.stat().st_size == shard.bytes:
            return shard
        if not there and describe_file(path) == (shard.bytes, shard.sha256):
            return shard
    shard = write_shard(path, StreamRows(store, segments, seq_len))
    if there:
        there.put(path)
        path.unlink()
    write_record(done, {"shard": asdict(shard)})
    return shard


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
    with locked(save_path, f"{save_path} is being packed by another process"):
        yield


def _folders(save_path: Path, options: dict[str, Any]) -> list[Path]:
    """Where the shards lie; the first folder's manifest is written last."""
    return [save_path / name for name in (SPLITS if options["valid_fraction"] else ("",))]


def _finished(save_path: Path, plan: dict[str, Any]) -> Manifest | None:
    """The manifest, if the folder holds the shards of `plan`, complete; None if unfinished.

    Raises:
        UserError: the folder holds something else.
    """
    work = save_path / WORK_FOLDER
    for folder in dict.fromkeys([save_path, *_folders(save_path, plan["options"])]):
        if (folder / MANIFEST_FILE).exists():
            manifest = read_manifest(folder)
            _check_plan(save_path, {name: getattr(manifest, name) for name in plan}, plan)
    manifests = []
    for folder in _folders(save_path, plan["options"]):
        if (folder / MANIFEST_FILE).exists():
            manifests.append(open_rows(folder).manifest)
    if len(manifests) == len(_folders(save_path, plan["options"])):
        shutil.rmtree(work, ignore_errors=True)  # of a run killed behind its last step
        return manifests[0]
    if (work / PLAN_FILE).exists():
        _check_plan(save_path, _read_plan(work / PLAN_FILE), plan)
        return None
    others = sorted(path.name for path in save_path.iterdir() if not path.name.startswith("."))
    if others:
        raise UserError(
            f"{save_path} holds other files ({', '.join(others[:3])}): expected an empty folder or"
            " shards of the same command; choose another --save_path"
        )
    return None


def _check_plan(save_path: Path | RemotePath, old: dict[str, Any], new: dict[str, Any]) -> None:
    ignored = ("sources", "tokenizer_sha256", "format_version", CHECKSUM)
    changes = changed_options(old, new, ignored)
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


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        return read_record(path, required=False)
    except UserError as error:
        raise UserError(f"{error}; pack again with --overwrite") from None


def _open_work(save_path: Path, plan: dict[str, Any]) -> Path:
    work = save_path / WORK_FOLDER
    try:
        if work.is_symlink():
            raise UserError(f"{work} is a link: expected a folder; remove the link")
        work.mkdir(exist_ok=True)
        write_record(work / PLAN_FILE, plan)
    except OSError as error:
        raise UserError(f"cannot write to --save_path {save_path} ({describe(error)})") from None
    _remove_partial(save_path)  # of a killed run
    return work


def _remove_partial(save_path: Path) -> None:
    for path in save_path.rglob(".*.partial"):
        remove(path)


def _remove_packing(save_path: Path, plan: dict[str, Any]) -> None:
    """Remove what an earlier command packed here; files of others stay."""
    work = save_path / WORK_FOLDER
    folders = [save_path, *(save_path / name for name in SPLITS)]
    manifests = [folder / MANIFEST_FILE for folder in folders]
    if not (work / PLAN_FILE).exists() and not any(path.exists() for path in manifests):
        return
    # The plan first: killed in between, the folder is still known as ours.
    shutil.rmtree(work, ignore_errors=True)
    _open_work(save_path, plan)
    for path in manifests:
        path.unlink(missing_ok=True)
    _remove_shards(save_path)


def _remove_shards(save_path: Path) -> None:
    for folder in (save_path, *(save_path / name for name in SPLITS)):
        for path in folder.glob("*.tfrecord"):
            if path.stem.isdigit():
                path.unlink()
        if folder != save_path and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


# --- a folder at a URL ---------------------------------------------------------------------------

PLAN_NAME = f"{WORK_FOLDER}/{PLAN_FILE}"


def _meet_home(
    home: RemotePath, save_path: Path, plan: dict[str, Any], overwrite: bool
) -> Manifest | None:
    """The manifest, if the folder at a URL holds the shards of `plan`, complete; None if
    unfinished: then it has the plan, and the work in `save_path` is of the same plan.

    Raises:
        UserError: the folder holds something else.
    """
    if overwrite:
        _remove_from_home(home)
    files = home.files()
    folders = SPLITS if plan["options"]["valid_fraction"] else ("",)
    manifests = {}
    for name in ("", *SPLITS):
        if _in(name, MANIFEST_FILE) in files:
            manifest = manifests[name] = read_manifest(home / name)
            _check_plan(home, {field: getattr(manifest, field) for field in plan}, plan)
    if all(name in manifests for name in folders):
        for name in folders:
            for shard in manifests[name].shards:
                if files.get(_in(name, shard.file)) != shard.bytes:
                    raise UserError(
                        f"{home / name / shard.file} is missing or damaged: pack again with"
                        " --overwrite"
                    )
        _leave_home(home, save_path)  # of a run killed behind its last step
        return manifests[folders[0]]
    others = [name for name in files if not Path(name).name.startswith(".") and name != PLAN_NAME]
    work = save_path / WORK_FOLDER
    if PLAN_NAME in files:
        (home / PLAN_NAME).get(save_path / PLAN_FILE)
        _check_plan(home, _read_plan(save_path / PLAN_FILE), plan)
    elif others:
        raise UserError(
            f"{home} holds other files ({', '.join(others[:3])}): expected an empty folder or"
            " shards of the same command; choose another --save_path"
        )
    if PLAN_NAME not in files or not _has_plan(work, plan):
        for path in save_path.iterdir():  # of another plan, which the folder no longer has
            remove(path)
    if PLAN_NAME not in files:
        (home / PLAN_NAME).put(_open_work(save_path, plan) / PLAN_FILE)
    return None


def _has_plan(work: Path, plan: dict[str, Any]) -> bool:
    with contextlib.suppress(FileNotFoundError, UserError):  # none, or another
        _check_plan(work, _read_plan(work / PLAN_FILE), plan)
        return True
    return False


def _leave_home(home: RemotePath, save_path: Path) -> None:
    """What was needed to continue is not needed any more."""
    (home / PLAN_NAME).unlink(missing_ok=True)
    shutil.rmtree(save_path, ignore_errors=True)


def _remove_from_home(home: RemotePath) -> None:
    """Remove what a command packed here, its plan last; files of others stay."""
    files = home.files()
    manifests = [_in(name, MANIFEST_FILE) for name in ("", *SPLITS)]
    if PLAN_NAME not in files and not any(name in files for name in manifests):
        return
    folders = {_in(name, "") for name in ("", *SPLITS)}
    shards = [
        name for name in files
        if re.fullmatch(r"(.*/)?\d+\.tfrecord", name) and name.rpartition("/")[0] in folders
    ]  # fmt: skip
    for name in (*shards, *manifests, PLAN_NAME):
        (home / name).unlink(missing_ok=True)


def _in(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part)
