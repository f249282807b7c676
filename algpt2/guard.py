"""Which steps may not touch the weights: bad numbers and, with `--skip_outliers`, outliers.

A step's loss and gradient norm are judged before its update, on values that are the same on every
process. An outlier is further than Z standard deviations above the mean of the steps before it.
Source: OLMo 2 (arXiv:2501.00656) and llm.c, which judge both numbers against the last 128 steps;
PaLM (arXiv:2204.02311, section 5.1) skipped the batches around each spike by hand.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .checkpoints import newest_checkpoint
from .console import log
from .errors import NonFiniteError
from .remote import local_folder

WINDOW = 128  # steps that the mean is of: both numbers drift little in them
MIN_STEPS = 64  # in the window before any is an outlier: fewer give no standard deviation
MAX_IN_ROW = 10  # outliers; one more is no bad batch, but a bad model


@dataclass
class StepGuard:
    """The judge of a run's steps, and what it remembers; `state` belongs in every checkpoint."""

    z: float | None  # --skip_outliers; None: NaN and Inf stop the run, nothing is an outlier
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    skipped: int = 0  # steps of the run without an update
    in_row: int = 0  # of them, those since the last update

    @property
    def max_in_row(self) -> int:
        """Steps that may be skipped one after another."""
        return 0 if self.z is None else MAX_IN_ROW

    def window(self) -> np.ndarray:
        """Losses and gradient norms of the last updates, (2, WINDOW) float32, newest last; what
        is not there yet is NaN."""
        values = np.full((2, WINDOW), np.nan, np.float32)
        if self.losses:
            values[:, -len(self.losses) :] = self.losses, self.norms
        return values

    def limits(self) -> np.ndarray:
        """The largest loss and gradient norm that are no outliers, (2,) float32; inf: any."""
        window = self.window()
        known = ~np.isnan(window)
        n = np.float32(known[0].sum())
        if self.z is None or n < MIN_STEPS:
            return np.full(2, np.inf, np.float32)
        mean = np.where(known, window, 0).sum(1) / n
        squares = np.where(known, window - mean[:, None], 0) ** 2
        return mean + np.float32(self.z) * np.sqrt(squares.sum(1) / n)

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether the step may update the weights."""
        most = self.limits()
        finite = math.isfinite(loss) and math.isfinite(norm)
        return bool(finite and loss <= most[0] and norm <= most[1])

    def note(
        self, step: int, loss: float, norm: float, updated: bool, hint: "Callable[[], Hint]"
    ) -> None:
        """Remember what came of a step (from 1); `hint` is called if the run has to stop.

        Raises:
            NonFiniteError: it was skipped, and one step too many was.
        """
        if updated:
            self.in_row = 0
            if self.z is not None:
                self.losses.append(loss)
                self.norms.append(norm)
            return
        self.in_row += 1
        what = f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}"
        if self.in_row > self.max_in_row:
            raise NonFiniteError(hint().stop(what, self))
        self.skipped += 1
        log(f"{what}: skipped, {self._reason(loss, norm)}")

    def _reason(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "not finite"
        loss_limit, norm_limit = self.limits()
        return f"expected at most {loss_limit:.4g} and {norm_limit:.4g} (--skip_outliers {self.z})"

    def state(self) -> dict[str, Any]:
        """For `training_state.json`."""
        if self.z is None:
            return {}
        return {
            "skipped": self.skipped, "in_row": self.in_row,
            "losses": list(self.losses), "grad_norms": list(self.norms),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`; an empty one, of a run without the option, is a start.

        Raises:
            TypeError: it is not what `state` gives.
        """
        if not isinstance(state, dict):
            raise TypeError(f"outliers: expected an object, got a {type(state).__name__}")
        counts = [state.get(name, 0) for name in ("skipped", "in_row")]
        numbers = [state.get(name, []) for name in ("losses", "grad_norms")]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise TypeError(f"outliers: expected counts of steps, got {counts}")
        if not all(
            isinstance(n, list) and all(type(x) in (int, float) for x in n) for n in numbers
        ):
            raise TypeError("outliers: expected lists of losses and gradient norms")
        self.skipped, self.in_row = counts
        self.losses.extend(numbers[0])
        self.norms.extend(numbers[1])


@dataclass(frozen=True)
class Hint:
    """What a run that stops for bad numbers tells besides them."""

    save_dir: str
    rows: Sequence[int] | None = None  # ids of the step's rows; None: unknown
    low_precision: bool = False

    def stop(self, what: str, guard: StepGuard) -> str:
        """The message for `what`: where the run stands and what to change."""
        if guard.z is None:
            then = "add --skip_outliers 6, which leaves such a batch out, or start"
        else:
            what += f", {guard.in_row} steps in a row that --skip_outliers would skip"
            then = "start"
        where = f" (rows {_few(self.rows)} of --train_path)" if self.rows is not None else ""
        precision = " or --precision fp32" if self.low_precision else ""
        return (
            f"{what}{where}: stopped before the update; {last_checkpoint(self.save_dir)}. The same "
            f"command ends here again: {then} in another --save_dir with a lower --lr{precision}"
        )


def last_checkpoint(save_dir: str) -> str:
    """The words for where a stopped run can be continued."""
    checkpoint = newest_checkpoint(local_folder(save_dir), log)
    return f"the last good checkpoint is {checkpoint.folder}" if checkpoint else "no checkpoint yet"


def check_finite(bad: Sequence[str], step: int, save_dir: str) -> None:
    """Refuse to write a checkpoint of weights that an update has destroyed.

    Args:
        bad: names of the tensors that hold NaN or Inf.
    Raises:
        NonFiniteError: there are some.
    """
    if bad:
        raise NonFiniteError(
            f"step {step}: the update has made {bad[0]} NaN or infinite (and {len(bad) - 1} other "
            f"tensors): no checkpoint written; {last_checkpoint(save_dir)}. The same command ends "
            "here again: start in another --save_dir with a lower --lr"
        )


def _few(ids: Sequence[int], n: int = 8) -> str:
    shown = " ".join(str(i) for i in ids[:n])
    return shown if len(ids) <= n else f"{shown} ... ({len(ids)} of them)"
