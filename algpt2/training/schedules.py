"""What the optimizers of both frameworks share. The learning rate is a pure function of the step:
a checkpoint saves nothing of it."""

import math

from ..errors import UserError

IN_BLOCK = r"\.\d+\."  # in the name of a weight inside a block; Muon updates its matrices
SCHEDULES = ("linear", "cosine", "constant", "wsd")


def lr_factor(
    step: int,
    *,
    schedule: str,
    n_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    decay_ratio: float,
) -> float:
    """Factor in [0, 1] that multiplies the peak learning rate at `step`.

    Args:
        step: the optimizer step about to be taken, from 0.
        schedule: what follows a linear warm-up that reaches 1 at step `warmup_steps - 1`: "linear"
            or "cosine" down to `min_lr_ratio` at the last step, "constant", or "wsd"
            (warm-up-stable-decay: constant, then linear over the last `decay_ratio` of the run).
            Where that is 0, the last step is taken half a step before it, not lost. The step of a
            run of one is at the peak.
        n_steps: optimizer steps of the whole run.
    Raises:
        UserError: `schedule` is unknown.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"unknown lr_schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant" or n_steps == 1:
        return 1.0
    start = warmup_steps
    if schedule == "wsd":
        start = max(warmup_steps, n_steps - math.ceil(decay_ratio * n_steps))
    # The last step, n_steps - 1, takes min_lr_ratio; a step before `start` takes the peak.
    n_decay = max(1, n_steps - start)
    last = n_decay if min_lr_ratio else n_decay - 0.5
    done = min(last, max(0, step - start + 1)) / n_decay
    shape = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return min_lr_ratio + (1 - min_lr_ratio) * shape
