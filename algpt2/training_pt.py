"""Training in PyTorch, in the order of a run: processes, model, optimizer, step, evaluation, fit.

Everything random is a function of (seed, step, process) and every position in the data one of the
step, so a checkpoint is weights, optimizer state and a step number.
"""

import atexit
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .batches import global_rows, process_rows
from .checkpoints import Checkpoint, prune_checkpoints, write_checkpoint
from .configuration_algpt2 import MAX_LAYERS, ALGPT2Config
from .console import torchrun_number, torchrun_process
from .convert_pt import start_model
from .errors import UserError, describe
from .guard import Hint, StepGuard, check_finite
from .loop import (
    Hooks,
    Metrics,
    StopRequest,
    check_cut,
    check_stop,
    last_checkpoint,
    run_loop,
    step_lr_factor,
)
from .memory import check_memory, keep_freed_memory
from .mirror import checkpoint_here, copy_or_warn
from .modeling_algpt2 import ALGPT2LMHeadModel
from .options import ModelOptions, OptimOptions, TrainOptions
from .remote import local_folder
from .report import RunReport
from .runs import check_model_fits, peak_lr, source_folder, text_totals
from .sampling_pt import sample_texts
from .scoring import text_metrics
from .tfrecords import PackedRows
from .tokenization_algpt2 import TextTokenizer

OPTIMIZER_FILE = "optimizer.safetensors"
# A gradient that overflows here, after 30 halvings of the scaler's, is infinite at any scale.
MIN_LOSS_SCALE = 1e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- processes and devices -----------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """This process among those that train together, its device and its number format."""

    rank: int
    count: int
    device: torch.device
    dtype: torch.dtype

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over all processes."""
        if self.count > 1:
            dist.all_reduce(value)
            value /= self.count
        return value

    def any(self, flag: bool) -> bool:
        """True on every process as soon as it is on one."""
        if self.count == 1:
            return flag
        return self.mean(torch.tensor(float(flag), device=self.device)).item() > 0

    def on_main(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on process 0, on every process."""
        values = [function() if self.rank == 0 else None]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Process 0 runs the body before the others: it packs, they find what it packed."""
        if self.count > 1 and self.rank > 0:
            dist.barrier()
        yield
        if self.count > 1 and self.rank == 0:
            dist.barrier()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context in which matrix products run in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def start_processes(options: TrainOptions) -> Processes:
    """Join the processes that torchrun started (or be the only one) and choose device and dtype.

    Raises:
        UserError: the device is not there, batch_size does not divide among the processes, or the
            environment is not torchrun's.
    """
    rank, count = torchrun_process()
    if options.optim.batch_size % count:
        raise UserError(
            f"--batch_size {options.optim.batch_size} is the batch of all processes: expected a "
            f"multiple of {count} processes"
        )
    transformers.utils.logging.disable_progress_bar()  # a bar a checkpoint
    device = _device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    if count > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except ValueError as error:  # of the environment
            raise UserError(
                f"WORLD_SIZE={count}: {describe(error)}; start several processes with torchrun"
            ) from error
        # Its threads must end before the interpreter does: left alone, 2 of 40 runs aborted there.
        atexit.register(dist.destroy_process_group)
    return Processes(rank, count, device, _dtype(options.optim, device))


def _device(name: str) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        name = f"cuda:{torchrun_number('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not usable here ({reason}); try cpu") from None
    return device


def _dtype(optim: OptimOptions, device: torch.device) -> torch.dtype:
    if optim.fp16:
        return torch.float16
    if optim.precision != "auto":
        return DTYPES[optim.precision]
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32  # CPUs without AMX: bf16 is 100x slower


# --- model ---------------------------------------------------------------------------------------


def build_model(options: ModelOptions, tokenizer: TextTokenizer, seq_len: int | None) -> nn.Module:
    """The model of `--config` with random weights or the start that `--init_from` gives, or that
    of `--checkpoint`, in float32 on the CPU.

    Raises:
        UserError: unknown config or checkpoint, vocabulary or seq_len that does not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = source_folder(options) or options.checkpoint
    try:
        config = AutoConfig.from_pretrained(source)
        check_model_fits(config.to_dict(), tokenizer, seq_len, exact=not options.checkpoint)
        check_memory(count_parameters(config))
        if options.checkpoint and not options.from_scratch:
            # Never a pickle: a .bin file is refused, even where safetensors are missing.
            model, found = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            if missing := sorted(found["missing_keys"]):
                raise UserError(
                    f"the weights in {source} lack {missing[0]} ({len(missing)} in all): expected "
                    "those of its config.json"
                )
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if options.init_from:
            start_model(model, options.init_from, options.init_blocks or ("mean",))
        if tokenizer.vocab_size > model.config.vocab_size:
            add_embeddings(model, tokenizer.vocab_size)
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


