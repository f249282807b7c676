"""The trainer of both frameworks: the loop around a step, evaluation, checkpoints, reports.

trainer_pt.py and trainer_tf.py hold what is PyTorch or TensorFlow, under the same names in the same
order. Everything random is a function of (seed, step, process) and every position in the data one
of the step, so a checkpoint is weights, optimizer state and a step number.

A stop (signal, `--max_minutes`) is obeyed between two steps and between two batches of what stands
between them: an evaluation under way is left, and the next start does what that step still lacks.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import EXIT_STOPPED, UserError, describe
from ..evaluation.scoring import text_metrics, text_totals
from ..export.model_card import complete_checkpoint, push_to_hub, try_card
from ..options import TrainOptions, seconds_since_start
from ..runs.checkpoints import (
    OPTIMIZER_FILE,
    Checkpoint,
    checkpoint_name,
    newest_checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
from ..runs.mirror import copy_or_warn
from ..runs.report import RunReport, log_before_and_after
from ..runs.run import Run, describe_model, peak_lr
from ..runs.start import Start, starts_from_weights
from ..system.console import is_main_process, log
from ..system.remote import local_folder
from ..tokenization_algpt2 import TextTokenizer
from .guard import Hint, StepGuard, check_finite
from .schedules import lr_factor

Metrics = dict[str, float | None]


class Stopped(Exception):
    """An evaluation, sample or histogram that was left because the run has to stop."""


class StopRequest:
    """Whether SIGTERM, SIGINT or the clock asked this process to stop."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.max_s = math.inf  # since the start of the command

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A signal in the body asks for a stop; a second one exits at once."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    def __bool__(self) -> bool:
        return self.received is not None or seconds_since_start() > self.max_s

    def check(self) -> None:
        """Raise `Stopped` in work that only this process does; see `Trainer.on_main_only`."""
        if self:
            raise Stopped


