"""What sharing blocks costs GPT-2, and what brings it back: many small runs of train_pt.py.

    python3 benchmarks/quality.py list                               # rows, and what is done
    python3 benchmarks/quality.py run shared cycle-2 --data_dir DATA # these rows
    python3 benchmarks/quality.py run --all --data_dir DATA --jobs 2 # every row
    python3 benchmarks/quality.py collect                            # finished runs to Markdown/
    python3 benchmarks/quality.py table                              # of Markdown/runs/quality
    python3 benchmarks/quality.py figure --out frontier.png

The protocol. All arms of a scale read the same tokens in the same order, with the same tokenizer,
batch, context and number of steps; dropout is 0 unless the row says otherwise. The learning rate
rises linearly over the first 5 % of the steps and falls linearly to 0 at the last (the best of the
usual schedules at a fixed number of steps: arXiv:2502.15938). Weight decay is 0.1 on matrices,
clipping at 1, AdamW's betas are 0.9 and 0.95. Each arm has its own peak learning rate: a sweep in
factors of two starts at the rate of its scale and goes on until the best rate has a worse one on
either side, so it has at least three. A row that carries a claim runs its best rate with further
seeds (weights and data order). The loss is that of all validation rows after the last step.

DATA holds train* and validation* in any format that make_tfrecords.py reads. Per scale, a
byte-level BPE tokenizer is trained on the training text.

A run is a folder of train_pt.py below --runs_dir. Repeat the command and unfinished runs go on;
finished runs, here or in Markdown/runs/quality, are skipped. Rows are in quality_rows.py,
architectures that ALGPT2Config does not have in quality_models.py.
"""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from algpt2.errors import EXIT_NON_FINITE, EXIT_STOPPED, UserError
from algpt2.runs.report import METRICS_FILE, RUN_FILE, read_json_lines
from algpt2.shards.tfrecords import MANIFEST_FILE
from algpt2.system.console import table
from algpt2.system.files import CHECKSUM, read_record, write_record
from algpt2.system.script import run_script
from benchmarks.quality_rows import SCALES, Row, rows

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "Markdown" / "runs" / "quality"
SEED = 42  # of every sweep; further seeds count up from it
LINES = 60  # of metrics.jsonl that are committed, about
EVALUATIONS, EVAL_ROWS = 8, 256  # of a run, on so many rows; the last is on all
DIVERGED = "diverged"  # a file beside run.json if the loss became NaN or infinite
NAME = re.compile(r"(?P<row>.+)-lr(?P<lr>[0-9.e-]+)-seed(?P<seed>\d+)")


@dataclass(frozen=True)
class Options:
    """Train, list, tabulate and draw the rows of quality_rows.py."""

    command: tyro.conf.Positional[Literal["list", "run", "collect", "table", "figure"]]
    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="ROW")] = ()
    """rows to run"""
    all: bool = False  # run every row
    lr: float | None = None  # run this peak learning rate only, no sweep
    scale: Literal["tiny", "S", "M", "L"] = "S"  # see quality_rows.py
    data_dir: str | None = None  # folder with train* and validation*; needed once to run
    runs_dir: str = "runs/quality"  # where runs are made and continue
    committed: str = str(COMMITTED)  # finished runs, thinned: what table and figure read
    jobs: int = 1  # runs at a time
    threads: int = 1  # of a run, on a CPU
    device: str | None = None  # of train_pt.py; several small runs share a GPU well
    max_minutes: float | None = None  # save and stop so long after the start; run again to go on
    out: str = "runs/quality/frontier.png"  # the figure


def main(argv: Sequence[str] | None = None) -> int | None:
    """Do what the command line says; exit code 1 if a run failed."""
    options = tyro.cli(Options, args=argv, use_underscores=True)
    study = Study(options)
    if options.command == "run":
        return study.run()
    if options.command == "collect":
        study.collect()
    elif options.command == "list":
        print(study.listing())
    elif options.command == "table":
        print(study.table())
    else:
        draw(options)
    return None


