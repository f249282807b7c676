"""Draw the loss and learning-rate curves of one or several runs to a PNG.

    python3 plot_runs.py runs/train
    python3 plot_runs.py runs/gpt2 runs/algpt2 --save_path curves.png --x elapsed_s

Reads metrics.jsonl of each run, also while it is running. Validation losses are dots on the curve.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from algpt2.errors import UserError
from algpt2.options import PlotOptions, parse
from algpt2.runs.checkpoints import METRICS_FILE
from algpt2.runs.report import read_json_lines
from algpt2.system.script import run_script

LABELS = {"tokens": "training tokens", "step": "optimizer steps", "elapsed_s": "training time (s)"}


def main(argv: Sequence[str] | None = None) -> None:
    """Read, draw, write."""
    options = parse(PlotOptions, argv, __doc__)
    path = Path(options.save_path)
    check_output(path, options.overwrite)
    folders = options.runs or [str(p.parent) for p in sorted(Path("runs").rglob(METRICS_FILE))]
    if not folders:
        raise UserError(f"no run to draw: expected the folder of a run, or {METRICS_FILE} in runs/")
    runs = {run: read_run(Path(run)) for run in folders}
    figure = draw(runs, options.x, options.smooth)
    partial = path.with_name(f".{path.stem}.partial.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(partial, dpi=200, metadata={"Software": "plot_runs.py"})
    partial.replace(path)
    for run, lines in runs.items():
        evaluated = [line for line in lines if "val_loss" in line]
        best = f", val_loss {min(x['val_loss'] for x in evaluated):.4f}" if evaluated else ""
        print(f"{run}: {lines[-1]['step']:,} steps, loss {lines[-1]['loss']:.4f}{best}")
    print(f"written to {path}")


def check_output(path: Path, overwrite: bool) -> None:
    """`UserError` if the image exists and this script did not draw it."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--save_path {path}: expected a name that ends in .png")
    if path.exists() and not overwrite and b"plot_runs.py" not in path.read_bytes()[:4096]:
        raise UserError(f"this script did not draw {path}: --overwrite replaces it")


def read_run(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl.

    Raises:
        UserError: no such file, or nothing in it yet.
    """
    path = folder / METRICS_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"{folder} is not a run: expected {METRICS_FILE} in it")
    lines = [x for x in read_json_lines(path) if x.get("loss", 0) is not None]  # None: skipped
    if not lines or not all({"loss", "lr", "step", "tokens"} <= line.keys() for line in lines):
        raise UserError(f"{path} holds no training steps yet")
    return lines


def draw(runs: dict[str, list[dict[str, Any]]], x: str, smooth: int) -> Any:
    """A matplotlib figure: losses above, learning rates below, a colour for each run."""
    from matplotlib.figure import Figure  # not pyplot: needs no display

    figure = Figure(figsize=(7, 5), layout="constrained")
    loss, lr = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    names = [Path(run).name for run in runs]
    for i, (run, lines) in enumerate(runs.items()):
        color, name = f"C{i}", names[i] if names[i] and names.count(names[i]) == 1 else run
        xs, losses = [line[x] for line in lines], [line["loss"] for line in lines]
        loss.plot(xs, losses, color=color, alpha=0.25, linewidth=0.8)
        loss.plot(xs, moving_mean(losses, smooth), color=color, linewidth=1.5, label=name)
        evaluated = [line for line in lines if "val_loss" in line]
        loss.plot(
            [line[x] for line in evaluated], [line["val_loss"] for line in evaluated],
            "o--", color=color, markersize=4, linewidth=0.8, label=f"{name} (validation)",
        )  # fmt: skip
        lr.plot(xs, [line["lr"] for line in lines], color=color, linewidth=1.5)
    loss.set_ylabel("loss (nats per token)")
    lr.set_ylabel("learning rate")
    lr.set_xlabel(LABELS[x])
    lr.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    loss.legend(frameon=False)
    for axes in (loss, lr):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    return figure


def moving_mean(values: list[float], width: int) -> list[float]:
    """Mean over the last `width` values (fewer at the start)."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


if __name__ == "__main__":
    run_script(main)
