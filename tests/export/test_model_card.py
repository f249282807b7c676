"""A checkpoint folder out in the world: without this project, with a card, on the hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig

import huggingface_hub
import pytest
import yaml
from helpers import as_flags

import train_pt
from algpt2.errors import UserError
from algpt2.evaluation import results
from algpt2.export import model_card
from algpt2.options import ReportOptions
from algpt2.runs.checkpoints import newest_checkpoint, read_checkpoint
from algpt2.system.console import markdown_table

EVALUATION = {
    "checkpoint": "runs/run/checkpoint-00000002", "set": "ptb.test", "sha256": "0",
    "text": "as it is", "context": 32, "stride": 32, "precision": "float32",
    "n_eval_examples": None, "details": {},
    "measures": [{"name": "ppl, words", "value": 35.125, "unit": "per word",
                  "over": "82,430 words"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def module_run(corpus, tokenizer_folder, config_folder, tmp_path_factory):
    """Flags of a run of two steps with a checkpoint at each, and its folder."""
    save_dir = tmp_path_factory.mktemp("world") / "run"
    options = {
        "config": config_folder, "tokenizer": tokenizer_folder, "save_dir": save_dir,
        "train_path": corpus / "train", "val_path": corpus / "valid", "seq_len": 16,
        "max_steps": 2, "eval_steps": 1, "device": "cpu",
    }  # fmt: skip
    flags = as_flags(options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALGPT2_CACHE", str(tmp_path_factory.mktemp("cache")))
        train_pt.main(flags)
    return flags, save_dir


@pytest.fixture
def run(module_run):
    return module_run[1]


@pytest.fixture
def no_waiting():
    """A test that waits fails."""

    def fail(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_pipes_are_not_waited_for(run, tmp_path, no_waiting):
    save_dir = shutil.copytree(run, tmp_path / "run")
    folder = save_dir / "checkpoint-00000002"
    card, evaluation = folder / "README.md", save_dir / "evaluation.json"
    card.unlink()
    os.mkfifo(card)
    model_card.write_card(folder, save_dir, 2)
    assert card.is_fifo()  # somebody's
    card.unlink()
    os.mkfifo(evaluation)
    model_card.write_card(folder, save_dir, 2)
    assert card.is_file()
    with pytest.raises(UserError, match=r"evaluation.json is not a file: move it away"):
        results.ResultFiles(save_dir)


ELSEWHERE = """
import importlib.util, json, sys
folder, packages = sys.argv[1:]
sys.path.append(packages)  # without its .pth files: one of them names this project
assert importlib.util.find_spec("algpt2") is None
import torch
code = open(f"{folder}/README.md").read().split("```python\\n")[1].split("```")[0]
exec(code.replace("FOLDER_OR_NAME", folder))  # the card's own lines: model, tokenizer
from transformers import AutoModel, Trainer, TrainingArguments
AutoModel.from_pretrained(folder, trust_remote_code=True)
text = pipeline("text-generation", model=model, tokenizer=tokenizer)(
    "the model", max_new_tokens=5, do_sample=False)[0]["generated_text"]
