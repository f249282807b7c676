"""What makes a GPU fast and a CPU can show: no host reads, no mask, one graph for all layers."""

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import random_rows
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from algpt2 import ALGPT2Config, ALGPT2LMHeadModel, kernels_algpt2
from algpt2.errors import NonFiniteError
from algpt2.kernels_algpt2 import LMHead, _CompiledHeadCrossEntropy, piece_loss
from algpt2.options import OptimOptions, TrainOptions, parse
from algpt2.shards.batches import RowInputs
from algpt2.system import processes_pt
from algpt2.system.processes_pt import Processes
from algpt2.training import trainer_pt
from algpt2.training.optimizers_pt import build_optimizer
from algpt2.training.trainer_pt import Trainer, evaluate

CPU = Processes(0, 1, torch.device("cpu"), torch.float32)


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def make_model(**changes):
    shape = {
        "vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 12, "n_head": 2,
        "embedding_size": 16, "bos_token_id": 49, "eos_token_id": 49,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    return ALGPT2LMHeadModel(ALGPT2Config(**{**shape, **changes}))


def loss_of(model, rows):
    return model(rows, shift_labels=rows, skip_logits=True, use_cache=False).loss


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_over_plain_rows_reads_nothing_from_the_device(training):
    model, rows = make_model().train(training), torch.arange(32).view(2, 16)
    with Operators() as run:
        loss = loss_of(model, rows)
        loss.backward()
    assert any("scaled_dot_product" in name for name in run.names)
    assert [name for name in run.names if "_local_scalar_dense" in name] == []


def test_the_graph_of_plain_rows_has_no_mask():
    model, calls = make_model().transformer, []

    def keep(graph, inputs):
        attention = torch.nn.functional.scaled_dot_product_attention
        calls.extend(node.kwargs for node in graph.graph.nodes if node.target is attention)
        return graph

    rows = torch.arange(32).view(2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    states = [way(rows, use_cache=False).last_hidden_state for way in (compiled, model)]
    assert torch.equal(*states)
    assert len(calls) == model.config.n_layer
    assert all(call["attn_mask"] is None and call["is_causal"] is True for call in calls)


# --- compiled blocks -----------------------------------------------------------------------------


TORCH_WARNS = ("ignore:The .grad attribute", "ignore::DeprecationWarning:torch")  # as it compiles


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile that stops before it writes C++: the same graphs, in a tenth of the time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def make_trainer(compiled, n_groups=1, n_processes=1, **changes):
    flags = {"lr": 1e-2, "batch_size": 4, "grad_steps": 2, "lr_schedule": "constant"}
    options = TrainOptions(optim=OptimOptions(**flags), compile=compiled)
    processes = replace(CPU, count=n_processes)
    model = make_model(num_hidden_groups=n_groups, **changes)
    optimizers = build_optimizer(model, options.optim, options.optim.lr)
    rows = RowInputs(random_rows(), options, processes)
    torch._dynamo.reset()
    return Trainer(model, optimizers, options, processes, rows, n_steps=100)


def validate(trainer):
    return evaluate(trainer.model, random_rows(7), CPU, 3)


@pytest.mark.filterwarnings(*TORCH_WARNS)
@pytest.mark.parametrize("n_groups", [1, 12])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_are_one_graph_and_keep_the_chunked_loss(
    n_groups, checkpointing, quick_compile, monkeypatch
):
    plain, compiled = (make_trainer(x, n_groups) for x in (False, True))
    if checkpointing:
        compiled.model.activation_checkpointing_enable()
    monkeypatch.setattr(LMHead, "forward", None)  # which would hold all logits
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = [compiled.train_step()[0] for _ in range(3)]
    assert losses == pytest.approx([plain.train_step()[0] for _ in range(3)], rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    n_calls = counters["stats"]["calls_captured"]
    validate(compiled)
    assert counters["stats"]["calls_captured"] == n_calls  # evaluation compiles nothing


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings(*TORCH_WARNS)
def test_compiled_blocks_keep_the_chunked_loss_in_ddp(
    quick_compile, one_process_group, monkeypatch
):
    monkeypatch.setattr(LMHead, "forward", None)
    trainers = [make_trainer(x, n_processes=2) for x in (False, True)]
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        plain, compiled = ([t.train_step() for _ in range(3)] for t in trainers)
    assert all(isinstance(t.wrapped, DistributedDataParallel) for t in trainers)
    gradients = [p.grad for p in trainers[1].model.parameters()]
    storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    assert len(storages) < len(gradients)  # views of DDP's buckets, which it reduces in place
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for a, b in zip(plain, compiled, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.filterwarnings(*TORCH_WARNS)
def test_a_compiled_run_resumes_to_the_same_bytes():
    straight, resumed = (make_trainer(True, n_layer=2, resid_pdrop=0.1) for _ in range(2))
    for _ in range(2):
        straight.train_step()
    resumed.model.load_state_dict(straight.model.state_dict())
    resumed.optimizer.load_state_tensors(straight.optimizer.state_tensors())
    resumed.step = straight.step
    validate(resumed)
    torch._dynamo.reset()
    assert resumed.train_step() == straight.train_step()
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("asked", "device", "there", "expected"),
    [(None, "cpu", True, False), (None, "cuda", True, True), (None, "cuda", False, False),
     (True, "cpu", True, True), (False, "cuda", True, False)],
)  # fmt: skip
def test_compiling_is_the_default_where_cuda_and_a_compiler_are(
    asked, device, there, expected, monkeypatch
):
    has_compiler = there and device == "cuda"
    monkeypatch.setattr(processes_pt, "has_compiler", lambda device: has_compiler)
    flags = [] if asked is None else ["--compile" if asked else "--no_compile"]
    assert processes_pt.compiles(parse(TrainOptions, flags), torch.device(device)) is expected


# --- the loss in compiled pieces -----------------------------------------------------------------


def loss_and_gradients(loss, hidden, weight, labels):
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    value = loss(hidden, weight, labels)
    value.backward()
    return value, hidden.grad, weight.grad


def plain_loss(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def piecewise_loss(hidden, weight, labels):
    return _CompiledHeadCrossEntropy.apply(hidden, weight, labels[:, None], 7, True)


@pytest.mark.filterwarnings(*TORCH_WARNS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("vocab_size", [128, 131])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_pieces_are_the_cross_entropy(
    dtype, vocab_size, compiled, quick_compile, monkeypatch
):
    piece = torch.compile(piece_loss, dynamic=False) if compiled else piece_loss
    monkeypatch.setattr(kernels_algpt2, "compiled_piece_loss", lambda: piece)
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 16), torch.randn(vocab_size, 16)
    labels = torch.arange(vocab_size - 20, vocab_size)  # the last columns, beside the padding
    rounded = hidden.to(dtype).float(), weight.to(dtype).float()
    expected = loss_and_gradients(plain_loss, *rounded, labels)
    # The weight stays float32, as under autocast; its gradient comes in float32.
    found = loss_and_gradients(piecewise_loss, rounded[0].to(dtype), rounded[1], labels)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b).abs().max() <= tolerance * b.abs().max()
    assert found[2].dtype == torch.float32 and found[2].shape == weight.shape


def test_the_compiled_loss_measures_without_gradients():
    hidden, weight, labels = torch.randn(20, 16), torch.randn(131, 16), torch.arange(20)
    loss, d_logits = piece_loss(hidden, F.pad(weight, (0, 0, 0, 125)), labels[:, None], 131, False)
    assert d_logits is None
    torch.testing.assert_close(loss / 20, plain_loss(hidden, weight, labels))


# --- several steps in a call ---------------------------------------------------------------------


def assert_same_state(a, b):
    assert a.step == b.step
    pairs = [(a.parameters(), b.parameters()), (a.state_tensors(), b.state_tensors())]
    for x, y in pairs:
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_ten_steps_in_a_call_give_the_bytes_of_ten_calls():
    one, ten = (make_trainer(False, n_layer=2, resid_pdrop=0.1) for _ in range(2))
    results = [one.train_steps(1) for _ in range(10)]
    assert ten.train_steps(10) == results[-1]
    assert_same_state(one, ten)


def test_nothing_is_read_between_the_steps_of_a_call():
    trainer = make_trainer(False, n_layer=2)
    trainer.train_steps(1)
    with Operators() as run:
        trainer.train_steps(3)
    assert len([name for name in run.names if "_fused_adamw" in name]) == 2 * 3  # groups, steps
    assert [name for name in run.names if "_local_scalar_dense" in name] == []


def test_no_update_follows_a_bad_step_within_a_call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no run is
    good, bad = (make_trainer(False, n_layer=2) for _ in range(2))
    good.train_steps(3)
    whole, passes = trainer_pt.mean_loss, []

    def poisoned(*args):
        passes.append(None)
        return whole(*args) * (math.nan if len(passes) == 2 * 3 + 1 else 1)  # two passes a step

    monkeypatch.setattr(trainer_pt, "mean_loss", poisoned)
    with pytest.raises(NonFiniteError, match="step 4: loss nan"):
        bad.train_steps(10)
    assert len(passes) == 2 * 10  # the host learned of it at the end of the call
    assert_same_state(good, bad)


def test_the_optimizer_clips_by_a_divisor():
    clipped, divided = (make_trainer(False, n_layer=2) for _ in range(2))
    for trainer in (clipped, divided):
        trainer.forward_backward(0)
    max_norm, bad = 1e-3, torch.zeros(())
    norm = torch.nn.utils.clip_grad_norm_(clipped.model.parameters(), max_norm)
    assert norm > 10 * max_norm
    clipped.optimizer.step_unless(bad, None)
    divided.optimizer.step_unless(bad, (norm + 1e-6) / max_norm)
    for a, b in zip(clipped.model.parameters(), divided.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_steps_per_call_is_an_option():
    trainer = make_trainer(False)
    assert trainer.steps_per_call == 1
    trainer.options = replace(trainer.options, steps_per_call=7)
    trainer.__post_init__()
    assert trainer.steps_per_call == 7
