"""Training in PyTorch; trainer_tf.py is the same text in TensorFlow, loop.py what both share."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration_algpt2 import MAX_LAYERS, ALGPT2Config
from ..errors import UserError, describe
from ..evaluation.sampling_pt import sample_texts
from ..export.convert_pt import load_weights, start_model
from ..modeling_algpt2 import ALGPT2LMHeadModel
from ..options import TrainOptions
from ..runs.run import peak_lr
from ..runs.start import Start
from ..shards.batches import evenly_spaced
from ..shards.tfrecords import PackedRows
from ..system.console import log
from ..system.memory import check_memory
from ..system.processes_pt import Processes, compiles
from . import loop
from .optimizers_pt import Optimizers, build_optimizer

# A gradient that overflows here, after 30 halvings of the scaler's, is infinite at any scale.
MIN_LOSS_SCALE = 1e-4

# A read of the loss lets the GPU wait for the host to start the next step.
STEPS_PER_CALL_CUDA = 10


# --- model ---------------------------------------------------------------------------------------


def build_model(start: Start) -> nn.Module:
    """The model of `--config` with random weights or the start that `--init_from` gives, or that
    of `--checkpoint`, in float32 on the CPU.

    Raises:
        UserError: unknown config or checkpoint, vocabulary or seq_len that does not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, options, tokenizer = start.source, start.options, start.tokenizer
    try:
        config = AutoConfig.from_pretrained(source)
        start.check_fits(config.to_dict())
        check_memory(count_parameters(config))
        if start.loads_weights:
            model = load_weights(AutoModelForCausalLM, source)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if start.init_from:
            start_model(model, start.init_from, options.init_blocks or ("mean",))
        if tokenizer.vocab_size > model.config.vocab_size:
            add_embeddings(model, tokenizer.vocab_size)
        start.set_token_ids(model.config, getattr(model, "generation_config", None))
    except UserError:
        raise
    except Exception as error:  # a damaged file can make transformers raise anything
        raise UserError(
            f"cannot load a causal language model from {source}: {describe(error)[:500]}"
        ) from error
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def count_parameters(config: Any) -> int:
    """Parameters of the model that a configuration describes, without making it."""
    from transformers import AutoModelForCausalLM, GPT2Config

    if isinstance(config, GPT2Config):
        groups = getattr(config, "num_hidden_groups", config.n_layer)
        keys = {**config.to_dict(), "model_type": "algpt2", "num_hidden_groups": groups}
        return ALGPT2Config.from_dict(keys).stored_parameters()
    if (config.num_hidden_layers or 0) > MAX_LAYERS:
        raise UserError(f"{config.num_hidden_layers} layers: expected at most {MAX_LAYERS:,}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


@torch.no_grad()
def add_embeddings(model: nn.Module, vocab_size: int) -> None:
    """Rows for new control codes in both token tables: the mean of those that are there."""
    n_before = model.config.vocab_size
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight[n_before:] = table.weight[:n_before].mean(0)


def compile_blocks(model: nn.Module) -> None:
    """Compile each stored block for training; the model keeps its class, and so its chunked loss.

    The blocks are of one class and shape, so one graph serves all layers. Evaluation and samples
    run the blocks as they are: their shapes change, and each new shape would compile again.
    """
    # A graph break in a block of ours is a defect; other models may have them.
    fullgraph = isinstance(model, ALGPT2LMHeadModel)
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for block in blocks or [model]:
        block.forward = _compiled_in_training(block, fullgraph)


def _compiled_in_training(block: nn.Module, fullgraph: bool) -> Callable[..., Any]:
    """The forward pass of `block`, compiled while `block.training`."""
    eager = block.forward
    compiled = torch.compile(eager, fullgraph=fullgraph)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training else eager)(*args, **kwargs)

    return forward


# --- loss ----------------------------------------------------------------------------------------


