"""The record format against TensorFlow, bytes known by heart, and manifests that lie."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from algpt2.errors import UserError
from algpt2.shards import tfrecords
from algpt2.shards.tfrecords import (
    CHECKSUM,
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    build_records,
    open_rows,
    read_manifest,
    verify,
    write_manifest,
    write_shard,
)


def random_rows(n_rows, seq_len, dtype="uint16"):
    high = np.iinfo(dtype).max
    draw = np.random.default_rng(0)
    return draw.integers(0, high, (n_rows, seq_len + 1), dtype, endpoint=True)


def write_folder(folder, rows, n_shards, vocab_size=None):
    """Shards of equal rows and their manifest."""
    size, seq_len = len(rows) // n_shards, rows.shape[1] - 1
    shards = tuple(
        write_shard(folder / f"{i}.tfrecord", rows[i * size : (i + 1) * size])
        for i in range(n_shards)
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION, seq_len=seq_len, dtype=rows.dtype.name,
        vocab_size=vocab_size or max(300, 1 + int(rows.max())), eot_id=299,
        tokenizer_sha256="0" * 64,
        sources=[{"source": "text"}], options={"n_files": None},
        shards=shards, documents=3, text_bytes=99, words=20, line_ends=2,
        tokens=1 + size * n_shards * seq_len + 5, left_over_tokens=5, dropped_rows=0,
        duplicates=0, encoder={"name": "tokenizers"},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return manifest


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, random_rows(6, 8) % 300, n_shards=3)
    return tmp_path


# --- the record ----------------------------------------------------------------------------------


def test_golden_bytes_of_a_record():
    # Written by tf.io.TFRecordWriter (TensorFlow 2.21).
    framing = "18 00 00 00 00 00 00 00 a3 7f 4b 22"
    tags = "0a 16 0a 14 0a 06 74 6f 6b 65 6e 73 12 0a 0a 08 0a 06"
    record = build_records(np.array([[1, 2, 258]], np.uint16)).tobytes()
    assert record.hex(" ") == f"{framing} {tags} 01 00 02 00 02 01 3b 97 01 73"


# The sizes make one-, two- and three-byte lengths at every level of the Example.
SIZES = [(1, "uint16"), (50, "uint16"), (63, "uint16"), (256, "uint16"), (1024, "uint32"),
         (5000, "uint32")]  # fmt: skip

TENSORFLOW = """
import sys
import numpy as np
import tensorflow as tf

for name in sys.argv[1:]:
    rows = np.load(name + ".npy")
    feature = {"tokens": tf.io.FixedLenFeature([], tf.string)}
    if rows.dtype == np.uint32:
        rows = rows.view(np.int32)  # what decode_raw knows of 4 bytes
    dtype = tf.as_dtype(rows.dtype)
    read = [
        tf.io.decode_raw(tf.io.parse_single_example(record, feature)["tokens"], dtype).numpy()
        for record in tf.data.TFRecordDataset(name)
    ]
    assert np.array_equal(rows, read), name
    with tf.io.TFRecordWriter(name + ".tf") as writer:
        for row in rows:
            value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[row.tobytes()]))
            features = tf.train.Features(feature={"tokens": value})
            writer.write(tf.train.Example(features=features).SerializeToString())
