"""Query transformers in levels: frames and then the clip; coarse and then fine.

``hierarchical`` is Video-LLaMA's (arXiv:2306.02858; reference: DAMO-NLP-SG/Video-LLaMA ``video_llama.py`` 2143b4d):
the queries of the first level look at each frame; their states get the frame's learned position; the queries of the
second level look at all of them and are what the language model reads, 32 vectors for a whole clip. There the first
level is BLIP-2's Q-Former and the second has two layers that both cross (``cross_every=1``).

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


@register("connector", "hierarchical")
class Hierarchical(Connector):
    """Frame queries, frame positions, clip queries, one linear layer."""

    class Config(ConnectorConfig):
        """``frame`` and ``clip`` are the sizes of the two levels; ``frames`` the number of positions."""

        type: str = "hierarchical"
        frame: BodyConfig = BodyConfig()
        frame_queries: PositiveInt = 32
        frames: PositiveInt = 32
        clip: BodyConfig = BodyConfig(depth=2, cross_every=1)
        queries: PositiveInt = 32

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """As many as the second level has queries, for a whole clip."""
            only(source, "hierarchical")
            return Count(self.queries)

        @property
        def joins_units(self) -> bool:
            """The frames of a clip become one."""
            return True

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
        self._fits(runs)
        each = self.frame(self.frame_queries.expand(len(tokens.x), -1, -1), tokens)  # [all frames, K1, D1]
        places = torch.cat([self.positions[:n] for n in runs])  # [all frames, D1]
        placed = each + places.unsqueeze(1)  # [all frames, K1, D1]
        clips = [run.flatten(0, 1) for run in placed.split(list(runs))]  # each [frames*K1, D1]
        longest = torch.arange(max(len(clip) for clip in clips), device=placed.device)
        mask = torch.stack([longest < len(clip) for clip in clips])  # [clips, longest]
        memory = Tokens(pad_sequence(clips, batch_first=True), mask if len(set(runs)) > 1 else None)
        states = self.clip(self.queries.expand(len(clips), -1, -1), memory)  # [clips, K, D2]
        return Tokens(self.proj(states))  # [clips, K, D_out]

    def _fits(self, runs: Sequence[int]) -> None:
        if max(runs) > self.config.frames:
            raise DataError(
                f"a clip of {max(runs)} frames does not fit the {self.config.frames} frame positions of connector "
                "'hierarchical'; sample fewer frames, or train with more positions"
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
