"""Evaluation sets: found, counted, scored, and kept in the run's folder."""

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import train_pt
from algpt2.errors import UserError
from algpt2.evaluation.scoring import Model
from algpt2.evaluation.sets import (
    EvalSet,
    Evaluator,
    choose_detokenizer,
    evaluation_of_rows,
    find_sets,
    read_pairs,
    read_passages,
    row_streams,
)
from algpt2.options import DataOptions, EvalOptions, ModelOptions, PackOptions, TrainOptions
from algpt2.runs.report import read_json_lines
from algpt2.runs.start import open_or_pack
from algpt2.shards.detokenizers import DETOKENIZERS
from algpt2.shards.packing import pack
from algpt2.shards.tfrecords import open_rows, read_manifest
from algpt2.tokenization_algpt2 import load_tokenizer

ROOT = Path(train_pt.__file__).parent
WIKI = " \n = The lobster = \n \n It is <unk> , the one @-@ block 's model . \n \n = = Notes = = \n"
PTB = " no it was n't black monday \n but while N points \n"
PLAIN = "A text of two lines\nwithout an end"
LAMBADA = ["The model learns a\nblock. It reads and writes the block", "A small text is small"]
PAIR = {
    "sentence_good": "The block is small.", "sentence_bad": "The block are small.", "UID": "number",
    "linguistics_term": "agreement", "field": "syntax/semantics",
}  # fmt: skip
# Words as the literature divides by: those between white space, and one for each line end. The real
# files are tests of their own (pytest -v names them) where data/bench, or ALGPT2_BENCH, has them.
COUNTS = {
    "wiki/wiki.mini.raw": 20 + 6, "ptb/ptb.test.txt": 10 + 2, "plain.txt": 8 + 1,
    "two.parquet": 5 + 1, "lambada/lambada_test.jsonl": 2,
}  # fmt: skip
REAL_COUNTS = {
    "wiki.valid.raw": 217_646, "wiki.valid.tokens": 217_646, "wiki.test.raw": 245_569,
    "wiki.test.tokens": 245_569, "ptb.valid.txt": 73_760, "ptb.test.txt": 82_430,
    "lambada_test.jsonl": 5_153, "lambada_openai.jsonl": 5_153,
}  # fmt: skip
BENCH = Path(os.environ.get("ALGPT2_BENCH", Path(train_pt.__file__).parent / "data" / "bench"))
REAL_FILES = sorted(path for path in BENCH.rglob("*") if path.name in REAL_COUNTS)
assert REAL_FILES or "ALGPT2_BENCH" not in os.environ, f"{BENCH} has none of {[*REAL_COUNTS]}"


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """A folder laid out as the real sets are, small."""
    folder = tmp_path_factory.mktemp("bench")
    for name in ("wiki", "ptb", "lambada", "blimp"):
        (folder / name).mkdir()
    (folder / "wiki" / "wiki.mini.raw").write_text(WIKI)
    (folder / "wiki" / "wiki.train.raw").write_text("never read\n")
    (folder / "ptb" / "ptb.test.txt").write_text(PTB)
    (folder / "plain.txt").write_text(PLAIN)
    pq.write_table(pa.table({"text": ["One.", "Of\ntwo and three"]}), folder / "two.parquet")
    (folder / "lambada" / "lambada_test.jsonl").write_text(json_lines({"text": t} for t in LAMBADA))
    for name in ("number", "other"):
        rows = json_lines([PAIR | {"UID": name, "field": "syntax_semantics"}, PAIR | {"UID": name}])
        (folder / "blimp" / f"{name}.jsonl").write_text(rows)
    (folder / "blimp" / "README.md").write_text("# About\n")
    return folder


PAIR_NAMES = {"UID": "number", "linguistics_term": "agreement", "field": "syntax"}


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def uniform_evaluator(tokenizer, context=32, detokenizer=None, codes=None, **options):
    """A model that knows nothing: every token has the same probability, the first is likeliest."""

    def score(rows):
        shape = (len(rows), rows.shape[1] - 1)
        return np.full(shape, -math.log(tokenizer.vocab_size)), rows[:, 1:] == 0

    options = TrainOptions(
        eval_only=True, model=ModelOptions(checkpoint="no-such-folder"),
        eval=EvalOptions(eval_sets=("given",), **options),
        data=DataOptions(detokenizer=detokenizer, control_codes=codes),
    )  # fmt: skip
    return Evaluator(
        Model(score, context, 1024), tokenizer, options, precision="float32", checkpoint="c"
    )


