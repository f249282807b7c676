"""The options of every script: one frozen dataclass each, parsed from the command line by tyro.

One line, one unit, one reason per field: the comment behind a field is its `--help`. A default that
is not here is nowhere. No framework is imported, so that `--help` answers at once.
"""

import contextlib
import io
import itertools
import re
import reprlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro

from .errors import UserError

Options = TypeVar("Options")

MAX_NUMBER = 2**53  # of steps, tokens, rows
MAX_BATCH = 2**20  # rows; of them ids alone take 8 MB
BELOW_ONE = 1 - 2**-53

# Options that name a file, a folder or a URL.
PATHS = frozenset(
    "path train_path val_path save_path save_dir tokenizer config config_path checkpoint init_from "
    "verify eval_sets runs out".split()
)
DEFAULT_TOKENIZER = "algpt2-tokenizer"
_start = {"s": time.monotonic()}  # of the command


def parse(
    cls: type[Options], argv: Sequence[str] | None = None, *, prog: str | None = None
) -> Options:
    """An instance of the dataclass `cls` from `argv` (default: the command line's arguments).

    Flags have underscored names; a tuple takes several values (`--train_path A B`); a bool is a
    bare flag (`--overwrite`, `--no_overwrite`); fields of nested dataclasses keep their own names.
    `--help` prints and exits with 0. Unknown flags and bad values: `UserError`.
    """
    _start["s"] = time.monotonic()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            options = tyro.cli(
                cls,
                args=argv,
                prog=prog,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        raise UserError(_first_sentence(printed.getvalue())) from None
    _check_paths(options)
    return options


def _check_paths(options: object) -> None:
    """`UserError` for an empty path, as of a shell's variable that is not set: it would be the
    current folder."""
    for option in fields(options):
        value = getattr(options, option.name)
        if is_dataclass(value):
            _check_paths(value)
        elif option.name in PATHS and "" in (value if isinstance(value, tuple) else (value,)):
            raise UserError(f"{option.name} has an empty value: expected a path or a name")


def seconds_since_start() -> float:
    """Seconds since the command line was parsed: what a rented machine has been paid for."""
    return time.monotonic() - _start["s"]


def _first_sentence(box: str) -> str:
    """The message of one of tyro's framed error boxes: what stands between its first rules."""
    lines = [line.strip(" │|") for line in box.splitlines()[1:]]
    after_title = itertools.dropwhile(_is_rule, lines)
    message = " ".join(itertools.takewhile(lambda line: not _is_rule(line), after_title))
    message = re.sub(r"^(Error parsing )?(\w+Options: )?", "", message)  # names of our classes
    return f"{message.rstrip('.')}. The flags: --help"


def _is_rule(line: str) -> bool:
    return not line.strip("─-╰╯+")


def check_positive(options: object, *names: str) -> None:
    """`UserError` that names every field of `names` that is set and not above zero."""
    wrong = {name: getattr(options, name) for name in names}
    wrong = {name: v for name, v in wrong.items() if v is not None and not 0 < v < MAX_NUMBER}
    if wrong:
        given = ", ".join(f"--{name} {reprlib.repr(value)}" for name, value in wrong.items())
        raise UserError(f"expected a number above zero, got {given}")


def check_between(options: object, low: float, high: float, *names: str) -> None:
    """`UserError` that names the first field of `names` that is set and not from `low` to `high`
    (NaN never is)."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            given = f"--{name} {reprlib.repr(value)}"
            raise UserError(f"{given}: expected a number from {low:.12g} to {high:.12g}")


def check_on_disk(options: object, name: str) -> None:
    """`UserError` for a URL: as a path it would become a folder `gs:` here."""
    if "://" in getattr(options, name):
        raise UserError(f"{name} {getattr(options, name)}: expected a path on disk, not a URL")


@dataclass(frozen=True)
class TokenizerOptions:
    """Train a byte-level BPE tokenizer on a corpus and write it to a folder."""

    train_path: tuple[str, ...] = ("docs:train",)  # folder, file, glob, hf:NAME[:SPLIT] or docs:
    n_files: int | None = None
    """read at most this many files, in archives too; a table counts as one"""
    save_path: str = "runs/tokenizer"  # folder to write
    vocab_size: int = 50257  # entries, control codes included
    control_codes: tuple[str, ...] = ("<|endoftext|>",)  # others come before it: it has the last id
    text_key: str = "text"  # column or key of the text in .parquet, .jsonl and hf:
    skip_broken: bool = False  # leave out what is damaged, named and counted, instead of stopping
    max_bytes: int | None = None  # bytes of text to train on at most; memory grows with new words
    overwrite: bool = False  # replace another tokenizer in save_path
    debug: bool = False  # a traceback with every error

    def __post_init__(self) -> None:
        check_positive(self, "n_files", "vocab_size", "max_bytes")
        check_on_disk(self, "save_path")
        check_between(self, 1, 2**24, "vocab_size")
        if not self.train_path:
            raise UserError("--train_path needs at least one folder, file, glob, hf:NAME or docs:")


@dataclass(frozen=True)
class PackOptions:
    """Pack a corpus into TFRecord shards that every trainer reads."""

    path: tuple[str, ...] = ("docs:train",)  # folder, file, glob, hf:NAME[:SPLIT] or docs:
    save_path: str = "runs/shards"  # folder or URL (gs://...): 0.tfrecord ... and manifest.json
    tokenizer: str | None = None  # folder, or name of a tokenizer; default: algpt2-tokenizer
    seq_len: int = 256  # tokens that a row predicts; its record holds one more
    files_per_tfrecord: int = 500_000  # documents per shard; shards hold equal numbers of rows
    n_shards: int | None = None  # so many shards (for a pod: a multiple of its hosts)
    use_control_codes: bool = True  # each document starts with the first control code
    control_codes: tuple[str, ...] | None = ("<|endoftext|>",)  # the tokenizer must have them all
    n_examples: int | None = None  # write at most this many rows
    min_seq_len: bool = True  # short documents are joined, no row is padded: there is no other way
    line_by_line: bool = False  # each line is a document
    n_files: int | None = None
    """read at most this many files, in archives too; a table counts as one"""
    text_key: str = "text"  # column or key of the text in .parquet, .jsonl and hf:
    detokenizer: Literal["wikitext", "ptb", "lambada"] | None = None
    """undo the tokenization of a benchmark's files; words and bytes are counted before"""
    min_length: int = 0  # characters; shorter documents are left out, and counted
    skip_broken: bool = False  # leave out what is damaged, named and counted, instead of stopping
    dedup: bool = False  # leave out documents whose text was met before
    valid_fraction: float = 0.0  # share of documents (by hash) for save_path/valid, beside train
    shuffle_documents: bool = False  # order the documents by --seed; trainers shuffle rows anyhow
    seed: int = 42  # of --shuffle_documents
    workers: int | None = None  # processes; default: as many as cores; the bytes are the same
    ray: str | None = None  # cluster that does the work: auto or host:port (requirements-ray.txt)
    verify: str | None = None  # check the shards in this folder or URL, every record, and stop
    overwrite: bool = False  # remove the shards in save_path and pack anew
    debug: bool = False  # a traceback with every error

    def __post_init__(self) -> None:
        check_positive(self, "seq_len", "files_per_tfrecord", "n_examples", "n_files")
        check_positive(self, "n_shards", "workers")
        check_between(self, 1, 2**28, "seq_len")
        check_between(self, 1, 2**20, "n_shards", "workers")
        check_between(self, 0, MAX_NUMBER, "seed", "min_length")
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"--valid_fraction {self.valid_fraction}: expected 0 or more, below 1")
        if not self.path:
            raise UserError("--path needs at least one folder, file, glob, hf:NAME or docs:")
        if not self.min_seq_len:
            raise UserError("--no_min_seq_len would pad rows: rows are always full, drop the flag")


