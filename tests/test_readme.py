"""The commands that the documents show are commands that the scripts take."""

import re
import shlex
from pathlib import Path

import pytest

from algpt2.options import (
    ExportOptions,
    PackOptions,
    PlotOptions,
    TFRecordOptions,
    TFTrainOptions,
    TokenizerOptions,
    TrainOptions,
    parse,
)

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {
    "train_tokenizer.py": TokenizerOptions,
    "make_tfrecords.py": PackOptions,
    "train_pt.py": TrainOptions,
    "train_tf.py": TFTrainOptions,
    "train_tfrecords.py": TFRecordOptions,
    "plot_runs.py": PlotOptions,
    "export_gpt2.py": ExportOptions,
}
# The documents of the original project show these; they have to run here unchanged.
ORIGINAL = r"""
python3 train_tokenizer.py --train_path ./d/ --save_path ./t/ --vocab_size 50257 --n_files 1000000
python3 make_tfrecords.py --path ./data/ --save_path ./train/ --files_per_tfrecord 500000 \
    --use_control_codes --seq_len 1024 --min_seq_len --tokenizer ./tokenizer/
"""


def commands():
    texts = {"original": ORIGINAL}
    for path in [ROOT / "README.md", *ROOT.glob("Markdown/*.md"), *ROOT.glob("*.py")]:
        texts[path.name] = path.read_text()
    for name, text in texts.items():
        for line in text.replace("\\\\\n", " ").replace("\\\n", " ").splitlines():
            match = re.search(r"(?:python3|torchrun [^`]*?) (\w+\.py)\b([^`]*)", line)
            if match and match[1] in OPTIONS:
                yield pytest.param(match[1], match[2], id=f"{name}: {match[0].strip()}")


@pytest.mark.parametrize(("script", "flags"), [*commands()])
def test_a_command_of_the_documents_is_taken(script, flags):
    arguments = shlex.split(flags.replace("...", ""), comments=True)
    assert parse(OPTIONS[script], arguments)


def test_the_readme_shows_every_script_and_config():
    readme = (ROOT / "README.md").read_text()
    for path in ROOT.glob("*.py"):
        assert f"python3 {path.name}" in readme
    sizes = {
        re.sub(r"-(medium|large|xl)$", "", p.parent.name) for p in ROOT.glob("algpt2/*/*.json")
    }
    assert all(name in readme for name in sizes)