# --- optimizer -----------------------------------------------------------------------------------


class Optimizers:
    """The optimizers of one model (Muon comes with an AdamW for what is no hidden matrix)."""

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

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Update the parameters; the gradients stay until the next step clears them."""
        with Float32NewtonSchulz():
            for optimizer in self.optimizers:
                scaler.step(optimizer)
        scaler.update()

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
    that one learning rate serves both; embeddings, biases and norms take AdamW).
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
        embeddings = {
            id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
        }
        hidden = [n for n, p in parameters.items() if p.dim() == 2 and id(p) not in embeddings]
        muon = torch.optim.Muon(
            [parameters[name] for name in hidden], lr=lr, weight_decay=decay,
            momentum=optim.momentum, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        optimizers = [muon, adamw([name for name in parameters if name not in hidden])]
    return Optimizers(model, optimizers, lr)


# --- one step ------------------------------------------------------------------------------------


def mean_loss(model: nn.Module, rows: np.ndarray, device: torch.device) -> Tensor:
    """Mean cross-entropy in nats of the tokens of `rows`.

    Args:
        rows: (B, T + 1) token ids; position t predicts token t + 1.
    """
    tokens = torch.from_numpy(rows.astype(np.int64)).to(device, non_blocking=True)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    if isinstance(getattr(model, "module", model), ALGPT2LMHeadModel):
        return model(inputs, shift_labels=labels, skip_logits=True).loss
    logits = model(inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


@dataclass
class Trainer:
    """A model in training: what `train_step` changes and a checkpoint holds."""

    model: nn.Module  # the bare model
    optimizers: Optimizers
    options: TrainOptions
    processes: Processes
    rows: PackedRows
    n_steps: int
    step: int = 0  # optimizer steps taken
    elapsed_s: float = 0.0  # of training, over all restarts
    saved_step: int | None = None  # its checkpoint is there and whole
    cut: Metrics | None = None  # of the last step, until it is evaluated and reported
    stop: StopRequest = field(default_factory=StopRequest)
    guard: StepGuard = field(init=False)  # judges each step before its update
    wrapped: nn.Module = field(init=False)  # the model as it is called: compiled, distributed
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.guard = StepGuard(self.options.optim.skip_outliers)
        self.wrapped = torch.compile(self.model) if self.options.compile else self.model
        if self.processes.count > 1:
            self.wrapped = DistributedDataParallel(self.wrapped)
        is_fp16 = self.processes.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=is_fp16)

    @property
    def peak_lr(self) -> float:
        """Highest learning rate of the run."""
        return self.optimizers.peak_lr

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step predicts, over all processes."""
        optim = self.options.optim
        return optim.batch_size * optim.grad_steps * self.rows.manifest.seq_len

    def micro_batches(self) -> Iterator[np.ndarray]:
        """The rows of this process for the coming step, one forward pass at a time."""
        optim = self.options.optim
        for micro_step in range(optim.grad_steps):
            ids = process_rows(
                self.step * optim.grad_steps + micro_step, n_rows=len(self.rows),
                batch_rows=optim.batch_size, seed=optim.seed,
                process=self.processes.rank, n_processes=self.processes.count,
            )  # fmt: skip
            yield self.rows[ids]

    def hint(self) -> Hint:
        """What to say if the coming step is bad."""
        optim = self.options.optim
        micro_steps = range(self.step * optim.grad_steps, (self.step + 1) * optim.grad_steps)
        ids = [
            global_rows(i, n_rows=len(self.rows), batch_rows=optim.batch_size, seed=optim.seed)
            for i in micro_steps
        ]
        is_low = self.processes.dtype != torch.float32
        return Hint(
            last_checkpoint(self.options.report.save_dir), np.concatenate(ids).tolist(), is_low
        )


def build_trainer(
    options: TrainOptions,
    tokenizer: TextTokenizer,
    rows: PackedRows,
    processes: Processes,
    n_steps: int,
    checkpoint: Checkpoint | None,
) -> Trainer:
    """Model and optimizer of a new run, or in the state of `checkpoint`."""
    source = options.model
    if checkpoint:
        checkpoint = checkpoint_here(checkpoint, options.report.save_dir)
        source = replace(
            source, checkpoint=str(checkpoint.folder), from_scratch=False, init_from=None
        )
    torch.manual_seed(options.optim.seed)
    model = build_model(source, tokenizer, rows.manifest.seq_len).to(processes.device)
    optimizers = build_optimizer(model, options.optim, peak_lr(options.optim, options.model))
    trainer = Trainer(model, optimizers, options, processes, rows, n_steps)
    if checkpoint:
        load_state(trainer, checkpoint)
    return trainer


def train_step(trainer: Trainer) -> tuple[float, float]:
    """One optimizer step: mean loss in nats per token of the global batch, and gradient norm.

    A step that `--skip_outliers` leaves out counts, but changes neither weights nor optimizer.

    Raises:
        NonFiniteError: loss or gradient is NaN or infinite; raised before the update.
    """
    options = trainer.options.optim
    loss, norm = _gradients(trainer)
    scaler = trainer.scaler
    # With a scaler an infinite norm is an overflow: no update, and a smaller scale from now on.
    overflow = scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
    if overflow and scaler.get_scale() >= MIN_LOSS_SCALE:
        updates = False
    else:
        updates = trainer.guard.allows(loss, norm)
        trainer.guard.record(trainer.step + 1, loss, norm, updates, trainer.hint)
    if updates:
        trainer.optimizers.set_lr(step_lr_factor(trainer.step, options, trainer.n_steps))
        trainer.optimizers.step(scaler)
    else:
        scaler.update()
    trainer.step += 1
    return loss, norm


def _gradients(trainer: Trainer) -> tuple[float, float]:
    """Clipped gradients of the coming step, all processes'; loss and norm, the same on all."""
    options, processes = trainer.options.optim, trainer.processes
    seed_step(options.seed, trainer.step, processes.rank)
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=processes.device)
    for i, rows in enumerate(trainer.micro_batches()):
        last = i == options.grad_steps - 1
        sync = (
            contextlib.nullcontext() if last or processes.count == 1 else trainer.wrapped.no_sync()
        )
        with sync:
            with processes.autocast():
                loss = mean_loss(trainer.wrapped, rows, processes.device) / options.grad_steps
            trainer.scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in trainer.optimizers.optimizers:
        trainer.scaler.unscale_(optimizer)
    max_norm = options.max_grad_norm or math.inf
    norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), max_norm)
    loss_value, norm_value = processes.mean(torch.stack([total, norm.to(total)])).tolist()
    return loss_value, norm_value


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout from (seed, step, process): nothing random has to be saved or restored."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))


# --- evaluation ----------------------------------------------------------------------------------


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
    ids = np.arange(len(rows))
    if n_rows is not None and n_rows < len(ids):
        ids = np.linspace(0, len(ids) - 1, n_rows).astype(np.int64)
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


def validate(trainer: Trainer, rows: PackedRows, n_rows: int | None = None) -> dict[str, float]:
    """`val_loss` and what follows from it, of the model as it is now."""
    batch_size = trainer.options.optim.batch_size
    loss = evaluate(
        trainer.model, rows, trainer.processes, batch_size, n_rows, lambda: check_stop(trainer)
    )
    return text_metrics(loss, text_totals(rows.manifest))


# --- checkpoints ---------------------------------------------------------------------------------


