"""What a model scores: windows over tokens, perplexities, LAMBADA, BLiMP. Framework-free.

A model is one function, `Model.score`: rows of token ids in, log-probabilities out. Word perplexity
and bits per byte compare models with different vocabularies: the loss per token is scaled by tokens
per word (or per byte) of the same text *before* it is exponentiated (Radford, openai/gpt-2 issue
78).
"""

import gzip
import itertools
import lzma
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import NonFiniteError
from ..shards.tfrecords import Manifest

Tick = Callable[[int, int], object]  # called with tokens just scored, tokens of all windows

SORTED_WINDOWS = 4096  # windows sorted by length at a time, so that batches hold little padding
WIDTH_STEP = 16  # batches are padded to multiples of this: few shapes for a compiler


# --- a model, and the windows that it scores ------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A causal language model as the evaluator sees it.

    `score` takes token ids (B, T + 1) int64, T <= context. For tokens 1 to T, each given the tokens
    before it in its row, it returns log-probabilities in nats (B, T), float32 or float64, and
    whether the token is the likeliest of the vocabulary, (B, T) bool. Rows are padded on the right
    with id 0: later tokens cannot change a causal model's score of earlier ones.
    """

    score: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    context: int  # tokens that the model reads at most
    batch_tokens: int  # size of a batch, padding included: rows times T


@dataclass(frozen=True)
class Window:
    """Tokens (T + 1,) to score at once; the last `n_scored` count, those before are context."""

    tokens: np.ndarray
    n_scored: int


def cut_windows(tokens: np.ndarray, context: int, stride: int) -> Iterator[Window]:
    """Windows that score every token of (n,) but the first exactly once.

    The first window scores `context` tokens, each later window the next `stride`. Every window of a
    text longer than the context reads `context` tokens; the last window reaches back for them. So
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
    """For each window, in order: log-probabilities (n_scored,) float64, and whether each token is
    the likeliest, (n_scored,) bool.

    Args:
        windows: all are held in memory, so that the time left is known.
    Raises:
        NonFiniteError: a log-probability is NaN or infinite.
    """
    windows = list(windows)
    n_all = sum(window.n_scored for window in windows)
    for start in range(0, len(windows), SORTED_WINDOWS):
        chunk = windows[start : start + SORTED_WINDOWS]
        results: list[tuple[np.ndarray, np.ndarray]] = [None] * len(chunk)
        order = sorted(range(len(chunk)), key=lambda i: -len(chunk[i].tokens))
        while order:
            n_longest = len(chunk[order[0]].tokens) - 1
            width = min(model.context, math.ceil(n_longest / WIDTH_STEP) * WIDTH_STEP)
            n_rows = max(1, model.batch_tokens // width)
            batch, order = order[:n_rows], order[n_rows:]
            rows = np.zeros((len(batch), width + 1), np.int64)
            for row, i in enumerate(batch):
                rows[row, : len(chunk[i].tokens)] = chunk[i].tokens
            log_probs, is_likeliest = model.score(rows)
            for row, i in enumerate(batch):
                end = len(chunk[i].tokens) - 1
                scored = slice(end - chunk[i].n_scored, end)
                results[i] = log_probs[row, scored].astype(np.float64), is_likeliest[row, scored]
                if not np.isfinite(results[i][0]).all():
                    raise NonFiniteError("a token's log-probability is not finite")
            tick(sum(chunk[i].n_scored for i in batch), n_all)
        yield from results


# --- text ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextTotals:
    """Size of an evaluated text: `tokens` counts one end-of-text per document, `words` counts
    white-space separated words plus line ends (WikiText's count), `text_bytes` is UTF-8."""

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
    """Negative log-likelihood of all texts in nats, and the number of tokens that were scored.

    Args:
        texts: token ids (n,) each. The first token is context only: put bos or end-of-text there
            to have every token of the text scored.
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


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def compressor_nats(documents: Iterable[str]) -> dict[str, float]:
    """Size in nats of the documents, joined by line ends, as `gzip -9` and `xz -9e` pack them."""
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
    word_accuracy: float  # every token of the last word is the likeliest
    word_ppl: float  # exp of the mean of -ln p(last word)
    token_accuracy: float  # the last token is the likeliest, given all before: OpenAI's GPT-2
    token_ppl: float  # exp of the mean of -ln p(last token)


def score_lambada(
    model: Model, passages: Iterable[tuple[str, str]],
    encode: Callable[[Sequence[str]], list[np.ndarray]], start_id: int,
    tick: Tick = lambda n, n_all: None,
) -> LambadaScore:  # fmt: skip
    """Predict the last word of each passage.

    Args:
        passages: (passage without its last word, last word); a space joins them.
        encode: texts to token ids.
        start_id: bos, else end-of-text. As in lm-evaluation-harness, it stands before a passage of
            a single word, which has no other context, and before no other.
    """

    def windows() -> Iterator[Window]:
        for chunk in _chunks(passages):
            contexts = encode([context for context, _ in chunk])
            wholes = encode([f"{context} {word}" for context, word in chunk])
            for context, whole in zip(contexts, wholes, strict=True):
                n_scored = len(whole) - len(context)
                tokens = whole if len(context) else np.array([start_id, *whole])
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
    """Two sentences that differ in one point; `groups` names the averages that it counts in."""

    good: str
    bad: str
    groups: tuple[str, ...]


def score_blimp(
    model: Model, pairs: Iterable[MinimalPair],
    encode: Callable[[Sequence[str]], list[np.ndarray]], start_id: int,
    tick: Tick = lambda n, n_all: None,
) -> dict[str, tuple[float, int]]:  # fmt: skip
    """Group -> (share of its pairs whose good sentence is the likelier, number of pairs).

    Whole sentences are compared (the "simple LM method" of arXiv:1912.00582). As in
    lm-evaluation-harness, `start_id` (bos, else end-of-text) and a space stand before each
    sentence. A tie is a miss.
    """
    pairs = list(pairs)
    sentences = [f" {sentence}" for pair in pairs for sentence in (pair.good, pair.bad)]

    def windows() -> Iterator[Window]:
        for chunk in _chunks(sentences):
            for ids in encode(chunk):
                tokens = np.array([start_id, *ids])[-(model.context + 1) :]
                yield Window(tokens, len(tokens) - 1)

    sums = [log_probs.sum() for log_probs, _ in score_windows(model, windows(), tick)]
    hits: dict[str, list[bool]] = defaultdict(list)
    for pair, good, bad in zip(pairs, sums[::2], sums[1::2], strict=True):
        for group in pair.groups:
            hits[group].append(good > bad)
    return {group: (float(np.mean(values)), len(values)) for group, values in hits.items()}


def _chunks(items: Iterable) -> Iterator[list]:
    """Lists of at most `SORTED_WINDOWS` items, which are encoded at once."""
    items = iter(items)
    while chunk := list(itertools.islice(items, SORTED_WINDOWS)):
        yield chunk
