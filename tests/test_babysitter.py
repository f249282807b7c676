"""cloud/keep_running.sh, with commands that end as real ones do."""

import itertools
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "cloud" / "keep_running.sh"


@pytest.fixture
def babysit(tmp_path):
    """Runs the script on a command that ends with each code in turn; code, pauses and output."""
    (tmp_path / "sleep").write_text(f'#!/bin/bash\necho "$1" >> {tmp_path}/pauses\n')
    (tmp_path / "train").write_text(
        f"#!/bin/bash\n"
        f"code=$(head -n 1 {tmp_path}/codes) && sed -i 1d {tmp_path}/codes\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        f"[ $code -gt 128 ] && kill -$((code - 128)) $$\n"
        f"exit $code\n"
    )
    for name in ("sleep", "train"):
        (tmp_path / name).chmod(0o755)

    def run(*codes):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "calls").write_text("")
        (tmp_path / "pauses").write_text("")
        process = subprocess.run(
            ["bash", SCRIPT, tmp_path / "train", "--tags", "two words"],
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, timeout=60,
            capture_output=True, text=True,
        )  # fmt: skip
        calls = (tmp_path / "calls").read_text().splitlines()
        assert calls == ["--tags two words"] * len(calls)
        pauses = [int(pause) for pause in (tmp_path / "pauses").read_text().split()]
        return process.returncode, len(calls), pauses

    return run


@pytest.mark.parametrize("last", [0, 1, 2, 3, 130])
def test_it_starts_again_until_the_code_says_that_this_is_no_use(babysit, last):
    code, n_calls, pauses = babysit(75, 137, 143, 75, last, 0)
    assert (code, n_calls) == (last, 5)
    assert all(0 < a < b for a, b in itertools.pairwise(pauses))
    assert len(pauses) == 4


def test_the_pause_has_an_end(babysit):
    code, n_calls, pauses = babysit(*[75] * 14, 0)
    assert (code, n_calls) == (0, 15)
    assert pauses[-1] == pauses[-2] == max(pauses) <= 600


def test_the_same_death_five_times_in_a_row_is_the_end(babysit):
    code, n_calls, _ = babysit(75, 134, 134, 137, *[134] * 9)
    assert (code, n_calls) == (134, 9)
