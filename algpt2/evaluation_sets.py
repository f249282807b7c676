"""Evaluation sets as files, and what a model scores on them: one record a set, one table.

text      .txt .raw .tokens .jsonl .parquet (.gz, .zst): documents, each scored by itself
shards    a folder of make_tfrecords.py, one stream in which end-of-text is scored too
lambada   .jsonl of LAMBADA (OpenAI's text, or context and continuation), or its plain text
blimp     a folder of BLiMP's .jsonl, or one of its files
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import model_card
from .checkpoints import EVALUATION_FILES
from .console import Progress, is_main_process, log, table
from .corpus import CorpusReport, documents
from .detokenizers import DETOKENIZERS
from .errors import UserError
from .evaluation import (
    MinimalPair,
    Model,
    TextTotals,
    Tick,
    compressor_nats,
    score_blimp,
    score_lambada,
    text_metrics,
    text_nats,
    text_totals,
)
from .files import json_text, write_text
from .options import TrainOptions
from .start import Start, check_detokenizer, open_or_pack
from .tfrecords import MANIFEST_FILE, Manifest, PackedRows, open_rows, read_manifest
from .tokenization_algpt2 import TextTokenizer

JSON_FILE, MARKDOWN_FILE = EVALUATION_FILES
MARKDOWN_HEAD = "<!-- written by --eval_only from evaluation.json -->"
TEXT_FILE = re.compile(r"\.(txt|raw|tokens|jsonl|parquet)(\.gz|\.zst)?$")
TRAINING_FILE = re.compile(r"(?<![a-z])train(ing)?(?![a-z])")
EXAMPLES = ("lambada", "blimp")  # kinds that --n_eval_examples shortens
AS_IT_IS = "as in the file"

Scored = tuple[list["Measure"], dict[str, Any]]  # of one set: measures and details


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set: how it is read, its name in tables, its files."""

    kind: str  # text, shards, lambada or blimp
    name: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Measure:
    """One number: its unit, and the count that it is a mean over or was divided by."""

    name: str
    value: float
    unit: str
    over: str


@dataclass(frozen=True)
class Evaluation:
    """What one checkpoint scores on one set: a record of evaluation.json."""

    checkpoint: str
    set: str
    sha256: str  # of the set's files
    text: str  # which text the model saw: as in the file, or a detokenizer's
    context: int  # tokens
    stride: int  # tokens
    precision: str  # of matrix products: float32, bfloat16 or float16
    n_eval_examples: int | None
    measures: tuple[Measure, ...]
    details: dict[str, Any]  # sums and counts behind the measures

    def key(self) -> tuple[object, ...]:
        """What is measured, by which means: a second evaluation of the same replaces the first."""
        return (
            self.checkpoint, self.set, self.sha256, self.text, self.context, self.stride,
            self.precision, self.n_eval_examples,
        )  # fmt: skip


# --- finding sets --------------------------------------------------------------------------------


def choose_sets(options: TrainOptions, start: Start) -> list[EvalSet]:
    """The sets of `--eval_sets`, else the rows of `--val_path`.

    Raises:
        UserError: as `find_sets`, `open_or_pack`.
    """
    data = options.data
    if options.eval.eval_sets:
        sets = find_sets(options.eval.eval_sets)
        for one in sets:
            if one.kind == "shards":
                (folder,) = one.paths
                check_detokenizer(folder, read_manifest(folder), data.detokenizer)
        return sets
    rows = open_or_pack(data.val_path, data, start.tokenizer, start.seq_len)
    return [EvalSet("shards", model_card.names(data.val_path), (rows.folder,))]


def find_sets(sources: Sequence[str]) -> list[EvalSet]:
    """The sets in files and folders, in the order of their paths.

    In a folder, files of no known suffix and training splits (`train` in the name) are left out;
    a file that is named itself is read whatever its name.

    Raises:
        UserError: no such file, no set in a folder, JSON lines that are no objects.
    """
    found: list[EvalSet] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_file():
            some = [EvalSet(_kind(path), _name(path), (path,))]
        elif path.is_dir():
            some = list(_folder_sets(path))
        else:
            raise UserError(f"--eval_sets {source}: no such file or folder")
        if not some:
            raise UserError(
                f"--eval_sets {source}: expected text, .jsonl, .parquet or packed shards in it"
            )
        found += [one for one in some if one not in found]
    return found


