"""cloud/keep_pod.sh against a gcloud of our own: whatever happens, nothing is left running."""

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What worker 0 has: systemd, where a unit is "active" for so many looks and then does its work;
# pip and uv, which make a venv whose Python trains with the next code of the file "codes".
WORKER = {
    "sudo": 'exec "$@"',
    "sleep": "exec /usr/bin/sleep 0.2",
    "systemd-run": '''
        while [ "$1" != bash ]; do shift; done
        echo 2 > "$STAND_IN/looks" && printf "%q " "$@" > "$STAND_IN/unit"''',
    "systemctl": '''
        [ -e "$STAND_IN/unit" ] || exit 3
        [ "$1" = kill ] && rm "$STAND_IN/unit" && exit 0
        looks=$(cat "$STAND_IN/looks") && echo $((looks - 1)) > "$STAND_IN/looks"
        [ "$looks" -gt 0 ] && exit 0
        command=$(cat "$STAND_IN/unit") && rm "$STAND_IN/unit"
        [ "$(head -n 1 "$STAND_IN/codes")" = kill ] && sed -i 1d "$STAND_IN/codes" && exit 3
        eval "$command"
        exit 3''',
    "gcloud": 'echo "$@" >> "$STAND_IN/bucket"',
    "python3": '''
        mkdir -p "$HOME/.local/bin" && cp "$STAND_IN/bin/uv" "$HOME/.local/bin/uv"''',
    "uv": '''
        [ "$1" = venv ] || exit 0
        mkdir -p "$HOME/venv/bin" && cp "$STAND_IN/bin/train" "$HOME/venv/bin/python"''',
    "train": '''
        [ "$1" = -c ] && exit 0
        echo "$TPU_LOAD_LIBRARY $*" >> "$STAND_IN/trained" && echo "step 10 loss 10.8"
        code=$(head -n 1 "$STAND_IN/codes") && sed -i 1d "$STAND_IN/codes"
        exit "${code:-0}"''',
}  # fmt: skip


