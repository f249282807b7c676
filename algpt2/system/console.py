"""What a user sees of work under way: lines, tables, progress; printed by process 0 alone."""

import contextlib
import json
import os
import reprlib
import sys
import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from ..errors import UserError


def table(rows: list[list[str]], left: Sequence[str] = ()) -> str:
    """Rows of cells as aligned text; the first row is the heading. Columns are right-aligned but
    the first and those whose heading is in `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_left = [i == 0 or name in left for i, name in enumerate(rows[0])]
    lines = [
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, is_left, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_table(rows: list[list[str]], right: Sequence[str] = ()) -> str:
    """Rows of cells as a Markdown table; the first row is the heading. Columns whose heading is in
    `right` are right-aligned."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    cells.insert(1, ["---:" if name in right else "---" for name in rows[0]])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


PLAIN_SECONDS = 10.0  # between two progress lines in a log file


def process_index() -> int:
    """This process among several: torchrun sets RANK, a TensorFlow cluster has TF_CONFIG.

    Raises:
        UserError: RANK is none that torchrun sets, TF_CONFIG no JSON of a cluster.
    """
    if "RANK" in os.environ or "TF_CONFIG" not in os.environ:
        return torchrun_process()[0]
    try:
        config = json.loads(os.environ["TF_CONFIG"])
        task, n_chiefs = config.get("task", {}), len(config.get("cluster", {}).get("chief", ()))
        return int(task.get("index", 0)) + (n_chiefs if task.get("type") == "worker" else 0)
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f"TF_CONFIG is {reprlib.repr(os.environ['TF_CONFIG'])}: expected JSON such as "
            '{"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": "worker", "index": 0}}'
        ) from None


def torchrun_process() -> tuple[int, int]:
    """This process and the number of processes, as torchrun sets them; 0 and 1 without it.

    Raises:
        UserError: they are no numbers, or not the first below the second.
    """
    rank, count = torchrun_number("RANK", 0), torchrun_number("WORLD_SIZE", 1)
    if rank >= count:
        raise UserError(
            f"RANK={rank}: expected a number below WORLD_SIZE={count}, as torchrun sets both; "
            "unset both to run one process"
        )
    return rank, count


def torchrun_number(name: str, lowest: int) -> int:
    """An environment variable that torchrun sets; without it, the lowest number that it can have.

    Raises:
        UserError: it has another value.
    """
    value = os.environ.get(name, str(lowest))
    if not value.isdecimal() or int(value) < lowest:
        raise UserError(
            f"{name}={value}: expected a number from {lowest} on, as torchrun sets it; unset it to "
            "run one process"
        )
    return int(value)


def is_main_process() -> bool:
    """True in a single process and on process 0 of several."""
    return process_index() == 0


class MainFirst:
    """What `Processes` of both frameworks share; they have a `barrier`."""

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Process 0 runs the body before the others: it packs, they find what it packed."""
        if not is_main_process():
            self.barrier()
        yield
        if is_main_process():
            self.barrier()


class Progress:
    """A bar on a terminal, a plain line every ten seconds in a log; speed and time left in both.

    >>> with Progress("encode", total=n_bytes, unit="B") as progress:
    ...     progress.update(1024)
    """

    def __init__(
        self, description: str, *, total: int | None = None, unit: str = "it", initial: int = 0
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.initial, self.note = initial, initial, ""
        self.start_s = self.last_line_s = time.monotonic()
        self.bar = None
        if is_main_process() and sys.stderr.isatty():
            self.bar = tqdm(
                desc=description,
                total=total,
                unit=unit,
                unit_scale=True,
                initial=initial,
                dynamic_ncols=True,
                leave=False,
            )

    def update(self, n: int, note: str = "", total: int | None = None) -> None:
        """Add `n` units; `note` is a few words shown beside the speed, `total` what is known now
        of the units in all."""
        self.done += n
        self.note, self.total = note or self.note, total or self.total
        if self.bar is not None:
            self.bar.total = self.total
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif is_main_process() and time.monotonic() - self.last_line_s >= PLAIN_SECONDS:
            self.last_line_s = time.monotonic()
            print(self._line(), flush=True)

    def _line(self) -> str:
        rate = (self.done - self.initial) / max(1e-9, time.monotonic() - self.start_s)
        text = f"{self.description}: {self._size(self.done)}"
        if self.total:
            left_s = (self.total - self.done) / max(1e-9, rate)
            text += f" of {self._size(self.total)} {self.done / self.total:.0%}"
            text += f", {tqdm.format_interval(left_s)} left"
        return f"{text}, {self._size(round(rate, 2))}/s {self.note}".rstrip()

    def _size(self, n: float) -> str:
        if self.unit == "B":
            return f"{tqdm.format_sizeof(n)}B"
        return f"{n:,} {self.unit.strip()}"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def log(message: str = "") -> None:
    """Print on process 0, above the progress bar if there is one."""
    if is_main_process():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def write(text: str) -> None:
    """Print a piece of a text on process 0, at once."""
    if is_main_process():
        print(text, end="", flush=True)
