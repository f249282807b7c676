"""What a run starts from: config or checkpoint, tokenizer, rows; found and verified once."""

import contextlib
import hashlib
import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..corpus.listing import identify_sources
from ..errors import UserError, describe
from ..options import DEFAULT_TOKENIZER, DataOptions, ModelOptions, PackOptions, TrainOptions
from ..shards.packing import pack
from ..shards.tfrecords import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    PackedRows,
    open_rows,
    read_manifest,
    write_manifest,
    write_shard,
)
from ..system.console import log
from ..system.files import cache_dir
from ..tokenization_algpt2 import NoTokenizerError, TextTokenizer, load_tokenizer, set_token_ids
from .checkpoints import Checkpoint, checkpoint_folders, find_checkpoint
from .mirror import fetch_checkpoint

DEFAULT_CONFIG = "algpt2-tiny"


@dataclass(frozen=True)
class Start:
    """What a run starts from. `Start.find` verifies its checkpoints; no other function does."""

    options: ModelOptions
    source: Path | str  # folder of `--checkpoint` or `--config`, or a name on the hub
    init_from: str | None  # folder of `--init_from`, or a name on the hub
    tokenizer: TextTokenizer | None = None  # None: not chosen, or unknown
    seq_len: int | None = None  # tokens of a row
    eot_id: int | None = None  # of packed rows, whose tokenizer may be unknown

    @classmethod
    def find(cls, options: ModelOptions) -> "Start":
        """Find `--checkpoint` or `--config`, and `--init_from`; verify their checksums.

        Raises:
            UserError: unknown config, a run without a complete checkpoint, a damaged checkpoint.
        """
        init_from = options.init_from
        if init_from and Path(init_from).is_dir():
            init_from = str(find_checkpoint(Path(init_from), log))
        return cls(options, find_source(options), init_from)

    @property
    def folder(self) -> Path | None:
        """The folder on this machine; None for a name on the hub."""
        return self.source if isinstance(self.source, Path) else None

    @property
    def name(self) -> str:
        """The last part of the path: the name of a checkpoint in tables."""
        return Path(self.source).resolve().name

    @property
    def loads_weights(self) -> bool:
        """Whether the model takes the weights of `source`."""
        return bool(self.options.checkpoint and not self.options.from_scratch)

    @property
    def tokenizer_source(self) -> str:
        """Folder or name of the tokenizer: of the weights; of the config, if it has one."""
        files = ("tokenizer.json", "vocab.json")
        if self.init_from or self.loads_weights or self.folder is None:
            return self.init_from or str(self.source)
        has_own = any((self.folder / name).is_file() for name in files)
        return str(self.folder) if has_own else DEFAULT_TOKENIZER

    @property
    def result_folder(self) -> Path:
        """The folder for evaluations: the run's folder for a run's checkpoint, else the folder of
        the weights, or the current folder for a name on the hub."""
        folder = self.folder
        if folder is None:
            return Path()
        return folder.parent if folder in checkpoint_folders(folder.parent) else folder

    def continued(self, checkpoint: Checkpoint) -> "Start":
        """The start of a run that continues from its own checkpoint."""
        options = replace(
            self.options, checkpoint=str(checkpoint.folder), from_scratch=False, init_from=None
        )
        return replace(self, options=options, source=checkpoint.folder, init_from=None)

    def check_fits(self, config: dict[str, Any]) -> None:
        """`UserError` if the tokenizer and the model of a config.json disagree, or a row is longer
        than the positions. A checkpoint's vocabulary may be padded to a larger one."""
        if self.tokenizer is None:
            return
        n_ids = self.tokenizer.vocab_size - self.tokenizer.n_new_codes  # which get embeddings
        n_embeddings, exact = config.get("vocab_size", n_ids), not self.options.checkpoint
        if n_ids > n_embeddings or (exact and n_ids != n_embeddings):
            raise UserError(
                f"the tokenizer has {n_ids:,} entries and the model {n_embeddings:,}: expected the "
                f"same; choose another --tokenizer, or train one with --vocab_size {n_embeddings}"
            )
        check_rows_fit(self.seq_len, config)

    def with_shards(self, data: DataOptions, manifest: Manifest) -> "Start":
        """The start of a run on packed shards, with their tokenizer if this machine has it."""
        tokenizer = tokenizer_of(self, data, manifest)
        return replace(self, tokenizer=tokenizer, seq_len=manifest.seq_len, eot_id=manifest.eot_id)

    def set_token_ids(self, *configs: Any) -> None:
        """Have a model's configurations name the ids of the tokenizer, or of the packed rows."""
        if self.tokenizer is not None:
            set_token_ids(self.tokenizer.token_ids, *configs)
        elif self.eot_id is not None:
            set_token_ids({"bos_token_id": self.eot_id, "eos_token_id": self.eot_id}, *configs)

    def config(self) -> dict[str, Any]:
        """The whole configuration, defaults included.

        Raises:
            UserError: `source` is not there, or not a GPT-2 or ALGPT2.
        """
        from ..configuration_algpt2 import ALGPT2Config

        try:
            return ALGPT2Config.from_pretrained(self.source).to_dict()
        except Exception as error:  # a damaged file can make transformers raise anything
            reason = describe(error)[:500]
            raise UserError(f"cannot load the configuration of {self.source}: {reason}") from error


