import json

import pytest

from algpt2.errors import UserError
from algpt2.options import changed_options
from algpt2.runs import checkpoints
from algpt2.runs.checkpoints import (
    checkpoint_folders,
    find_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from algpt2.runs.start import find_config_folder
from algpt2.system import files
from algpt2.system.files import write_json


def fill(folder):
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 4)
    (folder / "config.json").write_text("{}")


@pytest.fixture
def run(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, fill, {"note": step})
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_read(run):
    newest = newest_checkpoint(run)
    assert (newest.step, newest.state["note"]) == (3, 3)
    assert names(newest.folder) == ["config.json", "training_state.json", "weights.bin"]


@pytest.mark.parametrize("file", ["weights.bin", "config.json", "training_state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty", "link"])
def test_a_damaged_checkpoint_is_passed_over_and_named(run, file, damage):
    path = run / "checkpoint-00000003" / file
    data = path.read_bytes()
    path.unlink()
    if damage == "flip":
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 64]) + data[-1:])
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "link":
        (run / "elsewhere").write_bytes(data[:-2] + b"x}")
        path.symlink_to(run / "elsewhere")
    warnings = []
    # A marker that only lost its closing line end is still whole.
    harmless = file == "training_state.json" and damage == "cut"
    assert newest_checkpoint(run, warnings.append).step == (3 if harmless else 2)
    assert harmless or "checkpoint-00000003" in warnings[0]


def test_no_complete_checkpoint_among_damaged_ones_is_an_error(run):
    assert newest_checkpoint(run / "checkpoint-00000001") is None
    for folder in checkpoint_folders(run):
        (folder / "weights.bin").unlink()
    with pytest.raises(UserError, match=r"no complete checkpoint in .*, 3 damaged"):
        newest_checkpoint(run, lambda message: None)
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_checkpoint(run, lambda message: None)


def test_a_checkpoint_written_again_is_never_away(run, monkeypatch):
    """With --keep_last 1 it may be the only one."""

    def lose(*arguments, **more):
        raise AssertionError("a folder was removed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", lose)
        write_checkpoint(run, 3, lose, {"note": "again"}, marker_only=True)
    newest = newest_checkpoint(run)
    assert (newest.step, newest.state["note"]) == (3, "again")
    (run / "checkpoint-00000003" / "weights.bin").write_bytes(b"")
    write_checkpoint(run, 3, fill, {"note": "damaged since"}, marker_only=True)
    assert newest_checkpoint(run).state["note"] == "damaged since"


def test_a_failed_write_leaves_nothing(run):
    def full_disk(folder):
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_checkpoint(run, 4, full_disk, {})
    assert names(run) == [f"checkpoint-0000000{step}" for step in (1, 2, 3)]


def test_half_a_folder_never_has_the_final_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *args, **kwargs: None)

    def killed(folder):
        (folder / "weights.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 1, killed, {})
    assert names(tmp_path) == [".checkpoint-00000001.partial"]
    assert newest_checkpoint(tmp_path) is None


def test_pruning_keeps_the_newest_and_milestones(tmp_path):
    for step in range(1, 8):
        write_checkpoint(tmp_path, step, fill, {})
    prune_checkpoints(tmp_path, keep_last=2, milestone_steps=3, step=7)
    assert [read_checkpoint(f).step for f in checkpoint_folders(tmp_path)] == [3, 6, 7]


def test_what_is_no_checkpoint_of_the_run_takes_no_place_among_the_kept(run):
    (run / "checkpoint-00000099").mkdir()
    (run / "checkpoint-00000002" / "training_state.json").unlink()
    prune_checkpoints(run, keep_last=1, milestone_steps=None, step=3)
    assert names(run) == [f"checkpoint-000000{n}" for n in ("02", "03", "99")]


def test_a_folder_that_says_another_step_is_not_used(run):
    (run / "checkpoint-00000003").rename(run / "checkpoint-00000009")
    warnings = []
    assert newest_checkpoint(run, warnings.append).step == 2
    assert "checkpoint-00000009 is not what its name says: it holds step 3" in warnings[0]
    copied = (run / "checkpoint-00000002").rename(run / "best")  # a name of the user's
    assert read_checkpoint(copied).step == 2


def test_a_changed_marker_is_found_by_its_own_checksum(run):
    marker = run / "checkpoint-00000003" / "training_state.json"
    text = marker.read_text()
    for old, new in (('"note": 3', '"note": 4'), ('"sha256": "', '"sha257": "'),
                     ('"format_version": 2', '"format_version": 3')):  # fmt: skip
        assert old in text
        marker.write_text(text.replace(old, new))
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(marker.parent)


def test_a_checkpoint_of_the_first_format_is_read(run):
    marker = run / "checkpoint-00000003" / "training_state.json"
    state = json.loads(marker.read_text())
    del state["sha256"], state["lines"]
    marker.write_text(json.dumps(state | {"format_version": 1}))
    assert read_checkpoint(marker.parent).step == 3


def test_nothing_is_written_through_a_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    for name in ("run.json", ".run.json.partial"):
        (tmp_path / name).symlink_to(elsewhere)
    write_json(tmp_path / "run.json", {"a": 1})
    assert elsewhere.read_text() == "precious"
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1}


def test_more_than_99999999_steps_still_sort(tmp_path):
    for step in (99_999_999, 100_000_000):
        write_checkpoint(tmp_path, step, fill, {})
    assert newest_checkpoint(tmp_path).step == 100_000_000


@pytest.mark.parametrize("name", ["../weights.bin", "/etc/hostname", "sub/file"])
def test_a_marker_cannot_name_files_elsewhere(run, name):
    marker = run / "checkpoint-00000003" / "training_state.json"
    state = json.loads(marker.read_text())
    state["files"][name] = {"bytes": 1, "sha256": "0"}
    del state["sha256"]
    files.write_record(marker, state)
    with pytest.raises(UserError, match="missing"):
        read_checkpoint(marker.parent)


def test_a_marker_that_is_not_one_is_a_user_error(run):
    marker = run / "checkpoint-00000003" / "training_state.json"
    for text in ("", "null", "[]", "{", '{"step": "1", "files": {}}', '{"step": -1, "files": {}}',
                 '{"step": 1, "files": [1]}', "[" * 100_000):  # fmt: skip
        marker.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(marker.parent)


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_changed_options_are_named_with_both_values():
    old = {"optim": {"lr": 1, "seed": 1}, "report": {"tags": 1}}
    new = {"optim": {"lr": 2, "seed": 1}, "report": {"tags": 2}}
    assert changed_options(old, new, ["report"]) == ["lr: 1 -> 2"]
    assert changed_options(old, old) == []


def test_configs_are_found_by_name_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_config_folder("algpt2-tiny")
    assert find_config_folder(str(shipped)) == shipped
    with pytest.raises(UserError, match=r"unknown config 'gpt5'.*algpt2-tiny"):
        find_config_folder("gpt5")
    own = tmp_path / "algpt2-tiny"
    own.mkdir()
    (own / "config.json").write_text("{}")
    assert find_config_folder("algpt2-tiny").samefile(own)