# --- runs and what came of them ------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training: a row with a peak learning rate and a seed."""

    row: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.row}-lr{self.lr:g}-seed{self.seed}"

    @classmethod
    def parse(cls, name: str) -> "Run | None":
        """Inverse of `name`; None for a folder that is no run."""
        found = NAME.fullmatch(name)
        return cls(found["row"], float(found["lr"]), int(found["seed"])) if found else None


def read_result(folder: Path) -> dict[str, Any] | None:
    """The numbers of a finished run, from its run.json and the last line of its metrics.jsonl;
    None if it is not finished."""
    if not (folder / RUN_FILE).is_file():
        return None
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    facts = {key: run.get(key) for key in ("parameters", "virtual_parameters", "flops_per_token")}
    if (folder / DIVERGED).exists():
        return facts | dict.fromkeys(("val_loss", "val_ppl", "val_bpb"), math.inf) | {"tokens": 0}
    path = folder / METRICS_FILE
    lines = read_json_lines(path) if path.is_file() else []
    if not lines or lines[-1]["step"] != run["steps"] or "val_loss" not in lines[-1]:
        return None
    speed = statistics.median(line["tokens_per_s"] for line in lines)
    return facts | lines[-1] | {"tokens_per_s": speed}


def next_rates(losses: dict[float, float], start: float) -> list[float]:
    """Learning rates to try next: `start`, half and twice of it, then on beyond the best until it
    has a worse one on either side; none: the sweep is over."""
    best = min(losses, key=losses.__getitem__) if start in losses else start
    return [lr for lr in (best, 2 * best, best / 2) if lr not in losses]


