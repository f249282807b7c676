"""A training run in formulas: the weights, rows and options behind golden_losses.txt.

Both frameworks must give its ten losses. After a change that is meant to change them, write the
losses that `python3 -m pytest tests/training/test_trainer_pt.py -k golden` found into the file,
and say why in the commit.
"""

from pathlib import Path

import numpy as np
from helpers import Rows

FILE = Path(__file__).parent / "golden_losses.txt"
CONFIG = {
    "vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 4, "n_head": 3,
    "embedding_size": 12, "num_hidden_groups": 2, "bos_token_id": 60, "eos_token_id": 60,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
ROWS = Rows((np.arange(4 * 17).reshape(4, 17) ** 2 % 59).astype(np.uint16))
OPTIM = {"lr": 2e-2, "batch_size": 4, "warmup_steps": 2, "lr_schedule": "cosine"}


def weights(shapes):
    """An array for each name: sines, scaled as an initialisation is, norms around one."""
    arrays = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        wave = np.sin(np.arange(np.prod(shape)) * (1 + i / 7) + i).reshape(shape)
        is_norm = ".ln_" in name and name.endswith("weight")
        arrays[name] = (0.1 * wave + is_norm).astype(np.float32)
    return arrays


def losses():
    """The ten numbers of the file."""
    lines = FILE.read_text().splitlines()
    return [float(line) for line in lines if not line.startswith("#")]
