"""The objective contract: a sum and its weight, so that accumulation and several ranks give exactly the gradient of the
whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from chiasm.fusion.base import Fusion
from chiasm.types import Batch


@dataclass
class Loss:
    """``total`` is differentiable and summed over what counts (tokens, pairs), ``weight`` says how many those are.

    ``parts`` holds further pairs (sum, weight) for the log, by name: ``source/scenes``.
    """

    total: Tensor  # [] float32
    weight: float
    parts: Mapping[str, tuple[float | Tensor, float | Tensor]] = field(default_factory=dict)


Objective = Callable[[Fusion, Batch], Loss]