# --- finding -------------------------------------------------------------------------------------


def test_sets_of_a_folder_are_found_by_name_and_content(bench, capsys):
    found = [(one.kind, one.name.split("/")[-1], len(one.paths)) for one in find_sets([str(bench)])]
    assert found == [
        ("blimp", "blimp", 2), ("lambada", "lambada_test.jsonl", 1), ("text", "plain.txt", 1),
        ("text", "ptb.test.txt", 1), ("text", "two.parquet", 1), ("text", "wiki.mini.raw", 1),
    ]  # fmt: skip
    assert "training split left out (wiki.train.raw)" in capsys.readouterr().out


def test_files_that_are_named_are_read_whatever_their_name(bench, tmp_path):
    (tmp_path / "notes.md").write_text("words")
    paths = [str(bench / "wiki" / "wiki.train.raw"), str(bench / "blimp" / "other.jsonl")]
    kinds = [one.kind for one in find_sets([*paths, str(tmp_path / "notes.md"), paths[0]])]
    assert kinds == ["text", "blimp", "text"]  # and nothing twice


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ({}, "expected text"), ({"a.jsonl": "[1]"}, "a.jsonl, line 1.*obj"),
     ({"a.jsonl": "{"}, "a.jsonl, line 1: expected a JSON object, Expecting")],
)  # fmt: skip
def test_a_source_without_sets_is_named(tmp_path, content, message):
    folder = tmp_path / "sets"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        find_sets([str(folder)])


def test_the_detokenizer_goes_by_the_set():
    def chosen(kind, name, given):
        return choose_detokenizer(EvalSet(kind, name, (Path(name),)), given)

    assert chosen("text", "wiki.test.raw", None) is None
    assert chosen("text", "wiki.test.raw", "auto") == "wikitext"
    assert chosen("text", "ptb.test.txt", "auto") == "ptb"
    assert chosen("text", "input.txt", "auto") is None
    assert chosen("text", "input.txt", "wikitext") == "wikitext"
    assert chosen("lambada", "lambada_test.jsonl", "auto") is None
    assert chosen("lambada", "lambada_test_plain_text.txt", "auto") == "lambada"
    assert chosen("blimp", "blimp", "wikitext") is None


def test_the_flag_offers_every_detokenizer():
    for options, more in ((DataOptions, {"auto"}), (PackOptions, set())):
        choices = typing.get_args(typing.get_type_hints(options)["detokenizer"])
        assert set(typing.get_args(choices[0])) == {*DETOKENIZERS} | more


# --- counting and scoring ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*COUNTS, *map(str, REAL_FILES)])
def test_words_are_the_usual_ones(bench, tokenizer_folder, name):
    path = bench / name  # `/` keeps an absolute path as it is
    (one,) = find_sets([str(path)])
    details = uniform_evaluator(load_tokenizer(str(tokenizer_folder))).evaluate(one).details
    expected = COUNTS.get(name) or REAL_COUNTS[path.name]
    assert details.get("words", details.get("passages")) == expected


@pytest.mark.parametrize("detokenizer", [None, "auto"])
def test_a_uniform_model_has_the_numbers_one_can_count(bench, tokenizer_folder, detokenizer):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    evaluator = uniform_evaluator(tokenizer, detokenizer=detokenizer)
    (one,) = find_sets([str(bench / "wiki" / "wiki.mini.raw")])
    evaluation = evaluator.evaluate(one)
    text = DETOKENIZERS["wikitext"](WIKI) if detokenizer else WIKI
    n_tokens = len(tokenizer.encode_batch([text])[0])  # of the text that the model sees
    nats = n_tokens * math.log(tokenizer.vocab_size)
    values = {m.name: m.value for m in evaluation.measures}
    assert values == pytest.approx({
        "loss": math.log(tokenizer.vocab_size), "ppl": tokenizer.vocab_size,
        "word ppl": math.exp(nats / 26), "bits per byte": nats / math.log(2) / len(WIKI.encode()),
    })  # fmt: skip
    assert [m.over for m in evaluation.measures] == [
        f"{n_tokens} tokens", f"{n_tokens} tokens", "26 words, line ends counted",
        f"{len(WIKI.encode())} bytes",
    ]  # fmt: skip
    assert [m.unit for m in evaluation.measures] == [
        "nats/token", "per token", "per word", "bits/byte"
    ]  # fmt: skip
    assert evaluation.text == ("wikitext detokenizer" if detokenizer else "as in the file")


