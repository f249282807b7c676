"""The checkpoint folder: one place that knows its name, its marker, its checksums and its age.

    save_dir/checkpoint-00001000/   config.json model.safetensors tokenizer.json ...
                                    optimizer.safetensors
                                    README.md, the model's code   see model_card.py
                                    training_state.json   written last: step, checksums, options

A folder counts only when `training_state.json` is there and every file it lists has the size and
the sha256 that it lists (README.md, for people, is not listed). Folders are filled under a hidden
name and renamed.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError

STATE_FILE, CARD_FILE = "training_state.json", "README.md"
FORMAT_VERSION = 1
_FOLDER = re.compile(r"checkpoint-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and the content of its `training_state.json`."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state["step"]


def write_checkpoint(
    save_dir: Path, step: int, fill: Callable[[Path], None], state: dict[str, Any]
) -> Path:
    """Write `save_dir/checkpoint-<step>` so that it is there whole or not at all.

    Args:
        fill: writes the files of the checkpoint into the folder that it is given.
        state: what `training_state.json` holds besides step, format version and checksums.
    Raises:
        OSError: no space, no permission; nothing half-written stays behind.
    """
    folder = save_dir / f"checkpoint-{step:08d}"
    partial = save_dir / f".{folder.name}.partial"
    from .model_card import complete_checkpoint  # which reads what the report writes

    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        complete_checkpoint(partial, save_dir, step)
        paths = [path for path in sorted(partial.iterdir()) if path.name != CARD_FILE]
        files = {path.name: _describe(path) for path in paths}
        record = {"format_version": FORMAT_VERSION, "step": step, **state, "files": files}
        write_json(partial / STATE_FILE, record)
        if folder.exists():  # incomplete, or this step would not be written again
            shutil.rmtree(folder)
        partial.rename(folder)
        _sync(save_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def newest_checkpoint(save_dir: Path, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None; each newer, broken one is named."""
    for folder in reversed(checkpoint_folders(save_dir)):
        try:
            return read_checkpoint(folder)
        except UserError as error:
            warn(f"warning: {error}; looking for an older checkpoint")
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every checksum verified.

    Raises:
        UserError: marker missing or unreadable, or a file missing, cut or changed: names it.
    """
    marker = folder / STATE_FILE
    try:
        state = json.loads(marker.read_text(encoding="utf-8"))
        step, files = state["step"], dict(state["files"])
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise UserError(f"{folder} is incomplete: it has no {STATE_FILE}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{marker} is damaged") from None
    if type(step) is not int or step < 0:
        raise UserError(f"{marker} is damaged: step {step!r}")
    for name, (n_bytes, digest) in expected.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise UserError(f"{folder} is incomplete: {name} is missing")
        if path.stat().st_size != n_bytes or _sha256(path) != digest:
            raise UserError(f"{path} is damaged: its checksum is not that of {STATE_FILE}")
    return Checkpoint(folder, state)


def find_checkpoint(path: Path, warn: Callable[[str], None] = print) -> Path:
    """The folder to load weights from: `path` itself, or the newest complete one of a run.

    Raises:
        UserError: a run whose checkpoints are all broken, or a broken checkpoint.
    """
    if checkpoint_folders(path):
        newest = newest_checkpoint(path, warn)
        if newest is None:
            raise UserError(f"no complete checkpoint in {path}")
        return newest.folder
    if _FOLDER.fullmatch(path.name) or (path / STATE_FILE).exists():
        return read_checkpoint(path).folder
    return path


def find_config_folder(name: str) -> Path:
    """The folder of a config: a path that has a config.json, or a name that ships with the code.

    Raises:
        UserError: neither; lists the names.
    """
    packaged = Path(__file__).parent
    for folder in (Path(name), packaged / name, packaged / Path(name).name):
        if (folder / "config.json").is_file():
            return folder
    names = ", ".join(sorted(path.parent.name for path in packaged.glob("*/config.json")))
    raise UserError(
        f"unknown config {name!r}: expected a folder with config.json or one of {names}"
    )


def checkpoint_folders(save_dir: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first, complete or not."""
    if not save_dir.is_dir():
        return []
    found = [path for path in save_dir.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def prune_checkpoints(save_dir: Path, keep_last: int, milestone_steps: int | None) -> None:
    """Remove all but the newest `keep_last` and every multiple of `milestone_steps`."""
    for folder in checkpoint_folders(save_dir)[:-keep_last]:
        if not milestone_steps or _step_of(folder) % milestone_steps:
            shutil.rmtree(folder)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` is there whole or not at all, also after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json_text(value))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def json_text(value: Any) -> str:
    """The very text that `write_json` writes."""
    return json.dumps(value, indent=2) + "\n"


def changed_options(
    old: dict[str, Any], new: dict[str, Any], ignore: Sequence[str] = ()
) -> list[str]:
    """`name: old -> new` for each option that differs, nested groups flattened."""
    changes = []
    for name in sorted({**old, **new}):
        before, after = old.get(name), new.get(name)
        if name in ignore or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_options(before, after, ignore)
        else:
            changes.append(f"{name}: {before} -> {after}")
    return changes


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _describe(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
