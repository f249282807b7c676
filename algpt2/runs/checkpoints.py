"""The names in a run's folder, and its checkpoints: markers, checksums, which are kept.

    save_dir/checkpoint-00001000/   config.json model.safetensors tokenizer.json ...
                                    optimizer.safetensors
                                    README.md, the model's code   see model_card.py
                                    training_state.json   written last: step, checksums, options

A checkpoint is valid only when `training_state.json` is there and every file it lists has the size
and the sha256 that it lists (README.md, for people, is not listed). Folders are filled under a
hidden name and renamed.
"""

import contextlib
import re
import reprlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..system.files import (
    CHECKSUM,
    describe_file,
    file_sha256,
    is_plain_file,
    read_record,
    remove,
    sync,
    write_record,
)

RUN_FILE, LOCK_FILE = "run.json", ".lock"
METRICS_FILE, SAMPLES_FILE = LINE_FILES = ("metrics.jsonl", "samples.jsonl")
EVALUATION_FILES = ("evaluation.json", "evaluation.md")
FILES_OF_RUN = {RUN_FILE, LOCK_FILE, *LINE_FILES, *EVALUATION_FILES}  # beside its checkpoints
STATE_FILE, OPTIMIZER_FILE, CARD_FILE = (
    "training_state.json", "optimizer.safetensors", "README.md",
)  # fmt: skip
FORMAT_VERSION = 2  # 1 had no checksum of the marker itself
MAX_STEP = 2**62
_FOLDER = re.compile(r"checkpoint-(\d{8,})", re.ASCII)


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
    save_dir: Path, step: int, fill: Callable[[Path], None], state: dict[str, Any],
    *, marker_only: bool = False,
) -> Path:  # fmt: skip
    """Write `save_dir/checkpoint-<step>` so that it is there whole or not at all.

    Args:
        fill: writes the files of the checkpoint into the folder that it is given.
        state: what `training_state.json` holds besides step, format version and checksums.
        marker_only: the folder already holds these weights: replace only training_state.json,
            atomically, so that a kill cannot take the newest checkpoint away. A folder that has
            lost a file is written anew.
    Raises:
        OSError: no space, no permission; nothing half-written stays behind.
    """
    folder = save_dir / checkpoint_name(step)
    if marker_only and (files := _files_of(folder)):
        _write_marker(folder, save_dir, step, state, files)
        return folder
    partial = save_dir / f".{folder.name}.partial"
    remove(partial)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        paths = [path for path in sorted(partial.iterdir()) if path.name != CARD_FILE]
        files = {path.name: _describe(path) for path in paths}
        _write_marker(partial, save_dir, step, state, files)
        if folder.exists():  # incomplete, or this step would not be written again
            shutil.rmtree(folder)
        partial.rename(folder)
        sync(save_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _write_marker(
    folder: Path, save_dir: Path, step: int, state: dict[str, Any], files: dict[str, Any]
) -> None:
    lines = {name: _describe(save_dir / name) for name in LINE_FILES if (save_dir / name).exists()}
    record = {"format_version": FORMAT_VERSION, "step": step, **state, "files": files}
    write_record(folder / STATE_FILE, record | {"lines": lines})


def _files_of(folder: Path) -> dict[str, Any]:
    """What the marker of a checkpoint lists, if all of it is there in its size; else nothing.

    The checksums were verified, or written, by this process: they are not read a second time.
    """
    with contextlib.suppress(UserError):
        return _read_marker(folder)[0]["files"]
    return {}


def newest_checkpoint(save_dir: Path, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None; each newer, broken one is named.

    Raises:
        UserError: there are checkpoints and all of them are broken.
    """
    folders = checkpoint_folders(save_dir)
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder)
        except UserError as error:
            warn(f"warning: {error}; looking for an older checkpoint")
    if folders:
        raise UserError(
            f"no complete checkpoint in {save_dir}, {len(folders)} damaged: bring one back, "
            "choose another --save_dir, or --overwrite to start anew"
        )
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every checksum verified.

    Raises:
        UserError: marker missing or damaged, a file missing, cut or changed, or a folder whose
            name is that of another step: names it.
    """
    state, expected = _read_marker(folder)
    for name, (_, digest) in expected.items():
        if file_sha256(folder / name) != digest:
            raise _damaged(folder / name)
    return Checkpoint(folder, state)


def _read_marker(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, str]]]:
    """training_state.json, and the bytes and sha256 of each file that it lists; all are there."""
    marker = folder / STATE_FILE
    if not is_plain_file(marker):
        raise UserError(f"{folder} is incomplete: it has no {STATE_FILE}")
    state = read_record(marker, required=False)
    version = state.get("format_version")
    if version not in (1, FORMAT_VERSION) or (version != 1 and CHECKSUM not in state):
        raise UserError(
            f"{marker} is damaged or of a newer version of ALGPT2: format_version "
            f"{reprlib.repr(version)}, expected {FORMAT_VERSION} and a {CHECKSUM}"
        )
    try:
        step, expected = state["step"], _expected(state["files"])
        _expected(state.get("lines", {}))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{marker} is damaged: expected step and files") from None
    if type(step) is not int or not 0 <= step < MAX_STEP or not expected:
        raise UserError(f"{marker} is damaged: step {reprlib.repr(step)}, {len(expected)} files")
    if is_checkpoint_name(folder.name) and folder.name != checkpoint_name(step):
        raise UserError(f"{folder} is not what its name says: it holds step {step}")
    for name, (n_bytes, _) in expected.items():
        path = folder / name
        if Path(name).name != name or "\0" in name or not is_plain_file(path):
            raise UserError(f"{folder} is incomplete: {name} is missing")
        if path.stat().st_size != n_bytes:
            raise _damaged(path)
    return state, expected


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: its checksum is not that of {STATE_FILE}")


