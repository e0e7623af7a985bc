"""What a stage trains: a table of name patterns, resolved against a built model before the first step.

A pattern is a dotted prefix of parameter names (``encoders.image``, ``lm.layers.0``) or a glob (``connectors.*``,
``*.norm*``). Later rows win. ``freeze`` and ``train`` are actions, a number is ``train`` at that learning rate; further
methods (LoRA, adapters) are further actions of ``ACTIONS``, never other builders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from chiasm.errors import ConfigError, nearest

Action = float | str
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


def check_action(action: Action) -> None:
    """Raise ConfigError unless the action is known; a number must be a learning rate above zero."""
    if isinstance(action, str):
        if action not in ACTIONS:
            raise ConfigError(f"unknown action {action!r} in a plan; {nearest(action, ACTIONS)}, or a learning rate")
    elif not action > 0:
        raise ConfigError(f"a plan's learning rate is {action}; it must be above 0, or use 'freeze'")


def resolve(model: nn.Module, table: Mapping[str, Action], lr: float) -> Plan:
    """Match a plan's table with the model's parameters. Raises ConfigError on a pattern without parameters, a parameter
    without a pattern, or nothing to train.
    """
    chosen: dict[str, Action] = {}
    parameters = dict(model.named_parameters())
    for pattern, action in table.items():
        check_action(action)
        found = [name for name in parameters if matches(pattern, name)]
        if not found:
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
    rates = {n: None if a == "freeze" else lr if a == "train" else float(a) for n, a in chosen.items()}
    if all(rate is None for rate in rates.values()):
        raise ConfigError(f"the plan freezes all {len(parameters)} parameters; let it train a part")
    groups: dict[tuple[str, float | None], int] = {}
    for name, rate in rates.items():
        key = (part_of(name), rate)
        groups[key] = groups.get(key, 0) + parameters[name].numel()
    rows = tuple(Row(p, n, "freeze" if rate is None else "train", rate) for (p, rate), n in groups.items())
    return Plan(rates, rows)


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
