"""The TensorFlow training step and its parts, on rows in memory."""

import math

import golden
import numpy as np
import pytest
import tensorflow as tf
from rounding import distances, sum_tolerance

from algpt2 import optimizers_tf, training_tf
from algpt2.configuration_algpt2 import ALGPT2Config
from algpt2.errors import NonFiniteError, UserError
from algpt2.modeling_tf_algpt2 import TFALGPT2LMHeadModel
from algpt2.options import OptimOptions, TFTrainOptions
from algpt2.training_tf import (
    Processes,
    RowInputs,
    Trainer,
    build_optimizer,
    build_step,
    evaluate,
    load_state_tensors,
    state_tensors,
    step_seed,
    train_step,
    train_steps,
)

pytestmark = pytest.mark.numeric

OPTIMIZERS = ["AdamW", "Adafactor", "Muon", "SGD"]
CPU = Processes(0, 1, tf.distribute.get_strategy(), "float32")
CONFIG = {
    "vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2,
    "embedding_size": 16, "bos_token_id": 49, "eos_token_id": 49,
}  # fmt: skip


class Rows:
    """Random rows (n, 17) with what a trainer reads of the manifest."""

    def __init__(self, n=24, seq_len=16):
        self.tokens = np.random.default_rng(0).integers(0, 50, (n, seq_len + 1)).astype(np.uint16)
        self.manifest = type("Manifest", (), {"seq_len": seq_len})

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, ids):
        return self.tokens[ids]


def make_trainer(dropout=0.0, rows=None, config=CONFIG, n_steps=100, **optim):
    more = {key: optim.pop(key) for key in ("steps_per_call", "compile") if key in optim}
    flags = {"lr": 1e-2, "batch_size": 4, "lr_schedule": "constant"} | optim
    options = TFTrainOptions(optim=OptimOptions(**flags), **more)
    rates = dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], dropout)
    model = TFALGPT2LMHeadModel(ALGPT2Config(**(config | rates)))
    optimizer = build_optimizer(model, options.optim, options.optim.lr)
    inputs = RowInputs(rows or Rows(), options, CPU)
    return Trainer(model, optimizer, options, CPU, inputs, n_steps=n_steps)


def weights(trainer):
    return {name: v.numpy() for name, v in trainer.model.named_parameters().items()}


