"""What a stage trains: a table of name patterns, resolved against a built model before the first step.

A pattern is a dotted prefix of parameter names (``encoders.image``, ``lm.layers.0``) or a glob (``connectors.*``,
``*.norm*``). Later rows win. ``freeze`` and ``train`` are actions, a number is ``train`` at that learning rate, and a
method (``lora(r=16)``, or a table with its ``type``) freezes what the pattern means and trains what it adds there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from chiasm import registry
from chiasm.errors import ConfigError, nearest
from chiasm.train.decay import decays
from chiasm.train.methods.base import MethodConfig, installed, own_parameters, replace
from chiasm.train.methods.table import carried, install, parse_method, skeleton

Action = float | str | dict[str, Any]
ACTIONS = ("freeze", "train")

PLANS: dict[str, dict[str, Action]] = {
    "align": {"*": "train", "encoders": "freeze", "lm": "freeze"},  # connectors and the newline vector
    "instruct": {"*": "train", "encoders": "freeze"},
    "end_to_end": {"*": "train"},
}


@dataclass(frozen=True)
class Row:
    """Parameters of one part that are treated alike."""

    part: str
    parameters: int
    action: str
    lr: float | None  # None: frozen

    @property
    def trainable(self) -> bool:
        """Whether these parameters are learned."""
        return self.lr is not None


@dataclass(frozen=True)
class Plan:
    """A resolved plan: the learning rate of each parameter by name (None: frozen), and its summary."""

    rates: dict[str, float | None]
    rows: tuple[Row, ...]

    @property
    def trainable(self) -> int:
        """Number of parameters that are learned."""
        return sum(row.parameters for row in self.rows if row.trainable)

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return sum(row.parameters for row in self.rows)


def check_action(action: Action) -> Action:
    """The action, a number as a number (YAML reads ``1e-3`` as text). Raises ConfigError unless it is known."""
    if isinstance(action, str):
        try:
            return check_action(float(action))
        except ValueError:
            pass
        if action not in ACTIONS and parse_method(action) is None:
            known = [*ACTIONS, *registry.names("method")]
            raise ConfigError(f"unknown action {action!r} in a plan; {nearest(action, known)}, or a learning rate")
    elif isinstance(action, Mapping):
        parse_method(action)
    elif not action > 0:
        raise ConfigError(f"a plan's learning rate is {action}; it must be above 0, or use 'freeze'")
    return action


def resolve(model: nn.Module, table: Mapping[str, Action], lr: float, decay: float = 1.0) -> Plan:
    """Match a plan's table with the model's parameters. Raises ConfigError on a pattern without parameters, a parameter
    without a pattern, a method that finds nothing, or nothing to train.

    Methods that the model does not carry yet are put on a copy without memory, so the model stays as it is. ``decay``:
    see ``chiasm.train.decay``; rates that the table gives stand as they are.
    """
    chosen = choose(model, table)
    wanted = methods_in(model, chosen)
    if any(not carried(model, method) for method in wanted.values()):
        model = skeleton(model)
        install(model, wanted)
        chosen = choose(model, table)
    own = own_parameters(model)
    shares = decays(model, decay) if decay < 1 else {}
    rates = {name: _rate(action, name in own, lr * shares.get(name, 1.0)) for name, action in chosen.items()}
    if all(rate is None for rate in rates.values()):
        raise ConfigError(f"the plan freezes all {len(rates)} parameters; let it train a part")
    groups: dict[tuple[str, str, float | None], int] = {}
    for name, parameter in model.named_parameters():
        rate = rates[name]
        label = "freeze" if rate is None else own[name].label() if name in own else "train"
        key = (part_of(name), label, rate)
        groups[key] = groups.get(key, 0) + parameter.numel()
    for name, module in installed(model):
        if getattr(module, "quantised", 0):
            key = (part_of(name), "freeze, 4 bits", None)
            groups[key] = groups.get(key, 0) + module.quantised
    rows = tuple(Row(p, n, label, rate) for (p, label, rate), n in groups.items())
    return Plan(rates, rows)


def prepare(model: nn.Module, table: Mapping[str, Action], seed: int = 0) -> None:
    """Put the methods of a plan's table on the model, their parameters drawn from ``seed``. Raises ConfigError."""
    install(model, methods_in(model, choose(model, table)), seed)


