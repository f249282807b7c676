"""Bad numbers, outliers and a W&B that fails: what a run does, in both frameworks."""

import json
import math
import os
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import test_trainer_pt
import test_trainer_tf
import torch
from helpers import final_bytes, metrics
from rounding import distances, sum_tolerance
from safetensors.numpy import load_file, save_file

import train_pt
import train_tf
from algpt2 import options
from algpt2.errors import EXIT_NON_FINITE, EXIT_STOPPED, NonFiniteError
from algpt2.options import ReportOptions
from algpt2.runs import report, tracker
from algpt2.runs.checkpoints import Checkpoint
from algpt2.runs.report import RunReport
from algpt2.shards.batches import global_rows
from algpt2.system import script
from algpt2.training import guard, trainer_pt, trainer_tf
from algpt2.training.guard import Hint, StepGuard

ROOT = Path(train_pt.__file__).parent
FRAMEWORKS = ["pt", "tf"]
MAKERS = {"pt": test_trainer_pt, "tf": test_trainer_tf}
BAD = {"nan": math.nan, "inf": math.inf}


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """Trainers look for their last checkpoint in runs/train of the current folder."""
    monkeypatch.chdir(tmp_path)


def weights(trainer):
    if isinstance(trainer, trainer_pt.Trainer):
        return {name: p.numpy() for name, p in test_trainer_pt.weights(trainer).items()}
    return test_trainer_tf.weights(trainer)


def optimizer_state(trainer):
    if isinstance(trainer, trainer_pt.Trainer):
        return {k: v.numpy().copy() for k, v in trainer.state_tensors().items()}
    return trainer.state_tensors()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def poison(trainer, monkeypatch, factors):
    """Multiply loss and gradient of each step (from 0) by `factors[step]`. A pair of factors
    multiplies loss and gradient by the first and adds the loss times the second to the loss alone.
    """
    module = trainer_pt if isinstance(trainer, trainer_pt.Trainer) else trainer_tf
    whole = module.mean_loss
    pairs = {step: f if isinstance(f, tuple) else (f, 0.0) for step, f in factors.items()}

    def bad_loss_pt(model, rows, device):
        loss, (both, alone) = whole(model, rows, device), pairs.get(trainer.step, (1.0, 0.0))
        return loss * both + loss.detach() * alone

    def bad_loss_tf(model, rows, seed):
        loss, pair = whole(model, rows, seed), tf.constant([1.0, 0.0])
        for step, value in pairs.items():
            # The seed tells the step, because one compiled call takes several steps.
            step_seed = trainer_tf._fold(trainer_tf.step_seed(42, step), 0)
            pair = tf.where(tf.reduce_all(seed == step_seed), value, pair)
        return loss * pair[0] + tf.stop_gradient(loss) * pair[1]

    monkeypatch.setattr(module, "mean_loss", bad_loss_pt if module is trainer_pt else bad_loss_tf)


def make(framework, **flags):
    """A trainer; in TensorFlow with one layer, because compilation takes time for each layer."""
    if framework == "tf":
        flags = {"config": test_trainer_tf.CONFIG | {"n_layer": 1}} | flags
    return MAKERS[framework].make_trainer(dropout=0.1, **flags)


@pytest.fixture
def soon(monkeypatch):
    """Let the guard find outliers from the fifth update on."""
    monkeypatch.setattr(guard, "MIN_STEPS", 4)
    monkeypatch.setattr(trainer_tf, "MIN_STEPS", 4)


# --- stop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD)
def test_a_bad_loss_stops_before_the_update_every_time(value, monkeypatch):
    messages = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            trainer = make("pt")
            poison(trainer, patch, {2: BAD[value]})
            for _ in range(2):
                trainer.train_step()
            before = weights(trainer), optimizer_state(trainer)
            with pytest.raises(NonFiniteError) as error:
                trainer.train_step()
        assert trainer.step == 2
        assert_same(before[0], weights(trainer))
        assert_same(before[1], optimizer_state(trainer))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    ids = global_rows(2, n_rows=24, batch_rows=4, seed=42)
    assert messages[0].startswith(f"step 3: loss {value}, gradient norm nan (rows")
    assert f"(rows {' '.join(map(str, ids))} of --train_path)" in messages[0]
    for words in ("no checkpoint yet", "add --skip_outliers 6", "a lower --lr"):
        assert words in messages[0]
    assert "fp32" not in messages[0]


def test_several_steps_in_a_call_keep_the_weights_before_the_bad_one(monkeypatch):
    trainer = make("tf", steps_per_call=4)
    poison(trainer, monkeypatch, {2: math.inf})
    trainer.train_steps(2)
    before = weights(trainer), optimizer_state(trainer)
    trainer.inputs.first = -1  # the next call takes the steps 3 to 6
    ids = global_rows(2, n_rows=24, batch_rows=4, seed=42)
    with pytest.raises(NonFiniteError, match=rf"step 3: loss inf.*rows {ids[0]} {ids[1]}"):
        trainer.train_steps(4)
    assert trainer.step == 2
    assert_same(before[0], weights(trainer))
    assert_same(before[1], optimizer_state(trainer))


def test_the_message_says_what_to_change():
    hint = Hint("no checkpoint yet", list(range(40)), low_precision=True)
    message = hint.stop("step 9: loss nan", StepGuard(None))
    assert "rows 0 1 2 3 4 5 6 7 ... (40 of them)" in message
    assert message.endswith("a lower --lr or --precision fp32")
    assert "(rows" not in Hint("no checkpoint yet").stop("step 9", StepGuard(None))


@pytest.fixture
def flags(flags):
    """A run of twelve steps."""
    return partial(flags, max_steps=12, eval_steps=6)


MAINS = {"pt": (train_pt, trainer_pt), "tf": (train_tf, trainer_tf)}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_weights_that_an_update_destroyed_are_never_saved(framework, flags, tmp_path, monkeypatch):
    script, module = MAINS[framework]
    if framework == "pt":
        script.main(flags(max_minutes=1e-9))
    whole = module.Trainer.train_steps

    def destroy(trainer, n):
        answer = whole(trainer, n)
        if trainer.step == 6:  # a step of finite numbers whose update overflows
            bias = dict(trainer.model.named_parameters())["transformer.ln_f.bias"]
            bad = np.full(32, np.inf, np.float32)
            bias.data.copy_(torch.from_numpy(bad)) if framework == "pt" else bias.assign(bad)
        return answer

    monkeypatch.setattr(module.Trainer, "train_steps", destroy)
    with pytest.raises(NonFiniteError, match=r"step 6: the update has made transformer.ln_f.bias"):
        script.main(flags(eval_steps=12, save_steps=6))
    folders = [p.name for p in (tmp_path / "run").glob("*checkpoint*")]
    assert folders == (["checkpoint-00000001"] if framework == "pt" else [])


