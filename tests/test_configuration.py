"""ALGPT2Config: layer map, closed forms, the config folders, loading, and refusals."""

import json
import logging
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2Config

from algpt2 import ALGPT2Config, ALGPT2LMHeadModel

FOLDERS = Path(__file__).parents[1] / "algpt2"
# name: stored parameters, n_embd, n_layer, n_head, embedding_size, groups, dropout (SEED.md)
SHAPES = {
    "algpt2": (13_850_880, 768, 12, 12, 128, 1, 0.1),
    "algpt2-factorized-256": (20_611_584, 768, 12, 12, 256, 1, 0.1),
    "algpt2-factorized-512": (34_132_992, 768, 12, 12, 512, 1, 0.1),
    "algpt2-no-dropout": (13_850_880, 768, 12, 12, 128, 1, 0.0),
    "algpt2-no-factorization": (46_473_216, 768, 12, 12, 768, 1, 0.1),
    "algpt2-medium": (19_425_536, 1024, 24, 16, 128, 1, 0.1),
    "algpt2-large": (26_573_056, 1280, 36, 20, 128, 1, 0.1),
    "algpt2-xl": (37_719_296, 1600, 48, 25, 128, 1, 0.1),
    "gpt2": (124_439_808, 768, 12, 12, 768, 12, 0.1),
    "gpt2-no-dropout": (124_439_808, 768, 12, 12, 768, 12, 0.0),
    "gpt2-medium": (354_823_168, 1024, 24, 16, 1024, 24, 0.1),
    "gpt2-large": (774_030_080, 1280, 36, 20, 1280, 36, 0.1),
    "gpt2-xl": (1_557_611_200, 1600, 48, 25, 1600, 48, 0.1),
}
NAMES = sorted(path.parent.name for path in FOLDERS.glob("*/config.json"))


def meta_parameters(config: ALGPT2Config) -> int:
    """Parameters of the modules, built without memory."""
    with torch.device("meta"):
        model = ALGPT2LMHeadModel(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_counts_the_modules_of_every_config_folder(name):
    config = AutoConfig.from_pretrained(FOLDERS / name)
    assert type(config) is ALGPT2Config
    assert config.stored_parameters() == meta_parameters(config)
    config.num_hidden_groups = config.n_layer
    config.layer_map = None
    assert config.stored_parameters() == config.virtual_parameters()


@pytest.mark.parametrize("name", SHAPES)
def test_config_folders_have_the_shapes_of_the_original(name):
    config = ALGPT2Config.from_pretrained(FOLDERS / name)
    shape = (config.n_embd, config.n_layer, config.n_head, config.embedding_size)
    dropouts = {config.resid_pdrop, config.embd_pdrop, config.attn_pdrop}
    actual = (config.stored_parameters(), *shape, config.num_hidden_groups, *dropouts)
    assert actual == SHAPES[name]
    keys = json.loads((FOLDERS / name / "config.json").read_text())
    assert keys["model_type"] == "algpt2"
    assert keys["architectures"] == ["ALGPT2LMHeadModel"]
    assert (config.vocab_size, config.n_positions) == (50257, 1024)
    assert config.bos_token_id == config.eos_token_id == 50256


def test_the_tiny_config_ends_its_vocabulary_with_end_of_text():
    config = ALGPT2Config.from_pretrained(FOLDERS / "algpt2-tiny")
    assert config.bos_token_id == config.eos_token_id == config.vocab_size - 1


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"num_hidden_groups": 2},
        {"num_hidden_groups": 3, "layer_map": [0, 1, 1, 2, 0, 2]},
        {"embedding_size": 16},
        {"n_inner": 40},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": False, "embedding_size": 16},
    ],
)
def test_the_closed_form_counts_every_option(keys):
    config = ALGPT2Config(**{**TINY, "n_layer": 6, **keys})
    assert config.stored_parameters() == meta_parameters(config)


TINY = {
    "vocab_size": 97,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 96,
    "eos_token_id": 96,
}


def test_parameters_do_not_grow_with_the_layers_of_one_block():
    counts = [ALGPT2Config(**{**TINY, "n_layer": n}) for n in (2, 8)]
    assert counts[0].stored_parameters() == counts[1].stored_parameters()
    grown = counts[1].virtual_parameters() - counts[0].virtual_parameters()
    assert grown == 6 * counts[0].block_parameters()


