"""benchmarks/gpu.py, tiny and on a CPU: every measurement of a GPU's run gives a speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_measurement_runs(tmp_path):
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--small"], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = {}
    for line in process.stdout.splitlines():
        if line.startswith('{"'):
            found |= json.loads(line)
    assert [*found] == [
        "algpt2-tiny, 2 rows", "Trainer, algpt2-tiny, 2 rows",
        "nanoGPT's step, algpt2-tiny, 2 rows", "algpt2-tiny, 1 rows",
        "evaluation, algpt2-tiny, 2 rows", "generation, algpt2-tiny, 2 texts",
    ]  # fmt: skip
    assert all(result["tokens_per_s"] > 0 for result in found.values())
    assert sum("share" in result for result in found.values()) == 4  # those that train
