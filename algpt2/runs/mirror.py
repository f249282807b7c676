"""A run at a URL (`--save_dir gs://...`): it is written to a folder here and copied to the URL.

    at the start     the newest whole checkpoint of both places is brought here
    a checkpoint     the files of the run and its own are copied, its marker last: now it counts
    old checkpoints  are removed there as here, the marker first
    at the end       what could not be copied before is copied

The folder here is in the cache (`remote.local_folder`); it may be lost at any moment. Process 0
copies; on other machines each process fetches the checkpoint to continue from.
"""

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError, describe
from ..options import ReportOptions
from ..system.console import is_main_process, log
from ..system.files import is_plain_file, locked, remove
from ..system.remote import RemotePath, as_path, is_remote, local_folder
from .checkpoints import (
    FILES_OF_RUN,
    LINE_FILES,
    LOCK_FILE,
    RUN_FILE,
    STATE_FILE,
    Checkpoint,
    checkpoint_folders,
    checkpoint_name,
    is_checkpoint_name,
    newest_checkpoint,
    outdated_steps,
    read_checkpoint,
    step_of,
)

FILES = (RUN_FILE, *LINE_FILES)  # of a run, beside its checkpoints


def copy_or_warn(report: ReportOptions, step: int) -> bool:
    """Copy to the URL what it lacks (process 0); a failure is a warning, and False.

    Args:
        step: of the run. A checkpoint that claims to be newer is not of this run: it stays, here
            and there.
    """
    if not is_remote(report.save_dir) or not is_main_process():
        return True
    try:
        _copy(local_folder(report.save_dir), as_path(report.save_dir), report, step)
    except OSError as error:
        folder = local_folder(report.save_dir)
        log(f"warning: {describe(error)}; the next checkpoint tries again, {folder} has everything")
        return False
    return True


def checkpoint_here(checkpoint: Checkpoint, save_dir: str) -> Checkpoint:
    """The checkpoint that process 0 continues from, as this process reads it.

    Raises:
        UserError, OSError: it is not in the folder that all machines share, or, with a URL, neither
            here nor there.
    """
    if is_main_process():
        return checkpoint
    if not is_remote(save_dir):
        return read_checkpoint(checkpoint.folder)
    folder = local_folder(save_dir) / checkpoint.folder.name
    here = read_checkpoint(_fetch(as_path(save_dir) / folder.name, folder, checkpoint.state))
    if here.state != checkpoint.state:
        raise UserError(f"{as_path(save_dir) / folder.name} is not the checkpoint of process 0")
    return here


def fetch_checkpoint(path: str) -> str:
    """A user's path of a run or a checkpoint; of a URL, the folder here that its files, or those
    of its newest checkpoint, are fetched to.

    Raises:
        UserError, OSError: there is none, or it cannot be fetched.
    """
    if not is_remote(path):
        return path
    there = as_path(path)
    if steps := _complete_steps(there.files()):
        newest = _fetch_newest(there, local_folder(path), steps)
        if newest is None:
            raise UserError(f"no complete checkpoint at {there}, {len(steps)} damaged")
        return str(newest)
    if not (there / "config.json").is_file():
        raise UserError(f"no checkpoint at {path}: expected config.json or checkpoint-* in it")
    if not is_checkpoint_name(there.name):
        return str(_fetch(there, local_folder(path)))
    return str(_fetch(there, local_folder(there.url.rpartition("/")[0]) / there.name))


def sync_from_url(report: ReportOptions, folder: Path, overwrite: bool) -> None:
    """Download the run's newest complete checkpoint, unless the local copy is as new.

    Raises:
        UserError: the URL holds something else, or only damaged checkpoints.
        RemoteError: the URL cannot be read or written.
    """
    home = as_path(report.save_dir)
    files = home.files()
    if RUN_FILE not in files:
        refuse_others(home, files)
    (home / LOCK_FILE).put(folder / LOCK_FILE)  # said now, not at the first checkpoint
    if overwrite:
        _remove(home, [name for name in files if _is_of_run(name)])
        return
    if RUN_FILE not in files:
        return
    run_id = _id((home / RUN_FILE).read_bytes())
    if run_id is None:
        raise UserError(
            f"{home / RUN_FILE} is damaged: bring it back, or choose another --save_dir"
        )
    if run_id != _id_here(folder):
        _set_aside(folder)
    here, steps = _newest_here(folder), _complete_steps(files)
    newer = [step for step in steps if step > here]
    if here >= 0 and not newer:
        copy_or_warn(report, here)  # what is newer here: other machines fetch it from there
        return
    for name in FILES:
        remove(folder / name)
        if name in files:
            (home / name).get(folder / name)
    if _fetch_newest(home, folder, newer) is None and steps and here < 0:
        raise UserError(
            f"no complete checkpoint at {home}, {len(steps)} damaged: bring one back, choose "
            "another --save_dir, or --overwrite to start anew"
        )


def refuse_others(save_dir: Path | RemotePath, names: Iterable[str]) -> None:
    """`UserError` if a folder without run.json holds files that are not hidden."""
    if others := sorted(name for name in names if not name.startswith(".")):
        raise UserError(
            f"save_dir {save_dir} holds other files ({', '.join(others[:3])}) and no {RUN_FILE}: "
            "expected an empty folder or a run; choose another --save_dir"
        )


def _fetch_newest(home: RemotePath, folder: Path, steps: list[int]) -> Path | None:
    """The newest whole checkpoint of `steps`, here; each newer, broken one is named."""
    for step in reversed(steps):
        name = checkpoint_name(step)
        try:
            return _fetch(home / name, folder / name)
        except UserError as error:
            log(f"warning: {describe(error)}; looking for an older checkpoint")
    return None


