"""The dry run: what a TPU slice would make of a training step, asked of its compiler, without it.

`train_tfrecords.py --dry_run v3-128` lowers its step to HLO (dry_run_tf.py). libtpu compiles the
HLO for the slice in a process of its own (tpu_compiler.py). This module knows the slices, judges
the compiler's answer and prints it. A program is that of one core, all-reduce over the slice
included.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..options import TFRecordOptions
from ..system.console import log
from .tpu_compiler import PRODUCTS

GIB = 2**30
REQUIREMENTS = "requirements-dry-run.txt"
MAX_ROWS = 1024  # per core: where --find_batch stops asking

# The peak FLOP/s of a chip, over its matrix units (4, 8, 4) times 2 x 128 x 128
# (cloud.google.com/tpu/docs/v3, v4, v5e).
_CLOCK_MHZ = {"v3": 940, "v4": 1050, "v5e": 1500}


@dataclass(frozen=True)
class Slice:
    """A TPU slice as libtpu knows it. A core runs one replica; from v4 on it is a whole chip."""

    name: str  # as gcloud calls it: v3-128, v5litepod-16
    topology: str  # as libtpu calls it: v3:8x8
    n_cores: int  # replicas
    hbm_gib: int  # of one core
    chip_config: str = ""  # v4: two cores of a chip as one

    @property
    def clock_mhz(self) -> int | None:
        """The clock of a core; None: not known."""
        return _CLOCK_MHZ.get(self.topology.partition(":")[0])

    def rows_per_core(self, batch_size: int) -> int:
        """Rows that each core gets of a batch.

        Raises:
            UserError: the batch is no multiple of the cores.
        """
        if batch_size % self.n_cores:
            raise UserError(
                f"--batch_size {batch_size} is the batch of all cores: expected a multiple of the "
                f"{self.n_cores} of {self.name}"
            )
        return batch_size // self.n_cores


# generation: (HBM of a replica in GiB, cores of the name in a replica and in a chip, dimensions of
# the torus of chips, sizes, chip_config); HBM from cloud.google.com/tpu/docs/v2 ... v6e
_GENERATIONS: dict[str, tuple[int, int, int, int, list[int], str]] = {
    "v2": (8, 1, 2, 2, [8, 32, 64, 128, 256, 512], ""),
    "v3": (16, 1, 2, 2, [8, 32, 64, 128, 256, 512, 1024, 2048], ""),
    "v4": (32, 2, 2, 3, [2**i for i in range(3, 13)], "megacore"),
    "v5e": (16, 1, 1, 2, [1, 4, 8, 16, 32, 64, 128, 256], ""),
    "v5p": (95, 2, 2, 3, [2**i for i in range(3, 13)], ""),
    "v6e": (32, 1, 1, 2, [1, 4, 8, 16, 32, 64, 128, 256], ""),
}


def parse_slice(name: str) -> Slice:
    """Look up a slice by name: v2-8, v3-128, v4-32, v5e-16 (or v5litepod-16), v5p-8, v6e-256.

    Raises:
        UserError: no slice has that name.
    """
    generation, _, size = name.replace("v5litepod-", "v5e-").partition("-")
    if generation not in _GENERATIONS:
        raise UserError(
            f"--dry_run {name}: expected a TPU slice such as v2-8, v3-128, v4-32, v5e-16, v5p-8 or "
            f"v6e-16 (generations: {', '.join(_GENERATIONS)})"
        )
    hbm_gib, per_replica, per_chip, n_dims, sizes, chip_config = _GENERATIONS[generation]
    if size not in map(str, sizes):
        raise UserError(
            f"--dry_run {name}: no such size; expected one of "
            f"{', '.join(f'{generation}-{n}' for n in sizes)}"
        )
    gcloud_name = f"v5litepod-{size}" if generation == "v5e" else name
    doublings = (int(size) // per_chip).bit_length() - 1  # of one chip, along each axis in turn
    sides = [2 ** ((doublings + i) // n_dims) for i in range(n_dims)]
    sides.sort(key=lambda side: (side == 1, side))  # 2x2x1
    topology = f"{generation}:{'x'.join(map(str, sides))}"
    return Slice(gcloud_name, topology, int(size) // per_replica, hbm_gib, chip_config)


def check_command(flags: TFRecordOptions) -> Slice:
    """Return the slice of `--dry_run`, or say what is wrong before TensorFlow is imported.

    Raises:
        UserError: no such slice, a batch that its cores do not divide, or no TPU compiler.
    """
    tpu = parse_slice(str(flags.dry_run))
    if not flags.find_batch:
        tpu.rows_per_core(flags.optim.batch_size)
    check_requirements()
    return tpu


def check_requirements() -> None:
    """`UserError` unless the TPU compiler is installed."""
    missing = [name for name in ("jax", "libtpu") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--dry_run needs {' and '.join(missing)}, the TPU compiler: "
            f"pip install -r {REQUIREMENTS}"
        )


@dataclass(frozen=True)
class Compiled:
    """What the compiler says about the program of one core."""

    argument_bytes: int  # weights, optimizer state, tokens
    temp_bytes: int  # activations, gradients
    output_bytes: int
    alias_bytes: int  # outputs that are written over arguments
    code_bytes: int
    flops: float
    seconds: float  # to compile
    cycles: dict[str, int] = field(default_factory=dict)  # of a step by kind, largest first

    @property
    def total_bytes(self) -> int:
        """HBM that one core needs."""
        outputs = self.output_bytes - self.alias_bytes
        return self.argument_bytes + self.temp_bytes + outputs + self.code_bytes


@dataclass(frozen=True)
class TooLarge:
    """The answer about a program that does not fit a core."""

    needed: str = ""  # "24.38 GiB", if the compiler says it
    available: str = ""

    def __str__(self) -> str:
        if not self.needed:
            return "more HBM than a core has"
        return f"{self.needed} of HBM, a core has {self.available} for it"


def compile_program(program: bytes, tpu: Slice) -> Compiled | TooLarge:
    """Compile a serialized HLO module for every core of a slice, with libtpu in another process.

    Raises:
        UserError: the compiler died or refused for a reason other than memory.
    """
    with tempfile.TemporaryDirectory(prefix="algpt2-dry-run-") as folder:
        paths = {name: Path(folder, name) for name in ("program", "answer", "request")}
        paths["program"].write_bytes(program)
        request = {
            "topology": tpu.topology, "chip_config": tpu.chip_config, "n_devices": tpu.n_cores,
            "accelerator_type": tpu.name, "program": str(paths["program"]),
            "answer": str(paths["answer"]),
        }  # fmt: skip
        paths["request"].write_text(json.dumps(request), encoding="utf-8")
        root = str(Path(__file__).resolve().parents[2])
        python_path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.run(
            [sys.executable, "-m", "algpt2.tpu.tpu_compiler", str(paths["request"])],
            env=os.environ | {"PYTHONPATH": python_path}, check=False,
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        try:
            answer = json.loads(paths["answer"].read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it died before or while it wrote
            answer = None
    if answer is not None:
        return read_answer(answer)
    last = (process.stderr.strip().splitlines() or ["no message"])[-1]
    raise UserError(
        f"the TPU compiler ended with code {process.returncode} and no answer ({last[:200]}): "
        f"expected the versions of {REQUIREMENTS} on x86 Linux, and memory to compile in"
    )


def read_answer(answer: dict[str, Any]) -> Compiled | TooLarge:
    """Turn the answer of tpu_compiler.py into a result.

    Raises:
        UserError: the compiler failed for a reason other than too little HBM.
    """
    if "error" not in answer:
        return Compiled(**answer)
    message = str(answer["error"])
    if "RESOURCE_EXHAUSTED" not in message:
        raise UserError(f"the TPU compiler refuses the program: {message[:400]}")
    size = r"([\d.]+[KMGT])"
    found = re.search(rf"\({size}\) exceeds available HBM \({size}\)", message) or re.search(
        rf"Used {size} of {size} hbm", message
    )
    sizes = found.groups() if found else ()
    return TooLarge(*(f"{size[:-1]} {size[-1]}iB" for size in sizes))


@dataclass
class DryRun:
    """One training step on one slice, compiled for any number of batches."""

    tpu: Slice
    program: Any  # dry_run_tf.StepProgram, which imports TensorFlow
    seq_len: int  # tokens of a row
    flops_per_row: int  # closed form, one row forward and backward
    compiler: Callable[[bytes, Slice], Compiled | TooLarge] = compile_program
    grad_steps: int = 1
    # Optimizer steps of the run, given the batch size; None: the command does not say.
    steps: Callable[[int], int | None] = lambda batch_size: None

    def compile(self, rows: int) -> Compiled | TooLarge:
        """The step with `rows` rows per core and forward pass."""
        answer = self.compiler(self.program.lower(rows), self.tpu)
        hbm_bytes = self.tpu.hbm_gib * GIB
        if isinstance(answer, Compiled) and answer.total_bytes > hbm_bytes:
            return TooLarge(f"{answer.total_bytes / GIB:.2f} GiB", f"{self.tpu.hbm_gib} GiB")
        return answer

    def describe(self, rows: int, compiled: Compiled) -> str:
        """The lines about a batch that fits."""
        tpu, expected = self.tpu, rows * self.flops_per_row
        total, hbm_bytes = compiled.total_bytes, tpu.hbm_gib * GIB
        lines = [
            f"{tpu.name}: {tpu.n_cores} cores ({tpu.topology}), {rows} rows of {self.seq_len:,} "
            f"tokens per core, --batch_size {rows * tpu.n_cores}",
            f"HBM arguments   {compiled.argument_bytes / GIB:8.3f} GiB per core: weights, "
            "optimizer state, tokens",
            f"HBM temporaries {compiled.temp_bytes / GIB:8.3f} GiB: activations, gradients",
            f"HBM total       {total / GIB:8.3f} GiB of {tpu.hbm_gib} GiB "
            f"({total / hbm_bytes:.0%}), {compiled.code_bytes / GIB:.3f} of it code",
            f"FLOPs of a pass {compiled.flops / 1e12:8.3f} TFLOP per core, closed form "
            f"{expected / 1e12:.3f}, ratio {compiled.flops / expected:.3f}",
            f"compile time    {compiled.seconds:8.1f} s",
            *self.describe_time(rows, compiled.cycles),
        ]
        return "\n".join(lines)

    def describe_time(self, rows: int, cycles: dict[str, int]) -> list[str]:
        """The lines about the time of a step; none where the compiler or the clock is unknown."""
        clock_mhz, batch_size = self.tpu.clock_mhz, rows * self.tpu.n_cores
        if not cycles or clock_mhz is None:
            return [
                "step            no estimate: the clock or the number of its cycles is not known"
            ]
        total = sum(cycles.values())
        step_s = total / clock_mhz / 1e6
        tokens = batch_size * self.grad_steps * self.seq_len / step_s
        n_steps = self.steps(batch_size)
        hours = "hours: with --max_steps or --n_tokens"
        if n_steps:
            hours = f"{n_steps * step_s / 3600:,.2f} hours for {n_steps:,} steps"
        lines = [
            f"step            {step_s:8.3f} s at {clock_mhz} MHz, {tokens:,.0f} tokens/s, {hours}",
            f"{'':16}the compiler's estimate, not measured; without communication and input",
            *(
                f"  {name:22} {n / clock_mhz / 1e6:8.4f} s {n / total:4.0%}"
                for name, n in cycles.items()
            ),
        ]
        overhead = [(n, name) for name, n in cycles.items() if name != PRODUCTS]
        if overhead:
            n, name = max(overhead)
            lines.append(f"largest but for matrix products: {name}, {n / total:.0%} of the step")
        return lines

    def check(self, rows: int) -> Compiled:
        """Compile and print the step of one batch.

        Raises:
            UserError: it does not fit.
        """
        answer = self.compile(rows)
        if isinstance(answer, TooLarge):
            raise UserError(self.too_large(rows, answer))
        log(self.describe(rows, answer))
        return answer

    def find_batch(self) -> tuple[int, Compiled]:
        """Find the largest rows per core that fit, to an eighth; print and return the program.

        Memory is nearly linear in the rows, so two programs tell roughly where the limit is.

        Raises:
            UserError: a single row does not fit.
        """
        fits: dict[int, Compiled] = {}
        rows, too_many = 1, MAX_ROWS + 1
        while rows < too_many:
            answer = self.compile(rows)
            if isinstance(answer, TooLarge):
                log(f"{rows} rows per core: too large, {answer}")
                if rows == 1:
                    raise UserError(self.too_large(rows, answer))
                too_many = rows
            else:
                ratio = answer.flops / (rows * self.flops_per_row)
                gib = answer.total_bytes / GIB
                log(f"{rows} rows per core: {gib:.2f} GiB, {ratio:.3f} of the closed form's FLOPs")
                fits[rows] = answer
            totals = {n: compiled.total_bytes for n, compiled in fits.items()}
            rows = next_rows(totals, too_many, self.tpu.hbm_gib * GIB)
        best = max(fits)
        log(self.describe(best, fits[best]))
        return best, fits[best]

    def too_large(self, rows: int, answer: TooLarge) -> str:
        """The message for a batch that does not fit: what it needs and what to do."""
        advice = "--gradient_checkpointing or a smaller model"
        if rows > 1:
            advice = "a smaller --batch_size with more --grad_steps, or --gradient_checkpointing"
        return (
            f"{rows} rows per core do not fit {self.tpu.name}: the step needs {answer}; "
            f"use {advice}"
        )


def next_rows(fits: dict[int, int], too_many: int, hbm_bytes: int) -> int:
    """Choose the rows to try next; `too_many` if the largest fit is known to an eighth.

    Args:
        fits: rows of each batch that fits, and its bytes.
        too_many: the smallest number of rows that does not fit, MAX_ROWS + 1 while none is known.
    """
    most = max(fits)
    step = max(1, most // 8)
    if too_many - most <= step:
        return too_many
    if too_many <= MAX_ROWS:
        return (most + too_many) // 2
    least = min(fits)
    if least == most:
        return 2 * most
    # Slope over the whole range: near the limit XLA recomputes, and more rows may take less.
    slope = max(1.0, (fits[most] - fits[least]) / (most - least))
    guess = most + int((hbm_bytes - fits[most]) / slope)
    return min(max(most + step, guess), MAX_ROWS)
