"""Progress, and what W&B may and may not do to a run."""

import json
import sys
import time
import types
from pathlib import Path

import pytest

from algpt2.errors import UserError
from algpt2.options import ReportOptions
from algpt2.runs import report, run
from algpt2.runs.report import RunReport
from algpt2.runs.run import open_run
from algpt2.runs.tracker import run_name
from algpt2.system import console
from algpt2.system.console import Progress

RUN = {
    "options": {"optim": {"lr": 1.0}, "report": {"save_dir": "runs/a"}}, "data": {"train": "a"},
    "steps": 3, "wandb_id": "abc",
}  # fmt: skip


class FakeWandb(types.ModuleType):
    """Records what it is called with; `broken` methods raise."""

    def __init__(self, broken=()):
        super().__init__("wandb")
        self.calls, self.broken, self.step = [], broken, 0
        self.Settings = lambda **kwargs: kwargs
        self.Table = lambda columns, data: (columns, data)
        self.Artifact = FakeArtifact

    def init(self, **kwargs):
        return self._call("init", kwargs) or self

    def log(self, values, step=None):
        self._call("log", (step, values))

    def log_artifact(self, artifact):
        self._call("log_artifact", artifact)

    def finish(self):
        self._call("finish", None)

    def _call(self, name, value):
        self.calls.append((name, value))
        if name in self.broken:
            raise RuntimeError(f"{name} failed")


class FakeArtifact:
    def __init__(self, name, type, description):
        self.name, self.type, self.description, self.files = name, type, description, None

    def add_dir(self, folder):
        self.files = sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def fake(monkeypatch):
    def install(broken=()):
        module = FakeWandb(broken)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return install


def write(folder, mode):
    with RunReport(folder, RUN, 0, ReportOptions(wandb=mode, tags=("a",))) as run_report:
        run_report.metrics({"step": 1, "loss": 2.0})
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_wandb_gets_the_run_offline_without_an_account(fake, tmp_path):
    module = fake()
    write(tmp_path, "online")
    (_, settings), (_, logged), _ = module.calls
    assert (settings["mode"], settings["id"], settings["tags"]) == ("offline", "abc", ["a"])
    assert settings["config"]["options"] == RUN["options"]
    assert logged == (1, {"loss": 2.0})


def test_wandb_is_online_for_those_logged_in_and_off_for_others(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    module = fake()
    write(tmp_path, "auto")
    assert module.calls == []
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    write(tmp_path, "auto")
    assert module.calls[0][1]["mode"] == "online"


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_loses_no_metrics(fake, tmp_path, broken):
    fake([broken])
    assert write(tmp_path, "offline") == [{"step": 1, "loss": 2.0}]


def test_the_real_wandb_writes_an_offline_run(tmp_path, patient):
    write(tmp_path, "offline")
    assert list(tmp_path.glob("wandb/offline-run-*-abc/*.wandb"))


@pytest.fixture
def patient(monkeypatch):
    """Time for the real W&B to start on a busy machine."""
    monkeypatch.setattr(report, "STOP_S", 120)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "my run" / "checkpoint-00000003"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("config", ["{bad", "[]", '{"task": {"index": "x"}}'])
def test_a_cluster_that_cannot_be_read_is_a_user_error(monkeypatch, config):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UserError, match=r"^TF_CONFIG is .*: expected JSON such as"):
        console.process_index()


