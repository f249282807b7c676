"""Files that were made to do harm: nothing runs, nothing is followed, nothing is believed."""

import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

import train_pt
from algpt2.corpus.documents import documents
from algpt2.errors import UserError
from algpt2.options import ModelOptions, PackOptions, TrainOptions, parse
from algpt2.runs.checkpoints import STATE_FILE
from algpt2.runs.start import Start
from algpt2.shards.tfrecords import read_manifest
from algpt2.system import memory
from algpt2.system.files import write_record
from algpt2.tokenization_algpt2 import load_tokenizer
from algpt2.training import trainer_pt
from benchmarks.fault_families import fuzz
from benchmarks.fault_families.corruption import flags, make_data

ROOT = Path(train_pt.__file__).parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data and a run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    make_data(folder)
    train_pt.main(flags(folder, max_steps=1))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- mutated input -------------------------------------------------------------------------------


def test_mutated_input_is_read_or_refused():
    rows = fuzz.run(short=True, seed=1)
    assert sum(row["injected"] for row in rows) > 500
    assert not [row for row in rows if row["lost"]]


def test_the_harness_sees_another_exception(monkeypatch, tmp_path):
    def broken(self, draw):
        return lambda: {}["key"]

    monkeypatch.setattr(fuzz.Fuzzer, "manifest", broken)
    (row, _) = fuzz.run(short=True, readers=["manifest"])
    assert row["lost"] == row["injected"] and "KeyError" in row["note"]


def test_there_are_twenty_thousand_inputs():
    assert sum(fuzz.Fuzzer.counts.values()) >= 20_000


# --- pickles -------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("with_zip", [True, False])
def test_a_pickle_in_a_checkpoint_never_runs(run, tmp_path, with_zip):
    import torch

    fired, checkpoint = tmp_path / "fired", run / "run/checkpoint-00000001"
    for name in ("model.safetensors", "optimizer.safetensors", STATE_FILE):
        (checkpoint / name).unlink()
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt"):
        if with_zip:
            torch.save({"lm_head.weight": Bomb(fired)}, checkpoint / name)
        else:
            (checkpoint / name).write_bytes(pickle.dumps(Bomb(fired)))
    folder = checkpoint.rename(run / "weights")
    options = ModelOptions(checkpoint=str(folder))
    tokenizer = load_tokenizer(str(run / "tokenizer"))
    with pytest.raises(UserError, match="cannot load a causal language model"):
        trainer_pt.build_model(replace(Start.find(options), tokenizer=tokenizer, seq_len=16))
    assert not fired.exists()
    pickle.loads(pickle.dumps(Bomb(fired)))
    assert fired.exists()  # it would have


def test_no_code_of_ours_reads_pickles():
    pattern = re.compile(r"torch\.load\(|pickle\.load|allow_pickle=True|weights_only=False")
    sources = [*ROOT.glob("*.py"), *(ROOT / "algpt2").rglob("*.py")]
    assert not [path for path in sources if pattern.search(path.read_text(encoding="utf-8"))]


# --- archives and links --------------------------------------------------------------------------


def test_a_hostile_tar_writes_and_follows_nothing(tmp_path, monkeypatch):
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    path = inside / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("/absolute.txt", "../above.txt", "a/../../b.txt", "plain.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"text"))
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        for kind, name in zip(kinds, ("soft", "hard", "device", "pipe"), strict=True):
            member = tarfile.TarInfo(f"{name}.txt")
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
    monkeypatch.chdir(inside)
    before = sorted(tmp_path.rglob("*"))
    assert list(documents(str(path))) == ["text"] * 4
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "samples.jsonl", "run.json", ".lock", ".run.json.partial",
     ".metrics.jsonl.partial", "checkpoint-00000002", ".checkpoint-00000002.partial"],
)  # fmt: skip
def test_nothing_is_written_through_a_link_in_save_dir(run, tmp_path, name):
    shutil.rmtree(run / "run")
    train_pt.main(flags(run, max_minutes=1e-9))
    elsewhere = tmp_path / "elsewhere"
    path = run / "run" / name
    if "checkpoint" in name:
        elsewhere.mkdir()
        (elsewhere / "precious").write_text("precious")
    elif path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.write_text("precious")
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    held = {p: p.read_bytes() for p in (elsewhere, *elsewhere.glob("*")) if p.is_file()}
    if name.endswith(".partial"):  # left behind by a kill, perhaps: replaced
        train_pt.main(flags(run))
    else:
        with pytest.raises(UserError, match=f"{name} is no .*, or a link"):
            train_pt.main(flags(run))
    assert held == {p: p.read_bytes() for p in (elsewhere, *elsewhere.glob("*")) if p.is_file()}


