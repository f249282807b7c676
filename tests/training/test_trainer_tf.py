"""The TensorFlow training step and its parts, on rows in memory."""

import math

import golden
import numpy as np
import pytest
import tensorflow as tf
from helpers import random_rows
from rounding import distances, sum_tolerance

from algpt2.configuration_algpt2 import ALGPT2Config
from algpt2.errors import NonFiniteError, UserError
from algpt2.modeling_tf_algpt2 import TFALGPT2LMHeadModel
from algpt2.options import OptimOptions, TFTrainOptions
from algpt2.shards.inputs_tf import RowInputs
from algpt2.system.processes_tf import Processes
from algpt2.training.optimizers_tf import (
    Adafactor,
    build_optimizer,
    load_state_tensors,
    state_tensors,
)
from algpt2.training.trainer_tf import Trainer, build_step, evaluate, step_seed

pytestmark = pytest.mark.numeric

OPTIMIZERS = ["AdamW", "Adafactor", "Muon", "SGD"]
CPU = Processes(0, 1, tf.distribute.get_strategy(), "float32")
CONFIG = {
    "vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2,
    "embedding_size": 16, "bos_token_id": 49, "eos_token_id": 49,
}  # fmt: skip


def make_trainer(dropout=0.0, rows=None, config=CONFIG, n_steps=100, **optim):
    more = {key: optim.pop(key) for key in ("steps_per_call", "compile") if key in optim}
    flags = {"lr": 1e-2, "batch_size": 4, "lr_schedule": "constant"} | optim
    options = TFTrainOptions(optim=OptimOptions(**flags), **more)
    rates = dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], dropout)
    model = TFALGPT2LMHeadModel(ALGPT2Config(**(config | rates)))
    optimizer = build_optimizer(model, options.optim, options.optim.lr)
    inputs = RowInputs(rows or random_rows(), options, CPU)
    return Trainer(model, optimizer, options, CPU, inputs, n_steps=n_steps)


def weights(trainer):
    return {name: v.numpy() for name, v in trainer.model.named_parameters().items()}


