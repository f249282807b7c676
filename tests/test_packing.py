"""Packing by hand on short token lists, and the folder through all that can happen to it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from algpt2 import packing, tfrecords
from algpt2.errors import UserError
from algpt2.packing import cut_rows, encode_documents, pack
from algpt2.tfrecords import MANIFEST_FILE, open_rows, read_manifest

EOT = 99


class CharacterTokenizer:
    """Letter a is 1, b is 2, ...; 99 ends a text."""

    def __init__(self, vocab_size=100, fingerprint="a" * 64):
        self.vocab_size, self.fingerprint, self.eot_id = vocab_size, fingerprint, EOT
        self.dtype = np.uint16 if vocab_size <= 2**16 else np.uint32

    def encode_batch(self, texts):
        return [np.array([ord(c) - 96 for c in text], self.dtype) for text in texts]

    def token_to_id(self, token):
        return {"<|endoftext|>": EOT, "<|other|>": 98}.get(token)


TOKENIZER = CharacterTokenizer()


def write_texts(folder, *texts):
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    """20 tokens with their end-of-text: 17 letters in 3 documents."""
    return write_texts(tmp_path / "text", "abcdefgh", "abcde", "abcd")


STREAM = [EOT, 1, 2, 3, 4, 5, 6, 7, 8, EOT, 1, 2, 3, 4, 5, EOT, 1, 2, 3, 4]


def stored(folder):
    """Rows of a folder as lists."""
    rows = open_rows(folder)
    return rows[np.arange(len(rows))].tolist()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the arithmetic ------------------------------------------------------------------------------


def test_each_document_starts_with_the_code():
    blocks = list(encode_documents(iter(["ab", "c"]), TOKENIZER, EOT))
    assert [block.tolist() for block in blocks] == [[EOT, 1, 2, EOT, 3]]
    blocks = list(encode_documents(iter(["ab", "c"]), TOKENIZER, None))
    assert [block.tolist() for block in blocks] == [[1, 2, 3]]


def test_the_stream_does_not_depend_on_the_batches(monkeypatch):
    texts = ["abc", "d", "efgh", "ij"] * 5
    whole = np.concatenate(list(encode_documents(texts, TOKENIZER, EOT)))
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 4)
    blocks = list(encode_documents(texts, TOKENIZER, EOT))
    assert len(blocks) > 5
    assert np.concatenate(blocks).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("n_tokens", "rows"),
    [
        (3, []),
        (4, [[0, 1, 2, 3]]),
        (6, [[0, 1, 2, 3]]),
        (7, [[0, 1, 2, 3], [3, 4, 5, 6]]),
        (11, [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]),
    ],
)
def test_rows_overlap_by_one_token(n_tokens, rows):
    assert cut_rows(np.arange(n_tokens), 3).tolist() == rows


# --- a packed folder -----------------------------------------------------------------------------


def test_packing_by_hand(tmp_path, text):
    manifest = pack(text, TOKENIZER, tmp_path / "out", seq_len=4)
    assert stored(tmp_path / "out") == [
        [EOT, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, EOT, 1, 2, 3],
        [3, 4, 5, EOT, 1],
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.tfrecord", MANIFEST_FILE]
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest.documents, manifest.text_bytes, manifest.words, manifest.line_ends) == (
        3,
        17,
        3,
        0,
    )
    assert (manifest.tokens, manifest.left_over_tokens, manifest.dropped_rows) == (20, 3, 0)
    assert (manifest.seq_len, manifest.dtype, manifest.vocab_size, manifest.eot_id) == (
        4,
        "uint16",
        100,
        EOT,
    )
    assert manifest.tokenizer_sha256 == "a" * 64
    assert manifest.sources[0]["source"] == text
    assert manifest.options["line_by_line"] is False


def test_rows_in_order_are_the_text_and_predict_each_token_once(tmp_path, text):
    pack(text, TOKENIZER, tmp_path / "out", seq_len=3)
    rows = stored(tmp_path / "out")
    assert [token for row in rows for token in row[1:]] == STREAM[1 : 1 + 3 * len(rows)]
    assert [row[0] for row in rows] == STREAM[: 3 * len(rows) : 3]


def test_shards_are_equal_and_what_does_not_divide_is_counted(tmp_path, text, capsys):
    manifest = pack(text, TOKENIZER, tmp_path / "out", seq_len=2, files_per_tfrecord=2)
    assert [(s.file, s.rows) for s in manifest.shards] == [("0.tfrecord", 4), ("1.tfrecord", 4)]
    assert (manifest.dropped_rows, manifest.left_over_tokens) == (1, 1)
    assert [row[0] for row in stored(tmp_path / "out")] == STREAM[:16:2]
    printed = capsys.readouterr().out
    assert "8 rows of 2 tokens, 2 shards of 4 rows, 1 tokens left over, 1 rows dropped" in printed
    assert "3 documents, 17 bytes, 3 words, 20 tokens (0.85 bytes per token)" in printed
    assert "MB/s" in printed


def test_no_more_shards_than_rows(tmp_path, text):
    manifest = pack(text, TOKENIZER, tmp_path / "out", seq_len=9, files_per_tfrecord=1)
    assert [shard.rows for shard in manifest.shards] == [1, 1]


@pytest.mark.parametrize("n_examples", [1, 3, 4, 5])
def test_every_token_is_accounted_for(tmp_path, text, n_examples):
    manifest = pack(text, TOKENIZER, tmp_path / "out", seq_len=4, n_examples=n_examples)
    assert manifest.n_rows == min(n_examples, 4)
    assert manifest.dropped_rows == 4 - manifest.n_rows
    n_rows = manifest.n_rows + manifest.dropped_rows
    assert manifest.tokens == 1 + n_rows * 4 + manifest.left_over_tokens == 20


def test_n_examples_stops_reading_and_counts_what_was_read(tmp_path, monkeypatch, capsys):
    text = write_texts(tmp_path / "text", *["abcdefgh"] * 9)
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 8)
    manifest = pack(text, TOKENIZER, tmp_path / "out", seq_len=4, n_examples=2)
    assert (manifest.documents, manifest.tokens, manifest.n_rows) == (1, 9, 2)
    manifest = pack(text, TOKENIZER, tmp_path / "out", seq_len=4, n_examples=3, overwrite=True)
    assert (manifest.documents, manifest.tokens, manifest.dropped_rows) == (2, 18, 1)
    assert "1 rows dropped" in capsys.readouterr().out


def test_control_codes(tmp_path, text):
    pack(text, TOKENIZER, tmp_path / "none", seq_len=4, use_control_codes=False)
    assert stored(tmp_path / "none")[1] == [5, 6, 7, 8, 1]
    codes = ["<|other|>", "<|endoftext|>"]
    pack(text, TOKENIZER, tmp_path / "other", seq_len=4, control_codes=codes)
    assert stored(tmp_path / "other")[0] == [98, 1, 2, 3, 4]


@pytest.mark.parametrize("codes", [["<|nothing|>"], ["<|endoftext|>", "<|nothing|>"], []])
def test_a_control_code_that_the_tokenizer_lacks(tmp_path, text, codes):
    with pytest.raises(UserError, match=r"no control code (<\|nothing\|>|\(none given\))"):
        pack(text, TOKENIZER, tmp_path / "out", seq_len=4, control_codes=codes)
    assert not (tmp_path / "out").exists()


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path, text):
    manifest = pack(text, CharacterTokenizer(2**16 + 1), tmp_path / "out", seq_len=4)
    assert manifest.dtype == "uint32"
    assert stored(tmp_path / "out")[0] == [EOT, 1, 2, 3, 4]


def test_lines_as_documents(tmp_path):
    text = write_texts(tmp_path / "text", "abc\nde\n\nf\n")
    manifest = pack(text, TOKENIZER, tmp_path / "out", seq_len=8, line_by_line=True)
    assert manifest.documents == 3
    assert stored(tmp_path / "out") == [[EOT, 1, 2, 3, EOT, 4, 5, EOT, 6]]


# --- the same command again ----------------------------------------------------------------------


def test_a_finished_folder_is_left_alone(tmp_path, text, capsys, monkeypatch):
    first = pack(text, TOKENIZER, tmp_path / "out", seq_len=4)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(packing, "encode_documents", None)
    capsys.readouterr()
    assert pack(text, TOKENIZER, tmp_path / "out", seq_len=4) == first
    assert "is done: 3 documents" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("options", "tokenizer", "named"),
    [
        ({"seq_len": 5}, TOKENIZER, "seq_len: 4 -> 5"),
        ({"seq_len": 5, "n_files": 2}, TOKENIZER, "n_files: None -> 2; seq_len: 4 -> 5"),
        ({"files_per_tfrecord": 1}, TOKENIZER, "files_per_tfrecord: 500000 -> 1"),
        ({"use_control_codes": False}, TOKENIZER, "use_control_codes: True -> False"),
        ({}, CharacterTokenizer(fingerprint="b" * 64), "tokenizer: sha256 aaaaaaaaaaaa -> bbbb"),
        ({}, CharacterTokenizer(2**17), "vocab_size: 100 -> 131072"),
    ],
)
def test_other_options_in_the_same_folder_are_named(
    tmp_path, text, options, tokenizer, named, finished
):
    folder = tmp_path / "out"
    pack(text, TOKENIZER, folder, seq_len=4)
    if not finished:
        leave_unfinished(folder)
    before = contents(folder / ".") if finished else None
    with pytest.raises(UserError, match=f"another command .*{re.escape(named)}.*--overwrite"):
        pack(text, tokenizer, folder, **{"seq_len": 4, **options})
    assert finished is False or contents(folder) == before


def leave_unfinished(folder):
    """Turn a finished folder into one whose packing was killed before the manifest."""
    plan = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / ".packing").mkdir()
    names = ("format_version", "seq_len", "dtype", "vocab_size", "eot_id", "tokenizer_sha256",
             "sources", "options")  # fmt: skip
    (folder / ".packing/plan.json").write_text(json.dumps({name: plan[name] for name in names}))
    (folder / ".packing/tokens").write_bytes(b"half")
    (folder / MANIFEST_FILE).unlink()


def test_another_text_in_the_same_folder_is_named(tmp_path, text):
    pack(text, TOKENIZER, tmp_path / "out", seq_len=4)
    other = write_texts(tmp_path / "other", "abcdefgh")
    with pytest.raises(UserError, match=f"text: {re.escape(text)} -> {re.escape(other)}"):
        pack(other, TOKENIZER, tmp_path / "out", seq_len=4)
    (Path(text) / "3.txt").write_text("more")
    with pytest.raises(UserError, match=f"files of {re.escape(text)}"):
        pack(text, TOKENIZER, tmp_path / "out", seq_len=4)


def test_overwrite_packs_anew_and_leaves_no_old_shard(tmp_path, text):
    pack(text, TOKENIZER, tmp_path / "out", seq_len=2, files_per_tfrecord=1)
    for name in ("notes.txt", "mine.tfrecord"):
        (tmp_path / "out" / name).write_text("mine")
    pack(text, TOKENIZER, tmp_path / "out", seq_len=4, overwrite=True)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0.tfrecord", MANIFEST_FILE, "mine.tfrecord", "notes.txt"]
    assert len(open_rows(tmp_path / "out")) == 4


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_others_is_not_touched(tmp_path, text, overwrite):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.tfrecord").write_text("of another program")
    with pytest.raises(UserError, match=r"holds other files \(0\.tfrecord\)"):
        pack(text, TOKENIZER, tmp_path / "out", seq_len=4, overwrite=overwrite)
    assert contents(tmp_path / "out") == {"0.tfrecord": b"of another program"}


# --- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["write_file", "write_shard", "write_manifest"])
def test_interrupted_and_started_again_gives_the_same_bytes(tmp_path, text, monkeypatch, where):
    options = {"seq_len": 2, "files_per_tfrecord": 1}
    pack(text, TOKENIZER, tmp_path / "whole", **options)
    real, calls = getattr(packing, where), []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == (2 if where == "write_shard" else 1):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(packing, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(text, TOKENIZER, tmp_path / "out", **options)
    monkeypatch.undo()
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()
    pack(text, TOKENIZER, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
sys.path[:0] = {paths}
from algpt2 import packing
from tests.test_packing import TOKENIZER
real = packing.write_shard
def write_shard(path, rows):
    if path.name == "1.tfrecord":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, rows)
packing.write_shard = write_shard
packing.pack({text!r}, TOKENIZER, {out!r}, seq_len=2, files_per_tfrecord=1)
"""


