"""train_tfrecords.py: the order of the rows, bad shards, one process and several workers."""

import collections
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from helpers import as_flags, final_bytes, metrics

import make_tfrecords
import train_tf
import train_tfrecords
from algpt2.errors import EXIT_STOPPED, UserError
from algpt2.options import OptimOptions, TFTrainOptions
from algpt2.shards.inputs_tf import (
    ShardInputs,
    check_shards,
    find_shards,
    host_rows,
    parse_rows,
)
from algpt2.shards.tfrecords import open_rows, record_dtype
from algpt2.system import strategy_tf
from algpt2.system.processes_tf import Processes
from algpt2.system.script import run_script

ROOT = Path(train_tfrecords.__file__).parent
FORKSERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["train_tfrecords", "algpt2.configuration_algpt2", "algpt2.shards.inputs_tf",
             "algpt2.training.trainer_tf"]  # fmt: skip


@pytest.fixture(scope="module")
def packed(corpus, tokenizer_folder, config_folder, tmp_path_factory):
    """Shards of 16 tokens a row: train/ (4 files), val/ (2), and a config without dropout."""
    folder = tmp_path_factory.mktemp("packed")
    for split, name, n in (("train", "train", 5), ("valid", "val", 2)):
        make_tfrecords.main([
            f"--path={corpus / split}", f"--save_path={folder / name}", "--seq_len=16",
            f"--tokenizer={tokenizer_folder}", f"--files_per_tfrecord={n}",
        ])  # fmt: skip
    config = json.loads((config_folder / "config.json").read_text())
    config |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps(config))
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    return folder


@pytest.fixture
def copied(packed, tmp_path):
    """Shards that a test may damage."""
    return Path(shutil.copytree(packed / "train", tmp_path / "train"))


@pytest.fixture
def flags(packed, tmp_path):
    """A run of six steps, evaluation and checkpoint at steps 3 and 6."""

    def make(save_dir="run", **changes):
        options = {
            "train_path": packed / "train", "val_path": packed / "val", "batch_size": 8,
            "config_path": packed / "config", "tokenizer": packed / "tokenizer", "lr": 1e-2,
            "warmup_steps": 2, "max_steps": 6, "save_batches": 3, "log_batches": 1,
            "device": "cpu", "save_dir": tmp_path / save_dir,
        } | changes  # fmt: skip
        return as_flags(options)

    return make


# --- the order of the rows -----------------------------------------------------------------------


def read(shards, n, host=0, n_hosts=1, seed=7, first_row=0):
    """`n` rows of a host as tuples."""
    rows = host_rows(shards, host, n_hosts, seed, first_row).batch(n).take(1)
    (tokens,) = (parse_rows(batch, shards.manifest) for batch in rows)
    return [tuple(row) for row in tokens.numpy().tolist()]


def test_every_epoch_has_every_row_once_in_another_order(packed):
    shards, expected = (
        find_shards("--train_path", [str(packed / "train")]),
        open_rows(packed / "train"),
    )
    n = len(expected)
    stored = collections.Counter(map(tuple, expected[np.arange(n)].tolist()))
    rows = read(shards, 2 * n)
    first, second = rows[:n], rows[n:]
    assert collections.Counter(first) == collections.Counter(second) == stored
    assert first != second
    assert first == read(shards, n)
    assert first != read(shards, n, seed=8)
    in_order = [tuple(row) for row in expected[np.arange(n)].tolist()]
    near = sum(in_order.index(a) + 1 == in_order.index(b) for a, b in zip(first, first[1:]))  # noqa: B905, RUF007
    assert near < n / 10


