"""train_tf.py as a user runs it, and against train_pt.py, which runs in a process of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import CHECKPOINT_FILES, RUN_FILES, as_flags, final_bytes, metrics
from safetensors.numpy import load_file

import train_tf
from algpt2.configuration_algpt2 import ALGPT2Config
from algpt2.errors import EXIT_STOPPED, UserError
from algpt2.modeling_tf_algpt2 import TFALGPT2LMHeadModel
from algpt2.options import PackOptions
from algpt2.shards.packing import pack
from algpt2.system import console
from algpt2.tokenization_algpt2 import load_tokenizer
from algpt2.training import trainer_tf

ROOT = Path(train_tf.__file__).parent
STEPS = {"AdamW": 50, "SGD": 12, "Muon": 12, "Adafactor": 12}


def run_pytorch(code, *arguments):
    """Python code in a process of its own: only there may PyTorch train."""
    subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


# --- the two frameworks --------------------------------------------------------------------------

TRAIN = "import json, sys, train_pt\nfor flags in json.loads(sys.argv[-1]): train_pt.main(flags)"
INITIAL = """
import sys, torch
from algpt2 import ALGPT2Config, ALGPT2LMHeadModel
from algpt2.tokenization_algpt2 import load_tokenizer
torch.manual_seed(5)
rates = dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)
config = ALGPT2Config.from_pretrained(sys.argv[1], **rates)
ALGPT2LMHeadModel(config).save_pretrained(sys.argv[3])
load_tokenizer(sys.argv[2]).save(sys.argv[3])
"""


@pytest.fixture(scope="module")
def frameworks(corpus, config_folder, tokenizer_folder, tmp_path_factory):
    """Runs of both from the same weights, and the second half of each by the other framework."""
    folder = tmp_path_factory.mktemp("frameworks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALGPT2_CACHE", str(folder / "cache"))

        def flags(kind, optimizer):
            half = STEPS[optimizer] // 2
            return as_flags({
                "checkpoint": folder / "initial", "train_path": corpus / "train", "seq_len": 16,
                "val_path": corpus / "valid", "optimizer": optimizer, "batch_size": 4,
                "grad_steps": 2, "lr": 0.3 if optimizer == "SGD" else 1e-2, "warmup_steps": 3,
                "lr_schedule": "cosine", "max_steps": STEPS[optimizer], "save_steps": half,
                "eval_steps": half, "logging_steps": 1, "device": "cpu",
                "save_dir": folder / f"{kind}-{optimizer}",
            })  # fmt: skip

        run_pytorch(
            INITIAL + TRAIN, config_folder, tokenizer_folder, folder / "initial",
            json.dumps([flags("pt", optimizer) for optimizer in STEPS]),
        )  # fmt: skip
        for optimizer in STEPS:
            train_tf.main(flags("tf", optimizer))
        for optimizer, n_steps in STEPS.items():
            for a, b in (("pt", "tf"), ("tf", "pt")):
                run = folder / f"{a}-then-{b}-{optimizer}"
                shutil.copytree(folder / f"{a}-{optimizer}", run)
                shutil.rmtree(run / f"checkpoint-{n_steps:08}")
                # save_dir is not an option of the run: it may be moved.
            train_tf.main(flags("pt-then-tf", optimizer))
        run_pytorch(TRAIN, json.dumps([flags("tf-then-pt", optimizer) for optimizer in STEPS]))
    return folder


@pytest.mark.numeric
@pytest.mark.parametrize("optimizer", STEPS)
@pytest.mark.parametrize("kind", ["tf", "pt-then-tf", "tf-then-pt"])
def test_losses_are_those_of_pytorch(frameworks, kind, optimizer):
    names = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "val_word_ppl", "val_bpb")
    expected = metrics(frameworks / f"pt-{optimizer}", *names)
    found = metrics(frameworks / f"{kind}-{optimizer}", *names)
    assert len(found) == STEPS[optimizer]
    losses = [[line[2] for line in lines] for lines in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=5e-5)
    for a, b in zip(found, expected, strict=True):
        pairs = [pair for pair in zip(a, b, strict=True) if pair != (None, None)]
        assert [x for x, _ in pairs] == pytest.approx([y for _, y in pairs], rel=2e-3)


@pytest.mark.parametrize("optimizer", STEPS)
def test_the_optimizer_state_has_pytorchs_names_and_shapes(frameworks, optimizer):
    shapes = [
        {
            name: (array.shape, array.dtype)
            for name, array in load_file(
                frameworks / f"{kind}-{optimizer}" / f"checkpoint-{STEPS[optimizer]:08}"
                / "optimizer.safetensors"
            ).items()
            if not name.endswith("/RMS")  # Adafactor's note for its next learning rate
        }
        for kind in ("tf", "pt")
    ]  # fmt: skip
    assert shapes[0] == shapes[1]


SAMPLE = """
import json, sys
from transformers import AutoModelForCausalLM
import algpt2
from algpt2.options import SampleOptions
from algpt2.evaluation.sampling_pt import sample_tokens
from algpt2.tokenization_algpt2 import load_tokenizer
algpt2.register()
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), load_tokenizer(sys.argv[1])
found = [sample_tokens(model, tokenizer, SampleOptions(**o)) for o in json.loads(sys.argv[2])]
open(sys.argv[3], "w").write(json.dumps(found))
"""  # noqa: E501


@pytest.mark.numeric
def test_greedy_tokens_are_those_of_pytorch_past_the_context_too(frameworks, tmp_path):
    from algpt2.evaluation.sampling_tf import sample_tokens
    from algpt2.modeling_tf_algpt2 import TFALGPT2LMHeadModel
    from algpt2.options import SampleOptions
    from algpt2.tokenization_algpt2 import load_tokenizer

    folder = frameworks / "pt-AdamW" / "checkpoint-00000050"
    options = [
        {"prompt": "the", "do_sample": False, "n_samples": 2, "max_length": 80, **more}
        for more in ({}, {"repetition_penalty": 1.3, "sliding_window_size": 10})
    ]
    run_pytorch(SAMPLE, folder, json.dumps(options), tmp_path / "tokens.json")
    expected = json.loads((tmp_path / "tokens.json").read_text())
    model, tokenizer = TFALGPT2LMHeadModel.from_pretrained(folder), load_tokenizer(str(folder))
    found = [sample_tokens(model, tokenizer, SampleOptions(**o)) for o in options]
    assert found == expected
    assert max(len(row) for rows in found for row in rows) > 32


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_leaves_these_files_and_repeating_it_says_done(flags, tmp_path, capsys):
    assert train_tf.main(flags(sample_steps=3, max_length=8)) is None
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == RUN_FILES
    assert sorted(p.name for p in (run / "checkpoint-00000006").iterdir()) == CHECKPOINT_FILES
    assert metrics(run, "step", "tokens") == [[step, step * 64] for step in range(1, 7)]
    assert [step for step, bpb in metrics(run, "step", "val_bpb") if bpb] == [3, 6]
    before = final_bytes(run)
    capsys.readouterr()
    assert train_tf.main(flags(sample_steps=3, max_length=8)) is None
    assert "already done" in capsys.readouterr().out
    assert final_bytes(run) == before


@pytest.mark.numeric
@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor"])
def test_stopped_and_continued_ends_with_the_same_bytes(flags, tmp_path, optimizer):
    few = {"optimizer": optimizer, "max_steps": 3, "eval_steps": 2}
    train_tf.main(flags("straight", **few))
    restarts = 0
    while train_tf.main(flags("stopped", **few, max_minutes=1e-9)) == EXIT_STOPPED:
        restarts += 1
    assert restarts == 4  # after each step, and before the evaluations of steps 2 and 3
    assert final_bytes(tmp_path / "straight", 3) == final_bytes(tmp_path / "stopped", 3)
    names = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")
    assert metrics(tmp_path / "straight", *names) == metrics(tmp_path / "stopped", *names)


@pytest.mark.numeric
def test_several_steps_a_call_stop_at_every_report(flags, tmp_path):
    train_tf.main(flags("one"))
    train_tf.main(flags("four", steps_per_call=4, logging_steps=2))
    found = {step: loss for step, loss in metrics(tmp_path / "four", "step", "loss")}
    expected = {step: loss for step, loss in metrics(tmp_path / "one", "step", "loss")}
    assert [*found] == [2, 3, 4, 6]
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-5)


@pytest.mark.numeric
def test_evaluation_and_samples_of_a_run(flags, corpus, tmp_path, capsys):
    train_tf.main(flags(max_steps=3))
    run = tmp_path / "run"
    common = [f"--checkpoint={run}", "--device=cpu"]
    train_tf.main([*common, "--eval_only", f"--val_path={corpus / 'valid'}", "--seq_len=16"])
    (result,) = json.loads((run / "evaluation.json").read_text())["evaluations"]
    last = metrics(run, "val_loss")[-1][0]
    assert result["measures"][0]["value"] == pytest.approx(last, rel=1e-6)
    sample = [*common, "--sample_only", "--prompt=the model", "--n_samples=2", "--max_length=50"]
    capsys.readouterr()
    train_tf.main(sample)
    first = capsys.readouterr().out
    train_tf.main(sample)
    assert capsys.readouterr().out == first  # seeded
    assert first.count("the model") >= 2
    train_tf.main([*sample, "--seed=1"])
    assert capsys.readouterr().out != first


def test_shards_of_longer_rows_than_the_model_are_not_evaluated(
    frameworks, corpus, tokenizer_folder, tmp_path
):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    paths = (str(corpus / "valid"),), str(tmp_path / "long")
    pack(PackOptions(*paths, seq_len=64, workers=1), tokenizer)
    run = f"--checkpoint={frameworks / 'pt-AdamW'}"
    with pytest.raises(UserError, match="rows of 64 tokens do not fit the model's 32 positions"):
        train_tf.main(["--eval_only", run, f"--val_path={tmp_path / 'long'}", "--device=cpu"])


def test_one_sample_is_printed_as_it_comes(frameworks, monkeypatch, capsys):
    pieces, write = [], console.write
    monkeypatch.setattr(console, "write", lambda piece: (pieces.append(piece), write(piece)))
    common = [f"--checkpoint={frameworks / 'pt-AdamW'}", "--device=cpu", "--sample_only"]
    train_tf.main([*common, "--prompt=the", "--n_samples=1", "--max_length=50"])
    printed = capsys.readouterr().out
    assert len(pieces) > 20
    assert f"--- sample 1 of 1\n{''.join(pieces)}\n" in printed
    # The first of two that draw alike, and not while it comes.
    monkeypatch.setattr(console, "write", None)
    train_tf.main([*common, "--prompt=the", "--n_samples=2", "--max_length=50", "--no_do_sample"])
    texts = capsys.readouterr().out.split("--- sample ")[1:]
    assert texts[0][6:].strip() == texts[1][6:].strip()


@pytest.mark.numeric
def test_finetuning_says_what_was_before_and_after(frameworks, flags, tmp_path, capsys):
    start = frameworks / "pt-AdamW"
    more = {"config": None, "tokenizer": None, "checkpoint": start, "max_steps": 3}
    train_tf.main([*flags(**more), "--wandb_artifacts"])
    printed = capsys.readouterr().out
    before = json.loads((tmp_path / "run" / "run.json").read_text())["before"]
    (last,) = metrics(start, "val_loss", "val_word_ppl")[-1:]
    assert [before["val_loss"], before["val_word_ppl"]] == pytest.approx(last, rel=1e-5)
    (after,) = metrics(tmp_path / "run", "val_loss")[-1]
    assert re.search(rf"before +{before['val_loss']:.4f} .*\nafter 3 steps +{after:.4f} ", printed)
    assert "--wandb_artifacts has no effect without W&B" in printed
    train_tf.main([*flags(**more), "--wandb_artifacts"])
    assert "after 3 steps" in capsys.readouterr().out


@pytest.mark.numeric
def test_finetuning_adds_codes_and_continues(frameworks, flags, corpus, tmp_path, capsys):
    start = frameworks / "pt-AdamW"
    texts = [sorted((corpus / split).iterdir())[:2] for split in ("train", "valid")]
    more = {"config": None, "tokenizer": None, "checkpoint": start, "max_steps": 4}
    more |= {"train_path": None, "val_path": None, "eval_steps": 2}

    def command(save_dir, **changes):
        paths = ["--train_path", *texts[0], "--val_path", *texts[1]]
        codes = ["--control_codes", "<|wiki|>", "<|code|>"]
        return [*flags(save_dir, **more | changes), *map(str, paths), *codes]

    train_tf.main(command("straight"))
    while train_tf.main(command("stopped", max_minutes=1e-9)):
        pass
    assert final_bytes(tmp_path / "straight", 4) == final_bytes(tmp_path / "stopped", 4)
    folder = tmp_path / "straight" / "checkpoint-00000004"
    assert load_file(folder / "model.safetensors")["transformer.wte.weight"].shape[0] == 302
    assert load_tokenizer(str(folder)).token_to_id("<|code|>") == 301
    capsys.readouterr()
    sample = ["--sample_only", f"--checkpoint={folder}", "--device=cpu", "--max_length=9"]
    train_tf.main([*sample, "--control_codes=<|code|>"])
    assert "<|code|>" not in capsys.readouterr().out
    for mode in ("--sample_only", "--eval_only"):
        with pytest.raises(UserError, match=r"<\|new\|>: 1 are new to .*straight.*that it has"):
            train_tf.main([mode, f"--checkpoint={folder}", "--control_codes=<|new|>"])


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old(config_folder, tied):
    config = ALGPT2Config.from_pretrained(config_folder, tie_word_embeddings=tied)
    model = TFALGPT2LMHeadModel(config, seed=1)
    old = model.state_dict()
    larger = trainer_tf.add_embeddings(model, 302, "float32")
    assert larger.config.vocab_size == 302 and (larger.lm_head is None) is tied
    for name, value in larger.state_dict().items():
        assert np.array_equal(value[: len(old[name])], old[name])
        if added := value[len(old[name]) :].numpy().tolist():
            assert added == [pytest.approx(old[name].numpy().mean(0), abs=1e-6)] * 2
    grown = {name for name, value in larger.state_dict().items() if len(value) > len(old[name])}
    assert grown == {"transformer.wte.weight"} | ({"lm_head.weight"} if not tied else set())


def test_what_only_pytorch_can_start_is_refused(frameworks, flags):
    with pytest.raises(UserError, match=r"--init_from needs PyTorch: start with train_pt\.py"):
        train_tf.main(flags(init_from=frameworks / "initial"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "gpt5"}, "unknown config 'gpt5'.*algpt2-tiny"),
        ({"config": "algpt2"}, "tokenizer has 300 entries and the model 50,257"),
        ({"seq_len": 64}, "rows of 64 tokens do not fit the model's 32 positions"),
        ({"device": "mps"}, "--device mps is not usable.*expected auto or cpu"),
        ({"precision": "fp16"}, "fp16 needs PyTorch.*bf16"),
        ({"steps_per_call": 0}, "above zero, got --steps_per_call 0"),
    ],
)
def test_bad_input_is_a_user_error_and_leaves_nothing(flags, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_tf.main(flags(**changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_kind_of_model_is_refused(flags, tmp_path):
    (tmp_path / "llama").mkdir()
    config = {"model_type": "llama", "vocab_size": 300, "n_positions": 32}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot load a GPT-2 or ALGPT2.*got 'llama'"):
        train_tf.main(flags(config=None, checkpoint=tmp_path / "llama"))


@pytest.mark.numeric
def test_devices_share_the_batch(frameworks, tmp_path):
    """In a process of its own: logical devices exist from the start of TensorFlow on."""
    run = json.loads((frameworks / "tf-AdamW" / "run.json").read_text())
    options = run["options"]["data"] | run["options"]["optim"]
    more = {"checkpoint": frameworks / "initial", "save_dir": tmp_path / "run", "logging_steps": 1}
    cut = {name: options[name] for name in ("seq_len", "lr", "lr_schedule", "warmup_steps")}
    paths = {name: options[name][0] for name in ("train_path", "val_path")}
    flags = as_flags(cut | paths | more | {"grad_steps": 2, "max_steps": 50, "eval_steps": 50})
    flags += ["--device=cpu", "--n_devices=2", "--steps_per_call=25", "--max_minutes=1e-9"]
    process = subprocess.run(
        [sys.executable, "train_tf.py", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == EXIT_STOPPED, process.stderr
    (line,) = metrics(tmp_path / "run", "step", "loss", "grad_norm")
    (expected,) = metrics(frameworks / "tf-AdamW", "step", "loss", "grad_norm")[:1]
    assert line == pytest.approx(expected, rel=1e-5)


def test_sigterm_saves_and_exits_with_the_documented_code(flags, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "train_tf.py", *flags(max_steps=100_000, eval_steps=100_000)], cwd=ROOT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    path = tmp_path / "run" / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    step = int(re.search(r"stopped at step (\d+)", printed)[1])
    assert (tmp_path / "run" / f"checkpoint-{step:08}" / "training_state.json").exists()