def quantises(table: Mapping[str, Action]) -> bool:
    """Whether a method of the table keeps base weights in fewer bits: such a model is best moved when that is done."""
    return any(method is not None and method.quantises for method in map(parse_method, table.values()))


def choose(model: nn.Module, table: Mapping[str, Action]) -> dict[str, Action]:
    """The action of each parameter: that of the last pattern that means it. Raises ConfigError."""
    chosen: dict[str, Action] = {}
    parameters = dict(model.named_parameters())
    held = {f"{name}.weight": module.method for name, module in installed(model) if getattr(module, "quantised", 0)}
    hidden = list(held)
    _check_held(held, table)
    for pattern, action in table.items():
        action = check_action(action)
        found = [name for name in parameters if matches(pattern, name)]
        if not found and not any(matches(pattern, name) for name in hidden):
            parts = sorted({part_of(name) for name in parameters})
            raise ConfigError(
                f"plan pattern {pattern!r} matches 0 of {len(parameters)} parameters; {nearest(pattern, parts)}"
            )
        chosen.update(dict.fromkeys(found, action))
    left = [name for name in parameters if name not in chosen]
    if left:
        raise ConfigError(
            f"the plan says nothing about {len(left)} of {len(parameters)} parameters, the first is {left[0]!r}; "
            "put a row '*': freeze first"
        )
    return chosen


def _check_held(held: Mapping[str, MethodConfig], table: Mapping[str, Action]) -> None:
    """Raise ConfigError where a plan means to train weights that an earlier stage keeps in 4 bits."""
    refused: dict[str, str] = {}
    for name, method in held.items():
        action = next((a for pattern, a in reversed(list(table.items())) if matches(pattern, name)), "freeze")
        wanted = parse_method(check_action(action))
        if action != "freeze" and not (wanted is not None and wanted.same(method)):
            refused[name] = f"{action if wanted is None else wanted.label()!r}, and carries {method.label()!r}"
    if refused:
        name, what = next(iter(refused.items()))
        raise ConfigError(
            f"the plan means to train {len(refused)} of {len(held)} weights that are kept in 4 bits since an earlier "
            f"stage: {name} is given {what}. Go on with that same method, freeze the part, or make whole weights of "
            "the model first: chiasm merge FOLDER MERGED, then a recipe with model.folder: MERGED"
        )


def settled(model: nn.Module, table: Mapping[str, Action]) -> None:
    """Leave a model without memory as a stage with this table leaves the real one: LoRA merged, the rest in place."""
    prepare(model, table)
    if not any(getattr(module, "quantised", 0) for _, module in installed(model)):
        for name, module in list(installed(model)):
            if hasattr(module, "merged"):
                replace(model, name, module.merged())


def methods_in(model: nn.Module, chosen: Mapping[str, Action]) -> dict[str, MethodConfig]:
    """The parameters of the base model that a method is given, with the method."""
    own = own_parameters(model)
    parsed = {name: parse_method(action) for name, action in chosen.items() if name not in own}
    return {name: method for name, method in parsed.items() if method is not None}


def _rate(action: Action, own: bool, lr: float) -> float | None:
    """The learning rate that an action gives to a parameter, which a method added (``own``) or not."""
    method = parse_method(action)
    if method is not None:
        return (method.lr or lr) if own else None
    return None if action == "freeze" else lr if action == "train" else float(action)  # type: ignore[arg-type]


def apply(model: nn.Module, plan: Plan) -> None:
    """Freeze and free the parameters; modules that are frozen whole run in eval mode, the others in training mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plan.rates[name] is not None)
        parameter.grad = None
    set_modes(model)


def set_modes(model: nn.Module) -> None:
    """Training mode, but eval mode for every module whose parameters are all frozen (dropout, batch statistics)."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a parameter: it is its name, a dotted prefix of it, or a glob over either."""
    if name == pattern or name.startswith(pattern + "."):
        return True
    return any(c in pattern for c in "*?[") and (fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*"))


def part_of(name: str) -> str:
    """The part a parameter belongs to: ``encoders.image``, ``connectors.image``, ``lm``, ``newline``."""
    steps = name.split(".")
    return ".".join(steps[:2]) if steps[0] in ("encoders", "connectors") else steps[0]
