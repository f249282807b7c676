"""What several tests share: rows in memory, command lines, what a run leaves behind."""

import json
from types import SimpleNamespace

import numpy as np

# Of six steps with a checkpoint at 3 and 6, and samples.
RUN_FILES = [
    ".lock", "checkpoint-00000003", "checkpoint-00000006", "metrics.jsonl", "run.json",
    "samples.jsonl",
]  # fmt: skip
CHECKPOINT_FILES = [
    "README.md", "config.json", "configuration_algpt2.py", "generation_config.json",
    "kernels_algpt2.py", "merges.txt", "model.safetensors", "modeling_algpt2.py",
    "optimizer.safetensors", "tokenizer.json", "tokenizer_config.json", "training_state.json",
    "vocab.json",
]  # fmt: skip


class Rows:
    """Rows in memory, tokens (n, seq_len + 1), and of the manifest what a trainer reads."""

    def __init__(self, tokens):
        self.tokens, self.manifest = tokens, SimpleNamespace(seq_len=tokens.shape[1] - 1)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, ids):
        return self.tokens[ids]


def random_rows(n=24):
    """The same `n` rows of 16 tokens below 50 each time."""
    return Rows(np.random.default_rng(0).integers(0, 50, (n, 17)).astype(np.uint16))


def as_flags(options):
    """A command line: --name=value of each option but those that are None."""
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def metrics(save_dir, *names):
    """These values of each line of metrics.jsonl, None where a line has no such value."""
    lines = [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]
    return [[line.get(name) for name in names] for line in lines]


def final_bytes(save_dir, step=6):
    """Weights and optimizer state of the checkpoint at `step`."""
    folder = save_dir / f"checkpoint-{step:08}"
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]
