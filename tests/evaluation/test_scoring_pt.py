"""The evaluator on PyTorch models: brute force in float64, and the recipe of transformers' docs."""

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from algpt2 import ALGPT2Config, ALGPT2LMHeadModel
from algpt2.evaluation.scoring import cut_windows, score_windows, text_nats
from algpt2.evaluation.scoring_pt import evaluation_model, score_rows
from algpt2.system.processes_pt import Processes

pytestmark = pytest.mark.numeric

PROCESSES = Processes(0, 1, torch.device("cpu"), torch.float32)
SHAPE = {
    "vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2,
    "initializer_range": 0.5, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def make_model(name):
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SHAPE)).eval()
    size = {"algpt2": 16, "no factorization": 32}[name]
    return ALGPT2LMHeadModel(ALGPT2Config(**SHAPE, embedding_size=size)).eval()


def make_tokens(n):
    return np.random.default_rng(0).integers(0, 50, n)


@torch.no_grad()
def log_prob(model, context, token):
    """ln p(token | context) in the model's own precision, one forward pass a token."""
    logits = model(torch.tensor([context.tolist()])).logits[0, -1]
    return logits.log_softmax(-1)[token].item()


@pytest.mark.parametrize("name", ["algpt2", "no factorization", "gpt2"])
@pytest.mark.parametrize(("n_tokens", "stride"), [(40, 1), (40, 5), (40, 16), (9, 4)])
def test_nats_are_those_of_brute_force_in_float64(name, n_tokens, stride):
    model, tokens, context = make_model(name), make_tokens(n_tokens), 16
    double = make_model(name).double()
    expected = []
    for i in range(1, n_tokens):
        if i <= context:
            start = 0
        else:  # the last token that is scored together with token i, and a context before it
            end = context + math.ceil((i - context) / stride) * stride
            start = min(end, n_tokens - 1) - context
        expected.append(log_prob(double, tokens[start:i], tokens[i]))
    for tested, tolerance in ((model, 2e-6), (double, 1e-13)):
        nats, n_scored = text_nats(evaluation_model(tested, PROCESSES, 16, 4), [tokens], stride)
        assert n_scored == n_tokens - 1
        assert nats == pytest.approx(-math.fsum(expected), rel=tolerance)


@pytest.mark.parametrize("name", ["algpt2", "gpt2"])
def test_scores_are_the_log_softmax_and_its_argmax(name):
    model = make_model(name)
    rows = np.random.default_rng(0).integers(0, 50, (40, 17))  # 640 rows of logits: three pieces
    log_probs, is_likeliest = score_rows(model, rows, PROCESSES)
    with torch.no_grad():
        logits = model(torch.from_numpy(rows[:, :-1])).logits
    labels = torch.from_numpy(rows[:, 1:])
    expected = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(log_probs, expected)
    assert torch.equal(is_likeliest.bool(), logits.argmax(-1) == labels)
    assert 0 < is_likeliest.mean() < 1


def documented_recipe(model, tokens, max_length, stride):
    """ "Perplexity of fixed-length models" in transformers' documentation: windows of `max_length`
    tokens every `stride`; of each the tokens that no window had before are labels, and its mean
    loss is weighted by one less than their number. Also the windows' losses in full."""
    ids = torch.from_numpy(tokens)[None]
    total, count, seen, sums = 0.0, 0, 0, []
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - seen)] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss.item()
        n_labels = (labels != -100).sum().item()
        total += loss * (n_labels - 1)
        count += n_labels - 1
        sums.append((loss * (labels[:, 1:] != -100).sum().item(), n_labels - 1))
        seen = end
        if end == len(tokens):
            break
    return math.exp(total / count), sums


@pytest.mark.parametrize("name", ["algpt2", "gpt2"])
@pytest.mark.parametrize("stride", [1, 4, 8, 15])
def test_strided_values_are_those_of_the_documented_recipe(name, stride):
    # The recipe's windows of 16 tokens predict 15, as ours of context 15 do. Lengths at which the
    # last window is a full one: of a shorter one, ours reaches back for more context. 1e-6: the
    # loss of transformers is float32.
    model, tokens = make_model(name).double(), make_tokens(16 + 10 * stride)
    ppl, sums = documented_recipe(model, tokens, max_length=16, stride=stride)
    windows = [*cut_windows(tokens, 15, stride)]
    scores = [s.sum() for s, _ in score_windows(evaluation_model(model, PROCESSES, 15, 4), windows)]
    assert [-score for score in scores] == pytest.approx([nats for nats, _ in sums], rel=1e-6)
    # Its perplexity with its own weights, of our windows:
    weights = [weight for _, weight in sums]
    if stride > 1:  # at stride 1 its weights are zero but for the first window
        means = [-score / w.n_scored for score, w in zip(scores, windows, strict=True)]
        assert ppl == pytest.approx(math.exp(np.average(means, weights=weights)), rel=1e-6)
    # And ours, each token once:
    nats, n_tokens = text_nats(evaluation_model(model, PROCESSES, 15, 4), [tokens], stride)
    assert n_tokens == len(tokens) - 1
    assert nats == pytest.approx(sum(nats for nats, _ in sums), rel=1e-6)


def test_dropout_is_off():
    model = make_model("gpt2").train()
    nats = [text_nats(evaluation_model(model, PROCESSES, 16, 4), [make_tokens(40)], 16)
            for _ in range(2)]  # fmt: skip
    assert nats[0] == nats[1]
