"""A run: its folder, held by one process; its run.json; the checkpoint that it continues from."""

import contextlib
import importlib.util
import json
import math
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..options import ModelOptions, OptimOptions, TrainOptions, changed_options
from ..shards.tfrecords import PackedRows
from ..system.console import is_main_process, log
from ..system.files import locked, read_record, remove
from ..system.remote import is_remote, local_folder
from .checkpoints import (
    FILES_OF_RUN,
    LOCK_FILE,
    RUN_FILE,
    Checkpoint,
    is_checkpoint_name,
    newest_checkpoint,
)
from .mirror import checkpoint_here, copy_or_warn, refuse_others, sync_from_url
from .report import RunReport

LR_FROM_SCRATCH, LR_FINETUNE = 1e-3, 5e-5
NOT_OF_THE_RUN = {  # options that may change between two starts of the same run
    "report", "sample", "eval", "eval_only", "compressors", "sample_only", "device", "compile",
    "n_devices", "steps_per_call", "overwrite", "debug", "skip_outliers",
}  # fmt: skip


@dataclass
class Run:
    """A run whose folder this process holds; `Run.open` opens it."""

    folder: Path  # on this machine; of a URL it is in the cache
    record: dict[str, Any]  # the content of run.json
    checkpoint: Checkpoint | None  # to continue from, verified; None: the run is new
    report: RunReport | None = None  # while it trains

    @staticmethod
    @contextlib.contextmanager
    def open(
        options: TrainOptions, train: PackedRows, val: PackedRows, processes: Any,
        n_rows: int | None = None,
    ) -> Iterator["Run"]:  # fmt: skip
        """Hold the folder of `--save_dir`; continue the run in it, or begin one.

        A run at a URL is downloaded into the cache first, and uploaded again if the body fails.

        Args:
            processes: of processes_pt.py or processes_tf.py.
            n_rows: rows of an epoch; None: all that `train` has.
        Raises:
            UserError: the folder is in use, holds something else or a run with other options; a
                shard is damaged; the checkpoint is not the same for every process.
            RemoteError: the URL cannot be read or written.
        """
        report, folder = options.report, local_folder(options.report.save_dir)
        record = describe_run(options, train, val, n_rows)
        with hold(folder):
            if is_remote(report.save_dir) and is_main_process():
                sync_from_url(report, folder, options.overwrite)
                log(f"{report.save_dir}: written to {folder}, copied with each checkpoint")
            try:
                yield _on_all(processes, folder, record, options)
            except Exception:
                copy_or_warn(report, step=-1)
                raise

    def summary(self, step: int, done: bool) -> str:
        """The lines printed when a run starts: options, derived numbers, the step reached."""
        run = self.record
        lines = [
            f"{group}: {' '.join(f'{k}={v}' for k, v in flags.items() if v is not None)}"
            for group, flags in run["options"].items()
            if isinstance(flags, dict)
        ]
        virtual = f", {run['virtual_parameters']:,} virtual" if "virtual_parameters" in run else ""
        flops = (
            f", {run['flops_per_token'] / 1e6:.1f} MFLOP per token"
            if "flops_per_token" in run else ""
        )  # fmt: skip
        lines += [
            f"parameters: {run['parameters']:,} stored{virtual}{flops}",
            f"data: {run['data']['train_tokens']:,} training tokens, {run['epochs']:.2f} epochs",
            f"steps: {run['steps']:,} of {run['tokens_per_step']:,} tokens, "
            f"peak lr {run['peak_lr']:g}",
        ]
        if done:
            lines.append(f"already done: step {step:,} is the last; another --save_dir starts anew")
        elif step:
            lines.append(f"continuing at step {step:,}")
        return "\n".join(lines)


def _on_all(processes: Any, folder: Path, record: dict[str, Any], options: TrainOptions) -> Run:
    """The run that process 0 finds in the folder, on every process."""

    def on_main() -> tuple[dict[str, Any], list[Any] | None]:
        opened = open_run(folder, record, options.overwrite)
        checkpoint = own_checkpoint(folder, record)
        return opened, [str(checkpoint.folder), checkpoint.state] if checkpoint else None

    opened, found = processes.on_main(on_main)
    if found is None:
        return Run(folder, opened, None)
    checkpoint = Checkpoint(Path(found[0]), found[1])
    return Run(folder, opened, checkpoint_here(checkpoint, options.report.save_dir))


# --- the folder ----------------------------------------------------------------------------------


@contextlib.contextmanager
def hold(save_dir: Path) -> Iterator[None]:
    """Make save_dir and hold it (process 0): two writers would destroy each other's run.

    Raises:
        UserError: another process holds it, it is a file, or a file in it is no file of a run.
    """
    if not is_main_process():
        yield
        return
    if save_dir.exists() and not save_dir.is_dir():
        raise UserError(f"save_dir {save_dir} is a file: expected a folder")
    save_dir.mkdir(parents=True, exist_ok=True)
    check_entries(save_dir)
    with locked(save_dir / LOCK_FILE, f"save_dir {save_dir} is in use by another process"):
        yield


