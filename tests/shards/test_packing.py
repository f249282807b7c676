"""Packing by hand on short token lists, and the folder through all that can happen to it."""

import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from algpt2.corpus import listing
from algpt2.corpus.docstrings import hash_fraction
from algpt2.corpus.parts import BrokenInput, ChangedInput
from algpt2.errors import UserError
from algpt2.options import PackOptions
from algpt2.shards import packing, token_store
from algpt2.shards.detokenizers import wikitext
from algpt2.shards.packing import WORK_FOLDER
from algpt2.shards.tfrecords import MANIFEST_FILE, open_rows, read_manifest
from algpt2.shards.token_store import Segments, StreamRows, TokenStore, encode_documents
from algpt2.system.files import locked
from algpt2.tokenization_algpt2 import load_tokenizer

EOT = 99


class CharacterTokenizer:
    """Letter a is 1, b is 2, ...; 99 ends a text."""

    end_of_text = "<|endoftext|>"

    def __init__(self, vocab_size=100, fingerprint="a" * 64):
        self.vocab_size, self.fingerprint, self.eot_id = vocab_size, fingerprint, EOT
        self.dtype = np.uint16 if vocab_size <= 2**16 else np.uint32

    def encode_batch(self, texts):
        return [np.array([ord(c) - 96 for c in text], self.dtype) for text in texts]

    def token_to_id(self, token):
        return {"<|endoftext|>": EOT, "<|other|>": 98}.get(token)


TOKENIZER = CharacterTokenizer()


def pack(text, tokenizer, folder, **options):
    """packing.pack on a single path."""
    return packing.pack(PackOptions((text,), str(folder), **options), tokenizer)


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


@pytest.mark.parametrize("start_id, stream", [(EOT, [EOT, 1, 2, EOT, 3]), (None, [1, 2, 3])])
def test_each_document_starts_with_the_code(start_id, stream):
    block, lengths = encode_documents(["ab", "c"], TOKENIZER.encode_batch, start_id, np.uint16)
    assert block.tolist() == stream and sum(lengths) == len(stream)


def store(folder, *task_tokens):
    """A store of tasks with these tokens."""
    for i, tokens in enumerate(task_tokens):
        np.array(tokens, "<u2").tofile(folder / f"{i:05d}.tokens")
    return TokenStore(folder, tuple(map(len, task_tokens)), "uint16")


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
def test_rows_overlap_by_one_token(tmp_path, n_tokens, rows):
    tokens = store(tmp_path, list(range(n_tokens)))
    stream = StreamRows(tokens, Segments.of_stream(n_tokens), 3)
    assert len(stream) == len(rows)
    assert [row for i in range(len(rows)) for row in stream[i : i + 1].tolist()] == rows


def test_any_cut_of_any_segments_is_that_stretch_of_the_stream(tmp_path):
    tokens = store(tmp_path, [0, 1, 2, 3], [], [4], [5, 6, 7, 8, 9])
    segments = Segments(np.array([7, 0, 3]), np.array([3, 2, 4]))
    stream = [7, 8, 9, 0, 1, 3, 4, 5, 6]
    assert tokens.read(segments).tolist() == stream
    for start in range(len(stream)):
        for stop in range(start + 1, len(stream) + 1):
            assert tokens.read(segments.cut(start, stop)).tolist() == stream[start:stop]


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
    manifest = pack(text, TOKENIZER, tmp_path / "out", seq_len=2, files_per_tfrecord=2, workers=1)
    assert [(s.file, s.rows) for s in manifest.shards] == [("0.tfrecord", 4), ("1.tfrecord", 4)]
    assert (manifest.dropped_rows, manifest.left_over_tokens) == (1, 1)
    assert [row[0] for row in stored(tmp_path / "out")] == STREAM[:16:2]
    printed = capsys.readouterr().out
    assert "8 rows of 2 tokens, 2 shards of 4 rows, 1 tokens left over, 1 rows dropped" in printed
    assert "3 documents, 17 bytes, 3 words, 20 tokens (0.85 bytes per token)" in printed
    assert "MB/s" in printed


def test_no_more_shards_than_rows(tmp_path, text):
    manifest = pack(text, TOKENIZER, tmp_path / "out", seq_len=9, files_per_tfrecord=1, workers=1)
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
    monkeypatch.setattr(token_store, "BATCH_BYTES", 8)
    manifest = pack(text, TOKENIZER, tmp_path / "out", seq_len=4, n_examples=2)
    assert (manifest.documents, manifest.tokens, manifest.n_rows) == (1, 9, 2)
    manifest = pack(text, TOKENIZER, tmp_path / "out", seq_len=4, n_examples=3, overwrite=True)
    assert (manifest.documents, manifest.tokens, manifest.dropped_rows) == (2, 18, 1)
    assert "1 rows dropped" in capsys.readouterr().out