def test_a_bad_run_exits_with_one_line_that_names_the_last_checkpoint(flags, tmp_path):
    train_pt.main(flags(max_minutes=1e-9))
    code = (
        "import math, sys, train_pt\n"
        "from algpt2.system import script; from algpt2.training import trainer_pt\n"
        "whole = trainer_pt.mean_loss\n"
        "trainer_pt.mean_loss = lambda *a: whole(*a) * math.nan\n"
        "script.run_script(train_pt.main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *flags()], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == EXIT_NON_FINITE
    last = tmp_path / "run" / "checkpoint-00000001"
    assert done.stderr.startswith("error: step 2: loss nan") and done.stderr.count("\n") == 1
    assert f"the last good checkpoint is {last}." in done.stderr
    assert [p.name for p in (tmp_path / "run").glob("*checkpoint*")] == [last.name]


# --- skip ----------------------------------------------------------------------------------------


@pytest.mark.numeric
def test_limits_are_mean_and_standard_deviations_of_the_last_updates():
    judge, draw = StepGuard(z=3.0), np.random.default_rng(0)
    losses, norms = draw.normal(5, 0.1, 300), draw.normal(1, 0.02, 300)
    for i in range(300):
        known = slice(max(0, i - guard.WINDOW), i)
        expected = [np.inf] * 2
        if i >= guard.MIN_STEPS:
            expected = [x[known].mean() + 3 * x[known].std() for x in (losses, norms)]
        assert judge.limits() == pytest.approx(expected, rel=1e-5)
        if i % 50 == 0:
            found = trainer_tf.limits(tf.constant(judge.window()), 3.0).numpy()
            assert found == pytest.approx(expected, rel=1e-5)
        judge.record(i + 1, losses[i], norms[i], True, Hint)
    loss_limit, norm_limit = map(float, judge.limits())
    assert judge.allows(loss_limit, norm_limit) and judge.allows(0.0, 0.0)
    assert not judge.allows(loss_limit * 1.001, 1.0)
    assert not judge.allows(5.0, norm_limit * 1.001)
    for bad in BAD.values():
        assert not judge.allows(bad, 1.0) and not judge.allows(5.0, bad)
        assert not StepGuard(z=3.0).allows(bad, 1.0)  # from the first step on


# An outlier in the loss alone, in the gradient alone, NaN and infinity.
KINDS = {"AdamW": (1.0, 20.0), "SGD": (100.0, -99.0), "Adafactor": math.nan, "Muon": math.inf}


@pytest.mark.numeric
@pytest.mark.parametrize("optimizer", KINDS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_skipped_step_leaves_weights_and_optimizer_alone(
    framework, optimizer, monkeypatch, soon, capsys
):
    trainer = make(framework, optimizer=optimizer, skip_outliers=6.0)
    poison(trainer, monkeypatch, {6: KINDS[optimizer]})
    for _ in range(6):
        trainer.train_step()
    before = weights(trainer), optimizer_state(trainer), trainer.guard.window()
    trainer.train_step()
    assert (trainer.step, trainer.guard.skipped, trainer.guard.in_row) == (7, 1, 1)
    assert_same(before[0], weights(trainer))
    assert_same(before[1], optimizer_state(trainer))
    np.testing.assert_array_equal(before[2], trainer.guard.window())  # the mean excludes outliers
    assert "step 7: loss" in capsys.readouterr().out
    trainer.train_step()
    assert (trainer.step, trainer.guard.skipped, trainer.guard.in_row) == (8, 1, 0)
    after = weights(trainer)
    assert any((after[name] != value).any() for name, value in before[0].items())


@pytest.mark.numeric
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_run_after_a_skip_is_the_run_without_that_update(framework, monkeypatch, soon):
    schedule = {"lr_schedule": "linear", "warmup_steps": 2}
    without = make(framework, **schedule)
    expected = [without.train_step() for _ in range(5)]
    with monkeypatch.context() as patch:
        skips = make(framework, skip_outliers=6.0, **schedule)
        poison(skips, patch, {5: 50.0})
        assert [skips.train_step() for _ in range(5)] == expected
        skips.train_step()
    assert skips.guard.skipped == 1
    without.step += 1  # the data and the schedule go on
    for _ in range(3):
        assert skips.train_step() == without.train_step()
    assert_same(weights(skips), weights(without))
    assert_same(optimizer_state(skips), optimizer_state(without))


@pytest.mark.numeric
def test_calls_of_several_steps_skip_what_single_steps_skip(monkeypatch, soon):
    trainers, results, factors = [], [], {5: 80.0, 6: math.nan, 9: 80.0}
    for steps_per_call in (1, 11):
        with monkeypatch.context() as patch:
            trainer = make("tf", skip_outliers=6.0, steps_per_call=steps_per_call)
            poison(trainer, patch, factors)
            results.append(trainer.train_steps(11))
        trainers.append(trainer)
        assert (trainer.guard.skipped, trainer.guard.in_row) == (3, 0)  # step 11 was taken
        assert np.isfinite(trainer.guard.window()).sum() == 2 * 8
    tolerance = sum_tolerance(4 * 16)  # tokens of a step
    assert results[1] == pytest.approx(results[0], rel=tolerance)
    assert max(distances(*map(optimizer_state, trainers)).values()) < tolerance


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_too_many_outliers_in_a_row_stop_the_run(framework, monkeypatch):
    flags = {"steps_per_call": 4} if framework == "tf" else {}
    trainer = make(framework, skip_outliers=6.0, **flags)
    n = guard.MAX_IN_ROW
    # One good step between: the guard counts bad steps in a row.
    poison(trainer, monkeypatch, {step: math.nan for step in range(20) if step != 2})
    with pytest.raises(NonFiniteError) as error:
        for _ in range(20):
            trainer.train_step()
    assert trainer.step == 3 + n
    assert f"step {4 + n}: loss nan" in str(error.value)
    assert f"{n + 1} steps in a row that --skip_outliers would skip" in str(error.value)
    assert "add --skip_outliers" not in str(error.value)


def test_fp16_overflows_are_neither_failures_nor_outliers():
    trainer = make("pt", skip_outliers=6.0)
    trainer.processes = replace(trainer.processes, dtype=torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = weights(trainer)
    overflows = 0
    while not optimizer_state(trainer):  # the first update
        assert_same(before, weights(trainer))
        _, norm = trainer.train_step()
        overflows += not math.isfinite(norm)
    assert overflows > guard.MAX_IN_ROW
    assert trainer.step == overflows + 1
    assert (trainer.guard.skipped, trainer.guard.in_row) == (0, 0)
    assert np.isfinite(trainer.guard.window()).sum() == 2
    # A gradient that is infinite at any scale is not an overflow of the scaler.
    trainer.model.dense.bias.register_hook(lambda gradient: gradient * math.inf)
    trainer.guard.z = None
    with pytest.raises(NonFiniteError, match="gradient norm nan"):
        for _ in range(200):
            trainer.train_step()
    assert trainer.scaler.get_scale() < trainer_pt.MIN_LOSS_SCALE


# --- across stops, processes and frameworks ------------------------------------------------------


def spoil(monkeypatch, framework, steps=(5, 6, 9)):
    """Runs whose batches of these steps (from 0) have a loss 80 times too large."""
    module = MAINS[framework][1]
    init = module.Trainer.__post_init__
    whole = module.mean_loss

    def poisoned(trainer):
        monkeypatch.setattr(module, "mean_loss", whole)
        poison(trainer, monkeypatch, dict.fromkeys(steps, 80.0))
        init(trainer)

    monkeypatch.setattr(module.Trainer, "__post_init__", poisoned)


def outliers(save_dir, step=12):
    marker = save_dir / f"checkpoint-{step:08}" / "training_state.json"
    return json.loads(marker.read_text())["outliers"]


def kill(*arguments, **more):
    raise KeyboardInterrupt


@pytest.mark.numeric
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_stopped_and_continued_skips_the_same_steps(
    framework, flags, tmp_path, monkeypatch, soon, capsys
):
    spoil(monkeypatch, framework)
    monkeypatch.setattr(trainer_tf.Trainer, "evaluate", staticmethod(lambda *a: 1.0))
    more = {"skip_outliers": 6, "grad_steps": 2} if framework == "pt" else {"skip_outliers": 6}
    script, _ = MAINS[framework]
    script.main(flags("straight", **more))
    assert "skipped as outliers: 3 of 12 steps" in capsys.readouterr().out
    if framework == "pt":  # stopped at every step
        while script.main(flags("stopped", **more, max_minutes=1e-9)) == EXIT_STOPPED:
            pass
    else:  # killed after a skipped step: the run goes on from the checkpoint before
        with monkeypatch.context() as patch:
            patch.setattr(trainer_tf.Trainer, "evaluate", staticmethod(kill))
            with pytest.raises(KeyboardInterrupt):
                script.main(flags("stopped", **more, save_steps=3))
        script.main(flags("stopped", **more))
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert final_bytes(straight, 12) == final_bytes(stopped, 12)
    assert outliers(straight) == outliers(stopped)
    names = ("step", "loss", "lr", "grad_norm", "skipped", "val_loss")
    assert metrics(straight, *names) == metrics(stopped, *names)
    skipped = [n for (n,) in metrics(straight, "skipped")]
    assert skipped == [0] * 5 + [1] + [2] * 3 + [3] * 3


def test_a_skipped_nan_is_null_in_metrics_and_left_out_of_curves(flags, tmp_path, monkeypatch):
    import plot_runs

    whole = trainer_pt.mean_loss
    calls = iter(range(100))

    def second(*arguments):
        return whole(*arguments) * (math.nan if next(calls) == 1 else 1.0)

    monkeypatch.setattr(trainer_pt, "mean_loss", second)
    train_pt.main(flags(skip_outliers=6, max_steps=4))
    found = metrics(tmp_path / "run", "step", "loss", "skipped")
    assert found[1] == [2, None, 1]
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert [line["step"] for line in plot_runs.read_run(tmp_path / "run")] == [1, 3, 4]


def test_the_option_may_be_added_to_a_run_that_stopped(flags, tmp_path, monkeypatch):
    whole = trainer_pt.mean_loss
    trainers = []
    init = trainer_pt.Trainer.__post_init__

    def remember(trainer):
        trainers.append(trainer)
        init(trainer)

    def bad(*arguments):
        return whole(*arguments) * (math.nan if trainers[-1].step == 7 else 1.0)

    monkeypatch.setattr(trainer_pt.Trainer, "__post_init__", remember)
    monkeypatch.setattr(trainer_pt, "mean_loss", bad)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"step 8: .*checkpoint-00000006\."):
            train_pt.main(flags())
    assert train_pt.main(flags(skip_outliers=6)) is None
    assert metrics(tmp_path / "run", "skipped")[-1] == [1]


@pytest.mark.numeric
def test_a_run_with_skipped_steps_goes_on_in_the_other_framework(monkeypatch, soon):
    """The bias correction counts the optimizer's updates, not the steps of the run."""
    source = make("pt", skip_outliers=6.0)
    poison(source, monkeypatch, {5: 80.0})
    for _ in range(7):
        source.train_step()
    save_file(optimizer_state(source), "optimizer.safetensors")
    state = {"step": 7, "elapsed_s": 1.0, "outliers": source.guard.state()}
    target = make("tf", skip_outliers=6.0)
    target.load(Checkpoint(Path(), json.loads(json.dumps(state))))
    assert (target.step, int(target.optimizer.iterations)) == (7, 6)
    assert target.guard.state() == source.guard.state()
    assert_same(optimizer_state(target), load_file("optimizer.safetensors"))


# The start of a script that keeps the trainer and finds outliers from the fifth update on.
REMEMBER = """
import math
import numpy as np
from algpt2.system import script
from algpt2.training import guard, {module}
trainers, init = [], {module}.Trainer.__post_init__
def remember(trainer):
    trainers.append(trainer)
    init(trainer)
{module}.Trainer.__post_init__, whole = remember, {module}.mean_loss
"""
POISONED_PROCESS = """
import torch, train_pt
guard.MIN_STEPS = 4
def bad(model, rows, device):
    # Only process 0 has the bad batch, at first in its loss alone: gradients are all-reduced.
    loss, step = whole(model, rows, device), trainers[-1].step
    if trainers[-1].processes.rank == 0:
        loss = {5: loss + 80.0, 8: loss * math.nan}.get(step, loss)
    return loss
def main(argv):
    code = train_pt.main(argv)
    for parameter in trainers[-1].model.parameters():
        mine = parameter.detach().clone()
        torch.distributed.broadcast(parameter.data, 0)
        assert torch.equal(mine, parameter), "the processes have other weights"
    trainers.clear()  # an object that holds the process group at exit aborts
    return code
trainer_pt.mean_loss = bad
script.run_script(main)
"""
POISONED_DEVICE = """
import tensorflow as tf, train_tf
trainer_tf.MIN_STEPS = 4
def bad(model, rows, seed):
    loss, more = whole(model, rows, seed), 0.0
    for step, value in {5: 80.0, 8: math.nan}.items():
        # On device 0 alone, whose number is folded into the seed, and in the loss alone.
        of_device_0 = trainer_tf._fold(trainer_tf.step_seed(42, step), 0)
        more = tf.where(tf.reduce_all(seed == of_device_0), value, more)
    return loss + more
def main(argv):
    code, strategy = train_tf.main(argv), trainers[-1].processes.strategy
    for variable in trainers[-1].model.trainable_variables:
        first, second = strategy.experimental_local_results(variable._value)
        np.testing.assert_array_equal(first.numpy(), second.numpy())
    return code
trainer_tf.mean_loss = bad
script.run_script(main)
"""
SEVERAL = {
    "processes": ("trainer_pt", POISONED_PROCESS, {},
                  ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
    "devices": ("trainer_tf", POISONED_DEVICE, {"n_devices": 2}, []),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEVERAL)
def test_two_of_them_skip_alike(kind, flags, tmp_path):
    module, code, more, launcher = SEVERAL[kind]
    (tmp_path / "poisoned.py").write_text(REMEMBER.format(module=module) + code)
    arguments = [str(tmp_path / "poisoned.py"), *flags(skip_outliers=6, max_steps=10, **more)]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    skipped = metrics(tmp_path / "run", "skipped")
    assert [n for (n,) in skipped] == [0] * 5 + [1] * 3 + [2] * 2
    assert done.stdout.count("skipped, ") == 2  # process 0 speaks for both


# --- time ----------------------------------------------------------------------------------------


def test_max_minutes_counts_from_the_start_of_the_command(flags, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(options.time, "monotonic", lambda: now[0])
    trainer = trainer_pt.Trainer
    evaluate, steps, prepare = trainer.evaluate, trainer.train_steps, trainer.build_parts

    def slow_start(*arguments):
        now[0] += 30.0  # packing, imports, compilation
        return prepare(*arguments)

    def slow_evaluation(*arguments, **more):
        now[0] += 100.0
        return evaluate(*arguments, **more)

    def slow_steps(trainer, n):
        now[0] += 10.0 * n
        return steps(trainer, n)

    monkeypatch.setattr(trainer, "build_parts", staticmethod(slow_start))
    monkeypatch.setattr(trainer, "evaluate", staticmethod(slow_evaluation))
    monkeypatch.setattr(trainer, "train_steps", slow_steps)
    stops = []
    for _ in range(4):
        assert train_pt.main(flags(max_minutes=1)) == EXIT_STOPPED
        stops.append((metrics(tmp_path / "run", "step")[-1][0], newest_step(tmp_path / "run")))
    # 30 s of start and steps of 10 s: over a minute after the fourth. The evaluation of step 6 is
    # over the time: it is cut. The next start finishes it, however long it takes, and no more.
    assert stops == [(4, 4), (5, 6), (6, 6), (10, 10)]


def newest_step(run):
    return max(int(path.name[-8:]) for path in run.glob("checkpoint-*"))


def test_every_start_takes_a_step_however_short_the_time(flags, tmp_path):
    assert train_pt.main(flags(max_minutes=1e-9)) == EXIT_STOPPED
    assert train_pt.main(flags(max_minutes=1e-9)) == EXIT_STOPPED
    assert metrics(tmp_path / "run", "step") == [[1], [2]]


# --- W&B -----------------------------------------------------------------------------------------

RUN = {
    "options": {"optim": {"lr": 1.0}, "report": {"save_dir": "runs/a"}}, "data": {},
    "steps": 50, "wandb_id": "abc",
}  # fmt: skip


class SlowWandb(types.ModuleType):
    """Each call waits for `gate`, or raises."""

    def __init__(self, raises=()):
        super().__init__("wandb")
        self.gate, self.calls, self.raises = threading.Event(), [], raises
        self.Settings = lambda **settings: settings
        self.Histogram = lambda np_histogram: np_histogram

    def init(self, **settings):
        return self._call("init", settings) or self

    def log(self, values, step=None):
        self._call("log", (step, values))

    def finish(self):
        self._call("finish", None)

    def teardown(self):
        self.calls.append(("teardown", None))

    def _call(self, name, value):
        self.gate.wait(30)
        self.calls.append((name, value))
        if name in self.raises:
            self.raises.remove(name)
            raise OSError(f"{name} failed")


@pytest.fixture
def slow(monkeypatch):
    def install(raises=()):
        module = SlowWandb(list(raises))
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return install


def write(folder, n=50, mode="offline", histograms=False, done=None, stop=False):
    slowest = 0.0
    with RunReport(folder, RUN, 0, ReportOptions(wandb=mode), stop=stop) as run_report:
        for step in range(1, n + 1):
            start_s = time.monotonic()
            run_report.metrics({"step": step, "loss": None if step == 2 else 2.0})
            if histograms:
                run_report.histograms(step, [("weights/a", np.array([1.0, math.nan, math.inf]))])
            run_report.progress.update(1)
            slowest = max(slowest, time.monotonic() - start_s)
        if done:
            done()
    return slowest


def n_lines(folder):
    return len((folder / "metrics.jsonl").read_text().splitlines())


def test_a_wandb_that_hangs_holds_up_nothing(slow, tmp_path, monkeypatch, capsys):
    module = slow()
    monkeypatch.setattr(tracker, "QUEUE_SIZE", 10)
    monkeypatch.setattr(report, "FINISH_S", 0.2)
    monkeypatch.setattr(report, "STOP_S", 0.1)
    monkeypatch.setattr(script, "_left", [])
    start_s = time.monotonic()
    assert write(tmp_path) < 0.2
    assert 0.1 < time.monotonic() - start_s < 2
    assert n_lines(tmp_path) == 50
    printed = capsys.readouterr().out
    assert printed.count("W&B is 10 calls behind") == 1
    assert "did not finish in 0.2 s and is left behind" in printed
    assert "of 50 calls 40 were dropped, 0 failed" in printed
    assert script._left == [True]
    start_s = time.monotonic()
    for stopped in ({"n": 5}, {"stop": True}):  # before or behind its last step: less patience
        assert write(tmp_path, **stopped) < 0.2
        assert "did not finish in 0.1 s" in capsys.readouterr().out
    assert 0.1 < time.monotonic() - start_s < 4
    module.gate.set()


def test_a_hanging_library_does_not_keep_the_process(tmp_path):
    code = (
        "import atexit, time\n"
        "from algpt2.system import script\n"
        "atexit.register(time.sleep, 60)\n"
        "script.leave_threads()\n"
        "script.run_script(lambda argv: None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30)
    assert done.returncode == 0


def test_a_wandb_that_fails_now_and_then_gets_the_rest(slow, tmp_path, capsys):
    module = slow(["log", "log", "finish"])
    module.gate.set()
    write(tmp_path, n=5, histograms=True)
    logged = [value for name, value in module.calls if name == "log"]
    assert len(logged) == 10 and n_lines(tmp_path) == 5
    assert [step for step, values in logged if "loss" in values] == [
        1,
        3,
        4,
        5,
    ]  # JSON's null: none
    counts, edges = next(v["weights/a"] for _, v in logged if "weights/a" in v)
    assert counts.sum() == 1 and len(edges) == 65  # what is not finite has no place in them
    printed = capsys.readouterr().out
    assert printed.count("W&B failed (log failed); metrics.jsonl has everything") == 1
    assert "of 10 calls 0 were dropped, 3 failed" in printed


def test_an_unreachable_wandb_is_replaced_by_an_offline_one(slow, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    module = slow(["init"])
    module.gate.set()
    write(tmp_path, n=1, mode="online")
    assert [name for name, _ in module.calls] == ["init", "teardown", "init", "log", "finish"]
    settings = [value for name, value in module.calls if name == "init"]
    assert [(s["mode"], s["resume"], s["id"]) for s in settings] == [
        ("online", "allow", "abc"), ("offline", None, "abc"),
    ]  # fmt: skip


def test_a_continued_run_continues_its_wandb_run(slow, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    module = slow()
    module.gate.set()
    for _ in range(2):
        train_pt.main(flags(max_minutes=1e-9, wandb="online"))
    first, second = (value for name, value in module.calls if name == "init")
    assert (
        first["id"]
        == second["id"]
        == json.loads((tmp_path / "run/run.json").read_text())["wandb_id"]
    )
    assert first["resume"] == second["resume"] == "allow"


def test_a_full_queue_takes_calls_again_when_wandb_has_caught_up(slow, tmp_path, monkeypatch):
    module = slow()
    monkeypatch.setattr(tracker, "QUEUE_SIZE", 3)
    with RunReport(tmp_path, RUN, 0, ReportOptions(wandb="offline")) as run_report:
        for step in range(1, 11):
            run_report.metrics({"step": step, "loss": 2.0})
        module.gate.set()
        while not run_report.tracker.queue.empty():
            time.sleep(0.01)
        run_report.metrics({"step": 11, "loss": 2.0})
    assert [value[0] for name, value in module.calls if name == "log"] == [1, 2, 3, 11]


@pytest.mark.parametrize(
    "state", [[], None, {"skipped": -1}, {"in_row": "1"}, {"losses": 3}, {"grad_norms": ["x"]}]
)
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(TypeError, match="outliers: expected"):
        StepGuard(3.0).load(state)
