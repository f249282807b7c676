"""Pack text into TFRecord shards for pretraining: documents to rows of tokens, with a manifest.

    python3 make_tfrecords.py --n_files 2000                # docs:, a CPU minute, into runs/shards
    python3 make_tfrecords.py --path text/ --save_path shards/ --tokenizer tokenizer/ --seq_len 1024
    python3 make_tfrecords.py --path ./data/openwebtext/ --save_path ./train/ \\
        --files_per_tfrecord 500000 --use_control_codes --seq_len 1024 --min_seq_len \\
        --tokenizer ./tokenizer/
    python3 make_tfrecords.py --path a.jsonl.gz "b/**/*.txt" hf:NAME:train --save_path shards/

Interrupted, repeat the command: it gives the same bytes. A finished folder says that it is done;
other options in the same folder are an error.

What is left behind:

    save_path/0.tfrecord ...    records of tf.train.Example: `tokens`, seq_len + 1 uint16 or uint32
    save_path/manifest.json     options, tokenizer, counts of the text, checksum of every shard
"""

from collections.abc import Sequence
from dataclasses import asdict

from algpt2.errors import run_script
from algpt2.options import PackOptions, parse


def main(argv: Sequence[str] | None = None) -> None:
    """Pack `--path` into `--save_path`."""
    options = parse(PackOptions, argv)
    # Behind the options, so that --help answers at once.
    from algpt2.packing import pack
    from algpt2.report import log
    from algpt2.tokenization_algpt2 import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    for name, value in asdict(options).items():
        log(f"{name}: {value}")
    log(
        f"vocabulary: {tokenizer.vocab_size:,} entries, tokens stored as {tokenizer.dtype.__name__}"
    )
    pack(
        options.path,
        tokenizer,
        options.save_path,
        seq_len=options.seq_len,
        files_per_tfrecord=options.files_per_tfrecord,
        use_control_codes=options.use_control_codes,
        control_codes=options.control_codes,
        n_examples=options.n_examples,
        n_files=options.n_files,
        line_by_line=options.line_by_line,
        text_key=options.text_key,
        overwrite=options.overwrite,
    )


if __name__ == "__main__":
    run_script(main)