def find_start(options: TrainOptions) -> Start:
    """The start of a command, with its tokenizer and the length of its rows.

    Raises:
        UserError: as `Start.find`, `choose_tokenizer`.
    """
    data, start = options.data, Start.find(options.model)
    trains = not (options.eval_only or options.sample_only)
    start = replace(start, tokenizer=choose_tokenizer(start, data, trains=trains))
    if options.sample_only:
        return start
    shards = () if options.eval.eval_sets else (data.val_path,)
    if trains:
        shards = (data.train_path, data.val_path)
    return replace(start, seq_len=choose_seq_len(start, data, shards))


def starts_from_weights(model: ModelOptions) -> bool:
    """Whether a new run starts from trained weights, so that it has metrics before training."""
    return bool(model.init_from or (model.checkpoint and not model.from_scratch))


def find_source(model: ModelOptions) -> Path | str:
    """The local folder of `--checkpoint` or `--config`, or a name on the hub.

    Raises:
        UserError: unknown config, a run without a complete checkpoint.
    """
    if not model.checkpoint:
        return find_config_folder(model.config or DEFAULT_CONFIG)
    folder = Path(fetch_checkpoint(model.checkpoint))
    if not folder.is_dir():
        return model.checkpoint
    folder = find_checkpoint(folder, log)
    if not (folder / "config.json").is_file():
        raise UserError(f"no checkpoint in {folder}: expected config.json or checkpoint-* in it")
    return folder


def find_config_folder(name: str) -> Path:
    """The folder of a config: a path that has a config.json, or a name that ships with the code.

    Raises:
        UserError: neither; lists the names.
    """
    packaged = Path(__file__).parents[1]
    for folder in (Path(name), packaged / name, packaged / Path(name).name):
        if (folder / "config.json").is_file():
            return folder
    names = ", ".join(sorted(path.parent.name for path in packaged.glob("*/config.json")))
    raise UserError(
        f"unknown config {name!r}: expected a folder with config.json or one of {names}"
    )


# --- tokenizer and sizes -------------------------------------------------------------------------


def choose_tokenizer(start: Start, data: DataOptions, *, trains: bool = True) -> TextTokenizer:
    """`--tokenizer`, else that of `--checkpoint`, `--init_from` or the config; a config without one
    gets the packaged tokenizer, weights without one do not.

    Raises:
        UserError: unknown config, checkpoint or tokenizer, or one that does not fit the other:
            said now, before hours of packing. Control codes that are new, unless the run `trains`.
    """
    folder = start.folder
    try:
        tokenizer = load_tokenizer(data.tokenizer or start.tokenizer_source)
    except NoTokenizerError as error:
        raise UserError(f"{error}; --tokenizer names the one that the weights need") from None
    tokenizer = tokenizer.with_control_codes(data.control_codes or ())
    if tokenizer.n_new_codes and not trains:
        raise UserError(
            f"--control_codes {' '.join(data.control_codes)}: {tokenizer.n_new_codes} are new to "
            f"{start.options.checkpoint}: expected codes that it has; training on a text adds its "
            "code"
        )
    if folder is not None:
        replace(start, tokenizer=tokenizer, seq_len=data.seq_len).check_fits(read_config(folder))
    return tokenizer


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
    from ..configuration_algpt2 import MAX_SIZE

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


