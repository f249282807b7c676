"""What a run tells its user: progress, console lines, metrics.jsonl, run.json, W&B.

The one place that knows process 0: of several processes the others print and write nothing.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import LINE_FILES, STATE_FILE, Checkpoint, is_checkpoint_name, newest_checkpoint
from .console import Progress, is_main_process, log
from .errors import UserError
from .files import append_json, no_links, read_record, remove, write_record, write_text
from .options import changed_options
from .tracker import FINISH_S, STOP_S, UPLOAD_S, Tracker, choose_mode, run_name, start_wandb

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

METRICS_FILE, SAMPLES_FILE = LINE_FILES
RUN_FILE, LOCK_FILE = "run.json", ".lock"
EVALUATION_FILES = "evaluation.json", "evaluation.md"  # which results.py reads and writes
FILES_OF_RUN = {*LINE_FILES, RUN_FILE, LOCK_FILE, *EVALUATION_FILES}


# --- the folder of a run -------------------------------------------------------------------------

NOT_OF_THE_RUN = {  # options that may change between two starts of the same run
    "report", "sample", "eval", "eval_only", "compressors", "sample_only", "device", "compile",
    "n_devices", "steps_per_call", "overwrite", "debug", "skip_outliers",
}  # fmt: skip


class RunReport:
    """metrics.jsonl, samples.jsonl, run.json and W&B of one run, written by process 0 only.

    Made when the run starts or continues: lines of steps after `step` (written between the last
    checkpoint and a crash) are dropped, so that each step stands there once.

    Args:
        is_cut: a stop cut what follows `step`: that is done again, its lines are dropped too.
        stop: true when the run is asked to stop: then W&B gets little time at the end.
    """

    def __init__(
        self, save_dir: Path, run: dict[str, Any], step: int, report: Any, *, is_cut: bool = False,
        stop: Any = None,
    ) -> None:  # fmt: skip
        self.stop = stop
        self.metrics_path, self.samples_path = save_dir / METRICS_FILE, save_dir / SAMPLES_FILE
        self.progress = Progress("train", total=run["steps"], unit="step", initial=step)
        self.tracker: Tracker | None = None
        self.with_artifacts, self.run = report.wandb_artifacts, run
        if not is_main_process():
            return
        for path in (self.metrics_path, self.samples_path):
            _keep_lines_until(path, step, is_cut)
        write_record(save_dir / RUN_FILE, run)
        self.tracker = _start_tracker(save_dir, run, report)

    def metrics(self, line: dict[str, float | None]) -> None:
        """Append a line to metrics.jsonl, send it to W&B, show it."""
        if not is_main_process():
            return
        append_json(self.metrics_path, line)
        values = {k: v for k, v in line.items() if k != "step" and v is not None}
        self._send(lambda: values, line["step"])
        if "val_loss" in line:
            log(
                f"step {line['step']}: val_loss {line['val_loss']:.4f}, ppl {line['val_ppl']:.2f}, "
                f"word ppl {line['val_word_ppl']:.2f}, {line['val_bpb']:.4f} bits per byte"
            )

    def samples(self, step: int, prompt: str, texts: list[str]) -> None:
        """Append samples to samples.jsonl and show the first."""
        if not is_main_process():
            return
        for text in texts:
            append_json(self.samples_path, {"step": step, "prompt": prompt, "text": text})
        log(f"sample at step {step}: {texts[0]!r}")
        rows = [[step, prompt, text] for text in texts]
        self._send(lambda: {"samples": _wandb_table(["step", "prompt", "text"], rows)}, step)

    def histograms(self, step: int, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        """Histograms of named arrays; W&B draws them, no other place does."""
        if self.tracker is None:
            return
        # Counted here and now: the arrays may be the weights themselves. Histograms have no NaN.
        counts = {k: np.histogram(v[np.isfinite(v)], bins=64) for k, v in arrays}
        self._send(lambda: {k: _wandb_histogram(count) for k, count in counts.items()}, step)

    def artifact(self, folder: Path) -> None:
        """A checkpoint folder as a W&B artifact of type "model", if `--wandb_artifacts`."""
        if not self.with_artifacts or not is_main_process():
            return
        if self.tracker is None:
            log("warning: --wandb_artifacts has no effect without W&B; offline needs no login")
            return

        def upload(run: Any) -> None:
            import wandb

            name = re.sub(r"[^\w.-]", "-", run_name(folder.parent, self.run))
            artifact = wandb.Artifact(name, type="model", description=folder.name)
            artifact.add_dir(str(folder))
            run.log_artifact(artifact)

        failure = f"warning: W&B did not take the artifact ({{}}); {_braced(folder)} has it"
        self.tracker.send(upload, failure)

    def _send(self, values: Callable[[], dict[str, Any]], step: int) -> None:
        """What `values()` gives, in W&B's thread, to W&B."""
        if self.tracker is not None:
            failure = "warning: W&B failed ({}); metrics.jsonl has everything"
            self.tracker.send(lambda run: run.log(values(), step=step), failure)

    def __enter__(self) -> "RunReport":
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.__exit__()
        if self.tracker is not None:
            done = self.progress.done >= (self.progress.total or 0) and not self.stop
            at_end = UPLOAD_S if self.with_artifacts else FINISH_S
            self.tracker.finish(at_end if done else STOP_S)


