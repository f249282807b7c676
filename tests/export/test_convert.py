"""ALGPT2 as stock GPT-2 and back: the same logits where possible, else the nearest start."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import export_gpt2
import train_pt
from algpt2 import ALGPT2Config, ALGPT2LMHeadModel
from algpt2.errors import UserError
from algpt2.export import convert, convert_pt

ROOT = Path(export_gpt2.__file__).parent
CONFIGS = sorted(path.parent for path in ROOT.glob("algpt2/*/config.json"))
SMALL = {"vocab_size": 300, "n_positions": 24, "bos_token_id": 299, "eos_token_id": 299}


def shrunken(folder):
    """The config of a folder, narrower: 4 wide per head, E and C in about their proportion."""
    keys = json.loads((folder / "config.json").read_text()) | SMALL
    width = 4 * keys["n_head"]
    factorized = keys["embedding_size"] != keys["n_embd"]
    return ALGPT2Config(
        **keys | {"n_embd": width, "embedding_size": width // 3 * factorized or width}
    )


def random_model(config, seed=0):
    """No parameter is zero or one: biases and norms as in a trained model."""
    torch.manual_seed(seed)
    model = ALGPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn_like(parameter) * 0.1 + (".ln_" in name and "weight" in name)
            )
    return model


def logits(model):
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture
def save(tokenizer_folder, tmp_path):
    """Write a model with its tokenizer to a folder."""

    def write(model, name="model"):
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


VARIANTS = {
    "layer map": {"num_hidden_groups": 2, "layer_map": [0, 1, 1, 0]},
    "untied": {"tie_word_embeddings": False},
    "untied, not factorized": {"tie_word_embeddings": False, "embedding_size": 16},
    "inner width": {"n_inner": 24, "activation_function": "relu"},
    "scaling": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    "epsilon": {"layer_norm_epsilon": 0.1},
}


def variant(**changes):
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 4, "embedding_size": 8}
    return ALGPT2Config(**SMALL | sizes | changes)


@pytest.mark.numeric
@pytest.mark.parametrize(
    "config",
    [pytest.param(shrunken(f), id=f.name) for f in CONFIGS]
    + [pytest.param(variant(**changes), id=name) for name, changes in VARIANTS.items()],
)
def test_the_export_is_a_stock_gpt2_with_the_same_logits(config, save, tmp_path):
    model = random_model(config)
    export_gpt2.main([str(save(model)), str(tmp_path / "out")])
    stock, report = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)


def test_the_export_has_the_tokenizer_and_what_generate_needs(save, tokenizer_folder, tmp_path):
    export_gpt2.main([str(save(random_model(variant()))), str(tmp_path / "out")])
    ids = [AutoTokenizer.from_pretrained(f)("the model").input_ids
           for f in (tokenizer_folder, tmp_path / "out")]  # fmt: skip
    assert ids[0] == ids[1]
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 299
    )
    # transformers 4 cannot read a list under this key, not even an empty one.
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in config and config["model_max_length"] == 24
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


@pytest.mark.numeric
def test_weights_of_the_original_and_of_gpt2_itself_are_exported(save, tmp_path):
    from safetensors.torch import load_file, save_file

    model = random_model(variant())
    weights = save(model) / "model.safetensors"
    state = {name.replace(".h.0.", ".h."): value for name, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    export_gpt2.main([str(weights.parent), str(tmp_path / "out")])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)
    export_gpt2.main([str(tmp_path / "out"), str(tmp_path / "twice")])
    exported_twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(logits(exported_twice), logits(stock))


def test_what_is_in_the_way_of_an_export_stays(save, tmp_path):
    source, out = str(save(random_model(variant()))), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty.*--overwrite"):
        export_gpt2.main([source, str(out)])
    export_gpt2.main([source, str(out), "--overwrite"])
    assert (out / "thesis.tex").exists() and (out / "model.safetensors").exists()
    (out / "training_state.json").write_text("{}")
    with pytest.raises(UserError, match="checkpoint of a run"):
        export_gpt2.main([source, str(out), "--overwrite"])
    with pytest.raises(UserError, match="cannot load an ALGPT2"):
        export_gpt2.main([str(out / "nothing"), str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_a_bias_that_cannot_be_folded_is_an_error():
    model = random_model(variant())
    tensors = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    tensors["dense.weight"][1] = tensors["dense.weight"][0]
    with pytest.raises(UserError, match="bias of dense"):
        convert.gpt2_tensors(model.config, tensors)
    tensors["dense.bias"][1] = tensors["dense.bias"][0]  # inside the range again
    convert.gpt2_tensors(model.config, tensors)


# --- the other way -------------------------------------------------------------------------------


def started(target, source, blocks=("mean",)):
    model = ALGPT2LMHeadModel(target)
    convert_pt.start_model(model, str(source), blocks)
    return model


def random_gpt2(**changes):
    torch.manual_seed(0)
    config = GPT2Config(**SMALL | {"n_embd": 16, "n_head": 2, "n_layer": 4} | changes)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.numeric
def test_a_start_without_sharing_and_factorization_is_exact(save):
    source = random_gpt2()
    target = variant(num_hidden_groups=4, embedding_size=16)
    start = started(target, save(source))
    assert all(torch.equal(p, source.get_parameter(name)) for name, p in start.named_parameters())
    torch.testing.assert_close(logits(start), logits(source), rtol=1e-4, atol=1e-5)


@pytest.mark.numeric
@pytest.mark.parametrize("tied", [True, False])
def test_a_start_from_a_model_of_rank_e_is_exact(save, tied):
    source = random_model(variant(num_hidden_groups=2, tie_word_embeddings=tied))
    start = started(source.config, save(source))
    torch.testing.assert_close(logits(start), logits(source), rtol=1e-4, atol=1e-4)


@pytest.mark.numeric
def test_tables_of_rank_e_are_reproduced_exactly():
    draw = np.random.default_rng(0)
    wte, wpe = (draw.normal(size=(n, 5)) @ draw.normal(size=(5, 12)) for n in (50, 20))
    for rank, exact in ((10, True), (9, False)):
        new = convert.factorize(wte, wpe, wte, rank, True)
        rows = new[convert.WTE][:, None] + new[convert.WPE]
        rows = rows @ new["transformer.projection_layer.weight"].T
        rows = rows + new["transformer.projection_layer.bias"]
        head = new[convert.WTE] @ new["dense.weight"]
        assert np.allclose(rows, wte[:, None] + wpe, atol=1e-9) is exact
        assert np.allclose(head, wte, atol=1e-9)  # of rank 5


@pytest.mark.numeric
def test_the_embedding_is_nearer_than_any_random_projection():
    draw = np.random.default_rng(0)
    wte = draw.normal(size=(200, 24)) * np.linspace(2, 0.1, 24)
    basis = convert.factorize(wte, wte[:9] * 0, wte, 8, True)
    error = np.linalg.norm(basis[convert.WTE] @ basis["dense.weight"] - wte)
    singular = np.linalg.svd(wte)[1]
    assert error == pytest.approx(np.linalg.norm(singular[8:]))  # Eckart and Young


def test_which_layers_a_block_starts_from():
    def layers(n_layers, blocks, **changes):
        return convert.layers_of_blocks(n_layers, variant(**changes), blocks)

    assert layers(4, ("mean",)) == [[0, 1, 2, 3]]
    assert layers(4, ("mean",), num_hidden_groups=2) == [[0, 1], [2, 3]]
    assert layers(4, ("first",), num_hidden_groups=2) == [[0], [2]]
    assert layers(4, ("last",), num_hidden_groups=2) == [[1], [3]]
    assert layers(4, ("3", "1"), num_hidden_groups=2) == [[3], [1]]
    assert layers(8, ("mean",), num_hidden_groups=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layers(2, ("mean",), num_hidden_groups=4) == [[0], [0], [1], [1]]
    map_ = {"num_hidden_groups": 2, "layer_map": [0, 1, 1, 0]}
    assert layers(4, ("mean",), **map_) == [[0, 3], [1, 2]]
    for wrong in (("median",), ("4",), ("0", "1"), ()):
        with pytest.raises(UserError, match=r"--init_blocks.*1 numbers of layers from 0 to 3"):
            layers(4, wrong)


@pytest.mark.numeric
def test_blocks_are_averaged_or_selected(save):
    source = random_gpt2()
    folder, name = save(source), "mlp.c_fc.weight"
    layers = [source.get_parameter(f"transformer.h.{i}.{name}").detach() for i in range(4)]
    for blocks, expected in (("mean", sum(layers) / 4), ("first", layers[0]), ("2", layers[2])):
        start = started(variant(), folder, (blocks,))
        torch.testing.assert_close(start.get_parameter(f"transformer.h.0.{name}"), expected)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({}, {"n_head": 4}, "n_head 2 and 4"),
        ({}, {"n_positions": 32}, "24 positions, --config needs 32"),
        ({"vocab_size": 310}, {}, "vocab_size 310 and 300"),
        ({"n_inner": 32}, {}, "n_inner 32 and 64"),
        ({"tie_word_embeddings": False}, {"embedding_size": 16}, "a head of its own"),
    ],
)
def test_models_that_do_not_fit_are_refused(save, source, target, message):
    with pytest.raises(UserError, match=message):
        started(variant(**target), save(random_gpt2(**source)))


@pytest.fixture
def flags(flags):
    """Flags of train_pt.py for a few steps on the corpus, with the model's own tokenizer."""
    return partial(flags, tokenizer=None, max_steps=60, logging_steps=60, eval_steps=None)


