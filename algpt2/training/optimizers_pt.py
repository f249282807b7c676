"""The optimizers of PyTorch, and their state under names that both frameworks read."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..options import OptimOptions
from .schedules import IN_BLOCK


class Optimizers:
    """The optimizers of one model (Muon updates the matrices inside blocks, an AdamW the rest)."""

    def __init__(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], peak_lr: float
    ) -> None:
        self.optimizers, self.peak_lr = optimizers, peak_lr
        self.names = {parameter: name for name, parameter in model.named_parameters()}

    def set_lr(self, factor: float) -> None:
        """Learning rate of the coming step: `factor` times the peak."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.peak_lr * factor

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Divide the gradients by the scale of the loss."""
        for optimizer in self.optimizers:
            scaler.unscale_(optimizer)

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Update the parameters; the gradients stay until the next step clears them."""
        with Float32NewtonSchulz():
            for optimizer in self.optimizers:
                scaler.step(optimizer)
        scaler.update()

    @property
    def judges_on_device(self) -> bool:
        """Whether `step_unless` works: fused AdamW alone can leave an update out by itself."""
        return all(isinstance(optimizer, torch.optim.AdamW) for optimizer in self.optimizers)

    def step_unless(self, bad: Tensor, divisor: Tensor | None) -> None:
        """Update the parameters if `bad` is 0; the host reads nothing.

        Args:
            bad: float32 scalar, 0 or 1. At 1 weights, moments and step counts stay as they are.
            divisor: of the gradients, float32 scalar; None: 1.
        """
        for optimizer in self.optimizers:
            # torch's GradScaler gives these two to a fused optimizer in the same way.
            optimizer.found_inf, optimizer.grad_scale = bad, divisor
            optimizer.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as `{parameter name}/{slot}`; Python numbers become float64 scalars."""
        tensors = {}
        for optimizer in self.optimizers:
            for parameter, slots in optimizer.state.items():
                for slot, value in slots.items():
                    if value is not None:
                        tensors[f"{self.names[parameter]}/{slot}"] = torch.as_tensor(
                            value, dtype=None if torch.is_tensor(value) else torch.float64
                        ).contiguous()
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state_tensors`.

        Raises:
            UserError: a tensor belongs to no parameter of the model, or one is missing.
        """
        parameters = {name: parameter for parameter, name in self.names.items()}
        owner = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for key, value in tensors.items():
            name, _, slot = key.rpartition("/")
            if name not in parameters:
                raise UserError(f"the optimizer state is of another model: it has {key}")
            parameter = parameters[name]
            check_state(key, value, parameter.shape)
            if value.dim() == 0 and value.dtype == torch.float64:
                number = value.item()
                owner[parameter].state[parameter][slot] = int(number) if slot == "step" else number
            else:
                owner[parameter].state[parameter][slot] = value.clone()
        for parameter, optimizer in owner.items() if tensors else ():
            if lacks := required_slots(optimizer, parameter) - optimizer.state[parameter].keys():
                raise UserError(
                    "the optimizer state is of another model or optimizer: it lacks "
                    f"{self.names[parameter]}/{min(lacks)}"
                )


def required_slots(optimizer: torch.optim.Optimizer, parameter: Tensor) -> set[str]:
    """What the optimizer's next step reads of the state of a parameter that has had one."""
    options = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step", "exp_avg", "exp_avg_sq"}
    if isinstance(optimizer, torch.optim.SGD | torch.optim.Muon):
        return {"momentum_buffer"} if options["momentum"] else set()
    squares = {"exp_avg_sq_row", "exp_avg_sq_col"} if parameter.dim() > 1 else {"exp_avg_sq"}
    return squares | {"step"} | ({"exp_avg"} if options["beta1"] is not None else set())


def check_state(key: str, value: Tensor, shape: torch.Size) -> None:
    """`UserError` unless a tensor of optimizer state fits a weight of `shape`: of the same shape,
    or a factor of Adafactor's, or a number."""
    factors = shape, shape[:-1], shape[:-2] + shape[-1:], torch.Size()
    if value.shape not in factors or not value.is_floating_point() or not value.isfinite().all():
        raise UserError(
            f"the optimizer state is damaged or of another model: {key} holds "
            f"{value.dtype} {tuple(value.shape)} for a weight {tuple(shape)}"
        )


class Float32NewtonSchulz(torch.overrides.TorchFunctionMode):
    """torch.optim.Muon orthogonalizes in bfloat16: on a CPU 100 times slower than float32."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is Tensor.bfloat16 and args[0].device.type == "cpu":
            return args[0].float()
        return function(*args, **(kwargs or {}))


def build_optimizer(model: nn.Module, optim: OptimOptions, lr: float) -> Optimizers:
    """The optimizer(s) of `--optimizer`; weight decay on matrices only.

    Sources: AdamW arXiv:1711.05101, Adafactor arXiv:1804.04235 (with an explicit learning rate
    and, unlike torch's, a first moment), Muon arXiv:2502.16982 (updates scaled to AdamW's RMS, so
    that one learning rate serves both; what is outside blocks, biases and norms take AdamW).
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decay, decay_none = optim.weight_decay, 0.0

    def groups(names: Iterable[str]) -> list[dict[str, Any]]:
        matrices = [parameters[name] for name in names if parameters[name].dim() >= 2]
        vectors = [parameters[name] for name in names if parameters[name].dim() < 2]
        both = [(matrices, decay), (vectors, decay_none)]
        return [{"params": ps, "weight_decay": weight_decay} for ps, weight_decay in both if ps]

    def adamw(names: Iterable[str]) -> torch.optim.Optimizer:
        betas = (optim.beta1, optim.beta2)
        return torch.optim.AdamW(groups(names), lr=lr, betas=betas, fused=True)

    if optim.optimizer == "AdamW":
        optimizers = [adamw(list(parameters))]
    elif optim.optimizer == "SGD":
        optimizers = [torch.optim.SGD(groups(list(parameters)), lr=lr, momentum=optim.momentum)]
    elif optim.optimizer == "Adafactor":
        from transformers import Adafactor

        optimizers = [
            Adafactor(groups(list(parameters)), lr=lr, beta1=optim.beta1 or None,
                      scale_parameter=optim.relative_update_scale, relative_step=False)
        ]  # fmt: skip
    else:
        hidden = [n for n, p in parameters.items() if p.dim() == 2 and re.search(IN_BLOCK, n)]
        muon = torch.optim.Muon(
            [parameters[name] for name in hidden], lr=lr, weight_decay=decay,
            momentum=optim.momentum, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        optimizers = [muon, adamw([name for name in parameters if name not in hidden])]
    return Optimizers(model, optimizers, lr)
