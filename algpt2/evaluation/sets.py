"""Evaluation sets as files, and what a model scores on each of them.

text      .txt .raw .tokens .jsonl .parquet, or compressed: documents, each scored by itself
shards    a folder of make_tfrecords.py: one stream, in which end-of-text is scored too
lambada   .jsonl of LAMBADA (OpenAI's text, or context and continuation), or its plain text
blimp     a folder of BLiMP's .jsonl files, or one file of it
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..corpus.documents import documents, log_counts
from ..corpus.parts import SKIP_HINT, BrokenInput, CorpusCounts, Reading, split_suffix
from ..errors import UserError
from ..options import TrainOptions
from ..runs.start import Start, check_text_options, open_or_pack
from ..shards.detokenizers import DETOKENIZERS
from ..shards.tfrecords import MANIFEST_FILE, Manifest, PackedRows, open_rows, read_manifest
from ..system.console import Progress, log
from ..tokenization_algpt2 import TextTokenizer
from .results import Evaluation, Measure, ResultFiles, public_names
from .scoring import (
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

TEXT_SUFFIXES = (".txt", ".raw", ".tokens", ".jsonl", ".parquet")
TRAINING_FILE = re.compile(r"(?<![a-z])train(ing)?(?![a-z])")
EXAMPLES = ("lambada", "blimp")  # kinds that --n_eval_examples shortens

Score = tuple[list[Measure], dict[str, Any]]  # of one set: measures and details


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set: how it is read, its name in tables, its files."""

    kind: str  # text, shards, lambada or blimp
    name: str
    paths: tuple[Path, ...]


# --- finding sets --------------------------------------------------------------------------------


def choose_sets(options: TrainOptions, start: Start) -> list[EvalSet]:
    """The sets of `--eval_sets`, else the rows of `--val_path`.

    Raises:
        UserError: as `find_sets`, `open_or_pack`.
    """
    data = options.data
    if options.eval.eval_sets:
        sets = find_sets(options.eval.eval_sets)
        for eval_set in sets:
            if eval_set.kind == "shards":
                (folder,) = eval_set.paths
                check_text_options(folder, read_manifest(folder), data)
        return sets
    rows = open_or_pack(data.val_path, data, start.tokenizer, start.seq_len)
    return [EvalSet("shards", public_names(data.val_path), (rows.folder,))]


def choose_code(options: TrainOptions) -> str | None:
    """The control code before each text of `--eval_sets`; None: bos, else end-of-text."""
    codes = options.data.control_codes or ()
    if not options.eval.eval_sets or not codes:
        return None  # packed rows have theirs
    if len(codes) > 1:
        raise UserError(f"--control_codes {' '.join(codes)} with --eval_sets: expected one code")
    return codes[0]


def find_sets(sources: Sequence[str]) -> list[EvalSet]:
    """The sets in files and folders, each once, in the order of their paths.

    A folder's training splits (`train` in the name) and files with an unknown suffix are left out;
    a file that is itself a source is read whatever its name.

    Raises:
        UserError: no such file, no set in a folder, a line of JSON that is not an object.
    """
    sets: dict[EvalSet, None] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_file():
            in_source = [EvalSet(_kind(path), _name(path), (path,))]
        elif path.is_dir():
            in_source = list(_folder_sets(path))
        else:
            raise UserError(f"--eval_sets {source}: no such file or folder")
        if not in_source:
            raise UserError(
                f"--eval_sets {source}: expected text, .jsonl, .parquet or packed shards in it"
            )
        sets |= dict.fromkeys(in_source)
    return list(sets)


def _folder_sets(folder: Path) -> Iterator[EvalSet]:
    if (folder / MANIFEST_FILE).is_file():
        yield EvalSet("shards", folder.resolve().name, (folder,))
        return
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in visible if path.is_file() and _suffix(path) in TEXT_SUFFIXES]
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
    if _suffix(path) != ".jsonl":
        return "lambada" if is_lambada and _suffix(path) == ".txt" else "text"
    first = next(_read_rows(path))
    if "sentence_good" in first:
        return "blimp"
    return "lambada" if is_lambada or "continuation" in first else "text"


def _suffix(path: Path) -> str:
    return split_suffix(path.name)[0]


def _name(path: Path) -> str:
    path = path.resolve()
    return f"{path.parent.name}/{path.name}"


# --- reading sets --------------------------------------------------------------------------------


def choose_detokenizer(eval_set: EvalSet, name: str | None) -> str | None:
    """The detokenizer of a set, or None to score its text as it is.

    `auto` goes by the file's name, and leaves OpenAI's LAMBADA as it is. BLiMP always stays as it
    is; shards keep the detokenizer that they were packed with.
    """
    path = eval_set.paths[0]
    if eval_set.kind == "blimp":
        return None
    if eval_set.kind == "shards":
        return read_manifest(path).detokenizer
    if name != "auto":
        return name
    for pattern, detokenizer in ((r"^wiki\.|wikitext", "wikitext"), (r"^ptb\.", "ptb")):
        if re.search(pattern, path.name.lower()):
            return detokenizer
    return "lambada" if eval_set.kind == "lambada" and _suffix(path) == ".txt" else None


