"""ALGPT2 in PyTorch against transformers' GPT-2 and against itself with copied blocks; what
transformers expects of a model: cache, checkpointing, tying, weight files."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from algpt2 import ALGPT2Config, ALGPT2LMHeadModel, ALGPT2Model, kernels_algpt2

pytestmark = pytest.mark.numeric

TOLERANCE = 1e-5  # float32, absolute on values of order one
VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 96,
    "eos_token_id": 96,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
SHARED = {"embedding_size": 16, "num_hidden_groups": 2}


def build(seed: int = 0, **keys: object) -> ALGPT2LMHeadModel:
    """A small model with noise on every parameter."""
    torch.manual_seed(seed)
    return disturb(ALGPT2LMHeadModel(ALGPT2Config(**{**SHAPE, **SHARED, **keys})))


def disturb(model: torch.nn.Module) -> torch.nn.Module:
    """Add noise to every parameter, so that nothing is equal by being zero, one, or tiny."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def ids(seed: int = 1, batch: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(
        0, VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=TOLERANCE, atol=TOLERANCE,
            msg=lambda message, name=name: f"{name}: {message}",
        )  # fmt: skip


# --- GPT-2 is the special case -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "attention"), [(0, "sdpa"), (1, "sdpa"), (2, "sdpa"), (3, "eager")]
)
def test_without_sharing_it_is_transformers_gpt2(seed, attention, tmp_path):
    torch.manual_seed(seed)
    theirs = disturb(GPT2LMHeadModel(GPT2Config(**SHAPE)))
    theirs.set_attn_implementation(attention)
    theirs.save_pretrained(tmp_path)
    ours = ALGPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation=attention).train()
    x = ids(seed)
    outputs = [model(x, labels=x, use_cache=False) for model in (ours, theirs.train())]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=TOLERANCE, atol=TOLERANCE)
    for output in outputs:
        output.loss.backward()
    assert_equal(gradients(ours), gradients(theirs))


def test_gpt2s_options_are_gpt2s():
    for keys in (
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"n_inner": 48, "activation_function": "relu"},
        {"tie_word_embeddings": False},
    ):
        torch.manual_seed(0)
        theirs = disturb(GPT2LMHeadModel(GPT2Config(**SHAPE, **keys))).eval()
        ours = build(embedding_size=None, num_hidden_groups=4, **keys).eval()
        ours.load_state_dict(theirs.state_dict())
        x = ids()
        expected = theirs(x).logits
        torch.testing.assert_close(ours(x).logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_gelu_new_is_the_tanh_kernel():
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    actual = build().transformer.h[0].mlp.act(x)
    torch.testing.assert_close(actual, ACT2FN["gelu_new"](x), rtol=1e-12, atol=1e-12)


# --- sharing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [{"num_hidden_groups": 1}, {"num_hidden_groups": 2}, {"layer_map": [0, 1, 1, 0]}],
    ids=["albert", "two groups", "map"],
)
def test_sharing_is_copies_whose_gradients_are_summed(keys):
    shared = build(**{**SHARED, **keys})
    copies = build(num_hidden_groups=4)
    blocks = shared.config.block_of_layers()
    copies.load_state_dict(
        {name: shared.state_dict()[_stored_name(name, blocks)] for name in copies.state_dict()}
    )
    x = ids()
    outputs = [model(x, labels=x) for model in (shared, copies)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=TOLERANCE, atol=TOLERANCE)
    for output in outputs:
        output.loss.backward()
    summed: dict[str, torch.Tensor] = {}
    for name, gradient in gradients(copies).items():
        stored = _stored_name(name, blocks)
        summed[stored] = summed.get(stored, 0) + gradient
    assert_equal(gradients(shared), summed)


def _stored_name(name: str, blocks: list[int]) -> str:
    """`transformer.h.3.x` -> `transformer.h.<block of layer 3>.x`."""
    parts = name.split(".")
    if parts[:2] == ["transformer", "h"]:
        parts[2] = str(blocks[int(parts[2])])
    return ".".join(parts)


def test_a_block_is_registered_once():
    model = build(num_hidden_groups=1)
    assert [n for n in model.state_dict() if "ln_1.weight" in n] == ["transformer.h.0.ln_1.weight"]


# --- the function it computes --------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_position_sees_a_later_one(attention):
    model = build()
    model.set_attn_implementation(attention)
    x = model.transformer.wte(ids(batch=1)).detach().requires_grad_()
    for position in (0, 5, 11):
        (gradient,) = torch.autograd.grad(model(inputs_embeds=x).logits[0, position].sum(), x)
        seen = gradient[0].abs().sum(-1) > 0
        assert seen.tolist() == [i <= position for i in range(12)]


