"""Rows: of a language model's tables only the vectors of some tokens learn, as new control tokens need.

Reference: the masked gradients of OpenFlamingo (655f693) and MiniGPT-5 (21308c1).

Differences by design: the learned rows are a parameter of their own, not a mask on a gradient. So the optimizer never
touches the others; behind a mask alone, weight decay shrinks them (MiniGPT-5), or the mask is lost when parameters are
in pieces (OpenFlamingo). When the stage ends they are put back into their table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.registry import register
from chiasm.train.methods.base import Method, MethodConfig, owners, replace

Table = nn.Embedding | nn.Linear


class RowsConfig(MethodConfig):
    """The rows from ``first`` on: ``count`` of them, or all to the last."""

    type: str = "rows"
    first: int = Field(ge=0)
    count: int | None = Field(default=None, gt=0)


class _Rows:
    """What both tables share: the frozen table under its own name, and the rows that take the place of some."""

    trained = ("rows",)
    beside = False
    weight: Tensor
    rows: nn.Parameter
    method: RowsConfig

    def take(self, base: Table, method: RowsConfig) -> None:
        """Take over the table of ``base``; the rows begin as they are there."""
        nn.Module.__init__(self)  # type: ignore[arg-type]
        self.method, self.weight = method, base.weight
        count = method.count if method.count is not None else len(base.weight) - method.first
        self.rows = nn.Parameter(base.weight.detach()[method.first : method.first + count].clone())

    def table(self) -> Tensor:
        """The whole table ``[V, D]`` as it stands now."""
        first = self.method.first
        return torch.cat((self.weight[:first], self.rows, self.weight[first + len(self.rows) :]))


class RowsEmbedding(_Rows, nn.Embedding):
    """Token vectors, some of them learned."""

    def __init__(self, base: nn.Embedding, method: RowsConfig):
        self.take(base, method)
        self.num_embeddings, self.embedding_dim, self.padding_idx = base.num_embeddings, base.embedding_dim, None
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    def forward(self, input: Tensor) -> Tensor:
        """``[...]`` ids → ``[..., D]``."""
        own = input - self.method.first
        learned = (own >= 0) & (own < len(self.rows))
        mine = F.embedding(own.clamp(0, len(self.rows) - 1), self.rows)  # [..., D]
        return torch.where(learned[..., None], mine, F.embedding(input, self.weight))  # [..., D]

    @torch.no_grad()
    def merged(self) -> nn.Embedding:
        """The plain table with its rows."""
        return nn.Embedding.from_pretrained(self.table(), freeze=True).train(self.training)


class RowsLinear(_Rows, nn.Linear):
    """A head over the vocabulary, some rows of it learned."""

    def __init__(self, base: nn.Linear, method: RowsConfig):
        self.take(base, method)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias

    def forward(self, input: Tensor) -> Tensor:
        """``[..., D]`` → ``[..., V]``."""
        return F.linear(input, self.table(), self.bias)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with its rows."""
        with torch.device("meta"):
            made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        made.weight, made.bias = nn.Parameter(self.table(), requires_grad=False), self.bias
        return made.train(self.training)


@register("method", "rows")
class Rows(Method):
    """Some rows of an embedding, or of a head over the vocabulary."""

    Config = RowsConfig

    def find(self, model: nn.Module, parameters: set[str]) -> list[str]:
        """See the contract. Raises ConfigError for tables that share their vectors, or have fewer rows."""
        c, found = self.config, []
        modules = dict(model.named_modules())
        for name in sorted(owners(parameters)):
            module = modules[name]
            if type(module) not in (nn.Embedding, nn.Linear) or f"{name}.weight" not in parameters:
                continue
            if getattr(module, "padding_idx", None) is not None or getattr(module, "max_norm", None) is not None:
                raise ConfigError(f"{c.label()}: {name} treats a row of its own kind, which this method does not keep")
            if len(module.weight) < c.first + (c.count or 1):
                raise ConfigError(
                    f"{c.label()} asks for rows to {c.first + (c.count or 1)} of {name}, which has "
                    f"{len(module.weight)}: widen the model's vocabulary, or correct 'first'"
                )
            found.append(name)
        if not found:
            raise ConfigError(
                f"{c.label()} finds 0 tables among {len(parameters)} parameters; give it lm.embedding and lm.lm_head"
            )
        lm = getattr(model, "lm", None)
        if getattr(getattr(lm, "config", None), "tied", False):
            raise ConfigError(
                f"{c.label()}: the head of this language model is its embedding, so rows of one would not be those of "
                "the other; untie it (model.lm.tied: false), or train the whole table"
            )
        return found

    def install(self, model: nn.Module, name: str) -> None:
        """See the contract."""
        base = model.get_submodule(name)
        made = RowsEmbedding(base, self.config) if isinstance(base, nn.Embedding) else RowsLinear(base, self.config)  # type: ignore[arg-type]
        replace(model, name, made)
