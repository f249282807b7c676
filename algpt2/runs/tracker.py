"""W&B behind a queue: a thread of its own makes every call, so that no call can hold up a step.

W&B may be slow, unreachable or broken; metrics.jsonl has everything, so the run goes on without it,
and what W&B did not get is counted and said.
"""

import netrc
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import describe
from ..system.console import log
from ..system.script import leave_threads

QUEUE_SIZE = 1000  # calls that wait at most; more are dropped
STOP_S = 5  # for the rest of the queue when the run was stopped: a machine may be taken away
FINISH_S = 60  # the same at the end of a run
UPLOAD_S = 600  # the same with a checkpoint to upload
KEPT = "metrics.jsonl has everything"

Call = Callable[[Any, Any], object]  # takes the W&B run and the module wandb


class Tracker:
    """A W&B run that is started, fed and finished by a thread.

    Args:
        start: returns the W&B run, or None if there is none to be had.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self.start = start
        self.queue: queue.Queue[tuple[Call, str, str] | None] = queue.Queue(QUEUE_SIZE)
        self.sent = self.dropped = self.failed = 0
        self.warned: set[str] = set()
        self.thread = threading.Thread(target=self._work, name="W&B", daemon=True)
        self.thread.start()

    def send(self, call: Call, kept: str = KEPT, failure: str = "W&B failed") -> None:
        """Have `call(run, wandb)` made, soon; returns at once.

        Args:
            kept, failure: what is said, once, if it raises: where the values are, what happened.
        """
        self.sent += 1
        try:
            self.queue.put_nowait((call, kept, failure))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                log(
                    f"warning: W&B is {QUEUE_SIZE:,} calls behind; new ones are dropped until it "
                    f"catches up; {KEPT}"
                )

    def finish(self, timeout_s: float) -> None:
        """Wait until W&B has everything, but no longer than this."""
        deadline_s = time.monotonic() + timeout_s
        try:
            self.queue.put(None, timeout=timeout_s)
            self.thread.join(max(0.0, deadline_s - time.monotonic()))
        except queue.Full:
            pass
        if self.thread.is_alive():
            log(f"warning: W&B did not finish in {timeout_s:g} s and is left behind; {KEPT}")
            leave_threads()
        if self.dropped or self.failed:
            log(
                f"W&B: of {self.sent:,} calls {self.dropped:,} were dropped, {self.failed:,} failed"
            )

    def _work(self) -> None:
        run = self.start()
        wandb = sys.modules.get("wandb")  # which `start` has imported
        while (item := self.queue.get()) is not None:
            if run is not None:
                self._try(run, wandb, *item)
        if run is not None:
            self._try(run, wandb, lambda run, _: run.finish(), KEPT, "W&B did not finish")

    def _try(self, run: Any, wandb: Any, call: Call, kept: str, failure: str) -> None:
        try:
            call(run, wandb)
        except Exception as error:  # whatever W&B raises, the run is worth more than its curve
            self.failed += 1
            if failure not in self.warned:
                self.warned.add(failure)
                log(f"warning: {failure} ({describe(error)}); {kept}")


def choose_mode(mode: str) -> str:
    """What `--wandb` comes to here: "online", "offline" or "off"; never a prompt."""
    logged_in = "WANDB_API_KEY" in os.environ or _in_netrc("api.wandb.ai")
    if mode == "auto":
        return "online" if logged_in else "off"
    if mode == "online" and not logged_in:
        log("W&B: not logged in, so offline; `wandb sync` sends the run later")
        return "offline"
    return mode


def run_name(save_dir: Path, run: dict[str, Any]) -> str:
    """The name of a run in W&B and on its card: the last part of its `--save_dir`.

    Args:
        save_dir: on this machine; of a URL its name is one of the cache.
        run: the content of run.json.
    """
    given = run["options"]["report"]["save_dir"]
    return given.rstrip("/").rpartition("/")[2] if "://" in given else save_dir.resolve().name


def start_wandb(save_dir: Path, run: dict[str, Any], mode: str, tags: tuple[str, ...]) -> Any:
    """A W&B run under the id in run.json: online, or offline if that fails, or None.

    W&B continues an online run of that id; an offline part of it is sent by `wandb sync`.
    """
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            import wandb

            if attempt != mode:
                wandb.teardown()  # its service holds the id of the run that did not start
            return wandb.init(
                project="algpt2", dir=save_dir, id=run["wandb_id"], name=run_name(save_dir, run),
                resume="allow" if attempt == "online" else None, mode=attempt, tags=list(tags),
                # Its copy of what is printed could hold up a print.
                config=run, settings=wandb.Settings(silent=True, init_timeout=30, console="off"),
            )  # fmt: skip
        except Exception as error:  # as above
            left = "offline, then" if attempt == "online" else KEPT
            log(f"warning: W&B is not available ({describe(error)[:200]}); {left}")
    return None


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
