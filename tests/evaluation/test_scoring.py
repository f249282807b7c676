import gzip
import itertools
import lzma
import math

import numpy as np
import pytest

from algpt2.errors import NonFiniteError
from algpt2.evaluation.scoring import (
    MinimalPair,
    Model,
    TextTotals,
    Window,
    compressor_nats,
    cut_windows,
    score_blimp,
    score_lambada,
    score_windows,
    text_metrics,
    text_nats,
)
from algpt2.system.console import table


def test_a_uniform_model_has_the_metrics_one_can_count():
    # 100 tokens, each 1 of 16: 4 bits a token, 400 bits for 200 bytes and 40 words.
    metrics = text_metrics(math.log(16), TextTotals(tokens=100, words=40, text_bytes=200))
    assert metrics["val_ppl"] == pytest.approx(16)
    assert metrics["val_bpb"] == pytest.approx(2)
    assert metrics["val_word_ppl"] == pytest.approx(2**10)


def test_an_untrained_loss_does_not_overflow():
    assert text_metrics(1e4, TextTotals(1, 1, 1))["val_ppl"] == math.inf


def test_compressors_see_the_joined_text():
    nats = compressor_nats(["to be", "or not"])
    n_bytes = {
        "gzip -9": len(gzip.compress(b"to be\nor not", 9, mtime=0)),
        "xz -9e": len(lzma.compress(b"to be\nor not", preset=9 | 1 << 31)),
    }
    assert nats == {name: pytest.approx(8 * n * math.log(2)) for name, n in n_bytes.items()}


def test_table_is_aligned():
    lines = table([["", "loss", "unit"], ["x", "1", "nats"]], left=["unit"]).splitlines()
    assert lines == ["   loss  unit", "-------------", "x     1  nats"]
    lines = table([["", "loss"], ["model", "1.5"], ["x", "10.25"]]).splitlines()
    assert lines == ["        loss", "------------", "model    1.5", "x      10.25"]


# --- windows, text -------------------------------------------------------------------------------


class Bigrams:
    """A model whose log-probabilities are a table: what every number should be can be counted."""

    def __init__(self, vocab_size=8, seed=0):
        logits = np.random.default_rng(seed).normal(size=(vocab_size, vocab_size)) * 3
        self.table = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        self.shapes = []

    def score(self, rows):
        self.shapes.append(rows.shape)
        log_probs = self.table[rows[:, :-1], rows[:, 1:]]
        return log_probs, self.table[rows[:, :-1]].argmax(-1) == rows[:, 1:]

    def model(self, context=8, batch_tokens=32):
        return Model(self.score, context, batch_tokens)


@pytest.mark.parametrize("context", [1, 2, 5, 8])
@pytest.mark.parametrize("n_tokens", [1, 2, 5, 6, 9, 10, 23, 24, 25, 26])
def test_windows_score_every_token_but_the_first_once(context, n_tokens):
    tokens = np.arange(n_tokens)
    for stride in range(1, context + 1):
        windows = [*cut_windows(tokens, context, stride)]
        scored = [token for w in windows for token in w.tokens[-w.n_scored :].tolist()]
        assert scored == list(range(1, n_tokens))
        for window in windows:
            assert len(window.tokens) == min(context, n_tokens - 1) + 1
            assert np.all(np.diff(window.tokens) == 1)
        assert all(window.n_scored <= stride for window in windows[1:])


