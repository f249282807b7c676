import json
from pathlib import Path

import pytest

import plot_runs
from algpt2.errors import UserError


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        {"step": s, "tokens": 64 * s, "loss": 5 - s / 10, "lr": 1e-3 / s, "elapsed_s": float(s)}
        for s in range(1, 11)
    ]
    lines[-1]["val_loss"] = 4.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_hold_the_numbers_of_the_run(run):
    figure = plot_runs.draw({"run": plot_runs.read_run(run)}, "tokens", 2)
    loss, lr = figure.axes
    raw, smooth, validation = loss.lines
    assert list(raw.get_xdata()) == [64 * s for s in range(1, 11)]
    assert raw.get_ydata()[-1] == pytest.approx(4.0)
    assert smooth.get_ydata()[-1] == pytest.approx(4.05)
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([640], [4.0])
    assert lr.lines[0].get_ydata()[0] == 1e-3


def test_image_is_written_and_redrawn_but_no_other_is_replaced(run, tmp_path, capsys):
    image = tmp_path / "figures" / "curves.png"
    plot_runs.main([str(run), f"--save_path={image}"])
    plot_runs.main([str(run), str(run), f"--save_path={image}", "--x=elapsed_s"])
    assert "val_loss 4.0000" in capsys.readouterr().out
    assert image.read_bytes().startswith(b"\x89PNG")
    image.write_bytes(b"\x89PNG of a friend")
    with pytest.raises(UserError, match="--overwrite"):
        plot_runs.main([str(run), f"--save_path={image}"])


def test_a_run_that_is_being_written_is_read_to_its_last_whole_line(run):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 11, "lo')
    assert len(plot_runs.read_run(run)) == 10


@pytest.mark.parametrize("content", [None, "", "{}\n", "not json\n"])
def test_what_is_no_run_is_a_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError):
        plot_runs.main([str(tmp_path)])


def test_without_arguments_it_draws_what_is_in_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run to draw"):
        plot_runs.main([])
    assert not Path("curves.png").exists()
    line = {"step": 1, "tokens": 4, "loss": 2.0, "lr": 0.1, "elapsed_s": 1.0}
    for folder in (Path("runs/a"), Path("runs/quickstart/model")):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    plot_runs.main([])
    assert Path("curves.png").exists()
    lines = capsys.readouterr().out.splitlines()
    assert [x.partition(":")[0] for x in lines[:2]] == ["runs/a", "runs/quickstart/model"]


def test_runs_of_one_name_are_told_apart(run):
    lines = plot_runs.read_run(run)
    figure = plot_runs.draw({"a/model": lines, "b/model": lines, "c/other": lines}, "step", 1)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[::2] == ["a/model", "b/model", "other"]


def test_a_width_that_is_none_is_a_user_error(run):
    with pytest.raises(UserError, match="above zero, got --smooth 0"):
        plot_runs.main([str(run), "--smooth=0"])
