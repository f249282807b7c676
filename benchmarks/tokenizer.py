"""Training a tokenizer against bare `tokenizers` on the same files, and how well vocabularies do.

    python3 benchmarks/tokenizer.py                       # docs:train as 2,000 and 100,000 files
    python3 benchmarks/tokenizer.py --source "data/train-*.parquet" --vocab_size 50257 --rounds 3
    python3 benchmarks/tokenizer.py --vocabularies algpt2-tokenizer algpt2-tiny \\
        --sets docs:valid wiki.test.raw ptb.test.txt

The first two measure time and peak memory (ru_maxrss), one process a measurement, contestants
alternating, medians over the rounds. The third prints bytes per token of each vocabulary (rows) on
each set (columns); a text file is one document.
"""

import contextlib
import io
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from harness import save

from algpt2.system.console import table


@dataclass(frozen=True)
class Options:
    """What is measured."""

    source: tuple[str, ...] = ("docs:train",)  # text that is cut into files
    files: tuple[int, ...] = (2_000, 100_000)  # how many files the same bytes lie in
    vocab_size: int = 8192  # entries
    rounds: int = 3  # measurements of each contestant
    vocabularies: tuple[str, ...] = ()  # names or folders of tokenizers: bytes per token instead
    sets: tuple[str, ...] = ("docs:valid",)  # text from anywhere, one column each
    measure: str | None = None  # internal: one measurement, CONTESTANT:FOLDER


def main(argv: Sequence[str] | None = None) -> None:
    """Measure alternately, or compare vocabularies; print the table."""
    options = tyro.cli(Options, args=argv, use_underscores=True)
    if options.measure:
        contestant, folder = options.measure.split(":", 1)
        print(json.dumps(measure(CONTESTANTS[contestant], folder, options.vocab_size)))
    elif options.vocabularies:
        print(compare_vocabularies(options.vocabularies, options.sets))
    else:
        results = alternate(options)
        print(result_table(results))
        save("tokenizer", results)


# --- speed and memory ----------------------------------------------------------------------------


def ours(folder: str, vocab_size: int) -> None:
    """train_tokenizer.py as a user runs it, saving and measuring included."""
    import train_tokenizer

    with tempfile.TemporaryDirectory() as save_path, contextlib.redirect_stdout(io.StringIO()):
        flags = ["--train_path", folder, "--save_path", save_path, "--vocab_size", str(vocab_size)]
        train_tokenizer.main(flags)


def bare(folder: str, vocab_size: int) -> None:
    """The least that trains and saves: `tokenizers`, fed by a loop that opens files."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        for path in sorted(Path(folder).iterdir()):
            with path.open(encoding="utf-8", newline="") as file:
                yield file.read()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    with tempfile.TemporaryDirectory() as save_path:
        tokenizer.save(f"{save_path}/tokenizer.json")


CONTESTANTS = {"train_tokenizer.py": ours, "tokenizers": bare}


def measure(train: Callable[[str, int], None], folder: str, vocab_size: int) -> dict[str, float]:
    """Seconds, seconds of all cores and peak memory of one training in this process."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    train(folder, vocab_size)
    seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak}


def alternate(options: Options) -> dict[str, dict]:
    """All measurements: number of files -> its bytes, and per contestant a list."""
    results = {}
    for n_files in options.files:
        with tempfile.TemporaryDirectory() as folder:
            # In a process of its own: a child begins with the peak memory of its parent.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                n_bytes = pool.apply(write_files, (options.source, n_files, Path(folder)))
            runs: dict[str, list] = {name: [] for name in CONTESTANTS}
            for round_ in range(options.rounds):
                for name in CONTESTANTS:
                    flags = [f"--measure={name}:{folder}", f"--vocab_size={options.vocab_size}"]
                    command = [sys.executable, __file__, *flags]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    runs[name].append(json.loads(done.stdout.splitlines()[-1]))
                    print(f"{n_files} files, round {round_ + 1}: {name} {runs[name][-1]}")
        results[str(n_files)] = {"bytes": n_bytes, "runs": runs}
    return results


def write_files(source: Sequence[str], n_files: int, folder: Path) -> int:
    """Cut the text of `source` into `n_files` files of about the same size; its bytes."""
    from algpt2.corpus.documents import documents

    text = "\n".join(documents(source))
    size = -(-len(text) // n_files)
    for i in range(n_files):
        raw = text[i * size : (i + 1) * size].encode()
        (folder / f"{i:07}.txt").write_bytes(raw)
    return len(text.encode())


def result_table(results: dict[str, dict]) -> str:
    """Medians; times relative to bare `tokenizers` on the same files."""
    lines = [["", "files", "MB", "seconds", "ratio", "cpu s", "ratio", "peak MB"]]
    for n_files, result in results.items():
        medians = {
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for name, runs in result["runs"].items()
        }
        for name, median in medians.items():
            n_mb = result["bytes"] / 1e6
            lines.append([
                name, f"{int(n_files):,}", f"{n_mb:.1f}", f"{median['seconds']:.1f}",
                f"{median['seconds'] / medians['tokenizers']['seconds']:.2f}",
                f"{median['cpu_s']:.1f}", f"{median['cpu_s'] / medians['tokenizers']['cpu_s']:.2f}",
                f"{median['peak_mb']:.0f}",
            ])  # fmt: skip
    return table(lines)


# --- vocabularies --------------------------------------------------------------------------------


def compare_vocabularies(vocabularies: Sequence[str], sets: Sequence[str]) -> str:
    """Bytes per token of each vocabulary on each set."""
    from algpt2.corpus.documents import documents
    from algpt2.tokenization_algpt2 import load_tokenizer

    lines = [["bytes per token", "entries", *(Path(name).name for name in sets)]]
    texts = {name: list(documents(name)) for name in sets}
    for name in vocabularies:
        tokenizer = load_tokenizer(name)
        line = [Path(name).name, f"{tokenizer.vocab_size:,}"]
        for found in texts.values():
            n_bytes = sum(len(text.encode()) for text in found)
            n_tokens = sum(len(ids) for ids in tokenizer.encode_batch(found))
            line.append(f"{n_bytes / n_tokens:.3f}")
        lines.append(line)
    return table(lines)


if __name__ == "__main__":
    main()