def test_documents_are_scored_one_by_one(bench, tmp_path, tokenizer_folder):
    seen = []

    def score(rows):
        seen.extend(rows.tolist())
        return np.zeros((len(rows), rows.shape[1] - 1)), rows[:, 1:] == 0

    tokenizer = load_tokenizer(str(tokenizer_folder))
    evaluator = uniform_evaluator(tokenizer)
    evaluator.model = Model(score, 32, 1024)
    (one,) = find_sets([str(bench / "two.parquet")])
    evaluator.evaluate(one)
    ids = tokenizer.encode_batch(["One.", "Of\ntwo and three"])
    starts = [row[: 1 + len(i)] for row, i in zip(seen, sorted(ids, key=len)[::-1], strict=True)]
    assert sorted(starts) == sorted([tokenizer.eot_id, *i.tolist()] for i in ids)


@pytest.mark.parametrize(("codes", "start_id"), [(None, 1), (("<pad>",), 2)])
def test_texts_are_scored_behind_bos_or_the_given_code(bench, foreign_tokenizer, codes, start_id):
    seen = []

    def score(rows):
        seen.extend(rows.tolist())
        return np.zeros((len(rows), rows.shape[1] - 1)), rows[:, 1:] == 0

    evaluator = uniform_evaluator(load_tokenizer(str(foreign_tokenizer)), codes=codes)
    evaluator.model = Model(score, 32, 1024)
    for path in (bench / "two.parquet", bench / "blimp"):
        (one,) = find_sets([str(path)])
        named = evaluator.evaluate(one).text
        assert ("behind <pad>" in named) is bool(codes)
    assert {row[0] for row in seen} == {start_id}


def test_several_codes_for_sets_are_refused(foreign_tokenizer):
    with pytest.raises(UserError, match=r"--control_codes </s> <s> with --eval_sets.*one code"):
        uniform_evaluator(load_tokenizer(str(foreign_tokenizer)), codes=("</s>", "<s>"))


