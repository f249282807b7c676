"""What the optimizers of both frameworks share. The learning rate is a pure function of the step:
a checkpoint saves nothing of it."""

import math

from ..options import OptimOptions

IN_BLOCK = r"\.\d+\."  # in the name of a weight inside a block; Muon updates its matrices


def lr_factor(step: int, optim: OptimOptions, n_steps: int) -> float:
    """Factor in [0, 1] that multiplies the peak learning rate at `step`.

    A linear warm-up reaches 1 at step `warmup_steps - 1`. "linear" and "cosine" then go down to
    `min_lr_ratio` at the last step, "constant" stays, and "wsd" (warm-up-stable-decay) stays until
    it goes down linearly over the last `decay_ratio` of the run. Where `min_lr_ratio` is 0, the
    last step is taken half a step before 0, not lost. The step of a run of one is at the peak.

    Args:
        step: the optimizer step about to be taken, from 0.
        n_steps: optimizer steps of the whole run.
    """
    schedule, start = optim.lr_schedule, optim.warmup_steps
    if step < start:
        return (step + 1) / start
    if schedule == "constant" or n_steps == 1:
        return 1.0
    if schedule == "wsd":
        start = max(start, n_steps - math.ceil(optim.decay_ratio * n_steps))
    # The last step, n_steps - 1, takes min_lr_ratio; a step before `start` takes the peak.
    n_decay = max(1, n_steps - start)
    last = n_decay if optim.min_lr_ratio else n_decay - 0.5
    done = min(last, max(0, step - start + 1)) / n_decay
    shape = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape
