"""A stop while something is under way: what is cut is done at the next start, as if never cut."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_pt
import train_tf
from algpt2.errors import EXIT_STOPPED
from algpt2.system import processes_tf, script
from algpt2.system.processes_pt import Processes
from algpt2.training import loop, trainer_pt
from algpt2.training.loop import StopRequest, Trainer

ROOT = Path(train_pt.__file__).parent
SCRIPTS = {"pt": train_pt, "tf": train_tf}
TIMES = {"elapsed_s", "tokens_per_s", "input_wait"}


@pytest.fixture
def flags(flags):
    """A run of six steps, evaluated and sampled at steps 3 and 6."""
    return partial(flags, logging_steps=2, sample_steps=3, max_length=8, keep_last=1)


def lines(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def content(run):
    """What two runs have to have in common."""
    (folder,) = run.glob("checkpoint-*")
    weights = [(folder / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]
    return folder.name, lines(run / "metrics.jsonl"), lines(run / "samples.jsonl"), weights


def stop_at(monkeypatch, owner, name, call):
    """Have this process get SIGTERM as it calls `owner.name` for the `call`-th time."""
    whole, calls = getattr(owner, name), []

    def counted(*arguments):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("framework", SCRIPTS)
def test_what_a_stop_cuts_is_done_at_the_next_start(framework, flags, tmp_path, monkeypatch):
    script = SCRIPTS[framework]
    assert script.main(flags("straight")) is None
    run = tmp_path / "cut"

    def start(owner=None, name="", call=0):
        with monkeypatch.context() as patch:
            if owner:
                stop_at(patch, owner, name, call)
            code = script.main(flags("cut"))
        return code, [line["step"] for line in lines(run / "metrics.jsonl")]

    # In an evaluation; again, as it is done again; in a sample; as the checkpoint is mended.
    assert start(Trainer, "check_stop", 2) == (EXIT_STOPPED, [2])
    if framework == "pt":  # each start in TensorFlow compiles
        assert start(Trainer, "check_stop", 1) == (EXIT_STOPPED, [2])
    assert start(StopRequest, "check", 3) == (EXIT_STOPPED, [2])
    (folder,) = run.glob("checkpoint-*")
    assert json.loads((folder / "training_state.json").read_text())["cut"]["step"] == 3
    if framework == "pt":
        assert start(Trainer, "save", 1) == (EXIT_STOPPED, [2, 3, 4])
    assert start() == (None, [2, 3, 4, 6])
    assert content(run) == content(tmp_path / "straight")


def test_a_kill_behind_the_line_of_a_cut_step_leaves_it_once(flags, tmp_path, monkeypatch, capsys):
    train_pt.main(flags("straight"))
    with monkeypatch.context() as patch:
        stop_at(patch, Trainer, "check_stop", 12)  # of step 6, the last
        assert train_pt.main(flags("cut", eval_steps=6)) == EXIT_STOPPED
    (folder,) = (tmp_path / "cut").glob("checkpoint-*")
    assert "bits per byte" not in (folder / "README.md").read_text()

    def kill(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            train_pt.main(flags("cut"))
    assert [line["step"] for line in lines(tmp_path / "cut" / "metrics.jsonl")] == [2, 4, 6]
    capsys.readouterr()
    for message in ("continuing at step 6", "already done"):
        assert train_pt.main(flags("cut")) is None
        printed = capsys.readouterr().out
        assert message in printed and "warning" not in printed
    found, expected = content(tmp_path / "cut"), content(tmp_path / "straight")
    assert found[1] == [line for line in expected[1] if line["step"] != 3]
    assert found[3] == expected[3]
    assert "bits per byte" in (folder / "README.md").read_text()


@pytest.mark.parametrize("n_rows", [1, 5, 9, 12])
def test_all_processes_ask_equally_often(n_rows, monkeypatch):
    """Each asks the others: one time more or less and they wait for ever."""
    monkeypatch.setattr(trainer_pt, "mean_loss", lambda *_: torch.zeros(()))
    counts = []
    for rank in range(4):
        processes = Processes(rank, 4, torch.device("cpu"), torch.float32)
        monkeypatch.setattr(Processes, "mean", lambda self, value: value)
        asked = []
        trainer_pt.evaluate(
            torch.nn.Identity(), np.zeros((n_rows, 3), int), processes, batch_size=8,
            check=lambda asked=asked: asked.append(None),
        )  # fmt: skip
        counts.append(len(asked))
    assert counts == [math.ceil(n_rows / 8)] * 4


def test_process_0_alone_stops_all():
    def leave():
        raise loop.Stopped

    for work, others in ((leave, False), (lambda: None, True)):
        trainer = SimpleNamespace(processes=SimpleNamespace(any=lambda flag, o=others: flag or o))
        with pytest.raises(loop.Stopped):
            Trainer.on_main_only(trainer, work)


def test_a_worker_that_goes_outside_the_loop_is_no_traceback(monkeypatch, capsys):
    @processes_tf.peers_may_go()
    def waits_for_the_other():
        raise processes_tf.tf.errors.UnavailableError(None, None, "Connection reset")

    codes = []
    monkeypatch.setattr(script.os, "_exit", codes.append)
    monkeypatch.setattr(script, "_listen", lambda: None)  # pytest's handlers stay
    script.run_script(lambda argv: waits_for_the_other())
    assert codes == [EXIT_STOPPED]
    assert "gone (Connection reset): run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_where_nothing_listens_ends_the_command_at_once(number):
    code = "from algpt2.system import script; script.run_script(lambda argv: work())\n"
    # In a call of a C library (a lock that it has itself), where Python's handlers have to wait.
    lock = "ctypes.CDLL(None).pthread_mutex_lock(lock)"
    work = (
        "import ctypes\nlock = ctypes.create_string_buffer(128)\n"
        f"def work():\n  print('working', flush=True)\n  {lock}\n  {lock}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", work + code], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "working\n"
    start_s = time.monotonic()
    process.send_signal(number)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == EXIT_STOPPED and time.monotonic() - start_s < 5
    assert f"stopped by {number.name}: the same command continues" in printed
    assert "Traceback" not in printed