def _folder_sets(folder: Path) -> Iterator[EvalSet]:
    if (folder / MANIFEST_FILE).is_file():
        yield EvalSet("shards", folder.resolve().name, (folder,))
        return
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in visible if path.is_file() and TEXT_FILE.search(path.name)]
    training = [path for path in files if TRAINING_FILE.search(path.name.lower())]
    if training:
        log(f"{folder}: training split left out ({', '.join(path.name for path in training)})")
    kinds = {path: _kind(path) for path in files if path not in training}
    pairs = tuple(path for path, kind in kinds.items() if kind == "blimp")
    if pairs:
        yield EvalSet("blimp", folder.resolve().name, pairs)
    for path in visible:
        if path.is_dir():
            yield from _folder_sets(path)
        elif kinds.get(path, "blimp") != "blimp":
            yield EvalSet(kinds[path], _name(path), (path,))


def _kind(path: Path) -> str:
    is_lambada = "lambada" in path.name.lower()
    if path.suffix != ".jsonl":
        return "lambada" if is_lambada and path.suffix == ".txt" else "text"
    first = next(_read_json_lines(path), {})
    if "sentence_good" in first:
        return "blimp"
    return "lambada" if is_lambada or "continuation" in first else "text"


def _name(path: Path) -> str:
    path = path.resolve()
    return f"{path.parent.name}/{path.name}"


# --- reading sets --------------------------------------------------------------------------------


def choose_detokenizer(one: EvalSet, name: str | None) -> str | None:
    """The detokenizer of a set: `name`, or by the set's file name for `auto`; None: the text is
    scored as it is. BLiMP is never changed, nor is OpenAI's LAMBADA by `auto`; shards have been
    packed with one or none."""
    if one.kind == "blimp":
        return None
    if one.kind == "shards":
        return read_manifest(one.paths[0]).detokenizer
    if name != "auto":
        return name
    for pattern, detokenizer in ((r"^wiki\.|wikitext", "wikitext"), (r"^ptb\.", "ptb")):
        if re.search(pattern, one.paths[0].name.lower()):
            return detokenizer
    return "lambada" if one.kind == "lambada" and one.paths[0].suffix == ".txt" else None


def read_passages(path: Path) -> Iterator[tuple[str, str]]:
    """LAMBADA's passages as (all but the last word, last word).

    Raises:
        UserError: neither `text` nor `context` and `continuation` in a JSON line, or one word.
    """
    if path.suffix == ".jsonl":
        rows: Iterable[dict] = _read_json_lines(path)
    else:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = ({"text": line} for line in lines if line.strip())
    for number, row in enumerate(rows, start=1):
        text = row.get("text", f"{row.get('context', '')} {row.get('continuation', '')}")
        context, _, word = str(text).strip().rpartition(" ")
        if not context:
            raise UserError(f"{path}, passage {number}: expected text, or context and continuation")
        yield context, word


def read_pairs(path: Path) -> Iterator[MinimalPair]:
    """BLiMP's pairs, in the groups of paradigm, phenomenon, field, and all together.

    Raises:
        UserError: a field is missing.
    """
    names = ("UID", "linguistics_term", "field")
    for number, row in enumerate(_read_json_lines(path), start=1):
        missing = [n for n in ("sentence_good", "sentence_bad", *names) if n not in row]
        if missing:
            raise UserError(f"{path}, line {number}: no {', '.join(missing)}: not BLiMP's")
        levels = ("paradigm", "phenomenon", "field")
        # One paradigm spells its field syntax/semantics, the others syntax_semantics.
        values = [str(row[name]).replace("/", "_") for name in names]
        groups = [f"{level} {value}" for level, value in zip(levels, values, strict=True)]
        yield MinimalPair(row["sentence_good"], row["sentence_bad"], ("all", *groups))


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object")
            yield row


def decode_documents(rows: PackedRows, tokenizer: TextTokenizer) -> Iterator[str]:
    """The documents that the rows hold: rows overlap by one token, documents start with a control
    code."""
    starts, ids = {*tokenizer.special_ids}, []
    for i in range(len(rows)):
        for token in rows[i][:-1].tolist():
            if token not in starts:
                ids.append(token)
            elif ids:
                yield tokenizer.decode(ids)
                ids = []
    if ids:
        yield tokenizer.decode(ids)