ids = tokenizer("the model", return_tensors="pt").input_ids
logits = model(ids).logits[0, -1].tolist()
arguments = TrainingArguments("trained", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
rows = [{"input_ids": ids[0], "labels": ids[0]}] * 8
trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
trainer.train()
loss = trainer.evaluate()["eval_loss"]
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
moved = max(float((a - b).abs().max()) for a, b in zip(model.parameters(), again.parameters()))
with torch.no_grad():
    expected = again(ids, labels=ids).loss.item()
print(json.dumps([text, logits, moved, type(model).__module__, loss, expected]))
"""


@pytest.mark.numeric
def test_a_checkpoint_loads_generates_and_trains_without_this_project(run, tmp_path):
    folder = run / "checkpoint-00000002"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ELSEWHERE, str(folder), sysconfig.get_path("purelib")],
        cwd=tmp_path, check=False,
        env=environment | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    # Nothing to answer (run the code? [y/N]), nothing that looks as if weights were missing.
    assert "[y/N]" not in process.stdout and "UNEXPECTED" not in process.stderr
    *facts, loss, expected = json.loads(process.stdout.splitlines()[-1])
    assert loss == pytest.approx(expected, rel=1e-4)
    text, logits, moved, module = facts
    assert text.startswith("the model") and len(text) > len("the model")
    assert module.startswith("transformers_modules.") and moved == 0
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the model", return_tensors="pt").input_ids
    here = AutoModelForCausalLM.from_pretrained(folder)
    assert type(here).__module__ == "algpt2.modeling_algpt2"
    assert tokenizer.model_max_length == here.config.n_positions
    with torch.no_grad():
        assert here(ids).logits[0, -1].tolist() == pytest.approx(logits, rel=1e-5, abs=1e-6)


def card_of(folder):
    text = (folder / "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_the_card_says_what_run_json_and_the_metrics_say(run):
    for step in (1, 2):
        metadata, body = card_of(run / f"checkpoint-{step:08}")
        assert metadata["library_name"] == "transformers" and "algpt2" in metadata["tags"]
        described = json.loads((run / "run.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert f"{described['parameters']:,} parameters" in body
        assert f"| steps | {step} of 2 |" in body
        assert f"| valid, step {step} | loss | {lines[step - 1]['val_loss']:.4f} |" in body
        written = (run / f"checkpoint-{step:08}" / "README.md").read_text()
        model_card.publish_evaluation(run / f"checkpoint-{step:08}", ReportOptions())
        assert (run / f"checkpoint-{step:08}" / "README.md").read_text() == written
        assert str(run.parent) not in body  # cards are public, folders of this machine are not


def test_an_evaluation_gets_into_the_card_and_damages_nothing(run, monkeypatch):
    folder, path = run / "checkpoint-00000002", run / "evaluation.json"
    other = EVALUATION | {"checkpoint": "checkpoint-00000001", "set": "another"}
    path.write_text(json.dumps({"evaluations": [EVALUATION, other]}))
    before = (folder / "README.md").read_text()
    sent = []
    monkeypatch.setattr(model_card, "send_table", lambda *args: sent.append(args))
    model_card.publish_evaluation(folder, ReportOptions())
    text = "ptb.test, as it is, context 32, stride 32, float32"
    cells = [text, "ppl, words", "35.1250", "per word (82,430 words)"]
    columns = ["checkpoint", *model_card.MEASURE_COLUMNS]
    row = [folder.name, *cells[:2], 35.125, cells[3]]
    assert sent == [(run, ReportOptions(), "evaluation", columns, [row], 2)]
    after = (folder / "README.md").read_text()
    assert after == f"{before}| {' | '.join(cells)} |\n"
    short = EVALUATION | {"n_eval_examples": 200, "stride": 8, "precision": "bfloat16"}
    path.write_text(json.dumps({"evaluations": [EVALUATION, short]}))
    texts = [row[0] for row in results.checkpoint_rows(run, folder.name)]
    assert texts == [text, "ptb.test, first 200, as it is, context 32, stride 8, bfloat16"]
    path.unlink()
    read_checkpoint(folder)
    assert newest_checkpoint(run).step == 2


def test_a_card_that_a_person_wrote_stays(run, tmp_path):
    card = run / "checkpoint-00000001" / "README.md"
    card.write_text("mine")
    model_card.publish_evaluation(card.parent, ReportOptions())
    assert card.read_text() == "mine"
    model_card.publish_evaluation(
        tmp_path, ReportOptions()
    )  # no checkpoint of a run: nothing to write
    assert list(tmp_path.iterdir()) == []


class FakeApi:
    """The calls that huggingface_hub would have sent."""

    calls, broken = [], ()

    def __getattr__(self, name):
        def call(*args, **kwargs):
            FakeApi.calls.append((name, args, kwargs))
            if name in FakeApi.broken:
                raise OSError(f"{name}: no\nnetwork")
            if name == "create_repo":
                return huggingface_hub.RepoUrl("https://huggingface.co/me/my-model")

        return call


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    FakeApi.calls, FakeApi.broken = [], ()
    return FakeApi


def test_a_finished_run_is_uploaded_when_asked_and_only_then(hub, module_run, capsys):
    flags, run = module_run
    train_pt.main(flags)
    assert hub.calls == []
    train_pt.main([*flags, "--push_to_hub=me/my-model"])
    (_, (_, repo, made), (_, _, sent)) = hub.calls
    assert repo == ("me/my-model",) and made["private"]
    assert sent["repo_id"] == "me/my-model"
    assert sent["folder_path"] == run / "checkpoint-00000002"
    uploaded = huggingface_hub.utils.filter_repo_objects(
        [path.name for path in sent["folder_path"].iterdir()],
        ignore_patterns=sent["ignore_patterns"],
    )
    assert {"README.md", "model.safetensors", "modeling_algpt2.py"} <= (names := {*uploaded})
    assert not names & {"optimizer.safetensors", "training_state.json"}
    assert "https://huggingface.co/me/my-model" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["whoami", "create_repo", "upload_folder"])
def test_a_hub_that_refuses_is_one_line(hub, module_run, broken):
    hub.broken = (broken,)
    with pytest.raises(UserError, match=rf"me/x.*\({broken}: no network\).*hf auth login"):
        train_pt.main([*module_run[0], "--push_to_hub=me/x"])


def test_the_real_client_offline_says_so_before_any_work(module_run, tmp_path):
    elsewhere = [flag for flag in module_run[0] if not flag.startswith("--save_dir=")]
    new = [*elsewhere, f"--save_dir={tmp_path / 'new'}", "--push_to_hub=me/x"]
    with pytest.raises(UserError, match="hf auth login"):
        train_pt.main(new)
    assert not (tmp_path / "new").exists()


def test_only_an_algpt2_takes_the_code_along(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    model_card.add_model_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_table_cell_with_a_bar_stays_one_cell():
    assert markdown_table([["a"], ["b|c"]]) == "| a |\n| --- |\n| b\\|c |"
