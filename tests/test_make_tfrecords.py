"""make_tfrecords.py as a user calls it: the documents' commands, the flags, the errors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import make_tfrecords
from algpt2.errors import UserError
from algpt2.shards.tfrecords import open_rows, read_manifest
from algpt2.tokenization_algpt2 import load_tokenizer

SCRIPT = Path(make_tfrecords.__file__)


@pytest.fixture
def arguments(corpus, tokenizer_folder, tmp_path):
    return [
        "--path", str(corpus / "train"), "--save_path", str(tmp_path / "out"),
        "--tokenizer", str(tokenizer_folder),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("split", "files_per_tfrecord", "n_shards"), [("train", 500_000, 1), ("valid", 2, 2)]
)
def test_the_commands_of_the_documents(
    corpus, tokenizer_folder, tmp_path, capsys, split, files_per_tfrecord, n_shards
):
    # make_tfrecords.py --path ./data/openwebtext/ --save_path ./train/ --files_per_tfrecord 500000
    #     --use_control_codes --seq_len 1024 --min_seq_len --tokenizer ./tokenizer/
    make_tfrecords.main(
        [
            "--path", f"{corpus / split}/", "--save_path", f"{tmp_path}/out/",
            "--files_per_tfrecord", str(files_per_tfrecord), "--use_control_codes",
            "--seq_len", "32", "--min_seq_len", "--tokenizer", f"{tokenizer_folder}/",
        ]
    )  # fmt: skip
    manifest, tokenizer = read_manifest(tmp_path / "out"), load_tokenizer(str(tokenizer_folder))
    names = [f"{i}.tfrecord" for i in range(n_shards)]
    assert [shard.file for shard in manifest.shards] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "manifest.json"]
    texts = [path.read_text() for path in sorted((corpus / split).iterdir())]
    assert manifest.documents == len(texts)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.words == 150 * len(texts)
    assert manifest.line_ends == sum(text.count("\n") for text in texts)
    ids = [tokenizer.encode_batch([text])[0] for text in texts]
    stream = np.concatenate([[tokenizer.eot_id, *document] for document in ids])
    assert manifest.tokens == len(stream)
    rows = open_rows(tmp_path / "out")
    labels = rows[np.arange(len(rows))][:, 1:].ravel()
    assert np.array_equal(labels, stream[1 : 1 + len(labels)])
    printed = capsys.readouterr().out
    assert f"{manifest.tokens:,} tokens" in printed
    assert "seq_len: 32" in printed


def test_the_same_command_again_is_done(arguments, capsys):
    make_tfrecords.main(arguments)
    capsys.readouterr()
    make_tfrecords.main(arguments)
    assert "is done" in capsys.readouterr().out


def test_other_flags(arguments, tokenizer_folder, tmp_path):
    make_tfrecords.main(
        [
            *arguments, "--line_by_line", "--n_files", "5", "--n_examples", "7", "--seed", "3",
            "--seq_len", "16", "--no_use_control_codes", "--debug",
        ]
    )  # fmt: skip
    rows = open_rows(tmp_path / "out")
    assert (rows.manifest.documents, len(rows)) == (75, 7)
    assert load_tokenizer(str(tokenizer_folder)).eot_id not in rows[np.arange(7)]
    make_tfrecords.main([*arguments, "--overwrite"])
    assert read_manifest(tmp_path / "out").documents == 20


def test_the_key_of_the_text(arguments, tmp_path):
    table = tmp_path / "table.jsonl"
    table.write_text('{"text": "", "body": "one two three four"}\n' * 9)
    make_tfrecords.main(
        [*arguments[2:], "--path", str(table), "--text_key", "body", "--seq_len", "16"]
    )
    assert read_manifest(tmp_path / "out").words == 36


def test_several_paths(arguments, corpus, tmp_path):
    paths = [str(corpus / "train" / "000.txt"), str(corpus / "valid")]
    make_tfrecords.main([*arguments[2:], "--path", *paths])
    assert read_manifest(tmp_path / "out").documents == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--control_codes", "<|title|>"], r"no control code <\|title\|>"),
        (["--seq_len", "100000"], "too short for one row"),
        (["--seq_len", "0"], "--seq_len 0"),
        (["--n_examples", "-3"], "--n_examples -3"),
        (["--files_per_tfrecord", "0"], "--files_per_tfrecord 0"),
        (["--no_min_seq_len"], "rows are always full"),
        (["--tokenizer", "/nowhere/tokenizer"], "/nowhere/tokenizer"),
        (["--path", "/nowhere/text"], "/nowhere/text"),
        (["--seqlen", "3"], "seqlen"),
    ],
)
def test_bad_flags_say_what_is_wrong(arguments, tmp_path, flags, message):
    if flags[0] in arguments:
        place = arguments.index(flags[0])
        arguments = arguments[:place] + arguments[place + 2 :]
    with pytest.raises(UserError, match=message):
        make_tfrecords.main([*arguments, *flags])
    assert not list(tmp_path.glob("out/*"))


def test_an_error_is_one_line_and_exit_code_2(arguments):
    command = [sys.executable, str(SCRIPT), *arguments, "--seq_len", "100000"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("error: the text is too short for one row: 20 documents make")
    assert process.stderr.count("\n") == 1
