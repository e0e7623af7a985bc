"""Maps of patches: learned positions carried to another grid, fixed sines and cosines, averages over squares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate(positions: Tensor, home: tuple[int, int], grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Learned positions carried from the grid ``home`` to ``grid``; the first ``prefix`` rows stay as they are.

    ``[prefix + rows·columns, D]`` → ``[prefix + rows'·columns', D]``. Bicubic, not antialiased, pixel centres at half
    integers, as ``interpolate_pos_encoding`` of transformers does (open_clip antialiases, the original ViT is linear:
    their results differ).
    """
    if home == grid:
        return positions
    plane = positions[prefix:].T.reshape(1, -1, *home)  # [1, D, rows, columns]
    plane = F.interpolate(plane.float(), size=grid, mode="bicubic", align_corners=False)  # [1, D, rows', columns']
    moved = plane.flatten(2)[0].T.to(positions.dtype)  # [rows'*columns', D]
    return torch.cat((positions[:prefix], moved))  # [prefix + rows'*columns', D]


def sincos(dim: int, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Fixed positions ``[rows·columns, dim]`` in float32, ``dim`` a multiple of four (MAE, arXiv:2111.06377).

    The first half of the width holds sin and cos of the column, the second half those of the row, at ``dim/4``
    frequencies from 1 down to 1/10000 (not included).
    """
    quarter = dim // 4
    powers = torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter
    frequencies = 1.0 / 10000**powers  # [D/4]

    def waves(count: int) -> Tensor:
        angles = torch.outer(torch.arange(count, dtype=torch.float64, device="cpu"), frequencies)
        return torch.cat((angles.sin(), angles.cos()), dim=1)  # [count, D/2]

    rows, columns = waves(grid[0]), waves(grid[1])
    pairs = torch.cat(
        (columns.expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)), dim=2
    )  # [rows, columns, D]
    return pairs.flatten(0, 1).to(device, torch.float32)  # [rows*columns, D]


def average_pool(x: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """A map ``x [U, rows·columns, D]`` averaged over squares of ``stride``, the rest of the division dropped."""
    if stride == 1:
        return x
    plane = F.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), stride)  # [U, D, rows/stride, columns/stride]
    return plane.flatten(2).transpose(1, 2)  # [U, rows/stride*columns/stride, D]
