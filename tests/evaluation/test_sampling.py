"""Text from both frameworks: what it starts with, and that our flags alone decide."""

import importlib
import json

import pytest
import torch

from algpt2.options import ModelOptions, SampleOptions, TrainOptions
from algpt2.runs.start import find_start


def sample(framework, folder, **options):
    """The token ids that `--sample_only` gives."""
    start = find_start(TrainOptions(sample_only=True, model=ModelOptions(checkpoint=str(folder))))
    trainer, sampling = (
        importlib.import_module(f"algpt2.{name}_{framework}")
        for name in ("training.trainer", "evaluation.sampling")
    )
    torch.manual_seed(0)
    return sampling.sample_tokens(
        trainer.build_model(start), start.tokenizer, SampleOptions(**options)
    )


@pytest.mark.parametrize("framework", ["pt", "tf"])
def test_a_sample_starts_behind_bos(framework, foreign_model, monkeypatch):
    from algpt2.evaluation import sampling

    seen, extend_texts = [], sampling.extend_texts

    def spy(extend, *arguments):
        return extend_texts(lambda rows, n: seen.append(rows[0][0]) or extend(rows, n), *arguments)

    module = importlib.import_module(f"algpt2.evaluation.sampling_{framework}")
    monkeypatch.setattr(module, "extend_texts", spy)
    sample(framework, foreign_model, n_samples=1, max_length=3)
    assert seen[0] == 1


# What somebody else's generation_config.json may hold.
FOREIGN_DEFAULTS = [
    {"stop_strings": ["a"]}, {"penalty_alpha": 0.6}, {"num_beams": 3}, {"no_repeat_ngram_size": 1},
    {"num_beams": 2, "num_return_sequences": 2}, {"bad_words_ids": [[5]]}, {"max_time": 1e-9},
    {"suppress_tokens": [6]}, {"do_sample": True, "temperature": 0.1, "min_p": 0.5},
    {"forced_eos_token_id": 0}, {"max_length": 3},
]  # fmt: skip


@pytest.mark.parametrize("greedy", [True, False])
def test_no_default_of_a_checkpoint_changes_a_sample(foreign_model, greedy):
    options = {"do_sample": not greedy, "n_samples": 2, "max_length": 12, "prompt": "a"}
    plain = sample("pt", foreign_model, **options)
    path = foreign_model / "generation_config.json"
    for defaults in FOREIGN_DEFAULTS:
        path.write_text(json.dumps({"eos_token_id": 258, **defaults}))
        assert sample("pt", foreign_model, **options) == plain, defaults
    if greedy:
        assert sample("tf", foreign_model, **options) == plain


def test_a_sample_leaves_the_defaults_of_a_checkpoint_alone(foreign_model):
    path = foreign_model / "generation_config.json"
    path.write_text(json.dumps({"num_beams": 3}))
    start = find_start(
        TrainOptions(sample_only=True, model=ModelOptions(checkpoint=str(foreign_model)))
    )
    from algpt2.evaluation.sampling_pt import sample_tokens
    from algpt2.training.trainer_pt import build_model

    model = build_model(start)
    sample_tokens(model, start.tokenizer, SampleOptions(max_length=3))
    assert model.generation_config.num_beams == 3