def read_passages(path: Path) -> Iterator[tuple[str, str]]:
    """LAMBADA's passages as (all but the last word, last word).

    Raises:
        UserError: a line has neither `text` nor `context` and `continuation`, or a single word.
    """
    if _suffix(path) == ".jsonl":
        rows: Iterable[dict] = _read_rows(path)
    else:
        rows = ({"text": line} for line in read_texts(path, Reading(line_by_line=True)))
    for number, row in enumerate(rows, start=1):
        text = row.get("text", f"{row.get('context', '')} {row.get('continuation', '')}")
        context, _, word = str(text).strip().rpartition(" ")
        if not context:
            raise UserError(f"{path}, passage {number}: expected text, or context and continuation")
        yield context, word


def read_pairs(path: Path) -> Iterator[MinimalPair]:
    """BLiMP's pairs, each in the groups `all`, its paradigm, its phenomenon and its field.

    Raises:
        UserError: a field is missing.
    """
    names = ("UID", "linguistics_term", "field")
    for number, row in enumerate(_read_rows(path), start=1):
        missing = [n for n in ("sentence_good", "sentence_bad", *names) if n not in row]
        if missing:
            raise UserError(f"{path}, row {number}: no {', '.join(missing)}: not BLiMP's")
        levels = ("paradigm", "phenomenon", "field")
        # One paradigm spells its field syntax/semantics, the others syntax_semantics.
        values = [str(row[name]).replace("/", "_") for name in names]
        groups = [f"{level} {value}" for level, value in zip(levels, values, strict=True)]
        yield MinimalPair(row["sentence_good"], row["sentence_bad"], ("all", *groups))


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, read_texts(path, Reading(text_key=None)))


def read_texts(path: Path, reading: Reading, counts: CorpusCounts | None = None) -> Iterator[str]:
    """The documents of a file as the packer reads them; says what it changed or left out.

    Raises:
        UserError: damage, or a file without any document.
    """
    counts = CorpusCounts() if counts is None else counts
    try:
        yield from documents(str(path), reading, counts=counts)
    except BrokenInput as error:
        raise UserError(str(error).removesuffix(SKIP_HINT)) from None
    if counts.empty or counts.undecodable or counts.end_marks:
        log_counts(counts, reading.end_of_text or "", f": {path}")