def _copy(folder: Path, home: RemotePath, report: ReportOptions, step: int) -> None:
    """Copy to `home` what it lacks of the run in `folder`, and remove what is not kept.

    Raises:
        OSError: the store fails, or another run has come there.
    """
    if not (folder / RUN_FILE).exists():
        return
    files = home.files()
    if RUN_FILE in files and _id((home / RUN_FILE).read_bytes()) != _id_here(folder):
        raise OSError(f"{home} has been taken by another run: nothing is copied there")
    lacking = [
        path for path in checkpoint_folders(folder)
        if step_of(path.name) <= step and is_plain_file(path / STATE_FILE)
        and not _is_copy(path, home / path.name)
    ]  # fmt: skip
    # First, as it makes the folder known as a run's; and a checkpoint that counts has its lines.
    for name in FILES:
        if (folder / name).exists():
            (home / name).put(folder / name)
    for path in lacking:
        (home / path.name / STATE_FILE).unlink(missing_ok=True)
        for file in sorted(path.iterdir()):
            if file.name != STATE_FILE:
                (home / path.name / file.name).put(file)
        (home / path.name / STATE_FILE).put(path / STATE_FILE)
    _prune(home, report, step)


def _prune(home: RemotePath, report: ReportOptions, step: int) -> None:
    """Remove the checkpoints up to `step` that are not kept, and what is left of older ones."""
    files = home.files()
    complete = [complete for complete in _complete_steps(files) if complete <= step]
    outdated = outdated_steps(complete, report.keep_last, report.milestone_steps)
    folders = {name.partition("/")[0] for name in files}
    for name in filter(is_checkpoint_name, folders if complete else ()):
        is_rest = step_of(name) < complete[-1] and step_of(name) not in complete
        if is_rest or step_of(name) in outdated:
            _remove(home, [file for file in files if file.startswith(f"{name}/")])


def _remove(home: RemotePath, names: list[str]) -> None:
    """Remove files, markers first: what is removed in part does not count; run.json last."""
    order = {STATE_FILE: 0, RUN_FILE: 2}
    for name in sorted(names, key=lambda name: order.get(Path(name).name, 1)):
        (home / name).unlink(missing_ok=True)


def _fetch(there: RemotePath, folder: Path, state: dict[str, Any] | None = None) -> Path:
    """Download a checkpoint: `folder` is whole, every checksum verified, or not there at all.

    Args:
        state: of the wanted one; if it is in `folder`, nothing is asked of the store.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / ".fetch.lock"):  # the others find what this process fetches
        if _is_whole(folder, there, state):
            return folder
        partial = folder.with_name(f".{folder.name}.partial")
        remove(partial)
        partial.mkdir()
        for name in _names(there):
            (there / name).get(partial / name)
        if is_checkpoint_name(folder.name) or (partial / STATE_FILE).exists():
            try:
                read_checkpoint(partial)
            except UserError as error:
                raise UserError(describe(error).replace(str(partial), str(there))) from None
        remove(folder)
        partial.rename(folder)
    return folder


def _is_whole(folder: Path, there: RemotePath, state: dict[str, Any] | None) -> bool:
    """Whether `folder` is what is `there`, all of its checksums verified."""
    if not folder.is_dir():
        return False
    if not (folder / STATE_FILE).exists() and not is_checkpoint_name(folder.name):  # any model
        here = {path.name: path.stat().st_size for path in folder.iterdir()}
        return _of_model(here) == _of_model(_names(there))
    with contextlib.suppress(UserError):  # a damaged one is fetched again
        here = read_checkpoint(folder)
        return here.state == state if state else _is_copy(folder, there)
    return False


def _names(there: RemotePath) -> dict[str, int]:
    """Names and sizes of the files of a checkpoint."""
    return {n: size for n, size in there.files().items() if "/" not in n and n[0] != "."}


def _of_model(files: dict[str, int]) -> dict[str, int]:
    """Those of some files that are a model's: its evaluation here is not of the copy."""
    return {n: size for n, size in files.items() if n[0] != "." and n not in FILES_OF_RUN}


def _is_copy(folder: Path, there: RemotePath) -> bool:
    """Whether both places have the same marker, which has the checksums of all files."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / STATE_FILE).read_bytes() == (there / STATE_FILE).read_bytes()
    return False


def _newest_here(folder: Path) -> int:
    """Step of the newest whole checkpoint in a folder; -1 if it has none."""
    with contextlib.suppress(UserError):
        if newest := newest_checkpoint(folder, log):
            return newest.step
    return -1


def _complete_steps(files: dict[str, int]) -> list[int]:
    """Steps of the checkpoints that have a marker, in order."""
    folders = [name.partition("/") for name in files]
    return sorted(
        step_of(name) for name, _, file in folders
        if is_checkpoint_name(name) and file == STATE_FILE
    )  # fmt: skip


def _is_of_run(name: str) -> bool:
    top = name.partition("/")[0]
    return top in FILES_OF_RUN or top.startswith(".") or is_checkpoint_name(top)


def _id(run: bytes) -> Any:
    """What tells a run.json from that of any other run; None if it is damaged."""
    with contextlib.suppress(ValueError, AttributeError):
        return json.loads(run).get("wandb_id")
    return None


def _id_here(folder: Path) -> Any:
    return _id((folder / RUN_FILE).read_bytes()) if (folder / RUN_FILE).is_file() else None


def _set_aside(folder: Path) -> None:
    """Move what a folder holds of another run beside it: it may be all that is left of that."""
    paths = [path for path in folder.iterdir() if path.name != LOCK_FILE]
    if not paths:
        return
    aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    log(f"warning: {folder} held another run than the URL: moved to {aside}")
