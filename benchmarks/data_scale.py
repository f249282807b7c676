"""Packing at scale: documents, speed and peak memory of the workers on generated text.

    python3 benchmarks/data_scale.py --text data/*.parquet --gigabytes 1 10
    python3 benchmarks/data_scale.py --text data/*.parquet --gigabytes 3 --one_file_each

Each copy of the given documents gets its own substitution of letters: as many words again that no
cache has seen, with the lengths and frequencies of real ones. Memory is flat if the last row's
peak is that of the first. Needs about 4 bytes of disk for each byte of text, in --folder.
"""

import argparse
import glob
import json
import shutil
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from algpt2.system.console import table

ROWS_PER_FILE = 10_000


def write_rows(rows: list[bytes], path: Path, one_file_each: bool) -> None:
    """One parquet file, or a folder of text files."""
    if one_file_each:
        path.mkdir()
        for i, row in enumerate(rows):
            (path / f"{i:05d}.txt").write_bytes(row)
        return
    column = pa.array(rows, pa.binary()).cast(pa.string())
    pq.write_table(pa.table({"text": column}), path.with_suffix(".parquet"), compression="none")


def generate(
    texts: list[bytes], folder: Path, n_bytes: float, one_file_each: bool
) -> tuple[int, int]:
    """Write at least `n_bytes` of text; documents and bytes."""
    rng, documents, written, copy = np.random.default_rng(0), 0, 0, 0
    folder.mkdir(parents=True)
    letters = string.ascii_lowercase.encode()
    while written < n_bytes:
        shuffled = bytes(rng.permutation(np.frombuffer(letters, np.uint8)))
        substitution = bytes.maketrans(letters, shuffled)
        for i in range(0, len(texts), ROWS_PER_FILE):
            rows = [text.translate(substitution) for text in texts[i : i + ROWS_PER_FILE]]
            write_rows(rows, folder / f"{copy:04d}-{i:08d}", one_file_each)
            documents, written = documents + len(rows), written + sum(map(len, rows))
            if written >= n_bytes:
                break
        copy += 1
    return documents, written


PACK = """
import json, resource, sys, time
import make_tfrecords
if __name__ == "__main__":
    start = time.perf_counter()
    make_tfrecords.main(sys.argv[1:])
    seconds = time.perf_counter() - start
    # Not RUSAGE_SELF, which begins with the memory of the process that started this one.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps([seconds, int(status["VmHWM"].split()[0]) * 1024, worker * 1024]))
"""


def main() -> None:
    """Print one row for each size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", required=True, help="parquet files, column text")
    parser.add_argument("--gigabytes", nargs="+", type=float, default=[1, 10])
    parser.add_argument("--one_file_each", action="store_true", help="text files, not parquet")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--folder", default="runs/data_scale", help="is removed at the end")
    options = parser.parse_args()
    paths = [path for pattern in options.text for path in sorted(glob.glob(pattern))]  # noqa: PTH207
    columns = [pq.read_table(path, columns=["text"])["text"] for path in paths]
    texts = [text.encode() for column in columns for text in column.to_pylist()]
    folder, lines = Path(options.folder), [["GB", "documents", "MB/s", "peak worker", "peak main"]]
    folder.mkdir(parents=True)
    (folder / "pack.py").write_text(PACK)
    for gigabytes in options.gigabytes:
        documents, n_bytes = generate(
            texts, folder / "text", gigabytes * 1e9, options.one_file_each
        )
        command = [sys.executable, str(folder / "pack.py"), "--path", str(folder / "text"),
                   "--save_path", str(folder / "out"), "--seq_len", "1024",
                   "--workers", options.workers]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, main_peak, worker_peak = json.loads(done.stdout.splitlines()[-1])
        lines.append([f"{n_bytes / 1e9:.2f}", f"{documents:,}", f"{n_bytes / 1e6 / seconds:.0f}",
                      *(f"{peak / 1e9:.2f} GB" for peak in (worker_peak, main_peak))])  # fmt: skip
        print("  ".join(lines[-1]), flush=True)
        for name in ("text", "out"):
            shutil.rmtree(folder / name)
    shutil.rmtree(folder)
    print(table(lines))


if __name__ == "__main__":
    main()