def save_state(trainer: Trainer, tokenizer: TextTokenizer, state: dict[str, Any]) -> None:
    """Write `checkpoint-<step>` in save_dir (process 0) and remove checkpoints no longer kept.

    Args:
        state: what `training_state.json` holds besides step and scaler.
    Raises:
        OSError: no space or no permission.
        NonFiniteError: the last update left NaN or Inf in weights or optimizer; nothing written.
    """
    tensors = trainer.optimizers.state_tensors()
    everything = {**dict(trainer.model.named_parameters()), **tensors}
    bad = [name for name, tensor in everything.items() if not torch.isfinite(tensor).all()]
    check_finite(bad, trainer.step, trainer.hint)

    def fill(folder: Path) -> None:
        trainer.model.save_pretrained(folder)
        tokenizer.save(folder)
        save_file(tensors, folder / OPTIMIZER_FILE)

    if trainer.processes.rank == 0:
        report = trainer.options.report
        save_dir = local_folder(report.save_dir)
        state = {
            **state, "elapsed_s": trainer.elapsed_s, "scaler": trainer.scaler.state_dict(),
            "tokens": trainer.step * trainer.tokens_per_step, "outliers": trainer.guard.state(),
            "cut": trainer.cut,
        }  # fmt: skip
        try:
            again = trainer.saved_step == trainer.step
            write_checkpoint(save_dir, trainer.step, fill, state, again=again)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"cannot write the checkpoint of step {trainer.step} in {report.save_dir} "
                f"({describe(error)}); earlier ones are whole, the same command continues from them"
            ) from error
        prune_checkpoints(save_dir, report.keep_last, report.milestone_steps, trainer.step)
        copy_or_warn(report, trainer.step)
    trainer.saved_step = trainer.step
    if trainer.processes.count > 1:
        dist.barrier()


def load_state(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Optimizer state, step, scaler and outlier statistics of a checkpoint (the model was built
    from it already).

    Raises:
        UserError: the state is not one of this model and optimizer.
    """
    try:
        tensors = load_file(checkpoint.folder / OPTIMIZER_FILE)
        if trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict(checkpoint.state["scaler"])
        trainer.step, trainer.elapsed_s = checkpoint.step, float(checkpoint.state["elapsed_s"])
        trainer.guard.load(checkpoint.state.get("outliers", {}))
        trainer.cut = check_cut(checkpoint.state.get("cut"), checkpoint.step)
        trainer.saved_step = checkpoint.step
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {describe(error)}"
        raise UserError(f"{checkpoint.folder} is damaged ({reason})") from error
    trainer.optimizers.load_state_tensors(tensors)


# --- the run -------------------------------------------------------------------------------------


def make_hooks(
    trainer: Trainer, tokenizer: TextTokenizer, val_rows: PackedRows, run: dict[str, Any],
    report: RunReport,
) -> Hooks:  # fmt: skip
    """The hooks of train_pt.py: validation, samples, checkpoints and reports of one run."""
    options, model = trainer.options, trainer.model

    def tick(n_steps: int, loss: float) -> None:
        report.progress.update(n_steps, f"loss {loss:.3f}")

    def save() -> None:
        save_state(trainer, tokenizer, {key: run[key] for key in ("options", "data", "versions")})

    def sample() -> None:
        if trainer.processes.rank == 0:
            code = (options.data.control_codes or (None,))[0]
            arguments = (model, tokenizer, options.sample, options.optim.seed)
            texts = sample_texts(*arguments, code=code, check=trainer.stop.check)
            report.samples(trainer.step, options.sample.prompt, texts)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, p in model.named_parameters():
            trainer.stop.check()
            yield f"weights/{name}", p.detach().float().cpu().numpy()
            if p.grad is not None:
                yield f"gradients/{name}", p.grad.float().cpu().numpy()

    def histograms() -> None:
        report.histograms(trainer.step, arrays())

    def evaluate_now(last: bool) -> dict[str, float]:
        return validate(trainer, val_rows, None if last else options.data.n_eval_rows)

    return Hooks(tick, report.metrics, evaluate_now, save, sample, histograms)


def fit(trainer: Trainer, hooks: Hooks) -> bool:
    """Train to the last step; False when stopped early, with the state saved."""

    def one_step(n: int) -> tuple[float, float]:
        return train_step(trainer)

    return run_loop(trainer, hooks, one_step)
