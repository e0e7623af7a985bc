"""The vision transformer of pictures at their own proportions: SigLIP 2's NaFlex tower.

Paper: SigLIP 2 (arXiv:2502.14786, section 2.4). Reference: ``Siglip2VisionModel`` of transformers 5.23, equal to 1e-5
in float32.

Differences by design: a batch is as long as its longest picture; what fills up a shorter one is zero at the end, where
the reference leaves whatever its blocks make of it (nothing looks at it in either). Initialisation as in ``vit``.

Letters: ``U`` pictures, ``N`` patches of the longest, ``C`` numbers of a patch, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.encoders.vit import Block
from chiasm.errors import ConfigError, DataError
from chiasm.nn.again import call
from chiasm.registry import register
from chiasm.types import Count, Layout, Tokens


@register("encoder", "naflex")
class NaFlex(Encoder):
    """Patches, positions stretched to each picture's grid, blocks, a last norm."""

    reads_layouts = True

    class Config(EncoderConfig):
        """``side``: rows and columns of the learned positions, which other grids are stretched from."""

        type: str = "naflex"
        side: PositiveInt = 16
        patch: PositiveInt = 16
        dim: PositiveInt = 768
        depth: PositiveInt = 12
        heads: PositiveInt = 12
        mlp: PositiveInt = 3072
        channels: PositiveInt = 3
        activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu_tanh"
        norm_eps: float = 1e-6

        @model_validator(mode="after")
        def _fits(self) -> NaFlex.Config:
            if self.dim % self.heads:
                raise ConfigError(f"naflex: width {self.dim} cannot be split into {self.heads} heads")
            return self

        @property
        def numbers(self) -> int:
            """Numbers of a patch."""
            return self.patch**2 * self.channels

        def count(self, shape: tuple[int, ...]) -> Count:
            """Tokens of a picture of ``shape (patches, numbers of a patch)``. Raises DataError where it is none."""
            if len(shape) != 2 or shape[1] != self.numbers:
                raise DataError(f"a picture of shape (patches, {self.numbers}) was expected, got {tuple(shape)}")
            return Count(shape[0])

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.patch = nn.Linear(config.numbers, config.dim)
        self.positions = nn.Parameter(torch.empty(config.side**2, config.dim))
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.mlp, config.activation, config.norm_eps) for _ in range(config.depth)
        )
        self.post_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, as the head of this file says."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor, layouts: Sequence[Layout] | None = None) -> Tokens:
        """``inputs [U, N, C]``, ``layouts`` with the grid of each picture → ``Tokens(x [U, N, D], mask [U, N])``.

        Without ``layouts`` every picture is one row of ``N`` patches. Raises DataError at another shape.
        """
        units, longest = inputs.shape[:2]
        self.config.count(tuple(inputs.shape[1:]))
        grids = [layout.grid for layout in layouts] if layouts is not None else [(1, longest)] * units
        lengths = [rows * columns for rows, columns in grids]
        if len(grids) != units or max(lengths) > longest:
            raise DataError(f"{units} pictures of at most {longest} patches came with the grids {grids[:8]}")
        places = torch.arange(longest, device=inputs.device)
        mask = places < torch.tensor(lengths, device=inputs.device).unsqueeze(1)  # [U, N]
        x = self.patch(inputs.to(self.patch.weight.dtype)) + self.places(grids, longest)  # [U, N, D]
        seen = None if min(lengths) == longest else mask
        for block in self.blocks:
            x = call(block, self.recompute, x, seen)
        x = self.post_norm(x).masked_fill(~mask.unsqueeze(-1), 0)  # [U, N, D]
        return Tokens(x, mask)

    def places(self, grids: Sequence[tuple[int, int]], longest: int) -> Tensor:
        """The positions of each picture ``[U, N, D]``, zeros behind its patches."""
        side = self.config.side
        plane = self.positions.T.reshape(1, -1, side, side).float()  # [1, D, side, side]
        made: dict[tuple[int, int], Tensor] = {}
        for grid in dict.fromkeys(grids):
            # Antialiased, unlike the other towers' positions
            moved = F.interpolate(plane, size=grid, mode="bilinear", align_corners=False, antialias=True)
            flat = moved.flatten(2)[0].T.to(self.positions.dtype)  # [rows*columns, D]
            made[grid] = F.pad(flat, (0, 0, 0, longest - len(flat)))  # [N, D]
        return torch.stack([made[grid] for grid in grids])