@dataclass(frozen=True)
class DataOptions:
    """What is read."""

    train_path: tuple[str, ...] = ("docs:train",)  # packed shards, or text from anywhere
    val_path: tuple[str, ...] = ("docs:valid",)  # the same for evaluation
    tokenizer: str | None = None  # folder or name; default: the checkpoint's, or algpt2-tokenizer
    seq_len: int | None = None  # tokens per row; default: that of the shards, or n_positions
    use_control_codes: bool = True  # each document starts with a control code (text input)
    control_codes: tuple[str, ...] | None = None  # one, or one per train_path; new ones are added
    line_by_line: bool = False  # each line is a document (text input)
    text_key: str = "text"  # column or key of the text in .parquet, .jsonl and hf:
    detokenizer: Literal["wikitext", "ptb", "lambada", "auto"] | None = None
    """undo the tokenization of a benchmark's files (text input); words and bytes are counted
    before; auto, by the name of a file, is for eval_sets"""
    n_eval_rows: int | None = None  # rows of each evaluation during training; the last takes all


@dataclass(frozen=True)
class ModelOptions:
    """What is trained."""

    config: str | None = None  # config name or folder; default: algpt2-tiny
    checkpoint: str | None = None  # run, checkpoint or any causal LM: folder, URL or hub name
    from_scratch: bool = False  # random weights (implied without --checkpoint)
    init_from: str | None = None  # GPT-2 or ALGPT2 checkpoint that starts --config (SVD, means)
    init_blocks: tuple[str, ...] | None = None  # mean, first, last or layers; default: mean
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third slower


