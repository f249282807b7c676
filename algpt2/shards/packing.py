"""Text to packed shards: documents, one stream of tokens, rows of seq_len + 1, equal shards.

Each file appears when it is complete, so that a killed command continues to the same bytes:

    .packing/plan.json     what is being packed; other options in the same folder are an error
    .packing/00000.json    phase 1 (token_store.py): the tokens of a task are there
    0.tfrecord ...         phase 2: the rows; .packing/0.json says that the shard is complete
    manifest.json          last: the folder is finished, and .packing is removed

With a validation split the shards lie in train/ and valid/, each with its manifest.

A folder at a URL (gs://, s3:// ...) is packed in the cache: each shard is uploaded when it is
complete and its local copy removed; the manifest comes last. The local disk needs room for the
tokens (2 or 4 bytes each) and a shard for each worker.
"""

import contextlib
import functools
import itertools
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..corpus.documents import log_counts, no_document
from ..corpus.listing import identify_parts, list_parts
from ..corpus.parts import SKIP_HINT, BrokenInput, ChangedInput, CorpusCounts, Part, Reading
from ..errors import UserError, describe
from ..options import PackOptions, changed_options
from ..system.console import Progress, log
from ..system.files import (
    CHECKSUM,
    content_sha256,
    describe_file,
    locked,
    read_record,
    remove,
    write_record,
)
from ..system.memory import keep_freed_memory
from ..system.parallel import TasksStopped, available_cores, run_tasks
from ..system.remote import RemotePath, as_path, local_folder
from ..tokenization_algpt2 import TextTokenizer
from .detokenizers import detokenize
from .encoders import ENCODERS, choose_encoder
from .tfrecords import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    Shard,
    from_json,
    read_manifest,
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

