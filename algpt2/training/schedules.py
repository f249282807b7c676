"""The learning rate as a pure function of the step: a checkpoint saves nothing of it."""

import math

from ..options import OptimOptions


def lr_factor(step: int, optim: OptimOptions, n_steps: int) -> float:
    """Factor in [0, 1] that multiplies the peak learning rate at `step`.

    A linear warm-up reaches 1 at step `warmup_steps - 1`. "linear" and "cosine" then go down to
    `min_lr_ratio` at the last step, "constant" stays, and "wsd" (warm-up-stable-decay) stays until
    it goes down linearly over the last `decay_ratio` of the run.

    Args:
        step: the optimizer step about to be taken, from 0.
        n_steps: optimizer steps of the whole run.
    """
    schedule, start = optim.lr_schedule, optim.warmup_steps
    if step < start:
        return (step + 1) / start
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        start = max(start, n_steps - math.ceil(optim.decay_ratio * n_steps))
    # The last step, n_steps - 1, takes min_lr_ratio; a step before `start` takes the peak.
    done = min(1.0, max(0.0, (step - start + 1) / max(1, n_steps - start)))
    shape = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape
