"""Keras' optimizers with PyTorch's updates, so that a run can move between the two frameworks.

Each class says where Keras differs. All decay matrices only. The training step calls `update_step`
in every replica, with gradients that it has reduced and clipped; Keras' `apply` would reduce them
again. `slots` are the states under PyTorch's names: a list over the variables, None where a
variable lacks the state.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ..errors import UserError
from ..modeling_tf_algpt2 import TFALGPT2LMHeadModel
from ..options import OptimOptions
from .schedules import IN_BLOCK


def decay_matrix(variable: Any, amount: tf.Tensor) -> None:
    """Shrink a matrix by the factor 1 - `amount` (learning rate times decay); skip vectors."""
    if len(variable.shape) >= 2:
        variable.assign(variable * (1 - amount))


def apply_adam(
    variable: Any, m: Any, v: Any, gradient: tf.Tensor, lr: tf.Tensor, step: tf.Tensor,
    betas: tuple[float, float], epsilon: float,
) -> None:  # fmt: skip
    """Adam's update (arXiv:1412.6980) in one kernel instead of one for each operation.

    Args:
        m, v: first and second moment.
        step: number of this update, from 1.
    """
    powers = [tf.pow(tf.constant(beta, tf.float32), tf.cast(step, tf.float32)) for beta in betas]
    # TensorFlow adds epsilon before the bias correction of the second moment, PyTorch after it.
    epsilon = epsilon * tf.sqrt(1 - powers[1])
    tf.raw_ops.ResourceApplyAdam(
        var=variable.handle, m=m.value.handle, v=v.value.handle, beta1_power=powers[0],
        beta2_power=powers[1], lr=lr, beta1=betas[0], beta2=betas[1], epsilon=epsilon,
        grad=gradient,
    )  # fmt: skip


class AdamW(keras.optimizers.AdamW):
    """arXiv:1711.05101. Keras adds epsilon before the bias correction, PyTorch after it."""

    @property
    def slots(self) -> dict[str, list[Any]]:
        return {"exp_avg": self._momentums, "exp_avg_sq": self._velocities}

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: tf.Tensor) -> None:
        i = self._get_variable_index(variable)
        decay_matrix(variable, learning_rate * self.weight_decay)
        apply_adam(
            variable, self._momentums[i], self._velocities[i], gradient, learning_rate,
            self.iterations + 1, (self.beta_1, self.beta_2), self.epsilon,
        )  # fmt: skip


class SGD(keras.optimizers.SGD):
    """PyTorch's buffer sums gradients, Keras' sums steps; the decay is L2, in the gradient."""

    @property
    def slots(self) -> dict[str, list[Any]]:
        return {"momentum_buffer": self.momentums} if self.momentum else {}

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: tf.Tensor) -> None:
        if len(variable.shape) >= 2:
            gradient += self.weight_decay * variable
        if self.momentum:
            buffer = self.momentums[self._get_variable_index(variable)]
            gradient += self.momentum * buffer
            self.assign(buffer, gradient)
        self.assign_sub(variable, learning_rate * gradient)


class Muon(keras.optimizers.Muon):
    """Muon (arXiv:2502.16982) updates the matrices inside blocks; AdamW what is outside, biases and
    norms.

    PyTorch's momentum is a mean of gradients, Keras' a sum; both give the same direction.
    """

    @property
    def slots(self) -> dict[str, list[Any]]:
        """`momentum_buffer` where Muon updates, AdamW's two moments elsewhere."""
        by_muon = [v is None for v in self.adam_velocities]
        return {
            "momentum_buffer": self._where(by_muon, self.momentums),
            "exp_avg": self._where([not x for x in by_muon], self.momentums),
            "exp_avg_sq": self.adam_velocities,
        }

    @staticmethod
    def _where(flags: list[bool], variables: list[Any]) -> list[Any]:
        return [v if flag else None for flag, v in zip(flags, variables, strict=True)]

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: tf.Tensor) -> None:
        i = self._get_variable_index(variable)
        decay_matrix(variable, learning_rate * self.weight_decay)
        buffer, velocity = self.momentums[i], self.adam_velocities[i]
        if velocity is not None:
            betas = (self.adam_beta_1, self.adam_beta_2)
            step = self.iterations + 1
            apply_adam(
                variable, buffer, velocity, gradient, learning_rate, step, betas, self.epsilon
            )
            return
        share = (1 - self.momentum) * gradient
        mean = self.momentum * buffer + share
        self.assign(buffer, mean)
        nesterov = self.momentum * mean + share
        update = self.zeropower_via_newtonschulz5(nesterov, self.ns_steps)
        self.assign_sub(variable, self.lr_adjust(learning_rate * update))


