"""What fits a TPU: the table of Markdown/CLOUD.md, from the TPU's own compiler, without a TPU.

    pip install -r requirements-dry-run.txt
    python3 benchmarks/dry_run.py                        # every case: hours on two cores
    python3 benchmarks/dry_run.py --cases algpt2@v3-8 gpt2@v3-128

Each case is `train_tfrecords.py --seq_len 1024 --find_batch` with its other options as they are by
default (Adafactor with a first moment, bfloat16), in a process of its own. A case that
results/dry_run.json has is not compiled again; `--overwrite` compiles it.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tyro
from harness import ROOT, save

from algpt2 import errors
from algpt2.options import TFRecordOptions, parse
from algpt2.system.console import table
from algpt2.tpu import dry_run

# CONFIG@SLICE, and flags behind it.
CASES = (
    "algpt2@v3-128", "gpt2@v3-128", "algpt2@v2-8", "algpt2@v3-8", "algpt2@v4-8", "algpt2@v5e-16",
    "algpt2@v5p-8", "algpt2@v6e-8", "algpt2@v3-128 --gradient_checkpointing",
    "algpt2-medium@v3-128", "algpt2-large@v3-128", "algpt2-xl@v3-128", "gpt2-medium@v3-128",
    "gpt2-large@v3-128", "gpt2-xl@v3-128", "gpt2-xl@v3-128 --gradient_checkpointing --momentum 0",
)  # fmt: skip
SEQ_LEN = 1024


@dataclass(frozen=True)
class Options:
    """What is compiled."""

    cases: tuple[str, ...] = CASES  # CONFIG@SLICE, with flags of train_tfrecords.py behind it
    overwrite: bool = False  # compile what the results have, too
    compile_one: str | None = None  # internal: one case, its result as JSON


def main(argv: Sequence[str] | None = None) -> None:
    """Compile what is missing, save after each case, print the table."""
    options = tyro.cli(Options, args=argv, use_underscores=True)
    if options.compile_one:
        print(json.dumps(compile_case(options.compile_one)), flush=True)
        os._exit(0)
    dry_run.check_requirements()
    path = ROOT / "benchmarks" / "results" / "dry_run.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for case in options.cases:
        if case not in results or options.overwrite:
            results[case] = compile_in_process(case)
            save("dry_run", {name: results[name] for name in (*CASES, *results) if name in results})
    print(table([HEADING, *(line(case, results[case]) for case in options.cases)]))


def compile_in_process(case: str) -> dict[str, Any]:
    """A case in a process of its own: TensorFlow keeps the memory of every program it has seen."""
    command = [sys.executable, __file__, f"--compile_one={case}"]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *printed, result = process.stdout.splitlines()
    print(f"{case}:", *printed, sep="\n", flush=True)
    return json.loads(result)


def compile_case(case: str) -> dict[str, Any]:
    """The largest batch of a case and what its program takes; `error` where nothing fits."""
    from algpt2.tpu import dry_run_tf

    start, *flags = case.split()
    config, _, name = start.partition("@")
    arguments = [f"--config_path={config}", f"--dry_run={name}", f"--seq_len={SEQ_LEN}", *flags]
    tpu = dry_run.parse_slice(name)
    try:
        trial = dry_run_tf.prepare(parse(TFRecordOptions, arguments), tpu)
        rows, compiled = trial.find_batch()
    except errors.UserError as error:
        return {"error": str(error)}
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "rows_per_core": rows, "batch_size": rows * tpu.n_cores,
        "hbm_gib": compiled.total_bytes / dry_run.GIB, "hbm_of_gib": tpu.hbm_gib,
        "flops_ratio": compiled.flops / (rows * trial.flops_per_row),
        "compiler_peak_gb": peak_kb / 1e6, **asdict(compiled),
    }  # fmt: skip


HEADING = ["", "rows per core", "--batch_size", "HBM GiB", "of", "FLOPs ratio", "compile s"]


def line(case: str, result: dict[str, Any]) -> list[str]:
    """A case for people."""
    if "error" in result:
        return [case, "none", "", "", "", "", ""]
    return [
        case, str(result["rows_per_core"]), f"{result['batch_size']:,}",
        f"{result['hbm_gib']:.2f}", str(result["hbm_of_gib"]), f"{result['flops_ratio']:.3f}",
        f"{result['seconds']:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