def test_killed_and_started_again_gives_the_same_bytes(tmp_path, text):
    options = {"seq_len": 2, "files_per_tfrecord": 1}
    pack(text, TOKENIZER, tmp_path / "whole", **options)
    root = str(Path(packing.__file__).parent.parent)
    code = KILLED.format(paths=[root], text=text, out=str(tmp_path / "out"))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == [".packing", "0.tfrecord"]
    with pytest.raises(UserError, match="holds no packed shards"):
        open_rows(tmp_path / "out")
    pack(text, TOKENIZER, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_behind_the_manifest_is_finished(tmp_path, text, monkeypatch):
    monkeypatch.setattr(packing.shutil, "rmtree", lambda path, **options: None)
    pack(text, TOKENIZER, tmp_path / "out", seq_len=4)
    monkeypatch.undo()
    assert (tmp_path / "out" / ".packing").exists()
    pack(text, TOKENIZER, tmp_path / "out", seq_len=4)
    assert not (tmp_path / "out" / ".packing").exists()


def test_two_writers_in_one_folder(tmp_path, text):
    with packing._locked(tmp_path / "out"), pytest.raises(UserError, match="by another process"):
        pack(text, TOKENIZER, tmp_path / "out", seq_len=4)
    pack(text, TOKENIZER, tmp_path / "out", seq_len=4)


# --- what a user can cause -----------------------------------------------------------------------


def test_a_text_too_short_for_one_row_says_the_numbers(tmp_path, text):
    with pytest.raises(UserError, match="3 documents make 20 tokens, expected at least 21"):
        pack(text, TOKENIZER, tmp_path / "out", seq_len=20)
    assert list((tmp_path / "out").iterdir()) == []
    assert pack(text, TOKENIZER, tmp_path / "out", seq_len=19).n_rows == 1


def test_a_text_that_is_missing_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        pack(str(tmp_path / "nowhere"), TOKENIZER, tmp_path / "out", seq_len=4)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path, text):
    (tmp_path / "out").write_text("a file")
    for path in (tmp_path / "out", tmp_path / "out" / "inside"):
        with pytest.raises(UserError, match=r"cannot make the folder --save_path"):
            pack(text, TOKENIZER, path, seq_len=4)
    assert (tmp_path / "out").read_text() == "a file"


