"""train_pt.py as a user runs it: files left behind, continuation, errors, evaluation, samples."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import CHECKPOINT_FILES, RUN_FILES, final_bytes, metrics

import train_pt
from algpt2.errors import EXIT_STOPPED, UserError

ROOT = Path(train_pt.__file__).parent


def test_a_run_leaves_these_files_and_repeating_it_says_done(flags, tmp_path, capsys):
    assert train_pt.main(flags(sample_steps=3, max_length=8)) is None
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == RUN_FILES
    assert sorted(p.name for p in (run / "checkpoint-00000006").iterdir()) == CHECKPOINT_FILES
    assert metrics(run, "step", "tokens") == [[step, step * 64] for step in range(1, 7)]
    assert all(loss and lr is not None for loss, lr in metrics(run, "loss", "lr"))
    evaluated = [step for step, bpb in metrics(run, "step", "val_bpb") if bpb]
    assert evaluated == [3, 6]
    described = json.loads((run / "run.json").read_text())
    assert described["parameters"] == 300 * 16 + 32 * 16 + 1072 + 12_704 + 64
    assert described["options"]["optim"]["lr"] == 1e-2
    capsys.readouterr()
    before = final_bytes(run)
    assert train_pt.main(flags(sample_steps=3, max_length=8)) is None
    assert "already done" in capsys.readouterr().out
    assert final_bytes(run) == before


@pytest.mark.numeric
def test_stopped_at_every_step_ends_with_the_same_bytes(flags, tmp_path):
    train_pt.main(flags("straight"))
    restarts = 0
    while train_pt.main(flags("stopped", max_minutes=1e-9)) == EXIT_STOPPED:
        restarts += 1
    assert restarts == 7  # at each step, and between the steps 3 and 6 and their evaluations
    assert final_bytes(tmp_path / "straight") == final_bytes(tmp_path / "stopped")
    names = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")
    assert metrics(tmp_path / "straight", *names) == metrics(tmp_path / "stopped", *names)


@pytest.mark.numeric
@pytest.mark.parametrize("optimizer", ["Adafactor", "Muon", "SGD"])
def test_other_optimizers_continue_exactly(flags, tmp_path, optimizer):
    train_pt.main(flags("straight", optimizer=optimizer))
    while train_pt.main(flags("stopped", optimizer=optimizer, max_minutes=1e-9)) == EXIT_STOPPED:
        pass
    assert final_bytes(tmp_path / "straight") == final_bytes(tmp_path / "stopped")


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(flags, tmp_path, capsys):
    train_pt.main(flags())
    before = final_bytes(tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint-00000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    assert train_pt.main(flags()) is None
    printed = capsys.readouterr().out
    assert "model.safetensors is damaged" in printed
    assert "continuing at step 3" in printed
    assert final_bytes(tmp_path / "run") == before
    assert [step for (step,) in metrics(tmp_path / "run", "step")] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_run_is_refused_and_stays(flags, tmp_path):
    train_pt.main(flags())
    train_pt.main(flags("other", lr=2e-2))
    mine, other = (tmp_path / name / "checkpoint-00000006" for name in ("run", "other"))
    before = final_bytes(tmp_path / "run")
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    with pytest.raises(
        UserError, match=r"checkpoint-00000006 is of another run \(lr: 0.02 -> 0.01"
    ):
        train_pt.main(flags())
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "other")
    shutil.rmtree(mine)
    assert train_pt.main(flags()) is None
    assert final_bytes(tmp_path / "run") == before


def test_a_line_cut_by_a_crash_is_written_again(flags, tmp_path):
    train_pt.main(flags(max_minutes=1e-9))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "loss"')
    train_pt.main(flags())
    assert [step for (step,) in metrics(tmp_path / "run", "step")] == [1, 2, 3, 4, 5, 6]


def test_options_of_the_run_may_not_change_but_reports_may(flags, tmp_path):
    train_pt.main(flags())
    before = final_bytes(tmp_path / "run")
    with pytest.raises(UserError, match=r"another run \(lr: 0.01 -> 0.02\).*--overwrite"):
        train_pt.main(flags(lr=2e-2))
    train_pt.main(flags(logging_steps=2, max_minutes=5))
    assert final_bytes(tmp_path / "run") == before
    train_pt.main([*flags(lr=2e-2), "--overwrite"])
    assert final_bytes(tmp_path / "run") != before


@pytest.mark.numeric
def test_shards_and_text_are_the_same_input(flags, corpus, tokenizer_folder, tmp_path):
    import make_tfrecords

    for split in ("train", "valid"):
        make_tfrecords.main([
            f"--path={corpus / split}", f"--save_path={tmp_path / split}", "--seq_len=16",
            f"--tokenizer={tokenizer_folder}",
        ])  # fmt: skip
    train_pt.main(flags("text"))
    shards = {"train_path": tmp_path / "train", "val_path": tmp_path / "valid", "seq_len": None}
    train_pt.main(flags("shards", **shards))
    assert final_bytes(tmp_path / "text") == final_bytes(tmp_path / "shards")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "gpt5"}, "unknown config 'gpt5'.*algpt2-tiny"),
        ({"optimizer": "Adam"}, "invalid choice 'Adam'.*AdamW"),
        ({"config": "algpt2"}, "tokenizer has 300 entries and the model 50,257"),
        ({"seq_len": 64}, "rows of 64 tokens do not fit the model's 32 positions"),
        ({"train_path": "no/such/folder"}, "no/such/folder"),
        ({"lr": "fast"}, "--lr"),
        ({"batch_size": 0}, "above zero, got --batch_size 0"),
        ({"checkpoint": "no-such-model", "config": None, "tokenizer": None}, "no-such-model"),
        ({"device": "cuda:99"}, "cuda:99 is not usable"),
    ],
)
def test_bad_input_is_a_user_error_and_leaves_nothing(flags, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_pt.main(flags(**changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: expected a number from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected"),
        ({"RANK": "-1"}, "RANK=-1: expected a number from 0 on"),
        ({"RANK": "1"}, "RANK=1: expected a number below WORLD_SIZE=1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: expected a number below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: .*start several processes with torchrun"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_a_user_error(
    flags, monkeypatch, environment, message
):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        train_pt.main(flags())


def test_shards_of_another_tokenizer_or_length_are_refused(flags, corpus, tmp_path):
    import make_tfrecords
    from algpt2 import tokenization_algpt2
    from algpt2.corpus.documents import documents

    texts = documents(str(corpus / "valid"))
    tokenization_algpt2.save(tokenization_algpt2.train(texts, vocab_size=300), tmp_path / "other")
    make_tfrecords.main([
        f"--path={corpus / 'train'}", f"--save_path={tmp_path / 'shards'}", "--seq_len=16",
        f"--tokenizer={tmp_path / 'other'}",
    ])  # fmt: skip
    with pytest.raises(UserError, match="packed with another tokenizer"):
        train_pt.main(flags(train_path=tmp_path / "shards"))
    with pytest.raises(UserError, match="rows of 16 tokens, expected 32"):
        train_pt.main(
            flags(train_path=tmp_path / "shards", seq_len=32, tokenizer=tmp_path / "other")
        )


def test_a_text_too_short_for_a_row_is_refused(flags, tmp_path):
    (tmp_path / "short.txt").write_text("one two")
    with pytest.raises(UserError, match="row"):
        train_pt.main(flags(train_path=tmp_path / "short.txt"))


def test_a_folder_with_other_files_is_not_written_to(flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
            train_pt.main([*flags(), *more])
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_a_full_disk_keeps_what_was_complete(flags, tmp_path, monkeypatch):
    from algpt2.training.trainer_pt import Trainer

    train_pt.main(flags(max_minutes=1e-9))
    with monkeypatch.context() as patch:

        def full(*args):
            raise OSError(28, "No space left on device", "optimizer.safetensors")

        patch.setattr(Trainer, "save_tensors", staticmethod(full))
        with pytest.raises(OSError, match="No space left"):
            train_pt.main(flags())
    assert [p.name for p in sorted((tmp_path / "run").glob("*check*"))] == ["checkpoint-00000001"]
    train_pt.main(flags())
    train_pt.main(flags("straight"))
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "straight")


def test_a_run_in_use_is_refused(flags, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use"):
            train_pt.main(flags())


@pytest.mark.numeric
def test_evaluation_and_samples_of_a_run(flags, corpus, tmp_path, capsys):
    train_pt.main(flags())
    run = tmp_path / "run"
    common = [f"--checkpoint={run}", "--device=cpu"]
    train_pt.main([*common, "--eval_only", f"--val_path={corpus / 'valid'}", "--seq_len=16",
                   "--compressors"])  # fmt: skip
    assert re.search(r"gzip -9 .*\n.*xz -9e", capsys.readouterr().out)
    (result,) = json.loads((run / "evaluation.json").read_text())["evaluations"]
    last = [loss for (loss,) in metrics(run, "val_loss")][-1]
    assert result["measures"][0]["value"] == pytest.approx(last, rel=1e-6)
    words = " ".join(path.read_text() for path in (corpus / "valid").iterdir())
    line_ends = sum(path.read_text().count("\n") for path in (corpus / "valid").iterdir())
    assert result["details"]["words"] == len(words.split()) + line_ends
    sample = [*common, "--sample_only", "--prompt=the model", "--n_samples=2", "--max_length=100"]
    train_pt.main(sample)
    first = capsys.readouterr().out
    train_pt.main(sample)
    assert capsys.readouterr().out == first  # seeded
    assert first.count("the model") >= 2
    train_pt.main([*sample, "--seed=1"])
    assert capsys.readouterr().out != first


def test_sampling_slides_past_the_context(config_folder, tokenizer_folder):
    from algpt2 import ALGPT2Config, ALGPT2LMHeadModel
    from algpt2.evaluation.sampling_pt import sample_tokens
    from algpt2.options import SampleOptions
    from algpt2.tokenization_algpt2 import load_tokenizer

    torch.manual_seed(0)
    model = ALGPT2LMHeadModel(ALGPT2Config.from_pretrained(config_folder)).eval()
    model.lm_head.weight.data[299] = 0  # tied: an end-of-text that is not likely
    tokenizer = load_tokenizer(str(tokenizer_folder))
    options = SampleOptions(prompt="the", do_sample=False, n_samples=1, max_length=80)
    (tokens,) = sample_tokens(model, tokenizer, options, tokenizer.eot_id)
    assert len(tokens) == 80
    # Greedy tokens within the first context are those of the bare model.
    text = [299, *tokens[:31]]
    with torch.no_grad():
        best = model(torch.tensor([text])).logits[0].argmax(-1).tolist()
    n_prompt = 1 + len(tokenizer.encode_batch(["the"])[0])
    assert best[n_prompt - 1 : 31] == text[n_prompt:]


@pytest.mark.numeric
def test_finetuning_starts_from_the_weights_of_a_checkpoint(flags, tmp_path):
    train_pt.main(flags("first"))
    checkpoint = {"config": None, "tokenizer": None, "checkpoint": tmp_path / "first"}
    train_pt.main(flags("second", lr=1e-9, max_steps=1, **checkpoint))
    before = metrics(tmp_path / "first", "val_loss")[-1][0]
    assert metrics(tmp_path / "second", "val_loss")[-1][0] == pytest.approx(before, rel=1e-4)


def run_script(command, **kwargs):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, cwd=ROOT, **kwargs,
    )  # fmt: skip


@pytest.mark.numeric
def test_two_processes_give_the_losses_of_one(flags, tmp_path, config_folder):
    config = json.loads((config_folder / "config.json").read_text())
    config |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    folder = tmp_path / "no-dropout"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    train_pt.main(flags("one", config=folder, grad_steps=2))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = run_script([*torchrun, "train_pt.py", *flags("two", config=folder, grad_steps=2)])
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    names = ("step", "loss", "grad_norm", "lr")
    one, two = (metrics(tmp_path / name, *names) for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert [x for (x,) in metrics(tmp_path / "two", "val_loss") if x] == pytest.approx(
        [x for (x,) in metrics(tmp_path / "one", "val_loss") if x], rel=1e-5
    )


def test_sigterm_saves_and_exits_with_the_documented_code(flags, tmp_path):
    long = flags(max_steps=100_000, eval_steps=100_000)
    process = run_script(["train_pt.py", *long])
    path = tmp_path / "run" / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") > 3):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    step = int(re.search(r"stopped at step (\d+)", printed)[1])
    assert (tmp_path / "run" / f"checkpoint-{step:08}" / "training_state.json").exists()


def test_a_user_error_is_one_line_and_exit_code_2(flags):
    process = run_script(["train_pt.py", *flags(config="gpt5")])
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert printed.startswith("error: unknown config 'gpt5'") and printed.count("\n") == 1