def moments(trainer):
    """Means of gradients and of their squares; Adafactor's exp_avg is a mean of updates, which
    amplify the rounding of small gradients."""
    state = state_tensors(trainer.model, trainer.optimizer)
    of_updates = "/exp_avg" if isinstance(trainer.optimizer, optimizers_tf.Adafactor) else "none"
    return {name: array for name, array in state.items() if not name.endswith(of_updates)}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_golden_losses():
    trainer = make_trainer(rows=golden.Rows(), config=golden.CONFIG, n_steps=10, **golden.OPTIM)
    parameters = trainer.model.named_parameters()
    arrays = golden.weights({name: tuple(v.shape) for name, v in parameters.items()})
    trainer.model.load_state_dict(arrays)
    found = [train_step(trainer)[0] for _ in range(10)]
    assert found == pytest.approx(golden.losses(), rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_survives_a_round_trip_and_training_repeats_bit_for_bit(optimizer):
    straight = make_trainer(dropout=0.1, optimizer=optimizer)
    losses = [train_step(straight)[0] for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(50), abs=0.2)
    resumed = make_trainer(dropout=0.1, optimizer=optimizer)
    resumed.model.load_state_dict(straight.model.state_dict())
    state = state_tensors(straight.model, straight.optimizer)
    load_state_tensors(resumed.model, resumed.optimizer, state, 3)
    resumed.step = 3
    for _ in range(3):
        assert train_step(straight) == train_step(resumed)
    assert_equal(weights(straight), weights(resumed))
    assert_equal(*(state_tensors(t.model, t.optimizer) for t in (straight, resumed)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_learns(optimizer):
    trainer = make_trainer(optimizer=optimizer, lr=0.5 if optimizer == "SGD" else 1e-2)
    losses = [train_step(trainer)[0] for _ in range(20)]
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
        last = train_step(single)
    train_steps(several, 3)  # calls need not be whole
    assert train_steps(several, 4) == pytest.approx(last, rel=1e-6)
    assert single.step == several.step == 7
    assert max(distances(moments(several), moments(single)).values()) < sum_tolerance(4 * 16)


def test_accumulation_equals_one_large_batch():
    sgd = {"optimizer": "SGD", "lr": 0.5, "weight_decay": 0.0, "max_grad_norm": 0}
    whole = make_trainer(batch_size=8, grad_steps=1, **sgd)
    parts = make_trainer(batch_size=2, grad_steps=4, **sgd)
    tolerance = sum_tolerance(8 * 16)  # tokens whose gradients both add up, in another order
    assert train_step(parts) == pytest.approx(train_step(whole), rel=tolerance)
    # The momentum after the first step is the gradient.
    assert max(distances(moments(parts), moments(whole)).values()) < tolerance
    for _ in range(4):
        assert train_step(parts) == pytest.approx(train_step(whole), rel=tolerance)


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
        assert (float(loss), float(norm)) == pytest.approx(train_step(plain), rel=tolerance)
    assert max(distances(moments(trainer), moments(plain)).values()) < tolerance


def test_a_pass_that_no_memory_holds_is_refused_with_one_that_fits(monkeypatch):
    trainer = make_trainer(batch_size=12, grad_steps=2, config=CONFIG | {"n_layer": 3})
    row_bytes = 3 * 2 * 16**2 * 4  # layers, heads, tokens squared, float32
    arguments = (trainer.model, trainer.options, 16, CPU)
    monkeypatch.setattr(training_tf, "memory_bytes", lambda: 12 * row_bytes)
    training_tf.check_pass_fits(*arguments)
    monkeypatch.setattr(training_tf, "memory_bytes", lambda: 11 * row_bytes)
    with pytest.raises(UserError, match=r"in parts: --batch_size 4 --grad_steps 6$"):
        training_tf.check_pass_fits(*arguments)
    trainer.model.loss_rows += 1  # on an accelerator
    training_tf.check_pass_fits(*arguments)


def test_compile_is_the_same_step():
    plain, compiled = make_trainer(), make_trainer(compile=True)
    for _ in range(2):
        assert train_step(plain) == pytest.approx(train_step(compiled), rel=1e-5)


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


def test_muon_takes_hidden_matrices():
    trainer = make_trainer(optimizer="Muon", weight_decay=0.0)
    state = state_tensors(trainer.model, trainer.optimizer)
    assert {key.rpartition("/")[0] for key in state if key.endswith("momentum_buffer")} == {
        "transformer.projection_layer.weight", "dense.weight",
        "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight",
    }  # fmt: skip
    before = weights(trainer)["dense.weight"]
    train_step(trainer)
    update = (weights(trainer)["dense.weight"] - before) / (1e-2 * 0.2 * math.sqrt(32))
    singular_values = np.linalg.svd(update, compute_uv=False)
    assert 0.5 < singular_values.min() and singular_values.max() < 1.5


@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bad_numbers_stop_before_the_update(optimizer, steps_per_call):
    trainer = make_trainer(optimizer=optimizer, steps_per_call=steps_per_call)
    train_steps(trainer, 2)
    bias = trainer.model.transformer.ln_f.bias
    bias.assign(np.where(np.arange(32) == 0, np.nan, bias.numpy()))
    before = weights(trainer)
    with pytest.raises(NonFiniteError, match="step 3"):
        train_steps(trainer, 4)
    assert trainer.step == 2
    for name, weight in weights(trainer).items():
        np.testing.assert_array_equal(weight, before[name], err_msg=name)


def test_gradients_are_clipped_to_the_norm():
    trainer = make_trainer(optimizer="SGD", momentum=0.0, weight_decay=0.0, max_grad_norm=1e-3)
    before = weights(trainer)
    _, norm = train_step(trainer)
    assert norm > 1e-3
    moved = sum(((weights(trainer)[name] - w) ** 2).sum() for name, w in before.items()) ** 0.5
    assert moved == pytest.approx(1e-3 * trainer.options.optim.lr, rel=1e-2)


def test_evaluation_counts_each_token_once():
    trainer, rows = make_trainer(dropout=0.5), Rows(n=7)
    tokens = tf.constant(rows.tokens.astype(np.int32))
    logits = trainer.model(tokens[:, :-1]).logits
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tokens[:, 1:], logits)
    expected = np.mean(losses, dtype=np.float64)
    for batch_size in (1, 3, 7, 20):  # the last batch is shorter: means of batches would differ
        done = []
        found = evaluate(trainer.model, rows, CPU, batch_size, tick=done.append)
        assert found == pytest.approx(expected, rel=1e-6)
        assert sum(done) == 7
    two = Rows(n=7)
    two.tokens = rows.tokens[[0, 6]]
    first_and_last = evaluate(trainer.model, rows, CPU, 4, n_rows=2)
    assert first_and_last == pytest.approx(evaluate(trainer.model, two, CPU, 4), rel=1e-6)


def test_dropout_depends_on_seed_and_step():
    seeds = {tuple(step_seed(*key)) for key in ((0, 0), (1, 0), (0, 1), (0, 0))}
    assert len(seeds) == 3
    losses = [train_step(make_trainer(dropout=0.5, seed=seed))[0] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
