"""ImageBind's tower for sounds: overlapping patches of a log-mel picture, a vision transformer, one vector.

Paper: ImageBind (arXiv:2305.05665). Reference: facebookresearch/ImageBind 53680b0 ``imagebind_model.py``.

    patches of 16 x 16 every 10 pixels, normed → class vector and positions → blocks → norm → the class vector
    → linear layer → unit length, times ``scale`` (published: 20, fixed)

In its attention every position also sees one learned key with its learned value, which stand nowhere. The space of the
last vector is the one that ImageBind's towers for pictures, texts, depth, heat and motion share; only the tower for
sounds is here.

Differences by design: no stochastic depth (published: up to 0.1 in training); the scale is part of the configuration,
not a buffer. Initialisation: as torch's ``MultiheadAttention`` for queries, keys and values, Xavier's uniform for other
matrices, class vector and positions a normal of deviation ``D^-0.5``, biases 0, norms 1 and 0.

Letters: ``U`` sounds, ``N`` patches, ``D`` width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.errors import ConfigError, DataError
from chiasm.nn.again import call
from chiasm.nn.mlp import MLP
from chiasm.registry import register
from chiasm.types import Count, Tokens


class BiasedAttention(nn.Module):
    """Self-attention in which a learned key and value stand behind all positions (torch: ``add_bias_kv``)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.extra_key = nn.Parameter(torch.empty(dim))
        self.extra_value = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``x [U, N, D]`` → ``[U, N, D]``."""

        def with_extra(found: Tensor, extra: Tensor) -> Tensor:
            return torch.cat((found, extra.expand(len(x), 1, -1)), dim=1)  # [U, N+1, D]

        k, v = with_extra(self.k(x), self.extra_key), with_extra(self.v(x), self.extra_value)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), k, v))  # [U, H, ., Dh]
        mixed = F.scaled_dot_product_attention(q, k, v)  # [U, H, N, Dh]
        return self.out(mixed.transpose(1, 2).flatten(2))  # [U, N, D]


class Block(nn.Module):
    """``x += attention(norm(x))``, then ``x += mlp(norm(x))``."""

    def __init__(self, dim: int, heads: int, mlp: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = BiasedAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """``x [U, N, D]`` → ``[U, N, D]``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@register("encoder", "imagebind_audio")
class ImageBindAudio(Encoder):
    """One vector of length ``scale`` for each piece of a recording."""

    class Config(EncoderConfig):
        """``bins`` and ``frames``: the only size of a log-mel picture that its positions fit; ``out``: the last width.

        The numbers are those of ``imagebind_huge``.
        """

        type: str = "imagebind_audio"
        bins: PositiveInt = 128
        frames: PositiveInt = 204
        patch: PositiveInt = 16
        stride: PositiveInt = 10
        dim: PositiveInt = 768
        depth: PositiveInt = 12
        heads: PositiveInt = 12
        mlp: PositiveInt = 3072
        out: PositiveInt = 1024
        scale: PositiveFloat = 20.0

        @model_validator(mode="after")
        def _fits(self) -> ImageBindAudio.Config:
            if self.dim % self.heads:
                raise ConfigError(f"imagebind_audio: width {self.dim} cannot be split into {self.heads} heads")
            if min(self.bins, self.frames) < self.patch:
                raise ConfigError(
                    f"imagebind_audio: {self.bins} bands of {self.frames} windows hold no patch of {self.patch} x "
                    f"{self.patch}"
                )
            return self

        @property
        def patches(self) -> int:
            """How many patches a log-mel picture has."""
            return ((self.bins - self.patch) // self.stride + 1) * ((self.frames - self.patch) // self.stride + 1)

        def count(self, shape: tuple[int, ...]) -> Count:
            """One vector for a piece of ``shape (1, bins, frames)``. Raises DataError at another shape."""
            if tuple(shape) != (1, self.bins, self.frames):
                raise DataError(
                    f"a log-mel picture of shape (1, {self.bins}, {self.frames}) was expected, got {tuple(shape)}; set "
                    "bins and frames of the front end and of the encoder alike"
                )
            return Count(1)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dim = config.out
        self.patch = nn.Conv2d(1, config.dim, config.patch, config.stride, bias=False)
        self.patch_norm = nn.LayerNorm(config.dim)
        self.cls = nn.Parameter(torch.empty(config.dim))
        self.positions = nn.Parameter(torch.empty(config.patches + 1, config.dim))
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.mlp) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.proj = nn.Linear(config.dim, config.out, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, as the head of this file says."""
        dim = self.config.dim
        for name, parameter in self.named_parameters():
            if name.endswith(("q.weight", "k.weight", "v.weight")):
                bound = (6 / (3 * dim + dim)) ** 0.5
                nn.init.uniform_(parameter, -bound, bound)
            elif name.endswith(("extra_key", "extra_value")):
                nn.init.normal_(parameter, std=(2 / (dim + 1)) ** 0.5)
            elif name in ("cls", "positions"):
                nn.init.normal_(parameter, std=dim**-0.5)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor) -> Tokens:
        """``inputs [U, 1, bins, frames]`` → ``Tokens(x [U, 1, D_out])``. Raises DataError at another shape."""
        self.config.count(tuple(inputs.shape[1:]))
        x = self.patch(inputs.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)  # [U, N, D], band by band
        x = self.patch_norm(x)
        x = torch.cat((self.cls.expand(len(x), 1, -1), x), dim=1) + self.positions  # [U, 1+N, D]
        for block in self.blocks:
            x = call(block, self.recompute, x)
        x = self.proj(self.norm(x[:, :1]))  # [U, 1, D_out]
        return Tokens(self.config.scale * F.normalize(x, dim=-1))
