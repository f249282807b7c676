from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from algpt2.options import OptimOptions
from algpt2.training.schedules import lr_factor

OPTIM = OptimOptions(warmup_steps=2, min_lr_ratio=0.0, decay_ratio=0.4)
SCHEDULES = get_args(get_type_hints(OptimOptions)["lr_schedule"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0625]),
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("wsd", [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.125]),
        ("cosine", [0.5, 1, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806, 0.00961]),
    ],
)
def test_factors_equal_the_written_list(schedule, expected):
    optim = replace(OPTIM, lr_schedule=schedule)
    assert [lr_factor(step, optim, 10) for step in range(10)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 20])
def test_factor_never_leaves_its_range(schedule, warmup_steps):
    optim = replace(OPTIM, lr_schedule=schedule, warmup_steps=warmup_steps, min_lr_ratio=0.1)
    assert all(0 < lr_factor(step, optim, 10) <= 1 for step in range(40))


def test_last_step_takes_the_minimum():
    for schedule in ("linear", "cosine", "wsd"):
        optim = replace(OPTIM, lr_schedule=schedule, min_lr_ratio=0.1)
        assert lr_factor(9, optim, 10) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_the_only_step_is_at_the_peak(schedule, warmup_steps):
    optim = replace(OPTIM, lr_schedule=schedule, warmup_steps=warmup_steps)
    assert lr_factor(0, optim, 1) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 2, 9])
def test_no_step_is_lost(schedule, warmup_steps):
    optim = replace(OPTIM, lr_schedule=schedule, warmup_steps=warmup_steps)
    assert all(lr_factor(step, optim, 10) > 0 for step in range(10))
