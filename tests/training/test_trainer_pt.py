"""The training step and its parts, on rows in memory."""

import math
from dataclasses import replace

import golden
import numpy as np
import pytest
import torch
from helpers import random_rows
from rounding import distances, sum_tolerance
from transformers import AutoModelForCausalLM, LlamaConfig

from algpt2 import ALGPT2Config, ALGPT2LMHeadModel
from algpt2.errors import NonFiniteError
from algpt2.kernels_algpt2 import LMHead
from algpt2.options import OptimOptions, TrainOptions
from algpt2.shards.batches import RowInputs
from algpt2.system.processes_pt import Processes, start_processes
from algpt2.training.optimizers_pt import build_optimizer
from algpt2.training.trainer_pt import Trainer, evaluate, mean_loss, seed_step

pytestmark = pytest.mark.numeric

OPTIMIZERS = ["AdamW", "Adafactor", "Muon", "SGD"]
CPU = Processes(0, 1, torch.device("cpu"), torch.float32)


def make_trainer(dropout=0.0, **optim):
    flags = {"lr": 1e-2, "batch_size": 4, "lr_schedule": "constant"} | optim
    options = TrainOptions(optim=OptimOptions(**flags))
    torch.manual_seed(0)
    config = ALGPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=3, n_head=2, embedding_size=16,
        bos_token_id=49, eos_token_id=49,
        attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout,
    )  # fmt: skip
    model = ALGPT2LMHeadModel(config)
    optimizers = build_optimizer(model, options.optim, options.optim.lr)
    return Trainer(
        model, optimizers, options, CPU, RowInputs(random_rows(), options, CPU), n_steps=100
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_learns_and_repeats_bit_for_bit(optimizer):
    lr = 0.5 if optimizer == "SGD" else 1e-2
    first, second = (make_trainer(dropout=0.1, optimizer=optimizer, lr=lr) for _ in range(2))
    losses = [first.train_step()[0] for _ in range(20)]
    assert losses == [second.train_step()[0] for _ in range(20)]
    assert_equal(weights(first), weights(second))
    assert losses[0] == pytest.approx(math.log(50), abs=0.2)
    assert np.mean(losses[-5:]) < losses[0] - 0.01


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_state_survives_a_round_trip(optimizer):
    straight = make_trainer(optimizer=optimizer)
    for _ in range(3):
        straight.train_step()
    resumed = make_trainer(optimizer=optimizer)
    resumed.model.load_state_dict(straight.model.state_dict())
    resumed.optimizer.load_state_tensors(straight.optimizer.state_tensors())
    resumed.step = straight.step
    for _ in range(3):
        assert straight.train_step() == resumed.train_step()
    assert_equal(weights(straight), weights(resumed))
    assert_equal(straight.optimizer.state_tensors(), resumed.optimizer.state_tensors())


def test_accumulation_equals_one_large_batch():
    sgd = {"optimizer": "SGD", "lr": 0.5, "weight_decay": 0.0, "max_grad_norm": 0}
    whole = make_trainer(batch_size=8, grad_steps=1, **sgd)
    parts = make_trainer(batch_size=2, grad_steps=4, **sgd)
    tolerance = sum_tolerance(8 * 16)  # tokens whose gradients both add up, in another order
    assert parts.train_step() == pytest.approx(whole.train_step(), rel=tolerance)
    # The momentum after the first step is the gradient.
    gradients = [trainer.optimizer.state_tensors() for trainer in (parts, whole)]
    assert max(distances(*gradients).values()) < tolerance
    for _ in range(4):
        assert parts.train_step() == pytest.approx(whole.train_step(), rel=tolerance)


def test_processes_share_the_global_batch():
    one = make_trainer(batch_size=8)
    two = [make_trainer(batch_size=8) for _ in range(2)]
    for rank, trainer in enumerate(two):
        trainer.inputs.processes = replace(CPU, rank=rank, count=2)
    halves = [next(trainer.inputs.batches(0)) for trainer in two]
    assert np.array_equal(np.concatenate(halves), next(one.inputs.batches(0)))


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor", "Muon"])
def test_weight_decay_touches_matrices_only(optimizer):
    trainer = make_trainer(optimizer=optimizer, weight_decay=0.5)
    decays = {
        id(p): group["weight_decay"]
        for o in trainer.optimizer.optimizers
        for group in o.param_groups
        for p in group["params"]
    }
    for name, p in trainer.model.named_parameters():
        assert decays[id(p)] == (0.5 if p.dim() >= 2 else 0.0), name
    assert len(decays) == len(list(trainer.model.parameters()))


def test_muon_takes_matrices_inside_blocks_only_in_float32():
    trainer = make_trainer(optimizer="Muon", weight_decay=0.0)
    muon, _ = trainer.optimizer.optimizers
    names = trainer.optimizer.names
    by_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    assert by_muon == {
        "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight",
    }  # fmt: skip
    name = "transformer.h.0.mlp.c_proj.weight"
    before = weights(trainer)[name]
    trainer.train_step()
    update = weights(trainer)[name] - before
    # In bfloat16 every entry of the update would be a product with 8 significant bits.
    scaled = update / (trainer.options.optim.lr * 0.2 * math.sqrt(128))
    assert not torch.allclose(scaled, scaled.bfloat16().float(), rtol=1e-4, atol=0)
    singular_values = torch.linalg.svdvals(scaled)
    # The last is 0: a layer norm passes on no gradient along its input.
    assert 0.5 < singular_values[:-1].min() and singular_values.max() < 1.5


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_bad_numbers_stop_before_the_update(what):
    trainer = make_trainer()
    trainer.train_step()
    if what == "loss":
        trainer.model.transformer.ln_f.bias.data[0] = math.nan
    else:
        trainer.model.dense.bias.register_hook(lambda gradient: gradient * math.inf)
    before = weights(trainer)
    with pytest.raises(NonFiniteError, match="step 2"):
        trainer.train_step()
    assert trainer.step == 1
    for name, weight in weights(trainer).items():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num())


