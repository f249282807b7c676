"""What Markdown/CLOUD.md shows: gcloud's lines, torchrun's, and the cost sheet."""

import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import gcloud
import pytest

from algpt2.options import TFRecordOptions, parse

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "Markdown" / "CLOUD.md").read_text()
COMMANDS = re.findall(r"^ {4}(\S.*)$", re.sub(r" *\\\n *", " ", PAGE), re.M)


def commands(program):
    """The page's commands of a program, continued lines joined."""
    return [line for line in COMMANDS if line.startswith(f"{program} ")]


@pytest.mark.parametrize("line", commands("gcloud"))
def test_gcloud_takes_the_line(line):
    gcloud.split(shlex.split(line)[1:])


def test_a_line_that_gcloud_does_not_take_is_refused():
    for wrong in ("compute tpus tpu-vm create x", "compute tpus tpu-vm list --zones x"):
        with pytest.raises(gcloud.Refused):
            gcloud.split(wrong.split())


@pytest.mark.parametrize("line", [line for line in COMMANDS if "keep_pod.sh" in line])
def test_train_tfrecords_takes_the_flags_that_keep_pod_hands_on(line):
    flags = shlex.split(line.partition("keep_pod.sh")[2])
    assert parse(TFRecordOptions, [*flags, "--tpu=pod", "--save_dir=gs://b/run"])


def test_keep_pod_knows_every_variable_that_the_page_sets():
    script = (ROOT / "cloud" / "keep_pod.sh").read_text()
    lines = [line for line in COMMANDS if "keep_pod.sh" in line or "export" in line]
    names = {name for line in lines for name in re.findall(r"(?<!\S)([A-Z]+)=", line)}
    assert len(names) > 8 and all(f"${{{name}" in script for name in names), names


@pytest.fixture
def start(corpus, tokenizer_folder, config_folder, tmp_path):
    """Starts a torchrun line of the page with few processes and a tiny model on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])

    def run(line, run, n_processes, rank="0"):
        changes = {
            "--nproc_per_node": n_processes, "--node_rank": rank, "--master_addr": "127.0.0.1",
            "--master_port": port, "--config": config_folder, "--tokenizer": tokenizer_folder,
            "--train_path": corpus / "train", "--val_path": corpus / "valid",
            "--save_dir": tmp_path / run, "--batch_size": "4", "--max_steps": "3",
        }  # fmt: skip
        words = shlex.split(line)[1:]
        for before, name in enumerate(words[:-1]):
            words[before + 1] = str(changes.get(name, words[before + 1]))
        few = ["--seq_len=16", "--device=cpu", "--logging_steps=1"]
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, *few], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return run


@pytest.mark.numeric
def test_torchrun_on_one_machine_and_on_two(start, tmp_path):
    one, two = commands("torchrun")
    for processes in (
        [start(one, "one", "2")],
        [start(two, "two", "1"), start(two, "two", "1", rank="1")],
    ):
        printed = [process.communicate(timeout=200)[0] for process in processes]
        assert not any(process.returncode for process in processes), printed
    losses = {}
    for run in ("one", "two"):
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        losses[run] = [x["loss"] for x in map(json.loads, lines) if "loss" in x]
    assert len(losses["one"]) == 3
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)


def test_the_cost_sheet_is_its_own_arithmetic():
    rows = re.findall(r"\| ([\d.]+) M \| ([\d.]+) \| ([\d,]+) \| +\| +\|", PAGE)
    assert len(rows) == 4
    for speed, hours, chip_hours in rows:
        expected = 90_000 * 512 * 1024 / (float(speed) * 1e6) / 3600
        assert float(hours) == pytest.approx(expected, rel=0.02)
        assert float(chip_hours.replace(",", "")) == pytest.approx(64 * expected, rel=0.02)
