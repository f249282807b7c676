"""The options of every script: frozen dataclasses, parsed from the command line by tyro.

The comment behind a field is its `--help`, with its unit. A default that is not here is nowhere. No
framework is imported, so that `--help` answers at once. A group of `--help` is a dataclass, titled
by its docstring: the nested ones, which run.json records under their names, then the base classes.
"""

import contextlib
import io
import itertools
import re
import reprlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

import tyro
from tyro.conf import Positional, Suppress

from .errors import UserError

Options = TypeVar("Options")
T = TypeVar("T")

IN_WORDS = tyro.conf.arg(help_behavior_hint="")  # the comment has the default: tyro prints none
Unset = Annotated[T | None, IN_WORDS]  # None unless the flag is given


class Range(NamedTuple):
    """The smallest and the largest value of a number; `check_numbers` reads it from the type."""

    low: float
    high: float


MAX_NUMBER = 2**53  # of steps, tokens, rows
Count = Annotated[int, Range(1, MAX_NUMBER)]
CountOrZero = Annotated[int, Range(0, MAX_NUMBER)]
Batch = Annotated[int, Range(1, 2**20)]  # rows, whose ids alone take 8 MB
Length = Annotated[int, Range(1, 2**28)]  # tokens of a row
Positive = Annotated[float, Range(1e-300, MAX_NUMBER)]
PositiveOrZero = Annotated[float, Range(0, MAX_NUMBER)]
BelowOne = Annotated[float, Range(0, 0.999999)]
Share = Annotated[float, Range(0, 1)]
Factor = Annotated[float, Range(1e-6, 1e6)]

DEFAULT_TOKENIZER = "algpt2-tokenizer"
_start = {"s": time.monotonic()}  # of the command


# --- the command line -----------------------------------------------------------------------------


