"""Folders at a URL: shards packed there, and what a store that fails leaves behind."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

import export_gpt2
import make_tfrecords
import plot_runs
import train_tokenizer
from algpt2.errors import UserError
from algpt2.system import remote
from algpt2.system.remote import RemoteError, RemotePath, local_folder

SCRIPT = Path(make_tfrecords.__file__)


@pytest.fixture
def pack(corpus, tokenizer_folder):
    """Run make_tfrecords.py on the corpus, into 5 shards."""

    def run(save_path, *flags):
        make_tfrecords.main(
            [
                "--path", str(corpus / "train"), "--save_path", str(save_path), "--seq_len", "16",
                "--tokenizer", str(tokenizer_folder), "--n_shards", "5", "--workers", "1", *flags,
            ]
        )  # fmt: skip

    return run


def contents(folder):
    """Every file of a folder on disk or at a URL."""
    if isinstance(folder, RemotePath):
        return {name: (folder / name).read_bytes() for name in folder.files()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("flags", [(), ("--valid_fraction", "0.3")])
def test_the_same_bytes_at_a_url_as_on_disk(pack, memory, tmp_path, capsys, flags):
    pack(tmp_path / "disk", *flags)
    pack("memory://bucket/shards/", *flags)
    there = RemotePath("memory://bucket/shards")
    assert contents(there) == contents(tmp_path / "disk")
    assert not local_folder("memory://bucket/shards").exists()
    capsys.readouterr()
    pack("memory://bucket/shards", *flags)
    assert "memory://bucket/shards is done" in capsys.readouterr().out
    with pytest.raises(UserError, match="memory://bucket/shards holds shards of another command"):
        pack("memory://bucket/shards", *flags, "--min_length", "3")
    assert contents(there) == contents(tmp_path / "disk")
    pack("memory://bucket/shards", "--overwrite", "--n_examples", "10")
    assert (there / "manifest.json").is_file() and not (there / "valid/manifest.json").is_file()


def test_verify_at_a_url_names_what_is_wrong(pack, memory, capsys):
    url = "memory://bucket/shards"
    pack(url)
    make_tfrecords.main(["--verify", url, "--workers", "1"])
    assert "is sound: 5 shards" in capsys.readouterr().out
    data = bytearray(memory.cat_file("/bucket/shards/1.tfrecord"))
    data[99] ^= 1
    memory.pipe_file("/bucket/shards/1.tfrecord", bytes(data))
    memory.rm_file("/bucket/shards/3.tfrecord")
    memory.pipe_file("/bucket/shards/7.tfrecord", b"foreign")
    with pytest.raises(UserError, match="3 problem"):
        make_tfrecords.main(["--verify", url, "--workers", "1"])
    printed = capsys.readouterr().out
    for line in ("1.tfrecord: 1 damaged", "3.tfrecord: missing", "7.tfrecord: not in manifest"):
        assert f"{url}/{line}" in printed
    with pytest.raises(UserError, match="missing or damaged: pack again"):
        pack(url)


@pytest.mark.parametrize("same_machine", [True, False])
def test_uploads_fail_and_the_command_goes_on(pack, memory, tmp_path, monkeypatch, same_machine):
    pack(tmp_path / "disk")
    whole, url, put = contents(tmp_path / "disk"), "memory://bucket/shards", RemotePath.put
    uploads = []

    def failing_put(self, local):
        uploads.append(self.name)
        assert len(list(local_folder(url).glob("*.tfrecord"))) <= 1  # those before it are gone
        if len(uploads) % 2 if same_machine else len(uploads) == 4:
            raise RemoteError("no network")
        put(self, local)

    monkeypatch.setattr(RemotePath, "put", failing_put)
    for _attempt in range(20):
        try:
            pack(url)
            break
        except RemoteError:
            there = contents(RemotePath(url))
            if there.pop(".packing/plan.json", None):
                assert there.items() <= whole.items()
                with pytest.raises(UserError, match="holds shards of another command"):
                    pack(url, "--no_use_control_codes")
        if not same_machine:
            shutil.rmtree(local_folder(url))
    assert contents(RemotePath(url)) == whole
    shards = [f"{i}.tfrecord" for i in range(5)]
    order = ["plan.json", *shards, "manifest.json"]
    # What is there stays there, but of another machine's shards nothing is known: the same again.
    again = [*order[:4], *shards, "manifest.json"]
    assert uploads == ([name for name in order for _ in range(2)] if same_machine else again)


def test_the_work_of_another_command_is_not_used(pack, memory, tmp_path, monkeypatch):
    url, put = "memory://bucket/shards", RemotePath.put

    def failing_put(self, local):
        if self.name == "3.tfrecord":
            raise RemoteError("no network")
        put(self, local)

    monkeypatch.setattr(RemotePath, "put", failing_put)
    with pytest.raises(RemoteError):
        pack(url)
    monkeypatch.setattr(RemotePath, "put", put)
    memory.store.clear()  # a user makes room for another command, which this machine does not know
    pack(url, "--no_use_control_codes")
    pack(tmp_path / "disk", "--no_use_control_codes")
    assert contents(RemotePath(url)) == contents(tmp_path / "disk")


def test_foreign_files_at_a_url_stay(pack, memory):
    memory.pipe_file("/bucket/shards/notes.txt", b"mine")
    for flags in ((), ("--overwrite",)):
        with pytest.raises(UserError, match=r"memory://bucket/shards holds other files \(notes"):
            pack("memory://bucket/shards", *flags)
    assert memory.find("/bucket") == ["/bucket/shards/notes.txt"]


def test_an_upload_that_arrives_changed_is_an_error(memory, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"whole")
    there = RemotePath("memory://bucket/file")
    monkeypatch.setattr(type(memory), "info", lambda *a, **k: {"size": 4, "type": "file"})
    with pytest.raises(RemoteError, match=r"cannot write memory://bucket/file \(.*4 bytes"):
        there.put(tmp_path / "file")
    monkeypatch.setattr(type(memory), "info", lambda *a, **k: {"size": 5, "crc32c": "AAAAAA=="})
    with pytest.raises(RemoteError, match="crc32c"):
        there.put(tmp_path / "file")
    assert not memory.store


def test_half_an_upload_is_not_seen_under_its_name(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"whole")
    there = RemotePath((tmp_path / "there" / "file").as_uri())
    there.put(tmp_path / "file")

    def half(self, local, target, **kwargs):
        Path(target).write_bytes(b"ha")
        raise OSError("no network")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "put_file", half)
    with pytest.raises(RemoteError, match="no network"):
        there.put(tmp_path / "file")
    assert there.read_bytes() == b"whole"


def test_a_missing_package_or_store_is_one_line(pack, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match="gs://b/x needs another package: pip install gcsfs"):
        pack("gs://b/x")
    with pytest.raises(UserError, match=r"unknown://b/x: .*expected gs://"):
        pack("unknown://b/x")


def test_killed_at_any_moment_between_two_processes(corpus, tokenizer_folder, tmp_path, pack):
    pack(tmp_path / "disk")
    command = [
        sys.executable, str(SCRIPT), "--path", str(corpus / "train"), "--seq_len", "16",
        "--tokenizer", str(tokenizer_folder), "--n_shards", "5", "--workers", "2",
        "--save_path", (tmp_path / "url").as_uri(),
    ]  # fmt: skip
    whole, draw = contents(tmp_path / "disk"), random.Random(0)
    code = None
    for attempt in range(12):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline_s = time.monotonic() + draw.uniform(0.5, 3 + attempt)
        while (code := process.poll()) is None and time.monotonic() < deadline_s:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.2)  # its workers follow it
        for name, data in contents(tmp_path / "url").items():
            is_hidden = any(part.startswith(".") for part in Path(name).parts)
            assert is_hidden or data == whole[name]
        if code == 0:
            break
    assert code == 0
    assert contents(tmp_path / "url") == whole


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (train_tokenizer, ["--save_path", "gs://b/x"]),
        (export_gpt2, ["runs/a", "gs://b/x"]),
        (plot_runs, ["runs/a", "--save_path", "gs://b/x.png"]),
    ],
)
def test_no_folder_gets_the_name_of_a_url(script, flags):
    with pytest.raises(UserError, match=r"gs://b/x.*: expected a path on disk"):
        script.main(flags)


def test_paths_and_urls():
    assert remote.local_folder("runs/a") == Path("runs/a")
    assert not remote.is_remote("docs:train") and not remote.is_remote("hf:NAME:train")
    folder = remote.local_folder("gs://bucket/runs/algpt2/")
    assert folder == remote.local_folder("gs://bucket/runs/algpt2")
    assert folder.name.startswith("algpt2-") and folder != remote.local_folder("gs://b/algpt2")