WORK_FOLDER, PLAN_FILE, ENCODER_FILE = ".packing", "plan.json", "encoder.json"
PLAN_NAME = f"{WORK_FOLDER}/{PLAN_FILE}"
SPLITS = ("train", "valid")  # folders of a corpus that is split
COUNTS = ("documents", "text_bytes", "words", "line_ends")  # fields of Manifest and CorpusCounts
# Options that decide the bytes of the shards: manifest.json records them in this order.
RECORDED = (
    "files_per_tfrecord", "n_shards", "use_control_codes", "control_codes", "n_examples", "n_files",
    "line_by_line", "document_mark", "text_key", "detokenizer", "min_length", "dedup",
    "valid_fraction",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """The work of one command: options, text, plan, folder."""

    options: PackOptions
    tokenizer: TextTokenizer
    parts: list[Part]
    counts: CorpusCounts  # filled by listing and reading
    plan: dict[str, Any]  # the fields of the manifest that decide the bytes of the shards
    folder: Path  # on this machine; of a URL the shards wait here for their upload
    home: RemotePath | None  # a folder at a URL

    @property
    def place(self) -> Path | RemotePath:
        """The folder that the user named."""
        return self.home or self.folder

    @property
    def work(self) -> Path:
        return self.folder / WORK_FOLDER

    @property
    def splits(self) -> tuple[str, ...]:
        """Folders of shards; the manifest of the first is written last."""
        return SPLITS if self.options.valid_fraction else ("",)

    @property
    def picks_documents(self) -> bool:
        """Whether documents are picked or shuffled; if not, the stream is packed as stored."""
        return bool(
            self.options.dedup or self.options.valid_fraction or self.options.shuffle_documents
        )

    @property
    def workers(self) -> int:
        return self.options.workers or available_cores()


def pack(options: PackOptions, tokenizer: TextTokenizer) -> Manifest:
    """Pack the documents of `options.path` into `options.save_path`, unless that is done already.

    Each document starts with the first of `control_codes` (None: the tokenizer's end of text)
    unless `use_control_codes` is off. Shards hold equal numbers of rows: there are `n_shards`, or
    one for every `files_per_tfrecord` documents. Reading stops soon after there are `n_examples`
    rows. A `detokenizer` changes each document before it is encoded; documents are counted,
    compared and split as they were before. The bytes do not depend on `workers` and `ray`.

    Returns:
        The manifest; of `train`, if `valid_fraction` makes `train` and `valid`.

    Raises:
        BrokenInput: damaged files; finished tasks are kept for the command with `skip_broken`.
        ChangedInput: a file changed meanwhile; the same command repeats only the tasks that hold
            changed files.
        UserError: text too short for one row, an unknown control code, a folder that holds
            something else or shards of other options, or that cannot be written.
        OSError: disk full, or an upload that fails; the same command continues.
    """
    job = _plan_job(options, tokenizer)
    _make_folder(job.folder)
    # Two processes would destroy each other's shards.
    with locked(job.folder, f"{job.folder} is being packed by another process"):
        if options.overwrite:
            _remove_packing(job)
        finished = _finished(job)
        if finished:
            log(f"{job.place} is done: {finished}")
            return finished
        return _pack(job)


def _plan_job(options: PackOptions, tokenizer: TextTokenizer) -> Job:
    home = as_path(options.save_path)
    home = home if isinstance(home, RemotePath) else None
    if options.ray and home and "ALGPT2_CACHE" not in os.environ:
        raise UserError(
            f"--ray cannot pack straight into {home}: set ALGPT2_CACHE, on every node, to a folder"
            " that all nodes share; the shards are made there"
        )
    _start_id(options, tokenizer)  # an unknown code is an error before anything is listed
    counts = CorpusCounts()
    # Damage in an archive's list stops the work, not the check whether the folder is done.
    reading = Reading(line_by_line=options.line_by_line, skip_broken=True)
    parts = list(list_parts(options.path, reading, counts))
    plan = _plan(options, tokenizer, identify_parts(parts, options.n_files))
    return Job(options, tokenizer, parts, counts, plan, local_folder(options.save_path), home)


def _plan(options: PackOptions, tokenizer: TextTokenizer, sources: list[dict]) -> dict[str, Any]:
    """All that decides the bytes of the shards: the fields of the manifest known beforehand."""
    recorded = {name: getattr(options, name) for name in RECORDED}
    if options.control_codes is not None:
        recorded["control_codes"] = list(options.control_codes)
    recorded["shuffle_seed"] = options.seed if options.shuffle_documents else None
    return {
        "format_version": FORMAT_VERSION,
        "seq_len": options.seq_len,
        "dtype": np.dtype(tokenizer.dtype).name,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "tokenizer_sha256": tokenizer.fingerprint,
        "sources": sources,
        "options": recorded,
    }


def _pack(job: Job) -> Manifest:
    start_s = time.monotonic()
    keep_freed_memory()  # of this process, which may be the only worker
    _open_work(job)
    try:
        manifest = _write_folders(job)
    except (BrokenInput, TasksStopped):  # the same command continues, or with --skip_broken
        raise
    except UserError as error:  # the next command differs: nothing may stand in its way
        _clear(job, keep_tasks=isinstance(error, ChangedInput))
        raise
    _remove_work(job)
    seconds = max(1e-9, time.monotonic() - start_s)
    log_counts(job.counts, job.tokenizer.end_of_text)
    ray = job.options.ray
    workers = f"{job.workers} workers" if ray is None else f"Ray at {ray}"
    log(f"{seconds:.1f} s, {job.counts.text_bytes / 1e6 / seconds:.2f} MB/s, {workers}")
    return manifest


def _write_folders(job: Job) -> Manifest:
    """Both phases; the manifest that finishes the folder."""
    store, encoder = _encode(job)
    splits, duplicates = _choose_documents(job, store)
    manifests = {
        name: _write_split(job, name, store, counts, segments)
        for name, (counts, segments) in splits.items()
    }
    for name in reversed(manifests):  # train last: it finishes the folder
        manifest = Manifest(**manifests[name], duplicates=duplicates, encoder=encoder)
        write_manifest(job.folder / name, manifest)
        if job.home is not None:
            (job.home / name / MANIFEST_FILE).put(job.folder / name / MANIFEST_FILE)
        log(f"{job.place / name}: {manifest}")
    return manifest


# --- phase 1: documents to tokens ----------------------------------------------------------------


def _encode(job: Job) -> tuple[TokenStore, dict[str, Any]]:
    """Run the tasks; the stored tokens, and the encoder as the manifest records it."""
    options, plan = job.options, job.plan
    if job.counts.n_broken and not options.skip_broken:
        raise BrokenInput(f"{job.counts.broken[0]}{SKIP_HINT}")
    reading = Reading(
        options.text_key, options.line_by_line, options.min_length, options.skip_broken,
        document_mark=options.document_mark, end_of_text=job.tokenizer.end_of_text,
    )  # fmt: skip
    tasks = cut_tasks(job.parts, options.n_files)
    encoder = _choose_encoder(job, sample(tasks, reading))
    n_examples = options.n_examples
    context = Context(
        work=job.work,
        tokenizer=job.tokenizer,
        encoder=encoder["name"],
        start_id=_start_id(options, job.tokenizer),
        reading=reading,
        with_documents=job.picks_documents,
        max_tokens=math.inf if n_examples is None else n_examples * options.seq_len + 1,
        detokenizer=options.detokenizer,
        plan=content_sha256({**plan, "sources": None}),
    )
    sizes = _run_encoding(job, context, tasks)
    if not job.counts.documents:
        raise no_document([source["source"] for source in plan["sources"]], job.counts)
    return TokenStore(job.work, sizes, plan["dtype"]), encoder


def _run_encoding(job: Job, context: Context, tasks: list[Task]) -> tuple[int, ...]:
    """The number of tokens of each task; their counts are added to those of the job."""
    counts, sizes = job.counts, []
    on_disk = (sum(part.size for part in task.parts) or 1 for task in tasks)
    read = [*itertools.accumulate(on_disk)]  # bytes of the tasks up to each
    with Progress("encode", unit="B") as progress:
        for result in _encoded(job, context, tasks, progress):
            sizes.append(result["tokens"])
            counts.add(result["counts"])
            note = f"{counts.documents:,} documents, task {len(sizes):,} of {len(tasks):,}"
            enough = min(1.0, sum(sizes) / context.max_tokens)
            total = round(counts.text_bytes / max(read[len(sizes) - 1] / read[-1], enough))
            progress.update(counts.text_bytes - progress.done, note, total)
            if sum(sizes) >= context.max_tokens:
                break
    return tuple(sizes)


def _encoded(
    job: Job, context: Context, tasks: list[Task], progress: Progress
) -> Iterator[dict[str, Any]]:
    """The tasks' results in order; a single task shows its progress while it runs."""

    def tick(counts: CorpusCounts) -> None:
        progress.update(counts.text_bytes - progress.done, f"{counts.documents:,} documents")

    if len(tasks) == 1:
        return iter([encode_task(context, tasks[0], tick=tick)])
    function = functools.partial(encode_task, context)
    return run_tasks(function, tasks, workers=job.workers, ray=job.options.ray)


def _choose_encoder(job: Job, texts: Iterable[bytes]) -> dict[str, Any]:
    """The encoder of this folder, chosen once on a sample, so that all tasks have the same."""
    path = job.work / ENCODER_FILE
    with contextlib.suppress(FileNotFoundError, UserError):  # damaged: choose again
        encoder = read_record(path).get("encoder")
        if isinstance(encoder, dict) and encoder.get("name") in ENCODERS:
            return encoder
    if name := job.options.detokenizer:
        texts = (detokenize(text, name) for text in texts)
    write_record(path, {"encoder": choose_encoder(job.tokenizer, texts)})
    return read_record(path)["encoder"]


def _start_id(options: PackOptions, tokenizer: TextTokenizer) -> int | None:
    """Id of the code that starts each document; all other control codes only have to exist."""
    codes = options.control_codes
    if not options.use_control_codes:
        return None
    if codes is None:
        return tokenizer.eot_id
    missing = [code for code in codes if tokenizer.token_to_id(code) is None]
    if missing or not codes:
        raise UserError(
            f"the tokenizer has no control code {', '.join(missing) or '(none given)'}: pass"
            " --control_codes that it has, or train one with train_tokenizer.py --control_codes"
        )
    return tokenizer.token_to_id(codes[0])


# --- which documents -----------------------------------------------------------------------------


def _choose_documents(
    job: Job, store: TokenStore
) -> tuple[dict[str, tuple[dict[str, int], Segments]], int]:
    """For each split the counts of its text, and its tokens; then the number of copies."""
    if not job.picks_documents:
        counts = {name: getattr(job.counts, name) for name in COUNTS}
        return {"": (counts, Segments.of_stream(sum(store.sizes)))}, 0
    documents = store.documents()
    valid_fraction = job.options.valid_fraction
    orders, duplicates = order_documents(
        documents,
        dedup=job.options.dedup,
        valid_fraction=valid_fraction,
        shuffle_seed=job.plan["options"]["shuffle_seed"],
    )
    splits = {}
    for name, order in orders.items():
        if not len(order):
            raise UserError(
                f"--valid_fraction {valid_fraction} of {len(documents):,} documents"
                f" leaves no document for {name}/: expected more documents, or another fraction"
            )
        counts = {"documents": len(order)}
        counts |= {field: int(documents[field][order].sum()) for field in COUNTS[1:]}
        splits[name] = counts, segments_of(documents, order)
    return splits, duplicates


# --- phase 2: tokens to shards -------------------------------------------------------------------


def _write_split(
    job: Job, name: str, store: TokenStore, counts: dict[str, int], segments: Segments
) -> dict[str, Any]:
    """Write the shards of a folder; the fields of its manifest."""
    seq_len = job.options.seq_len
    n_all = max(0, segments.n_tokens - 1) // seq_len
    n_shards, size = _divide_rows(job.options, n_all, counts["documents"], segments.n_tokens)
    folder = job.folder / name
    folder.mkdir(exist_ok=True)
    places = [i * size * seq_len for i in range(n_shards)]
    tasks = [
        (folder / f"{i}.tfrecord", segments.cut(place, place + size * seq_len + 1))
        for i, place in enumerate(places)
    ]
    function = functools.partial(_write_shard, store, seq_len, job.home)
    shards: list[Shard] = []
    verb = "write and upload" if job.home else "write"
    with Progress(verb, total=n_shards * size, unit=" rows") as progress:
        for shard in run_tasks(function, tasks, workers=job.workers, ray=job.options.ray):
            shards.append(shard)
            progress.update(size)
    return {
        **job.plan,
        **counts,
        "shards": tuple(shards),
        "tokens": segments.n_tokens,
        "left_over_tokens": segments.n_tokens - 1 - n_all * seq_len,
        "dropped_rows": n_all - n_shards * size,
    }


def _divide_rows(
    options: PackOptions, n_all: int, n_documents: int, n_tokens: int
) -> tuple[int, int]:
    """The number of shards, and of rows in each, for `n_all` rows."""
    seq_len = options.seq_len
    if not n_all:
        raise UserError(
            f"the text is too short for one row: {n_documents:,} documents make {n_tokens:,}"
            f" tokens, expected at least {seq_len + 1:,} (--seq_len {seq_len} and one); take more"
            " text or a smaller --seq_len"
        )
    n_rows = min(n_all, options.n_examples or n_all)
    n_shards = options.n_shards or math.ceil(n_documents / options.files_per_tfrecord)
    if options.n_shards and n_rows < n_shards:
        raise UserError(
            f"--n_shards {n_shards} needs as many rows, the text makes {n_rows:,}: take more text,"
            " a smaller --seq_len or fewer shards"
        )
    n_shards = min(n_rows, n_shards)
    return n_shards, n_rows // n_shards


def _write_shard(
    store: TokenStore, seq_len: int, home: RemotePath | None, task: tuple[Path, Segments]
) -> Shard:
    """Write a shard, unless it is there and complete; with a `home`, move it there."""
    path, segments = task
    folder = store.work.parent
    target = home and home / path.relative_to(folder).as_posix()
    split = path.parent.name if path.parent != folder else ""
    record = store.work / f"shard-{split}-{path.stem}.json"
    with contextlib.suppress(FileNotFoundError, UserError):  # not done, or damaged since
        shard = from_json(Shard, read_record(record).get("shard"), record)
        if target and target.stat().st_size == shard.bytes:
            return shard
        if not target and describe_file(path) == (shard.bytes, shard.sha256):
            return shard
    shard = write_shard(path, StreamRows(store, segments, seq_len))
    if target:
        target.put(path)
        path.unlink()
    write_record(record, {"shard": asdict(shard)})
    return shard


# --- the folder ----------------------------------------------------------------------------------

OUTPUT = re.compile(rf"(?:(?:{'|'.join(SPLITS)})/)?(?:\d+\.tfrecord|{re.escape(MANIFEST_FILE)})")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder --save_path {folder} ({describe(error)}): choose another"
        ) from None


