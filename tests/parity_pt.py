"""The PyTorch side of test_modeling_tf.py, run as a script: checkpoints and what comes of them.

For each case of CASES a folder with the checkpoint and outputs.npz: ids, logits, loss, gradients,
and greedy tokens. `python3 tests/parity_pt.py FOLDER`
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from algpt2 import ALGPT2Config, ALGPT2LMHeadModel

SHAPE = {
    "vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 4, "n_head": 4,
    "bos_token_id": 96, "eos_token_id": 96, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}  # fmt: skip
CASES = {
    "albert": {"embedding_size": 16},
    "two-groups": {"embedding_size": 16, "num_hidden_groups": 2},
    "layer-map": {"embedding_size": 16, "num_hidden_groups": 2, "layer_map": [0, 1, 1, 0]},
    "gpt2": {"num_hidden_groups": 4},
    "options": {
        "num_hidden_groups": 4, "scale_attn_by_inverse_layer_idx": True, "n_inner": 48,
        "scale_attn_weights": False, "activation_function": "relu", "tie_word_embeddings": False,
    },
}  # fmt: skip


def main(folder: Path) -> None:
    """Write every case, and files of others: a stock GPT-2, bare names, unindexed names."""
    for case, keys in CASES.items():
        torch.manual_seed(len(case))
        model = disturb(ALGPT2LMHeadModel(ALGPT2Config(**SHAPE, **keys)))
        write(model, folder / case)
    stock = disturb(GPT2LMHeadModel(GPT2Config(**SHAPE)))
    write(stock, folder / "stock")
    write(stock, folder / "bare")
    rename(folder / "bare", "transformer.", "")
    write(stock, folder / "sharded", max_shard_size="40KB")
    albert = ALGPT2LMHeadModel.from_pretrained(folder / "albert")
    write(albert, folder / "unindexed")
    rename(folder / "unindexed", ".h.0.", ".h.")


def disturb(model: torch.nn.Module) -> torch.nn.Module:
    """Noise on every parameter, so that nothing is equal by being zero, one, or tiny."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def write(model: torch.nn.Module, folder: Path, **how: str) -> None:
    """Checkpoint and outputs."""
    model.save_pretrained(folder, **how)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 96, (3, 25)))
    model.zero_grad()
    output = model.train()(ids[:, :-1], shift_labels=ids[:, 1:], labels=None, use_cache=False)
    if output.loss is None:  # transformers' GPT-2 wants labels
        output.loss = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), ids[:, 1:].flatten()
        )
    output.loss.backward()
    gradients = {f"gradient {n}": p.grad.numpy() for n, p in model.named_parameters()}
    np.savez(
        folder / "outputs.npz", ids=ids.numpy(), logits=output.logits.detach().numpy(),
        loss=output.loss.detach().numpy(), **gradients,
    )  # fmt: skip


def rename(folder: Path, old: str, new: str) -> None:
    """Other names in a weight file, and masks as old files have them."""
    path = folder / "model.safetensors"
    state = {name.replace(old, new): tensor for name, tensor in load_file(path).items()}
    prefix = next(name for name in state if name.endswith("attn.c_attn.weight"))
    state[prefix.replace("c_attn.weight", "bias")] = torch.ones(1, 1, 32, 32)
    state[prefix.replace("c_attn.weight", "masked_bias")] = torch.tensor(-1e4)
    save_file(state, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