@pytest.mark.parametrize("n_hosts", [2, 4])
def test_a_batch_has_the_same_rows_for_any_number_of_hosts(packed, n_hosts):
    shards = find_shards("--train_path", [str(packed / "train")])
    n = 3 * shards.manifest.n_rows // 2 // 8 * 8
    one, per_host = read(shards, n), 8 // n_hosts
    several = [read(shards, n // n_hosts, host, n_hosts) for host in range(n_hosts)]
    for step in range(n // 8):
        batch = [row for rows in several for row in rows[step * per_host : (step + 1) * per_host]]
        assert sorted(batch) == sorted(one[8 * step : 8 * (step + 1)])


def test_continuing_skips_to_the_very_row(packed):
    shards = find_shards("--train_path", [str(packed / "train")])
    n = shards.manifest.n_rows
    rows = read(shards, 2 * n + 9)
    for first in (1, n // 2, n - 1, n, 2 * n + 5):
        assert read(shards, 4, first_row=first) == rows[first : first + 4]


def test_a_step_has_its_tokens_wherever_a_call_begins(packed):
    shards = find_shards("--train_path", [str(packed / "train")])
    processes = Processes(0, 1, tf.distribute.get_strategy(), "float32")

    def inputs(steps_per_call):
        optim = OptimOptions(batch_size=4, grad_steps=2)
        return ShardInputs(
            shards, TFTrainOptions(optim=optim, steps_per_call=steps_per_call), processes
        )

    single, several = inputs(1), inputs(3)
    steps = [single.take(step)[0][0].numpy() for step in range(9)]
    assert steps[0].shape == (2, 4, 17)
    for step in (0, 1, 2, 3, 5, 8, 4, 5, 0):  # forwards, with gaps, and back
        tokens, place = several.take(step)
        assert np.array_equal(tokens[place], steps[step]), step


def test_no_sleeping_thread_tunes_the_input(packed):
    shards = find_shards("--train_path", [str(packed / "train")])
    processes = Processes(0, 1, tf.distribute.get_strategy(), "float32")
    inputs = ShardInputs(shards, TFTrainOptions(optim=OptimOptions(batch_size=4)), processes)
    assert inputs.dataset(0, 0, 1).options().autotune.enabled is False


# --- bad shards ----------------------------------------------------------------------------------


def test_shards_are_found_by_folder_pattern_or_list(packed):
    folder = str(packed / "train")
    by_list = [f"{folder}/{i}.tfrecord" for i in range(4)]
    found = [
        find_shards("--train_path", paths)
        for paths in ([folder], [folder + "/"], [f"{folder}/*.tfrecord"], by_list, [f"{folder}/*"])
    ]
    assert all(shards.files == by_list for shards in found)


def test_patterns_and_manifests_that_do_not_fit_are_named(copied):
    def refuse(message, *paths):
        with pytest.raises(UserError, match=message):
            find_shards("--train_path", paths or [str(copied)])

    refuse(r"--train_path .*/none\*\.tfrecord matches no file", f"{copied}/none*.tfrecord")
    refuse("matches no file", f"{copied}/0.tfrecord", f"{copied}/9.tfrecord")
    refuse(r"left out \['1.tfrecord'", f"{copied}/0.tfrecord")
    (copied / "more.tfrecord").write_bytes(b"")
    refuse(r"not listed \['more.tfrecord'\]", f"{copied}/*.tfrecord")
    with (copied / "2.tfrecord").open("ab") as file:
        file.write(b"more")
    refuse(r"2\.tfrecord is damaged: it has \d+ bytes")
    (copied / "2.tfrecord").unlink()
    refuse(r"2\.tfrecord is missing")
    (copied / "manifest.json").write_text("{")
    refuse("manifest.json is damaged: it is not JSON")
    (copied / "manifest.json").unlink()
    refuse(r"has no manifest.json", f"{copied}/0.tfrecord")


def test_shards_that_do_not_fit_hosts_or_model_are_refused(packed):
    shards = find_shards("--train_path", [str(packed / "train")])
    config = {"vocab_size": 300, "n_positions": 32}

    def refuse(message, n_hosts=1, seq_len=None, exact=True, **keys):
        with pytest.raises(UserError, match=message):
            check_shards("--train_path", shards, n_hosts, seq_len, config | keys, exact)

    check_shards("--train_path", shards, 2, 16, config, True)
    check_shards("--train_path", shards, 4, None, config | {"vocab_size": 304}, False)
    refuse("4 shards for 8 hosts: expected a multiple of 8.*make_tfrecords.py .* --n_shards 8$", 8)
    refuse("4 shards for 3 hosts: expected a multiple of 3.*make_tfrecords.py .* --n_shards 6$", 3)
    refuse("rows of 16 tokens, expected 32: pass --seq_len 16", seq_len=32)
    refuse("packed with 300 entries and the model has 304", vocab_size=304)
    refuse("packed with 300 entries and the model has 299", vocab_size=299, exact=False)
    refuse("rows of 16 tokens do not fit the model's 8 positions", n_positions=8)


def corrupt(source, folder, place):
    """A copy of shards with one bit of row 5 of 1.tfrecord turned."""
    shutil.copytree(source, folder)
    path, size = folder / "1.tfrecord", record_dtype(16, "uint16").itemsize
    data, at = bytearray(path.read_bytes()), {"length": 1, "head": 20, "tokens": 40}
    data[5 * size + at.get(place, size - 1)] ^= 64
    path.write_bytes(data)
    return folder


@pytest.mark.parametrize("place", ["length", "head", "tokens", "crc"])
def test_a_corrupt_record_is_named_with_shard_and_row(packed, flags, tmp_path, place):
    train, val = (corrupt(packed / name, tmp_path / name, place) for name in ("train", "val"))
    rows = find_shards("--val_path", [str(val)])
    with pytest.raises(UserError, match=r"val/1\.tfrecord: row 5 is corrupt"):
        rows[np.arange(len(rows))]
    with pytest.raises(UserError, match=r"train/1\.tfrecord: row 5 is corrupt"):
        train_tfrecords.main(flags(train_path=train, max_steps=100, save_batches=40))


def test_a_corrupt_record_ends_a_run_that_validates(packed, flags, tmp_path):
    folder = corrupt(packed / "val", tmp_path / "val", "tokens")
    with pytest.raises(UserError, match=r"1\.tfrecord: row 5 is corrupt"):
        train_tfrecords.main(flags(val_path=folder))


# --- where it trains -----------------------------------------------------------------------------


STATES = {
    "slow": [("CREATING", None), ("CREATING", None), ("READY", "HEALTHY")],
    "mine": [("READY", "HEALTHY")],
    "broken": [("REPAIRING", "UNHEALTHY_TENSORFLOW")],
    "gone": [("PREEMPTED", None)],
    "other": [],
}


class Client:
    """Google's client of a pod that goes through `STATES[name]`, or is not there."""

    def __init__(self, name):
        if name == "nowhere":
            raise ConnectionError("metadata.google.internal: Name or service not known")
        self.states = [*STATES[name]]

    def state(self):
        if not self.states:
            raise ValueError("Resource 'nodes/other' was not found")
        return self.states[0][0]

    def health(self):
        return (self.states.pop(0) if len(self.states) > 1 else self.states[0])[1]


class Resolver:
    """TensorFlow's, of a pod whose only worker has an address where nobody listens."""

    def __init__(self, tpu):
        if tpu == "local":
            raise ValueError("no TPU devices")

    def cluster_spec(self):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            return tf.train.ClusterSpec({"worker": [f"localhost:{free.getsockname()[1]}"]})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "Cloud TPU API is not available.*Name or service not known.*--tpu none"),
        ("other", "not found.*'nodes/other' was not found.*gcloud compute tpus tpu-vm list"),
        ("broken", "still REPAIRING, health UNHEALTHY_TENSORFLOW after 0 minutes"),
        ("gone", "PREEMPTED and will not come back.*create it again"),
        ("mine", r"worker localhost:\d+ does not answer \(Connection refused\)"),
        ("local", "--tpu local cannot be initialized.*TPU host"),
    ],
)
def test_a_tpu_that_cannot_be_used_is_one_sentence(monkeypatch, flags, name, message):
    import cloud_tpu_client

    monkeypatch.setattr(cloud_tpu_client, "Client", Client)
    monkeypatch.setattr(strategy_tf, "HEALTHY_SECONDS", 0.02)
    monkeypatch.setattr(strategy_tf, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", Resolver)
    with pytest.raises(UserError, match=message):
        train_tfrecords.main(flags(tpu=name))


def test_a_pod_that_is_being_made_is_waited_for(monkeypatch, capsys):
    import cloud_tpu_client

    monkeypatch.setattr(cloud_tpu_client, "Client", Client)
    monkeypatch.setattr(strategy_tf, "POLL_SECONDS", 0)
    strategy_tf.wait_until_healthy("slow")
    assert capsys.readouterr().out.count("TPU slow is CREATING: waiting for READY") == 1


# --- a run ---------------------------------------------------------------------------------------


@pytest.mark.numeric
def test_a_run_continues_exactly_and_is_evaluated(flags, packed, tmp_path, capsys):
    train_tfrecords.main(flags("straight"))
    restarts = 0
    stopped = flags("stopped", max_minutes=1e-9, steps_per_call=2)
    while train_tfrecords.main(stopped) == EXIT_STOPPED:
        restarts += 1
    assert restarts == 7  # every step is logged, so a call takes one; two evaluations are cut
    assert final_bytes(tmp_path / "straight") == final_bytes(tmp_path / "stopped")
    names = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")
    assert metrics(tmp_path / "straight", *names) == metrics(tmp_path / "stopped", *names)
    waits = [wait for (wait,) in metrics(tmp_path / "straight", "input_wait")]
    assert all(0 <= wait < 1 for wait in waits) and any(waits)
    assert (tmp_path / "straight" / "checkpoint-00000006" / "tokenizer.json").exists()
    capsys.readouterr()
    train_tfrecords.main(flags("straight"))
    assert "already done" in capsys.readouterr().out
    more = {"eval_only": True, "checkpoint": tmp_path / "straight", "config_path": None}
    arguments = [flag for flag in flags(**more) if "eval_only" not in flag]
    train_tfrecords.main([*arguments, "--eval_only"])
    names = ("val_loss", "val_ppl", "val_word_ppl", "val_bpb")
    loss, ppl, word_ppl, bits = metrics(tmp_path / "straight", *names)[-1]
    (record,) = json.loads((tmp_path / "straight" / "evaluation.json").read_text())["evaluations"]
    values = {measure["name"]: measure["value"] for measure in record["measures"]}
    expected = {"loss": loss, "ppl": ppl, "word ppl": word_ppl, "bits per byte": bits}
    assert values == pytest.approx(expected, rel=1e-6)
    table = capsys.readouterr().out
    assert record["checkpoint"] == "checkpoint-00000006"
    assert f"{loss:.4f}  nats/token  " in table and " words, line ends counted" in table
    # The record is the one that train_tf.py gives, and a second evaluation replaces it.
    train_tf.main([
        "--eval_only", f"--checkpoint={tmp_path / 'straight'}", f"--val_path={packed / 'val'}",
        "--device=cpu", f"--tokenizer={packed / 'tokenizer'}",
    ])  # fmt: skip
    (again,) = json.loads((tmp_path / "straight" / "evaluation.json").read_text())["evaluations"]
    assert again["details"] == pytest.approx(record["details"], rel=1e-6)
    assert [m["over"] for m in again["measures"]] == [m["over"] for m in record["measures"]]


def test_the_command_of_the_project(packed, tmp_path):
    """SEED's flags as they are written there; only sizes and paths are small."""
    command = (
        "--tpu none --seq_len 16 --batch_size 8 --train_len 16 --warmup_steps 1 --model_type algpt2"
        f" --config_path {packed / 'config'} --epochs 1 --momentum 0 --relative_update_scale"
        f" --disable_lr_schedule --optimizer Adafactor --lr 1e-2 --tags a b --log_batches 1"
        f" --train_path {' '.join(str(packed / 'train' / f'{i}.tfrecord') for i in range(4))}"
        f" --val_path {packed / 'val' / '0.tfrecord'} {packed / 'val' / '1.tfrecord'}"
    )
    train_tfrecords.main([*command.split(), f"--save_dir={tmp_path / 'run'}", "--device=cpu"])
    assert metrics(tmp_path / "run", "step", "lr") == [[1, 1e-2], [2, 1e-2]]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    optim = run["options"]["optim"]
    assert (optim["beta1"], optim["relative_update_scale"]) == (0, True)


# --- several workers -----------------------------------------------------------------------------


class Worker(FORKSERVER.Process):
    """train_tfrecords.py in a process that begins with TensorFlow imported, which takes longer
    than what these tests train."""

    def __init__(self, arguments, environment, output):
        super().__init__()
        self.arguments, self.environment, self.output = arguments, environment, output

    def run(self):
        os.environ.update(self.environment)
        sys.argv = ["train_tfrecords.py", *self.arguments]
        for number, path in ((1, self.output), (2, os.devnull)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        run_script(train_tfrecords.main)


@pytest.fixture
def start_workers(tmp_path, monkeypatch):
    """`start_workers(n, arguments)`: n processes on loopback that train together."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    FORKSERVER.set_forkserver_preload(PRELOADED)

    def start(n, arguments):
        cluster = {"worker": [f"localhost:{port}" for port in free_ports(n)]}
        workers = []
        for i in range(n):
            config = {"cluster": cluster, "task": {"type": "worker", "index": i}}
            environment = os.environ | {"TF_CONFIG": json.dumps(config)}
            output = tmp_path / f"output-{time.monotonic_ns()}"
            workers.append(Worker(arguments, environment, output))
            workers[-1].start()
        return workers

    return start


def finish(workers):
    try:
        for worker in workers:
            worker.join(timeout=600)
    finally:
        for worker in workers:
            worker.kill()
    return [w.exitcode for w in workers], [w.output.read_text() for w in workers]


@pytest.mark.numeric
def test_workers_give_one_process_losses_also_after_one_is_killed(start_workers, flags, tmp_path):
    few = {"max_steps": 30, "save_batches": 10, "optimizer": "AdamW", "lr": 3e-3}
    train_tfrecords.main(flags("one", **few))
    codes, outputs = finish(start_workers(2, flags("two", **few)))
    assert codes == [0, 0], outputs
    assert not outputs[1]  # process 0 speaks for all
    one, two = (metrics(tmp_path / name, "step", "tokens", "loss") for name in ("one", "two"))
    assert len(one) == len(two) == 30
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)

    workers = start_workers(2, flags("killed", **few))
    path = tmp_path / "killed" / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") > 12):
        assert all(worker.is_alive() for worker in workers)
        time.sleep(0.02)
    workers[1].kill()
    codes, outputs = finish(workers)
    assert codes == [EXIT_STOPPED, -signal.SIGKILL], outputs
    assert "run the same command again, on all workers" in outputs[0]
    codes, outputs = finish(start_workers(2, flags("killed", **few)))
    assert codes == [0, 0], outputs
    assert "continuing at step" in outputs[0]
    assert final_bytes(tmp_path / "killed", 30) == final_bytes(tmp_path / "two", 30)


def worker_of(monkeypatch, rank, ports):
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    config = {"cluster": cluster, "task": {"type": "worker", "index": rank}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))


def free_ports(n):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(n)]
        return [server.getsockname()[1] for server in servers]


def test_a_worker_that_waits_for_another_says_so_and_can_be_stopped(monkeypatch):
    ports = free_ports(2)
    worker_of(monkeypatch, 1, ports)
    code = """
from algpt2.system import script, strategy_tf
strategy_tf.PATIENCE_SECONDS = 0
script.run_script(lambda _: strategy_tf.meet_workers())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    line = process.stderr.readline()
    assert line.startswith(f"waiting for the worker at localhost:{ports[0]} (")
    process.terminate()
    assert "stopped by SIGTERM" in process.communicate(timeout=10)[1]
    assert process.returncode == EXIT_STOPPED


def test_workers_meet_and_leave_their_ports_free(monkeypatch):
    ports = free_ports(2)
    worker_of(monkeypatch, 0, ports)
    with socket.create_server(("", ports[1])):
        strategy_tf.meet_workers()
    socket.create_server(("", ports[0])).close()
    worker_of(monkeypatch, 1, [*ports, "nowhere"])
    with (
        socket.create_server(("", ports[1])) as server,
        pytest.raises(UserError, match="cannot listen"),
    ):
        server.listen()
        strategy_tf.meet_workers()


def test_an_error_of_process_0_is_every_workers(start_workers, flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    codes, _ = finish(start_workers(2, flags()))
    assert codes == [2, 2]
