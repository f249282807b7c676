"""What a run is before any framework comes in: its tokenizer, rows, length and description."""

import hashlib
import json
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .checkpoints import find_checkpoint, find_config_folder, write_json
from .corpus import cache_dir, describe_sources
from .errors import UserError
from .evaluation import TextTotals, compressor_bits_per_byte, table, text_metrics
from .options import DEFAULT_TOKENIZER, DataOptions, ModelOptions, OptimOptions, TrainOptions
from .packing import pack
from .report import environment, log
from .tfrecords import FORMAT_VERSION, MANIFEST_FILE, Manifest, PackedRows, open_rows, read_manifest
from .tokenization_algpt2 import TextTokenizer, load_tokenizer

DEFAULT_CONFIG = "algpt2-tiny"
LR_FROM_SCRATCH, LR_FINETUNE = 1e-3, 5e-5


def choose_tokenizer(data: DataOptions, model: ModelOptions) -> TextTokenizer:
    """`--tokenizer`, else that of the checkpoint or config folder, else the packaged one.

    Raises:
        UserError: unknown config, checkpoint or tokenizer, or one that does not fit the other:
            said now, before hours of packing.
    """
    folder = source_folder(model)
    if data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
    elif folder is None:
        tokenizer = load_tokenizer(str(model.checkpoint))
    elif any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        tokenizer = load_tokenizer(str(folder))
    else:
        tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
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
    n_ids, n_embeddings = tokenizer.vocab_size, config.get("vocab_size", tokenizer.vocab_size)
    if n_ids > n_embeddings or (exact and n_ids != n_embeddings):
        raise UserError(
            f"the tokenizer has {n_ids:,} entries and the model {n_embeddings:,}: expected the "
            f"same; choose another --tokenizer, or train one with --vocab_size {n_embeddings}"
        )
    n_positions = context_of(config)
    if seq_len and n_positions and seq_len > n_positions:
        raise UserError(
            f"rows of {seq_len} tokens do not fit the model's {n_positions} positions: pack with "
            f"--seq_len {n_positions} or less, or choose a longer --config"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        UserError: it is not a JSON object.
    """
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{folder / 'config.json'} is damaged: expected a JSON object") from None


def context_of(config: dict[str, Any]) -> int | None:
    """Positions that a model has; None if its configuration names no limit."""
    return config.get("n_positions") or config.get("max_position_embeddings")


def open_or_pack(
    paths: Sequence[str], data: DataOptions, tokenizer: TextTokenizer, seq_len: int
) -> PackedRows:
    """The rows of packed shards, or of text that is packed into the cache folder first.

    Raises:
        UserError: shards of another tokenizer or seq_len, text too short for one row.
    """
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
    return rows


def pack_into_cache(
    paths: Sequence[str], data: DataOptions, tokenizer: TextTokenizer, seq_len: int
) -> Path:
    """Pack text as make_tfrecords.py does, once per text, tokenizer and options."""
    key = {
        "sources": describe_sources(paths), "tokenizer": tokenizer.fingerprint, "seq_len": seq_len,
        "use_control_codes": data.use_control_codes, "line_by_line": data.line_by_line,
        "text_key": data.text_key, "format_version": FORMAT_VERSION,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / f"packed-{digest}"
    if not (folder / MANIFEST_FILE).is_file():
        log(f"packing {' '.join(paths)} into {folder}")
    pack(
        paths, tokenizer, folder, seq_len=seq_len, use_control_codes=data.use_control_codes,
        line_by_line=data.line_by_line, text_key=data.text_key,
    )  # fmt: skip
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
    folder = Path(model.checkpoint)
    if not folder.is_dir():
        return None
    folder = find_checkpoint(folder, log)
    if not (folder / "config.json").is_file():
        raise UserError(f"no checkpoint in {folder}: expected config.json or checkpoint-* in it")
    return folder


def count_steps(optim: OptimOptions, n_rows: int, seq_len: int) -> int:
    """Optimizer steps of the run: `--max_steps`, `--n_tokens` or `--epochs`."""
    rows_per_step = optim.batch_size * optim.grad_steps
    if optim.max_steps:
        return optim.max_steps
    if optim.n_tokens:
        return math.ceil(optim.n_tokens / (rows_per_step * seq_len))
    return math.ceil(optim.epochs * n_rows / rows_per_step)


def peak_lr(optim: OptimOptions, model: ModelOptions) -> float:
    """`--lr`, or the default for training from scratch or finetuning."""
    if optim.lr is not None:
        return optim.lr
    return LR_FINETUNE if model.checkpoint and not model.from_scratch else LR_FROM_SCRATCH


def text_totals(manifest: Manifest) -> TextTotals:
    """Tokens, words (line ends counted) and bytes of the text that was packed."""
    return TextTotals(manifest.tokens, manifest.words + manifest.line_ends, manifest.text_bytes)


def fingerprint(manifest: Manifest) -> str:
    """One hash for the content of all shards."""
    return hashlib.sha256("".join(s.sha256 for s in manifest.shards).encode()).hexdigest()


def describe_run(
    options: TrainOptions, train: Manifest, val: Manifest, n_steps: int
) -> dict[str, Any]:
    """run.json: every option, what follows from them, and what it ran on."""
    optim = options.optim
    rows_per_step = optim.batch_size * optim.grad_steps
    return {
        "options": asdict(options),
        "data": {
            "train": fingerprint(train), "train_tokens": train.tokens,
            "val": fingerprint(val), "val_tokens": val.tokens,
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
    if config.model_type == "algpt2":
        facts["virtual_parameters"] = config.virtual_parameters()
        facts["flops_per_token"] = config.flops_per_token(seq_len)
    return facts


def summary(run: dict[str, Any], step: int) -> str:
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
    if step >= run["steps"]:
        lines.append(f"already done: step {step:,} is the last; another --save_dir starts anew")
    elif step:
        lines.append(f"continuing at step {step:,}")
    return "\n".join(lines)


def _flags(options: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in options.items() if v is not None)


# --- evaluation of a checkpoint ------------------------------------------------------------------


def write_evaluation(
    options: TrainOptions, rows: PackedRows, tokenizer: TextTokenizer, loss: float
) -> str:
    """The table of `--eval_only`, also written to `evaluation.json` beside the weights."""
    totals = text_totals(rows.manifest)
    result: dict[str, Any] = {
        "checkpoint": options.model.checkpoint,
        "text": list(options.data.val_path),
        "seq_len": rows.manifest.seq_len,
        **asdict(totals),
        **text_metrics(loss, totals),
    }
    if options.compressors:
        log("compressing the validation text with gzip -9 and xz -9e")
        result["compressors"] = compressor_bits_per_byte(decode_documents(rows, tokenizer))
    folder = source_folder(options.model) or Path()
    lines = [
        ["", "loss (nats/token)", "ppl", "word ppl", "bits/byte"],
        [
            folder.name, f"{result['val_loss']:.4f}", f"{result['val_ppl']:.2f}",
            f"{result['val_word_ppl']:.2f}", f"{result['val_bpb']:.4f}",
        ],
    ]  # fmt: skip
    for name, bits in result.get("compressors", {}).items():
        lines.append([name, "", "", "", f"{bits:.4f}"])
    path = folder.parent / "evaluation.json"
    write_json(path, result)
    text = (
        f"{totals.tokens:,} tokens, {totals.words:,} words (line ends counted), "
        f"{totals.text_bytes:,} bytes, context {rows.manifest.seq_len}, each token predicted once"
    )
    return f"{table(lines)}\n{text}\nwritten to {path}"


def decode_documents(rows: PackedRows, tokenizer: TextTokenizer) -> Iterator[str]:
    """The documents that the rows hold: rows overlap by one token, documents start with
    end-of-text."""
    ids: list[int] = []
    for i in range(len(rows)):
        for token in rows[i][:-1].tolist():
            if token == tokenizer.eot_id and ids:
                yield tokenizer.decode(ids)
                ids = []
            elif token != tokenizer.eot_id:
                ids.append(token)
    if ids:
        yield tokenizer.decode(ids)
