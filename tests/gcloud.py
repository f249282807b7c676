"""A stand-in for gcloud: one project whose TPUs live in a file, and the accidents of a test.

Worker 0 is the folder "worker"; what it is told runs there for real, with bash. A call lasts a
virtual minute, and every machine is billed for it. FLAGS are those that Google Cloud CLI 528.0.0
takes (`gcloud meta lint-gcloud-commands`, which sends nothing); another flag is refused.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

HOME = Path(os.environ.get("STAND_IN", ""))
COMMON = {"zone", "quiet", "project"}
FLAGS = {
    "auth application-default login": set(),
    "auth login": set(),
    "billing budgets create": {
        "billing-account", "display-name", "budget-amount", "threshold-rule", "filter-projects",
    },
    "compute instances list": set(),
    "compute tpus queued-resources create": {
        "node-id", "accelerator-type", "runtime-version", "spot", "service-account", "scopes",
        "valid-until-duration", "async",
    },
    "compute tpus queued-resources delete": {"force"},
    "compute tpus queued-resources describe": {"format"},
    "compute tpus queued-resources list": {"format"},
    "compute tpus tpu-vm accelerator-types list": set(),
    "compute tpus tpu-vm delete": set(),
    "compute tpus tpu-vm describe": {"format"},
    "compute tpus tpu-vm list": {"format"},
    "compute tpus tpu-vm scp": {"worker", "strict-host-key-checking", "recurse"},
    "compute tpus tpu-vm ssh": {"worker", "strict-host-key-checking", "command", "ssh-flag"},
    "compute tpus tpu-vm versions list": set(),
    "config set": set(),
    "iam service-accounts create": set(),
    "iam service-accounts delete": set(),
    "logging sinks update": {"add-exclusion"},
    "projects add-iam-policy-binding": {"member", "role", "condition"},
    "projects delete": set(),
    "services enable": set(),
    "storage buckets add-iam-policy-binding": {"member", "role"},
    "storage buckets create": {
        "location", "uniform-bucket-level-access", "soft-delete-duration",
    },
    "storage cat": set(),
    "storage cp": {"recursive"},
    "storage ls": set(),
    "storage rm": {"recursive"},
}  # fmt: skip


class Refused(Exception):
    """What gcloud prints to stderr before it ends with code 1."""


def split(arguments: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """The command, its positional arguments and its flags.

    Raises:
        Refused: gcloud has no such command or flag.
    """
    starts = [" ".join(arguments[:n]) for n in (5, 4, 3, 2)]
    command = next((start for start in starts if start in FLAGS), None)
    if command is None:
        raise Refused(f"Invalid choice: {starts[0]}")
    positional, flags, rest = [], {}, arguments[len(command.split()) :]
    switches = {"quiet", "spot", "force", "async", "recursive", "recurse"}
    switches |= {"uniform-bucket-level-access"}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, is_joined, value = word[2:].partition("=")
        if name not in FLAGS[command] | COMMON:
            raise Refused(f"unrecognized arguments: --{name}")
        flags[name] = value if is_joined or name in switches else rest.pop(0)
    return command, positional, flags


class Project:
    """Requests and machines by name, the virtual clock, and the bill."""

    def __init__(self) -> None:
        self.path = HOME / "state.json"
        self.data = json.loads(self.path.read_text()) if self.path.exists() else {
            "requests": {}, "machines": {}, "minutes": 0, "billed": 0, "calls": {}, "refused": [],
        }  # fmt: skip

    def save(self) -> None:
        """Atomically: a test reads it while calls go on."""
        draft = self.path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(self.data))
        draft.rename(self.path)

    def tick(self) -> None:
        """A minute goes by: machines are billed, requests proceed."""
        self.data["minutes"] += 1
        self.data["billed"] += sum(m == "READY" for m in self.data["machines"].values())
        following = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}
        for name, state in self.data["requests"].items():
            self.data["requests"][name] = following.get(state, state)
            if self.data["requests"][name] == "ACTIVE" and name not in self.data["machines"]:
                self.data["machines"][name] = "READY"
                new_worker()

    def preempt(self) -> None:
        """Google takes all machines back."""
        for name in self.data["machines"]:
            self.data["machines"][name] = "PREEMPTED"
            self.data["requests"][name] = "SUSPENDED"

    def accident(self, verb: str) -> str:
        """What is to happen to this call: the plan has "verb:how often it was called:what"."""
        count = self.data["calls"][verb] = self.data["calls"].get(verb, 0) + 1
        for entry in json.loads((HOME / "plan.json").read_text()):
            where, number, what = entry.split(":")
            if where == verb and (number == "*" or int(number) == count):
                return what
        return ""


def new_worker() -> None:
    """Worker 0 of a new machine: nothing is left of the last."""
    import shutil  # a call without it takes half the time

    shutil.rmtree(HOME / "worker", ignore_errors=True)
    (HOME / "worker").mkdir()


def run(project: Project, command: str, names: list[str], flags: dict, what: str) -> str:
    """Do what the command says; returns what it prints."""
    group, verb = command.split()[-2:]
    requests, machines = project.data["requests"], project.data["machines"]
    name = names[0].partition(":")[0] if names else ""
    if verb == "create":
        if name in requests:
            raise Refused(f"ALREADY_EXISTS: Resource '{name}' already exists")
        requests[name] = "WAITING_FOR_RESOURCES"
        return ""
    if verb == "ssh" or verb == "scp":
        return on_worker(machines, verb, names, flags)
    table = requests if group == "queued-resources" else machines
    if name not in table:
        raise Refused(f"NOT_FOUND: Resource '{name}' was not found")
    if verb == "delete":
        if group == "queued-resources" and what != "orphan":
            machines.pop(name, None)
        del table[name]
        return ""
    return table[name] + "\n"


def on_worker(machines: dict, verb: str, names: list[str], flags: dict[str, str]) -> str:
    """A command on worker 0, or a file for it."""
    name = names[-1].partition(":")[0]
    if machines.get(name) != "READY":
        raise Refused(f"NOT_FOUND or not READY: {name}")
    import subprocess

    worker = HOME / "worker"
    if verb == "scp":
        (worker / Path(names[0]).name).write_bytes(Path(names[0]).read_bytes())
        return ""
    process = subprocess.run(
        ["bash", "-c", flags["command"]], cwd=worker, capture_output=True, text=True,
        env={"HOME": str(worker), "PATH": f"{HOME / 'bin'}:/usr/bin:/bin", "STAND_IN": str(HOME)},
    )  # fmt: skip
    if process.returncode:
        raise Refused(f"{process.stderr}\n[/usr/bin/ssh] exited with return code [255].")
    return process.stdout


def verb_of(command: str, flags: dict[str, str]) -> str:
    """A name for the call, in plans: create, delete, describe, scp; ssh by what it is for."""
    if command.endswith("ssh"):
        for word, name in {
            "systemd-run": "start",
            "setup_worker": "setup",
            "kill -s": "kill",
        }.items():
            if word in flags["command"]:
                return name
        return "status"
    return command.split()[-1]


def main(arguments: list[str]) -> int:
    """One call of gcloud."""
    project = Project()
    try:
        command, names, flags = split(arguments)
        if command.startswith("storage"):
            return 0
        project.tick()
        verb = verb_of(command, flags)
        what = project.accident(verb)
        if what == "preempt":
            project.preempt()
        if what == "vanish":
            project.data["requests"].clear()
            project.data["machines"].clear()
        if what == "hang":
            project.save()
            time.sleep(60)
        if what in ("fail", "lose"):
            raise Refused("UNAVAILABLE: the service is currently unavailable")
        if what == "refuse":
            project.data["requests"][names[0]] = "FAILED"
            return 0
        project.save()
        if what in ("INT", "TERM", "HUP", "KILL"):
            service = os.fork()  # Google, which goes on also when gcloud is killed
            if service:
                os.kill(int((HOME / "pid").read_text()), signal.Signals[f"SIG{what}"])
                os.waitpid(service, 0)
                project = Project()
                return 0
            os.setsid()
            time.sleep(1)
            project = Project()
        printed = run(project, command, names, flags, what)
        print(printed[: len(printed) // 4] if what == "half" else printed, end="")
        if what == "late":  # done, but the answer is lost
            raise Refused("UNAVAILABLE: connection reset")
        return 0
    except Refused as refused:
        if str(refused).startswith(("Invalid", "unrecognized")):
            project.data["refused"].append(f"{refused}: {arguments}")
        print(f"ERROR: (gcloud.{'.'.join(arguments[:4])}) {refused}", file=sys.stderr)
        return 1
    finally:
        project.save()
