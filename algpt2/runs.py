"""What a run is before any framework comes in: its tokenizer, rows, length and description."""

import contextlib
import hashlib
import json
import math
import reprlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import mirror, model_card
from .checkpoints import checkpoint_folders, find_checkpoint
from .console import log, table
from .errors import EXIT_STOPPED, UserError, describe
from .files import cache_dir
from .listing import identify_sources
from .options import (
    DEFAULT_TOKENIZER,
    DataOptions,
    ModelOptions,
    OptimOptions,
    PackOptions,
    TrainOptions,
)
from .packing import pack
from .remote import local_folder
from .report import METRICS_FILE, environment, read_json_lines
from .scoring import TextTotals
from .start import find_config_folder
from .tfrecords import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    PackedRows,
    open_rows,
    read_manifest,
    write_manifest,
    write_shard,
)
from .tokenization_algpt2 import TextTokenizer, load_tokenizer

DEFAULT_CONFIG = "algpt2-tiny"
LR_FROM_SCRATCH, LR_FINETUNE = 1e-3, 5e-5
MAX_SIZE = 2**24  # of a vocabulary or context: beyond it a config.json is damaged


def choose_tokenizer(
    data: DataOptions, model: ModelOptions, *, trains: bool = True
) -> TextTokenizer:
    """`--tokenizer`, else that of `--checkpoint`, `--init_from` or the config, else the packaged
    one.

    Raises:
        UserError: unknown config, checkpoint or tokenizer, or one that does not fit the other:
            said now, before hours of packing. Control codes that are new, unless the run `trains`.
    """
    folder = source_folder(model)
    if data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
    elif folder is None:
        tokenizer = load_tokenizer(str(model.checkpoint))
    elif model.init_from:
        start = Path(model.init_from)
        tokenizer = load_tokenizer(str(find_checkpoint(start, log) if start.is_dir() else start))
    elif any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        tokenizer = load_tokenizer(str(folder))
    else:
        tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    tokenizer = tokenizer.with_control_codes(data.control_codes or ())
    if tokenizer.n_new_codes and not trains:
        raise UserError(
            f"--control_codes {' '.join(data.control_codes)}: {tokenizer.n_new_codes} are new to "
            f"{model.checkpoint}: expected codes that it has; training on a text adds its code"
        )
    if folder is not None:
        exact = not model.checkpoint
        check_model_fits(read_config(folder), tokenizer, data.seq_len, exact=exact)
    return tokenizer


def check_model_fits(
    config: dict[str, Any], tokenizer: TextTokenizer, seq_len: int | None, *, exact: bool
) -> None:
    """`UserError` if tokenizer and model disagree or a row is longer than the positions.

    Args:
        config: the content of a config.json.
        exact: the vocabularies have equal size; else the model's may be padded to a larger one.
    """
    n_ids = tokenizer.vocab_size - tokenizer.n_new_codes  # which get embeddings
    n_embeddings = config.get("vocab_size", n_ids)
    if n_ids > n_embeddings or (exact and n_ids != n_embeddings):
        raise UserError(
            f"the tokenizer has {n_ids:,} entries and the model {n_embeddings:,}: expected the "
            f"same; choose another --tokenizer, or train one with --vocab_size {n_embeddings}"
        )
    check_rows_fit(seq_len, config)