class Study:
    """The runs of one scale."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.scale = SCALES[options.scale]
        self.rows = rows(self.scale)
        if unknown := [name for name in options.names if name not in self.rows]:
            raise UserError(f"unknown row {unknown[0]!r}: expected one of {', '.join(self.rows)}")
        self.runs_dir = Path(options.runs_dir).resolve() / options.scale
        self.committed = Path(options.committed).resolve() / options.scale
        self.children: set[subprocess.Popen] = set()
        self.end_s = math.inf  # on the clock of time.monotonic

    def results(self, *folders: Path) -> dict[Run, dict[str, Any]]:
        """Finished runs in the committed folder and the one where runs are made."""
        found = {}
        for folder in folders or (self.committed, self.runs_dir):
            for path in sorted(folder.glob("*-lr*-seed*")):
                run, result = Run.parse(path.name), read_result(path)
                if run and result:
                    found[run] = result
        return found

    # --- which runs are to be made ---------------------------------------------------------------

    def wanted(self, row: Row, results: dict[Run, dict[str, Any]]) -> list[Run]:
        """Runs that a row still lacks: of its sweep, then of the best rate with other seeds."""
        needed = [name for name in (row.start, row.teacher) if name]
        if any(self.best_run(name, results) is None for name in needed):
            return []
        if self.options.lr is not None:
            run = Run(row.name, self.options.lr, SEED)
            return [] if run in results else [run]
        losses = rate_losses(row.name, results)
        rates = next_rates(losses, self.first_rate(row))
        if rates:
            return [Run(row.name, lr, SEED) for lr in rates]
        best = min(losses, key=losses.__getitem__)
        seeds = [Run(row.name, best, SEED + i) for i in range(1, row.seeds)]
        return [run for run in seeds if run not in results]

    def best_run(self, name: str, results: dict[Run, dict[str, Any]]) -> Run | None:
        """The best run of a row whose sweep is over and whose weights are here."""
        losses = rate_losses(name, results)
        if not losses or next_rates(losses, self.first_rate(self.rows[name])):
            return None
        run = Run(name, min(losses, key=losses.__getitem__), SEED)
        return run if (self.runs_dir / run.name / RUN_FILE).exists() else None

    def first_rate(self, row: Row) -> float:
        """Where the sweep of a row starts."""
        return row.lr or self.scale.lr[row.optimizer]

    def queue(self, results: dict[Run, dict[str, Any]]) -> list[Run]:
        """Runs to make, in the order of the rows, first seeds first."""
        chosen = self.rows.values() if self.options.all else map(self.rows.get, self.options.names)
        runs = [run for row in chosen for run in self.wanted(row, results)]
        return sorted(runs, key=lambda run: run.seed)

    # --- making them -----------------------------------------------------------------------------

    def run(self) -> int | None:
        """Make runs until none is left; one that fails is left out, the others go on."""
        if not (self.options.all or self.options.names):
            raise UserError("expected names of rows, or --all; quality.py list shows them")
        self.prepare()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
        self.end_s = time.monotonic() + 60 * (self.options.max_minutes or math.inf)
        busy: dict[Any, Run] = {}
        left: dict[Run, int] = {}  # exit code of those that did not finish
        pool = ThreadPoolExecutor(self.options.jobs)
        try:
            while True:
                taken = {*busy.values(), *left}
                ready = [run for run in self.queue(self.results()) if run not in taken]
                if left and time.monotonic() > self.end_s:
                    ready = []
                for run in ready[: self.options.jobs - len(busy)]:
                    busy[pool.submit(self.train, run)] = run
                if not busy:
                    break
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    run, code = busy.pop(future), future.result()
                    left |= {run: code} if code else {}
        finally:
            self.stop()
            pool.shutdown()
        for run, code in left.items():
            print(f"{run.name}: exit code {code}, see {self.runs_dir / run.name}.log")
        return 1 if {*left.values()} - {EXIT_STOPPED} else None

    def stop(self) -> None:
        """Have the runs save and end."""
        for child in [*self.children]:
            child.terminate()

    def train(self, run: Run) -> int:
        """One run, new or continued; its exit code, 0 if it finished or diverged."""
        print(f"{run.name}: start", flush=True)
        threads, path = str(self.options.threads), str(ROOT)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}
        with (self.runs_dir / f"{run.name}.log").open("a") as log:
            # In a session of its own: a signal to the group would reach it twice, and a second one
            # ends a run before it has saved.
            child = subprocess.Popen(
                self.command(run), cwd=self.runs_dir, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            self.children.add(child)
            code = child.wait()
            self.children.discard(child)
        if code == EXIT_NON_FINITE:
            (self.runs_dir / run.name / DIVERGED).touch()
            code = 0
        result = read_result(self.runs_dir / run.name) or {}
        loss = f", val_loss {result['val_loss']:.4f}" if result else ""
        print(f"{run.name}: exit code {code}{loss}", flush=True)
        return code

    def command(self, run: Run) -> list[str]:
        """The command line of a run; its paths are relative to the folder of the scale."""
        row, scale = self.rows[run.row], self.scale
        config = scale.config() | row.config
        if row.teacher:
            config["teacher"] = self.best_run(row.teacher, self.results()).name
        folder = self.runs_dir / "configs" / row.name
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=1) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        n_steps = max(1, round(scale.n_steps * row.share))
        flags = {
            "config": f"configs/{row.name}", "save_dir": run.name, "seed": run.seed,
            "tokenizer": "tokenizer", "train_path": "train", "val_path": "validation",
            "optimizer": row.optimizer, "lr": run.lr, "lr_schedule": "linear",
            "warmup_steps": round(scale.warmup * n_steps), "max_steps": n_steps,
            "batch_size": scale.batch_size, "n_eval_rows": EVAL_ROWS,
            "eval_steps": math.ceil(n_steps / EVALUATIONS), "keep_last": 1, "wandb": "off",
            "logging_steps": 10,
        }  # fmt: skip
        if self.options.max_minutes:
            flags["max_minutes"] = max(1e-3, (self.end_s - time.monotonic()) / 60)
        if row.start:
            flags["init_from"] = self.best_run(row.start, self.results()).name
        if self.options.device:
            flags |= {"device": self.options.device, "precision": scale.precision}
        flags |= row.flags
        given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "benchmarks.quality_models", *given, *scale.flags]

    def prepare(self) -> None:
        """Tokenizer and shards of the scale, once."""
        self.runs_dir.mkdir(parents=True, exist_ok=True)
        if (self.runs_dir / "validation" / MANIFEST_FILE).exists():
            return
        if self.options.data_dir is None:
            raise UserError("expected --data_dir FOLDER with train* and validation*, got none")
        data = Path(self.options.data_dir).resolve()
        sizes = str(self.scale.vocab_size), str(self.scale.seq_len)
        self.script("train_tokenizer.py", "--train_path", f"{data}/train*",
                    "--save_path", "tokenizer", "--vocab_size", sizes[0])  # fmt: skip
        # No more rows than a run reads: at S they are 16 MB, which travel to any machine.
        n_rows = str(self.scale.n_steps * self.scale.batch_size)
        for split, more in (("train", ["--n_examples", n_rows]), ("validation", [])):
            self.script("make_tfrecords.py", "--path", f"{data}/{split}*", "--save_path", split,
                        "--tokenizer", "tokenizer", "--seq_len", sizes[1], *more)  # fmt: skip

    def script(self, name: str, *flags: str) -> None:
        """Run a script of the repository in the folder of the scale."""
        done = subprocess.run([sys.executable, str(ROOT / name), *flags], cwd=self.runs_dir)
        if done.returncode:
            raise UserError(f"{name} could not prepare scale {self.options.scale}: see above")

    # --- reports ---------------------------------------------------------------------------------

    def collect(self) -> None:
        """Copy finished runs, thinned and without checkpoints, to the committed folder."""
        for run in self.results(self.runs_dir):
            source, target = self.runs_dir / run.name, self.committed / run.name
            target.mkdir(parents=True, exist_ok=True)
            record = read_record(source / RUN_FILE)
            script, _, flags = record["command"].partition(" ")
            record["command"] = f"{Path(script).name} {flags}"
            del record[CHECKSUM]
            write_record(target / RUN_FILE, record)
            if (source / DIVERGED).exists():
                (target / DIVERGED).touch()
            lines = thinned(read_json_lines(source / METRICS_FILE))
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (target / METRICS_FILE).write_text(text, encoding="utf-8")

    def listing(self) -> str:
        """Every row, and the runs that it has and lacks."""
        results = self.results()
        lines = [["row", "finished", "lacks", "what it is"]]
        for row in self.rows.values():
            n_done = sum(run.row == row.name for run in results)
            n_lacks = len(self.wanted(row, results))
            lines.append([row.name, str(n_done), str(n_lacks), row.about])
        return table(lines, left=["what it is"])

    def table(self) -> str:
        """The best rate of every row with its seeds, and the loss of each rate."""
        summaries = summarize(self.results(self.committed), self.rows)
        heading = ["row", "stored", "virtual", "MFLOP/token", "Mtokens", "loss", "seeds", "ppl",
                   "to unshared", "bits/byte", "lr", "tokens/s", "loss by lr"]  # fmt: skip
        lines = [heading]
        for s in summaries.values():
            base = summaries.get(s["reference"])
            gap = f"{100 * math.expm1(s['val_loss'] - base['val_loss']):+.1f} %" if base else "-"
            by_rate = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in sorted(s["losses"].items()))
            lines.append([
                s["row"], f"{s['parameters']:,}", f"{s['virtual_parameters']:,}",
                f"{s['flops_per_token'] / 1e6:.2f}", f"{s['tokens'] / 1e6:.1f}",
                f"{s['val_loss']:.4f}", f"{s['seeds']} ({s['spread']:.4f})",
                f"{math.exp(s['val_loss']):.2f}", gap, f"{s['val_bpb']:.4f}", f"{s['lr']:g}",
                f"{s['tokens_per_s']:,.0f}", by_rate,
            ])  # fmt: skip
        return table(lines, left=["loss by lr"])


def rate_losses(row: str, results: dict[Run, dict[str, Any]]) -> dict[float, float]:
    """Loss of each learning rate of a row's sweep."""
    return {
        run.lr: result["val_loss"]
        for run, result in results.items()
        if run.row == row and run.seed == SEED
    }


