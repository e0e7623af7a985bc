"""One vector for a picture or a text: one of the encoder's, or their mean, and a linear layer where there is one.

Papers: CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343), ALIGN (arXiv:2102.05918). Reference: ``CLIPModel``,
``SiglipModel`` and ``AlignModel`` of transformers 5.23.

Differences by design: the last vector that is no padding is the one of the token that ends a text, since a text can not
spell that token; transformers looks for its id, in old checkpoints for the largest id. Initialisation: a normal of
deviation ``D_in^-0.5``, biases 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.errors import ConfigError
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


@register("connector", "pooled")
class Pooled(Connector):
    """``x [U, N, D_in]`` → one vector → ``[U, 1, D_out]``."""

    class Config(ConnectorConfig):
        """``pool``: the first vector (a class vector), the last that is no padding, or the mean of those that count."""

        type: str = "pooled"
        pool: Literal["first", "last", "mean"] = "first"
        project: Literal["none", "linear", "linear_bias"] = "linear"

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """One."""
            return Count(1)

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        width = sole(in_dims, "pooled")
        if config.project == "none" and width != out_dim:
            raise ConfigError(
                f"connector 'pooled' with project='none' gives vectors of width {width}, {out_dim} is wanted; "
                "project them, or make the two equal"
            )
        biased = config.project == "linear_bias"
        self.proj = None if config.project == "none" else nn.Linear(width, out_dim, bias=biased)
        if self.proj is not None:
            nn.init.normal_(self.proj.weight, std=width**-0.5)
        if biased and self.proj is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, N, D_in]`` → ``[U, 1, D_out]``."""
        x = self._pool(only(tokens, "pooled"))  # [U, D_in]
        return Tokens((x if self.proj is None else self.proj(x)).unsqueeze(1))  # [U, 1, D_out]

    def _pool(self, tokens: Tokens) -> Tensor:
        """``x [U, N, D]`` → ``[U, D]``."""
        x, mask = tokens.x, tokens.mask
        if self.config.pool == "first":
            return x[:, 0]
        if self.config.pool == "mean":
            if mask is None:
                return x.mean(1)
            weight = mask.to(x.dtype).unsqueeze(-1)  # [U, N, 1]
            return (x * weight).sum(1) / weight.sum(1)
        if mask is None:
            return x[:, -1]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # [U]
        return x[torch.arange(len(x), device=x.device), last]
