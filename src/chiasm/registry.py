"""Parts by exact name.

``register("connector", "mlp")`` above a class enters it; ``get("connector", "mlp")`` finds it. A part from outside the
package is either registered the same way or named by its place, ``"package.module:Class"``. A name entered twice is an
error, an unknown one says which are near.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from chiasm.errors import RegistryError, nearest

T = TypeVar("T")

# Where the built-in entries of each kind are imported from, the first time the kind is asked for.
ROOMS = {
    "encoder": "chiasm.encoders",
    "connector": "chiasm.connectors",
    "lm": "chiasm.lm",
    "fusion": "chiasm.fusion",
    "merge": "chiasm.fusion",
    "modality": "chiasm.processing",
    "front_end": "chiasm.processing",
    "template": "chiasm.processing",
    "preset": "chiasm.presets",
    "checkpoint": "chiasm.presets",
    "source": "chiasm.data",
    "objective": "chiasm.train",
    "method": "chiasm.train.methods",
    "adapter": "chiasm.train.methods.files",
    "task": "chiasm.eval",
    "metric": "chiasm.eval",
}

_entries: dict[str, dict[str, Any]] = {kind: {} for kind in ROOMS}
_filled: set[str] = set()


def register(kind: str, name: str) -> Callable[[T], T]:
    """Decorator that enters a class or function under ``name``. Raises RegistryError where the name is taken."""
    table = _table(kind)

    def enter(item: T) -> T:
        if name in table and table[name] is not item:
            raise RegistryError(f"{kind} {name!r} is registered already, by {_place(table[name])}")
        table[name] = item
        return item

    return enter


def get(kind: str, name: str) -> Any:
    """The entry called ``name``, or the object at ``"package.module:Class"``. Raises RegistryError."""
    table = _table(kind)
    if not isinstance(name, str):
        raise RegistryError(f"a {kind} is asked for by its name, a text; got {type(name).__name__}")
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            where = "its folder must be on Python's path: PYTHONPATH=FOLDER before the command, or an installed package"
            raise RegistryError(f"{kind} {name!r} cannot be imported: {error}; {where}") from error
        except (ImportError, AttributeError) as error:
            raise RegistryError(f"{kind} {name!r} cannot be imported: {error}") from error
    _fill(kind)
    if name not in table:
        raise RegistryError(f"unknown {kind} {name!r}; {nearest(name, table)}")
    return table[name]


def kinds_of(item: Any) -> list[str]:
    """The kinds that an object is registered as so far."""
    return [kind for kind, table in _entries.items() if any(item is entry for entry in table.values())]


def names(kind: str) -> list[str]:
    """All registered names of a kind, sorted."""
    table = _table(kind)
    _fill(kind)
    return sorted(table)


def _table(kind: str) -> dict[str, Any]:
    if kind not in _entries:
        raise RegistryError(f"unknown kind {kind!r}; {nearest(kind, _entries)}")
    return _entries[kind]


def _fill(kind: str) -> None:
    if kind not in _filled:
        import_module(ROOMS[kind])
        _filled.add(kind)


def _place(item: Any) -> str:
    return f"{getattr(item, '__module__', '?')}:{getattr(item, '__qualname__', item)}"
