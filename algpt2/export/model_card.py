"""What a checkpoint takes out into the world: the model's code, a card, an upload to the hub.

The trainers call `complete_checkpoint` on every checkpoint. Such a folder loads where this project
is not installed:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Its README.md is a model card made from run.json, metrics.jsonl and evaluation.json.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, describe
from ..evaluation.results import checkpoint_rows, public_name, public_names
from ..options import ReportOptions
from ..runs.checkpoints import (
    CARD_FILE,
    METRICS_FILE,
    RUN_FILE,
    STATE_FILE,
    checkpoint_folders,
    checkpoint_name,
    step_of,
)
from ..runs.report import read_json_lines, send_table
from ..runs.tracker import run_name
from ..system.console import is_main_process, log, markdown_table
from ..system.files import is_plain_file, read_record, write_json, write_text

CARD_HEAD = "<!-- written from run.json; --eval_only and the next checkpoint write it again -->"
MODEL_FILES = ("configuration_algpt2.py", "kernels_algpt2.py", "modeling_algpt2.py")
# Files of the run, not of the model.
NOT_UPLOADED = ("optimizer*", STATE_FILE, ".*")
MEASURE_COLUMNS = ["text", "measure", "value", "unit"]
VAL_METRICS = {
    "val_loss": ("loss", "nats per token"),
    "val_ppl": ("perplexity", "per token"),
    "val_word_ppl": ("word perplexity", "per word, line ends counted"),
    "val_bpb": ("bits per byte", "of UTF-8 text"),
}


def complete_checkpoint(folder: Path, save_dir: Path, step: int) -> None:
    """Add model code, tokenizer limit and card to a checkpoint that is being written."""
    add_model_code(folder)
    limit_tokenizer(folder)
    try_card(folder, save_dir, step)


def try_card(folder: Path, save_dir: Path, step: int) -> None:
    """`write_card`; if it fails, warn with the reason instead."""
    if (save_dir / RUN_FILE).is_file():
        try:
            write_card(folder, save_dir, step)
        except UserError as error:  # the checkpoint is worth more than its card
            log(f"warning: no {CARD_FILE} with {folder.name}: {error}")


def add_model_code(folder: Path) -> None:
    """Put the model's code beside the weights of an ALGPT2, and `auto_map` into config.json."""
    from ..configuration_algpt2 import AUTO_MAP  # which imports torch where it is installed

    path = folder / "config.json"
    config = _read_object(path)
    if config.get("model_type") != "algpt2":
        return
    for name in MODEL_FILES:
        shutil.copyfile(Path(__file__).parents[1] / name, folder / name)
    write_json(path, dict(sorted((config | {"auto_map": AUTO_MAP}).items())))


def limit_tokenizer(folder: Path) -> None:
    """Have the tokenizer of a GPT-2 or ALGPT2 truncate, and warn, where the positions end."""
    path = folder / "tokenizer_config.json"
    model, tokenizer = _read_object(folder / "config.json"), _read_object(path)
    if tokenizer and "n_positions" in model:
        write_json(path, tokenizer | {"model_max_length": model["n_positions"]})


def _read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty object if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# --- the card ------------------------------------------------------------------------------------


def write_card(folder: Path, save_dir: Path, step: int) -> None:
    """Write README.md into the checkpoint `folder` of the run in `save_dir`.

    A README.md without our first line, which a person wrote or changed, is left alone.

    Raises:
        UserError: run.json or metrics.jsonl is damaged.
    """
    path = folder / CARD_FILE
    is_card = is_plain_file(path) and CARD_HEAD.encode() in path.read_bytes()
    if os.path.lexists(path) and not is_card:
        return
    run = read_record(save_dir / RUN_FILE, required=False)
    lines = read_json_lines(save_dir / METRICS_FILE)
    validated = [x for x in lines if "val_loss" in x and x["step"] <= step][-1:]
    try:
        measures = [*validation_measures(run, validated[0])] if validated else []
        measures += checkpoint_rows(save_dir, checkpoint_name(step))
        text = card_text(run_name(save_dir, run), run, step, measures)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{save_dir / RUN_FILE} is damaged: {describe(error)}") from error
    write_text(path, text.encode(errors="replace").decode())  # a name may not be UTF-8


def publish_evaluation(folder: Path | None, report: ReportOptions) -> None:
    """Carry what `--eval_only` measured on a checkpoint on: into its card, to W&B, to the hub.

    Args:
        folder: of the checkpoint, or None for a model of the hub. Only runs have cards.
    """
    if folder is None or not is_main_process():
        return
    save_dir = folder.parent
    if folder in checkpoint_folders(save_dir) and (save_dir / RUN_FILE).is_file():
        step = step_of(folder.name)
        write_card(folder, save_dir, step)
        rows = [
            [folder.name, text, measure, float(value), unit]
            for text, measure, value, unit in checkpoint_rows(save_dir, folder.name)
        ]
        send_table(save_dir, report, "evaluation", ["checkpoint", *MEASURE_COLUMNS], rows, step)
    push_to_hub(folder, report.push_to_hub)