def _files_in(place: Path | RemotePath) -> dict[str, int]:
    """Name, relative to the folder, and size of each entry of the folder, its splits, its plan."""
    if isinstance(place, RemotePath):
        return place.files()
    folders = [place, *(place / name for name in SPLITS)]
    paths = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    paths += [place / PLAN_NAME] if (place / PLAN_NAME).is_file() else []
    return {
        path.relative_to(place).as_posix(): path.stat().st_size if path.exists() else 0
        for path in paths
    }


def _finished(job: Job) -> Manifest | None:
    """The manifest, if the folder holds the shards of `job.plan`, complete; None if unfinished.

    Raises:
        UserError: the folder holds something else.
    """
    place, files = job.place, _files_in(job.place)
    manifests = {}
    for name in ("", *SPLITS):
        if _in(name, MANIFEST_FILE) in files:
            manifest = manifests[name] = read_manifest(place / name)
            _check_plan(place, {field: getattr(manifest, field) for field in job.plan}, job.plan)
    if all(name in manifests for name in job.splits):
        for name in job.splits:
            _check_sizes(place, name, manifests[name], files)
        _remove_work(job)  # of a command that was killed after its last manifest
        return manifests[job.splits[0]]
    others = [name for name in files if not re.match(r"(.*/)?\.", name)]
    if PLAN_NAME in files:
        _check_plan(place, _read_plan(place / PLAN_NAME), job.plan)
    elif others:
        raise UserError(
            f"{place} holds other files ({', '.join(sorted(others)[:3])}): expected an empty folder"
            " or shards of the same command; choose another --save_path"
        )
    if job.home is not None and not (PLAN_NAME in files and _has_plan(job)):
        for path in job.folder.iterdir():  # of another plan, which the folder no longer has
            remove(path)
    return None


