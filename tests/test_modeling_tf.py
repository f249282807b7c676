"""The Keras model against PyTorch's: logits, loss, gradients, weight files; and its parts."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file, save_file

from algpt2 import kernels_tf_algpt2
from algpt2.configuration_algpt2 import ALGPT2Config
from algpt2.kernels_tf_algpt2 import dropout, gelu_new, head_cross_entropy
from algpt2.modeling_tf_algpt2 import TFALGPT2LMHeadModel

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).resolve().parent.parent
# The Python with PyTorch, where the one that runs the tests has only a TensorFlow for TPUs.
PYTORCH = os.environ.get("PYTORCH", sys.executable)
TOLERANCE = 1e-5  # relative to the largest number of an array
CASES = [
    "albert", "two-groups", "layer-map", "gpt2", "options", "stock", "bare", "sharded", "unindexed",
]  # fmt: skip


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """Folders with checkpoints and outputs of PyTorch, made in a process of its own."""
    folder = tmp_path_factory.mktemp("parity")
    subprocess.run(
        [PYTORCH, ROOT / "tests" / "parity_pt.py", folder], check=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return folder


def build(seed=0, dtype="float32", **keys):
    """A small model with noise on every parameter."""
    keys = {
        "vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 4, "n_head": 4,
        "embedding_size": 16, "num_hidden_groups": 2, "bos_token_id": 96, "eos_token_id": 96,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    } | keys  # fmt: skip
    model = TFALGPT2LMHeadModel(ALGPT2Config(**keys), dtype=dtype)
    draw = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign_add(0.1 * draw.standard_normal(variable.shape).astype(np.float32))
    return model


def ids(seed=1, batch=3, length=12):
    return tf.constant(np.random.default_rng(seed).integers(0, 96, (batch, length)))


def gradients(model, tokens, **kwargs):
    """Loss and gradients by name."""
    with tf.GradientTape() as tape:
        loss = model(tokens[:, :-1], shift_labels=tokens[:, 1:], **kwargs).loss
    actual = tape.gradient(loss, model.trainable_variables)
    return loss, dict(zip(model.named_parameters(), map(np.asarray, actual), strict=True))


def assert_close(actual, expected, what="", tolerance=TOLERANCE):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, what
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max(), what


# --- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_pytorchs(cases, case, skip_logits):
    expected = np.load(cases / case / "outputs.npz")
    model = TFALGPT2LMHeadModel.from_pretrained(cases / case)
    tokens = tf.constant(expected["ids"])
    assert_close(model(tokens[:, :-1]).logits, expected["logits"])
    loss, actual = gradients(model, tokens, skip_logits=skip_logits)
    assert_close(loss, expected["loss"])
    names = {n.removeprefix("gradient ") for n in expected.files if n.startswith("gradient ")}
    assert actual.keys() == names
    for name, gradient in actual.items():
        assert_close(gradient, expected[f"gradient {name}"], name)


@pytest.mark.parametrize("case", ["layer-map", "gpt2", "options"])
def test_a_saved_folder_is_the_one_that_pytorch_wrote(cases, case, tmp_path):
    TFALGPT2LMHeadModel.from_pretrained(cases / case).save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (cases / case / name).read_bytes(), name


def test_a_stock_gpt2_is_saved_as_the_algpt2_that_it_is(cases, tmp_path):
    TFALGPT2LMHeadModel.from_pretrained(cases / "bare").save_pretrained(tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (cases / "stock", tmp_path))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_groups"]) == ("algpt2", 4)


def test_every_shared_config_has_its_parameters():
    seen = 0
    for path in ROOT.glob("algpt2/*/config.json"):
        config = ALGPT2Config.from_pretrained(path.parent)
        if config.stored_parameters() < 50e6:  # larger models take gigabytes
            assert TFALGPT2LMHeadModel(config).num_parameters() == config.stored_parameters()
            seen += 1
    assert seen >= 9


def test_weights_that_do_not_fit_are_named(cases, tmp_path):
    folder = cases / "albert"
    with pytest.raises(ValueError, match=r"missing \['transformer.h.1.attn.c_attn.bias'"):
        TFALGPT2LMHeadModel.from_pretrained(folder, num_hidden_groups=2)
    with pytest.raises(ValueError, match=r"left over .*'transformer.more'"):
        state = load_file(folder / "model.safetensors") | {"more": np.zeros(3, np.float32)}
        build(num_hidden_groups=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"wte.weight of shape \(98, 16\).*got \(97, 16\)"):
        TFALGPT2LMHeadModel.from_pretrained(folder, vocab_size=98)
    ALGPT2Config.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"expected model\.safetensors"):
        TFALGPT2LMHeadModel.from_pretrained(tmp_path)


def test_half_precision_files_load_in_float32(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    halves = {name: array.astype(np.float16) for name, array in state.items()}
    save_file(halves, tmp_path / "model.safetensors")
    loaded = TFALGPT2LMHeadModel.from_pretrained(tmp_path)
    for name, variable in loaded.named_parameters().items():
        assert np.array_equal(variable.numpy(), halves[name].astype(np.float32))


# --- parts ---------------------------------------------------------------------------------------


def test_no_position_sees_a_later_one():
    model, tokens = build(), ids(batch=1)
    logits = model(tokens).logits
    changed = tf.concat([tokens[:, :7], (tokens[:, 7:] + 1) % 96], 1)
    actual = model(changed).logits
    assert np.array_equal(actual[:, :7], logits[:, :7])
    assert np.abs(actual - logits)[:, 7:].max(-1).min() > 0


def test_the_cache_has_a_slot_for_each_layer_and_changes_nothing():
    model, tokens = build(num_hidden_groups=1), ids()
    whole = model(tokens)
    assert whole.past_key_values is None
    past = model(tokens[:, :7], use_cache=True).past_key_values
    assert [tuple(key.shape) for key, _ in past] == [(3, 4, 7, 8)] * 4
    assert len({float(tf.reduce_sum(key)) for key, _ in past}) == 4
    rest = model(tokens[:, 7:], past_key_values=past, use_cache=True)
    assert_close(rest.logits, whole.logits[:, 7:])
    assert rest.past_key_values[0][1].shape[2] == 12


def test_padding_on_the_left_changes_nothing():
    model, tokens = build(), ids(batch=1, length=6)
    padded, mask = tf.pad(tokens, [[0, 0], [4, 0]]), tf.pad(tf.ones((1, 6)), [[0, 0], [4, 0]])
    positions = tf.maximum(tf.cast(tf.cumsum(mask, 1), tf.int32) - 1, 0)
    actual = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    assert_close(actual, model(tokens).logits)


@pytest.mark.parametrize("rows", [5, 33, 256])
def test_the_loss_in_pieces_is_the_loss_also_weighted_and_scaled(rows):
    draw = np.random.default_rng(0)
    hidden, weight = (
        tf.Variable(100 * draw.standard_normal(shape), dtype=tf.float32)
        for shape in [(2, 17, 8), (11, 8)]
    )
    labels = draw.integers(0, 11, (2, 17))
    weights = tf.constant(draw.random((2, 17)), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        logits = tf.einsum("bte,ve->btv", hidden, weight)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        expected = 3 * tf.reduce_sum(losses * weights)
        actual = 3 * head_cross_entropy(hidden, weight, labels, weights, rows)
        mean = head_cross_entropy(hidden, weight, labels, None, rows)
    assert_close(actual, expected)
    assert_close(mean, tf.reduce_mean(losses))
    for variable in (hidden, weight):
        assert_close(tape.gradient(actual, variable), tape.gradient(expected, variable))


def test_a_loss_of_many_rows_is_of_no_more_pieces(monkeypatch):
    hidden, weight = tf.random.stateless_normal((40, 8), (0, 1)), tf.ones((11, 8))
    labels, sizes, piece_loss = np.arange(40) % 11, [], kernels_tf_algpt2._piece_loss

    def counted(logits, *rest):
        sizes.append(logits.shape[0])
        return piece_loss(logits, *rest)

    monkeypatch.setattr(kernels_tf_algpt2, "_piece_loss", counted)
    many = head_cross_entropy(hidden, weight, labels, None, 3)
    monkeypatch.setattr(kernels_tf_algpt2, "MAX_PIECES", 3)
    assert_close(head_cross_entropy(hidden, weight, labels, None, 3), many)
    assert sizes == [3] * 13 + [1] + [14, 14, 12]


def test_the_gradients_written_by_hand_are_those_of_tensorflow():
    x = tf.constant(np.linspace(-6, 6, 60).reshape(3, 20), tf.float32)
    weight, bias = tf.linspace(0.5, 2.0, 20), tf.linspace(-1.0, 1.0, 20)

    def plain_norm(x, weight, bias):
        mean, variance = tf.nn.moments(x, -1, keepdims=True)
        return (x - mean) / tf.sqrt(variance + 1e-5) * weight + bias

    pairs = [
        (gelu_new, lambda x: tf.nn.gelu(x, approximate=True), [x]),
        (lambda *a: kernels_tf_algpt2.layer_norm(*a, 1e-5), plain_norm, [x, weight, bias]),
    ]
    for ours, theirs, variables in pairs:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(variables)
            a, b = (tf.reduce_sum(tf.sin(f(*variables))) for f in (ours, theirs))
        assert_close(a, b)
        for variable in variables:
            assert_close(tape.gradient(a, variable), tape.gradient(b, variable), tolerance=3e-5)


def test_dropout_is_a_function_of_seed_and_place():
    x = tf.ones((64, 64))
    draws = [dropout(x, 0.25, tf.constant(seed), site) for seed, site in
             (([0, 1], 0), ([0, 2], 0), ([0, 1], 1), ([0, 1], 0))]  # fmt: skip
    assert np.array_equal(draws[0], draws[3])
    assert not any(np.array_equal(draws[0], other) for other in draws[1:3])
    assert np.mean(draws[0]) == pytest.approx(1, abs=0.05)
    assert set(np.unique(draws[0])) == {0.0, np.float32(1 / 0.75)}


@pytest.mark.parametrize(
    ("has_xla", "for_tpu", "is_fused"),
    [(True, False, True), (False, False, False), (True, True, False)],
)
def test_fused_functions_are_plain_for_a_tpu_and_without_xla(
    monkeypatch, has_xla, for_tpu, is_fused
):
    monkeypatch.setattr(kernels_tf_algpt2, "has_xla", lambda: has_xla)
    if for_tpu:
        strategy = object.__new__(tf.distribute.TPUStrategy)
        monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    graph = tf.function(gelu_new).get_concrete_function(tf.TensorSpec([4])).graph
    assert ("Tanh" not in {operation.type for operation in graph.get_operations()}) == is_fused


@pytest.mark.parametrize("place", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_acts_with_a_seed_only(place):
    model, tokens = build(**{place: 0.5}), ids()
    plain = model(tokens).logits
    assert np.array_equal(plain, model(tokens).logits)
    assert not np.allclose(plain, model(tokens, seed=tf.constant([0, 1])).logits)


def test_gradient_checkpointing_changes_no_number():
    model, tokens = build(resid_pdrop=0.3), ids()
    seed = tf.constant([3, 4])
    plain = gradients(model, tokens, seed=seed)
    model.transformer.gradient_checkpointing = True
    checkpointed = gradients(model, tokens, seed=seed)
    assert_close(checkpointed[0], plain[0], tolerance=1e-6)
    for name, gradient in plain[1].items():
        assert_close(checkpointed[1][name], gradient, name, tolerance=1e-6)


def test_mixed_bfloat16_is_close_and_keeps_float32_parameters_and_loss():
    exact, mixed = build(), build(dtype="mixed_bfloat16")
    expected, actual = (gradients(model, ids(), skip_logits=True) for model in (exact, mixed))
    assert actual[0].dtype == tf.float32
    assert actual[0].numpy() != expected[0].numpy()
    assert_close(actual[0], expected[0], tolerance=1e-2)
    for name, gradient in actual[1].items():
        assert gradient.dtype == np.float32
        a, b = gradient.ravel(), expected[1][name].ravel()
        assert a @ b > 0.98 * math.sqrt((a @ a) * (b @ b)), name


def test_initialisation_is_gpt2s_and_a_function_of_the_seed():
    config = ALGPT2Config(
        vocab_size=500, n_positions=256, n_embd=256, n_layer=8, n_head=4, embedding_size=128,
        num_hidden_groups=2, initializer_range=0.03, residual_init_scale=0.4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    first, same, other = (TFALGPT2LMHeadModel(config, seed=seed) for seed in (1, 1, 2))
    for name, variable in first.named_parameters().items():
        array = variable.numpy()
        module, kind = name.split(".")[-2:]
        if kind == "bias":
            assert not array.any(), name
        elif module.startswith("ln_"):
            assert (array == 1).all(), name
        else:
            expected = 0.03 * 0.4 if module == "c_proj" else 0.03
            assert abs(array.std() / expected - 1) < 0.02, name
            assert np.array_equal(array, same.named_parameters()[name].numpy())
            assert not np.array_equal(array, other.named_parameters()[name].numpy())
    blocks = [first.named_parameters()[f"transformer.h.{i}.mlp.c_fc.weight"] for i in (0, 1)]
    assert not np.array_equal(*blocks)


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="at most n_positions=32 positions, got 33"):
        build()(ids(length=33))
    with pytest.raises(ValueError, match="shift_labels"):
        build()(ids(), skip_logits=True)
    with pytest.raises(ValueError, match=r"activation_function.*'mish'"):
        build(activation_function="mish")
