"""Query transformers in levels: frames and then the clip; coarse and then fine; and the second level alone.

``hierarchical`` is Video-LLaMA's (arXiv:2306.02858; reference: DAMO-NLP-SG/Video-LLaMA ``video_llama.py`` 2143b4d):
the queries of the first level look at each frame; their states get the frame's learned position; the queries of the
second level look at all of them and are what the language model reads, 32 vectors for a whole clip. There the first
level is BLIP-2's Q-Former and the second has two layers that both cross (``cross_every=1``).

``timeline`` is that second level without the first, as in Video-LLaMA's branch for sounds: an encoder gives vectors of
each piece, each gets its piece's learned position, and a few queries look at all of them.

``multiscale`` is the project's source documents' other hierarchy, of which no published system was found: the same
queries run through one query transformer for each scale of the picture's map, the coarsest first; what they found
there is what they ask with at the next.

Differences by design: clips of one batch may have different lengths (shorter ones are masked; the reference takes
equal ones); a clip with more frames than positions is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.connectors.qformer import BodyConfig, QueryTransformer
from chiasm.errors import ConfigError, DataError
from chiasm.nn.positions import average_pool
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


class JoinedConfig(ConnectorConfig):
    """Of a connector that makes one unit of a medium's many: ``queries`` vectors for a whole clip or sound."""

    queries: PositiveInt = 32

    def count(self, source: Count | Mapping[str, Count]) -> Count:
        """As many as there are queries, for a whole medium."""
        only(source, self.type)
        return Count(self.queries)

    @property
    def joins_units(self) -> bool:
        """The frames of a clip, or the pieces of a sound, become one."""
        return True


@register("connector", "hierarchical")
class Hierarchical(Connector):
    """Frame queries, frame positions, clip queries, one linear layer."""

    class Config(JoinedConfig):
        """``frame`` and ``clip`` are the sizes of the two levels; ``frames`` the number of positions."""

        type: str = "hierarchical"
        frame: BodyConfig = BodyConfig()
        frame_queries: PositiveInt = 32
        frames: PositiveInt = 32
        clip: BodyConfig = BodyConfig(depth=2, cross_every=1)

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        self.frame_queries = nn.Parameter(torch.randn(config.frame_queries, config.frame.dim) * 0.02)
        self.frame = QueryTransformer(config.frame, sole(in_dims, "hierarchical"))
        self.positions = nn.Parameter(torch.randn(config.frames, config.frame.dim))  # as nn.Embedding starts
        self.queries = nn.Parameter(torch.randn(config.queries, config.clip.dim) * 0.02)
        self.clip = QueryTransformer(config.clip, config.frame.dim)
        self.proj = nn.Linear(config.clip.dim, out_dim)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [all frames, N, D_in]`` with ``runs``, the frames of each clip → ``[clips, K, D_out]``."""
        tokens = only(tokens, "hierarchical")
        runs = tokens.runs or (1,) * len(tokens.x)
        _fits(runs, self.config.frames, "hierarchical")
        each = self.frame(self.frame_queries.expand(len(tokens.x), -1, -1), tokens)  # [all frames, K1, D1]
        memory = placed(each, self.positions, runs)  # [clips, longest*K1, D1]
        states = self.clip(self.queries.expand(len(runs), -1, -1), memory)  # [clips, K, D2]
        return Tokens(self.proj(states))  # [clips, K, D_out]


@register("connector", "timeline")
class Timeline(Connector):
    """Positions for the units of a medium, queries that look at all units, one linear layer."""

    class Config(BodyConfig, JoinedConfig):
        """``units`` is the number of positions; the rest are the sizes of the query transformer."""

        type: str = "timeline"
        units: PositiveInt = 8
        queries: PositiveInt = 8
        depth: PositiveInt = 2
        cross_every: PositiveInt = 1

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        dim = sole(in_dims, "timeline")
        self.positions = nn.Parameter(torch.randn(config.units, dim))  # as nn.Embedding starts
        self.queries = nn.Parameter(torch.randn(config.queries, config.dim) * 0.02)
        self.body = QueryTransformer(config, dim)
        self.proj = nn.Linear(config.dim, out_dim)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [all units, N, D_in]`` with ``runs``, the units of each medium → ``[media, K, D_out]``."""
        tokens = only(tokens, "timeline")
        runs = tokens.runs or (1,) * len(tokens.x)
        _fits(runs, self.config.units, "timeline")
        memory = placed(tokens.x, self.positions, runs)  # [media, longest*N, D_in]
        states = self.body(self.queries.expand(len(runs), -1, -1), memory)  # [media, K, D]
        return Tokens(self.proj(states))  # [media, K, D_out]


