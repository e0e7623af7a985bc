"""A spliced model that also answers with a picture: eight tokens, and a mapper of their states to text features.

Paper: MiniGPT-5 (arXiv:2310.02239). Reference: eric-ai-lab/MiniGPT-5 ``model.py`` 21308c1, ``mini_gpt5.py``.

The tokens ``[IMG0]`` to ``[IMG7]`` ("vokens") stand in the vocabulary one after the other. The states that *predict*
them, those one position before each, go through two linear layers, and a small encoder-decoder lays them out as the
features of a text (77 of width 1024) that a diffusion model reads in place of a text's. It has no positions: the order
of the eight is not seen, which eight they are is. What paints is not part of this.

Differences by design: the blocks are our own, equal to ``torch.nn.Transformer`` with its norms first (test); a run of
vokens that is not whole is refused; the mapper's matrices start as that class draws them (Xavier), biases at 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from chiasm.config import Config as Values
from chiasm.errors import ConfigError, DataError
from chiasm.fusion.assembly import assemble, check_streams
from chiasm.fusion.splice import Splice
from chiasm.nn.cross_attention import CrossAttention
from chiasm.nn.mlp import MLP
from chiasm.registry import register
from chiasm.types import Batch


class VokenConfig(Values):
    """``first``: the id of the first of ``number`` vokens. The rest: sizes of the mapper and of what it gives."""

    first: NonNegativeInt = 32000
    number: PositiveInt = 8
    features: PositiveInt = 77
    dim: PositiveInt = 1024
    depth: PositiveInt = 4
    heads: PositiveInt = 8
    mlp: PositiveInt = 4096


class Block(nn.Module):
    """Self-attention, with ``looks`` attention to what was encoded, a perceptron; each behind its norm."""

    def __init__(self, c: VokenConfig, looks: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim)
        self.attn = CrossAttention(c.dim, c.heads)
        self.cross_norm = nn.LayerNorm(c.dim) if looks else None
        self.cross = CrossAttention(c.dim, c.heads) if looks else None
        self.norm2 = nn.LayerNorm(c.dim)
        self.mlp = MLP(c.dim, c.mlp, "relu")

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """``x [n, L, D]``, ``memory [n, V, D]`` → ``[n, L, D]``."""
        x = x + self.attn(self.norm1(x))
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), memory)
        return x + self.mlp(self.norm2(x))


class VokenMapper(nn.Module):
    """States of vokens to the features of a text."""

    def __init__(self, config: VokenConfig, in_dim: int):
        super().__init__()
        c = config
        self.fc1, self.fc2 = nn.Linear(in_dim, c.dim), nn.Linear(c.dim, c.dim)
        self.encoder = nn.ModuleList(Block(c, looks=False) for _ in range(c.depth))
        self.encoder_norm = nn.LayerNorm(c.dim)
        self.decoder = nn.ModuleList(Block(c, looks=True) for _ in range(c.depth))
        self.decoder_norm = nn.LayerNorm(c.dim)
        self.queries = nn.Parameter(torch.randn(c.features, c.dim))
        for module in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, states: Tensor) -> Tensor:
        """``states [n, V, D_lm]`` → features ``[n, F, D]``."""
        memory = self.fc2(F.gelu(self.fc1(states)))  # [n, V, D]
        for block in self.encoder:
            memory = block(memory)
        memory = self.encoder_norm(memory)
        x = self.queries.expand(len(states), -1, -1)  # [n, F, D]
        for block in self.decoder:
            x = block(x, memory)
        return self.decoder_norm(x)  # [n, F, D]


@register("fusion", "vokens")
class Vokens(Splice):
    """``splice`` with a mapper beside it: it reads, learns and writes as ``splice`` does; ``pictured`` is new."""

    class Config(Splice.Config):
        """``vokens``: which tokens they are, and their mapper."""

        type: str = "vokens"
        vokens: VokenConfig = Field(default_factory=VokenConfig)

    config: Config

    def __init__(self, config: Config, *parts: Any):
        super().__init__(config, *parts)
        self.mapper = VokenMapper(config.vokens, self.lm.dim)

    @classmethod
    def compose(cls, config: Any) -> Vokens:
        """The model of a configuration. Raises ConfigError where parts do not fit each other."""
        check_streams(config)
        encoders, connectors, lm = assemble(config)
        if lm.encoder_decoder:
            raise ConfigError(
                f"vokens: lm {config.lm.type!r} is an encoder with a decoder; vokens are read in the one row that a "
                "decoder alone reads and writes: use such a language model"
            )
        return cls(config, encoders, connectors, lm)

    def pictured(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The features ``[n, F, D]`` of the pictures that the texts of ``batch [B, T]`` answer with, and rows ``[n]``.

        Raises DataError where the vokens of a picture are not all there, in their order.
        """
        hidden = self(batch, logits=None).hidden  # [B, T, D_lm]
        rows, columns = self.places(batch)  # [n]
        before = columns[:, None] - 1 + torch.arange(self.config.vokens.number, device=columns.device)  # [n, V]
        return self.mapper(hidden[rows[:, None], before]), rows

    def places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows and columns ``[n]`` at which a run of vokens begins. Raises DataError, as ``pictured`` does."""
        c, ids = self.config.vokens, batch.input_ids
        rows, columns = torch.nonzero(ids == c.first, as_tuple=True)
        steps = torch.arange(c.number, device=ids.device)
        spread = columns[:, None] + steps  # [n, V]
        inside = (columns > 0) & (columns + c.number <= ids.shape[1])
        spread = spread.clamp(max=ids.shape[1] - 1)
        alike = ids[rows[:, None], spread] == c.first + steps
        same = batch.segment_ids[rows[:, None], spread] == batch.segment_ids[rows, (columns - 1).clamp(min=0)][:, None]
        whole = inside & (alike & same).all(1)
        if not bool(whole.all()):
            row = int(rows[~whole][0])
            name = batch.ids[row] if len(batch.ids) == len(ids) else f"row {row}"
            raise DataError(
                f"sample {name!r}: a picture is {c.number} tokens, {c.first} to {c.first + c.number - 1} in this order "
                "after at least one other; here the first is not followed by the rest"
            )
        return rows, columns


def voken_loss(text: Tensor, mapped: Tensor, wanted: Tensor, painted: Tensor | float = 0.0) -> Tensor:
    """The published sum: 0.01 of the text's loss, the painter's own, 0.1 of the mean square to a caption's features.

    ``mapped`` and ``wanted`` ``[n, F, D]``; ``text`` and ``painted`` ``[]``.
    """
    return 0.01 * text + painted + 0.1 * F.mse_loss(mapped, wanted)
