"""A gate between two encoders: how much of each reaches the language model, decided from what both saw.

Two ways. ``convex``: ``g·a + (1 − g)·b`` with ``g = sigmoid(W [a; b])`` for every channel of every patch. This is the
project's source documents' sketch, which they ascribe to MiniGPT-4 and MiniGPT-5; neither has a gate: MiniGPT-4
(arXiv:2304.10592) is a Q-Former and one linear layer, MiniGPT-5 (arXiv:2310.02239) adds generative tokens to it.
``residual_tanh``: ``a + tanh(g)·b`` with one ``g`` for a whole picture, from the means of both; published in LLaVA-HR
(arXiv:2403.03003, reference: luogen1996/LLaVA-HR ``S2FStitchAlignModuleV2``).

Differences by design: of LLaVA-HR the gate is kept (two layers on both means, inner width half the base's, tanh) and
zero at the start, so that the first encoder is undisturbed; its convolutions before the sum are one linear layer
here, which brings ``b`` to the width of ``a``. A second grid of another size is interpolated to the first. What
follows the gate is any connector (``then``): the sketch has a Q-Former, LLaVA-HR a perceptron.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from chiasm import registry
from chiasm.config import part
from chiasm.connectors.base import Connector, ConnectorConfig
from chiasm.connectors.mlp import perceptron
from chiasm.errors import ConfigError
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


@register("connector", "gate")
class Gate(Connector):
    """Two sources, in the order in which the stream names its encoders; the first gives width and grid."""

    class Config(ConnectorConfig):
        """``mode``: see the head of this file. ``then`` maps the gated features to the language model."""

        type: str = "gate"
        mode: Literal["convex", "residual_tanh"] = "convex"
        then: part("connector") = Field(default={"type": "mlp"}, validate_default=True)  # type: ignore[valid-type]

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """What ``then`` makes of the first source's tokens. Raises ConfigError where the two do not fit."""
            first, second = _two(source)
            _fits((first.tokens, first.grid), (second.tokens, second.grid))
            return self.then.count(first)

        @property
        def conditioned(self) -> bool:
            """True where ``then`` reads the instruction."""
            return self.then.conditioned

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        (name, dim), (_, second) = _two_items(in_dims)
        self.align = nn.Linear(second, dim)
        if config.mode == "convex":
            self.gate: nn.Module = nn.Linear(2 * dim, dim)
        else:
            self.gate = perceptron(2 * dim, max(1, dim // 2), 1, 2, "gelu")
            for parameter in self.gate[-1].parameters():
                nn.init.zeros_(parameter)
        self.then = registry.get("connector", config.then.type)(config.then, in_dims={name: dim}, out_dim=out_dim)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """Two of ``x [U, N, D_in]`` → the tokens that ``then`` makes of ``[U, N, D]``."""
        first, second = _two(tokens)
        if first.mask is not None or second.mask is not None:
            raise ConfigError("gate joins whole grids; one of its sources gives masked tokens")
        _fits((first.x.shape[1], first.grid), (second.x.shape[1], second.grid))
        a, b = first.x, self.align(_carried(second, first))  # each [U, N, D]
        g = self.opening(a, b)  # [U, N, D] or [U, 1, 1]
        mixed = g * a + (1 - g) * b if self.config.mode == "convex" else a + g * b  # [U, N, D]
        return self.then(Tokens(mixed, grid=first.grid), cond)

    def opening(self, a: Tensor, b: Tensor) -> Tensor:
        """The gate of ``a`` and ``b`` ``[U, N, D]``: ``[U, N, D]`` in 0..1 (convex), or ``[U, 1, 1]`` in -1..1."""
        if self.config.mode == "convex":
            return self.gate(torch.cat((a, b), dim=-1)).sigmoid()  # [U, N, D]
        means = torch.cat((a.mean(dim=1), b.mean(dim=1)), dim=-1)  # [U, 2*D]
        return self.gate(means).tanh().unsqueeze(1)  # [U, 1, 1]


def _carried(second: Tokens, first: Tokens) -> Tensor:
    """The second source's vectors on the first one's grid ``[U, N, D_second]``."""
    if second.grid == first.grid or second.grid is None or first.grid is None:
        return second.x
    plane = second.x.transpose(1, 2).unflatten(2, second.grid)  # [U, D, rows, columns]
    plane = F.interpolate(plane, size=first.grid, mode="bilinear", align_corners=False)
    return plane.flatten(2).transpose(1, 2)  # [U, N, D]


def _fits(first: tuple[int, object], second: tuple[int, object]) -> None:
    if first[0] != second[0] and (first[1] is None or second[1] is None):
        raise ConfigError(
            f"gate: its sources give {first[0]} and {second[0]} tokens and do not both form grids, so one cannot be "
            "carried to the other; use select='patch' for both encoders"
        )


def _two_items(sources: Mapping[str, int]) -> list[tuple[str, int]]:
    items = list(sources.items())
    if len(items) != 2:
        raise ConfigError(f"connector 'gate' joins two encoders, got {len(items)}: {', '.join(sources)}")
    return items


def _two(source: object) -> tuple:  # type: ignore[type-arg]
    """Both sources in their order. Raises ConfigError where there are not two."""
    count = len(source) if isinstance(source, Mapping) else 1
    if not isinstance(source, Mapping) or count != 2:
        raise ConfigError(f"connector 'gate' joins two encoders, got {count}; name two in the stream's encoders")
    first, second = source.values()
    return first, second