def parse(cls: type[Options], argv: Sequence[str] | None = None, doc: str = "") -> Options:
    """An instance of the dataclass `cls` from `argv` (None: the command line's arguments).

    Flags have underscored names; a tuple takes several values (`--train_path A B`); a bool is a
    bare flag (`--overwrite`, `--no_overwrite`). `--help` prints and exits with 0.

    Args:
        doc: docstring of the script; `--help` opens with its first line and its first command.
    Raises:
        UserError: unknown flags, bad values, a flag that is given twice.
    """
    _start["s"] = time.monotonic()
    _check_given_once(sys.argv[1:] if argv is None else argv)
    groups, printed = _groups(cls), io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            given = tyro.cli(
                make_dataclass("Options", groups),
                args=argv,
                description=_description(doc),
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        raise UserError(_first_sentence(printed.getvalue())) from None
    values = vars(given)
    for name in [name for name, group, _ in groups if issubclass(cls, group)]:
        values |= vars(values.pop(name))
    options = cls(**values)
    _check_not_empty(options)
    return options


def _check_given_once(argv: Sequence[str]) -> None:
    """`UserError` for a flag that is given twice: tyro would drop the first in silence."""
    seen: dict[str, str] = {}
    for argument in (a.partition("=")[0] for a in argv if a.startswith("--")):
        name = argument.replace("-", "_").removeprefix("__").removeprefix("no_")
        if name in seen:
            raise UserError(
                f"{argument} after {seen[name]}: expected a flag once; several values follow a"
                f" single flag (--{name} A B)"
            )
        seen[name] = argument


def _groups(cls: type) -> list[tuple[str, type, Any]]:
    """Name, dataclass and default of each group of flags: the nested dataclasses of `cls`, then its
    base classes, the last first as in `fields(cls)`; `cls` itself if it has no groups."""
    nested = {o.name: o.default_factory for o in fields(cls) if is_dataclass(o.default_factory)}
    groups = [(name, group, field(default_factory=group)) for name, group in nested.items()]
    bases = [base for base in cls.__mro__[:0:-1] if is_dataclass(base)]
    for base in bases or ([] if groups else [cls]):
        if not nested.keys() & {option.name for option in fields(base)}:
            defaults = {option.name: getattr(cls, option.name, MISSING) for option in fields(base)}
            default = MISSING if MISSING in defaults.values() else base(**defaults)
            name = base.__name__.removesuffix("Options").lower()
            groups.append((name, base, field(default=default)))
    return groups


def _description(doc: str) -> str:
    """The first line of a script's docstring and the first command in it."""
    command = re.search(r"^ +(python3 .*)", doc, re.MULTILINE)
    example = f"\n\nExample: {' '.join(command[1].split())}" if command else ""
    return doc.partition("\n")[0] + example


def _check_not_empty(options: object) -> None:
    """`UserError` for an empty value, as of a shell's variable that is not set: as a path it would
    be the current folder."""
    for option in fields(options):
        value = getattr(options, option.name)
        if is_dataclass(value):
            _check_not_empty(value)
        elif value != option.default and (
            value == () or "" in (value if isinstance(value, tuple) else (value,))
        ):
            raise UserError(f"--{option.name} needs at least one value, and no empty one")


def seconds_since_start() -> float:
    """Seconds since the command line was parsed: what a rented machine has been paid for."""
    return time.monotonic() - _start["s"]


def _first_sentence(box: str) -> str:
    """The message in tyro's framed error box: the lines between its first two rules."""
    lines = [line.strip(" │|") for line in box.splitlines()[1:]]
    after_title = itertools.dropwhile(_is_rule, lines)
    message = " ".join(itertools.takewhile(lambda line: not _is_rule(line), after_title))
    message = re.sub(r"^(Error parsing )?(\w+: )?", "", message)  # the name of a group
    return f"{message.rstrip('.')}. The flags: --help"


def _is_rule(line: str) -> bool:
    return not line.strip("─-╰╯+")


def check_numbers(options: object) -> None:
    """`UserError` that names the first number, of a group too, outside its `Range` (NaN is)."""
    for option in fields(options):
        value = getattr(options, option.name)
        if is_dataclass(value):
            check_numbers(value)
        for low, high in _ranges(option.type) if value is not None else ():
            if not low <= value <= high:
                above_zero = low > 0 and not value > 0
                wanted = "above zero" if above_zero else f"from {low:,} to {high:,}"
                given = f"--{option.name} {reprlib.repr(value)}"
                raise UserError(f"expected a number {wanted}, got {given}")


def _ranges(annotation: Any) -> Iterator[Range]:
    if isinstance(annotation, Range):
        yield annotation
    for part in get_args(annotation):
        yield from _ranges(part)


def check_on_disk(options: object, name: str) -> None:
    """`UserError` for a URL: as a path it would become a folder `gs:` here."""
    if "://" in getattr(options, name):
        raise UserError(f"{name} {getattr(options, name)}: expected a path on disk, not a URL")


# --- train_tokenizer.py and make_tfrecords.py -----------------------------------------------------


@dataclass(frozen=True)
class TokenizerOptions:
    """The text to train on, and the tokenizer."""

    train_path: tuple[str, ...] = ("docs:train",)  # folder, file, glob, hf:NAME[:SPLIT] or docs:
    n_files: Unset[Count] = None  # most files read, in archives too; a table is one (default: all)
    save_path: str = "runs/tokenizer"  # folder to write
    vocab_size: Annotated[int, Range(1, 2**24)] = 50257  # entries, control codes included
    control_codes: tuple[str, ...] = ("<|endoftext|>",)  # <|endoftext|> has the last id
    text_key: str = "text"  # column or key of the text in .parquet, .jsonl and hf:
    document_mark: Unset[str] = None  # cuts documents wherever it stands in a text (default: none)
    skip_broken: bool = False  # leave out what is damaged, named and counted, instead of stopping
    max_bytes: Unset[Count] = None  # most bytes of text to train on (default: all)
    overwrite: bool = False  # replace another tokenizer in save_path
    debug: bool = False  # print a traceback with every error

    def __post_init__(self) -> None:
        check_numbers(self)
        check_on_disk(self, "save_path")


@dataclass(frozen=True)
class ShardOptions:
    """The text to pack, and the shards."""

    path: tuple[str, ...] = ("docs:train",)  # folder, file, glob, hf:NAME[:SPLIT] or docs:
    save_path: str = "runs/shards"  # folder or URL (gs://...): 0.tfrecord ... and manifest.json
    tokenizer: Unset[str] = None  # folder or name of a tokenizer (default: algpt2-tokenizer)
    seq_len: Length = 256  # tokens that a row predicts; its record holds one more
    files_per_tfrecord: Count = 500_000  # documents per shard; shards hold equal numbers of rows
    n_shards: Unset[Batch] = None  # multiple of a pod's hosts (default: by files_per_tfrecord)
    use_control_codes: bool = True  # start each document with the first control code
    control_codes: tuple[str, ...] | None = ("<|endoftext|>",)  # the tokenizer must have them all
    n_examples: Unset[Count] = None  # rows to write at most (default: all)
    min_seq_len: bool = True  # join short documents, so that no row is padded: always on


@dataclass(frozen=True)
class DocumentOptions:
    """Which documents are packed."""

    line_by_line: bool = False  # each line is a document
    document_mark: Unset[str] = None
    """cuts documents wherever it stands in a text, as in --document_mark '<|endoftext|>' (default:
    nothing does)"""
    n_files: Unset[Count] = None  # most files read, in archives too; a table is one (default: all)
    text_key: str = "text"  # column or key of the text in .parquet, .jsonl and hf:
    detokenizer: Unset[Literal["wikitext", "ptb", "lambada"]] = None
    """undo the tokenization of a benchmark's files; words and bytes are counted before (default:
    change nothing)"""
    min_length: CountOrZero = 0  # characters; shorter documents are left out, and counted
    skip_broken: bool = False  # leave out what is damaged, named and counted, instead of stopping
    dedup: bool = False  # leave out documents whose text came before
    valid_fraction: BelowOne = 0.0  # share of documents (by hash) for save_path/valid, beside train
    shuffle_documents: bool = False  # order the documents by --seed; trainers shuffle rows anyhow
    seed: CountOrZero = 42  # of --shuffle_documents


@dataclass(frozen=True)
class WorkOptions:
    """How it is done; the shards do not depend on the workers."""

    workers: Unset[Batch] = None  # worker processes (default: one per core)
    ray: Unset[str] = None  # Ray cluster to work on, auto or host:port (default: this machine)
    verify: Unset[str] = None  # folder or URL to check, every record (default: pack)
    overwrite: bool = False  # remove the shards in save_path and pack anew
    debug: bool = False  # print a traceback with every error


@dataclass(frozen=True)
class PackOptions(WorkOptions, DocumentOptions, ShardOptions):
    """The options of make_tfrecords.py; the fields of the last base class come first."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.min_seq_len:
            raise UserError("--no_min_seq_len would pad rows: rows are always full, drop the flag")


# --- the three trainers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RowOptions:
    """Packed shards."""

    train_path: tuple[str, ...] = ("runs/quickstart/train",)  # folder, files, patterns; gs:// too
    val_path: tuple[str, ...] = ("runs/quickstart/val",)  # the same for evaluation
    tokenizer: Unset[str] = None  # folder or name (default: the checkpoint's or algpt2-tokenizer)
    seq_len: Unset[Length] = None  # tokens per row (default: that of the shards or n_positions)


@dataclass(frozen=True)
class DataOptions(RowOptions):
    """Text, or packed shards."""

    train_path: tuple[str, ...] = ("docs:train",)  # packed shards, or text from anywhere
    val_path: tuple[str, ...] = ("docs:valid",)  # the same for evaluation
    use_control_codes: bool = True  # text only: start each document with a control code
    control_codes: Unset[tuple[str, ...]] = None
    """text only: one code, or one per train_path; new codes are added (default: <|endoftext|>)"""
    line_by_line: bool = False  # text only: each line is a document
    document_mark: Unset[str] = None  # text only: cuts documents wherever it stands (default: none)
    text_key: str = "text"  # text only: column or key in .parquet, .jsonl and hf:
    detokenizer: Unset[Literal["wikitext", "ptb", "lambada", "auto"]] = None
    """text only: undo the tokenization of a benchmark's files; words and bytes are counted before;
    auto goes by the file's name, for --eval_sets (default: change nothing)"""
    n_eval_rows: Unset[Count] = None  # rows of each evaluation before the last (default: all)


@dataclass(frozen=True)
class ModelOptions:
    """The model, and what it starts from."""

    config: Unset[str] = None  # name or folder of a config (default: algpt2-tiny)
    checkpoint: Unset[str] = None  # run, checkpoint, URL or hub name (default: random weights)
    from_scratch: bool = False  # random weights (implied without --checkpoint)
    init_from: Unset[str] = None  # GPT-2 or ALGPT2 to fit --config to, by SVD (default: none)
    init_blocks: Unset[tuple[str, ...]] = None  # mean, first, last or layer numbers (default: mean)
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third slower


Optimizer = Literal["AdamW", "Adafactor", "Muon", "SGD"]


@dataclass(frozen=True)
class OptimOptions:
    """How it is trained."""

    optimizer: Optimizer = "AdamW"
    """Muon updates the matrices inside blocks; AdamW embeddings, head, biases and norms"""
    lr: Unset[Positive] = None  # peak learning rate (default: 5e-5 with --checkpoint, else 1e-3)
    lr_schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """after the warm-up; wsd: constant, then linear over decay_ratio of the steps"""
    warmup_steps: CountOrZero = 0  # optimizer steps of linear warm-up
    min_lr_ratio: Share = 0.0  # rate of the last step over the peak; 0: half a step before 0
    decay_ratio: Share = 0.2  # share of the steps in which wsd decays
    batch_size: Batch = 4  # rows per forward pass, over all processes
    grad_steps: Batch = 1  # forward passes per optimizer step
    epochs: Positive = 1.0  # passes over the training rows
    max_steps: Unset[Count] = None  # optimizer steps (default: by --epochs)
    n_tokens: Unset[Count] = None  # training tokens (default: by --epochs)
    weight_decay: PositiveOrZero = 0.1  # of matrices only
    beta1: BelowOne = 0.9  # AdamW and Adafactor; 0 saves Adafactor's first moment, costs quality
    beta2: BelowOne = 0.95  # AdamW, also beside Muon
    momentum: BelowOne = 0.95  # Muon and SGD
    relative_update_scale: bool = False  # Adafactor: the rate is relative to each weight's RMS
    max_grad_norm: PositiveOrZero = 1.0  # gradients are clipped to this norm; 0: never
    skip_outliers: Unset[Positive] = None
    """leave out a batch whose loss or gradient norm is not finite, or this many standard deviations
    above the mean of the last 128 updates (6 is usual); 11 in a row stop the run (default: off)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 if the chip has it
    fp16: bool = False  # the same as --precision fp16
    seed: CountOrZero = 42  # of weights, data order and dropout


@dataclass(frozen=True)
class KeepOptions:
    """What is kept of the run."""

    save_dir: str = "runs/train"  # the run's folder, or URL: metrics.jsonl, run.json, checkpoint-*
    keep_last: Count = 2  # newest checkpoints kept
    milestone_steps: Unset[Count] = None  # steps whose multiples stay for ever (default: none)
    max_minutes: Unset[Positive] = None
    """save and stop (exit code 75) this many minutes after the start, packing included, at the next
    step or evaluation batch; the same command continues (default: never)"""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online if logged in
    tags: Annotated[tuple[str, ...], IN_WORDS] = ()  # W&B tags (default: none)


@dataclass(frozen=True)
class ReportOptions(KeepOptions):
    """What is reported and kept; steps are optimizer steps."""

    logging_steps: Count = 10  # steps between lines of metrics.jsonl
    eval_steps: Unset[Count] = None  # steps between evaluations (default: a tenth of the run)
    save_steps: Unset[Count] = None  # steps between checkpoints (default: --eval_steps)
    sample_steps: Unset[Count] = None  # steps between samples (default: never)
    hist_steps: Unset[Count] = None  # steps between histograms of weights in W&B (default: never)
    wandb_artifacts: bool = False  # the last checkpoint of the run as a W&B artifact, too
    push_to_hub: Unset[str] = None  # private model of the hub to upload to (default: no upload)


@dataclass(frozen=True)
class EvalOptions:
    """What --eval_only measures."""

    eval_sets: Annotated[tuple[str, ...], IN_WORDS] = ()  # files or folders (default: --val_path)
    stride: Unset[Count] = None  # tokens scored per window (default: seq_len, no overlap)
    n_eval_examples: Unset[Count] = None  # LAMBADA passages, BLiMP pairs per file (default: all)


@dataclass(frozen=True)
class SampleOptions:
    """How text is sampled."""

    prompt: str = ""  # text to continue
    do_sample: bool = True  # --no_do_sample takes the likeliest token each time
    n_samples: Annotated[int, Range(1, 2**16)] = 3  # samples, in one batch
    max_length: Count = 200  # tokens, prompt included; past the context the window slides
    temperature: Factor = 0.8  # divides the logits; 1: the model's own distribution
    top_k: Annotated[int, Range(0, 2**31)] = 0  # sample from the k likeliest tokens; 0: from all
    top_p: Annotated[float, Range(1e-6, 1)] = 0.95
    """sample from the likeliest tokens that hold this probability; 1: from all"""
    repetition_penalty: Factor = 1.0  # CTRL's; 1: none
    sliding_window_size: Unset[Count] = None  # tokens kept when it slides (default: half a context)


@dataclass(frozen=True)
class CheckpointOptions:
    """What else to do with --checkpoint."""

    sample_only: bool = False  # sample from it and stop
    compressors: bool = False  # with --eval_only: gzip and xz on the same text beside it


@dataclass(frozen=True)
class RunOptions:
    """How the script runs."""

    eval_only: bool = False  # evaluate --checkpoint and stop
    device: str = "auto"  # auto, cpu, and cuda or mps (PyTorch) or gpu (TensorFlow)
    compile: Unset[bool] = None
    """torch.compile or XLA: a slow start, faster steps; XLA slows CPUs down (default: train_pt.py
    on CUDA where Triton and a C compiler are)"""
    steps_per_call: Unset[Count] = None
    """steps between two looks at the loss and at a stop; more is faster on GPUs and TPUs (default:
    10 in train_tfrecords.py and on CUDA in train_pt.py, else 1)"""
    overwrite: bool = False  # remove the run in save_dir and start anew
    debug: bool = False  # print a traceback with every error


@dataclass(frozen=True)
class TrainOptions(RunOptions, CheckpointOptions):
    """The options of train_pt.py; the fields of the last base class come first."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    report: ReportOptions = field(default_factory=ReportOptions)
    sample: SampleOptions = field(default_factory=SampleOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.eval != EvalOptions() and not self.eval_only:
            raise UserError("--eval_sets, --n_eval_examples and --stride need --eval_only")
        if self.data.detokenizer == "auto" and not self.eval.eval_sets:
            raise UserError("--detokenizer auto needs --eval_sets: expected wikitext, ptb, lambada")
        if self.optim.fp16 and self.optim.precision not in ("auto", "fp16"):
            raise UserError(f"--fp16 contradicts --precision {self.optim.precision}: drop one")
        if self.model.init_from and (self.model.checkpoint or self.model.from_scratch):
            raise UserError(
                "--init_from and --checkpoint or --from_scratch: expected one, drop the other"
            )
        if self.eval_only and self.sample_only:
            raise UserError("--eval_only and --sample_only: expected one, drop the other")
        if (self.eval_only or self.sample_only) and not self.model.checkpoint:
            flag = "--eval_only" if self.eval_only else "--sample_only"
            raise UserError(f"{flag} needs --checkpoint FOLDER")


@dataclass(frozen=True)
class DeviceOptions:
    """How TensorFlow uses the devices."""

    n_devices: Unset[Count] = None  # GPUs to use, or parts of the CPU (default: 1; all of a TPU)


@dataclass(frozen=True)
class TFTrainOptions(TrainOptions, DeviceOptions):
    """The options of train_tf.py."""

    steps_per_call: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optim.fp16 or self.optim.precision == "fp16":
            raise UserError("fp16 needs PyTorch (train_pt.py): expected --precision bf16 or fp32")
        if self.model.init_from or self.model.init_blocks:
            raise UserError(
                "--init_from needs PyTorch: start with train_pt.py, stop it, and continue its "
                "checkpoint here with --checkpoint RUN"
            )


# --- train_tfrecords.py: the same groups, with flags and defaults of the original project ---------


@dataclass(frozen=True)
class TypeOptions:
    """The model, and what it starts from."""

    model_type: Literal["gpt2", "algpt2"] = "algpt2"  # the config, unless config_path names one
    config_path: Unset[str] = None  # name or folder of a config (default: --model_type)
    checkpoint: Unset[str] = None  # run, checkpoint or hub name (default: random weights)
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third slower


@dataclass(frozen=True)
class TFRecordOptimOptions(OptimOptions):
    """How it is trained."""

    optimizer: Optimizer = "Adafactor"  # AdamW reaches lower losses
    lr: Positive | None = 1e-4  # peak learning rate
    warmup_steps: CountOrZero = 10_000  # optimizer steps of linear warm-up
    disable_lr_schedule: bool = False  # lr from the first step to the last
    momentum: BelowOne = 0.9  # Adafactor's first moment (0: none), Muon's and SGD's
    batch_size: Batch = 8  # rows per forward pass, over all devices of all hosts
    train_len: Unset[Count] = None  # rows of an epoch (default: those of the shards)
    beta1: Suppress[BelowOne] = OptimOptions.beta1
    fp16: Suppress[bool] = False


@dataclass(frozen=True)
class BatchReportOptions(KeepOptions):
    """What is reported and kept."""

    save_dir: str = "runs/tfrecords"  # the run's folder, or URL (gs://...)
    save_batches: Count = 1000  # steps between checkpoints
    eval_batches: Unset[Count] = None  # steps between evaluations (default: --save_batches)
    log_batches: Count = 10  # steps between lines of metrics.jsonl


@dataclass(frozen=True)
class TPUOptions:
    """The TPU."""

    tpu: str = "none"  # name of a TPU or pod; local: the TPU attached to this machine; none: no TPU
    dry_run: Unset[str] = None  # only compile the step for a slice, as v3-128 (default: off)
    find_batch: bool = False  # with dry_run: the largest batch that fits


@dataclass(frozen=True)
class TFRecordOptions(RunOptions, DeviceOptions, TPUOptions):
    """The options of train_tfrecords.py, which trains by `train_options()`."""

    data: RowOptions = field(default_factory=RowOptions)
    model: TypeOptions = field(default_factory=TypeOptions)
    optim: TFRecordOptimOptions = field(default_factory=TFRecordOptimOptions)
    report: BatchReportOptions = field(default_factory=BatchReportOptions)
    steps_per_call: Count = 10

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.find_batch and not self.dry_run:
            raise UserError("--find_batch needs --dry_run SLICE, for example --dry_run v3-128")
        self.train_options()  # which checks all else

    def train_options(self) -> TFTrainOptions:
        """The same run in the options of train_tf.py, as run.json records it."""
        model, optim, report = self.model, self.optim, self.report
        changes: dict[str, Any] = {}
        if optim.optimizer == "Adafactor":
            changes = {"beta1": optim.momentum, "momentum": OptimOptions.momentum}
        if optim.disable_lr_schedule:
            changes |= {"lr_schedule": "constant", "warmup_steps": 0}
        return _as(
            TFTrainOptions, self,
            data=_as(DataOptions, self.data),
            model=_as(ModelOptions, model, config=model.config_path or model.model_type),
            optim=_as(OptimOptions, optim, **changes),
            report=_as(
                ReportOptions, report, logging_steps=report.log_batches,
                eval_steps=report.eval_batches or report.save_batches,
                save_steps=report.save_batches,
            ),
        )  # fmt: skip


def _as(cls: type[Options], options: object, **changes: Any) -> Options:
    """A `cls` with the fields that it shares with `options`, and `changes`."""
    names = {option.name for option in fields(cls)} & {option.name for option in fields(options)}
    return cls(**{name: getattr(options, name) for name in names} | changes)


# --- export_gpt2.py and plot_runs.py --------------------------------------------------------------


@dataclass(frozen=True)
class ExportOptions:
    """What is written."""

    checkpoint: Annotated[Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """folder of a run or of a checkpoint"""
    out: Annotated[Positional[str], tyro.conf.arg(metavar="OUT")]  # folder to write
    overwrite: bool = False  # replace the files of an earlier export
    debug: bool = False  # print a traceback with every error

    def __post_init__(self) -> None:
        check_on_disk(self, "out")


@dataclass(frozen=True)
class PlotOptions:
    """What is drawn."""

    runs: Annotated[Positional[tuple[str, ...]], IN_WORDS, tyro.conf.arg(metavar="[RUNS ...]")] = ()
    """folders of runs, or their metrics.jsonl (default: all runs in runs/)"""
    save_path: str = "curves.png"  # image to write
    x: Literal["tokens", "step", "elapsed_s"] = "tokens"  # what the curves run over
    smooth: Count = 10  # lines of metrics.jsonl averaged per drawn point; 1: none
    overwrite: bool = False  # replace an image that this script did not draw
    debug: bool = False  # print a traceback with every error

    def __post_init__(self) -> None:
        check_on_disk(self, "save_path")
        check_numbers(self)


# --- two records of options -----------------------------------------------------------------------


def changed_options(
    old: dict[str, Any], new: dict[str, Any], ignore: Sequence[str] = ()
) -> list[str]:
    """`name: old -> new` for each option that differs, nested groups flattened."""
    changes = []
    for name in sorted({**old, **new}):
        before, after = old.get(name), new.get(name)
        if name in ignore or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_options(before, after, ignore)
        else:
            changes.append(f"{name}: {before} -> {after}")
    return changes