def test_padding_on_the_left_changes_nothing():
    model, x = build().eval(), ids(batch=1, length=6)
    padded = F.pad(x, (4, 0), value=3)
    mask = F.pad(torch.ones_like(x), (4, 0))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(logits, model(x).logits, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("keys", [{}, {"embedding_size": 32}], ids=["E < C", "E = C"])
def test_embeddings_are_summed_then_projected(keys):
    model, x = build(**keys).eval(), ids()
    outputs = model(x, output_hidden_states=True)
    trunk = model.transformer
    embedded = trunk.wte.weight[x] + trunk.wpe.weight[: x.shape[1]]
    last = outputs.hidden_states[-1]
    if keys:
        assert not [name for name, _ in model.named_modules() if name.endswith(("layer", "dense"))]
    else:
        embedded = F.linear(embedded, trunk.projection_layer.weight, trunk.projection_layer.bias)
        last = F.linear(last, model.dense.weight, model.dense.bias)
    torch.testing.assert_close(outputs.hidden_states[0], embedded)
    torch.testing.assert_close(outputs.logits, last @ trunk.wte.weight.T)


def test_hidden_states_and_attentions_are_those_of_the_layers():
    model, x = build().eval(), ids()
    model.set_attn_implementation("eager")
    outputs = model(x, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(3, 12, 32)] * 5
    assert [tuple(a.shape) for a in outputs.attentions] == [(3, 4, 12, 12)] * 4
    recomputed = model.transformer.h[0](
        outputs.hidden_states[0],
        layer_index=0,
        past_key_values=None,
        mask=torch.full((12, 12), -torch.inf).triu(1),
    )
    torch.testing.assert_close(outputs.hidden_states[1], recomputed)
    as_tuple = model(x, return_dict=False)
    torch.testing.assert_close(as_tuple[0], outputs.logits)


def test_dropout_acts_in_training_only():
    model, x = build(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), ids()
    assert not torch.equal(model(x).logits, model(x).logits)
    model.eval()
    assert torch.equal(model(x).logits, model(x).logits)


def test_embedding_dropout_is_before_the_projection():
    model = build(embd_pdrop=0.9)
    seen = []
    model.transformer.projection_layer.register_forward_hook(lambda _m, x, _y: seen.append(x[0]))
    model(ids())
    assert (seen[0] == 0).float().mean() > 0.8


def test_too_many_positions_or_inputs_are_refused():
    model = build()
    with pytest.raises(ValueError, match="at most n_positions=32 positions, got 33"):
        model(ids(length=33))
    with pytest.raises(ValueError, match="give one"):
        model(ids(), inputs_embeds=model.transformer.wte(ids()))
    with pytest.raises(ValueError, match="give one"):
        model()


# --- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", [False, True], ids=["whole", "left-padded"])
def test_generate_with_the_cache_gives_the_same_tokens(pad, attention):
    model, x = build().eval(), ids(length=6)
    model.set_attn_implementation(attention)
    mask = torch.ones_like(x)
    if pad:
        mask[1, :3] = mask[2, :1] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    cached = model.generate(x, use_cache=True, **options)
    assert torch.equal(cached, model.generate(x, use_cache=False, **options))
    alone = model.generate(
        x[1:2, 3 * pad :], max_new_tokens=12, do_sample=False, pad_token_id=0,
        attention_mask=mask[1:2, 3 * pad :],
    )  # fmt: skip
    assert torch.equal(cached[1, 3 * pad :], alone[0])


def test_the_cache_has_a_slot_for_each_layer_though_blocks_are_shared():
    model, x = build(num_hidden_groups=1).eval(), ids()
    whole = model(x)
    past = model(x[:, :7]).past_key_values
    assert len(past.layers) == 4
    assert past.get_seq_length() == 7
    keys = [layer.keys for layer in past.layers]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(keys))
    rest = model(x[:, 7:], past_key_values=past)
    expected = whole.logits[:, 7:]
    torch.testing.assert_close(rest.logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_cache_is_kept_outside_training_only():
    model, x = build(), ids()
    assert model(x).past_key_values is None
    assert isinstance(model.eval()(x).past_key_values, DynamicCache)
    assert model(x, use_cache=False).past_key_values is None


def test_logits_to_keep():
    model, x = build().eval(), ids()
    torch.testing.assert_close(model(x, logits_to_keep=2).logits, model(x).logits[:, -2:])


# --- losses --------------------------------------------------------------------------------------


def losses_and_gradients(model, x, **kwargs):
    model.zero_grad()
    loss = model(x[:, :-1], shift_labels=x[:, 1:], **kwargs).loss
    loss.backward()
    return loss.detach(), {name: g.clone() for name, g in gradients(model).items()}


@pytest.mark.parametrize("rows", [5, 33, 256], ids=["uneven pieces", "one", "more than all"])
@pytest.mark.parametrize("keys", [{}, {"embedding_size": 32}], ids=["E < C", "E = C"])
def test_the_loss_without_logits_is_the_loss(rows, keys, monkeypatch):
    monkeypatch.setattr(kernels_algpt2, "LOSS_ROWS_CPU", rows)
    model, x = build(**keys), ids()
    plain = losses_and_gradients(model, x)
    skipped = losses_and_gradients(model, x, skip_logits=True)
    torch.testing.assert_close(skipped[0], plain[0], rtol=1e-6, atol=1e-6)
    assert_equal(skipped[1], plain[1])
    assert model(x[:, :-1], shift_labels=x[:, 1:], skip_logits=True).logits is None
    with torch.no_grad():
        loss = model(x[:, :-1], shift_labels=x[:, 1:], skip_logits=True).loss
    torch.testing.assert_close(loss, plain[0], rtol=1e-6, atol=1e-6)


def test_the_loss_without_logits_scales_its_gradient_and_survives_large_logits():
    hidden = (100 * torch.randn(7, 8)).requires_grad_()
    weight, labels = torch.randn(11, 8, requires_grad=True), torch.arange(7)
    expected = F.cross_entropy(hidden @ weight.T, labels)
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = kernels_algpt2.head_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (hidden, weight)), wanted)