def placed(x: Tensor, positions: Tensor, runs: Sequence[int]) -> Tokens:
    """``x [all units, N, D]`` with the ``positions [P, D]`` of each unit in its run → ``[media, longest·N, D]``.

    Shorter runs are filled up with zeros that are masked.
    """
    places = torch.cat([positions[:n] for n in runs])  # [all units, D]
    media = [run.flatten(0, 1) for run in (x + places.unsqueeze(1)).split(list(runs))]  # each [units*N, D]
    longest = torch.arange(max(len(medium) for medium in media), device=x.device)
    mask = torch.stack([longest < len(medium) for medium in media])  # [media, longest*N]
    return Tokens(pad_sequence(media, batch_first=True), mask if len(set(runs)) > 1 else None)


def _fits(runs: Sequence[int], positions: int, owner: str) -> None:
    """Raises DataError where a medium has more units than there are positions."""
    if max(runs) > positions:
        noun, remedy = ("frames", "frame ") if owner == "hierarchical" else ("units", "")
        raise DataError(
            f"a clip of {max(runs)} {noun} does not fit the {positions} {remedy}positions of connector {owner!r}; "
            f"sample fewer {noun}, or train with more positions"
        )


@register("connector", "multiscale")
class MultiScale(Connector):
    """The same queries at every scale of the map, coarse to fine, then one linear layer."""

    class Config(ConnectorConfig):
        """``strides``: by how much the map is averaged at each level, coarsest first; ``body``: each level's sizes."""

        type: str = "multiscale"
        queries: PositiveInt = 32
        strides: tuple[PositiveInt, ...] = (4, 2, 1)
        body: BodyConfig = Field(default=BodyConfig(depth=4))

        @field_validator("strides")
        @classmethod
        def _coarse_to_fine(cls, value: tuple[int, ...]) -> tuple[int, ...]:
            if not value or list(value) != sorted(set(value), reverse=True):
                raise ConfigError(f"multiscale: strides {value} must fall from coarse to fine, as (4, 2, 1) does")
            return value

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """As many as there are queries. Raises ConfigError where the map is smaller than a stride."""
            _map(only(source, "multiscale").grid, only(source, "multiscale").tokens, self.strides[0])
            return Count(self.queries)

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        dim = sole(in_dims, "multiscale")
        self.queries = nn.Parameter(torch.randn(config.queries, config.body.dim) * 0.02)
        self.levels = nn.ModuleList(QueryTransformer(config.body, dim) for _ in config.strides)
        self.proj = nn.Linear(config.body.dim, out_dim)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, rows·columns, D_in]`` → ``[U, K, D_out]``."""
        tokens = only(tokens, "multiscale")
        if tokens.mask is not None:
            raise ConfigError("multiscale averages whole maps; its source gives masked tokens")
        grid = _map(tokens.grid, tokens.x.shape[1], self.config.strides[0])
        states: Tensor = self.queries.expand(len(tokens.x), -1, -1)  # [U, K, D]
        for stride, level in zip(self.config.strides, self.levels, strict=True):
            states = level(states, Tokens(average_pool(tokens.x, grid, stride)))  # [U, K, D]
        return Tokens(self.proj(states))  # [U, K, D_out]


def _map(grid: tuple[int, int] | None, tokens: int, stride: int) -> tuple[int, int]:
    if grid is None:
        raise ConfigError(f"multiscale needs tokens that form a grid; these {tokens} do not (select='patch' gives one)")
    if min(grid) < stride:
        raise ConfigError(f"multiscale: a map of {grid[0]}x{grid[1]} tokens is smaller than its stride {stride}")
    return grid
