"""Text from both frameworks: what it starts with, and that our flags alone decide."""

import importlib

import pytest

from algpt2.options import ModelOptions, SampleOptions, TrainOptions
from algpt2.runs.start import find_start


def sample(framework, folder, **options):
    """The token ids that `--sample_only` gives."""
    start = find_start(TrainOptions(sample_only=True, model=ModelOptions(checkpoint=str(folder))))
    trainer, sampling = (
        importlib.import_module(f"algpt2.{name}_{framework}")
        for name in ("training.trainer", "evaluation.sampling")
    )
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
