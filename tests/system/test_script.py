"""What a library prints at import: hidden, unless it ends the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = """
import os, signal, sys
assert {"ssl", "hashlib"} <= sys.modules.keys()
os.write(2, b"F0000 another libtpu is needed\\n")
"""
TOLD = (
    "F0000 another libtpu is needed\nerror: a library ended this process; what it said is above\n"
)


@pytest.mark.parametrize(
    ("end", "code", "stderr"),
    [
        ("", 0, ""),
        ("os.abort()", -signal.SIGABRT, TOLD),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, TOLD),
        ("raise OSError('no room')", 2, "error: no room\n"),
        (
            "os.kill(os.getpid(), signal.SIGTERM); signal.pause()", 75,
            "\nstopped by SIGTERM: the same command continues\n",
        ),
    ],
)  # fmt: skip
def test_what_tensorflow_prints_at_import_is_seen_if_it_ends_the_process(
    tmp_path, end, code, stderr
):
    (tmp_path / "tensorflow.py").write_text(START + end)
    program = """
from algpt2.system.script import import_tensorflow, run_script
run_script(lambda argv: import_tensorflow())
"""
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": paths, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (code, stderr)
    assert not [*tmp_path.glob("algpt2-stderr-*")]