class Home:
    """The machine at home, where the script runs beside the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "home").mkdir()
        for name, text in WORKER.items():
            self.script(folder / "bin" / name, f"#!/bin/bash\n{text}\n")
        call = f"import sys; sys.path.append('{ROOT}/tests'); import gcloud; "
        call += "sys.exit(gcloud.main(sys.argv[1:]))"  # imported, so compiled once
        command = f'exec {sys.executable} -SE -c "{call}" "$@"'
        self.script(folder / "home" / "gcloud", f"#!/bin/bash\n{command}\n")
        archive = f'[ "$1" = archive ] && tar czf "$5" -C {ROOT} cloud'  # a tenth of the time
        self.script(folder / "home" / "git", f"#!/bin/bash\n{archive}\nexit 0\n")

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def keep(self, plan: list[str], codes: list[int | str], **environment: str) -> int:
        """The exit code of the script while the plan's accidents happen."""
        (self.folder / "plan.json").write_text(json.dumps(plan))
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        defaults = {
            "NAME": "pod", "ZONE": "europe-west4-a", "TYPE": "v3-128", "RUN": "gs://b/runs/x",
            "IMAGE": "tpu-vm-tf-2.18.0-pod-se", "ACCOUNT": "a@p.iam.gserviceaccount.com",
            "TOKENIZER": "gs://b/tokenizer", "PAUSE_S": "0.01", "LOG": str(self.folder / "log"),
            "PATH": f"{self.folder / 'home'}:{os.environ['PATH']}", "STAND_IN": str(self.folder),
        }  # fmt: skip
        process = subprocess.Popen(
            ["bash", ROOT / "cloud" / "keep_pod.sh", "--tags", "two words"], cwd=self.folder,
            env=os.environ | defaults | environment, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        (self.folder / "pid").write_text(str(process.pid))
        try:
            self.printed = process.communicate(timeout=100)[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode

    @property
    def project(self) -> dict:
        return json.loads((self.folder / "state.json").read_text())

    @property
    def running(self) -> dict:
        """Requests and machines that are still there, and would cost money from now on."""
        return self.project["requests"] | self.project["machines"]


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


ACCIDENTS = {
    "none": ([], [0], {}, 0),
    "preempted": (["status:3:preempt"], [0], {}, 0),
    "preempted in each state": (
        ["setup:1:preempt", "start:1:preempt", "describe:9:preempt", "status:7:preempt"], [0], {}, 0
    ),
    "no capacity at first": (["create:1:refuse", "create:2:refuse"], [0], {}, 0),
    "no capacity at all": (["create:*:refuse"], [], {"TRIES": "3"}, 75),
    "request refused": (["create:*:fail"], [], {"TRIES": "3"}, 75),
    "request made, answer lost": (["create:1:late"], [0], {}, 0),
    "ssh lost for a while": (["status:2:lose", "status:3:lose", "start:1:lose"], [0], {}, 0),
    "ssh lost for good": (["status:*:lose"], [], {"LOST": "2", "TRIES": "2"}, 75),
    "copy fails": (["scp:1:fail"], [0], {}, 0),
    "set-up fails always": (["setup:*:fail"], [], {}, 1),
    "delete fails, then its answer is lost": (["delete:1:fail", "delete:3:late"], [0], {}, 0),
    "delete leaves the machine": (["delete:1:orphan"], [0], {}, 0),
    "delete hangs": (["delete:1:hang"], [0], {"SETUP_S": "3"}, 0),
    "calls hang": (["describe:2:hang", "status:2:hang"], [0], {"CALL_S": "3"}, 0),
    "half answers": (
        ["describe:2:half", "describe:5:half", "status:1:half", "status:3:half", "status:7:half"],
        [137, 0], {}, 0,
    ),
    "no answers at the end": (["describe:9:fail", "describe:10:fail"], [0], {}, 0),
    "deleted by someone": (["status:3:vanish"], [0], {}, 0),
    "user error": ([], [2], {}, 2),
    "not finite": ([], [75, 3], {}, 3),
    "stopped and killed": ([], [75, 143, "kill", 75, 0], {}, 0),
    "the same death again and again": ([], [134] * 9, {}, 134),
    "Ctrl-C while the request is made": (["create:1:INT"], [], {}, 130),
    "Ctrl-C while training": (["status:3:INT"], [], {}, 130),
    "SIGTERM in the set-up": (["setup:1:TERM"], [], {}, 143),
    "SIGHUP while asking": (["describe:4:HUP"], [], {}, 129),
    "SIGTERM while deleting": (["delete:1:TERM"], [0], {}, 0),
    "Ctrl-C at the first look": (["describe:1:INT"], [], {"PAUSE_S": "1"}, 130),
    "hours used up": ([], [75] * 99, {"SECONDS": "172797", "DEATHS": "999"}, 75),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Per accident the home and the exit code, to come; as many at once as there are cores."""

    def run(plan, codes, environment, _):
        home = Home(tmp_path_factory.mktemp("home"))
        return home, home.keep(plan, codes, **environment)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run, *accident) for name, accident in ACCIDENTS.items()}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_nothing_is_left_running(outcomes, accident):
    plan, _, _, code = ACCIDENTS[accident]
    home, ended_with = outcomes[accident].result()
    assert ended_with == code, home.printed
    assert not home.running and not home.project["refused"]
    calls = home.project["calls"]
    for entry in plan:
        verb, number, _ = entry.split(":")
        assert number == "*" or calls[verb] >= int(number), f"{entry} did not happen: {calls}"


def test_a_slice_that_nobody_deletes_is_counted_and_taken_over_by_the_next_start(home):
    assert home.keep(["status:3:KILL"], []) == -signal.SIGKILL
    assert home.running == {"pod": "READY"} and home.project["billed"] > 3
    assert home.keep([], [0]) == 0
    assert not home.running and home.project["calls"]["create"] == 1


def test_the_training_gets_its_flags_and_the_bucket_the_log(home):
    (home.folder / "home" / "git").unlink()  # the real one
    assert home.keep([], [75, 0]) == 0
    flags = "0 train_tfrecords.py --save_dir gs://b/runs/x --tpu pod --tags two words"
    assert (home.folder / "trained").read_text().splitlines() == [flags] * 2
    assert (home.folder / "worker" / "algpt2" / "train_tfrecords.py").exists()
    bucket = (home.folder / "bucket").read_text()
    assert "storage cp --recursive gs://b/tokenizer ." in bucket
    assert "train.log gs://b/runs/x.log" in bucket


def test_a_training_that_says_nothing_for_30_minutes_is_killed(home):
    touch = 'touch -d "31 minutes ago" "$HOME/algpt2/train.log"'
    home.script(
        home.folder / "bin" / "systemd-run", f"#!/bin/bash\n{touch}\n{WORKER['systemd-run']}\n"
    )
    assert home.keep([], [], DEATHS="2") == 137
    assert home.project["calls"]["kill"] == 2 and not home.running


def test_one_host_needs_no_client_of_a_pod(home):
    assert home.keep([], [0], TPU="local") == 0
    assert (home.folder / "trained").read_text().startswith(" train_tfrecords.py")


def test_the_exit_code_of_a_training_that_is_stopped_is_kept(tmp_path):
    """systemd sends SIGTERM to train_worker.sh and to the training."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "cloud").mkdir()
    shutil.copy(ROOT / "cloud" / "train_worker.sh", tmp_path / "cloud")
    Home.script(
        tmp_path / "venv" / "bin" / "python",
        '#!/bin/bash\ntrap "exit 75" TERM\necho started\nfor i in {1..200}; do sleep 0.1; done\n',
    )
    Home.script(tmp_path / "gcloud", "#!/bin/bash\n")
    process = subprocess.Popen(
        ["bash", tmp_path / "cloud" / "train_worker.sh", "gs://b/x", "--tpu", "pod"],
        env=os.environ | {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        start_new_session=True,
    )
    log = tmp_path / "train.log"
    while not (log.exists() and "started" in log.read_text()):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=30)
    assert (tmp_path / "exit_code").read_text() == "75\n"
