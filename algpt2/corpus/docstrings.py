"""The corpus that every installation has: the docstrings of the packages in requirements.txt.

About 25,000 documents, 25 MB of English and code. They are extracted once (a minute) into the cache
folder, and split into train and valid by the hash of each document. No package is imported.
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError, describe
from ..system.console import log
from ..system.files import cache_dir

PACKAGES = ("torch", "transformers", "tensorflow", "keras", "numpy", "pandas")
SPLITS = ("train", "valid", "all")
VERSION = 1  # of the extraction; part of the cache's key
MIN_CHARACTERS = 200
VALID_FRACTION = 0.02


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone; every split is made by it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def read_docstrings(split: str) -> Iterator[str]:
    """The documents of docs:train, docs:valid or docs:all in a fixed order."""
    for text in _cached_docstrings():
        if split == "all" or split == (
            "valid" if hash_fraction(text) < VALID_FRACTION else "train"
        ):
            yield text


def package_versions() -> dict[str, str]:
    """The version of each package of docs: that is installed; no package is imported."""
    versions = {}
    for package in filter(importlib.util.find_spec, PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # such as tensorflow-cpu
            names = importlib.metadata.packages_distributions().get(package, [])
            versions[package] = " ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    return versions


def _cached_docstrings() -> list[str]:
    versions = package_versions()
    if not versions:
        raise UserError(f"docs: needs one of the packages {', '.join(PACKAGES)}")
    key = json.dumps([VERSION, MIN_CHARACTERS, sys.version_info[:2], versions])
    path = cache_dir() / f"docs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
    try:
        digest, _, lines = path.read_bytes().partition(b"\n")
        if hashlib.sha256(lines).hexdigest().encode() == digest:
            return [json.loads(line) for line in lines.splitlines()]
        log(f"docs: {path} is damaged: extracting the docstrings again")
    except OSError:
        pass  # not there yet; or not readable, so not writable either: logged below
    names = " ".join(versions)
    log(f"docs: reading the docstrings of {names}: takes a minute, once; kept in {path}")
    if missing := sorted(set(PACKAGES) - set(versions)):
        log(f"docs: without {', '.join(missing)} (not installed)")
    texts = _docstrings(versions)
    lines = "".join(json.dumps(text) + "\n" for text in texts).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(lines).hexdigest().encode() + b"\n" + lines)
        partial.replace(path)
    except OSError as error:
        log(f"docs: not kept ({describe(error)}); they are read again next time")
        with contextlib.suppress(OSError):
            partial.unlink()
    return texts


def _docstrings(packages: Iterable[str]) -> list[str]:
    """The docstrings from MIN_CHARACTERS on in the packages, each once, in a fixed order."""
    texts: dict[str, None] = {}
    for package in packages:
        start = time.monotonic()
        before = len(texts)
        for folder in importlib.util.find_spec(package).submodule_search_locations:
            for path in sorted(Path(folder).rglob("*.py"), key=Path.as_posix):
                texts.update(dict.fromkeys(_file_docstrings(path.read_bytes())))
        seconds = time.monotonic() - start
        log(f"docs: {package}: {len(texts) - before:,} documents ({seconds:.0f} s)")
    return list(texts)


def _file_docstrings(source: bytes) -> Iterator[str]:
    if b'"""' not in source and b"'''" not in source:
        return  # nearly half of the files: not worth parsing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the packages' strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return  # a template, or the syntax of a newer Python
    for node in _definitions(tree):
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_CHARACTERS:
            yield text.encode("utf-8", "replace").decode()


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """Modules, classes and functions in the order of the source; expressions are not visited."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, name, ()):
            yield from _definitions(child)
