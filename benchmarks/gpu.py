"""One GPU: its ceilings, then training, evaluation and generation, and two rivals beside it.

    python3 benchmarks/gpu.py            # at most 4 minutes; writes results/gpu.json
    python3 benchmarks/gpu.py --small    # the same code, tiny, also on a CPU; writes no file

Random tokens, no dropout, AdamW, clipping at 1, bf16 where the GPU has it. `share` is the FLOPs of
training a token (ALGPT2Config.flops_per_token) times tokens/s over the measured rate of a product.
A measurement that no longer fits the time is left out, by name.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from harness import make_tokens, no_dropout, save, write_shards
from torch import Tensor, nn

from algpt2 import ALGPT2LMHeadModel
from algpt2.options import OptimOptions, TrainOptions
from algpt2.shards.batches import RowInputs
from algpt2.shards.tfrecords import open_rows
from algpt2.system.console import table
from algpt2.system.processes_pt import start_processes
from algpt2.training.optimizers_pt import build_optimizer
from algpt2.training.trainer_pt import Trainer, evaluate

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NEEDS_S = 20  # a measurement at most, its compilation included


@dataclass(frozen=True)
class Options:
    """What is measured."""

    configs: tuple[str, ...] = ("gpt2", "algpt2", "algpt2-medium")  # shapes
    batch_sizes: tuple[int, ...] = (4, 32, 64)  # rows; the rivals take the second
    seq_len: int = 1024  # tokens a row
    seconds: float = 3.0  # of each measurement, after its first steps
    minutes: float = 4.0  # of all
    small: bool = False  # algpt2-tiny, 2 rows of 32 tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a line for each, save all."""
    options = tyro.cli(Options, args=argv, use_underscores=True)
    if options.small:
        options = Options(("algpt2-tiny",), (1, 2), 32, 0.1, options.minutes, True)
    elif not CUDA:
        raise SystemExit("no GPU here: expected CUDA, or --small")
    start_s, results = time.monotonic(), {"device": device_name(), "torch": torch.__version__}
    results |= ceilings(64 if options.small else 8192)
    print(f"{results}", flush=True)
    lines = [["", "tokens/s", "share", "peak GB", "first step s", "syncs a step"]]
    for name, measure in measurements(options):
        left_s = 60 * options.minutes - (time.monotonic() - start_s)
        if left_s < NEEDS_S:
            print(f"{name}: left out, {left_s:.0f} s left", flush=True)
            continue
        results[name] = found = measure()
        if "flops_per_token" in found:
            flops_per_s = found["flops_per_token"] * found["tokens_per_s"]
            found["share"] = flops_per_s / results["product_flops_per_s"]
        digits = {"tokens_per_s": 0, "share": 3, "peak_gb": 2, "first_s": 1, "syncs": 1}
        cells = [f"{found[key]:.{n}f}" if key in found else "" for key, n in digits.items()]
        lines.append([name, *cells])
        print(json.dumps({name: found}), flush=True)
    print(table(lines))
    if not options.small:
        save("gpu", results)


def measurements(options: Options) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Name and function of each measurement, the most telling first."""
    config, batch = options.configs[0], options.batch_sizes[1]
    for name in options.configs:
        yield f"{name}, {batch} rows", lambda name=name: train(name, batch, options)
    yield f"Trainer, {config}, {batch} rows", lambda: train_trainer(config, batch, options)
    yield f"nanoGPT's step, {config}, {batch} rows", lambda: train_plain(config, batch, options)
    for name in options.configs:
        for other in {*options.batch_sizes} - {batch}:
            yield (
                f"{name}, {other} rows",
                lambda name=name, other=other: train(name, other, options),
            )
    yield f"evaluation, {config}, {batch} rows", lambda: evaluation(config, batch, options)
    yield f"generation, {config}, {batch} texts", lambda: generation(config, batch, options)


# --- the machine ---------------------------------------------------------------------------------


def device_name() -> str:
    """The card's name."""
    return torch.cuda.get_device_name() if CUDA else "CPU"