def _check_sizes(
    place: Path | RemotePath, split: str, manifest: Manifest, files: dict[str, int]
) -> None:
    for shard in manifest.shards:
        if files.get(_in(split, shard.file)) != shard.bytes:
            raise UserError(
                f"{place / split / shard.file} is missing or damaged: pack again with --overwrite"
            )


def _check_plan(place: Path | RemotePath, old: dict[str, Any], new: dict[str, Any]) -> None:
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
            f"{place} holds shards of another command ({'; '.join(changes[:6])}): choose"
            " another --save_path, repeat that command, or --overwrite to remove them"
        )


def _name_sources(sources: Any) -> str:
    sources = sources if isinstance(sources, list) else []
    return " ".join(str(s.get("source")) for s in sources if isinstance(s, dict)) or "unknown"


def _read_plan(path: Path | RemotePath) -> dict[str, Any]:
    try:
        return read_record(path, required=False)
    except UserError as error:
        raise UserError(f"{error}; pack again with --overwrite") from None


def _has_plan(job: Job) -> bool:
    """Whether the work on this machine is of the same plan."""
    with contextlib.suppress(FileNotFoundError, UserError):  # no plan, or another plan
        _check_plan(job.folder, _read_plan(job.work / PLAN_FILE), job.plan)
        return True
    return False