def test_gradients_are_clipped_to_the_norm():
    trainer = make_trainer(optimizer="SGD", momentum=0.0, weight_decay=0.0, max_grad_norm=1e-3)
    before = weights(trainer)
    _, norm = trainer.train_step()
    assert norm > 1e-3
    moved = sum(((weights(trainer)[name] - w) ** 2).sum() for name, w in before.items()) ** 0.5
    assert moved.item() == pytest.approx(1e-3 * trainer.options.optim.lr, rel=1e-2)


def test_evaluation_counts_each_token_once_and_leaves_no_trace():
    trainer = make_trainer(dropout=0.5)
    rows = random_rows(7)
    with torch.no_grad():
        tokens = torch.from_numpy(rows.tokens.astype(np.int64))
        trainer.model.eval()
        logits = trainer.model(tokens[:, :-1]).logits.double().log_softmax(-1)
        trainer.model.train()
    expected = -logits.gather(-1, tokens[:, 1:, None]).mean().item()
    random_state = torch.get_rng_state()
    for batch_size in (1, 3, 7, 20):  # the last batch is shorter: means of batches would differ
        assert evaluate(trainer.model, rows, CPU, batch_size) == pytest.approx(expected, rel=1e-6)
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    first_and_last = evaluate(trainer.model, rows, CPU, 4, n_rows=2)
    two = random_rows(7)
    two.tokens = rows.tokens[[0, 6]]
    assert first_and_last == pytest.approx(evaluate(trainer.model, two, CPU, 4), rel=1e-6)


def test_dropout_depends_on_seed_step_and_process():
    draws = []
    for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        seed_step(*key)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[4]
    assert len(set(draws)) == 4


def test_any_causal_model_takes_the_same_step():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=49,
        eos_token_id=49, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(config)
    ours = ALGPT2LMHeadModel(
        ALGPT2Config(**{**config.to_dict(), "num_hidden_groups": 2, "embedding_size": 32})
    )
    ours.load_state_dict(stock.state_dict())
    options = TrainOptions(optim=OptimOptions(lr=1e-3))
    losses = []
    for model in (stock, ours):
        optimizers = build_optimizer(model, options.optim, 1e-3)
        inputs = RowInputs(random_rows(), options, CPU)
        trainer = Trainer(model, optimizers, options, CPU, inputs, n_steps=10)
        losses.append([trainer.train_step()[0] for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bf16_on_request_stays_close_to_float32():
    losses = []
    for precision in ("fp32", "bf16"):
        trainer = make_trainer(precision=precision)
        trainer.processes = start_processes(trainer.options)
        losses.append([trainer.train_step()[0] for _ in range(5)])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_golden_losses():
    model = ALGPT2LMHeadModel(ALGPT2Config(**golden.CONFIG))
    arrays = golden.weights({name: tuple(p.shape) for name, p in model.named_parameters()})
    model.load_state_dict({n: torch.from_numpy(a) for n, a in arrays.items()}, strict=False)
    options = TrainOptions(optim=OptimOptions(**golden.OPTIM))
    optimizers = build_optimizer(model, options.optim, options.optim.lr)
    inputs = RowInputs(golden.ROWS, options, CPU)
    trainer = Trainer(model, optimizers, options, CPU, inputs, n_steps=10)
    found = [trainer.train_step()[0] for _ in range(10)]
    assert found == pytest.approx(golden.losses(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch._dynamo itself
def test_a_compiled_model_takes_the_loss_without_logits(monkeypatch):
    trainer, rows = make_trainer(), random_rows(2)[np.arange(2)]
    plain = mean_loss(trainer.model, rows, CPU.device)
    monkeypatch.setattr(LMHead, "forward", None)  # which makes logits
    for wrapped in (torch.compile(trainer.model, backend="eager"), Wrapper(trainer.model)):
        assert torch.equal(mean_loss(wrapped, rows, CPU.device), plain)


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel around a compiled model."""

    def __init__(self, model):
        super().__init__()
        self.module = torch.compile(model, backend="eager")

    def forward(self, *arguments, **kwargs):
        return self.module(*arguments, **kwargs)


def test_muon_leaves_an_untied_head_of_any_model_to_adamw():
    for config in (
        ALGPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False),
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=2),
    ):  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        optimizers = build_optimizer(model, OptimOptions(optimizer="Muon"), 1e-3)
        muon, adamw = ({optimizers.names[p] for g in o.param_groups for p in g["params"]}
                       for o in optimizers.optimizers)  # fmt: skip
        assert "lm_head.weight" in adamw and len(muon) >= 4
