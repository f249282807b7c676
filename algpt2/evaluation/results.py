"""evaluation.json and evaluation.md: what the checkpoints of a run score, as records and tables.

No other module reads or writes the two files.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runs.checkpoints import EVALUATION_FILES
from ..system.console import is_main_process, log, markdown_table, table
from ..system.files import is_plain_file, json_text, write_text

JSON_FILE, MARKDOWN_FILE = EVALUATION_FILES
MARKDOWN_HEAD = "<!-- written by --eval_only from evaluation.json -->"
# What reading a JSON file that another program wrote can raise.
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Measure:
    """One number: its unit, and the count that it is a mean over or was divided by."""

    name: str
    value: float
    unit: str
    over: str


@dataclass(frozen=True)
class Evaluation:
    """What one checkpoint scores on one set: a record of evaluation.json.

    Two evaluations are equal if they measured the same by the same means, whatever the result.
    """

    checkpoint: str
    set: str
    sha256: str  # of the set's files
    text: str  # which text the model saw: as in the file, or a detokenizer's
    context: int  # tokens
    stride: int  # tokens
    precision: str  # of matrix products: float32, bfloat16 or float16
    n_eval_examples: int | None
    measures: tuple[Measure, ...] = field(compare=False)
    details: dict[str, Any] = field(compare=False)  # sums and counts behind the measures

    @property
    def set_name(self) -> str:
        """The set in tables, with the number of examples if it was shortened."""
        return f"{self.set}, first {self.n_eval_examples:,}" if self.n_eval_examples else self.set

    def title(self) -> str:
        """All that tells this evaluation from another of the same checkpoint."""
        means = f"context {self.context}, stride {self.stride}, {self.precision}"
        return f"{self.set_name}, {self.text}, {means}"


class ResultFiles:
    """evaluation.json and evaluation.md of a run: every evaluation of its checkpoints.

    A new evaluation replaces the one that it equals, and no other.
    """

    def __init__(self, folder: Path) -> None:
        """Read the files in `folder`, before hours of scoring.

        Raises:
            UserError: another program's file has one of the names, or the folder is read-only.
        """
        self.json_path, self.markdown_path = folder / JSON_FILE, folder / MARKDOWN_FILE
        self.evaluations: list[Evaluation] = []
        copy = "evaluate a copy of the checkpoint"
        move = f"move it away, or {copy}"
        if not os.access(folder, os.W_OK):
            raise UserError(f"cannot write {JSON_FILE} in {folder}: {copy}")
        for path in (self.json_path, self.markdown_path):
            if path.exists() and not path.is_file():  # reading a pipe would wait for ever
                raise UserError(f"{path} is not a file: {move}")
        if self.markdown_path.exists():
            if not self.markdown_path.read_bytes().startswith(MARKDOWN_HEAD.encode()):
                raise UserError(f"--eval_only did not write {self.markdown_path}: {move}")
        if self.json_path.exists():
            try:
                self.evaluations = read_evaluations(self.json_path)
                self._texts()  # the records are written again: fail now if they cannot be
            except DAMAGED:
                raise UserError(f"--eval_only did not write {self.json_path}: {move}") from None

    def add(self, evaluation: Evaluation) -> None:
        """Write both files with one more evaluation (process 0)."""
        if not is_main_process():
            return
        self.evaluations = [old for old in self.evaluations if old != evaluation] + [evaluation]
        json_content, markdown_content = self._texts()
        write_text(self.json_path, json_content)
        write_text(self.markdown_path, markdown_content)

    def _texts(self) -> tuple[str, str]:
        content = json_text({"evaluations": [asdict(record) for record in self.evaluations]})
        return content, markdown(self.evaluations).encode(errors="replace").decode()

    def show(self, evaluations: Sequence[Evaluation]) -> None:
        """Print evaluations of one checkpoint as one table, and where they are kept."""
        log(result_table(evaluations))
        log(f"written to {self.json_path} and {self.markdown_path.name}")


def read_evaluations(path: Path) -> list[Evaluation]:
    """The records of an evaluation.json; one of `DAMAGED` is raised for anything else."""
    return [
        Evaluation(**record | {"measures": tuple(Measure(**m) for m in record["measures"])})
        for record in json.loads(path.read_text(encoding="utf-8"))["evaluations"]
    ]


def checkpoint_rows(folder: Path, checkpoint: str) -> list[list[str]]:
    """Rows (text, measure, value, unit) of a checkpoint's evaluations in the run's `folder`; no
    rows if evaluation.json there is not ours."""
    path = folder / JSON_FILE
    try:
        evaluations = read_evaluations(path) if is_plain_file(path) else []
    except (OSError, *DAMAGED):
        return []
    return [
        [evaluation.title(), measure.name, f"{measure.value:.4f}",
         f"{measure.unit} ({measure.over})"]
        for evaluation in evaluations if Path(str(evaluation.checkpoint)).name == checkpoint
        for measure in evaluation.measures
    ]  # fmt: skip


def result_table(evaluations: Sequence[Evaluation]) -> str:
    """Evaluations of one checkpoint as aligned text; a set's name stands on its first line."""
    rows = [["set", "measure", "value", "unit", "over", "text"]]
    for evaluation in evaluations:
        for i, measure in enumerate(evaluation.measures):
            name, value = "" if i else evaluation.set_name, format_value(measure.value)
            rows.append([name, measure.name, value, measure.unit, measure.over, evaluation.text])
    first = evaluations[0]
    return (
        f"{table(rows, left='set measure unit over text'.split())}\n"
        f"{first.checkpoint}, context {first.context}, stride {first.stride}, matrix products in"
        f" {first.precision}; each token scored once, words and bytes are the file's"
    )


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """All evaluations as one Markdown table."""
    rows = ["checkpoint set text context stride precision measure value unit over".split()]
    for evaluation in evaluations:
        for measure in evaluation.measures:
            rows.append([
                evaluation.checkpoint, evaluation.set_name, evaluation.text,
                str(evaluation.context), str(evaluation.stride), evaluation.precision,
                measure.name, format_value(measure.value), measure.unit, measure.over,
            ])  # fmt: skip
    return f"{MARKDOWN_HEAD}\n\n{markdown_table(rows, right=('context', 'stride', 'value'))}\n"


def format_value(value: float) -> str:
    """A number with four digits after the point below 100, with two above."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.2f}"


def public_names(paths: Iterable[str]) -> str:
    """Several paths as evaluation.json and the model card show them."""
    return " ".join(map(public_name, paths))


def public_name(path: str) -> str:
    """A path that may become public: an absolute path is cut to its last part."""
    return Path(path).name if Path(path).is_absolute() else path
