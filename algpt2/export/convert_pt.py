"""Checkpoint folders in and out of `convert.py`: export as stock GPT-2, start from one."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.numpy import save_file
from torch import nn
from transformers import GenerationConfig, GPT2Config
from transformers.utils import SAFE_WEIGHTS_NAME as WEIGHTS_FILE

from ..configuration_algpt2 import ALGPT2Config
from ..errors import UserError, describe, untied_warning
from ..modeling_algpt2 import ALGPT2LMHeadModel
from ..runs.checkpoints import STATE_FILE, find_checkpoint
from ..system.console import log
from ..system.memory import check_memory
from ..tokenization_algpt2 import NoTokenizerError, TextTokenizer, load_tokenizer, set_token_ids
from .convert import Tensors, check_start, gpt2_config, gpt2_tensors, start_tensors
from .model_card import limit_tokenizer


def load_weights(cls: Any, source: Path | str) -> nn.Module:
    """The model of a checkpoint, whole: what its config.json says, with every weight of the file.

    A head that config.json ties to the token table is the token table, whatever the file holds.

    Raises:
        UserError: the file lacks a weight, or has more layers.
    """
    # Never a pickle: a .bin file is refused, even where safetensors are missing.
    model, found = cls.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"the weights in {source} lack {missing[0]} ({len(missing)} in all): expected those of "
            "its config.json"
        )
    known = {re.sub(r"\d+", "0", name) for name in model.state_dict()}
    extra = sorted(n for n in found["unexpected_keys"] if re.sub(r"\d+", "0", n) in known)
    if extra:
        raise UserError(
            f"the weights in {source} hold {extra[0]} ({len(extra)} in all), of which its "
            "config.json does not know: expected the number of layers of the file"
        )
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    if untied := sorted(ties.keys() - model.all_tied_weights_keys.keys()):
        log(untied_warning(source, untied[0], ties[untied[0]]))
        model.all_tied_weights_keys = ties
        model.tie_weights()
    return model


def load_as_gpt2(source: str) -> tuple[GPT2Config, Tensors]:
    """Configuration and weights of the stock GPT-2 that equals an ALGPT2 or GPT-2 checkpoint.

    Args:
        source: folder of a checkpoint, verified by the caller, or a name on the hub.
    Raises:
        UserError: `source` is not there, damaged, or of another model.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        config = ALGPT2Config.from_pretrained(source)
        check_memory(config.stored_parameters())
        model = load_weights(ALGPT2LMHeadModel, source)
    except UserError:
        raise
    except Exception as error:  # a damaged file can make transformers raise anything
        place = "" if Path(source).exists() else "no such folder, and from the hub: "
        reason = place + describe(error)[:500]
        raise UserError(f"cannot load an ALGPT2 or GPT-2 from {source}: {reason}") from error
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return GPT2Config(**gpt2_config(model.config)), gpt2_tensors(model.config, tensors)


def export_gpt2(checkpoint: str, out: Path, *, overwrite: bool = False) -> GPT2Config:
    """Write an ALGPT2 as a stock GPT-2: configuration, weights and tokenizer (if there is one), all
    or nothing.

    Raises:
        UserError: `checkpoint` holds no ALGPT2, `out` is a checkpoint of a run, or `out` is not
            empty (unless `overwrite`).
        OSError: there is no space or no permission.
    """
    if (out / STATE_FILE).exists() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is a checkpoint of a run or a file: expected a folder of its own")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty: choose another folder, or --overwrite its files")
    source = find_checkpoint(Path(checkpoint), log) if Path(checkpoint).exists() else checkpoint
    config, tensors = load_as_gpt2(str(source))
    tokenizer = own_tokenizer(str(source))
    if tokenizer is not None:
        set_token_ids(tokenizer.token_ids, config)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        config.save_pretrained(partial)
        GenerationConfig.from_model_config(config).save_pretrained(partial)
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors lets only the owner read the file; an export is for everyone.
        (partial / WEIGHTS_FILE).chmod((partial / "config.json").stat().st_mode)
        if tokenizer is not None:
            tokenizer.save(partial)
        limit_tokenizer(partial)
        out.mkdir(parents=True, exist_ok=True)
        for path in partial.iterdir():
            path.replace(out / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def own_tokenizer(source: str) -> TextTokenizer | None:
    """The tokenizer of a checkpoint; None, and a line that says so, for weights alone."""
    try:
        return load_tokenizer(source)
    except NoTokenizerError as error:
        log(f"the export has no tokenizer: {error}")
        return None


def start_model(model: Any, source: str, blocks: Sequence[str]) -> None:
    """Give an ALGPT2 the first weights of `--init_from`; see `start_tensors`.

    Raises:
        UserError: `model` is not an ALGPT2, or `source` and `model` do not fit together.
    """
    if not isinstance(model, ALGPT2LMHeadModel):
        raise UserError("--init_from starts an ALGPT2: expected a --config of this family")
    config, tensors = load_as_gpt2(source)
    check_start(config, model.config)
    start = start_tensors(config, tensors, model.config, blocks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(start[name]))