def moments(trainer):
    """Means of gradients and of their squares; Adafactor's exp_avg is a mean of updates, which
    amplify the rounding of small gradients."""
    state = state_tensors(trainer.model, trainer.optimizer)
    of_updates = "/exp_avg" if isinstance(trainer.optimizer, Adafactor) else "none"
    return {name: array for name, array in state.items() if not name.endswith(of_updates)}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_golden_losses():
    trainer = make_trainer(rows=golden.ROWS, config=golden.CONFIG, n_steps=10, **golden.OPTIM)
    parameters = trainer.model.named_parameters()
    arrays = golden.weights({name: tuple(v.shape) for name, v in parameters.items()})
    trainer.model.load_state_dict(arrays)
    found = [trainer.train_step()[0] for _ in range(10)]
    assert found == pytest.approx(golden.losses(), rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_survives_a_round_trip_and_training_repeats_bit_for_bit(optimizer):
    straight = make_trainer(dropout=0.1, optimizer=optimizer)
    losses = [straight.train_step()[0] for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(50), abs=0.2)
    resumed = make_trainer(dropout=0.1, optimizer=optimizer)
    resumed.model.load_state_dict(straight.model.state_dict())
    state = state_tensors(straight.model, straight.optimizer)
    load_state_tensors(resumed.model, resumed.optimizer, state, 3)
    resumed.step = 3
    for _ in range(3):
        assert straight.train_step() == resumed.train_step()
    assert_equal(weights(straight), weights(resumed))
    assert_equal(*(state_tensors(t.model, t.optimizer) for t in (straight, resumed)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_learns(optimizer):
    trainer = make_trainer(optimizer=optimizer, lr=0.5 if optimizer == "SGD" else 1e-2)
    losses = [trainer.train_step()[0] for _ in range(20)]
    assert np.mean(losses[-5:]) < losses[0] - 0.01


def test_a_state_of_another_optimizer_or_model_is_refused():
    adam, sgd = make_trainer(), make_trainer(optimizer="SGD")
    with pytest.raises(UserError, match=r"another optimizer: it has no .*momentum_buffer"):
        load_state_tensors(sgd.model, sgd.optimizer, state_tensors(adam.model, adam.optimizer), 1)
    state = state_tensors(adam.model, adam.optimizer) | {"more/exp_avg": np.zeros(1)}
    with pytest.raises(UserError, match="another model: it has more/exp_avg"):
        load_state_tensors(adam.model, adam.optimizer, state, 1)


def test_several_steps_in_a_call_are_the_steps_one_by_one():
    single, several = make_trainer(dropout=0.1), make_trainer(dropout=0.1, steps_per_call=4)
    for _ in range(7):
        last = single.train_step()
    several.train_steps(3)  # calls need not be whole
    assert several.train_steps(4) == pytest.approx(last, rel=1e-6)
    assert single.step == several.step == 7
    assert max(distances(moments(several), moments(single)).values()) < sum_tolerance(4 * 16)


def test_accumulation_equals_one_large_batch():
    sgd = {"optimizer": "SGD", "lr": 0.5, "weight_decay": 0.0, "max_grad_norm": 0}
    whole = make_trainer(batch_size=8, grad_steps=1, **sgd)
    parts = make_trainer(batch_size=2, grad_steps=4, **sgd)
    tolerance = sum_tolerance(8 * 16)  # tokens whose gradients both add up, in another order
    assert parts.train_step() == pytest.approx(whole.train_step(), rel=tolerance)
    # The momentum after the first step is the gradient.
    assert max(distances(moments(parts), moments(whole)).values()) < tolerance
    for _ in range(4):
        assert parts.train_step() == pytest.approx(whole.train_step(), rel=tolerance)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_xla_compiles_the_whole_step(optimizer):
    # Without dropout: XLA draws other numbers from the same seed.
    flags = {"optimizer": optimizer, "grad_steps": 2, "config": CONFIG | {"n_layer": 1}}
    trainer, plain = (make_trainer(**flags) for _ in range(2))
    step = build_step(trainer.model, trainer.optimizer, trainer.options.optim)
    compiled, tolerance = tf.function(step, jit_compile=True), sum_tolerance(2 * 2 * 4 * 16)
    for i in range(2):  # the second loss is that of the updated weights
        tokens, _ = trainer.inputs.take(i)
        numbers = (tf.constant(x) for x in (1e-2, step_seed(42, i), True))
        loss, norm, ok = compiled(tokens[0], *numbers)
        assert bool(ok)
        assert (float(loss), float(norm)) == pytest.approx(plain.train_step(), rel=tolerance)
    assert max(distances(moments(trainer), moments(plain)).values()) < tolerance


def test_compile_is_the_same_step():
    plain, compiled = make_trainer(), make_trainer(compile=True)
    for _ in range(2):
        assert plain.train_step() == pytest.approx(compiled.train_step(), rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_decay_touches_matrices_only(optimizer):
    trainer = make_trainer(optimizer=optimizer, weight_decay=0.5, momentum=0.0)
    before = weights(trainer)
    for variable in trainer.model.trainable_variables:
        trainer.optimizer.update_step(
            tf.zeros(variable.shape), variable.value, tf.constant(0.1)
        )  # fmt: skip
    for name, weight in weights(trainer).items():
        expected = before[name] * (0.95 if weight.ndim >= 2 else 1)
        np.testing.assert_allclose(weight, expected, rtol=1e-5, err_msg=name)


def test_muon_takes_matrices_inside_blocks_only():
    trainer = make_trainer(optimizer="Muon", weight_decay=0.0)
    state = state_tensors(trainer.model, trainer.optimizer)
    assert {key.rpartition("/")[0] for key in state if key.endswith("momentum_buffer")} == {
        "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight",
    }  # fmt: skip
    name = "transformer.h.0.mlp.c_proj.weight"
    before = weights(trainer)[name]
    trainer.train_step()
    update = (weights(trainer)[name] - before) / (1e-2 * 0.2 * math.sqrt(128))
    singular_values = np.linalg.svd(update, compute_uv=False)
    # The last is 0: a layer norm passes on no gradient along its input.
    assert 0.5 < singular_values[:-1].min() and singular_values.max() < 1.5


@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bad_numbers_stop_before_the_update(optimizer, steps_per_call):
    trainer = make_trainer(optimizer=optimizer, steps_per_call=steps_per_call)
    trainer.train_steps(2)
    bias = trainer.model.transformer.ln_f.bias
    bias.assign(np.where(np.arange(32) == 0, np.nan, bias.numpy()))
    before = weights(trainer)
    with pytest.raises(NonFiniteError, match="step 3"):
        trainer.train_steps(4)
    assert trainer.step == 2
    for name, weight in weights(trainer).items():
        np.testing.assert_array_equal(weight, before[name], err_msg=name)


def test_gradients_are_clipped_to_the_norm():
    trainer = make_trainer(optimizer="SGD", momentum=0.0, weight_decay=0.0, max_grad_norm=1e-3)
    before = weights(trainer)
    _, norm = trainer.train_step()
    assert norm > 1e-3
    moved = sum(((weights(trainer)[name] - w) ** 2).sum() for name, w in before.items()) ** 0.5
    assert moved == pytest.approx(1e-3 * trainer.options.optim.lr, rel=1e-2)


def test_evaluation_counts_each_token_once():
    trainer, rows = make_trainer(dropout=0.5), random_rows(7)
    tokens = tf.constant(rows.tokens.astype(np.int32))
    logits = trainer.model(tokens[:, :-1]).logits
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tokens[:, 1:], logits)
    expected = np.mean(losses, dtype=np.float64)
    for batch_size in (1, 3, 7, 20):  # the last batch is shorter: means of batches would differ
        done = []
        found = evaluate(trainer.model, rows, CPU, batch_size, tick=done.append)
        assert found == pytest.approx(expected, rel=1e-6)
        assert sum(done) == 7
    two = random_rows(7)
    two.tokens = rows.tokens[[0, 6]]
    first_and_last = evaluate(trainer.model, rows, CPU, 4, n_rows=2)
    assert first_and_last == pytest.approx(evaluate(trainer.model, two, CPU, 4), rel=1e-6)


def test_dropout_depends_on_seed_and_step():
    seeds = {tuple(step_seed(*key)) for key in ((0, 0), (1, 0), (0, 1), (0, 0))}
    assert len(seeds) == 3
    losses = [make_trainer(dropout=0.5, seed=seed).train_step()[0] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
