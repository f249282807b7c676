"""Pack text into TFRecord shards for pretraining: documents to rows of tokens, with a manifest.

    python3 make_tfrecords.py --n_files 2000                # docs:, a CPU minute, into runs/shards
    python3 make_tfrecords.py --path text/ --save_path shards/ --tokenizer tokenizer/ --seq_len 1024
    python3 make_tfrecords.py --path ./data/openwebtext/ --save_path ./train/ \\
        --files_per_tfrecord 500000 --use_control_codes --seq_len 1024 --min_seq_len \\
        --tokenizer ./tokenizer/
    python3 make_tfrecords.py --path a.jsonl.gz "b/**/*.txt" hf:NAME:train --save_path shards/

    python3 make_tfrecords.py --path owt.tar --dedup --valid_fraction 0.01 --n_shards 16
    python3 make_tfrecords.py --path owt.tar --n_shards 16 --save_path gs://BUCKET/train
    python3 make_tfrecords.py --path wiki.train.tokens --detokenizer wikitext --save_path wiki/
    python3 make_tfrecords.py --verify shards/

If packing is killed, the disk is full or a file changes, repeat the command: it continues to the
same bytes. Damaged and unreadable input is named; --skip_broken leaves it out. Other options in the
same folder are an error. A folder at a URL (fsspec's: gs://, s3:// ...) works the same; the local
disk then holds only the tokens (about half as many bytes as the text) and a shard per worker.

What the command writes:

    save_path/0.tfrecord ...    records of tf.train.Example: `tokens`, seq_len + 1 uint16 or uint32
    save_path/manifest.json     options, tokenizer, counts of the text, checksum of every shard
"""

from collections.abc import Sequence
from dataclasses import asdict

from algpt2.errors import UserError
from algpt2.options import DEFAULT_TOKENIZER, PackOptions, parse
from algpt2.system.script import run_script


def main(argv: Sequence[str] | None = None) -> None:
    """Pack text, or check the shards in `--verify`."""
    options = parse(PackOptions, argv, __doc__)
    if options.verify:
        check(options)
    else:
        pack_text(options)


def pack_text(options: PackOptions) -> None:
    """Pack `--path` into `--save_path`."""
    # Imported after the options are parsed, so that --help answers at once.
    from algpt2.shards.packing import pack
    from algpt2.system.console import log
    from algpt2.tokenization_algpt2 import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer or DEFAULT_TOKENIZER)
    for name, value in asdict(options).items():
        log(f"{name}: {value}")
    log(
        f"vocabulary: {tokenizer.vocab_size:,} entries, tokens stored as {tokenizer.dtype.__name__}"
    )
    pack(options, tokenizer)


def check(options: PackOptions) -> None:
    """Read every byte of `--verify`; `UserError` if anything is wrong."""
    from algpt2.shards.tfrecords import verify
    from algpt2.system.console import log
    from algpt2.system.parallel import available_cores
    from algpt2.tokenization_algpt2 import load_tokenizer

    fingerprint = load_tokenizer(options.tokenizer).fingerprint if options.tokenizer else None
    workers = options.workers or available_cores()
    manifest, problems = verify(options.verify, tokenizer_sha256=fingerprint, workers=workers)
    for problem in problems:
        log(problem)
    if problems:
        raise UserError(f"{options.verify}: {len(problems)} problem(s), named above; pack it again")
    shards, rows = len(manifest.shards), manifest.n_rows
    log(f"{options.verify} is sound: {shards:,} shards, {rows:,} rows, every record checked")


if __name__ == "__main__":
    run_script(main)
