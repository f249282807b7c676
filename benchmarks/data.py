"""Text files to packed tokens: this project, the common way, the original's way, and the ceiling.

    python3 benchmarks/data.py --text data/*.parquet

One run, alternating, each in a process of its own on one core; medians of MB of text per second.

    ours         make_tfrecords.py: shards with checksums and manifest
    ours, 2      the same on two cores
    ours, xz     the same from one .tar.xz of the files, on two cores: one decompresses
    xz -dc       that file to nowhere
    ceiling      listing and reading the files, and the bare encoder, nothing written
    common       datasets.map with the fast transformers tokenizer in batches, written as uint16
    original     one document at a time, int64 features in TFRecords (the 2020 project's method)

Then what a token takes on disk, and what it could: the entropy of the ids, each by itself, and xz,
which knows what stands before; both of the first rows.

The slow ones get the first tenth and hundredth of the files: rates, not times, are compared.
"""

import argparse
import glob
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from harness import ROOT, save

from algpt2.system.console import table

METHODS = {
    "ours": 1, "ours, 2": 1, "ours, xz": 1, "xz -dc": 1, "ceiling": 1, "common": 10, "original": 100
}  # fmt: skip
TWO_CORES = ("ours, 2", "ours, xz")
TOKENIZER = str(ROOT / "algpt2" / "algpt2-tokenizer")
SEQ_LEN = 1024


def ours(paths: list[str], folder: Path, workers: int = 1, source: str | None = None) -> int:
    """Bytes on disk of the shards."""
    import make_tfrecords

    source = source or str(Path(paths[0]).parent)
    make_tfrecords.main(["--path", source, "--save_path", str(folder), "--seq_len", str(SEQ_LEN),
                         "--workers", str(workers)])  # fmt: skip
    return sum(path.stat().st_size for path in folder.iterdir())


def xz(paths: list[str], folder: Path) -> int:
    """`xz -dc`."""
    command = ["xz", "-dc", archive_of(paths)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return 0


def archive_of(paths: list[str]) -> str:
    """Where the .tar.xz of the files lies."""
    return f"{Path(paths[0]).parent}.tar.xz"


def ceiling(paths: list[str], folder: Path) -> int:
    """List the files, read and encode each, keep nothing."""
    from algpt2.shards.encoders import FastEncoder
    from algpt2.tokenization_algpt2 import load_tokenizer

    encoder = FastEncoder(load_tokenizer(TOKENIZER))._encoder
    for path in sorted(entry.path for entry in os.scandir(Path(paths[0]).parent)):
        with open(path, "rb") as file:  # noqa: PTH123
            encoder.encode(file.read())
    return 0


def bytes_per_token(folder: Path) -> dict[str, float]:
    """Of the first 4 million tokens of shards: as stored, and in fewer bytes."""
    import lzma

    import numpy as np

    from algpt2.shards.tfrecords import open_rows

    rows = open_rows(folder)
    ids = rows[np.arange(min(len(rows), 4_000_000 // SEQ_LEN))][:, :-1]
    share = np.bincount(ids.ravel()) / ids.size
    share = share[share > 0]
    return {
        "stored": rows.manifest.shards[0].bytes / rows.manifest.shards[0].rows / SEQ_LEN,
        "entropy": float(-(share * np.log2(share)).sum() / 8),
        "xz -6": len(lzma.compress(ids.tobytes(), preset=6)) / ids.size,
    }


def common(paths: list[str], folder: Path) -> int:
    """`datasets.map` in batches of 1,000, concatenated into one uint16 file."""
    import datasets
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    datasets.disable_progress_bars()
    texts = datasets.Dataset.from_generator(
        lambda: ({"text": Path(path).read_text()} for path in paths),
        cache_dir=str(folder / "cache"),
    )
    tokens = texts.map(
        lambda batch: {"ids": tokenizer(batch["text"])["input_ids"]},
        batched=True, remove_columns=["text"],
    )  # fmt: skip
    with (folder / "tokens.bin").open("wb") as file:
        for batch in tokens.iter(1000):
            for ids in batch["ids"]:
                np.array([tokenizer.eos_token_id, *ids], np.uint16).tofile(file)
    return (folder / "tokens.bin").stat().st_size


def original(paths: list[str], folder: Path) -> int:
    """One file at a time through the tokenizer; rows as int64 `inputs` and `labels`."""
    import tensorflow as tf
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)

    def feature(ids: list[int]) -> tf.train.Feature:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=ids))

    stream: list[int] = []
    with tf.io.TFRecordWriter(str(folder / "0.tfrecord")) as writer:
        for path in paths:
            stream += [tokenizer.eos_token_id, *tokenizer.encode(Path(path).read_text())]
            while len(stream) > SEQ_LEN:
                row, stream = stream[: SEQ_LEN + 1], stream[SEQ_LEN:]
                features = {"inputs": feature(row[:-1]), "labels": feature(row[1:])}
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())
    return (folder / "0.tfrecord").stat().st_size


