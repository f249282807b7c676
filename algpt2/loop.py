"""The training loop around any framework's step: when to evaluate, report, save and stop.

A stop (signal, `--max_minutes`) is obeyed between two steps and between two batches of what stands
between them: an evaluation under way is left, and the next start does what that step still lacks.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from .checkpoints import newest_checkpoint
from .console import log
from .guard import StepGuard
from .options import OptimOptions, TrainOptions, seconds_since_start
from .remote import local_folder
from .report import RunReport
from .schedules import lr_factor

Metrics = dict[str, float | None]


class Stopped(Exception):
    """An evaluation, sample or histogram that was left because the run has to stop."""


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, SIGINT or the clock."""

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
        """Raise `Stopped` in work that only this process does; see `on_main_only`."""
        if self:
            raise Stopped


class AnyProcesses(Protocol):
    """What the loop knows of the processes that train together."""

    def any(self, flag: bool) -> bool:
        """True on every process as soon as it is on one."""


class AnyTrainer(Protocol):
    """What the loop knows of a model in training."""

    options: TrainOptions
    processes: AnyProcesses
    n_steps: int
    step: int  # optimizer steps taken
    elapsed_s: float  # of training, over all restarts
    peak_lr: float
    guard: StepGuard
    stop: StopRequest
    cut: Metrics | None  # of the last step, until it is evaluated and reported: a stop may cut that

    @property
    def tokens_per_step(self) -> int: ...


@dataclass(frozen=True)
class Hooks:
    """What the loop calls between steps."""

    tick: Callable[[int, float], None]  # after so many steps, with the loss of the last
    log: Callable[[Metrics], None]  # a line of metrics
    evaluate: Callable[[bool], dict[str, float]]  # validation metrics; True: the last time
    save: Callable[[], None]
    sample: Callable[[], None]
    histograms: Callable[[], None]


def is_done(trainer: AnyTrainer) -> bool:
    """Whether the last step is taken and evaluated."""
    return trainer.step >= trainer.n_steps and trainer.cut is None


def start_report(trainer: AnyTrainer, run: dict[str, Any]) -> RunReport:
    """What the run reports to, with the lines of all steps that are reported."""
    report = trainer.options.report
    is_cut = trainer.cut is not None
    return RunReport(
        local_folder(report.save_dir), run, trainer.step, report, is_cut=is_cut, stop=trainer.stop
    )


def check_stop(trainer: AnyTrainer) -> None:
    """Raise `Stopped` on every process if one was asked to stop; to be called by all."""
    if trainer.processes.any(bool(trainer.stop)):
        raise Stopped


def on_main_only(trainer: AnyTrainer, work: Callable[[], None]) -> None:
    """Do what has an effect on process 0 alone; if it leaves `work`, all processes do."""
    left = False
    try:
        work()
    except Stopped:
        left = True
    if trainer.processes.any(left):
        raise Stopped