def send_table(
    save_dir: Path, report: Any, name: str, columns: list[str], rows: list[list[Any]], step: int
) -> None:
    """A table for the W&B run of an earlier start in `save_dir`; nothing where W&B is off."""
    if not rows or not is_main_process():
        return
    run = read_record(save_dir / RUN_FILE, required=False)
    tracker = _start_tracker(save_dir, run, report)
    if tracker is None:
        return
    failure = f"warning: W&B failed ({{}}); {_braced(save_dir)} has the table"

    def send(wandb_run: Any) -> None:  # W&B drops what is of a step before its last
        values = {name: _wandb_table(columns, rows)}
        wandb_run.log(values, step=max(step, wandb_run.step))

    tracker.send(send, failure)
    tracker.finish(FINISH_S)


def _wandb_table(columns: list[str], rows: list[list[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=columns, data=rows)


def _wandb_histogram(count: tuple[np.ndarray, np.ndarray]) -> Any:
    import wandb

    return wandb.Histogram(np_histogram=count)


def _braced(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")


def open_run(save_dir: Path, run: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """`run` for a new run.json, with what an earlier start of the same run wrote there kept.

    Raises:
        UserError: save_dir holds something else, or a run with other options.
    """
    path = save_dir / RUN_FILE
    run = json.loads(json.dumps(run))  # as it is read back: tuples are lists there
    if overwrite and path.exists():
        _remove_run(save_dir)
        return _created_now(run)
    if not path.exists():
        others = sorted(p.name for p in save_dir.iterdir() if not p.name.startswith("."))
        if others:
            raise UserError(
                f"save_dir {save_dir} holds other files ({', '.join(others[:3])}) and no "
                f"{RUN_FILE}: expected an empty folder or a run; choose another --save_dir"
            )
        return _created_now(run)
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


def _created_now(run: dict[str, Any]) -> dict[str, Any]:
    return {**run, "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _remove_run(save_dir: Path) -> None:
    """Remove what a run has written, and nothing else. run.json stays until the new run replaces
    it: killed in between, the folder is still that of a run, and --overwrite still takes it."""
    for path in sorted(save_dir.iterdir()):
        if path.name in (RUN_FILE, LOCK_FILE):
            continue
        is_partial = path.name.startswith(".") and path.name.endswith(".partial")
        if path.name in {*FILES_OF_RUN, "wandb"} or is_checkpoint_name(path.name) or is_partial:
            remove(path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl or samples.jsonl; a last line cut by a crash is left out.

    Raises:
        UserError: a line is not a JSON object with a step and numbers (or text).
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8") from None
    return [_read_line(path, number, line) for number, line in enumerate(lines, start=1)]


def _read_line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        texts = [value for key, value in line.items() if key in ("prompt", "text")]  # of samples
        numbers = [float(value) for value in line.values() if type(value) in (int, float)]
        unknown = [key for key, value in line.items() if value is None]  # a skipped step's NaN
        n_known = len(texts) + len(numbers) + len(unknown)
        is_sound = all(type(text) is str for text in texts) and n_known == len(line)
        if is_sound and type(line["step"]) is int and line["step"] >= 0:
            return line
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        pass
    raise UserError(
        f"{path} is damaged: line {number} is no JSON object of a step and numbers; mend or remove "
        "the line, or move the file away"
    )


def environment() -> dict[str, Any]:
    """Versions, git commit and command of this process, for run.json."""
    names = ("torch", "tensorflow", "keras", "transformers", "tokenizers", "numpy")
    versions = {n: metadata.version(n) for n in names if importlib.util.find_spec(n)}
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


@contextlib.contextmanager
def locked(save_dir: Path) -> Iterator[None]:
    """Make save_dir and hold it (process 0): two writers would destroy each other's run.

    Raises:
        UserError: another process holds it, it is a file, or a file in it is no file of a run.
    """
    if not is_main_process() or fcntl is None:
        yield
        return
    if save_dir.exists() and not save_dir.is_dir():
        raise UserError(f"save_dir {save_dir} is a file: expected a folder")
    save_dir.mkdir(parents=True, exist_ok=True)
    check_entries(save_dir)
    with open(save_dir / LOCK_FILE, "w", opener=no_links) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"save_dir {save_dir} is in use by another process") from None
        yield


def check_entries(save_dir: Path) -> None:
    """`UserError` if a link, pipe, folder or file in save_dir has a name that a run writes to, or
    reads, as something else: nothing is written through a link."""
    for path in sorted(save_dir.iterdir()):
        is_folder = is_checkpoint_name(path.name)
        if not is_folder and path.name not in FILES_OF_RUN:
            continue
        if path.is_symlink() or not (path.is_dir() if is_folder else path.is_file()):
            raise UserError(
                f"{path} is {'no folder' if is_folder else 'no file'}, or a link: expected one of "
                "the run; move it away, or choose another --save_dir"
            )


def _keep_lines_until(path: Path, step: int, is_cut: bool) -> None:
    """Drop the lines of later steps, or of `step` on; warn if the others are not what the
    checkpoint of `step` knows of them."""
    lines = read_json_lines(path)
    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step - is_cut]
    if path.exists():
        write_text(path, "".join(kept))
    state_path = path.parent / f"checkpoint-{step:08d}" / STATE_FILE
    known = {}
    if state_path.is_file():
        known = read_record(state_path, required=False).get("lines", {})
    content = "".join(kept).encode()
    if entry := known.get(path.name):
        digest = hashlib.sha256(content[: entry["bytes"]]).hexdigest()
        if digest != entry["sha256"]:
            log(f"warning: {path} is not what it was at step {step}: lines were lost or changed")
    if step == 0 and lines:
        log(f"warning: {path} has {len(lines):,} lines and there is no checkpoint: starting anew")


def _start_tracker(save_dir: Path, run: dict[str, Any], report: Any) -> Tracker | None:
    mode = choose_mode(report.wandb, log)
    if mode == "off":
        return None
    return Tracker(lambda: start_wandb(save_dir, run, mode, report.tags, log), log)