def finish() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def per_second(work: Callable[[], Any], seconds: float) -> float:
    """Calls of `work` per second: as many as fill `seconds`, after one that does not count."""
    work()
    finish()
    n, start_s = 0, time.perf_counter()
    while not n or time.perf_counter() - start_s < seconds:
        # The host would queue calls without end, so it waits after 2, 4, 8, ... of them.
        for _ in range(max(1, n)):
            work()
        finish()
        n = max(1, 2 * n)
    return n / (time.perf_counter() - start_s)


def ceilings(size: int) -> dict[str, float]:
    """FLOP/s of a square bfloat16 product (float32 on a CPU) and bytes/s of a copy."""
    dtype = torch.bfloat16 if CUDA else torch.float32
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    source = torch.zeros(size, 16 * size, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "product_flops_per_s": 2 * size**3 * per_second(lambda: a @ b, 0.5),
        "copy_bytes_per_s": 2 * source.numel() * per_second(lambda: target.copy_(source), 0.5),
    }


@contextmanager
def counting_syncs() -> Iterator[list[Any]]:
    """The places where the host waits for the GPU in the body; none are seen on a CPU."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        places: list[Any] = []
        try:
            yield places
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
            places += [w for w in seen if "synchroniz" in str(w.message)]


def train_speed(
    build: Callable[[], tuple[Callable[[], Any], int]], n_tokens: int, seconds: float
) -> dict[str, float]:
    """Speed of training.

    Args:
        build: makes the model; returns a function that takes some steps, and their number.
        n_tokens: of a step.
    """
    torch._dynamo.reset()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start_s = time.perf_counter()
    call, n_steps = build()
    call()
    finish()
    first_s = time.perf_counter() - start_s
    with counting_syncs() as syncs:
        call()
    speed = n_tokens * n_steps * per_second(call, seconds)
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
    return {
        "tokens_per_s": speed, "peak_gb": peak, "first_s": first_s, "syncs": len(syncs) / n_steps,
    }  # fmt: skip


# --- this project --------------------------------------------------------------------------------


def trainer(config: str, batch: int, options: Options) -> Trainer:
    """A trainer as train_pt.py makes it, on random rows."""
    optim = OptimOptions(batch_size=batch, lr=1e-4)
    train_options = TrainOptions(optim=optim)
    processes = start_processes(train_options)
    torch.manual_seed(0)
    model = ALGPT2LMHeadModel(no_dropout(config)).to(processes.device)
    vocab_size = model.config.vocab_size
    folder = tempfile.mkdtemp()
    write_shards(folder, [make_tokens(vocab_size, options)], vocab_size)
    inputs = RowInputs(open_rows(folder), train_options, processes)
    optimizers = build_optimizer(model, optim, optim.lr)
    return Trainer(model, optimizers, train_options, processes, inputs, 10**6)


def train(config: str, batch: int, options: Options) -> dict[str, float]:
    """The training step of train_pt.py with its defaults."""

    def build() -> tuple[Callable[[], Any], int]:
        ours = trainer(config, batch, options)
        return lambda: ours.train_steps(ours.steps_per_call), ours.steps_per_call

    found = train_speed(build, batch * options.seq_len, options.seconds)
    return found | {"flops_per_token": no_dropout(config).flops_per_token(options.seq_len)}


def evaluation(config: str, batch: int, options: Options) -> dict[str, float]:
    """Tokens evaluated per second."""
    ours = trainer(config, batch, options)
    rows = ours.inputs.rows
    rate = per_second(lambda: evaluate(ours.model, rows, ours.processes, batch), options.seconds)
    return {"tokens_per_s": rate * len(rows) * options.seq_len}


def generation(config: str, batch: int, options: Options) -> dict[str, float]:
    """Tokens sampled per second by `generate` with its cache, greedy."""
    model = ALGPT2LMHeadModel(no_dropout(config)).to(DEVICE).eval()
    n_prompt, n_new = options.seq_len // 4, options.seq_len // 8
    ids = torch.ones(batch, n_prompt, dtype=torch.long, device=DEVICE)
    flags = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": n_new}
    with torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext():
        rate = per_second(
            lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **flags),
            options.seconds,
        )
    return {"tokens_per_s": rate * batch * n_new}


# --- rivals --------------------------------------------------------------------------------------


def train_trainer(config: str, batch: int, options: Options) -> dict[str, float]:
    """transformers' Trainer, GPT2LMHeadModel of the same shape, with its best documented flags."""
    import transformers as tr

    torch._dynamo.reset()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ours = no_dropout(config)
    rates = dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)
    shape = {key: getattr(ours, key) for key in ("n_positions", "n_embd", "n_layer", "n_head")}
    model = tr.GPT2LMHeadModel(
        tr.GPT2Config(vocab_size=ours.vocab_size, bos_token_id=0, eos_token_id=0, **shape, **rates)
    )
    tokens = torch.from_numpy(make_tokens(ours.vocab_size, options)[:, :-1]).long()
    data = [{"input_ids": row, "labels": row} for row in tokens]
    n_first, n_steps, times = (1, 2, []) if options.small else (10, 30, [])

    class Clock(tr.TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            if len(times) in (0, n_first):  # a wait in each step would slow it down
                finish()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        arguments = tr.TrainingArguments(
            folder, per_device_train_batch_size=batch, max_steps=n_first + n_steps,
            learning_rate=1e-4, weight_decay=0.1, adam_beta2=0.95, optim="adamw_torch_fused",
            bf16=CUDA, tf32=True if CUDA else None, torch_compile=CUDA, use_cpu=not CUDA,
            dataloader_num_workers=4 if CUDA else 0, dataloader_pin_memory=CUDA, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        tr.Trainer(model, arguments, train_dataset=data, callbacks=[Clock()]).train()
        finish()
    seconds = time.perf_counter() - times[n_first]
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
    return {
        "tokens_per_s": n_steps * batch * options.seq_len / seconds, "peak_gb": peak,
        "first_s": times[1] - start_s, "flops_per_token": ours.flops_per_token(options.seq_len),
    }  # fmt: skip


class PlainBlock(nn.Module):
    """A GPT-2 block as nanoGPT has it, without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = (nn.Linear(width, n * width, bias=False) for n in (3, 1))
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.ln_1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class PlainGPT(nn.Module):
    """nanoGPT's GPT-2: V padded to a multiple of 64, the head tied, logits of all positions."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(-(-config.vocab_size // 64) * 64, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        blocks = [PlainBlock(config.n_embd, config.n_head) for _ in range(config.n_layer)]
        self.blocks, self.ln_f = nn.Sequential(*blocks), nn.LayerNorm(config.n_embd, bias=False)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        logits = F.linear(self.ln_f(self.blocks(x)), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def train_plain(config: str, batch: int, options: Options) -> dict[str, float]:
    """nanoGPT's step written anew: whole model compiled, flash attention, fused AdamW, clipping;
    the loss is never read."""
    ours = no_dropout(config)
    tokens = torch.from_numpy(make_tokens(ours.vocab_size, options)).long()

    def build() -> tuple[Callable[[], Any], int]:
        torch.manual_seed(0)
        model = PlainGPT(ours).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        compiled = torch.compile(model) if CUDA else model

        def step() -> None:
            rows = tokens[torch.randint(len(tokens), (batch,))]
            rows = (rows.pin_memory() if CUDA else rows).to(DEVICE, non_blocking=True)
            with torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext():
                loss = compiled(rows[:, :-1], rows[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step, 1

    found = train_speed(build, batch * options.seq_len, options.seconds)
    return found | {"flops_per_token": ours.flops_per_token(options.seq_len)}


if __name__ == "__main__":
    main(sys.argv[1:])
