"""A method: a change of a built model, chosen by parameter names, that adds few parameters and trains only those.

A method finds the modules it can serve among the parameters that the plan gives it, and installs itself there. Names of
what was there before stay as they are, so weight rules, plans and checkpoints of the base model keep holding. A module
that a method made or added says so by ``method`` (its options) and ``trained`` (names of its own new parameters);
nothing else records what is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import Field
from torch import nn

from chiasm.config import PartConfig
from chiasm.errors import ConfigError, nearest


class MethodConfig(PartConfig):
    """Options of a method. ``lr`` None: the stage's learning rate."""

    quantises: ClassVar[bool] = False  # whether it keeps the base weights in fewer bits

    lr: float | None = Field(default=None, gt=0)

    def label(self) -> str:
        """As it is written in a plan, without what is left at its default."""
        fields = type(self).model_fields
        given = [
            f"{name}={_shown(value)}"
            for name, value in self.dump().items()
            if name not in ("type", "lr") and value != fields[name].get_default(call_default_factory=True)
        ]
        return f"{self.type}({', '.join(given)})" if given else self.type

    def same(self, other: MethodConfig) -> bool:
        """Whether the two are one method with the same options; a learning rate of their own may differ."""
        return self.model_copy(update={"lr": None}) == other.model_copy(update={"lr": None})


@runtime_checkable
class Installed(Protocol):
    """A module that belongs to a method."""

    method: MethodConfig
    trained: tuple[str, ...]  # its own parameters that the method added
    beside: bool  # it stands below the module that it changes, not in its place


class Method:
    """One way to train a part by a few parameters. Registered as ``("method", name)``."""

    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: MethodConfig):
        self.config: Any = config

    def find(self, model: nn.Module, parameters: set[str]) -> list[str]:
        """Names of the modules to change, among those that own ``parameters``. Raises ConfigError: there is none."""
        raise NotImplementedError

    def install(self, model: nn.Module, name: str) -> None:
        """Change the module called ``name``. New parameters are drawn from the default generator."""
        raise NotImplementedError


def installed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that belong to a method, with their names."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "method", None), MethodConfig):
            yield name, module


def target_of(name: str, module: Installed) -> str:
    """The name of the module that was changed."""
    return name.rpartition(".")[0] if module.beside else name


def own_parameters(model: nn.Module) -> dict[str, MethodConfig]:
    """The parameters that methods added, by name, with their method."""
    return {f"{name}.{own}": module.method for name, module in installed(model) for own in module.trained}


def carrier(model: nn.Module, name: str) -> MethodConfig | None:
    """The method that the module called ``name`` carries, if any."""
    return next((module.method for at, module in installed(model) if target_of(at, module) == name), None)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where the module called ``name`` is."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def owners(names: Iterable[str]) -> set[str]:
    """The modules that the parameters called ``names`` belong to directly."""
    return {name.rpartition(".")[0] for name in names}


def whole(model: nn.Module, name: str, parameters: set[str]) -> bool:
    """Whether all parameters below the module called ``name`` (at least one) are in ``parameters``."""
    below = [f"{name}.{own}" for own, _ in model.get_submodule(name).named_parameters()]
    return bool(below) and all(full in parameters for full in below)


def idle(model: nn.Module) -> set[str]:
    """Parameters that no forward pass reads: blocks behind the layer a tower is read at. No place for methods."""
    found = set()
    for name, module in model.named_modules():
        unused = getattr(module, "unused", None)
        if callable(unused):
            found |= {f"{name}.{own}" for own in unused()}
    return found


def narrow(found: Sequence[str], targets: Sequence[str] | None, label: str) -> list[str]:
    """Of the modules ``found`` those whose name ends in a target. Raises ConfigError for a target that none ends in."""
    if targets is None:
        return list(found)
    for target in targets:
        if not any(ends(name, target) for name in found):
            last = {name.rpartition(".")[2] for name in found}
            raise ConfigError(f"{label}: target {target!r} matches 0 of {len(found)} modules; {nearest(target, last)}")
    return [name for name in found if any(ends(name, target) for target in targets)]


def ends(name: str, target: str) -> bool:
    """Whether ``target`` is the last step of a dotted name, or its last steps."""
    return name == target or name.endswith("." + target)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
