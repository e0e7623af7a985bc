"""What two models differ in: tensors by part, configuration, prompt and pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoints import folder as own
from chiasm.checkpoints.hub import local_folder
from chiasm.config import diff
from chiasm.convert.io import open_weights, read_json
from chiasm.processing.fingerprint import fingerprint
from chiasm.train.plan import part_of
from chiasm.vlm import load


@dataclass
class PartChange:
    """Tensors of one part in both models. ``largest`` is that of all differences of numbers, ``relative`` the norm of
    the differences by the norm of the first model's numbers.
    """

    part: str
    tensors: int = 0
    changed: int = 0
    largest: float = 0.0
    squares: float = 0.0
    base: float = 0.0
    only: list[str] = field(default_factory=list)  # "- name" is in the first only, "+ name" in the second only
    reshaped: list[str] = field(default_factory=list)

    @property
    def relative(self) -> float:
        """Norm of the differences by that of the first model."""
        return math.sqrt(self.squares / self.base) if self.base else 0.0


@dataclass
class Comparison:
    """Everything in which two models differ."""

    parts: list[PartChange]
    config: dict[str, tuple[Any, Any]]
    prompt: list[str]  # differences of what the probe conversations become

    @property
    def same(self) -> bool:
        """Whether nothing differs, where a model came from aside."""
        return not (self.config or self.prompt or any(p.changed or p.only or p.reshaped for p in self.parts))


class Opened:
    """A model's configuration, prompt and tensors, the latter one at a time where the folder is of our layout."""

    def __init__(self, name: str | Path):
        path = local_folder(name)
        self.vlm: Any = None
        values = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        if own.is_own(values):
            self.config = own.parsed(values, path)
            self.prompt = read_json(path / own.FINGERPRINT) if (path / own.FINGERPRINT).is_file() else {}
            self.weights = open_weights(path)
            self.names = set(self.weights.info)
        else:
            self.vlm = load(name)
            self.config, self.prompt = self.vlm.config, fingerprint(self.vlm.processor)
            self.state = self.vlm.state_dict()
            self.names = set(self.state)

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU."""
        return self.state[name].cpu() if self.vlm is not None else self.weights.read(name)


def compare(first: str | Path, second: str | Path) -> Comparison:
    """Compare two folders or hub names, tensor by tensor. Raises CheckpointError where one cannot be read."""
    a, b = Opened(first), Opened(second)
    parts: dict[str, PartChange] = {}
    for name in sorted(a.names | b.names):
        part = parts.setdefault(part_of(name), PartChange(part_of(name)))
        if name not in a.names or name not in b.names:
            part.only.append(("- " if name in a.names else "+ ") + name)
            continue
        part.tensors += 1
        _add(part, name, a.read(name), b.read(name))
    changed = {k: v for k, v in diff(a.config, b.config).items() if not k.startswith("provenance")}
    return Comparison(list(parts.values()), changed, list(_prompts(a.prompt, b.prompt)))


def _add(part: PartChange, name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        part.reshaped.append(f"{name} {list(a.shape)} → {list(b.shape)}")
        part.changed += 1
        return
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    gap = b.to(wide) - a.to(wide)
    part.base += float(a.to(wide).square().sum(dtype=torch.float64))
    largest = float(gap.abs().max()) if gap.numel() else 0.0
    if largest > 0 or not math.isfinite(largest):
        part.changed += 1
        part.largest = max(part.largest, largest)
        part.squares += float(gap.square().sum(dtype=torch.float64))


def _prompts(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """Differences of two fingerprints in words."""
    left, right = a.get("probes", {}), b.get("probes", {})
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            yield f"probe {name!r} is in the {'first' if name in left else 'second'} model only"
        elif left[name] != right[name]:
            keys = [key for key in left[name] if left[name].get(key) != right[name].get(key)]
            yield f"probe {name!r} differs in {', '.join(keys)}"
    if a.get("stop_ids") != b.get("stop_ids"):
        yield f"generation stops at ids {a.get('stop_ids')} in the first, {b.get('stop_ids')} in the second"