def validation_measures(run: dict[str, Any], line: dict[str, Any]) -> Iterator[list[str]]:
    """Rows (text, measure, value, unit) of the last evaluation during training."""
    name = public_names(run["options"]["data"]["val_path"])
    rows = run["options"]["data"].get("n_eval_rows")
    last = line["step"] >= run["steps"]
    before = [(f"{name}, before training", run["before"])] if "before" in run else []
    name += "" if last or not rows else f" ({rows} rows)"
    for text, values in (*before, (f"{name}, step {line['step']:,}", line)):
        for key, (measure, unit) in VAL_METRICS.items():
            if key in values:
                yield [text, measure, f"{values[key]:.4f}", unit]


def card_text(name: str, run: dict[str, Any], step: int, measures: list[list[str]]) -> str:
    """The card: the hub's metadata, then model, how to load it, training, evaluation."""
    from huggingface_hub import ModelCardData

    config, own = run.get("model", {}), run.get("model", {}).get("model_type") == "algpt2"
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", model_name=name,
        tags=[config.get("model_type", "causal-lm"), *run["options"]["report"]["tags"]],
        datasets=sorted({
            path.split(":")[1] for path in run["options"]["data"]["train_path"]
            if path.startswith("hf:")
        }) or None,
    )  # fmt: skip
    code = ", trust_remote_code=True" if own else ""
    parts = [
        f"---\n{data.to_yaml()}\n---\n{CARD_HEAD}", f"# {name}", model_sentence(run, own),
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_NAME"{code})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_NAME"{code})\n'
        'pipeline("text-generation", model=model, tokenizer=tokenizer)("The")\n```',
        f"## Training\n\n{markdown_table([['', ''], *training_facts(run, step)])}",
    ]  # fmt: skip
    if measures:
        parts.append(f"## Evaluation\n\n{markdown_table([MEASURE_COLUMNS, *measures])}")
    return "\n\n".join(parts) + "\n"


def model_sentence(run: dict[str, Any], own: bool) -> str:
    """Architecture, size and context in a sentence."""
    config = run.get("model", {})
    size = f"{run['parameters']:,} parameters" if "parameters" in run else "A model"
    if not own:
        return f"{size}, model type `{config.get('model_type', 'unknown')}`."
    return (
        f"{size}: ALGPT2, GPT-2 with {config['num_hidden_groups']} stored block(s) applied in "
        f"{config['n_layer']} layers, {config['n_embd']} wide, embedding size "
        f"{config['embedding_size']}, vocabulary {config['vocab_size']:,}, context "
        f"{config['n_positions']:,} tokens ({run['virtual_parameters']:,} parameters if each layer "
        "had its own block)."
    )


def training_facts(run: dict[str, Any], step: int) -> list[list[str]]:
    """Rows (fact, value) out of run.json."""
    options, optim = run["options"], run["options"]["optim"]
    start = options["model"].get("checkpoint") or options["model"].get("init_from")
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    schedule = f"{optim['lr_schedule']}, {optim['warmup_steps']:,} warm-up steps"
    facts = {
        "text": public_names(options["data"]["train_path"]),
        "starts from": public_name(start or "random weights"),
        "steps": f"{step:,} of {run['steps']:,}",
        "tokens": f"{step * run['tokens_per_step']:,}, {run['tokens_per_step']:,} a step",
        "optimizer": f"{optim['optimizer']}, peak learning rate {run['peak_lr']:g}, {schedule}",
        "weight decay": f"{optim['weight_decay']:g}",
        "seed": f"{optim['seed']}",
        "machine": run["machine"],
        "versions": versions,
        "code": f"commit {run['git_commit']}" if run["git_commit"] else "unknown",
    }
    return [[name, value] for name, value in facts.items()]


# --- the hub -------------------------------------------------------------------------------------


def check_hub(name: str | None) -> None:
    """`UserError`, before hours of work, unless somebody is logged in (name None: no upload)."""
    if name is None:
        return
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # the client, its HTTP library or the network raise anything
        raise UserError(_refused(name, error)) from None


def push_to_hub(folder: Path, name: str | None) -> None:
    """Upload a checkpoint folder, without optimizer state, as the private model `name`.

    Raises:
        UserError: offline, not logged in, or no right to write there.
    """
    if name is None or not is_main_process():
        return
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, ignore_patterns=list(NOT_UPLOADED),
            commit_message=folder.name,
        )  # fmt: skip
    except Exception as error:
        raise UserError(_refused(name, error)) from None
    log(f"{folder} is {url}")


def _refused(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"--push_to_hub {name}: the hub cannot be written to ({reason}): expected a network and "
        "a login (`hf auth login`); then repeat the command, checkpoints are kept"
    )
