"""The evaluator: windows over tokens, LAMBADA, BLiMP, and numbers from losses. Framework-free.

A model comes in as one function, `Model.score`: rows of token ids in, log-probabilities out.
Word perplexity and bits per byte compare models with different vocabularies: the loss per token
is scaled by tokens per word (or per byte) of the same text *before* it is exponentiated
(Radford in openai/gpt-2 issue 78).
"""

import gzip
import itertools
import lzma
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import NonFiniteError
from .tfrecords import Manifest

Tick = Callable[[int, int], object]  # called with the tokens just scored and those of all windows

SORTED_WINDOWS = 4096  # windows sorted by length at a time, so that batches hold little padding
WIDTH_STEP = 16  # batches are padded to multiples of this: few shapes for a compiler


# --- a model, and the windows that it scores ------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A causal language model as the evaluator sees it.

    `score` takes token ids (B, T + 1) int64, T <= context, and returns of tokens 1 to T, each
    given those before it in its row: log-probabilities in nats (B, T), float32 or float64, and
    whether the token is the likeliest one (B, T) bool. Rows are padded on the right with id 0:
    what comes behind a token cannot change a causal model's number for it.
    """

    score: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    context: int  # tokens that the model reads at most
    batch_tokens: int  # size of a batch, padding included: rows times T


@dataclass(frozen=True)
class Window:
    """Tokens (T + 1,) to score at once; only the last `n_scored` count, the others are context."""

    tokens: np.ndarray
    n_scored: int


def cut_windows(tokens: np.ndarray, context: int, stride: int) -> Iterator[Window]:
    """Windows that score every token of (n,) but the first exactly once.

    The first window scores `context` tokens, each later one the next `stride`. Every window of a
    text longer than the context reads `context` tokens, the last one too: it reaches back. So
    stride = context is cheapest, and a token has at least context - stride + 1 tokens before it
    (unless the text does not). 1 <= stride <= context.
    """
    assert 1 <= stride <= context, (stride, context)
    end, last = min(context, len(tokens) - 1), len(tokens) - 1
    n_scored = end
    while n_scored > 0:
        yield Window(tokens[max(0, end - context) : end + 1], n_scored)
        n_scored = min(stride, last - end)
        end += n_scored


def score_windows(
    model: Model, windows: Iterable[Window], tick: Tick = lambda n, n_all: None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each window, in order: log-probabilities (n_scored,) float64 and whether each token is
    the likeliest, (n_scored,) bool.

    Args:
        windows: held, all of them, so that the time left is known.
    Raises:
        NonFiniteError: a log-probability is NaN or infinite.
    """
    windows = list(windows)
    n_all = sum(window.n_scored for window in windows)
    for start in range(0, len(windows), SORTED_WINDOWS):
        some = windows[start : start + SORTED_WINDOWS]
        results: list[tuple[np.ndarray, np.ndarray]] = [None] * len(some)
        order = sorted(range(len(some)), key=lambda i: -len(some[i].tokens))
        while order:
            n_longest = len(some[order[0]].tokens) - 1
            width = min(model.context, math.ceil(n_longest / WIDTH_STEP) * WIDTH_STEP)
            n_rows = max(1, model.batch_tokens // width)
            batch, order = order[:n_rows], order[n_rows:]
            rows = np.zeros((len(batch), width + 1), np.int64)
            for row, i in enumerate(batch):
                rows[row, : len(some[i].tokens)] = some[i].tokens
            log_probs, is_likeliest = model.score(rows)
            for row, i in enumerate(batch):
                end = len(some[i].tokens) - 1
                scored = slice(end - some[i].n_scored, end)
                results[i] = log_probs[row, scored].astype(np.float64), is_likeliest[row, scored]
                if not np.isfinite(results[i][0]).all():
                    raise NonFiniteError("a token's log-probability is not finite")
            tick(sum(some[i].n_scored for i in batch), n_all)
        yield from results


# --- text ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextTotals:
    """Size of an evaluated text: `tokens` counts one end-of-text a document, `words` is
    white-space separated words plus line ends (WikiText's count), `text_bytes` UTF-8."""

    tokens: int
    words: int
    text_bytes: int


def text_totals(manifest: Manifest) -> TextTotals:
    """Of the text that was packed."""
    return TextTotals(manifest.tokens, manifest.words + manifest.line_ends, manifest.text_bytes)


def text_nats(
    model: Model, texts: Iterable[np.ndarray], stride: int,
    tick: Tick = lambda n, n_all: None,
) -> tuple[float, int]:  # fmt: skip
    """Negative log-likelihood in nats of all texts, and how many tokens that is.

    Args:
        texts: token ids (n,) each; the first is context only, so begin with end-of-text to have
            every token of a text scored.
    """
    n_tokens = 0
    sums = []
    windows = itertools.chain.from_iterable(
        cut_windows(tokens, model.context, stride) for tokens in texts
    )
    for log_probs, _ in score_windows(model, windows, tick):
        n_tokens += len(log_probs)
        sums.append(-log_probs.sum())
    return math.fsum(sums), n_tokens


def text_metrics(loss: float, totals: TextTotals) -> dict[str, float]:
    """`val_loss` (nats per token), `val_ppl`, `val_word_ppl`, `val_bpb` (bits per byte)."""
    return {
        "val_loss": loss,
        "val_ppl": _exp(loss),
        "val_word_ppl": _exp(loss * totals.tokens / max(1, totals.words)),
        "val_bpb": loss * totals.tokens / max(1, totals.text_bytes) / math.log(2),
    }


def compressor_nats(documents: Iterable[str]) -> dict[str, float]:
    """What `gzip -9` and `xz -9e` make of the documents, joined by line ends, in nats."""
    text = "\n".join(documents).encode()
    packed = {
        "gzip -9": gzip.compress(text, compresslevel=9, mtime=0),
        "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(data) * math.log(2) for name, data in packed.items()}


# --- LAMBADA -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LambadaScore:
    """LAMBADA (arXiv:1606.06031) by both conventions; perplexities are per passage."""

    passages: int
    word_accuracy: float  # every token of the last word is the likeliest one
    word_ppl: float  # exp of the mean of -ln p(last word)
    token_accuracy: float  # the last token is the likeliest, given all before: OpenAI's GPT-2
    token_ppl: float  # exp of the mean of -ln p(last token)


def score_lambada(
    model: Model, passages: Iterable[tuple[str, str]],
    encode: Callable[[Sequence[str]], list[np.ndarray]], end_of_text: int,
    tick: Tick = lambda n, n_all: None,
) -> LambadaScore:  # fmt: skip
    """Predict the last word of each passage.

    Args:
        passages: (passage without its last word, last word); a space joins them.
        encode: texts to token ids. No end-of-text is put before a passage, as lm-evaluation-
            harness does; a passage of one word has nothing else before it.
    """

    def windows() -> Iterator[Window]:
        for some in _batched(passages, SORTED_WINDOWS):
            contexts = encode([context for context, _ in some])
            wholes = encode([f"{context} {word}" for context, word in some])
            for context, whole in zip(contexts, wholes, strict=True):
                n_scored = len(whole) - len(context)
                tokens = whole if len(context) else np.array([end_of_text, *whole])
                yield Window(tokens[-(model.context + 1) :], n_scored)

    scores = [
        (log_probs.sum(), hits.all(), log_probs[-1], hits[-1])
        for log_probs, hits in score_windows(model, windows(), tick)
    ]
    word, word_hit, token, token_hit = (np.array(column) for column in zip(*scores, strict=True))
    return LambadaScore(
        passages=len(scores),
        word_accuracy=float(word_hit.mean()),
        word_ppl=_exp(-float(word.mean())),
        token_accuracy=float(token_hit.mean()),
        token_ppl=_exp(-float(token.mean())),
    )


# --- BLiMP ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences that differ in one point; `groups` are the names it is averaged under."""

    good: str
    bad: str
    groups: tuple[str, ...]


def score_blimp(
    model: Model, pairs: Iterable[MinimalPair],
    encode: Callable[[Sequence[str]], list[np.ndarray]], end_of_text: int,
    tick: Tick = lambda n, n_all: None,
) -> dict[str, tuple[float, int]]:  # fmt: skip
    """Group -> (share of its pairs whose good sentence is the likelier one, number of pairs).

    Whole sentences are compared (the "simple LM method" of arXiv:1912.00582), each behind
    end-of-text and a space, as lm-evaluation-harness has them. A tie is not a hit.
    """
    pairs = list(pairs)
    sentences = [f" {sentence}" for pair in pairs for sentence in (pair.good, pair.bad)]

    def windows() -> Iterator[Window]:
        for some in _batched(sentences, SORTED_WINDOWS):
            for ids in encode(some):
                tokens = np.array([end_of_text, *ids])[-(model.context + 1) :]
                yield Window(tokens, len(tokens) - 1)

    sums = [log_probs.sum() for log_probs, _ in score_windows(model, windows(), tick)]
    hits: dict[str, list[bool]] = defaultdict(list)
    for pair, good, bad in zip(pairs, sums[::2], sums[1::2], strict=True):
        for group in pair.groups:
            hits[group].append(good > bad)
    return {group: (float(np.mean(values)), len(values)) for group, values in hits.items()}


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while some := list(itertools.islice(items, size)):
        yield some


# --- tables --------------------------------------------------------------------------------------


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