# --- absurd sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [{"n_embd": 10**9}, {"n_layer": 10**9}, {"n_positions": 10**12}, {"n_inner": 10**15},
     {"vocab_size": 10**12}, {"n_embd": 2**20, "n_layer": 96, "num_hidden_groups": 96}],
)  # fmt: skip
def test_a_config_of_absurd_sizes_is_refused_before_memory_is_taken(run, keys):
    path = run / "config/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    before = peak_bytes()
    with pytest.raises(UserError):
        train_pt.main(flags(run, save_dir=run / "other"))
    assert peak_bytes() - before < 64 << 20


def test_a_manifest_of_absurd_rows_is_refused(run):
    path = run / "train/manifest.json"
    content = json.loads(path.read_text())
    content.pop("sha256")
    for shard in content["shards"]:
        shard |= {"rows": 10**15, "bytes": 10**15 * (shard["bytes"] // shard["rows"])}
    write_record(path, content)
    with pytest.raises(UserError, match="rows is 1000000000000000, expected"):
        read_manifest(path.parent)


def test_a_safetensors_header_of_two_to_the_sixty_is_refused(run):
    (run / "run/checkpoint-00000001" / STATE_FILE).unlink()
    folder = (run / "run/checkpoint-00000001").rename(run / "weights")
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    before = peak_bytes()
    with pytest.raises(UserError, match="cannot load"):
        train_pt.main(["--sample_only", f"--checkpoint={folder}", "--device=cpu"])
    assert peak_bytes() - before < 64 << 20


@pytest.mark.parametrize("id_", [2**31, 2**32 - 1, 10**12, -1, 1.5])
def test_a_tokenizer_with_absurd_ids_is_refused(run, id_):
    path = run / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "content": "<|x|>", "id": id_})
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(str(path.parent))


@pytest.mark.parametrize(
    "flag",
    ["lr=nan", "lr=inf", "epochs=nan", "beta1=nan", "beta2=1", "seed=-1", "batch_size=10000000000",
     "weight_decay=-1", "top_p=-inf", "temperature=nan", "warmup_steps=-1", "max_minutes=nan"],
)  # fmt: skip
def test_numbers_that_cannot_be_meant_are_refused(flag):
    with pytest.raises(UserError, match=flag.partition("=")[0]):
        parse(TrainOptions, [f"--{flag}"])


def test_packing_refuses_absurd_numbers():
    for flag in ("seq_len=1000000000000", "n_shards=1000000000000", "valid_fraction=nan"):
        with pytest.raises(UserError, match=flag.partition("=")[0]):
            parse(PackOptions, [f"--{flag}"])


def test_the_memory_of_a_model_is_counted_before_it_is_made(monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda: 10**6)
    memory.check_memory(250_000)
    with pytest.raises(UserError, match=r"250,001 parameters, 0\.0 GB"):
        memory.check_memory(250_001)


def test_a_name_that_is_not_utf8_can_be_printed():
    import subprocess
    import sys

    code = (
        "from algpt2.system.script import run_script\nrun_script(lambda argv: print('caf\\udce9'))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT,
                             env=os.environ | {"PYTHONIOENCODING": "utf-8"})  # fmt: skip
    assert (process.returncode, process.stdout) == (0, b"caf\\udce9\n")
