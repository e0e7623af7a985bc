"""The text tower of a pair of towers: a transformer over token ids, causal (CLIP) or in both directions (SigLIP).

Papers: CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343). Reference: ``CLIPTextModel`` and ``SiglipTextModel`` of
transformers 5.23, equal to 1e-5 in float32.

Differences by design: the tower gives every position after its last norm, a connector pools; positions may be as few
as the longest text of the batch, because no position looks at padding (causal attention never reaches it, the other
kind is masked). Initialisation is OpenAI's: token vectors of deviation 0.02, positions 0.01, queries, keys and values
``D^-0.5``, what writes into the stream ``D^-0.5 (2 depth)^-0.5``, the perceptron's first layer ``(2 D)^-0.5``.

Letters: ``B`` texts, ``T`` tokens, ``D`` width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.encoders.vit import Block
from chiasm.errors import ConfigError, DataError
from chiasm.nn.again import call
from chiasm.nn.norm import LayerNorm
from chiasm.registry import register
from chiasm.types import Count, Tokens


@register("encoder", "text")
class TextEncoder(Encoder):
    """Token vectors, positions, blocks, a last norm; one vector for each token."""

    class Config(EncoderConfig):
        """``positions`` is the longest text in tokens. ``causal``: a token sees those before it only."""

        type: str = "text"
        vocab: PositiveInt = 49408
        dim: PositiveInt = 512
        depth: PositiveInt = 12
        heads: PositiveInt = 8
        mlp: PositiveInt = 2048
        positions: PositiveInt = 77
        activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "quick_gelu"
        norm_eps: float = 1e-5
        causal: bool = True

        @model_validator(mode="after")
        def _fits(self) -> TextEncoder.Config:
            if self.dim % self.heads:
                raise ConfigError(f"text: width {self.dim} cannot be split into {self.heads} heads")
            return self

        def count(self, shape: tuple[int, ...]) -> Count:
            """One vector a token of a text of ``shape (T,)``. Raises DataError for what is no text."""
            if len(shape) != 1:
                raise DataError(f"encoder 'text' reads the ids of a text, of shape (T,), got {tuple(shape)}")
            return Count(shape[0])

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Parameter(torch.empty(config.positions, config.dim))
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.mlp, config.activation, config.norm_eps) for _ in range(config.depth)
        )
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, as the head of this file says."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        inner = self.dim**-0.5
        outer = inner * (2 * self.config.depth) ** -0.5
        deviations = {"q": inner, "k": inner, "v": inner, "out": outer, "fc1": (2 * self.dim) ** -0.5, "fc2": outer}
        for name, parameter in self.blocks.named_parameters():
            layer, leaf = name.split(".")[-2:]
            if layer in deviations and leaf == "weight":
                nn.init.normal_(parameter, std=deviations[layer])
            elif layer in deviations:
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tokens:
        """``inputs [B, T]`` ids, ``mask [B, T]`` (False: padding, on the right) → ``Tokens(x [B, T, D])``.

        Raises DataError for a text that is longer than the tower has positions.
        """
        if inputs.shape[1] > self.config.positions:
            raise DataError(
                f"a text of {inputs.shape[1]} tokens, but the text tower has {self.config.positions} positions; "
                "shorten it, or set the template's length"
            )
        x = self.embedding(inputs.long()) + self.positions[: inputs.shape[1]]  # [B, T, D]
        hidden = None if self.config.causal else mask
        for block in self.blocks:
            x = call(block, self.recompute, x, hidden, self.config.causal)
        return Tokens(self.norm(x), mask)