def test_the_score_of_a_window_does_not_depend_on_its_batch():
    draw = np.random.default_rng(1)
    windows = []
    for length in draw.integers(2, 40, 50):
        windows.append(Window(draw.integers(0, 8, length), int(draw.integers(1, length))))
    table, ticks = Bigrams(), []
    model = table.model(context=39, batch_tokens=100)
    results = [*score_windows(model, windows, lambda *n: ticks.append(n))]
    for window, (log_probs, is_likeliest) in zip(windows, results, strict=True):
        steps = [*itertools.pairwise(window.tokens.tolist())][-window.n_scored :]
        assert log_probs.tolist() == [table.table[step] for step in steps]
        assert is_likeliest.tolist() == [table.table[a].argmax() == b for a, b in steps]
    n_all = sum(window.n_scored for window in windows)
    assert sum(n for n, _ in ticks) == n_all and {n for _, n in ticks} == {n_all}
    widths = {width - 1 for _, width in table.shapes}
    assert widths <= {16, 32, 39}  # few shapes
    assert all(n * (width - 1) <= 100 for n, width in table.shapes)


def test_many_windows_come_back_in_order():
    windows = [Window(np.array([0, i % 8]), 1) for i in range(10_000)]
    table = Bigrams()
    scores = [float(scores[0]) for scores, _ in score_windows(table.model(), windows)]
    assert scores == [table.table[0, i % 8] for i in range(10_000)]


def test_nats_are_the_sum_over_all_texts():
    table = Bigrams()
    texts = [np.array([0, 3, 1, 2] * 9), np.array([5]), np.array([4, 4])]
    nats, n_tokens = text_nats(table.model(context=8), texts, stride=3)
    steps = [step for text in texts for step in itertools.pairwise(text.tolist())]
    assert n_tokens == len(steps) == 36
    assert nats == pytest.approx(-sum(table.table[step] for step in steps), rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_number_that_is_not_finite_is_an_error(value):
    table = Bigrams()
    table.table[1, 2] = value
    with pytest.raises(NonFiniteError, match="not finite"):
        text_nats(table.model(), [np.array([0, 1, 2])], stride=8)


# --- LAMBADA and BLiMP ---------------------------------------------------------------------------

WORDS = {word: i for i, word in enumerate(["end", "a", "b", "c", "d", "x", "y"])}


def encode(texts):
    """One token per letter; "end" is token 0."""
    return [np.array([WORDS[word] for word in text.replace(" ", "")], int) for text in texts]


def test_lambada_by_both_conventions():
    table = Bigrams(vocab_size=7)
    table.table[WORDS["a"], WORDS["x"]] = 0.0  # certain, and so the likeliest
    table.table[WORDS["x"], WORDS["y"]] = 0.0
    table.table[WORDS["b"], WORDS["x"]] = -5.0
    table.table[WORDS["b"], WORDS["c"]] = -0.1
    passages = [("c a", "xy"), ("d b", "xy"), ("b " * 30 + "a", "x")]
    score = score_lambada(table.model(context=6), passages, encode, start_id=0)
    assert score.passages == 3
    assert score.word_accuracy == pytest.approx(2 / 3)
    assert score.word_ppl == pytest.approx(math.exp(5 / 3))
    assert score.token_accuracy == 1
    assert score.token_ppl == 1
    assert max(width for _, width in table.shapes) <= 7  # long passages lose their beginning


def test_blimp_compares_whole_sentences_behind_end_of_text():
    table = Bigrams(vocab_size=7)
    for first, value in (("a", -1.0), ("b", -2.0), ("c", -1.0)):
        table.table[0, WORDS[first]] = value
    pairs = [
        MinimalPair("a", "b", ("all", "first letter")),  # right
        MinimalPair("b", "a", ("all", "first letter")),  # wrong
        MinimalPair("a", "c", ("all", "tie")),  # not a hit
    ]
    groups = score_blimp(table.model(), pairs, encode, start_id=0)
    assert groups == {"all": (1 / 3, 3), "first letter": (0.5, 2), "tie": (0.0, 1)}


def test_blimp_puts_the_space_that_lm_evaluation_harness_puts():
    seen = []

    def spy(texts):
        seen.extend(texts)
        return encode(texts)

    score_blimp(Bigrams().model(), [MinimalPair("a b", "b", ("all",))], spy, 0)
    assert seen == [" a b", " b"]