def test_a_second_backward_is_refused_not_wrong():
    weight = torch.randn(11, 8, requires_grad=True)
    hidden = torch.randn(7, 8, requires_grad=True)
    loss = kernels_algpt2.head_cross_entropy(hidden, weight, torch.arange(7))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("keys", [{}, {"embedding_size": 32}], ids=["E < C", "E = C"])
def test_the_loss_without_logits_under_autocast_is_not_rounded_to_bfloat16(keys):
    model, x = build(**keys), ids(batch=8, length=32)
    exact = losses_and_gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x[:, :-1], shift_labels=x[:, 1:]).loss
        skipped = model(x[:, :-1], shift_labels=x[:, 1:], skip_logits=True).loss
    assert skipped.dtype == torch.float32
    torch.testing.assert_close(skipped, plain, rtol=1e-5, atol=1e-5)
    model.zero_grad()
    skipped.backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        cosine = F.cosine_similarity(gradient.flatten(), exact[1][name].flatten(), dim=0)
        assert cosine > 0.99, name


def test_labels_are_shifted_and_the_count_of_the_batch_divides():
    model, x = build(), ids()
    labels = x.clone()
    labels[:, :4] = -100
    output = model(x, labels=labels)
    logits, targets = output.logits[:, 3:-1].flatten(0, 1), labels[:, 4:].flatten()
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, targets))
    summed = F.cross_entropy(logits, targets, reduction="sum")
    counted = model(x, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(counted, summed / 100)


def test_skip_logits_needs_shifted_labels():
    with pytest.raises(ValueError, match="shift_labels"):
        build()(ids(), labels=ids(), skip_logits=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 48])  # 3 does not divide the widths
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 5), (4, 4), (17, 1)])
def test_few_rows_on_a_cpu_give_the_same_numbers(threads, shape, monkeypatch):
    model, calls = build(), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *x: calls.append(len(x[0])) or bmm(*x))
    x = ids(batch=shape[0], length=shape[1])
    expected = model(x).logits  # with gradients: the plain products of training
    assert not calls
    with torch.no_grad():
        actual = model(x).logits
    few = x.numel() <= kernels_algpt2.FEW_ROWS and threads in (2, 48)
    assert calls == few * 4 * SHAPE["n_layer"] * [min(threads, kernels_algpt2.MAX_PIECES)]
    assert actual.shape == expected.shape and actual.is_contiguous()
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("way", ["compile", "export", "trace"])
def test_a_graph_of_few_rows_takes_any_number_of_them(way, grad):
    model = torch.nn.Sequential(kernels_algpt2.Conv1D(16, 32), build().lm_head)
    x, any_size = torch.randn(2, 5, 32), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.set_grad_enabled(grad):
        if way == "compile":
            graph = torch.compile(model, backend="eager", fullgraph=True)
        elif way == "export":
            graph = torch.export.export(model, (x,), dynamic_shapes=(any_size,)).module()
        else:
            graph = torch.jit.trace(model, x, check_trace=False)
        for y in (x, x[:1, :3], x.repeat(2, 3, 1)):
            torch.testing.assert_close(graph(y), model(y), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_no_rows_have_no_products():
    assert kernels_algpt2.Conv1D(16, 32)(torch.empty(0, 32)).shape == (0, 16)
    assert build().lm_head(torch.empty(0, 16)).shape == (0, VOCAB)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, None])
