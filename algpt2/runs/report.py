"""What a run tells its user: metrics.jsonl, samples.jsonl, W&B, the table at its end."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..system.console import Progress, is_main_process, log, table
from ..system.files import append_json, read_record, write_record, write_text
from .checkpoints import METRICS_FILE, RUN_FILE, SAMPLES_FILE, STATE_FILE, checkpoint_name
from .tracker import FINISH_S, STOP_S, UPLOAD_S, Tracker, choose_mode, run_name, start_wandb


class RunReport:
    """metrics.jsonl, samples.jsonl, run.json and W&B of one run, written by process 0 only.

    Made when the run starts or continues: lines of steps after `step` (written between the last
    checkpoint and a crash) are dropped, so that each step stands there once.

    Args:
        unreported: a stop came before the line of `step`: it is written anew.
        stop: true when the run is asked to stop: then W&B gets little time at the end.
    """

    def __init__(
        self, save_dir: Path, run: dict[str, Any], step: int, report: Any, *,
        unreported: bool = False, stop: Any = None,
    ) -> None:  # fmt: skip
        self.stop = stop
        self.metrics_path, self.samples_path = save_dir / METRICS_FILE, save_dir / SAMPLES_FILE
        self.progress = Progress("train", total=run["steps"], unit="step", initial=step)
        self.tracker: Tracker | None = None
        self.with_artifacts, self.run = report.wandb_artifacts, run
        if not is_main_process():
            return
        for path in (self.metrics_path, self.samples_path):
            _keep_lines_until(path, step - unreported, step)
        write_record(save_dir / RUN_FILE, run)
        self.tracker = _start_tracker(save_dir, run, report)

    def metrics(self, line: dict[str, float | None]) -> None:
        """Append a line to metrics.jsonl, send it to W&B, show it."""
        if not is_main_process():
            return
        append_json(self.metrics_path, line)
        values = {k: v for k, v in line.items() if k != "step" and v is not None}
        self._send(lambda wandb: values, line["step"])
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
        columns, rows = ["step", "prompt", "text"], [[step, prompt, text] for text in texts]
        self._send(lambda wandb: {"samples": wandb.Table(columns=columns, data=rows)}, step)

    def histograms(self, step: int, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        """Histograms of named arrays; W&B draws them, no other place does."""
        if self.tracker is None:
            return
        # Counted here and now: the arrays may be the weights themselves. Histograms have no NaN.
        counts = {k: np.histogram(v[np.isfinite(v)], bins=64) for k, v in arrays}
        self._send(
            lambda wandb: {k: wandb.Histogram(np_histogram=v) for k, v in counts.items()}, step
        )

    def artifact(self, folder: Path) -> None:
        """A checkpoint folder as a W&B artifact of type "model", if `--wandb_artifacts`."""
        if not self.with_artifacts or not is_main_process():
            return
        if self.tracker is None:
            log("warning: --wandb_artifacts has no effect without W&B; offline needs no login")
            return

        def upload(run: Any, wandb: Any) -> None:
            name = re.sub(r"[^\w.-]", "-", run_name(folder.parent, self.run))
            artifact = wandb.Artifact(name, type="model", description=folder.name)
            artifact.add_dir(str(folder))
            run.log_artifact(artifact)

        self.tracker.send(upload, f"{folder} has it", "W&B did not take the artifact")

    def _send(self, values: Callable[[Any], dict[str, Any]], step: int) -> None:
        """What `values(wandb)` gives, in W&B's thread, to W&B."""
        if self.tracker is not None:
            self.tracker.send(lambda run, wandb: run.log(values(wandb), step=step))

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

    def send(wandb_run: Any, wandb: Any) -> None:  # W&B drops what is of a step before its last
        values = {name: wandb.Table(columns=columns, data=rows)}
        wandb_run.log(values, step=max(step, wandb_run.step))

    tracker.send(send, f"{save_dir} has the table")
    tracker.finish(FINISH_S)


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


def _keep_lines_until(path: Path, last: int, step: int) -> None:
    """Drop the lines behind the step `last`; warn if the others are not what the checkpoint of
    `step` knows of them."""
    lines = read_json_lines(path)
    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= last]
    if path.exists():
        write_text(path, "".join(kept))
    state_path = path.parent / checkpoint_name(step) / STATE_FILE
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
    mode = choose_mode(report.wandb)
    if mode == "off":
        return None
    return Tracker(lambda: start_wandb(save_dir, run, mode, report.tags))