@dataclass(frozen=True)
class OptimOptions:
    """How it is trained."""

    optimizer: Literal["AdamW", "Adafactor", "Muon", "SGD"] = "AdamW"
    """with Muon, AdamW updates what is no hidden matrix"""
    lr: float | None = None  # peak learning rate; default: 5e-5 with --checkpoint, else 1e-3
    lr_schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """after the warm-up; wsd: constant, then linear over decay_ratio of the steps"""
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    min_lr_ratio: float = 0.0  # learning rate of the last step over the peak
    decay_ratio: float = 0.2  # share of the steps in which wsd decays
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW and Adafactor; 0 saves Adafactor's first moment, costs quality
    beta2: float = 0.95  # AdamW (also on Muon's vectors and embeddings)
    momentum: float = 0.95  # Muon and SGD
    relative_update_scale: bool = False  # Adafactor: the rate is relative to each weight's RMS
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0: never
    skip_outliers: float | None = None
    """leave out a batch whose loss or gradient norm is not finite or so many standard deviations
    above the mean of the last 128 updates (6 is usual); 11 in a row stop the run"""
    batch_size: int = 4  # rows per forward pass, over all processes
    grad_steps: int = 1  # forward passes per optimizer step
    epochs: float = 1.0  # passes over the training rows
    max_steps: int | None = None  # optimizer steps; replaces epochs
    n_tokens: int | None = None  # training tokens; replaces epochs
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on GPUs that have it
    fp16: bool = False  # the same as --precision fp16
    seed: int = 42  # of weights, data order and dropout


@dataclass(frozen=True)
class ReportOptions:
    """What is reported and kept."""

    save_dir: str = "runs/train"  # the run's folder, or URL: metrics.jsonl, run.json, checkpoint-*
    logging_steps: int = 10  # steps between lines of metrics.jsonl
    eval_steps: int | None = None  # steps between evaluations; default: a tenth of the run
    save_steps: int | None = None  # steps between checkpoints; default: as eval_steps
    sample_steps: int | None = None  # steps between samples; default: never
    hist_steps: int | None = None  # steps between histograms of weights and gradients (W&B)
    keep_last: int = 2  # newest checkpoints kept
    milestone_steps: int | None = None  # checkpoints at multiples of this are kept for ever
    max_minutes: float | None = None
    """save and stop, exit code 75, so long after the start of the script (packing included), behind
    the step or evaluation batch under way; the same command continues"""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online if logged in
    wandb_artifacts: bool = False  # the last checkpoint of the run as a W&B artifact, too
    tags: tuple[str, ...] = ()  # W&B tags
    push_to_hub: str | None = None  # upload the last checkpoint as this private model of the hub


