"""Damage to a run's folder: a part of the faults that benchmarks/faults.py injects."""

import random

import pytest

import train_pt
from algpt2.errors import UserError
from benchmarks.fault_families import corruption as faults


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return faults.Harness(tmp_path_factory.mktemp("faults"), train_pt.main)


def test_there_are_faults_of_every_file(harness):
    found = list(faults.all_faults(harness.kept))
    assert len(found) >= 200
    for path in (harness.kept / "run" / faults.NEWEST).iterdir():
        assert sum(fault.what.startswith(path.name) for fault in found) >= 10


@pytest.mark.parametrize("part", range(3))
def test_nothing_is_lost(harness, part):
    found = list(faults.all_faults(harness.kept))
    chosen = random.Random(part).sample(found, 6)
    outcomes = {fault.what: harness.outcome(fault, part) for fault in chosen}
    assert all(survived for survived, _ in outcomes.values()), outcomes


def test_the_harness_sees_what_is_lost(harness, monkeypatch):
    fault = next(f for f in faults.all_faults(harness.kept) if "model.safetensors: cut" in f.what)
    monkeypatch.setattr("train_pt.train", lambda options: None)
    survived, how = harness.outcome(fault, 0)
    assert (survived, how.partition(":")[0]) == (False, "other bytes at the end")


def outcome_of(harness, what):
    (fault,) = [f for f in faults.all_faults(harness.kept) if f.what == what]
    return harness.outcome(fault, 0)


@pytest.mark.parametrize(
    "what",
    ["two shards swapped", "names swapped", "checkpoint-00000099 is a copy of the newest",
     "metrics.jsonl: a pipe instead", "run.json: a link instead"],
)  # fmt: skip
def test_faults_that_once_were_lost(harness, what):
    assert outcome_of(harness, what)[0], outcome_of(harness, what)


def test_a_record_that_rotted_stops_the_run_and_names_the_row(harness, tmp_path):
    import shutil

    from algpt2.shards.tfrecords import open_rows

    folder = shutil.copytree(harness.kept / "train", tmp_path / "train")
    path = folder / "1.tfrecord"
    data = bytearray(path.read_bytes())
    record = len(data) // open_rows(folder).manifest.shards[0].rows
    data[3 * record - 9] ^= 1
    path.write_bytes(data)
    rows = open_rows(folder)
    with pytest.raises(UserError, match=r"1\.tfrecord: row 2 is corrupt"):
        rows[list(range(len(rows)))]