def summarize(
    results: dict[Run, dict[str, Any]], known: dict[str, Row]
) -> dict[str, dict[str, Any]]:
    """For each row its best rate: numbers averaged over the seeds, and the range of their losses.

    Rows that the table of rows no longer has come last.
    """
    names = [*known, *sorted({run.row for run in results} - {*known})]
    summaries = {}
    for name in names:
        losses = rate_losses(name, results)
        if not losses:
            continue
        lr = min(losses, key=losses.__getitem__)
        seeds = [result for run, result in results.items() if (run.row, run.lr) == (name, lr)]
        mean = {key: statistics.fmean(s[key] for s in seeds) for key in ("val_loss", "val_bpb")}
        values = [s["val_loss"] for s in seeds]
        row = known.get(name, Row(name, ""))
        summaries[name] = seeds[0] | mean | {
            "row": name, "lr": lr, "seeds": len(seeds), "spread": max(values) - min(values),
            "losses": losses, "group": row.group, "reference": reference(row),
        }  # fmt: skip
        if row.start:
            summaries[name]["tokens"] /= row.share  # those of `start`, too
    return summaries


def reference(row: Row) -> str:
    """Name of the unshared model that a row is compared with: of the same optimizer."""
    flags = "-no-momentum" if row.flags.get("beta1") == "0" else ""
    return "unshared" if row.optimizer == "AdamW" else f"unshared-{row.optimizer.lower()}{flags}"


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some `LINES` of the lines of metrics, evenly spaced, and those with an evaluation."""
    step = max(1, math.ceil(len(lines) / (LINES - EVALUATIONS)))
    return [line for i, line in enumerate(lines) if i % step == 0 or "val_loss" in line]


# --- the figure ----------------------------------------------------------------------------------


def draw(options: Options) -> None:
    """Validation loss against stored parameters and against training FLOPs, one column a scale."""
    from matplotlib.figure import Figure  # not pyplot: needs no display

    found = {}
    for name in SCALES:
        study = Study(Options("figure", scale=name, committed=options.committed))
        summaries = summarize(study.results(study.committed), study.rows)
        if summaries:
            found[name] = [s for s in summaries.values() if math.isfinite(s["val_loss"])]
    if not found:
        raise UserError(f"no finished runs in {options.committed}: quality.py collect copies them")
    figure = Figure(figsize=(7 * len(found), 9), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    for column, (name, summaries) in enumerate(found.items()):
        for summary in summaries:
            summary["flops"] = summary["flops_per_token"] * summary["tokens"]
        axes[0, column].set_title(f"scale {name}: {summaries[0]['tokens'] / 1e6:.0f}M tokens")
        draw_panel(axes[0, column], summaries, "parameters", "stored parameters")
        draw_panel(axes[1, column], summaries, "flops", "training FLOPs")
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"written to {path}")


def draw_panel(axes: Any, summaries: list[dict[str, Any]], x: str, label: str) -> None:
    """Every row a point with the range of its seeds, the unshared models a line. Names stand at
    those, and at what is best for its size among the rest."""
    colors = {"baseline": "C7", "shared": "C0", "other": "C1"}
    points = {group: [(s[x], s["val_loss"]) for s in summaries if s["group"] == group]
              for group in colors}  # fmt: skip
    named = {*points["baseline"], *frontier(points["shared"] + points["other"])}
    for s in summaries:
        point, color = (s[x], s["val_loss"]), colors[s["group"]]
        axes.errorbar(*point, s["spread"] / 2, fmt="o", color=color, markersize=4)
        if point in named:
            axes.annotate(s["row"], point, xytext=(4, 2), textcoords="offset points",
                          fontsize=7, color=color)  # fmt: skip
    if line := frontier(points["baseline"]):
        axes.plot(*zip(*line, strict=True), color=colors["baseline"], linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, from left to right."""
    best, found = math.inf, []
    for x, y in sorted(points):
        if y < best:
            best = y
            found.append((x, y))
    return found


if __name__ == "__main__":
    run_script(main)
