"""Numbers from a mean loss and the text it was measured on: framework-free arithmetic.

Word perplexity and bits per byte compare models with different vocabularies: the loss per token
is scaled by tokens per word (or per byte) of the same text *before* it is exponentiated
(Radford in openai/gpt-2 issue 78).
"""

import gzip
import lzma
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TextTotals:
    """Size of an evaluated text: `tokens` counts one end-of-text a document, `words` is
    white-space separated words plus line ends (WikiText's count), `text_bytes` UTF-8."""

    tokens: int
    words: int
    text_bytes: int


def text_metrics(loss: float, totals: TextTotals) -> dict[str, float]:
    """`val_loss` (nats per token), `val_ppl`, `val_word_ppl`, `val_bpb` (bits per byte)."""
    return {
        "val_loss": loss,
        "val_ppl": _exp(loss),
        "val_word_ppl": _exp(loss * totals.tokens / max(1, totals.words)),
        "val_bpb": loss * totals.tokens / max(1, totals.text_bytes) / math.log(2),
    }


def compressor_bits_per_byte(documents: Iterable[str]) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9e` on the documents, joined by line ends."""
    text = "\n".join(documents).encode()
    packed = {
        "gzip -9": gzip.compress(text, compresslevel=9, mtime=0),
        "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(data) / max(1, len(text)) for name, data in packed.items()}


def table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text; the first row is the heading, columns but the first right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