def run_loop(
    trainer: AnyTrainer,
    hooks: Hooks,
    train_steps: Callable[[int], tuple[float, float]],
    steps_per_call: int = 1,
) -> bool:
    """Train to the last step; True when done, False when stopped early by a signal or the clock.

    The state is saved in both cases. Every start takes a step, or finishes what was cut, however
    short its time is: an evaluation longer than `--max_minutes` would be cut for ever.

    Args:
        train_steps: takes so many steps; loss and gradient norm of the last.
    """
    report, stop = trainer.options.report, trainer.stop
    max_s = 60 * (report.max_minutes or math.inf)
    eval_steps = report.eval_steps or max(1, trainer.n_steps // 10)
    save_steps = report.save_steps or eval_steps
    periods = [eval_steps, save_steps, report.logging_steps, report.hist_steps, report.sample_steps]
    meter = Speedometer(trainer)
    with stop.listening():
        while not is_done(trainer):
            again = trainer.cut is not None
            if not again:
                ahead = [period - trainer.step % period for period in periods if period]
                n = min(steps_per_call, trainer.n_steps - trainer.step, *ahead)
                start_s = time.monotonic()
                loss, norm = train_steps(n)
                step_s = time.monotonic() - start_s
                trainer.elapsed_s += step_s
                meter.seconds += step_s
                hooks.tick(n, loss)
                trainer.cut = step_metrics(trainer, loss, norm, meter.tokens_per_s())
                stop.max_s = max_s
            if report_step(trainer, hooks, eval_steps):
                meter.restart()
            stop.max_s = max_s
            stopping = trainer.cut is not None or trainer.processes.any(bool(stop))
            last = trainer.step == trainer.n_steps
            if last or stopping or again or trainer.step % save_steps == 0:
                hooks.save()
            if stopping:
                break
    if trainer.guard.skipped:
        log(f"skipped as outliers: {trainer.guard.skipped:,} of {trainer.step:,} steps")
    return is_done(trainer)


def report_step(trainer: AnyTrainer, hooks: Hooks, eval_steps: int) -> bool:
    """Evaluate and sample if it is time, then write the metrics of the last step; True if written.

    They are in `trainer.cut`, and stay there if this is cut: it has left no line then.
    """
    report, step, line = trainer.options.report, trainer.step, trainer.cut
    evaluates = step == trainer.n_steps or step % eval_steps == 0
    try:
        evaluated = hooks.evaluate(step == trainer.n_steps) if evaluates else {}
        if report.hist_steps and step % report.hist_steps == 0:
            on_main_only(trainer, hooks.histograms)
        if report.sample_steps and step % report.sample_steps == 0:
            on_main_only(trainer, hooks.sample)
    except Stopped:
        log(f"step {step}: its evaluation (or sample) is cut; the next start begins with it")
        return False
    writes = evaluates or step % report.logging_steps == 0
    if writes:
        hooks.log(line | evaluated)
    trainer.cut = None
    return writes


class Speedometer:
    """Training seconds and steps since the last line of metrics, evaluations left out."""

    def __init__(self, trainer: AnyTrainer) -> None:
        self.trainer = trainer
        self.restart()

    def restart(self) -> None:
        """Forget what was measured."""
        self.seconds, self.first_step = 0.0, self.trainer.step

    def tokens_per_s(self) -> float:
        """Speed since the last restart."""
        n_steps = self.trainer.step - self.first_step
        return n_steps * self.trainer.tokens_per_step / max(1e-9, self.seconds)


def step_metrics(
    trainer: AnyTrainer, loss: float, norm: float, speed: float
) -> dict[str, float | None]:
    """The line of metrics.jsonl for the step just taken: its own loss in nats, lr, norm, speed.

    A number that is not finite, of a step that was skipped, is None: JSON has no NaN. `skipped`,
    with `--skip_outliers`, counts the steps of the run without an update.
    """
    guard = trainer.guard
    skipped = {} if guard.z is None else {"skipped": guard.skipped}
    factor = step_lr_factor(trainer.step - 1, trainer.options.optim, trainer.n_steps)
    return {
        "step": trainer.step,
        "tokens": trainer.step * trainer.tokens_per_step,
        "loss": loss if math.isfinite(loss) else None,
        "lr": trainer.peak_lr * factor,
        "grad_norm": norm if math.isfinite(norm) else None,
        "tokens_per_s": speed,
        "elapsed_s": trainer.elapsed_s,
        **skipped,
    }


def step_lr_factor(step: int, optim: OptimOptions, n_steps: int) -> float:
    """`lr_factor` with the options of a run."""
    return lr_factor(
        step, schedule=optim.lr_schedule, n_steps=n_steps, warmup_steps=optim.warmup_steps,
        min_lr_ratio=optim.min_lr_ratio, decay_ratio=optim.decay_ratio,
    )  # fmt: skip


def last_checkpoint(save_dir: str) -> str:
    """A clause for error messages: from which checkpoint a stopped run can go on."""
    checkpoint = newest_checkpoint(local_folder(save_dir), log)
    return f"the last good checkpoint is {checkpoint.folder}" if checkpoint else "no checkpoint yet"


def check_cut(cut: Any, step: int) -> Metrics | None:
    """`Trainer.cut` as a checkpoint of `step` holds it.

    Raises:
        TypeError: it is not the metrics of that step.
    """
    is_line = isinstance(cut, dict) and type(cut.get("step")) is int and cut["step"] == step
    if cut is not None and not (
        is_line and all(x is None or type(x) in (int, float) for x in cut.values())
    ):
        raise TypeError(f"cut: expected the metrics of step {step}")
    return cut
