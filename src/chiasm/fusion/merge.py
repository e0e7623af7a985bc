"""How the projected units of one medium become one run of tokens: tiles of a picture, frames of a clip.

Papers: LLaVA-NeXT (2024), LLaVA-OneVision (arXiv:2408.03326), LLaVA-NeXT-Video (2024).
"""

from __future__ import annotations

from torch import Tensor

from chiasm.config import PartConfig
from chiasm.registry import register
from chiasm.types import Count, Layout


class MergeConfig(PartConfig):
    """How units are merged. ``newline`` says whether the model must own a newline vector for it."""

    def count(self, layout: Layout, unit: Count) -> int:
        """Tokens of the whole medium, from the count of one projected unit."""
        raise NotImplementedError

    @property
    def needs_newline(self) -> bool:
        """True where ``merge`` is given the model's newline vector ``[D]``."""
        return False


class Merge:
    """Puts the units ``x [U, N, D]`` of one medium together as ``[M, D]``; has no parameters of its own."""

    Config: type[MergeConfig] = MergeConfig

    def __init__(self, config: MergeConfig):
        self.config = config

    def __call__(self, x: Tensor, unit: Count, layout: Layout, newline: Tensor | None) -> Tensor:
        """``x [U, N, D]``, ``newline [D]`` → ``[M, D]`` with ``M == config.count(layout, unit)``."""
        raise NotImplementedError


@register("merge", "flat")
class Flat(Merge):
    """All tokens of all units, one after the other."""

    class Config(MergeConfig):
        """No options."""

        type: str = "flat"

        def count(self, layout: Layout, unit: Count) -> int:
            """U · N."""
            return layout.units * unit.tokens

    def __call__(self, x: Tensor, unit: Count, layout: Layout, newline: Tensor | None) -> Tensor:
        """``x [U, N, D]`` → ``[U·N, D]``."""
        return x.flatten(0, 1)  # [U*N, D]