def run_one(method: str, folder: str) -> None:
    """In a process of its own: time a method on the files of `folder`, print what it measured."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                   "TF_CPP_MIN_LOG_LEVEL": "3"}  # fmt: skip
    if method not in TWO_CORES and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    paths = sorted(entry.path for entry in os.scandir(folder))
    if METHODS[method] > 1:
        paths = paths[: max(1, len(paths) // METHODS[method])]
    n_bytes = sum(os.stat(path).st_size for path in paths)  # noqa: PTH116
    functions = {"ceiling": ceiling, "common": common, "original": original, "xz -dc": xz}
    functions |= {"ours": ours, "ours, 2": lambda paths, out: ours(paths, out, workers=2)}
    functions["ours, xz"] = lambda paths, out: ours(paths, out, 2, archive_of(paths))
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as out:
        start = time.perf_counter()
        written = functions[method](paths, Path(out))
        seconds = time.perf_counter() - start
        found = {"rate": n_bytes / 1e6 / seconds, "written": written / n_bytes}
        if method == "ours":
            found["bytes_per_token"] = bytes_per_token(Path(out))
    print(json.dumps(found))


def write_files(patterns: list[str], folder: Path, n: int) -> None:
    """`n` documents of the parquet files as one file each, beginning anew behind the last."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    paths = [path for pattern in patterns for path in sorted(glob.glob(pattern))]  # noqa: PTH207
    columns = [pq.read_table(path, columns=["text"])["text"].to_pylist() for path in paths]
    texts = [text for column in columns for text in column]
    for i in range(n):
        (folder / f"{i:06d}.txt").write_text(texts[i % len(texts)])
    archive = archive_of([str(folder / "0.txt")])
    with tarfile.open(archive, "w:xz", preset=1, format=tarfile.GNU_FORMAT) as tar:  # as of tar -J
        tar.add(folder, folder.name)


def main() -> None:
    """Print a table and write benchmarks/results/data.json."""
    if sys.argv[1:2] == ["--one"]:
        return run_one(*sys.argv[2:4])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", required=True, help="parquet files, column text")
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default="runs/data", help="is removed at the end")
    options = parser.parse_args()
    files = Path(options.folder) / "files"
    write_files(options.text, files, options.documents)
    found: dict[str, list[dict]] = {method: [] for method in METHODS}
    for _ in range(options.rounds):
        for method in METHODS:
            command = [sys.executable, __file__, "--one", method, str(files.resolve())]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[method].append(json.loads(done.stdout.splitlines()[-1]))
    shutil.rmtree(options.folder)
    rates = {name: statistics.median(x["rate"] for x in xs) for name, xs in found.items()}
    lines = [["", "MB/s", "ours / it", "bytes written / byte of text"]]
    for name, rate in rates.items():
        written = found[name][0]["written"]
        lines.append([name, f"{rate:.2f}", f"{rates['ours'] / rate:.2f}", f"{written:.2f}"])
    print(table(lines))
    for name, n_bytes in found["ours"][0]["bytes_per_token"].items():
        print(f"bytes of a token, {name}: {n_bytes:.2f}")
    save("data", {"documents": options.documents, "runs": found})
    return None


if __name__ == "__main__":
    main()
