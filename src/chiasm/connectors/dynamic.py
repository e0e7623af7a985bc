"""The patches that matter: a scorer picks the best ``keep`` of a picture, and another connector maps them.

No published system has this under the name "dynamic Q-Former"; this is the project's source documents' sketch
(importance scores, the top k patches) made trainable. Choosing has no gradient, so each patch that is kept is
multiplied by the sigmoid of its score: through that factor the scorer learns (the way a mixture of experts weighs its
chosen experts, arXiv:1701.06538). Nearest published: token pruning by learned scores, DynamicViT (arXiv:2106.02034).

A patch that is not kept gets no gradient, so a scorer can settle on the wrong ones early; begin with a large ``keep``
and lower it stage by stage.

Design: patches keep their order in the picture; the scorer is a perceptron on each patch by itself; what follows is
any connector, ``{"type": "mlp"}`` or ``{"type": "qformer"}``, which may read the instruction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from chiasm import registry
from chiasm.config import part
from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.connectors.mlp import perceptron
from chiasm.errors import ConfigError
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


@register("connector", "dynamic")
class Dynamic(Connector):
    """Score every patch, keep the best, weigh them by their scores, map them."""

    class Config(ConnectorConfig):
        """``keep``: patches kept of each unit; ``hidden``: the scorer's inner width (None: the encoder's / 4)."""

        type: str = "dynamic"
        keep: PositiveInt = 64
        hidden: PositiveInt | None = None
        then: part("connector") = Field(default={"type": "mlp"}, validate_default=True)  # type: ignore[valid-type]

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """What ``then`` makes of ``keep`` patches. Raises ConfigError where there are fewer."""
            _enough(self.keep, only(source, "dynamic").tokens)
            return self.then.count(Count(self.keep))

        @property
        def conditioned(self) -> bool:
            """True where ``then`` reads the instruction."""
            return self.then.conditioned

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        dim = sole(in_dims, "dynamic")
        self.scorer = perceptron(dim, config.hidden or max(1, dim // 4), 1, 2, "gelu")
        self.then = registry.get("connector", config.then.type)(config.then, in_dims=in_dims, out_dim=out_dim)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, N, D_in]`` → the tokens that ``then`` makes of ``[U, keep, D_in]``."""
        tokens = only(tokens, "dynamic")
        _enough(self.config.keep, tokens.x.shape[1])
        scores = self.scores(tokens)  # [U, N]
        order = scores.topk(self.config.keep, dim=1).indices.sort(dim=1).values  # [U, keep], in picture order
        rows = order.unsqueeze(-1)  # [U, keep, 1]
        weight = scores.gather(1, order).sigmoid().unsqueeze(-1)  # [U, keep, 1]
        kept = tokens.x.gather(1, rows.expand(-1, -1, tokens.x.shape[2])) * weight  # [U, keep, D_in]
        mask = None if tokens.mask is None else tokens.mask.gather(1, order)
        return self.then(Tokens(kept, mask), cond)

    def scores(self, tokens: Tokens) -> Tensor:
        """How much each patch matters, ``[U, N]``; the lowest of all where a mask hides it."""
        scores = self.scorer(tokens.x).squeeze(-1)  # [U, N]
        return scores if tokens.mask is None else scores.masked_fill(~tokens.mask, torch.finfo(scores.dtype).min)


def _enough(keep: int, tokens: int) -> None:
    if keep > tokens:
        raise ConfigError(f"dynamic keeps {keep} patches of a unit, but its encoder gives {tokens}; lower keep")
