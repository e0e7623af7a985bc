"""Decoders with layer norms and a plain perceptron: MPT, MosaicGPT, GPT-NeoX, Pythia, RedPajama-INCITE.

Papers: GPT-NeoX-20B (arXiv:2204.06745); Pythia (arXiv:2304.01373); ALiBi (arXiv:2108.12409); MPT and RedPajama-INCITE
(2023) were published as code. Reference: ``MptForCausalLM`` and ``GPTNeoXForCausalLM`` of transformers 5.23, equal to
1e-5; MosaicGPT (MPT-1B) adds a norm over all queries and all keys, which transformers' MPT does not run.

They are the language models of OpenFlamingo, and take cross-attention between their layers, as ``decoder`` does.

Differences by design: as in ``decoder``: segments instead of a padding mask; distances of ALiBi are counted inside a
segment; fused matrices are split when a checkpoint is read. No dropout.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.lm.base import LM, Cross, LMConfig
from chiasm.lm.decoder import initialise
from chiasm.nn.again import call
from chiasm.nn.cache import KVCache
from chiasm.nn.masks import Attend, causal, causal_mask
from chiasm.nn.mlp import activation
from chiasm.nn.rope import Rope, rotate
from chiasm.registry import register

Turn = tuple[Tensor, Tensor] | None  # cosines and sines, [B, 1, T, rotary]


@register("lm", "gpt")
class GPT(LM):
    """Embedding → ``depth`` × (attention, perceptron) → norm; ``head`` gives logits."""

    class Config(LMConfig):
        """Sizes and switches.

        ``positions``: rotary over ``rotary_share`` of a head, or ALiBi, whose steepest slope is 2^-(alibi_max/heads).
        ``parallel``: attention and perceptron read the same input (GPT-NeoX). ``qk_norm``: norms over all queries and
        over all keys (MosaicGPT). ``clip``: the largest absolute value of queries, keys and values.
        """

        type: str = "gpt"
        vocab: int
        dim: int
        depth: int
        heads: int
        mlp: int
        activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
        norm_eps: float = 1e-5
        positions: Literal["rotary", "alibi"] = "rotary"
        rope_theta: float = 10000.0
        rotary_share: float = 1.0
        alibi_max: float = 8.0
        max_positions: int = 2048
        parallel: bool = False
        bias: bool = True  # of linear layers and of norms
        qk_norm: bool = False
        clip: float | None = None
        tied: bool = False

        @model_validator(mode="after")
        def _fits(self) -> GPT.Config:
            if self.dim % self.heads:
                raise ConfigError(f"gpt: width {self.dim} cannot be split into {self.heads} heads")
            if self.positions == "rotary" and (self.rotary % 2 or not 0 < self.rotary <= self.width):
                raise ConfigError(f"gpt: rotary_share {self.rotary_share} of {self.width} channels is {self.rotary}")
            return self

        @property
        def width(self) -> int:
            """Channels of one head."""
            return self.dim // self.heads

        @property
        def rotary(self) -> int:
            """Channels of one head that are rotated."""
            return int(self.width * self.rotary_share)

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.dim, self.vocab, self.depth, self.max_positions = c.dim, c.vocab, c.depth, c.max_positions
        self.rope = Rope(c.rotary, c.rope_theta, c.max_positions) if c.positions == "rotary" else None
        self.embedding = nn.Embedding(c.vocab, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = norm(c)
        self.lm_head = None if c.tied else nn.Linear(c.dim, c.vocab, bias=False)
        self.apply(initialise)

    def embed(self, ids: Tensor) -> Tensor:
        """``ids [B, T]`` → ``[B, T, D]``."""
        return self.embedding(ids)

    def forward(
        self, x: Tensor, positions: Tensor, segments: Tensor, cache: KVCache | None = None, cross: Cross | None = None
    ) -> Tensor:
        """``x [B, T, D]``, ``positions``, ``segments`` ``[B, T]`` → hidden states ``[B, T, D]`` after the last norm."""
        if cache is not None:
            cache.advance(segments, positions)
        keys = (segments, positions) if cache is None else (cache.segments, cache.positions)  # each [B, L]
        turn = None if self.rope is None else self.rope(positions, segments, x.dtype)
        attend = causal(segments, positions, *keys) if turn else self._sloped(segments, positions, *keys, x.dtype)
        cross = cross or {}
        for index, layer in enumerate(self.layers):
            if index in cross:
                x = cross[index](x)
            x = call(layer, self.recompute and cache is None, x, turn, attend, cache, index)  # [B, T, D]
        if self.depth in cross:
            x = cross[self.depth](x)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """``hidden [..., D]`` → logits ``[..., V]``."""
        return F.linear(hidden, self.embedding.weight) if self.lm_head is None else self.lm_head(hidden)  # [..., V]

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """Room for ``capacity`` positions of ``batch`` rows."""
        c = self.config
        return KVCache(c.depth, batch, c.heads, capacity, c.width, device, dtype)

    def _sloped(
        self, segments: Tensor, positions: Tensor, key_segments: Tensor, key_positions: Tensor, dtype: torch.dtype
    ) -> Attend:
        """Causal attention whose scores fall with the distance: a mask of numbers ``[B, H, T, L]``."""
        steep = slopes(self.config.heads, self.config.alibi_max).to(positions.device).view(-1, 1, 1)  # [H, 1, 1]
        distance = (key_positions.unsqueeze(1) - positions.unsqueeze(2)).unsqueeze(1)  # [B, 1, T, L]
        allowed = causal_mask(segments, positions, key_segments, key_positions)  # [B, 1, T, L]
        return Attend(mask=(distance * steep).masked_fill(~allowed, float("-inf")).to(dtype))  # [B, H, T, L]


class Block(nn.Module):
    """Attention and perceptron, one after the other or side by side, each behind its norm."""

    def __init__(self, config: GPT.Config):
        super().__init__()
        self.parallel = config.parallel
        self.attn_norm = norm(config)
        self.attn = Attention(config)
        self.mlp_norm = norm(config)
        self.mlp = Perceptron(config)

    def forward(self, x: Tensor, turn: Turn, attend: Attend, cache: KVCache | None, index: int) -> Tensor:
        """``x [B, T, D]`` → ``[B, T, D]``."""
        found = self.attn(self.attn_norm(x), turn, attend, cache, index)  # [B, T, D]
        if self.parallel:
            return x + found + self.mlp(self.mlp_norm(x))
        x = x + found
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal attention with a key and a value for each query head."""

    def __init__(self, config: GPT.Config):
        super().__init__()
        c = config
        self.width, self.clip = c.width, c.clip
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(c.dim, c.dim, bias=c.bias) for _ in range(4))
        self.q_norm = norm(c) if c.qk_norm else None
        self.k_norm = norm(c) if c.qk_norm else None
        self.cancels = c.bias and c.positions == "alibi" and not c.qk_norm and c.clip is None

    def forward(self, x: Tensor, turn: Turn, attend: Attend, cache: KVCache | None, index: int) -> Tensor:
        """``x [B, T, D]`` → ``[B, T, D]``."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [B, T, D]
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in (q, k, v))  # [B, H, T, Dh]
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.append(index, k, v)  # [B, H, L, Dh]
        y = attend(q, k, v)  # [B, H, T, Dh]
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, T, D]

    def without_effect(self) -> list[str]:
        """A bias of the keys adds one number to all scores of a query, and softmax cancels it: its slope is 0."""
        return ["k_proj.bias"] if self.cancels else []


class Perceptron(nn.Module):
    """``down(activation(up(x)))``."""

    def __init__(self, config: GPT.Config):
        super().__init__()
        self.up_proj = nn.Linear(config.dim, config.mlp, bias=config.bias)
        self.down_proj = nn.Linear(config.mlp, config.dim, bias=config.bias)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, D]`` → ``[B, T, D]``."""
        return self.down_proj(self.activation(self.up_proj(x)))


def norm(config: GPT.Config) -> nn.LayerNorm:
    """A layer norm over the model's width, with a bias where linear layers have one."""
    return nn.LayerNorm(config.dim, eps=config.norm_eps, bias=config.bias)


def slopes(heads: int, steepest: float = 8.0) -> Tensor:
    """ALiBi's slope of each head ``[H]``, as MPT orders them where ``heads`` is no power of two."""
    full = 2 ** math.ceil(math.log2(heads))
    found = 0.5 ** (torch.arange(1, full + 1, dtype=torch.float32, device="cpu") * (steepest / full))  # [full]
    return found if full == heads else torch.cat((found[1::2], found[::2]))[:heads]


__all__ = ["GPT", "slopes"]