def decode_documents(rows: PackedRows, tokenizer: TextTokenizer) -> Iterator[str]:
    """The documents in packed rows: each starts with a control code; rows overlap by a token."""
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
    """The tokens of packed rows, which overlap by one token, as a stream (n_rows * seq_len + 1,).

    Several texts with `--control_codes` of their own are as many streams: where a text ends, the
    next row does not begin with the last token of the row before.
    """
    tokens = rows[np.arange(len(rows))]
    ends = 1 + np.flatnonzero(tokens[:-1, -1] != tokens[1:, 0])
    return [np.append(text[:, :-1], text[-1, -1]) for text in np.split(tokens, ends)]


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
            UserError: --stride is larger than the context; several --control_codes.
        """
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.code = choose_code(options)
        # What stands before each text: bos where there is one, as in lm-evaluation-harness.
        self.start_id = tokenizer.token_to_id(self.code) if self.code else tokenizer.start_id
        self.stride = options.eval.stride or model.context
        if self.stride > model.context:
            raise UserError(f"--stride {self.stride}: expected 1 to {model.context}, the context")
        self.means = _means(checkpoint, model.context, self.stride, precision)

    def evaluate_all(self, sets: Sequence[EvalSet], results: ResultFiles) -> None:
        """Score every set, keep each as soon as it is scored, print one table."""
        evaluations = []
        for eval_set in sets:
            evaluations.append(self.evaluate(eval_set))
            results.add(evaluations[-1])
        results.show(evaluations)

    def evaluate(self, eval_set: EvalSet) -> Evaluation:
        """All measures of one set."""
        detokenizer = choose_detokenizer(eval_set, self.options.data.detokenizer)
        change = DETOKENIZERS.get(detokenizer, str)
        score = getattr(self, f"_score_{eval_set.kind}")
        with Progress(f"evaluate {eval_set.name}", unit=" tokens") as progress:
            measures, details = score(
                eval_set, change, lambda n, n_all: progress.update(n, total=n_all)
            )
        n_examples = self.options.eval.n_eval_examples if eval_set.kind in EXAMPLES else None
        return Evaluation(
            set=eval_set.name, sha256=fingerprint(eval_set), n_eval_examples=n_examples,
            measures=tuple(measures), details=details,
            text=_text_seen(detokenizer, self.code), **self.means,
        )  # fmt: skip

    def _score_text(self, eval_set: EvalSet, change: Callable[[str], str], tick: Tick) -> Score:
        path, counts, data = eval_set.paths[0], CorpusCounts(), self.options.data
        reading = Reading(
            data.text_key, data.line_by_line, document_mark=data.document_mark,
            end_of_text=self.tokenizer.end_of_text,
        )  # fmt: skip

        def streams() -> Iterator[np.ndarray]:
            for text in read_texts(path, reading, counts):
                (ids,) = self.tokenizer.encode_batch([change(text)])
                yield np.array([self.start_id, *ids], self.tokenizer.dtype)

        nats, n_tokens = text_nats(self.model, streams(), self.stride, tick)
        totals = TextTotals(n_tokens, counts.words + counts.line_ends, counts.text_bytes)
        texts = map(change, read_texts(path, reading))
        return self._with_compressors(nats, n_tokens, totals, texts)

    def _score_shards(self, eval_set: EvalSet, change: Callable[[str], str], tick: Tick) -> Score:
        rows = open_rows(eval_set.paths[0])
        if rows.manifest.tokenizer_sha256 != self.tokenizer.fingerprint:
            raise UserError(f"{rows.folder} was packed with another tokenizer than the model's")
        nats, n_tokens = text_nats(self.model, row_streams(rows), self.stride, tick)
        texts = decode_documents(rows, self.tokenizer)
        return self._with_compressors(nats, n_tokens, text_totals(rows.manifest), texts)

    def _with_compressors(
        self, nats: float, n_tokens: int, totals: TextTotals, texts: Iterable[str]
    ) -> Score:
        """`text_measures`, and with `--compressors` bits per byte of `texts`, which the model saw,
        by gzip and xz."""
        measures, details = text_measures(nats, n_tokens, totals)
        if self.options.compressors:
            log("compressing the text with gzip -9 and xz -9e")
            for name, packed_nats in compressor_nats(texts).items():
                *_, bits_per_byte = text_measures(packed_nats, n_tokens, totals)[0]
                measures.append(replace(bits_per_byte, name=name))
        return measures, details

    def _score_lambada(self, eval_set: EvalSet, change: Callable[[str], str], tick: Tick) -> Score:
        passages = (
            change(f"{context} {word}").rpartition(" ")[::2]
            for context, word in self._first(read_passages(eval_set.paths[0]))
        )
        encode = self.tokenizer.encode_batch
        score = score_lambada(self.model, passages, encode, self.start_id, tick)
        over = f"{score.passages:,} passages"
        return [
            Measure("accuracy, last word", 100 * score.word_accuracy, "%", over),
            Measure("ppl, last word", score.word_ppl, "per word", over),
            Measure("accuracy, last token", 100 * score.token_accuracy, "%", over),
            Measure("ppl, last token", score.token_ppl, "per token", over),
        ], asdict(score)

    def _score_blimp(self, eval_set: EvalSet, change: Callable[[str], str], tick: Tick) -> Score:
        files = (self._first(read_pairs(path)) for path in eval_set.paths)
        pairs = itertools.chain.from_iterable(files)
        encode = self.tokenizer.encode_batch
        groups = score_blimp(self.model, pairs, encode, self.start_id, tick)
        paradigms = [accuracy for name, (accuracy, _) in groups.items() if _is_paradigm(name)]
        mean = Measure(
            "accuracy", 100 * float(np.mean(paradigms)), "%", f"mean of {len(paradigms)} paradigms"
        )
        printed = sorted(name for name in groups if name != "all" and not _is_paradigm(name))
        return [mean] + [
            Measure(f"accuracy, {name}", 100 * groups[name][0], "%", f"{groups[name][1]:,} pairs")
            for name in printed
        ], {"groups": {name: {"accuracy": a, "pairs": n} for name, (a, n) in groups.items()}}

    def _first(self, examples: Iterable) -> Iterator:
        return itertools.islice(examples, self.options.eval.n_eval_examples)


def text_measures(nats: float, n_tokens: int, totals: TextTotals) -> Score:
    """The measures of a text; words and bytes are counted before a detokenizer changes it."""
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
    """The record of a loss (nats per token) that was measured over all rows of `--val_path`: equal
    to the record of an `Evaluator` whose windows are the rows."""
    context, n_tokens = manifest.seq_len, manifest.n_rows * manifest.seq_len
    measures, details = text_measures(loss * n_tokens, n_tokens, text_totals(manifest))
    return Evaluation(
        set=public_names(options.data.val_path), sha256=manifest.fingerprint,
        text=_text_seen(manifest.detokenizer), n_eval_examples=None, measures=tuple(measures),
        details=details, **_means(checkpoint, context, context, precision),
    )  # fmt: skip


def _text_seen(detokenizer: str | None, code: str | None = None) -> str:
    seen = f"{detokenizer} detokenizer" if detokenizer else "as in the file"
    return f"{seen}, behind {code}" if code else seen


def _means(checkpoint: str, context: int, stride: int, precision: str) -> dict[str, Any]:
    """What all evaluations of one command share: the checkpoint and how it is measured."""
    return {
        "checkpoint": checkpoint, "context": context, "stride": stride,
        "precision": precision,
    }  # fmt: skip


def _is_paradigm(group: str) -> bool:
    return group.startswith("paradigm ")


def fingerprint(eval_set: EvalSet) -> str:
    """A sha256 over the content of a set."""
    if eval_set.kind == "shards":
        return read_manifest(eval_set.paths[0]).fingerprint
    digest = hashlib.sha256()
    for path in eval_set.paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
