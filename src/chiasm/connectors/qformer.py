"""The querying transformer: learned queries look at a picture and hand a language model a few vectors.

Papers: BLIP-2 (arXiv:2301.12597); InstructBLIP (arXiv:2305.06500), where the queries also read the instruction.
Reference: salesforce/LAVIS ``Qformer.py`` 506965b; ``Blip2QFormerModel`` and ``InstructBlipQFormerModel`` of
transformers 5.23, equal to 1e-5 in float32.

A BERT with its norms after the sums. Queries and text share self-attention; each has its own perceptron; the queries
alone look at the picture, in every ``cross_every``-th layer beginning with the first. Text has positions, queries
have none. Three masks over [queries | text] make the three tasks of BLIP-2's first stage out of one pass:
``unimodal``, ``bidirectional``, ``multimodal_causal``.

Differences by design: queries start as a normal of deviation 0.02, as in LAVIS (transformers starts them at zero: all
stay equal, and the norm with its epsilon of 1e-12 makes their first gradient huge); linear layers start with a
deviation of ``0.02 √(768 / dim)``: BERT's at BERT's width, and at others as much gets through them (with 0.02 a narrow
one learns to match much later, ``benchmarks/stage1.py``); the whole runs in the type of the model (both references keep
it in float32); one masked pass stands for LAVIS's two passes over cached keys, and equals
them without dropout; dropout is 0 unless asked for (BERT: 0.1), so that accumulated gradients are exact; an
instruction longer than the positions is refused.

InstructBLIP is sometimes sketched as cross-attention in the language model. It is not: what crosses is inside this
connector, and the language model gets a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from chiasm.config import Config as Values
from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.errors import ConfigError, DataError
from chiasm.nn.cross_attention import CrossAttention
from chiasm.nn.mlp import MLP
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


class TextHalf(Values):
    """The sizes of what reads text: BERT's vocabulary (LAVIS adds one token) and its number of positions."""

    vocab: PositiveInt = 30523
    positions: PositiveInt = 512


class BodyConfig(Values):
    """The sizes of a query transformer; ``text`` None: it has no text half (BLIP-2 after its first stage)."""

    dim: PositiveInt = 768
    depth: PositiveInt = 12
    heads: PositiveInt = 12
    mlp: PositiveInt = 3072
    cross_every: PositiveInt = 2
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"] = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.0
    text: TextHalf | None = None

    @model_validator(mode="after")
    def _fits(self) -> BodyConfig:
        if self.dim % self.heads:
            raise ConfigError(f"qformer: width {self.dim} cannot be split into {self.heads} heads")
        return self


def deviation(dim: int) -> float:
    """Of the first weights of linear layers of this width: BERT's 0.02 at its 768, and what keeps signals as large."""
    return 0.02 * (768 / dim) ** 0.5


# ---------------------------------------------------------------------------------------------------------------- masks


def unimodal(queries: int, text: Tensor) -> Tensor:
    """Queries see queries, text sees text: contrastive learning. ``text [B, L]`` bool → ``[B, 1, K+L, K+L]``.

    A text without a single token sees itself, or its rows would be empty.
    """
    mask = _blocks(queries, text)
    mask[:, :queries, :queries] = True
    mask[:, queries:, queries:] = text[:, None, :] | torch.eye(text.shape[1], dtype=torch.bool, device=text.device)
    return mask.unsqueeze(1)  # [B, 1, K+L, K+L]


def bidirectional(queries: int, text: Tensor) -> Tensor:
    """All see all: matching, and instructions. ``text [B, L]`` bool → ``[B, 1, K+L, K+L]``."""
    mask = _blocks(queries, text)
    mask[:, :, :queries] = True
    mask[:, :, queries:] = text[:, None, :]
    return mask.unsqueeze(1)  # [B, 1, K+L, K+L]


def multimodal_causal(queries: int, text: Tensor) -> Tensor:
    """Queries see queries; text sees queries and the text before it: grounded generation. → ``[B, 1, K+L, K+L]``."""
    mask = _blocks(queries, text)
    mask[:, :, :queries] = True
    mask[:, queries:, queries:] = text[:, None, :].expand(-1, text.shape[1], -1).tril()
    return mask.unsqueeze(1)  # [B, 1, K+L, K+L]


def _blocks(queries: int, text: Tensor) -> Tensor:
    size = queries + text.shape[1]
    return torch.zeros(len(text), size, size, dtype=torch.bool, device=text.device)  # [B, K+L, K+L]


# ----------------------------------------------------------------------------------------------------------------- body


class Layer(nn.Module):
    """Self-attention over [queries | text]; queries look at the source; each kind has its own perceptron."""

    def __init__(self, config: BodyConfig, source_dim: int, crosses: bool):
        super().__init__()
        c = config

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(c.dim, eps=c.norm_eps)

        self.attn = CrossAttention(c.dim, c.heads, dropout=c.dropout)
        self.attn_norm = norm()
        self.cross = CrossAttention(c.dim, c.heads, source_dim, dropout=c.dropout) if crosses else None
        self.cross_norm = norm() if crosses else None
        self.query_mlp = MLP(c.dim, c.mlp, c.activation)
        self.query_norm = norm()
        self.text_mlp = MLP(c.dim, c.mlp, c.activation) if c.text else None
        self.text_norm = norm() if c.text else None
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, queries: int, source: Tensor, mask: Tensor | None, seen: Tensor | None) -> Tensor:
        """``x [B, K+L, D]`` with its mask, ``source [B, N, D_source]`` with what of it is seen → ``[B, K+L, D]``."""
        x = self.attn_norm(x + self.drop(self.attn(x, mask=mask)))  # [B, K+L, D]
        q, t = x[:, :queries], x[:, queries:]  # [B, K, D], [B, L, D]
        if self.cross is not None and self.cross_norm is not None:
            q = self.cross_norm(q + self.drop(self.cross(q, source, seen)))
        q = self.query_norm(q + self.drop(self.query_mlp(q)))
        if t.shape[1] and self.text_mlp is not None and self.text_norm is not None:
            t = self.text_norm(t + self.drop(self.text_mlp(t)))
        return torch.cat((q, t), dim=1)  # [B, K+L, D]


