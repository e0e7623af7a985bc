"""The connector contract: features of one or several encoders in, vectors of the language model's width out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from chiasm.config import PartConfig
from chiasm.errors import ConfigError
from chiasm.types import Condition, Count, Tokens

T = TypeVar("T", Count, Tokens)


class ConnectorConfig(PartConfig):
    """What a connector is built from. Widths are never typed here: the composer hands them over."""

    def count(self, source: Count | Mapping[str, Count]) -> Count:
        """Tokens (and grid) for one unit, from the count of its source or of each of its sources, by name."""
        raise NotImplementedError

    @property
    def conditioned(self) -> bool:
        """True where the connector reads the instruction: the processor then hands it over with every medium."""
        return False

    @property
    def joins_units(self) -> bool:
        """True where the units of a medium (frames of a clip) become one: ``Tokens.runs`` tells which go together."""
        return False


class Connector(nn.Module):
    """Maps ``Tokens(x [U, N, D_in])``, or several of them by name, to ``Tokens(x [U, N', D_out])``.

    A subclass nests its ``Config(ConnectorConfig)`` and takes ``(config, in_dims, out_dim)``; ``in_dims`` holds the
    width of each source by encoder name. ``cond`` is the instruction, a row a unit, for connectors that read it.
    """

    Config: type[ConnectorConfig] = ConnectorConfig

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, N, D_in]`` (one, or one per source) → ``Tokens(x [U, N', D_out])``."""
        raise NotImplementedError


def sole(in_dims: Mapping[str, int], owner: str) -> int:
    """The width of the only source. Raises ConfigError where there are several."""
    if len(in_dims) != 1:
        raise ConfigError(f"connector {owner!r} joins one encoder, got {len(in_dims)}: {', '.join(in_dims)}")
    return next(iter(in_dims.values()))


def only(source: T | Mapping[str, T], owner: str) -> T:
    """The only source, given by itself or by name. Raises ConfigError where there are several."""
    if not isinstance(source, Mapping):
        return source
    sole(dict.fromkeys(source, 0), owner)
    return next(iter(source.values()))
