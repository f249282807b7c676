"""benchmarks/quality.py: rows, the sweep, a run that stops and goes on, what is on trial."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from transformers import AutoModelForCausalLM

from algpt2 import ALGPT2Config, ALGPT2LMHeadModel
from benchmarks import quality, quality_models, quality_rows

ROOT = Path(__file__).resolve().parent.parent

SIZES = {
    "vocab_size": 60, "n_positions": 16, "n_embd": 16, "n_layer": 6, "n_head": 2,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
SHARED = {"num_hidden_groups": 1}
MIDDLE = quality_rows.mapped(quality_rows.middle(1, 2, 1, layers=6))
IDS = torch.arange(2 * 16).view(2, 16) * 7 % 60

# --- layer maps and sweeps -----------------------------------------------------------------------


def test_layer_maps_are_those_of_the_papers():
    assert quality_rows.sequence(3, 6) == [0, 0, 1, 1, 2, 2]
    assert quality_rows.cycle(3, 6) == [0, 1, 2, 0, 1, 2]
    assert quality_rows.cycle_rev(3, 6) == [0, 1, 2, 2, 1, 0]
    assert quality_rows.sandwich(1, 2, 1, 6) == [0, 1, 1, 2, 2, 3]
    assert quality_rows.middle(1, 2, 1, 6) == [0, 1, 2, 1, 2, 3]


@pytest.mark.parametrize("scale", quality_rows.SCALES)
def test_every_row_is_a_configuration(scale):
    sizes = quality_rows.SCALES[scale]
    for row in quality_rows.rows(sizes).values():
        keys = sizes.config() | row.config
        kind = quality_models.TrialConfig if "trial" in keys["model_type"] else ALGPT2Config
        kind.from_dict(keys).check()


def test_a_sweep_ends_when_the_best_rate_has_a_worse_one_on_either_side():
    rates = []
    loss = {2**k: abs(k - 3) for k in range(-2, 8)}  # best at 8, the start is 1
    while new := quality.next_rates({lr: loss[lr] for lr in rates}, 1):
        rates.append(new[0])
    assert rates == [1, 2, 4, 8, 16]
    assert quality.next_rates({1: math.inf, 2: math.inf, 0.5: 4.0}, 1) == [0.25]


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    """The command line of a scale of seconds on a few hundred documents."""
    draw = random.Random(0)
    for split, count in (("train", 300), ("validation", 20)):
        texts = [" ".join(draw.choice(WORDS) for _ in range(60)) for _ in range(count)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    flags = ["--scale=tiny", f"--runs_dir={tmp_path}/runs", f"--committed={tmp_path}/committed"]
    return lambda command, *more: quality.main([command, *more, *flags])


def test_a_run_goes_on_where_it_stopped_and_is_collected_tabulated_and_drawn(
    study, tmp_path, capfd
):
    name = "shared-lr0.03-seed42"
    run, data = ["run", "shared", "--lr=0.03"], f"--data_dir={tmp_path}"
    folder, committed = (tmp_path / x / "tiny" / name for x in ("runs", "committed"))
    study(*run, data, "--max_minutes=0.0001")  # each start takes one step
    assert quality.read_result(folder) is None
    assert study(*run, data) is None
    log = folder.with_name(f"{name}.log").read_text()
    assert "stopped at step 1" in log and "continuing at step 1" in log
    result = quality.read_result(folder)

    study("collect")
    assert quality.read_result(committed) == result
    texts = [path.read_text() for path in committed.iterdir()]
    assert not [text for text in texts if str(tmp_path) in text or str(ROOT) in text]
    shutil.rmtree(tmp_path / "runs" / "tiny" / name)
    capfd.readouterr()
    study(*run, data)  # a committed run is done on any machine
    assert capfd.readouterr().out == ""

    study("table")
    row = capfd.readouterr().out.splitlines()[-1]
    assert row.startswith("shared") and f"{result['val_loss']:.4f}" in row
    study("figure", f"--out={tmp_path}/frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def finish(folder, name, loss):
    """A finished run of one line."""
    (folder / "tiny" / name).mkdir(parents=True)
    run = {"steps": 5, "parameters": 7, "virtual_parameters": 9, "flops_per_token": 3}
    (folder / "tiny" / name / "run.json").write_text(json.dumps(run))
    line = {"step": 5, "tokens": 10, "val_loss": loss, "val_bpb": loss / 2, "tokens_per_s": 1.0}
    (folder / "tiny" / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_seeds_come_when_the_sweep_is_over_and_pupils_when_the_teacher_is_here(tmp_path):
    runs, committed = tmp_path / "runs", tmp_path / "committed"

    def queue(*names):
        options = quality.Options(
            "run", names, scale="tiny", runs_dir=str(runs), committed=str(committed)
        )
        study = quality.Study(options)
        return [run.name for run in study.queue(study.results())]

    sweep = [f"unshared-lr{lr}-seed42" for lr in ("0.004", "0.008", "0.002")]
    assert queue("unshared", "shared-distilled") == sweep
    for name, loss in zip(sweep, (3.0, 3.5, 3.25), strict=True):
        finish(committed, name, loss)
    seeds = ["unshared-lr0.004-seed43", "unshared-lr0.004-seed44"]
    assert queue("unshared") == seeds
    assert queue("unshared", "shared")[-2:] == seeds  # after every sweep
    assert queue("shared-distilled") == []  # the teacher's weights are not on this machine
    finish(runs, sweep[0], 3.0)
    assert queue("shared-distilled")[0] == "shared-distilled-lr0.004-seed42"


def test_a_row_is_summed_up_by_its_best_rate_and_the_range_of_its_seeds(tmp_path):
    for name, loss in (("lr0.004-seed42", 3.0), ("lr0.008-seed42", 3.5), ("lr0.004-seed43", 3.25)):
        finish(tmp_path, f"shared-{name}", loss)
    study = quality.Study(quality.Options("table", scale="tiny", committed=str(tmp_path)))
    row = quality.summarize(study.results(study.committed), study.rows)["shared"]
    assert (row["val_loss"], row["spread"], row["lr"], row["seeds"]) == (3.125, 0.25, 0.004, 2)
    assert row["losses"] == {0.004: 3.0, 0.008: 3.5}
    assert "3.1250" in study.table()


def test_a_run_that_diverged_is_a_result(tmp_path):
    folder = tmp_path / "shared-lr1-seed42"
    folder.mkdir()
    (folder / "run.json").write_text('{"parameters": 5, "steps": 10}')
    assert quality.read_result(folder) is None
    (folder / "diverged").touch()
    assert quality.read_result(folder)["val_loss"] == math.inf


def test_thinned_metrics_keep_every_evaluation():
    lines = [{"step": step} | ({"val_loss": 1.0} if step % 50 == 0 else {}) for step in range(401)]
    kept = quality.thinned(lines)
    assert len(kept) <= 2 + quality.LINES
    assert [x for x in kept if "val_loss" in x] == [x for x in lines if "val_loss" in x]


# --- what is on trial ----------------------------------------------------------------------------


def trial(**keys):
    torch.manual_seed(0)
    return quality_models.TrialLMHeadModel(quality_models.TrialConfig(**SIZES, **keys)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


IDENTITIES = {
    "nothing": {},
    "scales": {"own": ["scales"]},
    "norms and biases": {"own": ["norms", "biases"]},
    "layer embedding": {"layer_embedding": True},
    "input again": {"reinject": True},
    "two streams": {"streams": 2},
    "four streams": {"streams": 4},
    "lora": {"lora_rank": 2},
    "all": {"own": ["norms", "biases", "scales"], "layer_embedding": True, "reinject": True,
            "streams": 2, "lora_rank": 2},
}  # fmt: skip


@pytest.mark.numeric
@pytest.mark.parametrize("shape", [SHARED, MIDDLE], ids=["shared", "middle"])
@pytest.mark.parametrize("name", IDENTITIES)
def test_what_is_on_trial_starts_as_the_shared_model(name, shape):
    model = trial(**shape, **IDENTITIES[name])
    plain = ALGPT2LMHeadModel(ALGPT2Config(**SIZES, **shape)).eval()
    weights = {key.replace(".shared.", "."): x for key, x in model.state_dict().items()}
    found = plain.load_state_dict({**plain.state_dict(), **{
        key: x for key, x in weights.items() if key in plain.state_dict()
    }})  # fmt: skip
    assert not found.missing_keys
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in IDENTITIES if name != "nothing"])
def test_what_is_on_trial_learns_and_tells_layers_apart(name):
    model = trial(**MIDDLE, **IDENTITIES[name]).train()
    plain = {*ALGPT2LMHeadModel(ALGPT2Config(**SIZES, **MIDDLE)).state_dict()}
    new = {key: p for key, p in model.named_parameters() if key not in plain}
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    before = {key: p.clone() for key, p in new.items()}
    for _ in range(3):  # the first step moves what starts at zero, the next what that multiplies
        optimizer.zero_grad()
        model(IDS, shift_labels=IDS, skip_logits=True).loss.backward()
        optimizer.step()
    still = [key for key, p in new.items() if "shared." not in key and torch.equal(p, before[key])]
    assert new and not still


def test_streams_part():
    model = trial(**SHARED, streams=2).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        model(IDS, shift_labels=IDS, skip_logits=True).loss.backward()
        optimizer.step()
    seen = []
    hook = model.transformer.connections[-1].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    model(IDS)
    hook.remove()
    assert (seen[0][..., 0, :] - seen[0][..., 1, :]).abs().max() > 1e-4


def test_passes_of_the_loop():
    def passes(layer_map):
        keys = quality_rows.mapped(layer_map)
        return quality_models.TrialConfig(**SIZES, **keys).passes()

    assert passes([0, 1, 2, 1, 2, 3]) == [[1, 2], [3, 4]]
    assert passes([0, 0, 0, 0, 0, 0]) == [[0], [1], [2], [3], [4], [5]]
    assert passes([0, 1, 0, 1, 0, 1]) == [[0, 1], [2, 3], [4, 5]]
    assert passes([0, 1, 2, 3, 4, 5]) == []


@pytest.mark.parametrize("kept, shared", [("attn", "mlp"), ("mlp", "attn")])
def test_one_half_of_the_block_is_shared_and_the_other_not(kept, shared):
    unshared = {"num_hidden_groups": 6}
    model = trial(**unshared, **{f"{shared}_map": [0] * 6})
    names = [name for name, _ in model.named_parameters()]
    assert sum(name.endswith(f"{shared}.c_proj.weight") for name in names) == 1
    assert sum(name.endswith(f"{kept}.c_proj.weight") for name in names) == 6
    plain = ALGPT2LMHeadModel(ALGPT2Config(**SIZES, **unshared)).eval()
    state, norm = model.state_dict(), {"attn": "ln_1", "mlp": "ln_2"}[shared]
    for i in range(6):
        for key, x in model.transformer.h[0].state_dict().items():
            if key.startswith((shared, norm)):
                state[f"transformer.h.{i}.{key}"] = x
    plain.load_state_dict(state)
    assert torch.equal(logits(model), logits(plain))


def test_the_input_embedding_alone_is_factorized():
    model = trial(**SHARED, input_size=4, tie_word_embeddings=False)
    assert model.transformer.wte.weight.shape == (60, 4)
    assert model.lm_head.weight.shape == (60, 16)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert 0.01 < model.transformer.wte.weight.std() < 0.03  # GPT-2's 0.02, not torch's 1


@pytest.mark.numeric
def test_hashed_embeddings_are_few_numbers_of_full_rank_for_input_and_head():
    sizes = {"hashes": 3, "buckets": 20, "tie_word_embeddings": False}
    model = trial(**SHARED, **sizes)
    table = model.transformer.wte.table()
    assert table.shape == (60, 16) and torch.linalg.matrix_rank(table) == 16
    assert 0.015 < table.std() < 0.025  # GPT-2's 0.02
    assert trial(**SHARED).num_parameters() - model.num_parameters() == 60 * 16 - 60 * 3 - 20 * 16
    with torch.no_grad():
        hidden = model.transformer(IDS).last_hidden_state
        torch.testing.assert_close(logits(model), hidden @ table.T)
        loss = model(IDS, shift_labels=IDS, skip_logits=True).loss
    hard = torch.nn.functional.cross_entropy(logits(model).flatten(0, 1), IDS.flatten())
    torch.testing.assert_close(loss, hard)


@pytest.mark.parametrize("keys", [
    IDENTITIES["all"],
    {"hashes": 3, "buckets": 20, "tie_word_embeddings": False},
    {"input_size": 4, "tie_word_embeddings": False},
    {"mlp_map": [0] * 6, "attn_map": [0, 1, 2] * 2},
], ids=["all", "hashes", "input", "halves"])  # fmt: skip
def test_a_checkpoint_holds_all_of_the_model(keys, tmp_path):
    model = trial(**MIDDLE, **keys)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(read), logits(model))


@pytest.mark.numeric
def test_a_model_is_causal_whatever_is_on_trial():
    model = trial(**MIDDLE, **IDENTITIES["all"])
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    changed = IDS.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 60
    with torch.no_grad():
        before, after = model(IDS).logits, model(changed).logits
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=1e-5, atol=1e-6)
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-2


def test_a_teacher_pulls_the_model_to_its_distribution_and_evaluation_does_not_see_it(tmp_path):
    teacher = ALGPT2LMHeadModel(ALGPT2Config(**SIZES, **SHARED))
    with torch.no_grad():
        teacher.lm_head.weight *= 30  # far from uniform
    teacher.save_pretrained(tmp_path / "teacher")
    keys = {"teacher": str(tmp_path / "teacher"), "teacher_share": 1.0}
    model, alone = trial(**SHARED, **keys), trial(**SHARED)

    def loss(model):  # labels that the teacher does not expect
        return model(IDS, shift_labels=(IDS + 1) % 60, skip_logits=True).loss

    assert torch.equal(loss(model), loss(alone))
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    with torch.no_grad():
        target = teacher.eval()(IDS).logits.softmax(-1)
        excess = torch.nn.functional.cross_entropy(
            logits(model.eval()).flatten(0, 1), target.flatten(0, 1)
        ) + (target * target.log()).sum(-1).mean()  # fmt: skip
    assert excess < 0.5 * (math.log(60) + (target * target.log()).sum(-1).mean())
    assert not [name for name, _ in model.named_parameters() if "_teacher" in name]