def choose_seq_len(start: Start, data: DataOptions, shards: Sequence[Sequence[str]] = ()) -> int:
    """`--seq_len`, else that of the first of `shards` that is packed, else the model's context."""
    if data.seq_len:
        return data.seq_len
    for paths in shards:
        if len(paths) == 1 and (Path(paths[0]) / MANIFEST_FILE).is_file():
            return read_manifest(Path(paths[0])).seq_len
    return (start.folder and context_of(read_config(start.folder))) or 1024


def tokenizer_of(start: Start, data: DataOptions, manifest: Manifest) -> TextTokenizer | None:
    """The tokenizer that shards were packed with, to keep with their checkpoints; None: unknown.

    Raises:
        UserError: `--tokenizer` is another one.
    """
    if data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
        if tokenizer.fingerprint != manifest.tokenizer_sha256:
            raise UserError(
                f"--tokenizer {data.tokenizer} is not the one that the shards were packed "
                "with: expected that, or none"
            )
        return tokenizer
    with contextlib.suppress(UserError):  # one that does not fit is none
        tokenizer = choose_tokenizer(start, data)
        if tokenizer.fingerprint == manifest.tokenizer_sha256:
            return tokenizer
    log("the tokenizer of the shards is not here: checkpoints will lack it; --tokenizer names it")
    return None


# --- rows ----------------------------------------------------------------------------------------


def open_both(start: Start, data: DataOptions, processes: Any) -> tuple[PackedRows, PackedRows]:
    """`open_or_pack` for training and validation; process 0 packs, the others find it packed."""
    with processes.main_first():
        train, val = (
            open_or_pack(paths, data, start.tokenizer, start.seq_len)
            for paths in (data.train_path, data.val_path)
        )
    return train, val


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
    folder, packed = Path(paths[0]), [(Path(p) / MANIFEST_FILE).is_file() for p in paths]
    if len(paths) > 1 and any(packed):
        if not all(packed):
            raise UserError(
                f"{' '.join(paths)}: expected texts or packed shards, got both; pack the texts with"
                " make_tfrecords.py"
            )
        parts = [open_or_pack([path], data, tokenizer, seq_len) for path in paths]
        return open_rows(join_rows(parts))
    if not packed[0]:
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
    check_text_options(folder, manifest, data)
    return rows


TEXT_ONLY = (
    "use_control_codes", "control_codes", "line_by_line", "document_mark", "text_key", "detokenizer"
)  # fmt: skip


def check_text_options(folder: Path, manifest: Manifest, data: DataOptions) -> None:
    """`UserError` if an option for text is given and shards were packed with another value."""
    as_packed = manifest.options | {"detokenizer": manifest.detokenizer}
    for name in TEXT_ONLY:
        value, packed = getattr(data, name), as_packed.get(name)
        given = list(value) if isinstance(value, tuple) else value
        if value != getattr(DataOptions, name) and given not in ("auto", packed):
            shown = " ".join(given) if isinstance(given, list) else given
            before = f"with --{name} {packed}" if packed else f"without --{name}"
            raise UserError(
                f"{folder} was packed {before}: expected {shown}; drop the flag, or pack the text"
                f" again with --{name} {shown}"
            )


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
    if data.document_mark:
        key["document_mark"] = data.document_mark
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / f"packed-{digest}"
    # Complete: no lock then, which the processes of a run would take from each other.
    if (folder / MANIFEST_FILE).is_file():
        return folder
    log(f"packing {' '.join(paths)} into {folder}")
    options = PackOptions(
        tuple(paths), str(folder), seq_len=seq_len, use_control_codes=data.use_control_codes,
        line_by_line=data.line_by_line, text_key=data.text_key, control_codes=data.control_codes,
        detokenizer=data.detokenizer, document_mark=data.document_mark,
    )  # fmt: skip
    pack(options, tokenizer)
    return folder


def join_rows(parts: Sequence[PackedRows]) -> Path:
    """A cache folder with the rows of all `parts`, which differ in text and control code only."""
    manifests = [part.manifest for part in parts]
    digest = hashlib.sha256("".join(m.fingerprint for m in manifests).encode()).hexdigest()[:16]
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