class Adafactor(keras.optimizers.Optimizer):
    """Adafactor (arXiv:1804.04235) with a first moment, which Keras' lacks.

    A matrix keeps its second moment as row and column means, a vector in full.

    Args:
        beta_1: decay of the first moment; 0: without a first moment.
        relative_scale: multiply the learning rate by the RMS of each weight.
    """

    def __init__(
        self, learning_rate: float, weight_decay: float, beta_1: float, relative_scale: bool
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay)
        self.beta_1, self.relative_scale = beta_1, relative_scale

    def build(self, variables: list[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        self._slots: dict[str, list[Any]] = {
            "exp_avg": [], "exp_avg_sq_row": [], "exp_avg_sq_col": [], "exp_avg_sq": [],
        }  # fmt: skip
        for variable in variables:
            shape, name = tuple(variable.shape), variable.name
            is_matrix = len(shape) >= 2
            shapes = {
                "exp_avg": shape if self.beta_1 else None,
                "exp_avg_sq_row": shape[:-1] if is_matrix else None,
                "exp_avg_sq_col": (*shape[:-2], shape[-1]) if is_matrix else None,
                "exp_avg_sq": None if is_matrix else shape,
            }
            for slot, size in shapes.items():
                state = None if size is None else self.add_variable(size, name=f"{name}.{slot}")
                self._slots[slot].append(state)

    @property
    def slots(self) -> dict[str, list[Any]]:
        return self._slots

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: tf.Tensor) -> None:
        i = self._get_variable_index(variable)
        mean, row, column, full = (variables[i] for variables in self._slots.values())
        lr = learning_rate
        if self.relative_scale:
            lr *= tf.maximum(1e-3, rms(variable))
        keep = 1 - tf.pow(tf.cast(self.iterations + 1, tf.float32), -0.8)
        square = gradient * gradient + 1e-30
        if row is not None:
            rows = keep * row + (1 - keep) * tf.reduce_mean(square, -1)
            columns = keep * column + (1 - keep) * tf.reduce_mean(square, -2)
            self.assign(row, rows)
            self.assign(column, columns)
            shares = rows / tf.reduce_mean(rows, -1, keepdims=True)
            update = gradient * tf.math.rsqrt(shares)[..., None]
            update *= tf.math.rsqrt(columns)[..., None, :]
        else:
            squares = keep * full + (1 - keep) * square
            self.assign(full, squares)
            update = gradient * tf.math.rsqrt(squares)
        update *= lr / tf.maximum(1.0, rms(update))
        if mean is not None:
            update = self.beta_1 * mean + (1 - self.beta_1) * update
            self.assign(mean, update)
        decay_matrix(variable, lr * self.weight_decay)
        self.assign_sub(variable, update)


def rms(x: Any) -> tf.Tensor:
    """Root mean square, a scalar."""
    return tf.sqrt(tf.reduce_mean(tf.square(x)))


def build_optimizer(model: TFALGPT2LMHeadModel, optim: OptimOptions, lr: float) -> Any:
    """The optimizer of `--optimizer`; weight decay on matrices only (sources: above)."""
    if optim.optimizer == "AdamW":
        optimizer = AdamW(
            lr, weight_decay=optim.weight_decay, beta_1=optim.beta1, beta_2=optim.beta2,
            epsilon=1e-8,
        )  # fmt: skip
    elif optim.optimizer == "SGD":
        optimizer = SGD(lr, momentum=float(optim.momentum), weight_decay=optim.weight_decay)
    elif optim.optimizer == "Adafactor":
        optimizer = Adafactor(lr, optim.weight_decay, optim.beta1, optim.relative_update_scale)
    else:
        optimizer = Muon(
            lr, weight_decay=optim.weight_decay, momentum=optim.momentum, adam_beta_1=optim.beta1,
            adam_beta_2=optim.beta2, epsilon=1e-8, exclude_layers=[rf"^(?!.*{IN_BLOCK})"],
        )  # fmt: skip
    optimizer.build(model.trainable_variables)
    return optimizer


def state_tensors(model: TFALGPT2LMHeadModel, optimizer: Any) -> dict[str, np.ndarray]:
    """The optimizer's state as `{parameter name}/{slot}`, as optimizers_pt.py names it."""
    # PyTorch's AdamW counts steps in float32, transformers' Adafactor in a Python number.
    is_adafactor = isinstance(optimizer, Adafactor)
    step = np.array(optimizer.iterations.numpy(), np.float64 if is_adafactor else np.float32)
    tensors = {}
    for i, name in enumerate(model.named_parameters()):
        slots = {s: v[i] for s, v in optimizer.slots.items() if v[i] is not None}
        tensors |= {f"{name}/{slot}": variable.numpy() for slot, variable in slots.items()}
        if slots and "momentum_buffer" not in slots:
            tensors[f"{name}/step"] = step
    return tensors


def load_state_tensors(
    model: TFALGPT2LMHeadModel, optimizer: Any, tensors: dict[str, np.ndarray], step: int
) -> None:
    """Inverse of `state_tensors`.

    Args:
        step: of the run; the optimizer's own, which skipped steps are not in, goes before it.
    Raises:
        UserError: a tensor belongs to no parameter of the model, or a state is missing.
    """
    counted = [int(value) for key, value in tensors.items() if key.endswith("/step")]
    optimizer.iterations.assign(max(counted, default=step))
    left = {key for key in tensors if not key.endswith(("/step", "/RMS"))}
    for i, name in enumerate(model.named_parameters()):
        for slot, variables in optimizer.slots.items():
            key = f"{name}/{slot}"
            if variables[i] is not None:
                if key not in left:
                    raise UserError(f"the optimizer state is of another optimizer: it has no {key}")
                if tensors[key].shape != tuple(variables[i].shape):
                    raise UserError(
                        f"the optimizer state is of another model: {key} is of shape "
                        f"{tensors[key].shape}, expected {tuple(variables[i].shape)}"
                    )
                variables[i].assign(tensors[key])
                left.remove(key)
    if left:
        raise UserError(f"the optimizer state is of another model: it has {min(left)}")
