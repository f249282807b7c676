"""The command line of every script: what --help says, and which values are refused."""

import contextlib
import importlib
import io
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from algpt2 import options
from algpt2.errors import UserError
from algpt2.options import ExportOptions, PackOptions, TokenizerOptions, TrainOptions, parse

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
USED_FIRST = {"train_pt": "data model", "train_tf": "data model", "train_tfrecords": "data model",
              "make_tfrecords": "shard document", "train_tokenizer": "tokenizer",
              "export_gpt2": "export", "plot_runs": "plot"}  # fmt: skip


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture
def printed(script, monkeypatch):
    """What `--help` prints."""
    monkeypatch.setenv("COLUMNS", "120")  # too narrow for two columns of frames
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # which tyro draws frames on
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert not stop.value.code
    out.flush()
    return out.buffer.getvalue().decode()


@pytest.fixture
def groups(printed):
    """Name of a frame -> its title and its arguments, each on one line."""
    frames = re.findall("╭─ (.+?) ─*╮\n(.*?)╰", printed, re.DOTALL)
    contents = {name: re.sub("^│ | +│$", "", text, flags=re.MULTILINE) for name, text in frames}
    groups = {}
    for name, content in contents.items():
        *title, arguments = re.split("\n─+\n", content.strip())
        arguments = [" ".join(text.split()) for text in re.split(r"\n(?=\S)", arguments)]
        groups[name] = "".join(title), arguments
    return groups


def flag_of(argument):
    """`seq_len` of `--seq_len INT ...`, `out` of `OUT ...`."""
    return re.match(r"(?:--|\[)?(\w*)", argument)[1].lower()


def test_help_opens_with_an_example_and_what_is_used_first(script, printed, groups):
    summary, _, rest = script.__doc__.partition("\n\n")
    example = " ".join(rest.splitlines()[0].split())
    assert example.startswith(f"python3 {script.__name__}.py")
    assert f"\n\n{summary}\n\nExample: {example}\n\n" in printed
    names = [name.removesuffix(" options") for name in groups if name.endswith(" options")]
    first = USED_FIRST[script.__name__].split()
    assert names[: len(first)] == first
    _, arguments = groups[f"{names[-1]} options"]
    assert flag_of(arguments[-1]) == "debug"


def test_every_group_has_a_title_and_every_flag_a_sentence_and_one_default(groups):
    assert groups.pop("options") == ("", ["-h, --help show this help message and exit"])
    for name, (title, arguments) in groups.items():
        assert name == "positional arguments" or re.fullmatch(r"[A-Z][^\n]+\.", title)
        for argument in arguments:
            invocation = r"(--\w+,? )*(\{[\w,]+\} |[A-Z[\]{}. ]+ )?"
            says = re.fullmatch(rf"{invocation}(.*) \((default: .*|required)\)", argument)
            assert says and len(says[3].split()) > 1, argument
            assert len(re.findall("default|required", argument)) == 1, argument


def test_every_option_has_a_flag(script, groups):
    (name,) = re.findall(r"parse\((\w+), argv, __doc__\)", Path(script.__file__).read_text())
    own = {option.name: option.default_factory for option in fields(getattr(options, name))}
    expected = [o.name for group in own.values() if is_dataclass(group) for o in fields(group)]
    expected += [name for name, group in own.items() if not is_dataclass(group)]
    if name == "TFRecordOptions":  # Adafactor's beta1 is --momentum; fp16 needs PyTorch
        expected = [name for name in expected if name not in ("beta1", "fp16")]
    groups.pop("options")  # -h
    shown = [flag_of(argument) for _, arguments in groups.values() for argument in arguments]
    assert sorted(shown) == sorted(expected)


def test_help_takes_less_than_a_second_of_cpu():
    code = "import sys, time, train_pt\ntry:\n    train_pt.main(['--help'])\nexcept SystemExit:\n"
    code += "    print(time.process_time(), file=sys.stderr)"
    command = [sys.executable, "-c", code]
    tries = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True) for _ in range(3))
    assert any(float(done.stderr) < 1 for done in tries)  # the first, unless the machine is busy


@pytest.mark.parametrize(
    ("cls", "flags"),
    [(PackOptions, ["--save_path="]), (TrainOptions, ["--val_path", "a", ""]),
     (TokenizerOptions, ["--train_path", ""]), (PackOptions, ["--path"]),
     (ExportOptions, ["run", ""])],
)  # fmt: skip
def test_an_empty_path_is_not_the_current_folder(cls, flags):
    with pytest.raises(UserError, match=r"--\w+ needs at least one value, and no empty one"):
        parse(cls, flags)


@pytest.mark.parametrize(
    ("cls", "flags", "message"),
    [
        (TrainOptions, ["--lr=nan"], "a number above zero, got --lr nan"),
        (TrainOptions, ["--beta1=1"], "a number from 0 to 0.999999, got --beta1 1.0"),
        (TrainOptions, ["--batch_size=10000000000"], "from 1 to 1,048,576, got --batch_size 1000"),
        (TrainOptions, ["--eval_steps=0"], "above zero, got --eval_steps 0"),
        (PackOptions, ["--seed=-1"], "from 0 to 9,007,199,254,740,992, got --seed -1"),
        (options.TFRecordOptions, ["--train_len=0"], "above zero, got --train_len 0"),
    ],
)
def test_a_number_outside_the_range_of_its_type_is_named(cls, flags, message):
    with pytest.raises(UserError, match=f"expected .*{re.escape(message)}"):
        parse(cls, flags)


@pytest.mark.parametrize(
    ("cls", "flags", "name"),
    [
        (PackOptions, ["--path", "a", "--path", "b"], "path"),
        (PackOptions, ["--path=a", "--seq_len", "8", "--path", "b"], "path"),
        (TrainOptions, ["--max-steps=1", "--max_steps", "2"], "max_steps"),
        (TokenizerOptions, ["--overwrite", "--no_overwrite"], "overwrite"),
        (ExportOptions, ["run", "out", "--debug", "--debug"], "debug"),
    ],
)
def test_a_flag_that_is_given_twice_is_named(cls, flags, name):
    with pytest.raises(UserError, match=f"^--.* after --.*--{name} A B"):
        parse(cls, flags)