@dataclass(frozen=True)
class EvalOptions:
    """What --eval_only measures."""

    eval_sets: tuple[str, ...] = ()  # files or folders of evaluation sets, instead of val_path
    stride: int | None = None  # tokens scored per window; default: seq_len, no overlap
    n_eval_examples: int | None = None  # LAMBADA passages, BLiMP pairs per file; default: all


@dataclass(frozen=True)
class SampleOptions:
    """How text is sampled."""

    prompt: str = ""  # text to continue
    do_sample: bool = True  # --no_do_sample takes the likeliest token each time
    n_samples: int = 3  # samples, in one batch
    max_length: int = 200  # tokens, prompt included; past the context the window slides
    temperature: float = 0.8  # divides the logits; 1: the model's own distribution
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 0.95  # only the likeliest tokens that hold this probability; 1: all
    repetition_penalty: float = 1.0  # CTRL's; 1: none
    sliding_window_size: int | None = None  # tokens kept when it slides; default: half a context


@dataclass(frozen=True)
class TrainOptions:
    """Pretrain or finetune a causal language model, evaluate it, or sample from it."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    report: ReportOptions = field(default_factory=ReportOptions)
    sample: SampleOptions = field(default_factory=SampleOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    eval_only: bool = False  # evaluate --checkpoint on --val_path or --eval_sets and stop
    compressors: bool = False  # with eval_only: gzip and xz on the same text beside it
    sample_only: bool = False  # sample from --checkpoint and stop
    device: str = "auto"  # auto, cpu, cuda, mps
    compile: bool = False  # torch.compile: a slow start, faster steps
    overwrite: bool = False  # remove the run in save_dir and start anew
    debug: bool = False  # a traceback with every error

    def __post_init__(self) -> None:
        check_positive(self.optim, "batch_size", "grad_steps", "max_steps", "n_tokens", "epochs")
        check_positive(self.optim, "lr", "skip_outliers")
        check_positive(self.data, "seq_len", "n_eval_rows")
        check_positive(self.report, "logging_steps", "eval_steps", "save_steps", "sample_steps")
        check_positive(self.report, "hist_steps", "keep_last", "milestone_steps", "max_minutes")
        check_positive(self.sample, "n_samples", "max_length", "temperature", "sliding_window_size")
        check_positive(self.eval, "stride", "n_eval_examples")
        check_between(self.optim, 0, BELOW_ONE, "beta1", "beta2", "momentum")
        check_between(self.optim, 0, 1, "min_lr_ratio", "decay_ratio")
        check_between(self.optim, 0, MAX_NUMBER, "warmup_steps", "weight_decay", "max_grad_norm")
        check_between(self.optim, 0, 2**53, "seed")
        check_between(self.optim, 1, MAX_BATCH, "batch_size", "grad_steps")
        check_between(self.data, 1, 2**28, "seq_len")
        check_between(self.sample, 1, 2**16, "n_samples")
        check_between(self.sample, 0, 2**31, "top_k")
        check_between(self.sample, 1e-6, 1, "top_p")
        check_between(self.sample, 1e-6, 1e6, "repetition_penalty", "temperature")
        if self.eval != EvalOptions() and not self.eval_only:
            raise UserError("--eval_sets, --n_eval_examples and --stride need --eval_only")
        if self.data.detokenizer == "auto" and not self.eval.eval_sets:
            raise UserError("--detokenizer auto needs --eval_sets: expected the name of one")
        if self.optim.fp16 and self.optim.precision not in ("auto", "fp16"):
            raise UserError(f"--fp16 contradicts --precision {self.optim.precision}: drop one")
        if self.model.init_from and (self.model.checkpoint or self.model.from_scratch):
            raise UserError("--init_from and --checkpoint or --from_scratch: expected one of them")
        if self.eval_only and self.sample_only:
            raise UserError("--eval_only and --sample_only: expected one of them")
        if (self.eval_only or self.sample_only) and not self.model.checkpoint:
            raise UserError("--eval_only and --sample_only need --checkpoint FOLDER")


@dataclass(frozen=True)
class ExportOptions:
    """Write an ALGPT2 checkpoint as a stock GPT-2 with the same logits."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """folder of a run or of a checkpoint"""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]  # folder to write
    overwrite: bool = False  # replace the files of an earlier export
    debug: bool = False  # a traceback with every error

    def __post_init__(self) -> None:
        check_on_disk(self, "out")


@dataclass(frozen=True)
class TFTrainOptions(TrainOptions):
    """Pretrain or finetune GPT-2 or ALGPT2 in TensorFlow, evaluate it, or sample from it."""

    device: str = "auto"  # auto, cpu, gpu
    n_devices: int | None = None  # GPUs to train on; or so many logical devices of the CPU
    steps_per_call: int = 1  # optimizer steps between two returns to Python
    compile: bool = False  # XLA for loss and gradients: faster on GPUs, slower on CPUs

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "n_devices", "steps_per_call")
        if self.optim.fp16 or self.optim.precision == "fp16":
            raise UserError("fp16 needs PyTorch (train_pt.py): expected --precision bf16 or fp32")
        if self.model.init_from or self.model.init_blocks:
            raise UserError(
                "--init_from needs PyTorch: start with train_pt.py and stop it; expected here the "
                "checkpoint that it leaves, --checkpoint RUN"
            )


@dataclass(frozen=True)
class TFRecordOptions:
    """Pretrain GPT-2 or ALGPT2 from TFRecord shards: on a TPU pod, on several machines, or here."""

    tpu: str = "none"  # name of a TPU or pod; local: this is its host; none: no TPU
    train_path: tuple[str, ...] = ("runs/quickstart/train",)  # folder, shards, patterns; gs:// too
    val_path: tuple[str, ...] = ("runs/quickstart/val",)  # the same for evaluation
    train_len: int | None = None  # rows of an epoch; default: those of the shards
    seq_len: int | None = None  # tokens per row; default: that of the shards
    model_type: Literal["gpt2", "algpt2"] = "algpt2"  # the config, unless config_path names one
    config_path: str | None = None  # config name or folder
    checkpoint: str | None = None  # weights to start from: a run, a checkpoint, or hub name
    tokenizer: str | None = None  # kept with the checkpoints; default: the packaged one if it fits
    optimizer: Literal["AdamW", "Adafactor", "Muon", "SGD"] = "Adafactor"  # AdamW is better
    lr: float = 1e-4  # peak learning rate
    warmup_steps: int = 10_000  # optimizer steps of linear warm-up
    lr_schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"  # after the warm-up
    disable_lr_schedule: bool = False  # lr from the first step to the last
    momentum: float = 0.9  # Adafactor's first moment (0: none), Muon's and SGD's
    relative_update_scale: bool = False  # Adafactor: the rate is relative to each weight's RMS
    weight_decay: float = 0.1  # on matrices only
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0: never
    skip_outliers: float | None = None
    """leave out a batch whose loss or gradient norm is not finite or so many standard deviations
    above the mean of the last 128 updates (6 is usual); 11 in a row stop the run"""
    batch_size: int = 8  # rows per forward pass, over all devices of all hosts
    grad_steps: int = 1  # forward passes per optimizer step
    epochs: float = 1.0  # passes over the training rows
    max_steps: int | None = None  # optimizer steps; replaces epochs
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on TPUs and GPUs that have it
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third slower
    steps_per_call: int = 10  # optimizer steps between two returns to Python
    device: str = "auto"  # without a TPU: auto, cpu, gpu
    n_devices: int | None = None  # GPUs to train on; or so many logical devices of the CPU
    compile: bool = False  # XLA without a TPU: faster on GPUs, slower on CPUs
    save_dir: str = "runs/tfrecords"  # the run's folder, or URL (gs://...)
    save_batches: int = 1000  # steps between checkpoints
    eval_batches: int | None = None  # steps between evaluations; default: as save_batches
    log_batches: int = 10  # steps between lines of metrics.jsonl
    keep_last: int = 2  # newest checkpoints kept
    milestone_steps: int | None = None  # checkpoints at multiples of this are kept for ever
    max_minutes: float | None = None
    """save and stop, exit code 75, so long after the start of the script (packing included), behind
    the step or evaluation batch under way; the same command continues"""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online if logged in
    tags: tuple[str, ...] = ()  # W&B tags
    seed: int = 42  # of weights, data order and dropout
    eval_only: bool = False  # evaluate --checkpoint on --val_path and stop
    dry_run: str | None = None  # compile the step for this TPU slice (v3-128) here, and stop
    find_batch: bool = False  # with dry_run: the largest batch that fits
    overwrite: bool = False  # remove the run in save_dir and start anew
    debug: bool = False  # a traceback with every error

    def __post_init__(self) -> None:
        check_positive(self, "train_len", "save_batches", "eval_batches", "log_batches")
        if self.eval_only and not self.checkpoint:
            raise UserError("--eval_only needs --checkpoint FOLDER")
        if self.find_batch and not self.dry_run:
            raise UserError("--find_batch needs --dry_run SLICE, for example --dry_run v3-128")
        self.train_options()  # the checks of the others

    def train_options(self) -> TFTrainOptions:
        """The same run in the options of train_tf.py."""
        momentum = {"beta1" if self.optimizer == "Adafactor" else "momentum": self.momentum}
        schedule, warmup = self.lr_schedule, self.warmup_steps
        if self.disable_lr_schedule:
            schedule, warmup = "constant", 0
        return TFTrainOptions(
            data=DataOptions(self.train_path, self.val_path, self.tokenizer, self.seq_len),
            model=ModelOptions(
                self.config_path or self.model_type, self.checkpoint,
                gradient_checkpointing=self.gradient_checkpointing,
            ),
            optim=OptimOptions(
                optimizer=self.optimizer, lr=self.lr, lr_schedule=schedule, warmup_steps=warmup,
                weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm,
                relative_update_scale=self.relative_update_scale,
                skip_outliers=self.skip_outliers, batch_size=self.batch_size,
                grad_steps=self.grad_steps, epochs=self.epochs, max_steps=self.max_steps,
                precision=self.precision, seed=self.seed, **momentum,
            ),
            report=ReportOptions(
                self.save_dir, self.log_batches, self.eval_batches or self.save_batches,
                self.save_batches, keep_last=self.keep_last, milestone_steps=self.milestone_steps,
                max_minutes=self.max_minutes, wandb=self.wandb, tags=self.tags,
            ),
            eval_only=self.eval_only, device=self.device, n_devices=self.n_devices,
            steps_per_call=self.steps_per_call, compile=self.compile, overwrite=self.overwrite,
            debug=self.debug,
        )  # fmt: skip


@dataclass(frozen=True)
class PlotOptions:
    """Draw the loss and learning-rate curves of one or several runs to a PNG."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders of runs, or their metrics.jsonl; none: all runs in runs/"""
    save_path: str = "curves.png"  # image to write
    x: Literal["tokens", "step", "elapsed_s"] = "tokens"  # what the curves run over
    smooth: int = 10  # lines of metrics.jsonl averaged per drawn point; 1: none
    overwrite: bool = False  # replace an image that this script did not draw
    debug: bool = False  # a traceback with every error

    def __post_init__(self) -> None:
        check_on_disk(self, "save_path")
        check_positive(self, "smooth")


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
