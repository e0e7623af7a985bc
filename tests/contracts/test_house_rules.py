"""The house rules that a machine can hold: lengths, shapes in docstrings, arguments, imports by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import chiasm

ROOT = Path(chiasm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

FILE, FUNCTION, FORWARD, ARGUMENTS = 400, 60, 40, 12

# "file", "file:function" or "file:Class" below chiasm/ → why it may be longer. Each entry must still be needed.
ALLOWED: dict[str, str] = {}


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        name = getattr(node, "name", "")
        dotted = f"{owner}.{name}".strip(".") if name else owner
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield dotted, node
        yield from functions(node, dotted)


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


def takes_tensors(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A ``forward`` is a method; its docstring is owed where it does anything."""
    arguments = node.args.posonlyargs + node.args.args
    return bool(arguments) and arguments[0].arg == "self" and len(arguments) > 1


def broken(path: str, source: str) -> dict[str, str]:
    """Rule breaks of one file: place → what is wrong."""
    tree = ast.parse(source)
    found: dict[str, str] = {}
    lines = source.count("\n") + 1
    if lines > FILE + 1:
        found[path] = f"{lines} lines, {FILE} allowed"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found[f"{path}:*"] = f"star import from {node.module}"
    for name, node in functions(tree):
        place, last = f"{path}:{name}", name.rsplit(".", 1)[-1]
        if length(node) > FUNCTION:
            found[place] = f"{length(node)} lines, {FUNCTION} allowed"
        if last == "forward" and takes_tensors(node):
            if length(node) > FORWARD:
                found[place] = f"{length(node)} lines, {FORWARD} allowed for forward"
            if not re.search(r"\[[^\]\n]+\]", ast.get_docstring(node) or ""):
                found[place + " shape"] = "its docstring gives no shape in brackets"
        if last == "__init__":
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) - 1
            if count > ARGUMENTS:
                found[place] = f"{count} arguments, {ARGUMENTS} allowed"
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_house_rules(path: Path):
    found = broken(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    assert not {place: why for place, why in found.items() if place not in ALLOWED}


def test_exceptions_are_still_needed():
    everything: dict[str, str] = {}
    for path in FILES:
        everything |= broken(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    assert set(ALLOWED) <= set(everything), f"no longer needed: {sorted(set(ALLOWED) - set(everything))}"


LONG = "\n".join(["def f():"] + ["    x = 1"] * 60)
FORWARD_WITHOUT_SHAPE = 'class A:\n    def forward(self, x):\n        """x to y."""\n        return x\n'
LONG_FORWARD = "class A:\n    def forward(self, x):\n        '''``[B]``'''\n" + "        x = 1\n" * 40
MANY = "class A:\n    def __init__(self, " + ", ".join(f"a{i}" for i in range(14)) + "):\n        pass\n"


@pytest.mark.parametrize(
    "source", ["x = 1\n" * 401, LONG, FORWARD_WITHOUT_SHAPE, LONG_FORWARD, MANY, "from os import *\n"]
)
def test_the_rules_catch(source: str):
    assert broken("x.py", source)


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\n" * 400,
        'class A:\n    def forward(self, x):\n        """``x [B, N]`` to ``[B]``."""\n        return x\n',
    ],
)
def test_the_rules_let_pass(source: str):
    assert not broken("x.py", source)
