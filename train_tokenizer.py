"""Train a byte-level BPE tokenizer, GPT-2's kind, on text from anywhere.

    python3 train_tokenizer.py --vocab_size 8192                  # docs:, a CPU minute
    python3 train_tokenizer.py --train_path text/ --save_path tokenizer/ --n_files 1000000
    python3 train_tokenizer.py --train_path a.parquet b.jsonl.gz --max_bytes 1000000000

The same text gives the same tokenizer, byte for byte; <|endoftext|> has the last id. A word of more
than 1,024 bytes (base64, DNA) is counted in pieces: the time is linear in the text.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from algpt2.options import TokenizerOptions, parse
from algpt2.system.script import run_script

if TYPE_CHECKING:
    from algpt2.corpus.parts import CorpusCounts
    from algpt2.tokenization_algpt2 import TextTokenizer

HELD_OUT_FRACTION = 0.01  # of the documents, by hash: bytes per token is measured on them
MERGING_S = 10  # seconds between two lines while pairs are merged
HELD_OUT_BYTES = 5_000_000  # at most: enough for three digits


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save and measure the tokenizer that the options describe."""
    options = parse(TokenizerOptions, argv, __doc__)
    # Imported after the options are parsed, so that --help answers at once.
    from algpt2.corpus.documents import documents
    from algpt2.corpus.parts import CorpusCounts, Reading
    from algpt2.system.console import log
    from algpt2.tokenization_algpt2 import END_OF_TEXT, load_tokenizer, save, train

    for name, value in asdict(options).items():
        log(f"{name}: {value}")
    counts, start_s = CorpusCounts(), time.monotonic()
    reading = Reading(
        options.text_key, skip_broken=options.skip_broken,
        document_mark=options.document_mark, end_of_text=END_OF_TEXT,
    )  # fmt: skip
    texts = documents(options.train_path, reading, n_files=options.n_files, counts=counts)
    Path(options.save_path).mkdir(parents=True, exist_ok=True)  # fails before the work, not after

    # 1. Train on all documents but a few
    held_out: list[str] = []
    has_valid_split = set(options.train_path) <= {"docs:", "docs:train"}
    if not has_valid_split:
        texts = hold_out(texts, held_out)
    merged = threading.Event()
    texts = shown(texts, options.max_bytes, counts, merged)
    try:
        tokenizer = train(texts, vocab_size=options.vocab_size, control_codes=options.control_codes)
    finally:
        merged.set()
    seconds = time.monotonic() - start_s

    # 2. Save, and measure the saved tokenizer
    written = save(tokenizer, options.save_path, overwrite=options.overwrite)
    saved = load_tokenizer(options.save_path)
    log(bytes_per_token(saved, list(documents("docs:valid")) if has_valid_split else held_out))
    log(
        f"{options.save_path}: {saved.vocab_size:,} entries, {END_OF_TEXT} is {saved.eot_id}, "
        f"{seconds:.1f} s" + ("" if written else "; this very tokenizer was there already")
    )


def shown(
    texts: Iterable[str], max_bytes: int | None, counts: "CorpusCounts", merged: threading.Event
) -> Iterator[str]:
    """Pass on at most `max_bytes` of `texts`, with a progress bar; then log `counts`, and how long
    merging takes until `merged`."""
    from algpt2.corpus.documents import first_bytes, log_counts
    from algpt2.system.console import Progress
    from algpt2.tokenization_algpt2 import END_OF_TEXT

    start_s = time.monotonic()
    with Progress("read", total=max_bytes, unit="B") as progress:
        for text in texts if max_bytes is None else first_bytes(texts, max_bytes):
            yield text
            progress.update(counts.text_bytes - progress.done)
    log_counts(counts, END_OF_TEXT, f" in {time.monotonic() - start_s:.1f} s; merging")
    threading.Thread(target=show_merging, args=(merged,), daemon=True).start()


def show_merging(merged: threading.Event) -> None:
    """Log every few seconds that pairs are merged, until they are."""
    from algpt2.system.console import log

    start_s = time.monotonic()
    while not merged.wait(MERGING_S):
        log(f"merging for {time.monotonic() - start_s:.0f} s")


def hold_out(texts: Iterable[str], held_out: list[str]) -> Iterator[str]:
    """Pass on `texts`, but put a small part of them, never the first, into `held_out`."""
    from algpt2.corpus.docstrings import hash_fraction

    n_bytes = 0
    for n, text in enumerate(texts):
        if n and n_bytes < HELD_OUT_BYTES and hash_fraction(text) < HELD_OUT_FRACTION:
            held_out.append(text)
            n_bytes += len(text.encode())
        else:
            yield text


def bytes_per_token(tokenizer: "TextTokenizer", texts: Sequence[str]) -> str:
    """A line for the log: how well `tokenizer` compresses the held-out texts."""
    if not texts:
        return "bytes per token: not measured, too few documents to hold one out"
    n_bytes = sum(len(text.encode()) for text in texts)
    n_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    size = f"{n_bytes / 1e6:.1f} MB of {len(texts):,} held-out documents"
    return f"{n_bytes / n_tokens:.3f} bytes per token on {size}"


if __name__ == "__main__":
    run_script(main)
