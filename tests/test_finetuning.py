"""Finetuning as a user does it: control codes per file, before and after, samples with a code."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_pt
from algpt2.errors import UserError
from algpt2.evaluation.sampling_pt import sample_texts
from algpt2.options import DataOptions, SampleOptions
from algpt2.runs.start import open_or_pack
from algpt2.shards.tfrecords import open_rows
from algpt2.system import console
from algpt2.tokenization_algpt2 import load_tokenizer

CODES = ("<|wiki|>", "<|code|>")


@pytest.fixture
def tokenizer(tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture
def flags(flags):
    """A run of four steps on the training files, with more arguments behind its flags."""

    def make(save_dir="run", *more, **changes):
        options = {"max_steps": 4, "eval_steps": 2, "logging_steps": None} | changes
        options |= {flag[2:]: None for flag in map(str, more) if flag.startswith("--")}
        return [*flags(save_dir, **options), *map(str, more)]

    return make


@pytest.fixture
def two_texts(corpus):
    """Flags: two files to train on, two to evaluate, a code for each."""
    train, valid = (sorted((corpus / split).iterdir()) for split in ("train", "valid"))
    return [
        "--train_path", train[0], train[1], "--val_path", valid[0], valid[1],
        "--control_codes", *CODES,
    ]  # fmt: skip


# --- the tokenizer -------------------------------------------------------------------------------


def test_new_codes_get_the_next_ids_and_text_stays_text(tokenizer, tmp_path):
    longer = tokenizer.with_control_codes(("<|endoftext|>", *CODES))
    assert [longer.token_to_id(code) for code in ("<|endoftext|>", *CODES)] == [299, 300, 301]
    assert (longer.vocab_size, longer.n_new_codes, tokenizer.vocab_size) == (302, 2, 300)
    text = "the model <|wiki|>"
    assert [*longer.encode_batch([text])[0]] == [*tokenizer.encode_batch([text])[0]]
    assert tokenizer.with_control_codes(("<|endoftext|>",)) is tokenizer
    with pytest.raises(UserError, match="'a' is an ordinary word"):
        tokenizer.with_control_codes(("a",))
    longer.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert (again.vocab_size, again.special_ids) == (302, [299, 300, 301])
    assert again.fingerprint == longer.fingerprint
    again.save(tmp_path / "copy")
    for folder in (tmp_path, tmp_path / "copy"):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs("<|code|>the").input_ids == [301, *longer.encode_batch(["the"])[0]]
        assert theirs.decode([300, 301, 299], skip_special_tokens=True) == ""


# --- rows ----------------------------------------------------------------------------------------


def test_documents_of_a_path_start_with_its_code(corpus, tokenizer):
    longer, files = tokenizer.with_control_codes(CODES), sorted((corpus / "train").iterdir())[:2]
    paths = [str(path) for path in files]
    rows = open_or_pack(paths, DataOptions(control_codes=CODES), longer, 16)
    alone = [
        open_or_pack([path], DataOptions(control_codes=(code,)), longer, 16)
        for path, code in zip(paths, CODES, strict=True)
    ]
    assert np.array_equal(
        rows[np.arange(len(rows))], np.concatenate([part[np.arange(len(part))] for part in alone])
    )
    for part, code, path in zip(alone, CODES, files, strict=True):
        ids = np.concatenate([part[0][:1], *(row[1:] for row in part[np.arange(len(part))])])
        expected = [longer.token_to_id(code), *longer.encode_batch([path.read_text()])[0]]
        assert ids.tolist() == expected[: len(ids)]
    other = open_or_pack(paths[:1], DataOptions(control_codes=CODES[1:]), longer, 16)
    assert (other[0][0], alone[0][0][0]) == (301, 300)
    both, manifest = [part.manifest for part in alone], rows.manifest
    for name in ("words", "text_bytes", "tokens", "documents", "line_ends", "n_rows"):
        assert getattr(manifest, name) == sum(getattr(m, name) for m in both)
    predicted = manifest.n_rows * 16 + manifest.left_over_tokens
    assert manifest.tokens == 1 + predicted  # the manifest's own invariant
    again = open_or_pack(paths, DataOptions(control_codes=CODES), longer, 16)
    assert again.folder == rows.folder and open_rows(rows.folder).manifest == manifest


def test_codes_and_paths_that_do_not_pair_are_an_error(flags, two_texts, corpus, tmp_path):
    with pytest.raises(UserError, match=r"2 --control_codes for 1 path.*each --val_path"):
        train_pt.main(flags("run", *two_texts[:4], corpus / "valid", *two_texts[6:]))


# --- runs ----------------------------------------------------------------------------------------


def test_finetuning_adds_codes_compares_and_continues(flags, two_texts, tmp_path, capsys):
    train_pt.main(flags("base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base" / "checkpoint-00000004")
    start = {"config": None, "tokenizer": None, "checkpoint": tmp_path / "base"}
    before = capsys.readouterr().out
    assert "before" not in before
    train_pt.main(flags("straight", *two_texts, **start))
    table = capsys.readouterr().out
    while train_pt.main(flags("stopped", *two_texts, **start, max_minutes=1e-9)):
        pass
    run = tmp_path / "straight"
    weights = [
        (tmp_path / name / "checkpoint-00000004" / "model.safetensors").read_bytes()
        for name in ("straight", "stopped")
    ]
    assert weights[0] == weights[1]
    tuned = AutoModelForCausalLM.from_pretrained(run / "checkpoint-00000004")
    assert tuned.config.vocab_size == 302 and len(tuned.transformer.wte.weight) == 302
    assert not torch.equal(tuned.transformer.wte.weight[:300], base.transformer.wte.weight)
    assert load_tokenizer(str(run / "checkpoint-00000004")).token_to_id("<|code|>") == 301
    described = json.loads((run / "run.json").read_text())
    stopped = json.loads((tmp_path / "stopped" / "run.json").read_text())
    assert stopped["before"] == described["before"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_loss"] < described["before"]["val_loss"]
    lines = [line.split() for line in table.splitlines()]
    assert ["before", f"{described['before']['val_loss']:.4f}"] in [x[:2] for x in lines]
    assert ["after", "4", "steps", f"{last['val_loss']:.4f}"] in [x[:4] for x in lines]
    # A run that has the codes needs no flag of them to be sampled or trained on.
    capsys.readouterr()
    sample = ["--sample_only", f"--checkpoint={run}", "--control_codes=<|code|>", "--device=cpu"]
    train_pt.main([*sample, "--n_samples=2", "--max_length=9"])
    assert "<|code|>" not in capsys.readouterr().out
    for mode in ("--sample_only", "--eval_only"):
        with pytest.raises(UserError, match=r"<\|new\|>: 1 are new to .*straight.*that it has"):
            train_pt.main([mode, f"--checkpoint={run}", "--control_codes=<|new|>"])
    train_pt.main(flags("next", **start | {"checkpoint": run}, control_codes="<|code|>"))
    again = json.loads((tmp_path / "next" / "run.json").read_text())
    assert again["model"]["vocab_size"] == 302


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old(config_folder, tokenizer, tied):
    from algpt2 import ALGPT2Config, ALGPT2LMHeadModel
    from algpt2.training.trainer_pt import add_embeddings

    config = ALGPT2Config.from_pretrained(config_folder, tie_word_embeddings=tied)
    model = ALGPT2LMHeadModel(config)
    old = model.lm_head.weight.detach().clone()
    add_embeddings(model, 302)
    assert model.config.vocab_size == 302
    assert (model.lm_head.weight is model.transformer.wte.weight) is tied
    assert torch.equal(model.lm_head.weight[:300], old)
    assert torch.equal(model.lm_head.weight[300:], old.mean(0).expand(2, -1))
    assert model(torch.tensor([[301, 0]])).logits.shape == (1, 2, 302)


# --- samples -------------------------------------------------------------------------------------


@pytest.fixture
def model(config_folder):
    from algpt2 import ALGPT2Config, ALGPT2LMHeadModel

    torch.manual_seed(0)
    return ALGPT2LMHeadModel(ALGPT2Config.from_pretrained(config_folder, vocab_size=302)).eval()


def test_a_code_starts_the_sample_and_any_code_ends_it(model, tokenizer):
    longer = tokenizer.with_control_codes(CODES)
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"][0, 0].item()), with_kwargs=True
    )
    options = SampleOptions(prompt="the", do_sample=False, n_samples=1, max_length=12)
    plain = sample_texts(model, longer, options, 0)
    coded = sample_texts(model, longer, options, 0, code="<|wiki|>")
    assert seen[0] == 299 and 300 in seen
    with torch.no_grad():  # the other code becomes the likeliest token everywhere
        model.transformer.ln_f.weight.zero_()
        model.dense.bias.copy_(model.lm_head.weight[301] * 100)
    assert sample_texts(model, longer, options, 0) == ["the"]
    assert all(text.startswith("the") for text in plain + coded)


@pytest.mark.parametrize("n_samples", [1, 3])
def test_what_is_streamed_is_the_text(model, tokenizer, n_samples):
    longer, pieces = tokenizer.with_control_codes(CODES), []
    options = SampleOptions(prompt="über the", n_samples=n_samples, max_length=90, temperature=3.0)
    streamed = sample_texts(model, longer, options, 1, write=pieces.append)
    assert streamed == sample_texts(model, longer, options, 1)
    assert streamed != sample_texts(model, longer, options, 2)
    if n_samples == 1:
        assert "".join(pieces) == streamed[0] and len(pieces) > 5
    else:
        assert pieces == []


def test_a_sample_alone_is_printed_as_it_comes(flags, tmp_path, capsys, monkeypatch):

    train_pt.main(flags())
    shutil.copytree(tmp_path / "run" / "checkpoint-00000004", tmp_path / "alone")
    pieces, write = [], console.write
    monkeypatch.setattr(console, "write", lambda text: (pieces.append(text), write(text)))
    capsys.readouterr()
    sample = [f"--checkpoint={tmp_path / 'alone'}", "--sample_only", "--prompt=the",
              "--device=cpu", "--max_length=20"]  # fmt: skip
    train_pt.main([*sample, "--n_samples=1"])
    printed = capsys.readouterr().out
    assert printed == f"--- sample 1 of 1\n{''.join(pieces)}\n\n"
    assert pieces[0] == "the" and len(pieces) > 2