@pytest.mark.parametrize(
    ("save_dir", "name"), [(".", "here"), ("runs/a", "here"), ("gs://bucket/runs/a/", "a")]
)
def test_a_run_has_the_name_of_its_folder_or_url(tmp_path, monkeypatch, save_dir, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_name(Path(), {"options": {"report": {"save_dir": save_dir}}}) == name


def with_artifact(folder, checkpoint, mode, asked=True):
    options = ReportOptions(wandb=mode, wandb_artifacts=asked)
    with RunReport(folder, RUN, 0, options) as run_report:
        run_report.artifact(checkpoint)


def test_the_checkpoint_is_an_artifact_on_request_only(fake, tmp_path, checkpoint, capsys):
    module = fake()
    with_artifact(tmp_path, checkpoint, "offline")
    (artifact,) = [value for name, value in module.calls if name == "log_artifact"]
    assert (artifact.name, artifact.type, artifact.files) == ("my-run", "model", ["config.json"])
    assert artifact.description == "checkpoint-00000003"
    module.calls.clear()
    with_artifact(tmp_path, checkpoint, "offline", asked=False)
    assert [name for name, _ in module.calls] == ["init", "finish"]
    with_artifact(tmp_path, checkpoint, "off")
    assert "has no effect without W&B" in capsys.readouterr().out
    fake(["log_artifact"])
    with_artifact(tmp_path, checkpoint, "offline")
    assert "did not take the artifact (log_artifact failed)" in capsys.readouterr().out


def test_the_real_wandb_stages_an_artifact_offline(tmp_path, checkpoint, patient, monkeypatch):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    with_artifact(tmp_path, checkpoint, "offline")
    (written,) = tmp_path.glob("wandb/offline-run-*-abc/*.wandb")
    deadline_s = time.monotonic() + 30  # W&B's own process may write after `finish` has returned
    while b"my-run" not in written.read_bytes():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_table_goes_to_the_run_of_the_folder(fake, tmp_path, capsys):
    module = fake()
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    table = ("evaluation", ["text", "value"], [["ptb", 35.1]], 40)
    report.send_table(tmp_path, ReportOptions(wandb="offline"), *table)
    (_, settings), (_, logged), _ = module.calls
    assert settings["id"] == "abc"
    assert logged == (40, {"evaluation": (["text", "value"], [["ptb", 35.1]])})
    module = fake()
    module.step = 41  # of an online run that goes on: W&B takes nothing of an earlier step
    report.send_table(tmp_path, ReportOptions(wandb="offline"), *table)
    assert module.calls[1][1][0] == 41
    fake(["log"])
    report.send_table(tmp_path, ReportOptions(wandb="offline"), *table)
    assert "W&B failed (log failed)" in capsys.readouterr().out
    module = fake()
    report.send_table(tmp_path, ReportOptions(wandb="off"), *table)
    report.send_table(tmp_path, ReportOptions(wandb="offline"), "evaluation", ["text"], [], 1)
    assert module.calls == []


def test_a_continued_run_keeps_its_id_and_date(tmp_path):
    first = open_run(tmp_path, RUN, overwrite=False)
    (tmp_path / "run.json").write_text(json.dumps(first))
    again = open_run(tmp_path, RUN | {"wandb_id": "new", "steps": 4}, overwrite=False)
    assert (again["wandb_id"], again["created"], again["steps"]) == ("abc", first["created"], 4)


def test_overwrite_removes_what_a_run_wrote_and_a_kill_may_fall_in_it(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text(json.dumps(open_run(tmp_path, RUN, overwrite=False)))
    for name in ("checkpoint-00000001", "wandb", ".checkpoint-00000002.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    for name in (".lock", "metrics.jsonl", "samples.jsonl", "thesis.tex", "checkpoint-best"):
        (tmp_path / name).write_text("")
    remove, removed = run.remove, []

    def killed(path):
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(remove(path))

    other = RUN | {"options": {"lr": 2}, "wandb_id": "new"}
    with monkeypatch.context() as patch:
        patch.setattr(run, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run(tmp_path, other, overwrite=True)
    assert open_run(tmp_path, other, overwrite=True)["wandb_id"] == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "checkpoint-best", "run.json", "thesis.tex",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "null", "[1]", "{}", '{"options": 1}', "[" * 100_000])
def test_a_damaged_run_json_is_a_user_error(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        open_run(tmp_path, RUN, overwrite=False)


def test_processes_other_than_0_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with RunReport(tmp_path, RUN, 0, ReportOptions(wandb="offline")) as run_report:
        run_report.metrics({"step": 1, "loss": 2.0})
        run_report.samples(1, "a", ["b"])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_progress_in_a_log_is_plain_lines_with_speed_and_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with Progress("train", total=100, unit="step", initial=10) as progress:
        for _ in range(30):
            now[0] += 1
            progress.update(1, "loss 2.0")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: 20 step of 100 step 20%, 01:20 left, 1.0 step/s loss 2.0"
    assert len(lines) == 3
    with Progress("encode", unit="B") as progress:
        now[0] += 10
        progress.update(1000, total=4000)  # known on the way
    assert capsys.readouterr().out == "encode: 1.00kB of 4.00kB 25%, 00:30 left, 100B/s\n"


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("train", total=2, unit="step") as progress:
        progress.update(2)
    captured = capsys.readouterr()
    assert "train" in captured.err and captured.out == ""