def test_few_rows_of_another_precision_have_the_usual_product(dtype, monkeypatch):
    model = build().to(dtype or torch.float32)
    monkeypatch.setattr(torch, "bmm", None)
    monkeypatch.setattr(torch.Tensor, "repeat", None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        model(ids(batch=1, length=1))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_number(use_reentrant):
    model, x = build(num_hidden_groups=1), ids()
    plain = losses_and_gradients(model, x)
    calls = []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = losses_and_gradients(model, x)
    assert len(calls) == 8  # four layers, forward and again backward
    torch.testing.assert_close(checkpointed[0], plain[0], rtol=0, atol=0)
    assert_equal(checkpointed[1], plain[1])


def test_every_parameter_gets_a_gradient():
    model = build()
    losses_and_gradients(model, ids(), skip_logits=True)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# --- initialisation ------------------------------------------------------------------------------


def test_initialisation_is_the_table_in_its_docstring():
    torch.manual_seed(0)
    config = ALGPT2Config(
        vocab_size=500, n_positions=256, n_embd=256, n_layer=8, n_head=4, embedding_size=128,
        num_hidden_groups=2, initializer_range=0.03, residual_init_scale=0.4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = ALGPT2LMHeadModel(config)
    kinds = {"wte", "wpe", "projection_layer", "dense", "lm_head", "c_attn", "c_fc"}
    for name, parameter in model.named_parameters():
        module, kind = name.split(".")[-2:]
        if kind == "bias":
            assert not parameter.any(), name
        elif module.startswith("ln_"):
            assert (parameter == 1).all(), name
        else:
            expected = 0.03 * 0.4 if module == "c_proj" else 0.03
            assert module == "c_proj" or module in kinds
            assert abs(parameter.std().item() / expected - 1) < 0.02, name
            assert abs(parameter.mean().item()) < 0.03 * expected, name


def test_weights_have_gpt2s_layout():
    block = build().transformer.h[0]
    for module in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
        assert isinstance(module, Conv1D)
    assert block.attn.c_attn.weight.shape == (32, 96)
    assert block.mlp.c_fc.weight.shape == (32, 128)


# --- weight files --------------------------------------------------------------------------------


def assert_tied(model: ALGPT2LMHeadModel) -> None:
    assert model.lm_head.weight is model.transformer.wte.weight


def test_head_and_embedding_are_one_tensor_whatever_happens(tmp_path):
    model = build()
    assert_tied(model)
    state = model.state_dict()
    other = build(seed=5)
    other.load_state_dict(state)
    assert_tied(other)
    assert_tied(model.to(torch.bfloat16).to("cpu"))
    other.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_tied(ALGPT2LMHeadModel.from_pretrained(tmp_path))
    assert_tied(copy.deepcopy(other))
    other.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert_tied(other)
    assert other(ids()).logits.shape[-1] == other.config.vocab_size == VOCAB + 3


@pytest.mark.parametrize("keys", [{}, {"embedding_size": 32, "num_hidden_groups": 4}])
def test_a_round_trip_through_auto_model_keeps_every_byte(keys, tmp_path):
    model = build(**keys)
    model.save_pretrained(tmp_path / "first")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "first", output_loading_info=True
    )
    assert type(loaded) is ALGPT2LMHeadModel
    assert not report["missing_keys"] and not report["unexpected_keys"]
    loaded.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert first == second
    assert torch.equal(loaded(ids()).logits, model.eval()(ids()).logits)


@pytest.fixture
def unindexed():
    """A model of one block, and its weights under the names of the original."""
    model = build(num_hidden_groups=1)
    state = {
        name.replace(".h.0.", ".h."): tensor.clone() for name, tensor in model.state_dict().items()
    }
    assert "transformer.h.attn.c_attn.bias" in state
    return model, state


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("buffers", [False, True], ids=["bare", "with mask buffers"])
def test_files_with_the_names_of_the_original_load(unindexed, file, buffers, tmp_path):
    model, state = unindexed
    model.config.save_pretrained(tmp_path)
    del state["lm_head.weight"]
    if buffers:
        state["transformer.h.attn.bias"] = torch.ones(1, 1, 32, 32)
        state["transformer.h.attn.masked_bias"] = torch.tensor(-1e4)
    if file.endswith(".bin"):
        torch.save(state, tmp_path / file)
    else:
        save_file(state, tmp_path / file, metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, weights_only=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_equal(loaded.state_dict(), model.state_dict())
    trunk = ALGPT2Model.from_pretrained(tmp_path)
    assert_equal(trunk.state_dict(), model.transformer.state_dict())
    loaded.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert "transformer.h.0.ln_1.weight" in names


def test_load_state_dict_takes_the_names_of_the_original(unindexed):
    model, state = unindexed
    fresh = build(seed=3, num_hidden_groups=1)
    before = dict(state)
    fresh.load_state_dict(state)
    assert_equal(fresh.state_dict(), model.state_dict())
    assert state.keys() == before.keys()  # the caller's dictionary is unchanged
    with pytest.raises(RuntimeError, match=r"Missing key.*transformer\.h\.1\."):
        build(num_hidden_groups=2).load_state_dict(state)


def test_names_with_an_index_are_left_alone():
    model = build(num_hidden_groups=2)
    fresh = build(seed=3, num_hidden_groups=2)
    fresh.load_state_dict(model.state_dict())
    assert_equal(fresh.state_dict(), model.state_dict())


def run_python(code: str, **kwargs: object) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, **kwargs
    ).stdout


def test_the_model_files_travel_in_a_checkpoint_folder(tmp_path, monkeypatch):
    """`register_for_auto_class` copies them; the folder then loads without this package."""
    monkeypatch.setattr(ALGPT2Config, "_auto_class", None)
    monkeypatch.setattr(ALGPT2LMHeadModel, "_auto_class", None)
    ALGPT2Config.register_for_auto_class()
    ALGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")
    model = build().eval()
    model.save_pretrained(tmp_path / "model")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
assert "algpt2" not in sys.modules and type(model).__module__.startswith("transformers_modules")
assert model.lm_head.weight is model.transformer.wte.weight
print(model(torch.arange(9)[None]).logits.double().sum().item())
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    actual = float(run_python(code, cwd=tmp_path, env=environment))
    expected = model(torch.arange(9)[None]).logits.double().sum().item()
    assert actual == pytest.approx(expected, rel=1e-5)


def test_the_package_names_load_when_used_and_register():
    code = """
import sys, algpt2
assert not {"torch", "transformers"} & sys.modules.keys()
assert {"ALGPT2Config", "ALGPT2LMHeadModel", "register"} <= set(dir(algpt2))
algpt2.register()
from transformers import AutoModel, AutoModelForCausalLM
config = algpt2.ALGPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, n_positions=4)
print(type(AutoModelForCausalLM.from_config(config)) is algpt2.ALGPT2LMHeadModel,
      type(AutoModel.from_config(config)) is algpt2.ALGPT2Model, hasattr(algpt2, "nothing"))
"""
    assert run_python(code, cwd=Path(__file__).parents[1]) == "True True False\n"


# --- what libraries and other machines make of the class -----------------------------------------


def test_trainer_smooths_the_labels_of_the_next_tokens(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, gpt2 = small_pair()
    ids = torch.randint(50, (2, 8))
    losses = []
    for m in (model, gpt2):
        arguments = TrainingArguments(
            str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True
        )
        batch = {"input_ids": ids, "labels": ids.clone()}
        losses.append(Trainer(m.eval(), arguments).compute_loss(m, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def small_pair():
    """A GPT-2, and the ALGPT2 of its weights."""
    shape = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2,
             "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.5))
    model = ALGPT2LMHeadModel(ALGPT2Config(**shape, num_hidden_groups=2))
    model.load_state_dict(gpt2.state_dict())
    return model, gpt2


def test_a_model_saved_in_python_loads_where_the_package_is_not(tmp_path):
    model, _ = small_pair()
    model.save_pretrained(tmp_path / "saved")
    code = """
import sys, torch
sys.modules["algpt2"] = None
from transformers import AutoModel, AutoModelForCausalLM
model, trunk = (
    auto.from_pretrained(sys.argv[1], trust_remote_code=True)
    for auto in (AutoModelForCausalLM, AutoModel)
)
print(model(torch.tensor([[1, 2]])).logits.sum().item(), type(trunk).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved")], capture_output=True, text=True,
        cwd=tmp_path, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    total, trunk = done.stdout.split()
    with torch.no_grad():
        expected = model.eval()(torch.tensor([[1, 2]])).logits.sum().item()
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert trunk == "ALGPT2Model"