def _open_work(job: Job, *, overwrite: bool = False) -> None:
    """Write the plan, at a URL unless it is there: from here on the same command continues."""
    try:
        if job.work.is_symlink():
            raise UserError(f"{job.work} is a link: expected a folder; remove the link")
        job.work.mkdir(exist_ok=True)
        write_record(job.work / PLAN_FILE, job.plan)
    except OSError as error:
        raise UserError(f"cannot write to --save_path {job.folder} ({describe(error)})") from None
    if job.home is not None and (overwrite or not (job.home / PLAN_NAME).is_file()):
        (job.home / PLAN_NAME).put(job.work / PLAN_FILE)
    _remove_partial(job.folder)  # of a killed command


def _remove_work(job: Job) -> None:
    """Remove the files that only an unfinished folder needs."""
    if job.home is not None:
        (job.home / PLAN_NAME).unlink(missing_ok=True)
        shutil.rmtree(job.folder, ignore_errors=True)
    else:
        shutil.rmtree(job.work, ignore_errors=True)
        _remove_partial(job.folder)  # of a worker that died, and whose task another worker did


def _remove_partial(folder: Path) -> None:
    for path in folder.rglob(".*.partial"):
        remove(path)


def _remove_packing(job: Job) -> None:
    """Remove the files that an earlier command packed here; all other files stay."""
    files = _files_in(job.place)
    if PLAN_NAME in files or any(_in(name, MANIFEST_FILE) in files for name in ("", *SPLITS)):
        # The new plan first: if this is killed in between, the folder is still known as ours.
        shutil.rmtree(job.work, ignore_errors=True)
        _open_work(job, overwrite=True)
        _remove_outputs(job.place)


def _clear(job: Job, *, keep_tasks: bool) -> None:
    """Remove all that this command wrote; the tasks may be kept for a command with a new plan."""
    _remove_outputs(job.folder)
    if keep_tasks:
        for name in (PLAN_FILE, ENCODER_FILE):
            (job.work / name).unlink(missing_ok=True)
    else:
        shutil.rmtree(job.work)
    if job.home is not None:
        _remove_outputs(job.home)
        (job.home / PLAN_NAME).unlink(missing_ok=True)


def _remove_outputs(place: Path | RemotePath) -> None:
    """Remove shards, manifests and folders of splits that are empty then."""
    for name in filter(OUTPUT.fullmatch, _files_in(place)):
        (place / name).unlink(missing_ok=True)
    for folder in (place / name for name in SPLITS if isinstance(place, Path)):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
