import pytest

from algpt2.errors import UserError
from algpt2.training.schedules import SCHEDULES, lr_factor

RUN = {"n_steps": 10, "warmup_steps": 2, "min_lr_ratio": 0.0, "decay_ratio": 0.4}


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
    factors = [lr_factor(step, schedule=schedule, **RUN) for step in range(10)]
    assert factors == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 20])
def test_factor_never_leaves_its_range(schedule, warmup_steps):
    run = RUN | {"warmup_steps": warmup_steps, "min_lr_ratio": 0.1}
    assert all(0 < lr_factor(step, schedule=schedule, **run) <= 1 for step in range(40))


def test_last_step_takes_the_minimum():
    for schedule in ("linear", "cosine", "wsd"):
        run = RUN | {"min_lr_ratio": 0.1}
        assert lr_factor(9, schedule=schedule, **run) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_only_step_is_at_the_peak(schedule):
    for warmup_steps in (0, 1):
        run = RUN | {"n_steps": 1, "warmup_steps": warmup_steps}
        assert lr_factor(0, schedule=schedule, **run) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 2, 9])
def test_no_step_is_lost(schedule, warmup_steps):
    run = RUN | {"warmup_steps": warmup_steps}
    assert all(lr_factor(step, schedule=schedule, **run) > 0 for step in range(10))


def test_unknown_schedule_is_named():
    with pytest.raises(UserError, match=r"'step'.*linear, cosine, constant, wsd"):
        lr_factor(0, schedule="step", **RUN)