@pytest.mark.parametrize(("n_examples", "totals"), [(None, [32] * 4), (4, [15, 16])])  # 17 tokens
def test_progress_knows_about_how_much_there_is(tmp_path, monkeypatch, n_examples, totals):
    text, seen = write_texts(tmp_path / "text", *["abcdefgh"] * 4), []
    monkeypatch.setattr(token_store, "TASK_FILES", 1)
    monkeypatch.setattr(listing, "RUN_FILES", 1)
    update = packing.Progress.update
    monkeypatch.setattr(
        packing.Progress, "update", lambda self, *a: update(self, *a) or seen.append(self.total)
    )
    pack(text, TOKENIZER, tmp_path / "out", seq_len=4, n_examples=n_examples, workers=1)
    assert seen[: len(totals)] == totals


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
    monkeypatch.setattr(packing, "_encode", None)
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
    (folder / ".packing/00000.tokens").write_bytes(b"half")
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
    pack(text, TOKENIZER, tmp_path / "out", seq_len=2, files_per_tfrecord=1, workers=1)
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


@pytest.mark.parametrize("where", ["encode_task", "write_shard", "write_manifest"])
def test_interrupted_and_started_again_gives_the_same_bytes(tmp_path, text, monkeypatch, where):
    options = {"seq_len": 2, "files_per_tfrecord": 1, "workers": 1}
    pack(text, TOKENIZER, tmp_path / "whole", **options)
    real, calls = getattr(packing, where), []

    def interrupt(*arguments, **options):
        calls.append(arguments)
        if len(calls) == (2 if where == "write_shard" else 1):
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(packing, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(text, TOKENIZER, tmp_path / "out", **options)
    monkeypatch.undo()
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()
    pack(text, TOKENIZER, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import os, signal
from algpt2.shards import packing
from test_packing import TOKENIZER, pack
real = packing.write_shard
def write_shard(path, rows):
    if path.name == "1.tfrecord":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, rows)
packing.write_shard = write_shard
pack({text!r}, TOKENIZER, {out!r}, seq_len=2, files_per_tfrecord=1, workers=1)
"""


def test_killed_and_started_again_gives_the_same_bytes(tmp_path, text):
    options = {"seq_len": 2, "files_per_tfrecord": 1, "workers": 1}
    pack(text, TOKENIZER, tmp_path / "whole", **options)
    code = KILLED.format(text=text, out=str(tmp_path / "out"))
    paths = f"{Path(packing.__file__).parents[2]}:{Path(__file__).parent}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False,
                             env=os.environ | {"PYTHONPATH": paths})  # fmt: skip
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
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(UserError, match="by another process"):
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

    monkeypatch.setattr(packing, "write_record", deny)
    with pytest.raises(UserError, match=r"cannot write to --save_path .*Permission denied"):
        pack(text, TOKENIZER, tmp_path / "out", seq_len=4)


@pytest.mark.parametrize("file", ["tokens", "1.tfrecord"])
def test_a_full_disk_can_be_continued(tmp_path, text, monkeypatch, file):
    options = {"seq_len": 2, "files_per_tfrecord": 1, "workers": 1}
    pack(text, TOKENIZER, tmp_path / "whole", **options)
    real = Path.open

    def open_full(path, mode="r", *args, **kwargs):
        is_full = mode == "wb" and file in path.name
        return real(Path("/dev/full") if is_full else path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
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


# --- workers, splits, copies, order --------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """60 documents in files of all sizes, three of them copies."""
    rng = np.random.default_rng(0)
    letters = [chr(97 + i) for i in range(26)]
    texts = ["".join(rng.choice(letters, rng.integers(1, 90))) for _ in range(57)]
    return write_texts(tmp_path_factory.mktemp("many") / "text", *texts, *texts[10:13])


@pytest.fixture
def small_tasks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_store, "TASK_FILES", 7)
        patch.setattr(listing, "RUN_FILES", 7)
        yield


def all_contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


OPTIONS = {"seq_len": 5, "n_shards": 3, "dedup": True, "valid_fraction": 0.3,
           "shuffle_documents": True}  # fmt: skip


@pytest.mark.parametrize("options", [{"seq_len": 5, "n_shards": 4}, OPTIONS])
def test_the_bytes_do_not_depend_on_the_workers(tmp_path, many, small_tasks, options):
    for workers in (1, 2):
        pack(many, TOKENIZER, tmp_path / str(workers), workers=workers, **options)
    assert all_contents(tmp_path / "1") == all_contents(tmp_path / "2")
    n_files = len(all_contents(tmp_path / "1"))
    assert n_files == (8 if "dedup" in options else 5)


@pytest.mark.parametrize("options", [{"seq_len": 5, "n_shards": 4}, OPTIONS])
def test_the_bytes_do_not_depend_on_the_batches(tmp_path, many, monkeypatch, options):
    pack(many, TOKENIZER, tmp_path / "whole", workers=1, **options)
    monkeypatch.setattr(token_store, "BATCH_BYTES", 100)
    pack(many, TOKENIZER, tmp_path / "out", workers=1, **options)
    assert all_contents(tmp_path / "out") == all_contents(tmp_path / "whole")


def test_members_that_are_not_text_are_counted(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.txt", "b.png", "c.png", "d.txt"):
            info = tarfile.TarInfo(name)
            info.size = 12
            tar.addfile(info, io.BytesIO(b"abcdefghijkl"))
    assert pack(str(tmp_path / "a.tar"), TOKENIZER, tmp_path / "out", seq_len=5).documents == 2
    assert "2 other files not read (.png: 2)" in capsys.readouterr().out


@pytest.mark.parametrize("n_files", [None, 10])
def test_an_archive_of_archives_gives_the_rows_of_its_files(tmp_path, many, small_tasks, n_files):
    files = sorted(Path(many).iterdir())
    with tarfile.open(tmp_path / "owt.tar", "w") as outer:
        for i in range(0, len(files), 8):
            inner = tmp_path / f"subset{i:02}_data.xz"
            with tarfile.open(inner, "w:xz") as tar:
                for path in files[i : i + 8]:
                    tar.add(path, path.name)
            outer.add(inner, inner.name)
    plain = pack(many, TOKENIZER, tmp_path / "files", seq_len=5, n_files=n_files)
    packed = [
        pack(
            str(tmp_path / "owt.tar"), TOKENIZER, tmp_path / str(workers), seq_len=5,
            n_files=n_files, workers=workers,
        )
        for workers in (1, 2)
    ]  # fmt: skip
    assert packed[0].shards == packed[1].shards == plain.shards
    assert packed[0].documents == plain.documents == (n_files or 60)


def test_a_broken_archive_loses_nothing_and_goes_on_with_skip_broken(tmp_path, small_tasks):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(40):
            info = tarfile.TarInfo(f"{i}.txt.xz" if i == 30 else f"{i}.txt")
            info.size = 12
            tar.addfile(info, io.BytesIO(b"abcdefghijkl"))
    with pytest.raises(BrokenInput, match=r"30.txt.xz: cannot be decompressed.*--skip_broken"):
        pack(str(path), TOKENIZER, tmp_path / "out", seq_len=5, workers=1)
    done = sorted(p.name for p in (tmp_path / "out" / ".packing").glob("0*.json"))
    assert len(done) == 4
    manifest = pack(str(path), TOKENIZER, tmp_path / "out", seq_len=5, skip_broken=True)
    assert manifest.documents == 39


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    tmp_path, many, small_tasks, monkeypatch
):
    """Every rename is a moment: what stands behind it is complete, what does not is done again."""
    pack(many, TOKENIZER, tmp_path / "whole", workers=1, **OPTIONS)
    out, real, killed_at = tmp_path / "out", Path.replace, 0

    class Killed(BaseException):
        pass

    def replace(path, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    while True:
        left = 4 + killed_at % 3  # the plan, a task's three files, and sometimes more
        try:
            pack(many, TOKENIZER, out, workers=1, **OPTIONS)
        except Killed:
            killed_at += 1
            assert not (out / "train" / MANIFEST_FILE).exists()
            continue
        break
    assert killed_at > 10
    assert all_contents(out) == all_contents(tmp_path / "whole")


def documents_of(folder, end):
    """The documents in a folder's rows, each as a tuple; the last, cut by the rows, left out."""
    rows = stored(folder)
    stream = [rows[0][0], *(token for row in rows for token in row[1:])]
    places = [i for i, token in enumerate(stream) if token == end]
    return [tuple(stream[a + 1 : b]) for a, b in itertools.pairwise(places)]


def test_copies_are_left_out_and_counted(tmp_path, many):
    manifest = pack(many, TOKENIZER, tmp_path / "out", seq_len=1, dedup=True)
    found = documents_of(tmp_path / "out", EOT)
    assert (manifest.documents, manifest.duplicates) == (57, 3)
    assert len(found) == len(set(found)) == 56
    whole = pack(many, TOKENIZER, tmp_path / "whole", seq_len=1)
    assert (whole.documents, whole.duplicates) == (60, 0)
    in_order = documents_of(tmp_path / "whole", EOT)
    assert found == list(dict.fromkeys(in_order))[:56]  # the first of each stays, in its place


def test_a_split_by_hash_is_whole_and_disjoint(tmp_path, many):
    pack(many, TOKENIZER, tmp_path / "whole", seq_len=1, dedup=True)
    train = pack(many, TOKENIZER, tmp_path / "out", seq_len=1, dedup=True, valid_fraction=0.3)
    valid = read_manifest(tmp_path / "out" / "valid")
    assert train == read_manifest(tmp_path / "out" / "train")
    whole = read_manifest(tmp_path / "whole")
    for name in ("documents", "text_bytes", "words", "line_ends", "tokens"):
        assert getattr(train, name) + getattr(valid, name) == getattr(whole, name)
    texts = [path.read_text() for path in Path(many).iterdir()]
    expected = {text for text in texts if hash_fraction(text) < 0.3}
    assert valid.documents == len(expected) > 5
    spelled = {"".join(chr(96 + i) for i in d) for d in documents_of(tmp_path / "out/valid", EOT)}
    assert spelled < expected


def test_shuffled_documents_are_the_same_documents(tmp_path, many):
    orders = {}
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        pack(many, TOKENIZER, folder, seq_len=1, shuffle_documents=True, seed=seed)
        orders[seed] = documents_of(folder, EOT)
    pack(many, TOKENIZER, tmp_path / "whole", seq_len=1)
    in_order = documents_of(tmp_path / "whole", EOT)
    assert orders[1] != orders[2] != in_order
    # The rows cut the last document of each: up to one differs.
    assert len(set(orders[1]) ^ set(in_order)) <= 2


def test_a_detokenizer_changes_the_tokens_and_nothing_else(tmp_path, tokenizer_folder, small_tasks):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    texts = [f"the model {i} , a small @-@ block 's \n layer ." for i in [*range(20), 3, 4]]
    spaced = write_texts(tmp_path / "spaced", *texts)
    joined = write_texts(tmp_path / "joined", *map(wikitext, texts))
    picks = {"dedup": True, "valid_fraction": 0.3, "shuffle_documents": True}
    for name, options in (("stream", {}), ("picked", picks)):
        plain, whole = tmp_path / f"{name}-plain", tmp_path / f"{name}-1"
        pack(spaced, tokenizer, plain, seq_len=5, workers=1, **options)
        for workers in (1, 2):
            folder = tmp_path / f"{name}-{workers}"
            given = {"detokenizer": "wikitext", "workers": workers}
            pack(spaced, tokenizer, folder, seq_len=5, **given, **options)
        assert all_contents(whole) == all_contents(folder)
        for split in ("train", "valid") if options else ("",):
            before, after = read_manifest(plain / split), read_manifest(whole / split)
            assert (before.detokenizer, after.detokenizer) == (None, "wikitext")
            assert after.tokens < before.tokens
            for field in ("documents", "text_bytes", "words", "line_ends", "duplicates"):
                assert getattr(before, field) == getattr(after, field)
            assert after.duplicates == (2 if options else 0)
    pack(joined, tokenizer, tmp_path / "alone", seq_len=5, workers=1)
    assert stored(tmp_path / "stream-1") == stored(tmp_path / "alone")
    with pytest.raises(UserError, match="detokenizer: None -> wikitext"):
        pack(spaced, tokenizer, tmp_path / "stream-plain", seq_len=5, detokenizer="wikitext")


def test_more_shards_than_rows_is_an_error(tmp_path, text):
    with pytest.raises(UserError, match="--n_shards 9 needs as many rows, the text makes 4"):
        pack(text, TOKENIZER, tmp_path / "out", seq_len=4, n_shards=9)


def test_a_killed_worker_is_a_clear_error_and_nothing_is_lost(tmp_path, many, small_tasks):
    with pytest.raises(UserError, match="a worker process was killed"):
        pack(many, DyingTokenizer(), tmp_path / "out", seq_len=5, workers=2)
    assert list((tmp_path / "out" / WORK_FOLDER).glob("0*.json"))  # what is done is kept
    manifest = pack(many, TOKENIZER, tmp_path / "out", seq_len=5, workers=2)
    assert manifest.documents == 60


def test_a_file_that_changes_costs_its_own_task_only(tmp_path, small_tasks, monkeypatch):
    texts = ["".join(chr(97 + (i + j) % 26) for j in range(9)) for i in range(40)]
    source, out = write_texts(tmp_path / "text", *texts), tmp_path / "out"
    changed = sorted(Path(source).iterdir())[30]
    counting = CountingTokenizer()
    choose = packing.choose_encoder

    def then_change(*args):
        changed.write_text("changed")
        return choose(*args)

    monkeypatch.setattr(packing, "choose_encoder", then_change)
    with pytest.raises(UserError, match=f"{changed.name} has changed since the files were listed"):
        pack(source, counting, out, seq_len=5, workers=1)
    monkeypatch.undo()  # small_tasks has one of its own
    assert counting.n_encoded >= 28  # four tasks of seven
    assert [path.name for path in out.iterdir()] == [".packing"]
    counting.n_encoded = 0
    pack(source, counting, out, seq_len=5, workers=1)
    pack(source, TOKENIZER, tmp_path / "straight", seq_len=5, workers=1)
    assert counting.n_encoded == 12
    assert all_contents(out) == all_contents(tmp_path / "straight")


def test_tasks_of_another_command_are_not_taken(tmp_path, many, small_tasks):
    def change(*args, **options):
        raise ChangedInput("changed")

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "order_documents", change)
        with pytest.raises(ChangedInput):
            pack(many, TOKENIZER, out, seq_len=5, workers=1, dedup=True)
    assert list(out.glob(".packing/*.tokens"))
    other = {"seq_len": 5, "workers": 1, "dedup": True, "use_control_codes": False}
    pack(many, TOKENIZER, out, **other)
    pack(many, TOKENIZER, tmp_path / "straight", **other)
    assert all_contents(out) == all_contents(tmp_path / "straight")


