"""train_tokenizer.py: run as a user does, on a corpus made here."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_tokenization import make_texts

import train_tokenizer
from algpt2.corpus import docstrings
from algpt2.corpus.docstrings import hash_fraction
from algpt2.errors import UserError
from algpt2.tokenization_algpt2 import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FILES = ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]


@pytest.fixture
def rows(tmp_path):
    """A .jsonl of 400 documents."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts()))
    return str(path)


def test_it_trains_saves_and_measures_on_documents_held_out(rows, tmp_path, capsys):
    save_path = tmp_path / "out" / "tokenizer"
    train_tokenizer.main(
        ["--train_path", rows, "--save_path", str(save_path), "--vocab_size", "400"]
    )
    assert sorted(path.name for path in save_path.iterdir()) == FILES
    tokenizer = load_tokenizer(str(save_path))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (400, 399)

    held_out = [text for text in make_texts() if hash_fraction(text) < 0.01]
    n_tokens = sum(len(array) for array in tokenizer.encode_batch(held_out))
    n_bytes = sum(map(len, held_out))
    printed = capsys.readouterr().out
    assert 0 < len(held_out) < 20
    assert f"{n_bytes / n_tokens:.3f} bytes per token" in printed
    assert f"of {len(held_out)} held-out documents" in printed
    assert "vocab_size: 400" in printed and "<|endoftext|> is 399" in printed
    assert "400 documents" in printed


def test_held_out_documents_are_not_trained_on():
    texts = [text for text in make_texts(n=2000) if hash_fraction(text) < 0.03]
    held_out = []
    trained_on = list(train_tokenizer.hold_out(texts, held_out))
    assert not set(trained_on) & set(held_out) and sorted(trained_on + held_out) == sorted(texts)
    assert trained_on[0] == texts[0]
    assert len(held_out) == sum(hash_fraction(text) < 0.01 for text in texts[1:]) > 5


def test_the_first_document_is_trained_on_and_held_out_bytes_are_capped(monkeypatch):
    texts = [text for text in make_texts(n=2000) if hash_fraction(text) < 0.01]
    held_out = []
    monkeypatch.setattr(train_tokenizer, "HELD_OUT_BYTES", len(texts[1]) + 1)
    assert list(train_tokenizer.hold_out(texts, held_out)) == [texts[0], *texts[3:]]
    assert held_out == texts[1:3]


def test_docs_train_is_measured_on_docs_valid(tmp_path, monkeypatch, capsys):
    texts = make_texts(n=500)
    monkeypatch.setattr(docstrings, "_cached_docstrings", lambda: texts)
    n_valid = sum(hash_fraction(text) < docstrings.VALID_FRACTION for text in texts)
    train_tokenizer.main(["--save_path", str(tmp_path / "t"), "--vocab_size", "300"])
    printed = capsys.readouterr().out
    assert f"read {500 - n_valid} documents" in printed
    assert f"of {n_valid} held-out documents" in printed


def test_one_document_leaves_nothing_to_measure_on(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(make_texts()))
    train_tokenizer.main(
        ["--train_path", str(path), "--save_path", str(tmp_path / "t"), "--vocab_size", "300"]
    )
    assert "not measured, too few documents" in capsys.readouterr().out


def test_the_same_command_again_says_that_it_is_there(rows, tmp_path, capsys):
    command = ["--train_path", rows, "--save_path", str(tmp_path / "t"), "--vocab_size", "300"]
    train_tokenizer.main(command)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()}
    assert "already" not in capsys.readouterr().out
    train_tokenizer.main(command)
    assert "this very tokenizer was there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()} == first
    with pytest.raises(UserError, match="holds another tokenizer"):
        train_tokenizer.main([*command[:-1], "310"])
    assert load_tokenizer(str(tmp_path / "t")).vocab_size == 300
    train_tokenizer.main([*command[:-1], "310", "--overwrite"])
    assert load_tokenizer(str(tmp_path / "t")).vocab_size == 310


def test_max_bytes_and_n_files_limit_what_is_read(tmp_path, capsys):
    for i, text in enumerate(make_texts(n=50)):
        (tmp_path / f"{i:02}.txt").write_text(text)
    common = ["--train_path", str(tmp_path / "*.txt"), "--vocab_size", "270"]
    train_tokenizer.main([*common, "--save_path", str(tmp_path / "a"), "--n_files", "20"])
    assert "read 20 files, 20 documents" in capsys.readouterr().out
    n_bytes = sum((tmp_path / f"{i:02}.txt").stat().st_size for i in range(20))
    held = [t for t in make_texts(n=21) if hash_fraction(t) < 0.01]
    assert not held  # else the bytes below are not those of 20 files
    train_tokenizer.main([*common, "--save_path", str(tmp_path / "b"), "--max_bytes", str(n_bytes)])
    assert "read 20 files" in capsys.readouterr().out
    a, b = (tmp_path / name / "tokenizer.json" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_control_codes_and_another_text_key(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in make_texts()))
    train_tokenizer.main([
        "--train_path", str(path), "--text_key", "body", "--save_path", str(tmp_path / "t"),
        "--vocab_size", "300", "--control_codes", "<|endoftext|>", "<|title|>",
    ])  # fmt: skip
    vocab = json.loads((tmp_path / "t" / "vocab.json").read_text())
    assert (vocab["<|title|>"], vocab["<|endoftext|>"]) == (298, 299)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train_path", "nowhere"], "error: nowhere: no such file or folder"),
        (["--train_path", "a.txt", "--vocab_size", "5000"], "it yields 257 entries"),
        (["--train_path", "a.txt", "--vocab_size", "0"], "above zero, got --vocab_size 0"),
        (["--train_path", "a.txt", "--vocab_size", "many"], "--vocab_size: "),
        (["--train_path", "a.txt", "--save_path", "a.txt"], "error: File exists: a.txt"),
        (["--train_path"], "--train_path needs at least one"),
        (["--nfiles", "3"], "Unrecognized options: --nfiles"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, arguments, message):
    (tmp_path / "a.txt").write_text("too little")
    process = subprocess.run(
        [sys.executable, str(ROOT / "train_tokenizer.py"), *arguments],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 2
    assert message in process.stderr and process.stderr.count("\n") == 1


def test_merging_says_how_long_it_takes(monkeypatch, capsys):
    merged = threading.Event()
    monkeypatch.setattr(train_tokenizer, "MERGING_S", 0.01)
    threading.Timer(0.1, merged.set).start()
    train_tokenizer.show_merging(merged)
    assert "merging for 0 s" in capsys.readouterr().out
