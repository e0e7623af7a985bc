"""BERT: the text tower of ALIGN, and the blocks that older fusion models are made of.

Paper: BERT (arXiv:1810.04805). Reference: ``AlignTextModel`` and ``BertModel`` of transformers 5.23, equal to 1e-5 in
float32.

Differences by design: every text is of kind 0, and there is no dropout. Initialisation: normal of deviation 0.02 for
every matrix and table, biases 0, norms 1 and 0.

Letters: ``B`` texts, ``T`` tokens, ``D`` width.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.errors import ConfigError, DataError
from chiasm.nn.again import call
from chiasm.nn.attention import Attention
from chiasm.nn.mlp import MLP
from chiasm.nn.words import WordEmbedding
from chiasm.registry import register
from chiasm.types import Count, Tokens


class BertBlock(nn.Module):
    """``x = norm(x + attention(x))``, then ``x = norm(x + mlp(x))``: the norms stand behind the sums."""

    def __init__(self, dim: int, heads: int, mlp: int, activation: str, eps: float):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, mlp, activation)
        self.norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x [B, T, D]``, ``mask [B, T]`` (True: may be attended to) → ``[B, T, D]``."""
        x = self.norm1(x + self.attn(x, mask))
        return self.norm2(x + self.mlp(x))


@register("encoder", "bert")
class Bert(Encoder):
    """Words, positions and kinds, normed; then blocks. One vector for each token."""

    class Config(EncoderConfig):
        """``pooler="unused"`` builds the layer that published checkpoints carry and nobody here reads."""

        type: str = "bert"
        vocab: PositiveInt = 30522
        dim: PositiveInt = 768
        depth: PositiveInt = 12
        heads: PositiveInt = 12
        mlp: PositiveInt = 3072
        positions: PositiveInt = 512
        kinds: int = 2
        activation: Literal["gelu", "gelu_tanh"] = "gelu"
        norm_eps: float = 1e-12
        pooler: Literal["none", "unused"] = "none"

        @model_validator(mode="after")
        def _fits(self) -> Bert.Config:
            if self.dim % self.heads:
                raise ConfigError(f"bert: width {self.dim} cannot be split into {self.heads} heads")
            return self

        def count(self, shape: tuple[int, ...]) -> Count:
            """One vector a token of a text of ``shape (T,)``. Raises DataError for what is no text."""
            if len(shape) != 1:
                raise DataError(f"encoder 'bert' reads the ids of a text, of shape (T,), got {tuple(shape)}")
            return Count(shape[0])

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.embedding = WordEmbedding(config.vocab, config.positions, config.kinds, config.dim, config.norm_eps)
        self.blocks = nn.ModuleList(
            BertBlock(config.dim, config.heads, config.mlp, config.activation, config.norm_eps)
            for _ in range(config.depth)
        )
        self.pooler = nn.Linear(config.dim, config.dim) if config.pooler == "unused" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, as the head of this file says."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tokens:
        """``inputs [B, T]`` ids, ``mask [B, T]`` (False: padding) → ``Tokens(x [B, T, D])``.

        Raises DataError for a text that is longer than there are positions.
        """
        x = self.embedding(inputs.long())  # [B, T, D]
        for block in self.blocks:
            x = call(block, self.recompute, x, mask)
        return Tokens(x, mask)

    def unused(self) -> list[str]:
        """Names of the parameters that never run."""
        return [name for name, _ in self.named_parameters() if name.startswith("pooler.")]