class CountingTokenizer(CharacterTokenizer):
    n_encoded = 0

    def encode_batch(self, texts):
        self.n_encoded += len(texts)
        return super().encode_batch(texts)


class DyingTokenizer(CharacterTokenizer):
    n_texts = 0

    def encode_batch(self, texts):
        DyingTokenizer.n_texts += len(texts)
        if multiprocessing.parent_process() is not None and self.n_texts > 20:  # of 60, tasks of 7
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_batch(texts)


def test_tokens_are_read_with_few_files_open_and_none_left(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "OPEN_FILES", 2)
    streams = [np.arange(i, i + 4, dtype="<u2") for i in range(0, 20, 4)]
    for task, tokens in enumerate(streams):
        (tmp_path / f"{task:05d}.tokens").write_bytes(tokens.tobytes())
    store = TokenStore(tmp_path, [4] * 5, "uint16")
    for start, length in [(0, 20), (3, 10), (18, 2), (0, 1)]:
        tokens = store.read(Segments(np.array([start]), np.array([length])))
        assert tokens.tolist() == list(range(start, start + length))
        assert len(store._files) <= 2
    files = list(store._files.values())
    (tmp_path / "00000.tokens").write_bytes(b"\0\0")
    with pytest.raises(OSError, match=r"00000\.tokens is cut off"):
        store.read(Segments(np.array([0]), np.array([20])))
    del store
    assert all(file.closed for file in files)