def check_entries(save_dir: Path) -> None:
    """`UserError` if a name of the run's files is taken by a link, a pipe or a folder: a run writes
    nothing through a link."""
    for path in sorted(save_dir.iterdir()):
        is_folder = is_checkpoint_name(path.name)
        if not is_folder and path.name not in FILES_OF_RUN:
            continue
        if path.is_symlink() or not (path.is_dir() if is_folder else path.is_file()):
            raise UserError(
                f"{path} is {'no folder' if is_folder else 'no file'}, or a link: expected one of "
                "the run; move it away, or choose another --save_dir"
            )


def open_run(save_dir: Path, run: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """`run` for a new run.json, with what an earlier start of the same run wrote there kept.

    Raises:
        UserError: save_dir holds something else, or a run with other options.
    """
    path, created = save_dir / RUN_FILE, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    run = json.loads(json.dumps(run | {"created": created}))  # as read back: tuples are lists
    if overwrite and path.exists():
        _remove_run(save_dir)
        return run
    if not path.exists():
        refuse_others(save_dir, [file.name for file in save_dir.iterdir()])
        return run
    before = read_record(path, required=False)
    try:
        changes = changed_options(before["options"], run["options"], NOT_OF_THE_RUN)
        # What an earlier version did not record cannot have changed.
        changes += changed_options(before["data"], run["data"], run["data"].keys() - before["data"])
        kept = {"created": before["created"], "wandb_id": before["wandb_id"]}
        kept |= {"before": before["before"]} if "before" in before else {}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected options, data, wandb_id") from None
    if changes:
        raise UserError(
            f"save_dir {save_dir} holds another run ({'; '.join(changes[:6])}): repeat its command "
            "to continue it, choose another --save_dir, or --overwrite to remove it"
        )
    return run | kept


def own_checkpoint(save_dir: Path, run: dict[str, Any]) -> Checkpoint | None:
    """The newest complete checkpoint in save_dir, or None.

    Raises:
        UserError: it is one of another run, that somebody put there.
    """
    checkpoint = newest_checkpoint(save_dir, log)
    state = checkpoint.state if checkpoint else {}
    changes = []
    for name in {"options", "data"} & state.keys():
        old, new = state[name], json.loads(json.dumps(run[name]))
        if not isinstance(old, dict):
            raise UserError(f"{checkpoint.folder} is damaged: expected {name}")
        changes += changed_options(old, new, {*NOT_OF_THE_RUN, *(new.keys() - old.keys())})
    if changes:
        raise UserError(
            f"{checkpoint.folder} is of another run ({'; '.join(sorted(changes)[:6])}): move it "
            "away, the one before it is used then, or choose another --save_dir"
        )
    return checkpoint


def _remove_run(save_dir: Path) -> None:
    """Remove what a run has written, and nothing else. run.json stays until the new run replaces
    it: killed in between, the folder is still that of a run, and --overwrite still takes it."""
    for path in sorted(save_dir.iterdir()):
        if path.name in (RUN_FILE, LOCK_FILE):
            continue
        is_partial = path.name.startswith(".") and path.name.endswith(".partial")
        if path.name in {*FILES_OF_RUN, "wandb"} or is_checkpoint_name(path.name) or is_partial:
            remove(path)


# --- run.json ------------------------------------------------------------------------------------


def describe_run(
    options: TrainOptions, train: PackedRows, val: PackedRows, n_rows: int | None = None
) -> dict[str, Any]:
    """run.json: every option, what follows from them, and what it ran on.

    Raises:
        UserError: the first or last record of a shard is damaged.
    """
    optim, probes = options.optim, {"train_records": train.probe(), "val_records": val.probe()}
    train, val = train.manifest, val.manifest
    rows_per_step = optim.batch_size * optim.grad_steps
    n_steps = count_steps(optim, n_rows or train.n_rows, train.seq_len)
    return {
        "options": asdict(options),
        "data": {
            "train": train.fingerprint, "train_tokens": train.tokens,
            "val": val.fingerprint, "val_tokens": val.tokens, **probes,
        },
        "steps": n_steps,
        "tokens_per_step": rows_per_step * train.seq_len,
        "epochs": n_steps * rows_per_step / train.n_rows,
        "peak_lr": peak_lr(optim, options.model),
        "wandb_id": secrets.token_hex(4),
        **environment(),
    }  # fmt: skip


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
    finetunes = model.checkpoint and not model.from_scratch
    return LR_FINETUNE if finetunes else LR_FROM_SCRATCH


def describe_model(model: Any, seq_len: int) -> dict[str, Any]:
    """Class, parameters stored; for ALGPT2 also virtual parameters and training FLOPs per token."""
    config = model.config
    facts = {"model": config.to_dict(), "parameters": model.num_parameters()}
    if hasattr(config, "virtual_parameters"):
        facts["virtual_parameters"] = config.virtual_parameters()
        facts["flops_per_token"] = config.flops_per_token(seq_len)
    return facts


def _version(name: str) -> str:
    """The version of a package; that of `tensorflow` may be called tensorflow-tpu or -cpu."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return metadata.version(metadata.packages_distributions()[name][0])


def environment() -> dict[str, Any]:
    """Versions, git commit and command of this process, for run.json."""
    names = ("torch", "tensorflow", "keras", "transformers", "tokenizers", "numpy")
    versions = {n: _version(n) for n in names if importlib.util.find_spec(n)}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # no git, or a copy without its history
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "command": " ".join(sys.argv),
    }
