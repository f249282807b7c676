"""Every config folder at its full size through export_gpt2.py: are transformers' logits ours?

    python3 benchmarks/export_configs.py                      # 7 GB of memory, 13 of disk
    python3 benchmarks/export_configs.py --configs algpt2 --n_tokens 1024

Weights are random, biases and norms too, which an untrained model has at zero and one; ids are
random. `GPT2LMHeadModel` gets the exported folder and nothing else. Exit code 1 above 1e-4.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from harness import ROOT, save

import export_gpt2
from algpt2 import ALGPT2Config, ALGPT2LMHeadModel
from algpt2.system.console import table

TOLERANCE = 1e-4  # of a logit, absolute
INITIALIZER_RANGE = 0.06  # three times the usual: logits nearer to those of a trained model
CONFIGS = tuple(sorted(path.parent.name for path in ROOT.glob("algpt2/*/config.json")))


@dataclass(frozen=True)
class Options:
    """What is exported."""

    configs: tuple[str, ...] = CONFIGS  # folders in algpt2/
    n_tokens: int = 256  # of a row; there are two


def main(argv: Sequence[str] | None = None) -> int:
    """Export one after the other, save and print the table; 1 if a logit differs."""
    options = tyro.cli(Options, args=argv, use_underscores=True)
    transformers.utils.logging.disable_progress_bar()
    results, lines = {}, [["", "parameters", "exported", "largest logit", "largest difference"]]
    for name in options.configs:
        with tempfile.TemporaryDirectory() as work:
            results[name] = result = compare(name, Path(work), options.n_tokens)
        counts = [f"{result[key]:,}" for key in ("parameters", "exported")]
        lines.append([name, *counts, f"{result['logit']:.1f}", f"{result['difference']:.1e}"])
    save("export_configs", {"n_tokens": options.n_tokens, "configs": results})
    print(table(lines))
    return int(any(not result["difference"] <= TOLERANCE for result in results.values()))


def compare(name: str, work: Path, n_tokens: int) -> dict[str, Any]:
    """The same ids through the model of a config and through its export; one is in memory."""
    source, out = work / "algpt2", work / "gpt2"
    own = ROOT / "algpt2" / name
    model = random_model(ALGPT2Config.from_pretrained(own, initializer_range=INITIALIZER_RANGE))
    ids = torch.randint(model.config.vocab_size, (2, min(n_tokens, model.config.n_positions)))
    parameters, expected = model.num_parameters(), logits(model, ids)
    model.save_pretrained(source)
    del model
    tokenizer = own if (own / "tokenizer.json").exists() else ROOT / "algpt2" / "algpt2-tokenizer"
    for path in (tokenizer / "tokenizer.json", tokenizer / "tokenizer_config.json"):
        shutil.copy(path, source)
    export_gpt2.main([str(source), str(out)])
    shutil.rmtree(source)
    exported = transformers.GPT2LMHeadModel.from_pretrained(out, dtype=torch.float32)
    difference = (logits(exported, ids) - expected).abs().max().item()
    return {
        "parameters": parameters, "exported": exported.num_parameters(),
        "logit": expected.abs().max().item(), "difference": difference,
    }  # fmt: skip


def random_model(config: ALGPT2Config) -> ALGPT2LMHeadModel:
    """The model as it starts, its biases and norms moved by 0.1."""
    torch.manual_seed(0)
    model = ALGPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits (2, T, V) without dropout."""
    return model.eval()(ids, use_cache=False).logits


if __name__ == "__main__":
    sys.exit(main())