@pytest.mark.parametrize("n_layer", [12, 22, 24, 36, 48])
def test_layer_map_is_exact_arithmetic(n_layer):
    for groups in (g for g in range(1, n_layer + 1) if n_layer % g == 0):
        actual = ALGPT2Config(n_layer=n_layer, num_hidden_groups=groups).block_of_layers()
        exact = [int(Fraction(i) / (Fraction(n_layer) / groups)) for i in range(n_layer)]
        assert actual == exact
        assert [actual.count(block) for block in range(groups)] == [n_layer // groups] * groups


def test_an_explicit_layer_map_is_used():
    config = ALGPT2Config(n_layer=4, num_hidden_groups=2, layer_map=[0, 1, 1, 0])
    assert config.block_of_layers() == [0, 1, 1, 0]


def test_flops_count_the_matrix_products_that_are_applied():
    config = ALGPT2Config(**TINY, embedding_size=16, num_hidden_groups=2)
    with torch.device("meta"):
        model = ALGPT2LMHeadModel(config)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    blocks = sum(n for name, n in matrices.items() if ".h.0." in name)
    projections = matrices["transformer.projection_layer.weight"] + matrices["dense.weight"]
    applied = 4 * blocks + projections + 97 * 16
    assert config.flops_per_token(10) == 6 * applied + 12 * 4 * 32 * 10


def test_residual_scale_is_gpt2s_unless_given_and_is_stored(tmp_path):
    assert ALGPT2Config(n_layer=8).residual_init_scale == 0.25
    ALGPT2Config(n_layer=8).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["residual_init_scale"] == 0.25
    assert ALGPT2Config(n_layer=8, residual_init_scale=0.5).residual_init_scale == 0.5


def test_what_is_derived_follows_a_key_given_when_loading():
    config = ALGPT2Config.from_pretrained(FOLDERS / "algpt2", n_layer=8)
    assert config.residual_init_scale == 0.25
    assert config.block_of_layers() == [0] * 8


def test_a_config_of_the_original_has_one_group(tmp_path):
    keys = {"model_type": "algpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "embedding_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = ALGPT2Config.from_pretrained(tmp_path)
    assert (config.num_hidden_groups, config.embedding_size) == (1, 8)
    assert config.block_of_layers() == [0] * 4


def test_a_stock_gpt2_config_is_an_algpt2_without_sharing(tmp_path, caplog):
    GPT2Config(n_embd=32, n_layer=3, n_head=4).save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        config = ALGPT2Config.from_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = False
    assert config.block_of_layers() == [0, 1, 2]
    assert not config.is_factorized
    assert not caplog.records  # "model of type gpt2 to instantiate a model of type algpt2"


def test_every_key_survives_saving(tmp_path):
    keys = {
        **TINY,
        "embedding_size": 8,
        "num_hidden_groups": 2,
        "layer_map": [0, 1, 0, 1],
        "residual_init_scale": 0.125,
    }
    config = ALGPT2Config(**keys)
    config.save_pretrained(tmp_path)
    loaded = ALGPT2Config.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert {key: getattr(loaded, key) for key in keys} == keys


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_embd": 0}, "n_embd to be an integer above zero, got 0"),
        ({"n_layer": 0}, "n_layer to be an integer above zero, got 0"),
        ({"n_layer": -2}, "n_layer to be an integer above zero, got -2"),
        ({"n_inner": 0}, "n_inner to be an integer above zero, got 0"),
        ({"embedding_size": "x"}, "embedding_size to be an integer above zero, got 'x'"),
        ({"num_hidden_groups": 1.5}, "num_hidden_groups to be an integer above zero, got 1.5"),
        ({"num_hidden_groups": True}, "num_hidden_groups to be an integer above zero, got True"),
        ({"n_head": 5}, "n_embd=768 and n_head=5; change one"),
        ({"embedding_size": 1024}, "at most n_embd=768, got 1024; leave it out"),
        ({"num_hidden_groups": 5}, "n_layer=12 and num_hidden_groups=5; change one"),
        ({"n_layer": 2, "layer_map": [0]}, r"each of the 2 layers.*got \[0\]"),
        ({"n_layer": 2, "layer_map": [0, 2]}, r"0 to 0 .*got \[0, 2\]"),
        ({"n_layer": 2, "layer_map": [0, "a"]}, r"got \[0, 'a'\]"),
        ({"n_layer": 2, "layer_map": 3}, "got 3"),
        ({"n_layer": 2, "layer_map": [0, 0], "num_hidden_groups": 2}, "at least once"),
        ({"attn_pdrop": 1.0}, "attn_pdrop from 0 to below 1, got 1.0"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon above zero, got 0.0"),
        ({"initializer_range": float("nan")}, "initializer_range above zero, got nan"),
        ({"residual_init_scale": -1.0}, "residual_init_scale of zero or more, got -1.0; leave it"),
        ({"residual_init_scale": "a"}, "residual_init_scale of zero or more, got 'a'"),
        ({"add_cross_attention": True}, "add_cross_attention=false, got true"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=false, got true"),
    ],
)
def test_values_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        ALGPT2Config(**keys)


def test_a_wrong_type_in_a_file_is_a_value_error_that_names_the_key(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "algpt2", "n_embd": "768"}')
    with pytest.raises(ValueError, match=r"config.json: .*'n_embd' expected int, got str"):
        AutoConfig.from_pretrained(tmp_path)


def test_the_model_refuses_what_was_set_after_the_checks():
    config = ALGPT2Config(**TINY)
    config.num_hidden_groups = 3
    with pytest.raises(ValueError, match="num_hidden_groups=3"):
        ALGPT2LMHeadModel(config)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"activation_function .*got 'glue'"):
        ALGPT2LMHeadModel(ALGPT2Config(**TINY, activation_function="glue"))
