"""Imports go one way, up the steps below. Imports for type checking are excused; those inside functions are not."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chiasm

ROOT = Path(chiasm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A room may import from itself and from rooms on a smaller step. "Room" is the first folder or file below chiasm/.
STEPS: dict[str, int] = {
    **dict.fromkeys(("types", "errors", "registry", "config"), 0),
    "nn": 1,
    **dict.fromkeys(("encoders", "connectors", "lm"), 2),
    "fusion": 3,
    **dict.fromkeys(("compose", "model_config"), 4),
    "presets": 5,
    **dict.fromkeys(("infer", "checkpoints", "card", "conversation"), 6),
    "vlm": 7,
    "data": 8,
    "retrieve": 8,
    "report": 9,  # shows examples of data
    "eval": 10,
    "train": 11,  # a run ends with its held-out evaluation, so train may use eval, never the other way
    "demo": 12,
    "serve": 12,
    "cli": 13,
    "__main__": 14,
}
GROUND = {"types", "errors", "registry", "config"}
# Rooms that see less than their step allows.
NARROW: dict[str, set[str]] = {
    "processing": GROUND,  # handed the tokenizer and the counter; knows no model
    "convert": GROUND,  # names and tensors only
}
STEPS["convert"] = 1  # presets carry their weight rules
STEPS["processing"] = 3  # below model_config, which nests its configuration

EXCUSED: dict[tuple[str, str], str] = {
    ("processing/pixels.py", "chiasm.nn.kernels"): "compiles a page of C++; knows no model",
    ("processing/pixels.py", "chiasm.nn"): "the same",
}  # (file below chiasm/, imported module) → reason


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of chiasm that a file imports, wherever the import stands, save under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and any(
            getattr(n, "id", getattr(n, "attr", "")) == "TYPE_CHECKING" for n in ast.walk(node.test)
        ):
            yield from imported(ast.Module(body=node.orelse, type_ignores=[]))
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "chiasm")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used in this package"
            if node.module == "chiasm":
                yield from (f"chiasm.{alias.name}" for alias in node.names)
            elif (node.module or "").startswith("chiasm."):
                yield str(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            yield from (
                a.value
                for a in node.args
                if isinstance(a, ast.Constant) and isinstance(a.value, str) and a.value.startswith("chiasm.")
            )
        yield from imported(node)


def complaints(place: str, source: str, path: str) -> list[str]:
    """What a file of the room ``place`` imports against the direction."""
    found = []
    for module in imported(ast.parse(source)):
        if (path, module) in EXCUSED:
            continue
        target = module.split(".")[1] if "." in module else ""
        if not target or target == place:
            continue
        if target not in STEPS:
            # a public name of the package itself, or a room that this table has not been told about
            if target in chiasm.__all__:
                continue
            found.append(f"{path} imports {module}: room {target!r} has no step in this test")
        elif place in NARROW and target not in NARROW[place]:
            found.append(f"{path} imports {module}: {place} sees only {', '.join(sorted(NARROW[place]))}")
        elif STEPS[target] >= STEPS[place] and not (STEPS[target] == STEPS[place] == 0):
            found.append(f"{path} imports {module}: {target} does not stand below {place}")
    return found


def test_every_room_has_a_step():
    rooms = {room(path) for path in FILES if room(path) != "__init__"}
    assert rooms <= set(STEPS), f"rooms without a step: {sorted(rooms - set(STEPS))}"


@pytest.mark.parametrize("path", [p for p in FILES if room(p) != "__init__"], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path):
    assert not complaints(room(path), path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("nn", "from chiasm.encoders.vit import ViT"),
        ("lm", "def f():\n    import chiasm.encoders.vit"),
        ("fusion", "from chiasm import vlm"),
        ("processing", "from chiasm.nn import rope"),
        ("convert", "from chiasm.lm.decoder import Decoder"),
        ("data", "import_module('chiasm.train.loop')"),
        ("encoders", "if TYPE_CHECKING:\n    pass\nelse:\n    from chiasm import fusion"),
        ("errors", "from chiasm.nn import mlp"),
    ],
)
def test_the_rule_catches(place: str, source: str):
    assert complaints(place, source, "x.py")


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("encoders", "from chiasm.nn.patch import Patches\nfrom chiasm.types import Tokens"),
        ("nn", "if TYPE_CHECKING:\n    from chiasm.vlm import VLM"),
        ("types", "from chiasm.errors import DataError"),
    ],
)
def test_the_rule_lets_pass(place: str, source: str):
    assert not complaints(place, source, "x.py")


@pytest.mark.parametrize(
    "statement",
    ["import chiasm", "import chiasm.cli", "import chiasm.types, chiasm.errors, chiasm.registry, chiasm.config"],
)
def test_no_torch(statement: str):
    code = f"import sys\n{statement}\nprint(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom chiasm.cli import main\nsys.argv = ['chiasm', '--help']\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]" and "Usage" in done.stdout
