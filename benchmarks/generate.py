"""Speed of sampling: with and without KV cache, against transformers' GPT-2 of the same shape.

    python3 benchmarks/generate.py                        # algpt2/gpt2 and algpt2/algpt2, batch 1
    python3 benchmarks/generate.py --configs algpt2-tiny --batch_size 8 --rounds 3

Greedy `generate` of `--new_tokens` after a random prompt, weights random, float32 on a CPU. The
contestants alternate within one process; medians and ratios over the rounds.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro
from harness import save

from algpt2.system.console import table


@dataclass(frozen=True)
class Options:
    """What is measured."""

    configs: tuple[str, ...] = ("gpt2", "algpt2")  # each against GPT2LMHeadModel of its shape
    batch_size: int = 1  # texts at a time
    prompt_tokens: int = 32  # of each
    new_tokens: int = 96  # of each
    rounds: int = 5  # measurements of each contestant, after one that does not count
    threads: int | None = None  # default: torch's


def main(argv: Sequence[str] | None = None) -> None:
    """Measure alternately, print and save the table."""
    options = tyro.cli(Options, args=argv, use_underscores=True)
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    lines, results = [["", "tokens/s", "ratio"]], {}
    for config in options.configs:
        contestants = build(config)
        speeds: dict[str, list[float]] = {name: [] for name in contestants}
        for round_ in range(options.rounds + 1):
            for name, (model, use_cache) in contestants.items():
                speed = measure(model, use_cache, options)
                if round_:
                    speeds[name].append(speed)
                    print(f"{config} round {round_}: {name} {speed:.1f} tokens/s", flush=True)
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        results[config] = {"runs": speeds, "medians": medians}
        base = medians["GPT2LMHeadModel, KV cache"]
        lines += [[f"{config}: {k}", f"{v:.1f}", f"{v / base:.2f}"] for k, v in medians.items()]
    print(table(lines))
    save("generate", results)


def build(config: str) -> dict[str, tuple[Any, bool]]:
    """Name -> (model, use_cache)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from algpt2.configuration_algpt2 import ALGPT2Config
    from algpt2.export.convert import GPT2_KEYS
    from algpt2.modeling_algpt2 import ALGPT2LMHeadModel
    from algpt2.runs.start import find_config_folder

    torch.manual_seed(0)
    ours = ALGPT2Config.from_pretrained(find_config_folder(config))
    model = ALGPT2LMHeadModel(ours).eval()
    # The same shape as far as GPT-2 goes: its own head and as many blocks as layers.
    stock = GPT2LMHeadModel(GPT2Config(**{k: getattr(ours, k) for k in GPT2_KEYS})).eval()
    return {
        "ALGPT2LMHeadModel, KV cache": (model, True),
        "ALGPT2LMHeadModel, no cache": (model, False),
        "GPT2LMHeadModel, KV cache": (stock, True),
    }


def measure(model: Any, use_cache: bool, options: Options) -> float:
    """New tokens per second of one call of `generate`."""
    import torch

    shape = (options.batch_size, options.prompt_tokens)
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    start_s = time.perf_counter()
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=use_cache,
        max_new_tokens=options.new_tokens, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    seconds = time.perf_counter() - start_s
    return (result.shape[1] - options.prompt_tokens) * options.batch_size / seconds


if __name__ == "__main__":
    main()