def val_loss(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]


@pytest.mark.numeric
def test_a_trained_model_gives_a_better_start_than_chance(
    flags, config_folder, tokenizer_folder, tmp_path
):
    wide = ALGPT2Config.from_pretrained(config_folder, embedding_size=32, num_hidden_groups=2)
    wide.save_pretrained(tmp_path / "wide")
    train_pt.main(flags("trained", config=tmp_path / "wide", tokenizer=tokenizer_folder))
    short = {"max_steps": 1, "lr": 1e-9}
    train_pt.main(flags("chance", tokenizer=tokenizer_folder, **short))
    train_pt.main(flags("start", init_from=tmp_path / "trained", **short))
    trained, chance, start = (val_loss(tmp_path / n) for n in ("trained", "chance", "start"))
    assert trained < start < chance - 0.5
    for short in ({"max_steps": 6}, {"max_steps": 6, "max_minutes": 1e-9}):
        name = f"run{len(short)}"
        while train_pt.main(flags(name, init_from=tmp_path / "trained", **short)):
            pass
    assert val_loss(tmp_path / "run1") == val_loss(tmp_path / "run2")  # a start once only


def test_init_from_and_checkpoint_exclude_each_other(flags):
    with pytest.raises(UserError, match="--init_from and --checkpoint"):
        train_pt.main(flags("run", init_from="a", checkpoint="b"))


def test_weights_alone_are_exported_and_a_line_says_so(tmp_path, capsys):
    random_model(variant()).save_pretrained(tmp_path / "model")
    export_gpt2.main([str(tmp_path / "model"), str(tmp_path / "out")])
    assert "the export has no tokenizer" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*token*"))
    GPT2LMHeadModel.from_pretrained(tmp_path / "out")


def test_the_export_has_the_ids_of_its_tokenizer(foreign_model, tmp_path):
    export_gpt2.main([str(foreign_model), str(tmp_path / "out")])
    for name in ("config.json", "generation_config.json"):
        keys = json.loads((tmp_path / "out" / name).read_text())
        assert [keys[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [1, 0, 2]
