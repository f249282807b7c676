"""The training loop around any framework's step: when to evaluate, report, save and stop."""

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .guard import StepGuard
from .options import OptimOptions, TrainOptions, seconds_since_start
from .report import log
from .schedules import lr_factor


class AnyTrainer(Protocol):
    """What the loop knows of a model in training."""

    options: TrainOptions
    n_steps: int
    step: int  # optimizer steps taken
    elapsed_s: float  # of training, over all restarts
    peak_lr: float
    guard: StepGuard

    @property
    def tokens_per_step(self) -> int: ...


@dataclass(frozen=True)
class Hooks:
    """What the loop calls between steps."""

    tick: Callable[[int, float], None]  # after so many steps, with the loss of the last
    log: Callable[[dict[str, float | None]], None]  # a line of metrics
    evaluate: Callable[[bool], dict[str, float]]  # validation metrics; True: the last time
    save: Callable[[], None]
    sample: Callable[[], None]
    histograms: Callable[[], None]


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the current step; a second one exits at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number


def run_loop(
    trainer: AnyTrainer,
    hooks: Hooks,
    train_steps: Callable[[int], tuple[float, float]],
    any_process: Callable[[bool], bool],
    steps_per_call: int = 1,
) -> bool:
    """Train to the last step; True when done, False when stopped early by a signal or the clock.

    The state is saved in both cases.

    Args:
        train_steps: takes so many steps; loss and gradient norm of the last.
        any_process: True on every process as soon as it is on one.
    """
    report, stop = trainer.options.report, StopSignal()
    max_s = 60 * (report.max_minutes or math.inf)  # at least one step a start, however short it is
    eval_steps = report.eval_steps or max(1, trainer.n_steps // 10)
    save_steps = report.save_steps or eval_steps
    periods = [eval_steps, save_steps, report.logging_steps, report.hist_steps, report.sample_steps]
    meter = Speedometer(trainer)
    while trainer.step < trainer.n_steps:
        ahead = [period - trainer.step % period for period in periods if period]
        n = min(steps_per_call, trainer.n_steps - trainer.step, *ahead)
        loss, norm = train_steps(n)
        trainer.elapsed_s += meter.lap()
        hooks.tick(n, loss)
        step, last = trainer.step, trainer.step == trainer.n_steps
        evaluated = hooks.evaluate(last) if last or step % eval_steps == 0 else {}
        if evaluated or step % report.logging_steps == 0:
            hooks.log(step_metrics(trainer, loss, norm, meter.tokens_per_s()) | evaluated)
        if report.hist_steps and step % report.hist_steps == 0:
            hooks.histograms()
        if report.sample_steps and step % report.sample_steps == 0:
            hooks.sample()
        stopping = any_process(stop.received is not None or seconds_since_start() > max_s)
        if last or stopping or step % save_steps == 0:
            hooks.save()
        if stopping and not last:
            break
        meter.restart()
    if trainer.guard.skipped:
        log(f"skipped as outliers: {trainer.guard.skipped:,} of {trainer.step:,} steps")
    return trainer.step == trainer.n_steps


class Speedometer:
    """Training seconds, evaluations and checkpoints left out."""

    def __init__(self, trainer: AnyTrainer) -> None:
        self.trainer, self.seconds, self.first_step = trainer, 0.0, trainer.step
        self.restart()

    def restart(self) -> None:
        """Start of a step."""
        self.start_s = time.monotonic()

    def lap(self) -> float:
        """End of a step: its seconds."""
        lap_s = time.monotonic() - self.start_s
        self.seconds += lap_s
        return lap_s

    def tokens_per_s(self) -> float:
        """Speed since the last call."""
        n_steps = self.trainer.step - self.first_step
        speed = n_steps * self.trainer.tokens_per_step / self.seconds
        self.seconds, self.first_step = 0.0, self.trainer.step
        return speed


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