"""


def test_tensorflow_reads_the_same_tokens_and_writes_the_same_bytes(tmp_path):
    paths = []
    for seq_len, dtype in SIZES:
        path, rows = tmp_path / f"{seq_len}.tfrecord", random_rows(3, seq_len, dtype)
        write_shard(path, rows)
        np.save(f"{path}.npy", rows)
        paths.append(path)
    command = [sys.executable, "-c", TENSORFLOW, *map(str, paths)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    for path in paths:
        assert path.with_name(f"{path.name}.tf").read_bytes() == path.read_bytes()


# --- shards --------------------------------------------------------------------------------------


def test_a_shard_knows_its_rows_bytes_and_checksum(tmp_path, monkeypatch):
    rows = random_rows(10, 8)
    shard = write_shard(tmp_path / "0.tfrecord", rows)
    content = (tmp_path / "0.tfrecord").read_bytes()
    assert content == build_records(rows).tobytes()
    digest = hashlib.sha256(content).hexdigest()
    assert shard == tfrecords.Shard("0.tfrecord", 10, len(content), digest)
    monkeypatch.setattr(tfrecords, "BLOCK_BYTES", 100)  # the same bytes from many blocks
    assert write_shard(tmp_path / "0.tfrecord", rows) == shard


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_rows_come_back_by_number(tmp_path, dtype):
    rows = random_rows(12, 8, dtype)
    manifest = write_folder(tmp_path, rows, n_shards=3)
    packed = open_rows(tmp_path)
    assert packed.manifest == manifest
    assert len(packed) == manifest.n_rows == 12
    assert packed[0].dtype == dtype
    ids = np.array([11, 0, 4, 4, 3, 8])
    assert np.array_equal(packed[ids], rows[ids])
    assert np.array_equal(packed[np.arange(12)], rows)
    assert np.array_equal(packed[7], rows[7])
    assert np.array_equal(list(packed), rows)
    assert packed[np.arange(0)].shape == (0, 9)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tfrecords, "OPEN_SHARDS", 2)
    rows = random_rows(12, 8)
    write_folder(tmp_path, rows, n_shards=6)
    assert np.array_equal(open_rows(tmp_path)[np.arange(12)], rows)


@pytest.mark.parametrize("ids", [6, -1, np.array([0, 6])])
def test_rows_that_are_not_there(folder, ids):
    with pytest.raises(IndexError, match="from 0 to 5"):
        open_rows(folder)[ids]


@pytest.mark.parametrize("ids", [0.5, [True, False], slice(2)])
def test_row_ids_are_integers(folder, ids):
    with pytest.raises(TypeError, match="integers"):
        open_rows(folder)[ids]


class FullDisk:
    """A file on a disk with room for 300 bytes."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, block):
        if self.file.tell() + memoryview(block).nbytes > 300:
            raise OSError(28, "No space left on device")
        self.file.write(block)


def test_a_full_disk_leaves_no_half_shard(folder, monkeypatch):
    before = sorted(folder.iterdir())
    path_type = type(folder)
    real_open = path_type.open
    monkeypatch.setattr(path_type, "open", lambda self, mode: FullDisk(real_open(self, mode)))
    monkeypatch.setattr(tfrecords, "BLOCK_BYTES", 100)
    with pytest.raises(OSError, match=r"No space left on device: .*3\.tfrecord"):
        write_shard(folder / "3.tfrecord", random_rows(20, 8))
    monkeypatch.undo()
    assert sorted(folder.iterdir()) == before
    assert len(open_rows(folder)) == 6


# --- damaged folders -----------------------------------------------------------------------------


def test_a_missing_shard_is_named(folder):
    (folder / "1.tfrecord").unlink()
    with pytest.raises(UserError, match=r"1\.tfrecord is missing"):
        open_rows(folder)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_cut_or_grown_shard_is_named(folder, change):
    path = folder / "2.tfrecord"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if change < 0 else content + b"x")
    message = (
        rf"2\.tfrecord is damaged: it has {len(content) + change} bytes, expected {len(content)}"
    )
    with pytest.raises(UserError, match=message):
        open_rows(folder)


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(UserError, match=r"holds no packed shards: it has no manifest\.json"):
        open_rows(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000])
def test_a_manifest_that_is_no_json(folder, content):
    (folder / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged: it is not JSON"):
        read_manifest(folder)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_a_manifest_that_is_no_object(folder, content):
    (folder / MANIFEST_FILE).write_text(content)
    with pytest.raises(UserError, match="expected an object"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format_version", 1), ("format_version", "2"), ("format_version", None),
        ("seq_len", 0), ("seq_len", -1), ("seq_len", 10**12), ("seq_len", 8.0), ("seq_len", True),
        ("seq_len", "8"), ("seq_len", None), ("dtype", "float64"),
        ("dtype", "object"), ("dtype", 2), ("vocab_size", 0),
        ("vocab_size", 70_000), ("vocab_size", 10**30), ("eot_id", 300), ("eot_id", -1),
        ("tokenizer_sha256", 5), ("sources", "text"), ("options", []), ("shards", []),
        ("shards", {}), ("documents", 0), ("text_bytes", -1), ("words", 1.5),
        ("tokens", 1), ("left_over_tokens", -1), ("dropped_rows", None),
    ],
)  # fmt: skip
def test_a_manifest_with_nonsense_names_field_and_file(folder, field, value):
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, field: value}))
    with pytest.raises(UserError, match=rf"manifest\.json.*{field}"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seq_len", 9, r"bytes of 0\.tfrecord is 104, expected 2 rows of 54"),
        ("dtype", "uint32", r"bytes of 0\.tfrecord is 104, expected 2 rows of 70"),
        ("left_over_tokens", 6, "tokens is 54: rows and left_over_tokens make"),
        ("dropped_rows", 1, "tokens is 54: rows and left_over_tokens make"),
        ("shards", [3], "expected an object, got 3"),
    ],
)
def test_a_manifest_that_contradicts_itself(folder, field, value, message):
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(UserError, match=rf"manifest\.json is damaged: {message}"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("file", "../0.tfrecord"), ("file", "/etc/passwd"), ("file", ""), ("file", ".."),
        ("file", "0.tfrecord"), ("file", 3), ("rows", 0), ("rows", 1), ("rows", 2**50),
        ("bytes", 1), ("bytes", "1"), ("sha256", "0"), ("sha256", None),
    ],
)  # fmt: skip
def test_a_shard_with_nonsense_names_field_and_file(folder, field, value):
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    content["shards"][1][field] = value
    path.write_text(json.dumps(content))
    seen = {("rows", 1): "bytes"}.get((field, value), field)
    with pytest.raises(UserError, match=rf"manifest\.json.*{seen}"):
        read_manifest(folder)


