"""Speed and memory of a training step: this project against transformers' Trainer.

    python3 benchmarks/train_pt.py             # algpt2/gpt2 and algpt2/algpt2, 4 x 256, float32
    python3 benchmarks/train_pt.py --configs algpt2-tiny --rounds 3

One process a measurement, the contestants alternate, medians and ratios over the rounds: machines
are noisy. Every contestant trains on the same tokens with AdamW, clipping at 1, no dropout.
Peak memory is that of the process (ru_maxrss), in a process that did nothing else.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from algpt2.evaluation import table  # noqa: E402  (after the path)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    configs: tuple[str, ...] = ("gpt2", "algpt2")  # each against GPT2LMHeadModel of its shape
    batch_size: int = 4  # rows
    seq_len: int = 256  # tokens a row
    steps: int = 5  # timed steps a measurement, after two that are not
    rounds: int = 3  # measurements of each contestant
    measure: str | None = None  # internal: one measurement, CONTESTANT:CONFIG


def main(argv: Sequence[str] | None = None) -> None:
    """Measure alternately, print and save the table."""
    options = tyro.cli(Options, args=argv, use_underscores=True)
    if options.measure:
        contestant, config = options.measure.split(":")
        print(
            json.dumps(
                {"ours": measure_ours, "Trainer": measure_trainer}[contestant](config, options)
            )
        )
        return
    lines = [["", "tokens/s", "ratio", "peak GB", "ratio"]]
    results = {}
    for config in options.configs:
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "Trainer": []}
        for round_ in range(options.rounds):
            for contestant in runs:
                runs[contestant].append(run_measurement(contestant, config, options))
                print(
                    f"{config} round {round_ + 1}: {contestant} {runs[contestant][-1]}", flush=True
                )
        medians = {
            name: {k: statistics.median(x[k] for x in r) for k in r[0]} for name, r in runs.items()
        }
        results[config] = {"runs": runs, "medians": medians}
        base = medians["Trainer"]
        for name, label in (
            ("ours", f"train_pt.py, {config}"),
            ("Trainer", "Trainer, GPT2LMHeadModel"),
        ):
            line = [label]
            for unit, digits in (("tokens_per_s", 0), ("peak_gb", 2)):
                value = medians[name][unit]
                line += [f"{value:.{digits}f}", f"{value / base[unit]:.2f}"]
            lines.append(line)
    print(table(lines))
    path = ROOT / "benchmarks" / "results" / "train_pt.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def run_measurement(contestant: str, config: str, options: Options) -> dict[str, float]:
    """One measurement in a fresh process."""
    flags = [
        f"--batch_size={options.batch_size}",
        f"--seq_len={options.seq_len}",
        f"--steps={options.steps}",
    ]
    command = [sys.executable, __file__, f"--measure={contestant}:{config}", *flags]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def measure_ours(config: str, options: Options) -> dict[str, float]:
    """`train_step` as train_pt.py runs it."""
    import torch

    from algpt2 import training_pt
    from algpt2.checkpoints import find_config_folder
    from algpt2.configuration_algpt2 import ALGPT2Config
    from algpt2.modeling_algpt2 import ALGPT2LMHeadModel
    from algpt2.options import OptimOptions, TrainOptions

    optim = OptimOptions(batch_size=options.batch_size, lr=1e-4)
    train_options = TrainOptions(optim=optim)
    processes = training_pt.start_processes(train_options)
    model_config = ALGPT2Config.from_pretrained(find_config_folder(config))
    model_config.attn_pdrop = model_config.embd_pdrop = model_config.resid_pdrop = 0.0
    torch.manual_seed(0)
    model = ALGPT2LMHeadModel(model_config).to(processes.device)
    optimizers = training_pt.build_optimizer(model, optim, optim.lr)
    rows = FakeRows(make_tokens(model_config.vocab_size, options), options.seq_len)
    trainer = training_pt.Trainer(model, optimizers, train_options, processes, rows, 10**6)
    seconds = []
    for _ in range(options.steps + 2):
        start_s = time.perf_counter()
        training_pt.train_step(trainer)
        seconds.append(time.perf_counter() - start_s)
    return result(seconds[2:], options)


def measure_trainer(config: str, options: Options) -> dict[str, float]:
    """`transformers.Trainer` with GPT2LMHeadModel of the same shape, its own loss and loader."""
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from algpt2.checkpoints import find_config_folder
    from algpt2.configuration_algpt2 import ALGPT2Config

    ours = ALGPT2Config.from_pretrained(find_config_folder(config))
    model_config = GPT2Config(
        vocab_size=ours.vocab_size, n_positions=ours.n_positions, n_embd=ours.n_embd,
        n_layer=ours.n_layer, n_head=ours.n_head, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=ours.bos_token_id, eos_token_id=ours.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(model_config)
    tokens = torch.from_numpy(make_tokens(model_config.vocab_size, options)[:, :-1]).long()
    data = [{"input_ids": row, "labels": row} for row in tokens]
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=options.batch_size, max_steps=options.steps + 2,
            learning_rate=1e-4, weight_decay=0.1, adam_beta2=0.95, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=[Clock()]).train()
    seconds = [end - start for start, end in zip(times[::2], times[1::2], strict=True)]
    return result(seconds[2:], options)


def make_tokens(vocab_size: int, options: Options) -> "object":
    """Random rows (64, seq_len + 1), the same for every contestant."""
    import numpy as np

    shape = (64, options.seq_len + 1)
    return np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.uint16)


class FakeRows:
    """Rows in memory with what `train_step` reads of a manifest."""

    def __init__(self, tokens: "object", seq_len: int) -> None:
        self.tokens, self.manifest = tokens, type("Manifest", (), {"seq_len": seq_len})

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, ids: "object") -> "object":
        return self.tokens[ids]


def result(seconds: list[float], options: Options) -> dict[str, float]:
    """Median speed and the peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    tokens = options.batch_size * options.seq_len
    return {"tokens_per_s": tokens / statistics.median(seconds), "peak_gb": peak}


if __name__ == "__main__":
    main()
