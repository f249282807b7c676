"""Rules that hold for every script and module: quick help, separate frameworks, no surprises."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("algpt2/**/*.py")
)
TENSORFLOW = [name for name in MODULES if name.endswith("_tf") or "_tf_" in name]
TORCH = [  # transformers' configuration classes import torch where it is installed
    name
    for name in MODULES
    if name.endswith(("_pt", "kernels_algpt2", "modeling_algpt2", "configuration_algpt2"))
    and name not in TENSORFLOW
]
PLAIN = [name for name in MODULES if name not in TENSORFLOW + TORCH]
HEAVY = (
    "torch",
    "transformers",
    "tensorflow",
    "keras",
    "datasets",
    "matplotlib",
    "wandb",
    "pandas",
)


def python(code, cwd=ROOT):
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_framework_and_runs_from_anywhere(script, tmp_path):
    code = f"""
import runpy, sys
sys.argv = ["{script}", "--help"]
try:
    runpy.run_path("{ROOT / script}", run_name="__main__")
except SystemExit as stop:
    assert not stop.code
print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""
    printed = python(code, cwd=tmp_path)
    assert "usage:" in printed
    assert printed.endswith("heavy: []\n")


@pytest.mark.parametrize(
    ("allowed", "modules"), [([], PLAIN), (["torch"], TORCH), (["tensorflow"], TENSORFLOW)]
)
def test_a_module_imports_the_frameworks_of_its_name_only(allowed, modules):
    """Through libraries too: tests/test_imports.py sees the import statements of this project."""
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    found = {{'torch', 'tensorflow'}} & sys.modules.keys()
    if found - {{*{allowed}}}:
        sys.exit(f"{{module}} imports {{found}}")
"""
    python(code)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_opens_with_commands(script):
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    assert f"python3 {script}" in docstring


@pytest.mark.parametrize("script", ["train_tf.py", "train_tfrecords.py"])
def test_tensorflow_says_nothing_before_the_scripts_do(script, tmp_path):
    flags = ["--eval_only", f"--checkpoint={tmp_path}", f"--val_path={tmp_path}"]
    command = [sys.executable, script, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_two_trainers_have_the_same_names_in_the_same_order():
    columns = []
    for framework in ("pt", "tf"):
        tree = ast.parse((ROOT / f"algpt2/training/trainer_{framework}.py").read_text())
        columns.append([node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)])
    pt, tf = columns
    shared = {*pt} & {*tf}
    assert [name for name in pt if name in shared] == [name for name in tf if name in shared]
    assert {"build_model", "mean_loss", "evaluate", "train_steps", "state_tensors"} <= shared