def row_streams(rows: PackedRows) -> list[np.ndarray]:
    """The tokens of packed rows, which overlap by one, as one stream (n_rows * seq_len + 1,).

    Rows of several texts that were joined, one for each of `--control_codes`, are as many streams:
    where one ends, the next row does not begin with its last token.
    """
    table = rows[np.arange(len(rows))]
    ends = 1 + np.flatnonzero(table[:-1, -1] != table[1:, 0])
    return [np.append(part[:, :-1], part[-1, -1]) for part in np.split(table, ends)]


# --- scoring sets --------------------------------------------------------------------------------


class Evaluator:
    """A checkpoint, its tokenizer and the options that all its sets share."""

    def __init__(
        self, model: Model, tokenizer: TextTokenizer, options: TrainOptions, *, precision: str,
        checkpoint: str,
    ) -> None:  # fmt: skip
        """Args:
            precision: name of the number format of matrix products.
            checkpoint: name of the checkpoint.
        Raises:
            UserError: --stride is larger than the context.
        """
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.stride = options.eval.stride or model.context
        if self.stride > model.context:
            raise UserError(f"--stride {self.stride}: expected 1 to {model.context}, the context")
        self.facts = _facts(checkpoint, model.context, self.stride, precision)

    def evaluate(self, one: EvalSet) -> Evaluation:
        """All measures of one set."""
        detokenizer = choose_detokenizer(one, self.options.data.detokenizer)
        score = {
            "text": self._text, "shards": self._shards, "lambada": self._lambada,
            "blimp": self._blimp,
        }[one.kind]  # fmt: skip
        change = DETOKENIZERS.get(detokenizer, str)
        with Progress(f"evaluate {one.name}", unit=" tokens") as progress:
            measures, details = score(one, change, lambda n, n_all: progress.update(n, total=n_all))
        n_examples = self.options.eval.n_eval_examples if one.kind in EXAMPLES else None
        return Evaluation(
            set=one.name, sha256=fingerprint(one), n_eval_examples=n_examples,
            measures=tuple(measures), details=details, text=_text_seen(detokenizer), **self.facts,
        )  # fmt: skip

    def _text(self, one: EvalSet, change: Callable[[str], str], tick: Tick) -> Scored:
        report = CorpusReport()

        def streams() -> Iterator[np.ndarray]:
            for text in documents(
                str(one.paths[0]), text_key=self.options.data.text_key, report=report
            ):
                (ids,) = self.tokenizer.encode_batch([change(text)])
                yield np.array([self.tokenizer.eot_id, *ids], self.tokenizer.dtype)

        nats, n_tokens = text_nats(self.model, streams(), self.stride, tick)
        totals = TextTotals(n_tokens, report.words + report.line_ends, report.text_bytes)
        texts = documents(str(one.paths[0]), text_key=self.options.data.text_key)
        return self._text_measures(nats, n_tokens, totals, map(change, texts))

    def _shards(self, one: EvalSet, change: Callable[[str], str], tick: Tick) -> Scored:
        rows = open_rows(one.paths[0])
        if rows.manifest.tokenizer_sha256 != self.tokenizer.fingerprint:
            raise UserError(f"{rows.folder} was packed with another tokenizer than the model's")
        nats, n_tokens = text_nats(self.model, row_streams(rows), self.stride, tick)
        texts = decode_documents(rows, self.tokenizer)
        return self._text_measures(nats, n_tokens, text_totals(rows.manifest), texts)

    def _text_measures(
        self, nats: float, n_tokens: int, totals: TextTotals, texts: Iterable[str]
    ) -> Scored:
        """The measures of `texts` as the model saw them, by the model and by compressors."""
        measures, details = text_measures(nats, n_tokens, totals)
        if self.options.compressors:
            log("compressing the text with gzip -9 and xz -9e")
            for name, their_nats in compressor_nats(texts).items():
                *_, bits_per_byte = text_measures(their_nats, n_tokens, totals)[0]
                measures.append(replace(bits_per_byte, name=name))
        return measures, details

    def _lambada(self, one: EvalSet, change: Callable[[str], str], tick: Tick) -> Scored:
        passages = (
            change(f"{context} {word}").rpartition(" ")[::2]
            for context, word in self._first(read_passages(one.paths[0]))
        )
        encode, end_of_text = self.tokenizer.encode_batch, self.tokenizer.eot_id
        score = score_lambada(self.model, passages, encode, end_of_text, tick)
        over = f"{score.passages:,} passages"
        return [
            Measure("accuracy, last word", 100 * score.word_accuracy, "%", over),
            Measure("ppl, last word", score.word_ppl, "per word", over),
            Measure("accuracy, last token", 100 * score.token_accuracy, "%", over),
            Measure("ppl, last token", score.token_ppl, "per token", over),
        ], asdict(score)

    def _blimp(self, one: EvalSet, change: Callable[[str], str], tick: Tick) -> Scored:
        pairs = itertools.chain.from_iterable(self._first(read_pairs(path)) for path in one.paths)
        encode, end_of_text = self.tokenizer.encode_batch, self.tokenizer.eot_id
        groups = score_blimp(self.model, pairs, encode, end_of_text, tick)
        paradigms = [accuracy for name, (accuracy, _) in groups.items() if _is_paradigm(name)]
        mean = Measure(
            "accuracy", 100 * float(np.mean(paradigms)), "%", f"mean of {len(paradigms)} paradigms"
        )
        shown = sorted(name for name in groups if name != "all" and not _is_paradigm(name))
        return [mean] + [
            Measure(f"accuracy, {name}", 100 * groups[name][0], "%", f"{groups[name][1]:,} pairs")
            for name in shown
        ], {"groups": {name: {"accuracy": a, "pairs": n} for name, (a, n) in groups.items()}}

    def _first(self, examples: Iterable) -> Iterator:
        return itertools.islice(examples, self.options.eval.n_eval_examples)


