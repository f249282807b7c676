"""The tower: a file imports from its own folder and those above it in FOLDERS; no import circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [
    "algpt2", "algpt2/system", "algpt2/corpus", "algpt2/shards", "algpt2/runs",
    "algpt2/evaluation", "algpt2/export", "algpt2/training", "algpt2/tpu", ".",
]  # fmt: skip
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("algpt2/**/*.py")]
}
FRAMEWORKS = {"torch": "_pt", "tensorflow": "_tf", "keras": "_tf"}
OTHERS = {  # files without the suffix that import the framework
    "_pt": ("modeling_algpt2", "kernels_algpt2"),
    "_tf": ("modeling_tf_algpt2", "kernels_tf_algpt2"),
}


def imports(path):
    """Names that a file imports, within functions too: of `from .a import b` both a and a.b."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            name = ".".join([*base, *filter(None, [node.module])])
            yield from (name, *(f"{name}.{alias.name}" for alias in node.names))


GRAPH = {name: {x for x in imports(path) if x in FILES} for name, path in FILES.items()}


def floor(name):
    """Where a file stands in FOLDERS."""
    return FOLDERS.index(FILES[name].parent.relative_to(ROOT).as_posix())


def test_no_file_imports_itself_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_from_its_own_floor_and_below(name):
    assert not [x for x in GRAPH[name] if floor(x) > floor(name)]


@pytest.mark.parametrize("name", FILES)
def test_a_framework_is_imported_in_files_of_its_suffix_only(name):
    stem = FILES[name].stem
    suffixes = {FRAMEWORKS[x] for y in imports(FILES[name]) if (x := y.split(".")[0]) in FRAMEWORKS}
    assert all(stem.endswith(suffix) or stem in OTHERS[suffix] for suffix in suffixes)
