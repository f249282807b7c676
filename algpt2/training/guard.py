"""Which steps may not touch the weights: bad numbers and, with `--skip_outliers`, outliers.

The guard judges a step's loss and gradient norm before its update; every process has the same two
numbers. An outlier exceeds the mean of the steps before it by more than Z standard deviations.
Source: OLMo 2 (arXiv:2501.00656) and llm.c, which judge both numbers against the last 128 steps;
PaLM (arXiv:2204.02311, section 5.1) skipped the batches around each spike by hand.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import NonFiniteError
from ..system.console import log

WINDOW = 128  # steps that the mean covers: both numbers drift little in them
MIN_STEPS = 64  # fewer steps in the window give no standard deviation, so no step is an outlier
MAX_IN_ROW = 10  # outliers in a row; with the next one the model is bad, not a batch


@dataclass
class StepGuard:
    """Judges a run's steps by the steps before; every checkpoint holds its `state`."""

    z: float | None  # --skip_outliers; None: NaN and Inf stop the run, and no step is an outlier
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    skipped: int = 0  # steps of the run without an update
    in_row: int = 0  # skipped steps since the last update

    @property
    def max_in_row(self) -> int:
        """The number of steps in a row that the run may skip."""
        return 0 if self.z is None else MAX_IN_ROW

    def window(self) -> np.ndarray:
        """Losses and gradient norms of the last updates, (2, WINDOW) float32, newest last.

        While there were fewer updates than WINDOW, the array begins with NaN.
        """
        values = np.full((2, WINDOW), np.nan, np.float32)
        if self.losses:
            values[:, -len(self.losses) :] = self.losses, self.norms
        return values

    def limits(self) -> np.ndarray:
        """The largest loss and gradient norm that are not outliers, (2,) float32; inf: no limit."""
        window = self.window()
        known = ~np.isnan(window)
        n = np.float32(known[0].sum())
        if self.z is None or n < MIN_STEPS:
            return np.full(2, np.inf, np.float32)
        mean = np.where(known, window, 0).sum(1) / n
        squares = np.where(known, window - mean[:, None], 0) ** 2
        return mean + np.float32(self.z) * np.sqrt(squares.sum(1) / n)

    def allows(self, loss: float, norm: float) -> bool:
        """Whether a step with this loss and gradient norm may update the weights."""
        loss_limit, norm_limit = self.limits()
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        return bool(is_finite and loss <= loss_limit and norm <= norm_limit)

    def record(
        self, step: int, loss: float, norm: float, updated: bool, hint: "Callable[[], Hint]"
    ) -> None:
        """Record the result of a step.

        Args:
            step: number of the step, from 1.
            updated: whether the step updated the weights.
            hint: called if the run has to stop.
        Raises:
            NonFiniteError: the run skipped more steps in a row than it may.
        """
        if updated:
            self.in_row = 0
            if self.z is not None:
                self.losses.append(loss)
                self.norms.append(norm)
            return
        self.in_row += 1
        numbers = f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}"
        if self.in_row > self.max_in_row:
            raise NonFiniteError(hint().stop(numbers, self))
        self.skipped += 1
        log(f"{numbers}: skipped, {self._reason(loss, norm)}")

    def _reason(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "not finite"
        loss_limit, norm_limit = self.limits()
        return f"expected at most {loss_limit:.4g} and {norm_limit:.4g} (--skip_outliers {self.z})"

    def state(self) -> dict[str, Any]:
        """The guard's entry in training_state.json; empty without `--skip_outliers`."""
        if self.z is None:
            return {}
        return {
            "skipped": self.skipped, "in_row": self.in_row,
            "losses": list(self.losses), "grad_norms": list(self.norms),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`. An empty state, which a run without the option leaves, starts anew.

        Raises:
            TypeError: `state` has another form.
        """
        if not isinstance(state, dict):
            raise TypeError(f"outliers: expected an object, got a {type(state).__name__}")
        counts = [state.get(name, 0) for name in ("skipped", "in_row")]
        numbers = [state.get(name, []) for name in ("losses", "grad_norms")]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise TypeError(f"outliers: expected counts of steps, got {counts}")
        if not all(
            isinstance(x, list) and all(type(n) in (int, float) for n in x) for x in numbers
        ):
            raise TypeError("outliers: expected lists of losses and gradient norms")
        self.skipped, self.in_row = counts
        self.losses.extend(numbers[0])
        self.norms.extend(numbers[1])


@dataclass(frozen=True)
class Hint:
    """What a run knows about itself when bad numbers stop it."""

    last_checkpoint: str  # clause: "no checkpoint yet", or which checkpoint is good
    rows: Sequence[int] | None = None  # ids of the step's rows; None: unknown
    low_precision: bool = False

    def stop(self, numbers: str, guard: StepGuard) -> str:
        """The error message: the bad numbers, where the run stands, what to change."""
        if guard.z is None:
            advice = "add --skip_outliers 6, which leaves such a batch out, or start"
        else:
            numbers += f", {guard.in_row} steps in a row that --skip_outliers would skip"
            advice = "start"
        rows = f" (rows {_first_ids(self.rows)} of --train_path)" if self.rows is not None else ""
        precision = " or --precision fp32" if self.low_precision else ""
        return (
            f"{numbers}{rows}: stopped before the update; {self.last_checkpoint}. The same command "
            f"ends here again: {advice} in another --save_dir with a lower --lr{precision}"
        )


def check_finite(bad_tensors: Sequence[str], step: int, hint: Callable[[], Hint]) -> None:
    """Refuse to write a checkpoint of weights that an update has destroyed.

    Args:
        bad_tensors: names of the tensors that hold NaN or Inf.
        hint: called if there are such tensors.
    Raises:
        NonFiniteError: there are such tensors.
    """
    if bad_tensors:
        raise NonFiniteError(
            f"step {step}: the update has made {bad_tensors[0]} NaN or infinite (and "
            f"{len(bad_tensors) - 1} other tensors): no checkpoint written; "
            f"{hint().last_checkpoint}. The same command ends here again: start in another "
            "--save_dir with a lower --lr"
        )


def _first_ids(ids: Sequence[int], n: int = 8) -> str:
    first = " ".join(str(i) for i in ids[:n])
    return first if len(ids) <= n else f"{first} ... ({len(ids)} of them)"