def text_measures(nats: float, n_tokens: int, totals: TextTotals) -> Scored:
    """The measures of a text; words and bytes are those of the text before a detokenizer."""
    values = text_metrics(nats / n_tokens, totals)
    tokens, words = f"{n_tokens:,} tokens", f"{totals.words:,} words, line ends counted"
    return [
        Measure("loss", values["val_loss"], "nats/token", tokens),
        Measure("ppl", values["val_ppl"], "per token", tokens),
        Measure("word ppl", values["val_word_ppl"], "per word", words),
        Measure("bits per byte", values["val_bpb"], "bits/byte", f"{totals.text_bytes:,} bytes"),
    ], {"nats": nats, "scored_tokens": n_tokens, **asdict(totals)}


def evaluation_of_rows(
    options: TrainOptions, checkpoint: str, manifest: Manifest, loss: float, precision: str
) -> Evaluation:
    """The record of a loss (nats per token) over all rows of `--val_path`, however it came about.

    It is that of an `Evaluator` whose windows are the rows.
    """
    context, n_tokens = manifest.seq_len, manifest.n_rows * manifest.seq_len
    measures, details = text_measures(loss * n_tokens, n_tokens, text_totals(manifest))
    return Evaluation(
        set=model_card.names(options.data.val_path), sha256=manifest.fingerprint,
        text=_text_seen(manifest.detokenizer), n_eval_examples=None, measures=tuple(measures),
        details=details, **_facts(checkpoint, context, context, precision),
    )  # fmt: skip


def _text_seen(detokenizer: str | None) -> str:
    return f"{detokenizer} detokenizer" if detokenizer else AS_IT_IS


def _facts(checkpoint: str, context: int, stride: int, precision: str) -> dict[str, Any]:
    """What all evaluations of one command share."""
    return {
        "checkpoint": checkpoint, "context": context, "stride": stride,
        "precision": precision,
    }  # fmt: skip


def _is_paradigm(group: str) -> bool:
    return group.startswith("paradigm ")


def fingerprint(one: EvalSet) -> str:
    """One sha256 for the content of a set."""
    if one.kind == "shards":
        return read_manifest(one.paths[0]).fingerprint
    digest = hashlib.sha256()
    for path in one.paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# --- the files and the table ---------------------------------------------------------------------


