"""Runs at a URL: the machine goes away at any moment, the same command goes on on another."""

import json
import shutil

import pytest
from helpers import as_flags

import export_gpt2
import train_pt
import train_tf
from algpt2.errors import EXIT_STOPPED, UserError
from algpt2.options import PackOptions
from algpt2.runs import mirror
from algpt2.runs.checkpoints import STATE_FILE, Checkpoint, newest_checkpoint
from algpt2.shards.packing import pack
from algpt2.system.remote import RemoteError, RemotePath, local_folder
from algpt2.tokenization_algpt2 import load_tokenizer

URL = "memory://bucket/run"


@pytest.fixture(scope="module")
def packed(corpus, tokenizer_folder, tmp_path_factory):
    """Rows of 16 tokens, train/ and valid/."""
    folder = tmp_path_factory.mktemp("packed")
    for split in ("train", "valid"):
        tokenizer = load_tokenizer(str(tokenizer_folder))
        paths = (str(corpus / split),), str(folder / split)
        pack(PackOptions(*paths, seq_len=16, workers=1), tokenizer)
    return folder


@pytest.fixture(scope="module")
def flags(packed, tokenizer_folder, config_folder):
    """A run of four steps: evaluation and checkpoint at steps 2 and 4."""

    def make(save_dir=URL, **changes):
        options = {
            "config": config_folder, "tokenizer": tokenizer_folder, "save_dir": save_dir,
            "train_path": packed / "train", "val_path": packed / "valid", "n_eval_rows": 4,
            "max_steps": 4, "eval_steps": 2, "logging_steps": 1, "lr": 1e-2, "device": "cpu",
        } | changes  # fmt: skip
        return as_flags(options)

    return make


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """What a run on disk leaves: losses, final weights, optimizer state."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train_pt.main(flags(folder))
    files = [path for path in folder.rglob("*") if path.is_file()]
    return outcome({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})


def at_url():
    return {name: (RemotePath(URL) / name).read_bytes() for name in RemotePath(URL).files()}


def outcome(files):
    lines = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    losses = [[line.get(k) for k in ("step", "loss", "grad_norm", "val_loss")] for line in lines]
    last = "checkpoint-00000004"
    return losses, files[f"{last}/model.safetensors"], files[f"{last}/optimizer.safetensors"]


def lose_the_machine():
    shutil.rmtree(local_folder(URL))


def test_the_machine_is_lost_after_every_step(flags, memory, straight):
    restarts = 0
    while train_pt.main(flags(max_minutes=1e-9)) == EXIT_STOPPED:
        lose_the_machine()
        restarts += 1
    assert restarts == 5  # two of them before an evaluation
    files = at_url()
    kept = sorted({name.partition("/")[0] for name in files if name.startswith("checkpoint")})
    assert kept == ["checkpoint-00000003", "checkpoint-00000004"]
    assert outcome(files) == straight
    lose_the_machine()
    assert train_pt.main(flags()) is None  # done: says so, with nothing here


def test_tensorflow_goes_on_where_pytorch_lost_its_machine(flags, memory):
    assert train_pt.main(flags(max_minutes=1e-9)) == EXIT_STOPPED
    lose_the_machine()
    assert train_tf.main(flags()) is None
    assert [line[0] for line in outcome(at_url())[0]] == [1, 2, 3, 4]


def test_killed_in_every_request_to_the_store(flags, memory, straight, monkeypatch):
    """The process dies in its n-th upload or removal, for growing n; the next has another disk."""

    class Killed(BaseException):
        pass

    calls = {"n": 0, "fatal": 0}

    def fatal(method):
        def call(self, *args, **kwargs):
            folder, _, name = self.url.rpartition("/")
            if name != "training_state.json":  # a checkpoint that changes does not count
                assert not RemotePath(f"{folder}/training_state.json").is_file()
            calls["n"] += 1
            if calls["n"] == calls["fatal"]:
                raise Killed
            return method(self, *args, **kwargs)

        return call

    monkeypatch.setattr(RemotePath, "put", fatal(RemotePath.put))
    monkeypatch.setattr(RemotePath, "unlink", fatal(RemotePath.unlink))
    deaths = 0
    for fatal_call in [1, 3, 9, 16, 21, 20, 10**9]:
        calls |= {"n": 0, "fatal": fatal_call}
        try:
            train_pt.main(flags(keep_last=1))
        except Killed:
            deaths += 1
        lose_the_machine()
    assert deaths == 6
    assert outcome(at_url()) == straight


def test_a_failed_upload_is_a_warning_and_at_the_end_an_error(
    flags, memory, straight, monkeypatch, capsys
):
    put = RemotePath.put

    def failing_put(self, local):
        if self.name == "model.safetensors":
            raise RemoteError(f"cannot write {self} (no network)")
        put(self, local)

    monkeypatch.setattr(RemotePath, "put", failing_put)
    with pytest.raises(UserError, match=f"the run is done and whole in .*, but not in {URL}"):
        train_pt.main(flags())
    warnings = [line for line in capsys.readouterr().out.splitlines() if "no network" in line]
    assert len(warnings) == 3 and all(line.startswith("warning: ") for line in warnings)
    assert not any(name.endswith("training_state.json") for name in at_url())
    monkeypatch.setattr(RemotePath, "put", put)
    train_pt.main(flags())
    assert outcome(at_url()) == straight


def test_of_two_places_the_newer_counts(flags, memory, straight, capsys):
    train_pt.main(flags(max_minutes=1e-9))
    train_pt.main(flags(max_minutes=1e-9))
    memory.rm_file("/bucket/run/checkpoint-00000002/training_state.json")  # copied in part
    train_pt.main(flags(max_minutes=1e-9))  # the evaluation that was cut
    train_pt.main(flags(max_minutes=1e-9))
    assert newest_checkpoint(local_folder(URL)).step == 3
    lose_the_machine()
    path = "/bucket/run/checkpoint-00000003/model.safetensors"
    memory.pipe_file(path, memory.cat_file(path)[:-1] + b"x")
    train_pt.main(flags(max_minutes=1e-9))
    assert f"{URL}/checkpoint-00000003/model.safetensors is damaged" in capsys.readouterr().out
    assert newest_checkpoint(local_folder(URL)).step == 3
    lose_the_machine()
    for name in ("checkpoint-00000002", "checkpoint-00000003"):
        memory.pipe_file(f"/bucket/run/{name}/config.json", b"{}")
    with pytest.raises(UserError, match=f"no complete checkpoint at {URL}, 2 damaged"):
        train_pt.main(flags())
    memory.rm("/bucket/run/checkpoint-00000002", recursive=True)
    memory.rm_file("/bucket/run/checkpoint-00000003/training_state.json")
    train_pt.main(flags(keep_last=1))  # anew, as no checkpoint counts
    assert not any("00000003" in name for name in at_url())  # the rest of one is removed
    assert outcome(at_url()) == straight


def test_what_is_there_is_not_overwritten_unasked(flags, memory):
    memory.pipe_file("/bucket/run/notes.txt", b"mine")
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=rf"{URL} holds other files \(notes.txt\)"):
            train_pt.main([*flags(), *more])
    memory.rm_file("/bucket/run/notes.txt")
    train_pt.main(flags(max_steps=2))
    lose_the_machine()
    with pytest.raises(UserError, match=r"lr: 0\.01 -> 0\.5"):
        train_pt.main(flags(max_steps=2, lr=0.5))
    train_pt.main([*flags(max_steps=4, lr=0.5), "--overwrite"])
    assert json.loads(at_url()["run.json"])["peak_lr"] == 0.5
    # Another machine starts anew at the same place: this one notices, and its run is kept.
    first = memory.cat_file("/bucket/run/run.json")
    there = json.loads(first) | {"wandb_id": "other"}
    memory.pipe_file("/bucket/run/run.json", json.dumps(there).encode())
    report = train_pt.parse(train_pt.TrainOptions, flags(max_steps=4)).report
    assert not mirror.copy_or_warn(report, 4)
    with pytest.raises(UserError):
        train_pt.main(flags(max_steps=4, lr=0.5))  # a damaged run.json: its checksum is wrong
    aside = list(local_folder(URL).parent.glob(f"{local_folder(URL).name}.2*"))
    assert (aside[0] / "run.json").read_bytes() == first


def test_a_checkpoint_at_a_url_is_evaluated_sampled_and_exported(flags, memory, tmp_path, capsys):
    train_pt.main(flags(max_steps=2))
    card = (RemotePath(URL) / "checkpoint-00000002" / "README.md").read_text()
    assert "\n# run\n" in card  # not the folder's name in the cache
    lose_the_machine()
    train_pt.main([*flags(checkpoint=URL, config=None), "--eval_only"])
    train_pt.main([*flags(checkpoint=f"{URL}/checkpoint-00000002"), "--sample_only",
                   "--max_length=8"])  # fmt: skip
    assert "checkpoint-00000002" in capsys.readouterr().out
    export_gpt2.main([URL, str(tmp_path / "out")])
    with pytest.raises(UserError, match="no checkpoint at memory://bucket/nothing"):
        train_pt.main([*flags(checkpoint="memory://bucket/nothing"), "--eval_only"])


def test_evaluations_of_a_model_at_a_url_add_up(flags, memory):
    train_pt.main(flags(max_steps=2))
    model = "memory://bucket/model"
    for path in (local_folder(URL) / "checkpoint-00000002").iterdir():
        if path.name != STATE_FILE:  # a model of no run
            (RemotePath(model) / path.name).put(path)
    for stride in (8, 16):
        train_pt.main([*flags(checkpoint=model, config=None, stride=stride), "--eval_only"])
    content = json.loads((local_folder(model) / "evaluation.json").read_text())
    assert [record["stride"] for record in content["evaluations"]] == [8, 16]


def test_another_machine_fetches_the_checkpoint_of_process_0(flags, memory, monkeypatch):
    train_pt.main(flags(max_steps=2))
    found = newest_checkpoint(local_folder(URL))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    lose_the_machine()
    here = mirror.checkpoint_here(Checkpoint(found.folder, found.state), URL)
    assert here.folder == found.folder and here.state == found.state
    memory.store.clear()  # what is here and the same needs no store
    assert mirror.checkpoint_here(found, URL).state == found.state
    other = Checkpoint(found.folder, found.state | {"elapsed_s": -1.0})
    with pytest.raises((UserError, FileNotFoundError)):
        mirror.checkpoint_here(other, URL)