def test_shards_are_one_stream(corpus, tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    paths = (str(corpus / "valid"),), str(tmp_path / "shards")
    manifest = pack(PackOptions(*paths, seq_len=16, files_per_tfrecord=1), tokenizer)
    (one,) = find_sets([str(tmp_path / "shards")])
    evaluation = uniform_evaluator(tokenizer, stride=7).evaluate(one)
    texts = [path.read_text() for path in sorted((corpus / "valid").iterdir())]
    stream = [i for ids in tokenizer.encode_batch(texts) for i in (tokenizer.eot_id, *ids.tolist())]
    rows = open_rows(tmp_path / "shards")
    (found,) = row_streams(rows)
    assert found.tolist() == stream[: manifest.n_rows * 16 + 1]
    assert evaluation.details["scored_tokens"] == manifest.n_rows * 16
    assert evaluation.measures[1].value == pytest.approx(300)
    nats = manifest.tokens * math.log(300)  # of all tokens of the text, as its words are of all
    n_words = sum(len(text.split()) + text.count("\n") for text in texts)
    assert evaluation.measures[2].value == pytest.approx(math.exp(nats / n_words))


def test_texts_with_codes_of_their_own_are_streams_of_their_own(corpus, tokenizer_folder):
    codes = ("<|a|>", "<|b|>")
    tokenizer = load_tokenizer(str(tokenizer_folder)).with_control_codes(codes)
    paths = [str(path) for path in sorted((corpus / "valid").iterdir())[:2]]
    rows = open_or_pack(paths, DataOptions(control_codes=codes), tokenizer, 16)
    streams = row_streams(rows)
    assert [stream[0] for stream in streams] == [300, 301]
    assert sum(len(stream) - 1 for stream in streams) == len(rows) * 16
    assert not {300, 301} & {*np.concatenate([stream[1:] for stream in streams]).tolist()}


def test_lambada_is_read_in_every_form_it_comes_in(tmp_path):
    texts = ["He gave her\n\nthe block", "a b"]
    forms = {
        "lambada.jsonl": json_lines({"text": text} for text in texts),
        "pairs.jsonl": json_lines(
            {"context": text.rpartition(" ")[0], "continuation": text.rpartition(" ")[2]}
            for text in texts
        ),
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content)
        assert find_sets([str(tmp_path / name)])[0].kind == "lambada"
        assert [*read_passages(tmp_path / name)] == [("He gave her\n\nthe", "block"), ("a", "b")]
    (tmp_path / "lambada.txt").write_text("he gave her the block\na b\n")
    assert [*read_passages(tmp_path / "lambada.txt")] == [("he gave her the", "block"), ("a", "b")]
    (tmp_path / "lambada.txt").write_text("word\n")
    with pytest.raises(UserError, match="passage 1: expected text"):
        [*read_passages(tmp_path / "lambada.txt")]


MARK = "\N{ZERO WIDTH NO-BREAK SPACE}".encode()


@pytest.mark.parametrize(
    ("change", "n"),
    [
        (lambda raw: MARK + raw, 3), (lambda raw: b"\n" + raw, 3), (gzip.compress, 3),
        (lambda raw: raw.replace(b"\n", b"\r\n"), 3), (lambda raw: raw.replace(b"\n", b"\r"), 3),
        (lambda raw: raw.replace(b"cd", b"c\xff"), 3), (lambda raw: b"", 0),
        (lambda raw: raw.decode().encode("utf-16"), 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["lambada.txt", "lambada.jsonl", "blimp.jsonl", "text.jsonl"])
def test_sets_are_read_as_the_packer_reads_text(tmp_path, tokenizer_folder, name, change, n):
    texts = ["ab cd ef", "gh ij", "kl mn"]
    rows = [{"text": t, "sentence_good": t, "sentence_bad": "a"} | PAIR_NAMES for t in texts]
    if name != "blimp.jsonl":
        rows = [{"text": row["text"]} for row in rows]
    content = "\n".join(texts) + "\n" if name.endswith(".txt") else json_lines(rows)
    changed = change(content.encode())
    path = tmp_path / (f"{name}.gz" if change is gzip.compress else name)
    path.write_bytes(changed)
    evaluator = uniform_evaluator(load_tokenizer(str(tokenizer_folder)), context=64)
    if not n:
        with pytest.raises(UserError, match=r"no document|found UTF-16") as error:
            evaluator.evaluate(find_sets([str(path)])[0])
        assert "--skip_broken" not in str(error.value)
        return
    (one,) = find_sets([str(path)])
    assert one.kind == path.name.split(".")[0]
    read = {"lambada": read_passages, "blimp": read_pairs}.get(one.kind)
    assert len([*read(path)]) == n if read else evaluator.evaluate(one).details["words"] == 7
    whole = tmp_path / "whole" / name
    whole.parent.mkdir()
    whole.write_text(content)
    if b"\xff" not in changed:
        (expected,) = find_sets([str(whole)])
        assert evaluator.evaluate(one).details == evaluator.evaluate(expected).details


def test_blimp_has_paradigms_phenomena_and_fields(bench, tmp_path, tokenizer_folder):
    (one,) = find_sets([str(bench / "blimp")])
    tokenizer = load_tokenizer(str(tokenizer_folder))
    evaluation = uniform_evaluator(tokenizer).evaluate(one)
    # "are" has more tokens than "is" in no vocabulary of 300: the uniform model prefers brevity.
    names = [(m.name, m.over) for m in evaluation.measures]
    assert names == [
        ("accuracy", "mean of 2 paradigms"), ("accuracy, field syntax_semantics", "4 pairs"),
        ("accuracy, phenomenon agreement", "4 pairs"),
    ]  # fmt: skip
    pairs = {name: group["pairs"] for name, group in evaluation.details["groups"].items()}
    assert pairs == {"all": 4, "paradigm number": 2, "paradigm other": 2,
                     "field syntax_semantics": 4, "phenomenon agreement": 4}  # fmt: skip
    first = uniform_evaluator(tokenizer, n_eval_examples=1).evaluate(one)
    assert first.details["groups"]["all"]["pairs"] == 2  # of each file
    (tmp_path / "odd.jsonl").write_text(json_lines([{"sentence_good": "x"}]))
    with pytest.raises(UserError, match="row 1: no sentence_bad, UID"):
        uniform_evaluator(tokenizer).evaluate(find_sets([str(tmp_path / "odd.jsonl")])[0])


def test_a_stride_beyond_the_context_is_refused(tokenizer_folder):
    with pytest.raises(UserError, match="--stride 33: expected 1 to 32"):
        uniform_evaluator(load_tokenizer(str(tokenizer_folder)), stride=33)


# --- train_pt.py --eval_only ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(corpus, tokenizer_folder, config_folder, tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_pt.main([
        f"--config={config_folder}", f"--tokenizer={tokenizer_folder}", f"--save_dir={folder}",
        f"--train_path={corpus / 'train'}", f"--val_path={corpus / 'valid'}", "--seq_len=16",
        "--max_steps=2", "--device=cpu",
    ])  # fmt: skip
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run, to write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluate(run, *flags):
    return train_pt.main(["--eval_only", f"--checkpoint={run}", "--device=cpu", *map(str, flags)])


def records(run):
    return json.loads((run / "evaluation.json").read_text())["evaluations"]


def test_one_table_with_a_unit_for_every_number(run, bench, capsys):
    evaluate(run, f"--eval_sets={bench}", "--detokenizer=auto", "--stride=8")
    printed = capsys.readouterr().out
    (heading,) = re.findall(r"^set .*$", printed, re.MULTILINE)
    assert heading.split() == ["set", "measure", "value", "unit", "over", "text"]
    assert re.search(r"wiki.mini.raw +loss +[\d.]+ +nats/token +\d+ tokens +wikitext deto", printed)
    assert re.search(r"word ppl +[\d.,]+ +per word +26 words, line ends counted", printed)
    assert re.search(r"ppl, last word +[\d.,]+ +per word +2 passages", printed)
    assert re.search(r"accuracy, last token +[\d.]+ +% +2 passages", printed)
    assert "checkpoint-00000002, context 32, stride 8, matrix products in float32" in printed
    for record in records(run):
        assert record["checkpoint"] == "checkpoint-00000002"
        assert all(m["unit"] and m["over"] for m in record["measures"])
    shown = (run / "evaluation.md").read_text()
    n_measures = sum(len(record["measures"]) for record in records(run))
    assert shown.count("\n| ") == n_measures + 2
    assert "| ptb/ptb.test.txt | ptb detokenizer | 32 | 8 | float32 | loss |" in shown


@pytest.mark.numeric
def test_training_and_both_evaluations_agree_with_a_detokenizer(run, tmp_path):
    text = tmp_path / "wiki.txt"
    text.write_text(WIKI * 200)
    flags = ["--seq_len=16", "--detokenizer=wikitext", f"--val_path={text}"]
    train_pt.main([
        *flags, f"--checkpoint={run}", f"--train_path={text}", f"--save_dir={tmp_path / 'tuned'}",
        "--max_steps=1", "--lr=1e-9", "--device=cpu",
    ])  # fmt: skip
    (line,) = [x for x in read_json_lines(tmp_path / "tuned/metrics.jsonl") if "val_loss" in x]
    evaluate(tmp_path / "tuned", *flags, "--compressors")
    evaluate(tmp_path / "tuned", f"--eval_sets={text}", *flags[:2], "--compressors")
    rows, documents = records(tmp_path / "tuned")
    assert rows["text"] == documents["text"] == "wikitext detokenizer"
    for record, tolerance in ((rows, 1e-6), (documents, 3e-3)):  # a stream leaves an end over
        values = {measure["name"]: measure["value"] for measure in record["measures"]}
        for name, key in (("word ppl", "val_word_ppl"), ("bits per byte", "val_bpb")):
            assert math.log(values[name]) == pytest.approx(math.log(line[key]), rel=tolerance)
        assert record["details"]["words"] == 26 * 200
        assert record["details"]["text_bytes"] == len(WIKI.encode()) * 200
        # A compressor gets the text that the model sees; the file's bytes divide both.
        seen = DETOKENIZERS["wikitext"](WIKI * 200).encode()
        expected = 8 * len(gzip.compress(seen, 9, mtime=0)) / (200 * len(WIKI.encode()))
        assert values["gzip -9"] == pytest.approx(expected, rel=5e-3)
    shards = rows_of(text, "wikitext", run).folder
    evaluate(tmp_path / "tuned", f"--eval_sets={shards}", *flags[:2], "--compressors")
    assert records(tmp_path / "tuned")[-1]["text"] == "wikitext detokenizer"
    assert records(tmp_path / "tuned")[-1]["measures"] == rows["measures"]
    options = TrainOptions(
        eval_only=True, model=ModelOptions(checkpoint=str(tmp_path / "tuned")),
        data=DataOptions(val_path=(str(shards), "here/valid")),
    )  # fmt: skip
    one = evaluation_of_rows(options, "c", read_manifest(shards), 1.0, "float32")
    # The card and evaluation.json may become public: nothing of this machine's folders.
    assert (one.text, one.set) == ("wikitext detokenizer", f"{shards.name} here/valid")
    assert rows["set"] == "wiki.txt" and str(tmp_path) not in json.dumps(rows)


def rows_of(path, detokenizer, run):
    tokenizer = load_tokenizer(str(run / "checkpoint-00000002"))
    return open_or_pack([str(path)], DataOptions(detokenizer=detokenizer), tokenizer, 16)


def test_shards_of_another_detokenizer_are_refused(run, tmp_path):
    (tmp_path / "wiki.txt").write_text(WIKI * 9)
    plain = rows_of(tmp_path / "wiki.txt", None, run).folder
    wiki = rows_of(tmp_path / "wiki.txt", "wikitext", run).folder
    assert plain != wiki
    assert rows_of(wiki, None, run).folder == rows_of(wiki, "wikitext", run).folder == wiki
    for folder, how in ((plain, "without --det"), (wiki, "with --detokenizer wikitext: expected")):
        with pytest.raises(UserError, match=f"was packed {how}.*--detokenizer ptb"):
            rows_of(folder, "ptb", run)
        with pytest.raises(UserError, match=f"was packed {how}.*--detokenizer ptb"):
            evaluate(run, f"--eval_sets={folder}", "--detokenizer=ptb")


def test_evaluations_add_up_and_the_same_one_is_replaced(run, bench):
    text = bench / "plain.txt"
    evaluate(run, f"--eval_sets={text}")
    first = records(run)
    evaluate(run, f"--eval_sets={text}", "--stride=4")
    evaluate(run, f"--eval_sets={text}", "--stride=4", "--seq_len=16")
    evaluate(run, f"--eval_sets={text}")
    assert [(r["context"], r["stride"]) for r in records(run)] == [(32, 4), (16, 4), (32, 32)]
    assert records(run)[-1:] == first


def test_what_others_wrote_is_not_overwritten(run, bench):
    for name, content in (("evaluation.json", "[]"), ("evaluation.md", "# My notes\n")):
        (run / name).write_text(content)
        with pytest.raises(UserError, match=f"did not write .*{name}"):
            evaluate(run, f"--eval_sets={bench / 'plain.txt'}")
        assert (run / name).read_text() == content
        (run / name).unlink()


def test_a_checkpoint_of_no_run_keeps_its_evaluation_itself(run, bench, tmp_path):
    folder = tmp_path / "alone" / "model"
    shutil.copytree(run / "checkpoint-00000002", folder)
    evaluate(folder, f"--eval_sets={bench / 'plain.txt'}")
    assert records(folder)[0]["checkpoint"] == "model"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_sets=nowhere"], "--eval_sets nowhere: no such file"),
        (["--eval_sets=.", "--stride=64"], "--stride 64: expected 1 to 32"),
        (["--detokenizer=auto"], "--detokenizer auto needs --eval_sets: expected wikitext"),
        (["--stride=0"], "above zero, got --stride 0"),
        (["--eval_sets=.", "--seq_len=64"], "rows of 64 tokens do not fit the model's 32"),
    ],
)
def test_bad_input_is_a_user_error_before_any_scoring(run, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate(run, *flags)
    assert not (run / "evaluation.json").exists()


def test_evaluation_flags_alone_are_refused():
    with pytest.raises(UserError, match="need --eval_only"):
        train_pt.main(["--stride=8"])


@pytest.mark.numeric
def test_two_processes_give_the_numbers_of_one(run, bench, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    flags = ["--eval_only", "--device=cpu", f"--eval_sets={bench}", "--batch_size=2"]
    train_pt.main([*flags, f"--checkpoint={run}"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*torchrun, str(ROOT / "train_pt.py"), *flags, f"--checkpoint={other}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    one, two = ([m["value"] for r in records(f) for m in r["measures"]] for f in (run, other))
    assert two == pytest.approx(one, rel=1e-6)