class ResultFiles:
    """evaluation.json and evaluation.md of a run: every evaluation of its checkpoints.

    An evaluation is replaced by a second one of the same (`Evaluation.key`) and by nothing else.
    """

    def __init__(self, folder: Path) -> None:
        """Read what is there, before hours of scoring.

        Raises:
            UserError: a file of that name that is not ours, or no right to write.
        """
        self.json_path, self.markdown_path = folder / JSON_FILE, folder / MARKDOWN_FILE
        self.evaluations: dict[tuple, Evaluation] = {}
        move = "move it away, or evaluate a copy of the checkpoint"
        if not os.access(folder, os.W_OK):
            raise UserError(f"cannot write evaluation.json in {folder}: copy the checkpoint")
        for path in (self.json_path, self.markdown_path):
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise UserError(f"{path} is no file: {move}")
        if self.markdown_path.exists():
            if not self.markdown_path.read_bytes().startswith(MARKDOWN_HEAD.encode()):
                raise UserError(f"{self.markdown_path} is not a table of --eval_only: {move}")
        if self.json_path.exists():
            try:
                records = json.loads(self.json_path.read_text(encoding="utf-8"))["evaluations"]
                for record in records:
                    self._add(_from_record(record))
                self._texts()  # what is there is written again: it has to be possible
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                ArithmeticError,
                RecursionError,
            ):
                raise UserError(f"{self.json_path} is not one of --eval_only: {move}") from None

    def _add(self, evaluation: Evaluation) -> None:
        self.evaluations.pop(evaluation.key(), None)
        self.evaluations[evaluation.key()] = evaluation

    def add(self, evaluation: Evaluation) -> None:
        """Write both files with one more evaluation (process 0)."""
        if not is_main_process():
            return
        self._add(evaluation)
        json_content, markdown_content = self._texts()
        write_text(self.json_path, json_content)
        write_text(self.markdown_path, markdown_content)

    def _texts(self) -> tuple[str, str]:
        evaluations = [*self.evaluations.values()]
        content = json_text({"evaluations": [asdict(one) for one in evaluations]})
        return content, markdown(evaluations).encode(errors="replace").decode()


def evaluate_all(
    evaluator: "Evaluator", sets: Sequence[EvalSet], results: ResultFiles, start: Start
) -> None:
    """Score every set, print one table, keep it: in the files, the card, W&B, on the hub."""
    evaluations = []
    for one in sets:
        evaluations.append(evaluator.evaluate(one))
        results.add(evaluations[-1])
    publish(evaluations, results, start, evaluator.options)


def publish(
    evaluations: Sequence[Evaluation], results: ResultFiles, start: Start, options: TrainOptions
) -> None:
    """Print evaluations that are kept as one table; carry them on to the card, W&B, the hub."""
    log(result_table(evaluations))
    log(f"written to {results.json_path} and {results.markdown_path.name}")
    if start.folder:
        model_card.publish_evaluation(start.folder, options.report)


def _from_record(record: dict[str, Any]) -> Evaluation:
    measures = tuple(Measure(**measure) for measure in record["measures"])
    return Evaluation(**record | {"measures": measures})


def result_table(evaluations: Sequence[Evaluation]) -> str:
    """Evaluations of one checkpoint as aligned text; a line without a set is of the one above."""
    facts = evaluations[0]
    lines = [["set", "measure", "value", "unit", "over", "text"]]
    for one in evaluations:
        name = model_card.set_name(one.set, one.n_eval_examples)
        for i, measure in enumerate(one.measures):
            lines.append([
                "" if i else name, measure.name, show(measure.value), measure.unit, measure.over,
                one.text,
            ])  # fmt: skip
    return (
        f"{table(lines, left='set measure unit over text'.split())}\n"
        f"{facts.checkpoint}, context {facts.context}, stride {facts.stride}, matrix products in"
        f" {facts.precision}; each token scored once, words and bytes are the file's"
    )


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """All evaluations as one Markdown table."""
    lines = [
        "checkpoint set text context stride precision measure value unit over".split(),
        "--- --- --- ---: ---: --- --- ---: --- ---".split(),
    ]
    for one in evaluations:
        name = model_card.set_name(one.set, one.n_eval_examples)
        for measure in one.measures:
            lines.append([
                one.checkpoint, name, one.text, str(one.context), str(one.stride),
                one.precision, measure.name, show(measure.value), measure.unit, measure.over,
            ])  # fmt: skip
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{MARKDOWN_HEAD}\n\n{rows}\n"


def show(value: float) -> str:
    """A number with four digits behind the point below 100, with two above."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.2f}"
