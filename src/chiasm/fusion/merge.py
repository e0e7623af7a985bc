"""How the projected units of one medium become one run of tokens: tiles of a picture, frames of a clip.

Papers: LLaVA-NeXT (2024), LLaVA-OneVision (arXiv:2408.03326), LLaVA-NeXT-Video (2024). Reference:
LLaVA-VL/LLaVA-NeXT ``llava_arch.py`` df17966, and ``pack_image_features`` of transformers 5.23.

Differences by design: which merge runs is a configuration, not a substring of a name; a grid that does not fit is an
error, not a 2x2 guess; extreme proportions keep at least one row and column.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from chiasm.config import PartConfig
from chiasm.errors import ConfigError
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


@register("merge", "spatial")
class Spatial(Merge):
    """Base tile first, then the tiles joined to one large map, read row by row over all tiles."""

    config: Config

    class Config(MergeConfig):
        """``base=False`` leaves the base tile out, ``max_pool`` shrinks the map: NeXT's nobase and maxpool2x2 (2)."""

        type: str = "spatial"
        base: bool = True
        max_pool: int | None = Field(default=None, ge=2)

        def count(self, layout: Layout, unit: Count) -> int:
            """N + rows · columns of the map; N where there are no tiles."""
            if layout.grid == (0, 0):
                return unit.tokens
            rows, columns = _map(layout, unit)
            stride = self.max_pool or 1
            return self.base * unit.tokens + (rows // stride) * (columns // stride)

    def __call__(self, x: Tensor, unit: Count, layout: Layout, newline: Tensor | None) -> Tensor:
        """``x [U, N, D]`` → ``[M, D]``."""
        if layout.grid == (0, 0):
            return x[0]  # [N, D]
        joined = _join(x[1:], layout, unit)  # [D, rows, columns]
        if self.config.max_pool:
            joined = F.max_pool2d(joined[None], self.config.max_pool)[0]
        tiles = joined.flatten(1).T  # [rows*columns, D]
        return torch.cat([x[0], tiles]) if self.config.base else tiles


@register("merge", "spatial_unpad")
class SpatialUnpad(Merge):
    """Like ``spatial``, with the vectors of the black borders cut off and a newline vector after each row.

    A picture without tiles gets one newline at its end. ``rounding`` is that of the map's kept side: ``"trunc"`` in
    LLaVA, ``"round"`` (to 7 digits, then down) in transformers; they differ for few sizes, by two rows or columns.
    ``max_tiles`` is the N of ``anyres_max_N``: a map of over 1.21 · N tiles is shrunk to N, bilinearly.

    Differences by design: at least one row and one column stay. For proportions beyond about 1:1000 the references keep
    none: transformers then gives the base tile alone, or fails where the map is shrunk.
    """

    config: Config

    class Config(MergeConfig):
        """See the class."""

        type: str = "spatial_unpad"
        rounding: Literal["trunc", "round"] = "trunc"
        max_tiles: int | None = Field(default=None, ge=1)
        base: bool = True

        @property
        def needs_newline(self) -> bool:
            """Always."""
            return True

        def count(self, layout: Layout, unit: Count) -> int:
            """N + rows · (columns + 1); N + 1 where there are no tiles."""
            if layout.grid == (0, 0):
                return unit.tokens + 1
            rows, columns = self.shrunk(self.kept(layout, unit), unit)
            return self.base * unit.tokens + rows * (columns + 1)

        def kept(self, layout: Layout, unit: Count) -> tuple[int, int]:
            """(rows, columns) of the map that the picture covers, without the borders."""
            rows, columns = _map(layout, unit)
            height, width = layout.original
            if width / height > columns / rows:
                return rows - 2 * self._border(rows, height * (columns / width)), columns
            return rows, columns - 2 * self._border(columns, width * (rows / height))

        def shrunk(self, kept: tuple[int, int], unit: Count) -> tuple[int, int]:
            """(rows, columns) after the shrinking by ``max_tiles``."""
            rows, columns = kept
            if self.max_tiles is None:
                return kept
            times = math.sqrt(rows * columns / (self.max_tiles * unit.tokens))
            return (max(1, int(rows // times)), max(1, int(columns // times))) if times > 1.1 else kept

        def _border(self, length: int, covered: float) -> int:
            """Rows or columns of padding on each side, of ``length``, of which the picture covers ``covered``."""
            whole = int(round(covered, 7)) if self.rounding == "round" else int(covered)
            return (length - max(1, whole)) // 2

    def __call__(self, x: Tensor, unit: Count, layout: Layout, newline: Tensor | None) -> Tensor:
        """``x [U, N, D]``, ``newline [D]`` → ``[M, D]``."""
        assert newline is not None
        newline = newline.to(x)
        if layout.grid == (0, 0):
            return torch.cat([x[0], newline[None]])  # [N+1, D]
        joined = _join(x[1:], layout, unit)  # [D, rows, columns]
        rows, columns = self.config.kept(layout, unit)
        top, left = (joined.shape[1] - rows) // 2, (joined.shape[2] - columns) // 2
        joined = joined[:, top : top + rows, left : left + columns]
        shrunk = self.config.shrunk((rows, columns), unit)
        if shrunk != (rows, columns):
            joined = F.interpolate(joined[None], size=shrunk, mode="bilinear")[0]  # [D, rows', columns']
        tiles = _end_rows(joined.permute(1, 2, 0), newline)  # [rows'*(columns'+1), D]
        return torch.cat([x[0], tiles]) if self.config.base else tiles


@register("merge", "frames")
class Frames(Merge):
    """The frames of a clip one after the other, with newline vectors as NeXT-Video, OneVision or LLaVA-Video."""

    config: Config

    class Config(MergeConfig):
        """``newline``: none, ``"one_token"`` at the clip's end, ``"frame"`` after each, ``"grid"`` after each row."""

        type: str = "frames"
        newline: Literal["none", "one_token", "frame", "grid"] = "one_token"

        @property
        def needs_newline(self) -> bool:
            """All but ``"none"`` do."""
            return self.newline != "none"

        def count(self, layout: Layout, unit: Count) -> int:
            """U · N and the newlines."""
            if self.newline == "grid":
                rows, columns = _grid(unit)
                return layout.units * rows * (columns + 1)
            extra = {"none": 0, "one_token": 1, "frame": layout.units}[self.newline]
            return layout.units * unit.tokens + extra

    def __call__(self, x: Tensor, unit: Count, layout: Layout, newline: Tensor | None) -> Tensor:
        """``x [U, N, D]``, ``newline [D]`` → ``[M, D]``."""
        if self.config.newline == "none":
            return x.flatten(0, 1)  # [U*N, D]
        assert newline is not None
        newline = newline.to(x)
        if self.config.newline == "one_token":
            return torch.cat([x.flatten(0, 1), newline[None]])  # [U*N+1, D]
        if self.config.newline == "frame":
            return _end_rows(x, newline)  # [U*(N+1), D]
        rows, columns = _grid(unit)
        return _end_rows(x.reshape(len(x) * rows, columns, -1), newline)  # [U*rows*(columns+1), D]


def _grid(unit: Count) -> tuple[int, int]:
    if unit.grid is None:
        raise ConfigError(
            f"this merge needs units whose tokens form a grid; {unit.tokens} tokens came without one: "
            "take merge 'flat', or a connector that keeps the encoder's grid"
        )
    return unit.grid


def _map(layout: Layout, unit: Count) -> tuple[int, int]:
    """(rows, columns) of the tiles' tokens side by side."""
    rows, columns = _grid(unit)
    return layout.grid[0] * rows, layout.grid[1] * columns


def _join(tiles: Tensor, layout: Layout, unit: Count) -> Tensor:
    """``tiles [R·C, rows·columns, D]`` → the map ``[D, R·rows, C·columns]``."""
    x = tiles.unflatten(1, _grid(unit)).unflatten(0, layout.grid)  # [R, C, rows, columns, D]
    return x.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # [D, R*rows, C*columns]


def _end_rows(x: Tensor, newline: Tensor) -> Tensor:
    """``x [rows, columns, D]``, ``newline [D]`` → ``[rows·(columns + 1), D]``, a newline after each row."""
    ends = newline.expand(len(x), 1, -1)  # [rows, 1, D]
    return torch.cat([x, ends], dim=1).flatten(0, 1)  # [rows*(columns+1), D]
