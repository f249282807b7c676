"""Write any ALGPT2 as a stock GPT-2 checkpoint, which every tool that knows GPT-2 reads.

    python3 export_gpt2.py runs/train runs/gpt2               # the newest checkpoint of a run
    python3 export_gpt2.py runs/train/checkpoint-00001000 gpt2-folder --overwrite

The logits are the same: the shared block is copied to each layer, the factorized embedding is
multiplied out. Markdown/EXPORT.md goes on to ONNX Runtime, llama.cpp and CTranslate2.
"""

from collections.abc import Sequence
from pathlib import Path

from algpt2.options import ExportOptions, parse
from algpt2.system.script import run_script


def main(argv: Sequence[str] | None = None) -> None:
    """Export the checkpoint that the options name."""
    options = parse(ExportOptions, argv, __doc__)
    from algpt2.export.convert_pt import WEIGHTS_FILE, export_gpt2
    from algpt2.runs.mirror import fetch_checkpoint
    from algpt2.system.console import log

    out = Path(options.out)
    config = export_gpt2(fetch_checkpoint(options.checkpoint), out, overwrite=options.overwrite)
    size = (out / WEIGHTS_FILE).stat().st_size
    log(f"{out}: GPT-2 of {config.n_layer} layers, {config.n_embd} wide, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    run_script(main)
