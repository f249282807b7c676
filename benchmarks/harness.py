"""What the benchmarks share: the results' folder, and training measured in alternation.

Machines are noisy, so contestants alternate and medians over the rounds are compared. Each
measurement has a process of its own: its peak memory is ru_maxrss.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from algpt2.shards.tfrecords import FORMAT_VERSION, Manifest, open_rows, write_manifest, write_shard

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    """What is measured."""

    configs: tuple[str, ...] = ("gpt2", "algpt2")  # shapes
    batch_size: int = 4  # rows
    seq_len: int = 256  # tokens a row
    steps: int = 5  # timed steps a measurement, after two that are not
    rounds: int = 3  # measurements of each contestant
    measure: str | None = None  # internal: one measurement, CONTESTANT:CONFIG


def alternate(script: str, config: str, contestants: list[str], options: Options) -> dict[str, Any]:
    """Every contestant once a round: all results and their medians."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for round_ in range(options.rounds):
        for name in contestants:
            runs[name].append(run_measurement(script, name, config, options))
            print(f"{config} round {round_ + 1}: {name} {runs[name][-1]}", flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    return {"runs": runs, "medians": medians}


def run_measurement(
    script: str, contestant: str, config: str, options: Options
) -> dict[str, float]:
    """One measurement in a fresh process."""
    flags = [
        f"--batch_size={options.batch_size}",
        f"--seq_len={options.seq_len}",
        f"--steps={options.steps}",
    ]
    command = [sys.executable, script, f"--measure={contestant}:{config}", *flags]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{contestant} failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def answer(measures: dict[str, Callable[[str, Options], Any]], options: Options) -> None:
    """Print what `--measure CONTESTANT:CONFIG` asks for."""
    contestant, config = str(options.measure).split(":")
    print(json.dumps(measures[contestant](config, options)))


def save(name: str, results: dict[str, Any]) -> None:
    """Write every number beside the benchmarks."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def make_tokens(vocab_size: int, options: Options) -> np.ndarray:
    """Random rows (64, seq_len + 1), the same for every contestant."""
    shape = (64, options.seq_len + 1)
    return np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.uint16)


def write_shards(folder: str, shards: Iterable[np.ndarray], vocab_size: int) -> None:
    """A folder of packed shards, one for each array of rows (n, seq_len + 1), uint16."""
    written = []
    for i, rows in enumerate(shards):
        written.append(write_shard(Path(folder, f"{i}.tfrecord"), rows))
    seq_len = rows.shape[1] - 1
    n_tokens = seq_len * sum(shard.rows for shard in written)
    manifest = Manifest(
        format_version=FORMAT_VERSION, seq_len=seq_len, dtype="uint16", vocab_size=vocab_size,
        eot_id=vocab_size - 1, tokenizer_sha256="0" * 64, sources=[], options={},
        shards=tuple(written), documents=1, text_bytes=1, words=1, line_ends=1, tokens=1 + n_tokens,
        left_over_tokens=0, dropped_rows=0, duplicates=0, encoder={},
    )  # fmt: skip
    write_manifest(Path(folder), manifest)


def time_steps(step: Callable[[], Any], options: Options) -> dict[str, float]:
    """Median over `options.steps` calls of `step`, after two calls that do not count."""
    seconds = []
    for _ in range(options.steps + 2):
        start_s = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start_s)
    return result(seconds[2:], options)


def result(seconds: list[float], options: Options) -> dict[str, float]:
    """Median speed and the peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    tokens = options.batch_size * options.seq_len
    return {"tokens_per_s": tokens / statistics.median(seconds), "peak_gb": peak}


def no_dropout(config: str) -> Any:
    """The configuration of that name without dropout."""
    from algpt2.configuration_algpt2 import ALGPT2Config
    from algpt2.runs.start import find_config_folder

    rates = dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)
    return ALGPT2Config.from_pretrained(find_config_folder(config), **rates)


def measure_train_pt(config: str, options: Options) -> dict[str, float]:
    """`train_step` as train_pt.py runs it."""
    import torch

    from algpt2.modeling_algpt2 import ALGPT2LMHeadModel
    from algpt2.options import OptimOptions, TrainOptions
    from algpt2.shards.batches import RowInputs
    from algpt2.system.processes_pt import start_processes
    from algpt2.training.optimizers_pt import build_optimizer
    from algpt2.training.trainer_pt import Trainer

    optim = OptimOptions(batch_size=options.batch_size, lr=1e-4)
    train_options = TrainOptions(optim=optim)
    processes = start_processes(train_options)
    torch.manual_seed(0)
    model = ALGPT2LMHeadModel(no_dropout(config)).to(processes.device)
    optimizers = build_optimizer(model, optim, optim.lr)
    vocab_size = model.config.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, [make_tokens(vocab_size, options)], vocab_size)
        rows = open_rows(folder)
        inputs = RowInputs(rows, train_options, processes)
        trainer = Trainer(model, optimizers, train_options, processes, inputs, 10**6)
        return time_steps(lambda: trainer.train_step(), options)