@dataclass(eq=False)
class Trainer:
    """A model in training: what a step changes and a checkpoint holds.

    A framework fills in `build_parts`, `evaluate`, `sample_texts`, `train_steps`, `parameters`,
    `is_finite`, `arrays`, `state_tensors`, `load_state_tensors`, `load_tensors`, `save_tensors`.
    """

    model: Any
    optimizer: Any
    options: TrainOptions
    processes: Any  # of processes_pt.py or processes_tf.py
    inputs: Any  # of batches.py or inputs_tf.py: the tokens of a step
    n_steps: int
    tokenizer: TextTokenizer | None = None  # None: unknown; checkpoints lack it
    val_rows: Any = None
    step: int = 0  # optimizer steps taken
    elapsed_s: float = 0.0  # of training, over all restarts
    saved_step: int | None = None  # its checkpoint is there and whole
    unreported: Metrics | None = None  # of the last step, until it is evaluated and written
    stop: StopRequest = field(default_factory=StopRequest)
    guard: StepGuard = field(init=False)  # judges each step before its update
    run: Run = field(init=False)  # of `fit`
    seconds, first_step = 0.0, 0  # of training since the last line of metrics, and its step
    steps_per_call = 1

    def __post_init__(self) -> None:
        report = self.options.report
        self.guard = StepGuard(self.options.optim.skip_outliers)
        self.eval_steps = report.eval_steps or max(1, self.n_steps // 10)
        self.save_steps = report.save_steps or self.eval_steps

    @classmethod
    def build(
        cls, options: TrainOptions, start: Start, inputs: Any, val_rows: Any,
        processes: Any, run: Run,
    ) -> "Trainer":  # fmt: skip
        """Model and optimizer of a new run, or in the state of its checkpoint."""
        if run.checkpoint:
            start = start.continued(run.checkpoint)
        model, optimizer = cls.build_parts(options, start, processes)
        trainer = cls(
            model, optimizer, options, processes, inputs, run.record["steps"], start.tokenizer,
            val_rows,
        )  # fmt: skip
        if run.checkpoint:
            trainer.load(run.checkpoint)
        return trainer

    # --- one step ---

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step predicts, over all processes."""
        optim = self.options.optim
        return optim.batch_size * optim.grad_steps * self.inputs.seq_len

    @property
    def peak_lr(self) -> float:
        """Highest learning rate of the run."""
        return peak_lr(self.options.optim, self.options.model)

    def lr_factor(self, step: int) -> float:
        """Learning rate of `step` (from 0) over the peak."""
        return lr_factor(step, self.options.optim, self.n_steps)

    def train_step(self) -> tuple[float, float]:
        """One optimizer step: mean loss in nats per token of the global batch, and gradient norm.

        A step that `--skip_outliers` leaves out counts, but changes neither weights nor optimizer.

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite; raised before the update.
        """
        return self.train_steps(1)

    def hint(self) -> Hint:
        """What to say if the coming step is bad."""
        rows, save_dir = self.inputs.row_ids(self.step), self.options.report.save_dir
        return Hint(last_checkpoint(save_dir), rows, self.processes.low_precision)

    # --- the run ---

    def fit(self, run: Run) -> bool:
        """Train to the last step; False when stopped early, with the state saved."""
        self.run = run
        run.record |= describe_model(self.model, self.inputs.seq_len)
        log(run.summary(self.step, self.is_done()))
        if not self.step and "before" not in run.record and starts_from_weights(self.options.model):
            log("evaluating the weights that training starts from")
            run.record["before"] = self.validate()
        if self.is_done():
            return True
        unreported, report = self.unreported is not None, self.options.report
        with RunReport(
            run.folder, run.record, self.step, report, unreported=unreported, stop=self.stop
        ) as run.report:
            done = self.train()
            if self.saved_step is not None:
                run.report.artifact(self.checkpoint_folder)
        return done

    def finish(self, done: bool) -> int | None:
        """Copy the run to its URL, print how it ended, upload the model of a finished run.

        Returns:
            The exit code of the script.
        """
        save_dir, report = self.run.folder, self.options.report
        copied = copy_or_warn(report, self.step)
        log(f"{'done' if done else 'stopped'} at step {self.step}: {report.save_dir}")
        if done and not copied:
            raise UserError(
                f"the run is done and whole in {save_dir}, but not in {report.save_dir}: "
                "repeat the command here, it copies what is missing"
            )
        if not done:
            return EXIT_STOPPED
        log_before_and_after(self.run.record, save_dir)
        push_to_hub(self.checkpoint_folder, report.push_to_hub)
        return None

    def is_done(self) -> bool:
        """Whether the last step is taken and evaluated."""
        return self.step >= self.n_steps and self.unreported is None

    def train(self) -> bool:
        """Step, report, save, until done (True) or stopped (False); the state is saved in both.

        Every start takes a step, or finishes what was unreported, however short its time is: an
        evaluation longer than `--max_minutes` would never end.
        """
        report, stop = self.options.report, self.stop
        max_s = 60 * (report.max_minutes or math.inf)
        self.seconds, self.first_step = 0.0, self.step
        with stop.listening():
            while not self.is_done():
                resumed = self.unreported is not None
                if not resumed:
                    self.take_steps()
                    stop.max_s = max_s
                if self.report_step():
                    self.seconds, self.first_step = 0.0, self.step
                stop.max_s = max_s
                stopping = self.unreported is not None or self.processes.any(bool(stop))
                last = self.step == self.n_steps
                if last or stopping or resumed or self.step % self.save_steps == 0:
                    self.save()
                if stopping:
                    break
        if self.guard.skipped:
            log(f"skipped as outliers: {self.guard.skipped:,} of {self.step:,} steps")
        return self.is_done()

    def take_steps(self) -> None:
        """Take the steps of one call; a step that is reported or saved ends the call."""
        report = self.options.report
        periods = (
            self.eval_steps, self.save_steps, report.logging_steps, report.hist_steps,
            report.sample_steps,
        )  # fmt: skip
        ahead = [period - self.step % period for period in periods if period]
        n = min(self.steps_per_call, self.n_steps - self.step, *ahead)
        start_s = time.monotonic()
        loss, norm = self.train_steps(n)
        step_s = time.monotonic() - start_s
        self.elapsed_s += step_s
        self.seconds += step_s
        self.run.report.progress.update(n, f"loss {loss:.3f}")
        self.unreported = self.step_metrics(loss, norm)

    def step_metrics(self, loss: float, norm: float) -> Metrics:
        """The line of metrics.jsonl for the step just taken: its own loss in nats, lr, norm, speed.

        A number that is not finite, of a step that was skipped, is None: JSON has no NaN.
        `skipped`, with `--skip_outliers`, counts the steps of the run without an update.
        """
        skipped = {} if self.guard.z is None else {"skipped": self.guard.skipped}
        n_tokens = (self.step - self.first_step) * self.tokens_per_step
        return {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loss": loss if math.isfinite(loss) else None,
            "lr": self.peak_lr * self.lr_factor(self.step - 1),
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens_per_s": n_tokens / max(1e-9, self.seconds),
            "elapsed_s": self.elapsed_s,
            **skipped,
        }

    def report_step(self) -> bool:
        """Evaluate and sample if it is time, then write the metrics of the last step.

        Returns:
            Whether a line was written. A stop during the evaluation leaves it `unreported`.
        """
        report, step = self.options.report, self.step
        is_last = step == self.n_steps
        evaluates = is_last or step % self.eval_steps == 0
        try:
            n_rows = None if is_last else self.options.data.n_eval_rows
            evaluated = self.validate(n_rows) if evaluates else {}
            if report.hist_steps and step % report.hist_steps == 0:
                self.on_main_only(lambda: self.run.report.histograms(step, self.arrays()))
            if report.sample_steps and step % report.sample_steps == 0:
                self.on_main_only(self.sample)
        except Stopped:
            log(f"step {step}: its evaluation (or sample) is cut; the next start begins with it")
            return False
        writes = evaluates or step % report.logging_steps == 0
        if writes:
            self.write_metrics(self.unreported | evaluated)
        self.unreported = None
        return writes

    def write_metrics(self, line: Metrics) -> None:
        """Write a line of metrics.jsonl."""
        self.run.report.metrics(line)

    def check_stop(self) -> None:
        """Raise `Stopped` on every process if one was asked to stop; to be called by all."""
        if self.processes.any(bool(self.stop)):
            raise Stopped

    def on_main_only(self, work: Callable[[], None]) -> None:
        """Run `work`, which only process 0 has; if a stop ends it there, stop all processes."""
        left = False
        try:
            work()
        except Stopped:
            left = True
        if self.processes.any(left):
            raise Stopped

    def validate(self, n_rows: int | None = None) -> dict[str, float]:
        """`val_loss` and what follows from it, of the model as it is now.

        Args:
            n_rows: evaluate only this many rows, evenly spaced.
        """
        batch_size = self.options.optim.batch_size
        loss = self.evaluate(
            self.model, self.val_rows, self.processes, batch_size, n_rows, self.check_stop
        )
        return text_metrics(loss, text_totals(self.val_rows.manifest))

    def sample(self) -> None:
        """Report samples of the model as it is now, after the first control code (process 0)."""
        if self.tokenizer is None or not is_main_process():
            return
        sample, code = self.options.sample, (self.options.data.control_codes or (None,))[0]
        arguments = (self.model, self.tokenizer, sample, self.options.optim.seed)
        texts = self.sample_texts(*arguments, code=code, check=self.stop.check)
        self.run.report.samples(self.step, sample.prompt, texts)

    # --- checkpoints ---

    @property
    def checkpoint_folder(self) -> Path:
        """The folder of the newest checkpoint."""
        return self.run.folder / checkpoint_name(self.saved_step)

    def save(self) -> None:
        """Write `checkpoint-<step>` in save_dir (process 0), remove checkpoints no longer kept.

        Raises:
            OSError: no space or no permission.
            NonFiniteError: the last update left NaN or Inf in weights or optimizer; nothing is
                written.
        """
        report, tensors = self.options.report, self.state_tensors()
        everything = {**self.parameters(), **tensors}
        bad = [name for name, tensor in everything.items() if not self.is_finite(tensor)]
        check_finite(bad, self.step, self.hint)
        if is_main_process():
            try:
                self._write(tensors)
            except (SafetensorError, OSError) as error:
                raise OSError(
                    f"cannot write the checkpoint of step {self.step} in {report.save_dir} "
                    f"({describe(error)}); earlier ones are whole, the same command continues from "
                    "them"
                ) from error
            keep = (report.keep_last, report.milestone_steps)
            prune_checkpoints(self.run.folder, *keep, self.step)
            copy_or_warn(report, self.step)
        self.saved_step = self.step
        self.processes.barrier()

    def _write(self, tensors: dict[str, Any]) -> None:
        save_dir, marker_only = self.run.folder, self.saved_step == self.step

        def fill(folder: Path) -> None:
            self.model.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save(folder)
            self.save_tensors(tensors, folder / OPTIMIZER_FILE)
            complete_checkpoint(folder, save_dir, self.step)

        if marker_only and self.checkpoint_folder.is_dir():
            try_card(self.checkpoint_folder, save_dir, self.step)
        state = self.training_state()
        write_checkpoint(save_dir, self.step, fill, state, marker_only=marker_only)

    def training_state(self) -> dict[str, Any]:
        """What training_state.json holds besides step and checksums."""
        run = {key: self.run.record[key] for key in ("options", "data", "versions")}
        return {
            **run, "elapsed_s": self.elapsed_s, "scaler": {},
            "tokens": self.step * self.tokens_per_step, "outliers": self.guard.state(),
            "cut": self.unreported,
        }  # fmt: skip

    def load(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint's state; `build_model` has loaded its weights.

        Raises:
            UserError: it is not of this model and optimizer.
        """
        try:
            tensors = self.load_tensors(checkpoint.folder / OPTIMIZER_FILE)
            self.load_training_state(checkpoint.state)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {describe(error)}"
            raise UserError(f"{checkpoint.folder} is damaged ({reason})") from error
        self.load_state_tensors(tensors)

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Inverse of `training_state`."""
        self.step = self.saved_step = state["step"]
        self.elapsed_s = float(state["elapsed_s"])
        self.guard.load(state.get("outliers", {}))
        self.unreported = state.get("cut")


def last_checkpoint(save_dir: str) -> str:
    """A clause for error messages: from which checkpoint a stopped run can go on."""
    checkpoint = newest_checkpoint(local_folder(save_dir), log)
    return f"the last good checkpoint is {checkpoint.folder}" if checkpoint else "no checkpoint yet"