def mean_loss(model: nn.Module, rows: np.ndarray, device: torch.device) -> Tensor:
    """Mean cross-entropy in nats of the tokens of `rows`.

    Args:
        rows: (B, T + 1) token ids; position t predicts token t + 1.
    """
    tokens = torch.from_numpy(rows.astype(np.int64))
    if device.type == "cuda":  # from other memory the host would wait for the copy
        tokens = tokens.pin_memory()
    tokens = tokens.to(device, non_blocking=True)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    if isinstance(bare(model), ALGPT2LMHeadModel):
        return model(inputs, shift_labels=labels, skip_logits=True, use_cache=False).loss
    logits = model(inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of several processes and of `torch.compile`."""
    for name in ("module", "_orig_mod"):
        model = getattr(model, name, model)
    return model


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout from (seed, step, process): nothing random has to be saved or restored."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))


@torch.no_grad()
def evaluate(
    model: nn.Module, rows: PackedRows, processes: Processes, batch_size: int,
    n_rows: int | None = None, check: Callable[[], None] = lambda: None,
) -> float:  # fmt: skip
    """Mean loss in nats over every token of the rows, each counted once.

    Args:
        n_rows: evaluate only this many rows, evenly spaced.
        check: called before each batch, on all processes; it may raise.
    """
    ids = evenly_spaced(len(rows), n_rows)
    was_training = model.training
    model.eval()
    mine = ids[processes.rank :: processes.count]
    size = max(1, batch_size // processes.count)
    wide = torch.float32 if processes.device.type == "mps" else torch.float64  # mps has no float64
    total = torch.zeros((), device=processes.device, dtype=wide)
    for start in range(0, math.ceil(len(ids) / processes.count), size):
        check()
        batch = rows[mine[start : start + size]]
        if len(batch):  # the last batch of some processes may be none
            with processes.autocast():
                total += mean_loss(model, batch, processes.device).to(wide) * len(batch)
    model.train(was_training)
    return (processes.mean(total) * processes.count / len(ids)).item()


# --- trainer -------------------------------------------------------------------------------------


class Trainer(loop.Trainer):
    """A PyTorch model in training: on one device, or on one device of each process."""

    evaluate, sample_texts = staticmethod(evaluate), staticmethod(sample_texts)
    load_tensors, save_tensors = staticmethod(load_file), staticmethod(save_file)

    optimizer: Optimizers
    processes: Processes

    def __post_init__(self) -> None:
        super().__post_init__()
        self.compiles = compiles(self.options, self.processes.device)
        if self.compiles:
            compile_blocks(self.model)
        # The model as it is called; `self.model` is the bare one.
        self.wrapped = self.model
        if self.processes.count > 1:
            # A view saves a copy of all gradients.
            self.wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        is_fp16 = self.processes.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=is_fp16)
        self.max_norm = self.options.optim.max_grad_norm or math.inf
        on_cuda = self.processes.device.type == "cuda"
        self.steps_per_call = self.options.steps_per_call or (STEPS_PER_CALL_CUDA if on_cuda else 1)

    @staticmethod
    def build_parts(
        options: TrainOptions, start: Start, processes: Processes
    ) -> tuple[nn.Module, Optimizers]:
        torch.manual_seed(options.optim.seed)
        model = build_model(start).to(processes.device)
        lr = peak_lr(options.optim, options.model)
        return model, build_optimizer(model, options.optim, lr)

    @property
    def judges_on_device(self) -> bool:
        """Whether the host may start a step before it has read the one before. It may not with a
        loss scale or `--skip_outliers`, whose limits follow from what it reads."""
        host_decides = self.scaler.is_enabled() or self.guard.z is not None
        return self.optimizer.judges_on_device and not host_decides

    def forward_backward(self, step: int) -> Tensor:
        """Forward and backward passes of `step`: mean loss over all processes, on the device."""
        optim, processes = self.options.optim, self.processes
        seed_step(optim.seed, step, processes.rank)
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        # The last pass of a step averages the gradients of all processes.
        total = torch.zeros((), device=processes.device)
        for i, rows in enumerate(self.inputs.batches(step)):
            is_last = i == optim.grad_steps - 1 or processes.count == 1
            with contextlib.nullcontext() if is_last else self.wrapped.no_sync():
                with processes.autocast():
                    loss = mean_loss(self.wrapped, rows, processes.device) / optim.grad_steps
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def judged_by_host(self) -> tuple[float, float]:
        """A step whose update waits until the host has read loss and gradient norm."""
        total = self.forward_backward(self.step)
        self.optimizer.unscale(self.scaler)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        loss, norm = self.processes.mean(torch.stack([total, norm.to(total)])).tolist()
        if self.allows(loss, norm):
            self.optimizer.set_lr(self.lr_factor(self.step))
            self.optimizer.step(self.scaler)
        else:
            self.scaler.update()
        self.step += 1
        return loss, norm

    def judged_by_device(self, n: int) -> tuple[float, float]:
        """`n` steps that the host starts one after another and then reads at once.

        Behind a step that is not finite no update follows: the weights are those before it.
        """
        bad, results = torch.zeros((), device=self.processes.device), []
        for step in range(self.step, self.step + n):
            total = self.forward_backward(step)
            divisor = None
            if self.processes.device.type == "cuda":  # saves a pass over the gradients
                gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                norm = nn.utils.get_total_norm(gradients)
                divisor = ((norm + 1e-6) / self.max_norm).clamp(min=1.0)
            else:
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
            results.append(self.processes.mean(torch.stack([total, norm.to(total)])))
            bad = torch.maximum(bad, 1 - results[-1].isfinite().all().float())
            self.optimizer.set_lr(self.lr_factor(step))
            self.optimizer.step_unless(bad, divisor)
        for loss, norm in torch.stack(results).tolist():
            is_finite = math.isfinite(loss) and math.isfinite(norm)
            self.guard.record(self.step + 1, loss, norm, is_finite, self.hint)
            self.step += 1
        return loss, norm

    def allows(self, loss: float, norm: float) -> bool:
        """Whether the coming step may update the weights: see `StepGuard`."""
        # With a scaler an infinite norm is an overflow: no update, and a smaller scale from now on.
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
        if overflow and self.scaler.get_scale() >= MIN_LOSS_SCALE:
            return False
        allowed = self.guard.allows(loss, norm)
        self.guard.record(self.step + 1, loss, norm, allowed, self.hint)
        return allowed

    def train_steps(self, n: int) -> tuple[float, float]:
        """Take `n` optimizer steps; loss and gradient norm of the last."""
        start_s = time.monotonic()
        if self.judges_on_device:
            loss, norm = self.judged_by_device(n)
        else:
            for _ in range(n):
                loss, norm = self.judged_by_host()
        if self.compiles:
            s = time.monotonic() - start_s
            log(f"compiled: the first {n} steps took {s:.0f} s; --no_compile starts at once")
            self.compiles = False
        return loss, norm

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, p in self.model.named_parameters():
            self.stop.check()
            yield f"weights/{name}", p.detach().float().cpu().numpy()
            if p.grad is not None:
                yield f"gradients/{name}", p.grad.float().cpu().numpy()

    def is_finite(self, tensor: Tensor) -> bool:
        return bool(torch.isfinite(tensor).all())

    def state_tensors(self) -> dict[str, Tensor]:
        return self.optimizer.state_tensors()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.optimizer.load_state_tensors(tensors)

    def training_state(self) -> dict[str, Any]:
        return super().training_state() | {"scaler": self.scaler.state_dict()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        super().load_training_state(state)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
