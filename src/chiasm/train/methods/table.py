"""Methods in a plan's table: how they are written, which modules they get, and putting them there."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from chiasm import registry
from chiasm.config import read_scalar
from chiasm.errors import ConfigError
from chiasm.train.methods.base import Method, MethodConfig, carrier, idle, installed, target_of

WRITTEN = re.compile(r"\s*([\w.:]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def parse_method(action: Any) -> MethodConfig | None:
    """The method that an action of a plan means: ``lora(r=16, targets=[q_proj, v_proj])``, ``lora``, or a table with
    the key ``type``. None where it means none. Raises ConfigError.
    """
    if isinstance(action, MethodConfig):
        return action
    if isinstance(action, Mapping):
        values = dict(action)
        if "type" not in values:
            raise ConfigError(f"a plan's action {values!r} has no 'type'; give one of {_known()}")
        return _parsed(values.pop("type"), values)
    found = WRITTEN.fullmatch(action) if isinstance(action, str) else None
    if found is None or (found[2] is None and found[1] not in registry.names("method")):
        return None
    return _parsed(found[1], _options(found[2] or "", action))


def make(config: MethodConfig) -> Method:
    """The method of its options."""
    method: Method = registry.get("method", config.type)(config)
    return method


def install(model: nn.Module, chosen: Mapping[str, MethodConfig], seed: int = 0) -> list[tuple[MethodConfig, str]]:
    """Install each method on the modules it finds among the parameters that ``chosen`` gives it; gives what is new.

    New parameters are drawn from ``seed``; the caller's generators are left as they were. A module that carries the
    method already is left alone. Raises ConfigError.
    """
    wanted: dict[MethodConfig, set[str]] = {}
    skipped = idle(model)
    for name, config in chosen.items():
        wanted.setdefault(config, set()).add(name)
    new = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for config, parameters in wanted.items():
            method = make(config)
            there = set(carried(model, config))
            for name in method.find(model, parameters - skipped) if not there else []:
                other = carrier(model, name)
                if other is not None:
                    raise ConfigError(
                        f"{config.label()} cannot be put on {name}, which carries {other.label()}: merge it first, or "
                        "leave the module out"
                    )
                method.install(model, name)
                new.append((config, name))
    return new


def carried(model: nn.Module, config: MethodConfig) -> list[str]:
    """The modules that carry this method with these options."""
    return [name for other, name in records(model) if other.same(config)]


def records(model: nn.Module) -> list[tuple[MethodConfig, str]]:
    """What is installed: (options, name of the module it was put on)."""
    found: dict[tuple[MethodConfig, str], None] = {}
    for name, module in installed(model):
        found.setdefault((module.method, target_of(name, module)))
    return list(found)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy with the same modules and shapes, whose tensors take no memory."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _parsed(name: str, values: Mapping[str, Any]) -> MethodConfig:
    config: MethodConfig = registry.get("method", name).Config.parse(values, where=f"method {name!r}")
    return config


def _options(text: str, action: str) -> dict[str, Any]:
    """``r=16, targets=[q_proj, v_proj]`` as a dict; the right sides are YAML."""
    values: dict[str, Any] = {}
    for word in _split(text):
        key, equals, value = word.partition("=")
        key = key.strip()
        if not equals or not key or key in values:
            problem = "is given twice" if key in values else "is not of the form key=value"
            raise ConfigError(f"plan action {action!r}: {word.strip()!r} {problem}")
        values[key] = read_scalar(value)
    return values


def _split(text: str) -> list[str]:
    """At the commas that stand outside of brackets."""
    words, depth = [""], 0
    for character in text:
        depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            words.append("")
        else:
            words[-1] += character
    return [word for word in words if word.strip()]


def _known() -> str:
    return ", ".join(registry.names("method"))
