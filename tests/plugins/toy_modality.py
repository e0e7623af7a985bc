"""A modality from outside the package: short runs of numbers, their front end, encoder and connector.

This file is what a stranger would write. It uses public names only, and nothing of chiasm was changed for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from chiasm.connectors.base import Connector, ConnectorConfig
from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.errors import DataError
from chiasm.processing.base import FrontEnd, FrontEndConfig, Place
from chiasm.registry import register
from chiasm.types import Condition, Count, Layout, Media, MediaItem, Tokens


@register("modality", "toy")
@dataclass(frozen=True)
class Toy(Media):
    """A list of numbers."""

    kind: ClassVar[str] = "toy"


@register("front_end", "toy")
class ToyFrontEnd(FrontEnd):
    """Numbers → ``[1, n]``."""

    class Config(FrontEndConfig):
        type: str = "toy"
        placeholder: str | None = "<toy>"
        divide_by: float = 1.0

    kind = "toy"

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        if not len(medium.data):
            raise DataError(f"{place}: a toy of no numbers; give at least one")
        inputs = torch.tensor(medium.data, dtype=torch.float32)[None] / self.config.divide_by  # [1, n]
        return MediaItem("toy", inputs, Layout(1, tuple(inputs.shape[1:])))


@register("encoder", "toy")
class ToyEncoder(Encoder):
    """One vector for each number, and one for their sum."""

    class Config(EncoderConfig):
        type: str = "toy"
        width: int = 8

        def count(self, shape: tuple[int, ...]) -> Count:
            return Count(shape[0] + 1)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dim = config.width
        self.lift = nn.Linear(1, config.width)

    def forward(self, inputs: Tensor) -> Tokens:
        """``inputs [U, n]`` → ``[U, n + 1, D]``."""
        values = torch.cat((inputs, inputs.sum(1, keepdim=True)), dim=1)  # [U, n + 1]
        return Tokens(self.lift(values.unsqueeze(-1)).tanh())  # [U, n + 1, D]


@register("connector", "toy")
class ToyConnector(Connector):
    """Neighbouring pairs joined into one token; an odd last one stands alone."""

    class Config(ConnectorConfig):
        type: str = "toy"

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            return Count((source.tokens + 1) // 2)

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        (dim,) = in_dims.values()
        self.config = config
        self.join = nn.Linear(2 * dim, out_dim)

    def forward(self, tokens: Tokens, cond: Condition | None = None) -> Tokens:
        """``x [U, N, D_in]`` → ``[U, ceil(N/2), D_out]``."""
        x = nn.functional.pad(tokens.x, (0, 0, 0, tokens.x.shape[1] % 2))
        return Tokens(self.join(x.unflatten(1, (-1, 2)).flatten(2)))  # [U, ceil(N/2), D_out]