class TextEmbedding(nn.Module):
    """Words and their positions, counted from 0."""

    def __init__(self, sizes: TextHalf, dim: int):
        super().__init__()
        self.words = nn.Embedding(sizes.vocab, dim)
        self.positions = nn.Embedding(sizes.positions, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [B, L]`` → ``[B, L, D]``. Raises DataError where there are more than positions."""
        room = self.positions.num_embeddings
        if ids.shape[1] > room:
            raise DataError(
                f"a text of {ids.shape[1]} tokens does not fit the {room} positions of the query transformer; shorten "
                f"it, or set processing.instruction.max_length (a caption's: max_length) to at most {room}"
            )
        return self.words(ids) + self.positions.weight[: ids.shape[1]]  # [B, L, D]


class QueryTransformer(nn.Module):
    """The layers without the queries themselves: what one level of queries, or several, are run through."""

    def __init__(self, config: BodyConfig, source_dim: int):
        super().__init__()
        self.text = TextEmbedding(config.text, config.dim) if config.text else None
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            Layer(config, source_dim, crosses=i % config.cross_every == 0) for i in range(config.depth)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=deviation(config.dim))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):  # a norm follows: their size has no effect
                nn.init.normal_(module.weight, std=0.02)

    def forward(
        self, queries: Tensor, source: Tokens, text: Condition | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """``queries [B, K, D]``, ``source.x [B, N, D_source]``, ``text.ids [B, L]`` → ``[B, K+L, D]``.

        ``mask [B, 1, K+L, K+L]`` None: all see all, but for the text's padding.
        """
        count = queries.shape[1]
        if text is not None:
            if self.text is None:
                raise ConfigError("this query transformer has no text half; give its configuration 'text'")
            queries = torch.cat((queries, self.text(text.ids).to(queries.dtype)), dim=1)  # [B, K+L, D]
            mask = bidirectional(count, text.mask) if mask is None else mask
        x = self.drop(self.norm(queries))  # [B, K+L, D]
        seen = None if source.mask is None else source.mask[:, None, None, :]  # [B, 1, 1, N]
        for layer in self.layers:
            x = layer(x, count, source.x, mask, seen)
        return x


# ------------------------------------------------------------------------------------------------------------ connector


@register("connector", "qformer")
class QFormer(Connector):
    """``queries`` learned vectors, a query transformer, one linear layer to the language model's width."""

    class Config(BodyConfig, ConnectorConfig):
        """``instruction``: the queries read the instruction along with the picture (needs ``text``). ``project``
        false: the queries' states are handed on as they are, to the heads of a ``query_text`` model.
        """

        type: str = "qformer"
        queries: PositiveInt = 32
        instruction: bool = False
        project: bool = True

        @model_validator(mode="after")
        def _reads(self) -> QFormer.Config:
            if self.instruction and self.text is None:
                raise ConfigError("qformer: instruction=true needs a text half; give 'text' its sizes")
            return self

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """As many as there are queries."""
            only(source, "qformer")
            return Count(self.queries)

        @property
        def conditioned(self) -> bool:
            """True where the queries read the instruction."""
            return self.instruction

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        if not config.project and config.dim != out_dim:
            raise ConfigError(
                f"qformer: project=false hands on vectors of width {config.dim}, {out_dim} are wanted; set project=true"
            )
        self.config = config
        self.queries = nn.Parameter(torch.randn(config.queries, config.dim) * 0.02)
        self.body = QueryTransformer(config, sole(in_dims, "qformer"))
        self.proj = nn.Linear(config.dim, out_dim) if config.project else None

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, N, D_in]``, the instruction ``cond.ids [U, L]`` → ``[U, K, D_out]``."""
        tokens = only(tokens, "qformer")
        if self.config.instruction and cond is None:
            raise DataError("this connector reads the instruction and got none: set processing.instruction")
        x = self.states(tokens, cond if self.config.instruction else None)  # [U, K+L, D]
        x = x[:, : self.config.queries]  # [U, K, D]
        return Tokens(x if self.proj is None else self.proj(x))  # [U, K, D_out]

    def states(self, tokens: Tokens, text: Condition | None = None, mask: Tensor | None = None) -> Tensor:
        """Last states of queries and text ``[U, K+L, D]``: what the objectives of the first stage read."""
        queries = self.queries.expand(len(tokens.x), -1, -1)  # [U, K, D]
        return self.body(queries, tokens, text, mask)

    def unused(self) -> list[str]:
        """Names of parameters that never run when the connector does: the text half where nothing is read with it.

        Without ``project`` the first stage's tasks run all of them.
        """
        if not self.config.project:
            return []
        last = f"body.layers.{self.config.depth - 1}.text_"
        names = [name for name, _ in self.named_parameters()]
        if self.config.instruction:
            return [name for name in names if name.startswith(last)]
        return [name for name in names if ".text_" in name or name.startswith("body.text.")]
