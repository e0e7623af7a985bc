"""The encoder contract: units of a medium in, feature vectors out."""

from __future__ import annotations

from torch import Tensor, nn

from chiasm.config import PartConfig
from chiasm.types import Count, Tokens


class EncoderConfig(PartConfig):
    """What an encoder is built from. ``count`` must be exact: it is compared with what the encoder really gives."""

    def count(self, shape: tuple[int, ...]) -> Count:
        """Tokens (and their grid) that one unit of this ``shape`` gives, known without running the encoder."""
        raise NotImplementedError


class Encoder(nn.Module):
    """Maps units ``[U, *shape]`` to ``Tokens`` with ``x [U, N, D]``; ``dim`` is ``D``.

    A subclass nests its ``Config(EncoderConfig)``, takes it as only constructor argument, and sets ``dim``.
    """

    Config: type[EncoderConfig] = EncoderConfig
    dim: int
    recompute = False  # training: each block's inner states are computed again on the way back, not kept
    reads_layouts = False  # ``forward(inputs, layouts)``: units of several sizes, each with its layout

    def forward(self, inputs: Tensor) -> Tokens:
        """``inputs [U, *shape]`` → ``Tokens(x [U, N, D])``."""
        raise NotImplementedError