def test_shards_of_unequal_rows(folder):
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    shard = content["shards"][1]
    shard |= {"rows": 1, "bytes": shard["bytes"] // 2}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"rows of 1\.tfrecord is 1, expected 2"):
        read_manifest(folder)


def test_every_field_of_the_manifest_is_needed(folder):
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    assert set(content) - {CHECKSUM} == {field.name for field in dataclasses.fields(Manifest)}
    for name in content:
        path.write_text(json.dumps({k: v for k, v in content.items() if k != name}))
        with pytest.raises(UserError, match=name):
            read_manifest(folder)


# --- checking ------------------------------------------------------------------------------------


def test_a_sound_folder_has_no_problems(folder):
    for workers in (1, 2):
        manifest, problems = verify(folder, tokenizer_sha256="0" * 64, workers=workers)
        assert (problems, manifest) == ([], read_manifest(folder))


def test_a_thousand_flipped_bytes_are_a_thousand_found_and_named(folder):
    rng, paths = np.random.default_rng(0), sorted(folder.iterdir())
    sizes = [path.stat().st_size for path in paths]
    found = 0
    for place in rng.integers(sum(sizes), size=1000):
        i = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
        raw = bytearray(paths[i].read_bytes())
        raw[place - sum(sizes[:i])] ^= rng.integers(1, 256)
        before = paths[i].read_bytes()
        paths[i].write_bytes(raw)
        try:
            problems = verify(folder)[1]
        except UserError as error:
            problems = [str(error)]
        found += any(paths[i].name in problem for problem in problems)
        paths[i].write_bytes(before)
    assert found == 1000


def test_what_is_missing_foreign_cut_or_of_another_tokenizer_is_named(folder):
    (folder / "0.tfrecord").unlink()
    (folder / "1.tfrecord").write_bytes((folder / "1.tfrecord").read_bytes()[:-1])
    (folder / "9.tfrecord").write_bytes(b"of another run")
    _, problems = verify(folder, tokenizer_sha256="1" * 64)
    text = "\n".join(problems)
    assert "000000000000, expected 111111111111" in text
    assert "0.tfrecord: missing" in text
    assert "1.tfrecord: 103 bytes, expected 104" in text
    assert "9.tfrecord: not in manifest" in text
    assert len(problems) == 4


def test_a_record_changed_together_with_its_crc_is_found_by_the_sha256(folder):
    rows = open_rows(folder)[np.arange(2)]
    rows[0, 0] = 299 - rows[0, 0]
    write_shard(folder / "0.tfrecord", rows)
    (problem,) = verify(folder)[1]
    assert "0.tfrecord: all records are sound, but" in problem


def test_the_manifest_has_a_checksum_of_its_content(folder):
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text().replace('"words": 20', '"words": 21'))
    with pytest.raises(UserError, match=r"manifest\.json is damaged: its sha256 is not that"):
        read_manifest(folder)


def test_a_token_beyond_the_vocabulary_is_found(folder):
    write_folder(folder, random_rows(6, 8) % 301 | 300, n_shards=3, vocab_size=300)
    with pytest.raises(UserError, match=r"0\.tfrecord: row 1 is corrupt"):
        open_rows(folder)[1]
    assert all("2 damaged records (rows 0, 1)" in problem for problem in verify(folder)[1])
    assert len(verify(folder)[1]) == 3