# --- marks between documents ----------------------------------------------------------------------


def test_documents_are_cut_at_a_mark_and_literal_end_of_text_is_warned_of(
    tmp_path, tokenizer_folder, capsys
):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    stories, mark = [f"story {i} of\nthe book" for i in range(9)], "<|endoftext|>"
    text = str(tmp_path / "text")
    write_texts(tmp_path / "text", f"\n{mark}\n".join(stories) + f"\n{mark}\n")
    cut = pack(text, tokenizer, tmp_path / "cut", seq_len=8, document_mark=mark)
    assert (cut.documents, cut.text_bytes) == (9, sum(map(len, stories)))
    assert "warning" not in capsys.readouterr().out
    rows = open_rows(tmp_path / "cut")
    assert np.count_nonzero(rows[np.arange(len(rows))][:, :-1] == tokenizer.eot_id) == 9
    data = pack(text, tokenizer, tmp_path / "data", seq_len=8)
    assert data.documents == 1
    warning = r"warning: 9 literal <\|endoftext\|> .*--document_mark '<\|endoftext\|>'"
    assert re.search(warning, capsys.readouterr().out)
    lines = pack(
        text, tokenizer, tmp_path / "lines", seq_len=8, document_mark=mark,
        line_by_line=True,
    )  # fmt: skip
    assert lines.documents == 18