def find_checkpoint(path: Path, warn: Callable[[str], None] = print) -> Path:
    """The folder to load weights from: `path` itself, or the newest complete one of a run.

    Raises:
        UserError: a run whose checkpoints are all broken, or a broken checkpoint.
    """
    if checkpoint_folders(path):
        return newest_checkpoint(path, warn).folder
    if is_checkpoint_name(path.name) or (path / STATE_FILE).exists():
        return read_checkpoint(path).folder
    return path


def checkpoint_name(step: int) -> str:
    """The name of the folder of a step."""
    return f"checkpoint-{step:08d}"


def step_of(name: str) -> int:
    """The step of a checkpoint's name."""
    return int(name.removeprefix("checkpoint-"))


def is_checkpoint_name(name: str) -> bool:
    """True for a name like checkpoint-00001000."""
    return _FOLDER.fullmatch(name) is not None


def checkpoint_folders(save_dir: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first, complete or not."""
    if not save_dir.is_dir():
        return []
    found = [path for path in save_dir.iterdir() if is_checkpoint_name(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path.name))


def prune_checkpoints(
    save_dir: Path, keep_last: int, milestone_steps: int | None, step: int
) -> None:
    """Remove all but the newest `keep_last` and every multiple of `milestone_steps`.

    Args:
        step: of the checkpoint just written. What claims to be newer is not of this run, and what
            has no marker is no checkpoint: neither is removed, or counted among the kept.
    """
    folders = {step_of(folder.name): folder for folder in checkpoint_folders(save_dir)}
    own = [n for n, folder in folders.items() if n <= step and is_plain_file(folder / STATE_FILE)]
    for outdated in outdated_steps(own, keep_last, milestone_steps):
        shutil.rmtree(folders[outdated])


def outdated_steps(steps: Sequence[int], keep_last: int, milestone_steps: int | None) -> list[int]:
    """Of the steps of checkpoints, in order, those that are not kept."""
    return [step for step in steps[:-keep_last] if not milestone_steps or step % milestone_steps]


def _expected(files: dict[str, dict[str, Any]]) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 of each file that a marker lists; `ValueError` and the like if damaged."""
    found = {name: (entry["bytes"], entry["sha256"]) for name, entry in dict(files).items()}
    if any(type(n) is not int or type(digest) is not str for n, digest in found.values()):
        raise ValueError
    return found


def _describe(path: Path) -> dict[str, Any]:
    sync(path)
    return dict(zip(("bytes", "sha256"), describe_file(path), strict=True))
