"""The Perceiver resampler: latent vectors that read a picture of any size, and each other, layer after layer.

Papers: Perceiver (arXiv:2103.03206); Flamingo (arXiv:2204.14198); OpenFlamingo (arXiv:2308.01390); Idefics
(arXiv:2306.16527). Reference: open_flamingo 655f693 ``PerceiverResampler``; ``IdeficsPerceiverResampler`` of
transformers 5.23, equal to 1e-5. Keys and values are picture and latents together, so that the latents also see each
other.

``openflamingo()`` and ``idefics()`` give the published sizes; Flamingo's own perceptron squares a ReLU
(``squared_relu``).

Differences by design: a linear layer to the language model's width follows where ``project`` says so: the published
ones feed cross-attention, which takes the width as it is. With ``frames`` the frames of a clip share the latents, each
with a learned time added (Flamingo, and OpenFlamingo's option; its released models have no times); without, each unit
has its own. Latents and times start as a normal of deviation ``latent_std`` (1, as in both references).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.errors import ConfigError, DataError
from chiasm.nn.cross_attention import CrossAttention
from chiasm.nn.mlp import activation
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


class Layer(nn.Module):
    """Latents look at the picture and at themselves, then go through a perceptron; only norms have biases."""

    def __init__(self, config: Resampler.Config, dim: int):
        super().__init__()
        c = config
        self.context_norm = nn.LayerNorm(dim)
        self.latents_norm = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, c.heads, head_dim=c.head_dim, bias=False, head_norm=c.head_norm)
        self.mlp_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, c.times * dim, bias=False)
        self.fc2 = nn.Linear(c.times * dim, dim, bias=False)
        self.squares = c.activation == "squared_relu"
        self.activation = activation("relu" if self.squares else c.activation)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """``latents [U, K, D]``, ``context [U, N, D]``, ``mask [U, 1, 1, N+K]`` → ``[U, K, D]``."""
        own = self.latents_norm(latents)  # [U, K, D]
        both = torch.cat((self.context_norm(context), own), dim=1)  # [U, N+K, D]
        latents = latents + self.attn(own, both, mask)
        inner = self.activation(self.fc1(self.mlp_norm(latents)))  # [U, K, times*D]
        return latents + self.fc2(inner.square() if self.squares else inner)  # [U, K, D]


@register("connector", "resampler")
class Resampler(Connector):
    """``queries`` latents of the encoder's width, ``depth`` layers, a norm, and a linear layer where asked for."""

    class Config(ConnectorConfig):
        """``times``: the perceptron's width as a multiple; ``head_norm``: norms on queries and keys of a head.

        ``frames``: learned times, and one set of latents for all frames of a clip; a picture is a clip of one.
        """

        type: str = "resampler"
        queries: PositiveInt = 64
        depth: PositiveInt = 6
        heads: PositiveInt = 8
        head_dim: PositiveInt = 64
        times: PositiveInt = 4
        activation: Literal["gelu", "gelu_tanh", "relu", "silu", "squared_relu"] = "gelu"
        head_norm: bool = False
        latent_std: float = 1.0
        frames: PositiveInt | None = None
        project: bool = True

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """As many as there are latents."""
            only(source, "resampler")
            return Count(self.queries)

        @property
        def joins_units(self) -> bool:
            """True where the frames of a clip become one."""
            return self.frames is not None

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        dim = sole(in_dims, "resampler")
        if not config.project and dim != out_dim:
            raise ConfigError(
                f"resampler: project=false hands on vectors of width {dim}, {out_dim} are wanted; set project=true"
            )
        self.config = config
        self.latents = nn.Parameter(torch.randn(config.queries, dim) * config.latent_std)
        self.times = nn.Parameter(torch.randn(config.frames, dim) * config.latent_std) if config.frames else None
        self.layers = nn.ModuleList(Layer(config, dim) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, out_dim) if config.project else None

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, N, D_in]`` → ``[U, K, D_out]``."""
        tokens = self._clips(only(tokens, "resampler"))
        latents = self.latents.expand(len(tokens.x), -1, -1)  # [U, K, D_in]
        mask = None
        if tokens.mask is not None:
            seen = tokens.mask.new_ones(len(tokens.x), self.config.queries)
            mask = torch.cat((tokens.mask, seen), dim=1)[:, None, None]  # [U, 1, 1, N+K]
        for layer in self.layers:
            latents = layer(latents, tokens.x, mask)
        x = self.norm(latents)  # [U, K, D_in]
        return Tokens(x if self.proj is None else self.proj(x))  # [U, K, D_out]

    def _clips(self, tokens: Tokens) -> Tokens:
        """``x [all frames, N, D]`` with ``runs`` → ``[clips, longest, D]``; as they are where units stay apart."""
        if self.times is None:
            return tokens
        runs = tokens.runs or (1,) * len(tokens.x)
        if max(runs) > len(self.times):
            raise DataError(
                f"a clip of {max(runs)} frames does not fit the {len(self.times)} learned times of connector "
                "'resampler'; sample fewer frames, or train with more"
            )
        placed = tokens.x + torch.cat([self.times[:n] for n in runs]).unsqueeze(1)  # [all frames, N, D]
        clips = [clip.flatten(0, 1) for clip in placed.split(list(runs))]  # each [frames*N, D]
        seen = tokens.x.new_ones(tokens.x.shape[:2]).bool() if tokens.mask is None else tokens.mask
        masks = [mask.flatten() for mask in seen.split(list(runs))]
        plain = tokens.mask is None and len(set(runs)) == 1
        return Tokens(pad_sequence(clips, batch_first=True), None if plain else pad_sequence(masks, batch_first=True))


def openflamingo(**changes: Any) -> Resampler.Config:
    """OpenFlamingo's: 6 layers, 64 latents, 8 heads of 64, whatever the width; 63.0M parameters at width 1024."""
    return Resampler.Config.parse({"project": False} | changes)


def idefics(**changes: Any) -> Resampler.Config:
    """Idefics': 6 layers, 64 latents, 16 heads of 96, a ReLU."""
    return Resampler.Config.parse({"heads": 16, "head_dim": 96, "activation": "relu", "project": False} | changes)