def test_no_permission_to_write(tmp_path, text, monkeypatch):
    def deny(path, value):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(packing, "write_json", deny)
    with pytest.raises(UserError, match=r"cannot write to --save_path .*Permission denied"):
        pack(text, TOKENIZER, tmp_path / "out", seq_len=4)


@pytest.mark.parametrize("file", ["tokens", "1.tfrecord"])
def test_a_full_disk_can_be_continued(tmp_path, text, monkeypatch, file):
    options = {"seq_len": 2, "files_per_tfrecord": 1}
    pack(text, TOKENIZER, tmp_path / "whole", **options)
    real = tfrecords.os.fsync

    def fsync(descriptor):
        if file in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(tfrecords.os, "fsync", fsync)
    with pytest.raises(OSError, match=f"No space left on device: .*{file}"):
        pack(text, TOKENIZER, tmp_path / "out", **options)
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob("*.partial"))
    pack(text, TOKENIZER, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["missing", "cut", "manifest"])
def test_a_damaged_folder_is_named_and_can_be_packed_anew(tmp_path, text, damage):
    folder = tmp_path / "out"
    pack(text, TOKENIZER, folder, seq_len=4)
    before = contents(folder)
    if damage == "missing":
        (folder / "0.tfrecord").unlink()
    elif damage == "cut":
        (folder / "0.tfrecord").write_bytes(before["0.tfrecord"][:-1])
    else:
        (folder / MANIFEST_FILE).write_text("{")
    with pytest.raises(UserError, match=MANIFEST_FILE if damage == "manifest" else "0.tfrecord"):
        pack(text, TOKENIZER, folder, seq_len=4)
    pack(text, TOKENIZER, folder, seq_len=4, overwrite=True)
    assert contents(folder) == before


@pytest.mark.parametrize("content", ["", "[]", "3", '{"sources": 3, "options": 5}'])
def test_a_damaged_plan_asks_for_overwrite(tmp_path, text, content):
    folder = tmp_path / "out"
    pack(text, TOKENIZER, folder, seq_len=4)
    leave_unfinished(folder)
    (folder / ".packing/plan.json").write_text(content)
    with pytest.raises(UserError, match="--overwrite"):
        pack(text, TOKENIZER, folder, seq_len=4)
    pack(text, TOKENIZER, folder, seq_len=4, overwrite=True)


def test_a_text_that_changed_its_time_only_is_another_text(tmp_path, text):
    pack(text, TOKENIZER, tmp_path / "out", seq_len=4)
    os.utime(Path(text) / "0.txt", (time.time() + 9,) * 2)
    with pytest.raises(UserError, match="files of"):
        pack(text, TOKENIZER, tmp_path / "out", seq_len=4)