def check_rows_fit(seq_len: int | None, config: dict[str, Any]) -> None:
    """`UserError` if a row is longer than the positions of the model of a config.json."""
    n_positions = context_of(config)
    if seq_len and n_positions and seq_len > n_positions:
        raise UserError(
            f"rows of {seq_len} tokens do not fit the model's {n_positions} positions: pack with "
            f"--seq_len {n_positions} or less, or choose a longer --config"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        UserError: it is not a JSON object, or the sizes that we read are not numbers.
    """
    path = folder / "config.json"
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: expected a JSON object") from None
    for key in ("vocab_size", "n_positions", "max_position_embeddings"):
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 < value <= MAX_SIZE):
            raise UserError(f"{path}: {key} is {reprlib.repr(value)}, expected 1 to {MAX_SIZE:,}")
    return config


def context_of(config: dict[str, Any]) -> int | None:
    """Positions that a model has; None if its configuration names no limit."""
    return config.get("n_positions") or config.get("max_position_embeddings")


def open_or_pack(
    paths: Sequence[str], data: DataOptions, tokenizer: TextTokenizer, seq_len: int
) -> PackedRows:
    """The rows of packed shards, or of text that is packed into the cache folder first.

    With one of `--control_codes` for each path, the documents of a path start with its code.

    Raises:
        UserError: shards of another tokenizer or seq_len, text too short for one row, more codes
            than paths.
    """
    codes = data.control_codes or ()
    if len(codes) > 1:
        if len(codes) != len(paths):
            raise UserError(
                f"{len(codes)} --control_codes for {len(paths)} path(s), {' '.join(paths)}: "
                "expected one code, or one for each --train_path and each --val_path"
            )
        parts = [
            open_or_pack([path], replace(data, control_codes=(code,)), tokenizer, seq_len)
            for path, code in zip(paths, codes, strict=True)
        ]
        return open_rows(join_rows(parts))
    folder = Path(paths[0])
    if len(paths) > 1 or not (folder / MANIFEST_FILE).is_file():
        folder = pack_into_cache(paths, data, tokenizer, seq_len)
    rows = open_rows(folder)
    manifest = rows.manifest
    if manifest.tokenizer_sha256 != tokenizer.fingerprint:
        raise UserError(
            f"{folder} was packed with another tokenizer: expected that of the model "
            f"({tokenizer.folder}); pack again with --tokenizer {tokenizer.folder}"
        )
    if manifest.seq_len != seq_len:
        raise UserError(
            f"{folder} has rows of {manifest.seq_len} tokens, expected {seq_len}: "
            f"pass --seq_len {manifest.seq_len} or pack again"
        )
    check_detokenizer(folder, manifest, data.detokenizer)
    return rows


def check_detokenizer(folder: Path, manifest: Manifest, name: str | None) -> None:
    """`UserError` if `--detokenizer` is given and shards were packed with another or none."""
    if name not in (None, "auto", manifest.detokenizer):
        given = f"with --detokenizer {manifest.detokenizer}"
        raise UserError(
            f"{folder} was packed {given if manifest.detokenizer else 'without --detokenizer'}: "
            f"expected {name}; drop the flag, or pack the text again with --detokenizer {name}"
        )


def open_both(
    options: TrainOptions, processes: Any, tokenizer: TextTokenizer, seq_len: int
) -> tuple[PackedRows, PackedRows]:
    """`open_or_pack` for training and validation; process 0 packs, the others find it packed."""
    data = options.data
    with processes.main_first():
        rows = open_or_pack(data.train_path, data, tokenizer, seq_len)
        return rows, open_or_pack(data.val_path, data, tokenizer, seq_len)


def pack_into_cache(
    paths: Sequence[str], data: DataOptions, tokenizer: TextTokenizer, seq_len: int
) -> Path:
    """Pack text as make_tfrecords.py does, once per text, tokenizer and options."""
    key = {
        "sources": identify_sources(paths), "tokenizer": tokenizer.fingerprint, "seq_len": seq_len,
        "use_control_codes": data.use_control_codes, "line_by_line": data.line_by_line,
        "text_key": data.text_key, "format_version": FORMAT_VERSION,
    }  # fmt: skip
    if data.control_codes:
        key["control_codes"] = list(data.control_codes)
    if data.detokenizer:
        key["detokenizer"] = data.detokenizer
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / f"packed-{digest}"
    if not (folder / MANIFEST_FILE).is_file():
        log(f"packing {' '.join(paths)} into {folder}")
    options = PackOptions(
        tuple(paths), str(folder), seq_len=seq_len, use_control_codes=data.use_control_codes,
        line_by_line=data.line_by_line, text_key=data.text_key, control_codes=data.control_codes,
        detokenizer=data.detokenizer,
    )  # fmt: skip
    pack(options, tokenizer)
    return folder


def join_rows(parts: Sequence[PackedRows]) -> Path:
    """A cache folder with the rows of all `parts`, which differ in text and control code only."""
    manifests = [part.manifest for part in parts]
    digest = hashlib.sha256("".join(map(fingerprint, manifests)).encode()).hexdigest()[:16]
    folder = cache_dir() / f"joined-{digest}"
    if (folder / MANIFEST_FILE).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.concatenate([part[np.arange(len(part))] for part in parts])
    summed = ("documents", "text_bytes", "words", "line_ends", "tokens", "dropped_rows")
    manifest = replace(
        manifests[0], shards=(write_shard(folder / "0.tfrecord", rows),),
        sources=[source for m in manifests for source in m.sources],
        options={"joined": [m.options for m in manifests]},
        # The first token of a text is predicted nowhere; only one can be the stream's first.
        left_over_tokens=sum(m.left_over_tokens for m in manifests) + len(parts) - 1,
        **{name: sum(getattr(m, name) for m in manifests) for name in summed},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def choose_seq_len(data: DataOptions, model: ModelOptions, *, trains: bool = True) -> int:
    """`--seq_len`, else that of the shards that are read, else the model's context."""
    if data.seq_len:
        return data.seq_len
    for paths in (data.train_path, data.val_path) if trains else (data.val_path,):
        if len(paths) == 1 and (Path(paths[0]) / MANIFEST_FILE).is_file():
            return read_manifest(Path(paths[0])).seq_len
    folder = source_folder(model)
    if folder is None:
        return 1024
    return context_of(read_config(folder)) or 1024


def source_folder(model: ModelOptions) -> Path | None:
    """The local folder of `--checkpoint` or `--config`; None for a name on the hub.

    Raises:
        UserError: unknown config, a run without a complete checkpoint.
    """
    if not model.checkpoint:
        return find_config_folder(model.config or DEFAULT_CONFIG)
    folder = Path(mirror.fetch_checkpoint(model.checkpoint))
    if not folder.is_dir():
        return None
    folder = find_checkpoint(folder, log)
    if not (folder / "config.json").is_file():
        raise UserError(f"no checkpoint in {folder}: expected config.json or checkpoint-* in it")
    return folder


def source_config(model: ModelOptions) -> dict[str, Any]:
    """The whole configuration of `--checkpoint` or `--config`, defaults included.

    Raises:
        UserError: unknown, or not a GPT-2 or ALGPT2.
    """
    from .configuration_algpt2 import ALGPT2Config

    source = source_folder(model) or model.checkpoint
    try:
        return ALGPT2Config.from_pretrained(source).to_dict()
    except Exception as error:  # a damaged file can make transformers raise anything
        reason = describe(error)[:500]
        raise UserError(f"cannot load the configuration of {source}: {reason}") from error


def tokenizer_of(options: TrainOptions, manifest: Manifest) -> TextTokenizer | None:
    """The tokenizer that shards were packed with, to keep with their checkpoints; None: unknown.

    Raises:
        UserError: `--tokenizer` is another one.
    """
    if options.data.tokenizer:
        tokenizer = load_tokenizer(options.data.tokenizer)
        if tokenizer.fingerprint != manifest.tokenizer_sha256:
            raise UserError(
                f"--tokenizer {options.data.tokenizer} is not the one that the shards were packed "
                "with: expected that, or none"
            )
        return tokenizer
    with contextlib.suppress(UserError):  # one that does not fit is none
        tokenizer = choose_tokenizer(options.data, options.model)
        if tokenizer.fingerprint == manifest.tokenizer_sha256:
            return tokenizer
    log("the tokenizer of the shards is not here: checkpoints will lack it; --tokenizer names it")
    return None


def count_steps(optim: OptimOptions, n_rows: int, seq_len: int) -> int:
    """Optimizer steps of the run: `--max_steps`, `--n_tokens` or `--epochs`."""
    rows_per_step = optim.batch_size * optim.grad_steps
    if optim.max_steps:
        return optim.max_steps
    if optim.n_tokens:
        return math.ceil(optim.n_tokens / (rows_per_step * seq_len))
    return math.ceil(optim.epochs * n_rows / rows_per_step)


class Rows(Protocol):
    """Packed rows, wherever they lie."""

    manifest: Manifest

    def probe(self) -> str:
        """A hash of each shard's first and last record as they are on disk now."""


def starts_from_weights(model: ModelOptions) -> bool:
    """Whether a new run starts from trained weights: then there is a before to compare with."""
    return bool(model.init_from or (model.checkpoint and not model.from_scratch))


def measure_start(
    step: int, model: ModelOptions, run: dict[str, Any], validate: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    """`before` for run.json: the validation metrics of the weights that a new run starts from."""
    if step or "before" in run or not starts_from_weights(model):
        return {}
    log("evaluating the weights that training starts from")
    return {"before": validate()}


def finish(done: bool, step: int, run: dict[str, Any], options: TrainOptions) -> int | None:
    """The last words of a training and its exit code; of a run that is done also its before and
    after, and its upload."""
    save_dir = local_folder(options.report.save_dir)
    copied = mirror.copy_or_warn(options.report, step)
    log(f"{'done' if done else 'stopped'} at step {step}: {options.report.save_dir}")
    if done and not copied:
        raise UserError(
            f"the run is done and whole in {save_dir}, but not in {options.report.save_dir}: "
            "repeat the command here, it copies what is missing"
        )
    if not done:
        return EXIT_STOPPED
    log_before_and_after(run, save_dir)
    model_card.push_to_hub(find_checkpoint(save_dir), options.report.push_to_hub)
    return None


def log_before_and_after(run: dict[str, Any], save_dir: Path) -> None:
    """Print a table of the validation text before the first step and after the last, if known."""
    last = [x for x in read_json_lines(save_dir / METRICS_FILE) if "val_loss" in x][-1:]
    if not last or not run.get("before"):
        return
    heading = ["", "loss (nats/token)", "ppl", "word ppl", "bits/byte"]
    lines = [heading]
    for name, values in (("before", run["before"]), (f"after {last[0]['step']:,} steps", last[0])):
        numbers = (values[key] for key in ("val_loss", "val_ppl", "val_word_ppl", "val_bpb"))
        formats = (".4f", ".2f", ".2f", ".4f")
        lines.append([name, *(format(x, f) for x, f in zip(numbers, formats, strict=True))])
    log(table(lines))


def peak_lr(optim: OptimOptions, model: ModelOptions) -> float:
    """`--lr`, or the default for training from scratch or finetuning."""
    if optim.lr is not None:
        return optim.lr
    finetunes = model.checkpoint and not model.from_scratch
    return LR_FINETUNE if finetunes else LR_FROM_SCRATCH


def text_totals(manifest: Manifest) -> TextTotals:
    """Tokens, words (line ends counted) and bytes of the text that was packed."""
    return TextTotals(manifest.tokens, manifest.words + manifest.line_ends, manifest.text_bytes)


def fingerprint(manifest: Manifest) -> str:
    """One hash for the content of all shards."""
    return hashlib.sha256("".join(s.sha256 for s in manifest.shards).encode()).hexdigest()


def describe_run(options: TrainOptions, train: "Rows", val: "Rows", n_steps: int) -> dict[str, Any]:
    """run.json: every option, what follows from them, and what it ran on.

    Raises:
        UserError: the first or last record of a shard is damaged.
    """
    optim = options.optim
    probes = {"train_records": train.probe(), "val_records": val.probe()}
    train, val = train.manifest, val.manifest
    rows_per_step = optim.batch_size * optim.grad_steps
    return {
        "options": asdict(options),
        "data": {
            "train": fingerprint(train), "train_tokens": train.tokens,
            "val": fingerprint(val), "val_tokens": val.tokens, **probes,
        },
        "steps": n_steps,
        "tokens_per_step": rows_per_step * train.seq_len,
        "epochs": n_steps * rows_per_step / sum(shard.rows for shard in train.shards),
        "peak_lr": peak_lr(optim, options.model),
        "wandb_id": secrets.token_hex(4),
        **environment(),
    }  # fmt: skip


def describe_model(model: Any, seq_len: int) -> dict[str, Any]:
    """Class, parameters stored; for ALGPT2 also virtual parameters and training FLOPs per token."""
    config = model.config
    facts = {"model": config.to_dict(), "parameters": model.num_parameters()}
    if hasattr(config, "virtual_parameters"):
        facts["virtual_parameters"] = config.virtual_parameters()
        facts["flops_per_token"] = config.flops_per_token(seq_len)
    return facts


def summary(run: dict[str, Any], step: int, done: bool) -> str:
    """What is printed when a run starts: options, derived numbers, where it stands."""
    lines = [
        f"{group}: {_flags(flags)}"
        for group, flags in run["options"].items()
        if isinstance(flags, dict)
    ]
    virtual = f", {run['virtual_parameters']:,} virtual" if "virtual_parameters" in run else ""
    flops = (
        f", {run['flops_per_token'] / 1e6:.1f} MFLOP per token" if "flops_per_token" in run else ""
    )
    lines += [
        f"parameters: {run['parameters']:,} stored{virtual}{flops}",
        f"data: {run['data']['train_tokens']:,} training tokens, {run['epochs']:.2f} epochs",
        f"steps: {run['steps']:,} of {run['tokens_per_step']:,} tokens, peak lr {run['peak_lr']:g}",
    ]
    if done:
        lines.append(f"already done: step {step:,} is the last; another --save_dir starts anew")
    elif step:
        lines.append(f"continuing at step {step:,}")
    return "\n".join(lines)


def _flags(options: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in options.items() if v is not None)


def result_folder(model: ModelOptions) -> Path:
    """Where evaluations of a checkpoint are kept: its run's folder, or its own if it is of no
    run, or the current folder for a name on the hub."""
    folder = source_folder(model)
    if folder is None:
        return Path()
    return folder.parent if folder in checkpoint_folders(folder.parent) else folder
