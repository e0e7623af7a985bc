"""Prefix tuning: learned keys and values that every position of a part's attention sees.

Paper: Prefix-Tuning (Li and Liang, arXiv:2101.00190). Reference: ``peft``, ``PREFIX_TUNING``, without its projection.

Differences by design: the keys are not rotated and take no position, so positions of the sequence stay what they were,
packed conversations share them without seeing each other, and the cache holds real positions only. Keys and values are
learned directly (the paper's reparametrisation is for training only).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.lm import decoder
from chiasm.nn.attention import Attention
from chiasm.nn.masks import Attend
from chiasm.registry import register
from chiasm.train.methods.base import Method, MethodConfig, replace, whole


class PrefixConfig(MethodConfig):
    """``tokens``: learned keys and values of each layer."""

    type: str = "prefix"
    tokens: int = Field(default=16, gt=0)


class _Prefixed(nn.Module):
    """What both kinds of attention share: the layers of the module whose place is taken, and the learned vectors."""

    trained = ("prefix_keys", "prefix_values")
    beside = False
    prefix_keys: nn.Parameter
    prefix_values: nn.Parameter

    def take(self, base: nn.Module, method: PrefixConfig, heads: int, width: int) -> None:
        """Take over the layers of ``base``; draw the prefix, ``[H, P, Dh]``."""
        nn.Module.__init__(self)
        self.method = method
        for name, child in base._modules.items():
            self.add_module(name, child)  # type: ignore[arg-type]
        like = next(base.parameters())
        for name in self.trained:
            drawn = torch.randn(heads, method.tokens, width) * width**-0.5
            self.register_parameter(name, nn.Parameter(drawn.to(like.device, like.dtype)))

    def rows(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix keys and values for a batch like ``k [B, H, L, Dh]``: each ``[B, H, P, Dh]``."""
        keys, values = (p.to(k.dtype).expand(len(k), -1, -1, -1) for p in (self.prefix_keys, self.prefix_values))
        return keys, values


class PrefixDecoderAttention(_Prefixed, decoder.Attention):
    """Causal attention with a prefix. Its place and its layers' names are those of the attention before."""

    def __init__(self, base: decoder.Attention, method: PrefixConfig):
        self.take(base, method, base.k_proj.out_features // base.width, base.width)
        self.width, self.q_norm, self.k_norm = base.width, base.q_norm, base.k_norm

    def forward(self, x: Tensor, turn: Any, attend: Any, cache: Any, index: int) -> Tensor:
        """``x [B, T, D]`` → ``[B, T, D]``."""

        def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.rows(k)
            seen = widen(attend, self.method.tokens, q.shape[2], k.shape[2], q.device)
            return seen(q, torch.cat((keys, k), 2), torch.cat((values, v), 2))  # [B, H, T, Dh]

        return super().forward(x, turn, widened, cache, index)  # type: ignore[arg-type]


class PrefixAttention(_Prefixed, Attention):
    """Attention of an encoder with a prefix, which every position sees."""

    def __init__(self, base: Attention, method: PrefixConfig):
        self.take(base, method, base.heads, base.q.out_features // base.heads)
        self.heads = base.heads

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, asked: int | None = None) -> Tensor:
        """``x [B, N, D]``, ``mask [B, N]`` (not with ``causal``) → ``[B, N, D]``, or of ``asked`` first positions."""
        made = self.q(x[:, :asked]), self.k(x), self.v(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in made)
        keys, values = self.rows(k)
        allowed = None if mask is None else mask[:, None, None, :]  # [B, 1, 1, N]
        if causal:
            allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[None, None]
        if allowed is not None:
            allowed = F.pad(allowed, (self.method.tokens, 0), value=True)  # [B, 1, 1 or N, P + N]
        k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)  # [B, H, P + N, Dh]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # [B, H, N, Dh]
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, N, D]


def widen(attend: Attend, tokens: int, queries: int, keys: int, device: torch.device) -> Attend:
    """The same attention with ``tokens`` columns in front that every query sees."""
    mask = attend.mask
    if mask is None and (attend.causal or attend.runs):
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]  # [1, 1, T, L]
    if mask is not None and attend.runs:
        pieces = torch.stack([_pieces(lengths, device) for lengths in attend.runs])  # [B, T]
        mask = mask & (pieces.unsqueeze(2) == pieces.unsqueeze(1)).unsqueeze(1)  # [B, 1, T, T]
    return Attend() if mask is None else Attend(mask=F.pad(mask, (tokens, 0), value=True))  # [B, 1, T, P + L]


def _pieces(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of the piece that each position ``[T]`` lies in."""
    return torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))


@register("method", "prefix")
class Prefix(Method):
    """Learned keys and values in each attention."""

    Config = PrefixConfig

    def find(self, model: nn.Module, parameters: set[str]) -> list[str]:
        """See the contract."""
        known = (decoder.Attention, Attention)
        found = [n for n, m in model.named_modules() if isinstance(m, known) and whole(model, n, parameters)]
        if not found:
            raise ConfigError(
                f"{self.config.label()} finds 0 attentions of this package (lm 'decoder', encoder 'vit') among "
                f"{len(parameters)} parameters; for a model of transformers use prompt(...) or lora(...)"
            )
        return found

    def install(self, model: nn.Module, name: str) -> None:
        """See the contract."""
        base = model.get_submodule(name)
        if isinstance(base, decoder.Attention):
            replace(model, name, PrefixDecoderAttention(base, self.config))
        elif isinstance(base, Attention):
            replace(model, name, PrefixAttention(base, self.config))
        else:
            raise ConfigError(f"{name} is a {type(base).__name__}: a prefix goes into attention of this package")
