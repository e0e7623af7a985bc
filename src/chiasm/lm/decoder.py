"""One decoder for the Llama family: Llama 1-3, Vicuna, Mistral, Qwen2/2.5, Qwen3, SmolLM, Phi-3, InternLM2.

Papers: LLaMA (arXiv:2302.13971), Llama 2 (arXiv:2307.09288), Mistral (arXiv:2310.06825), Qwen2 (arXiv:2407.10671),
Qwen3 (arXiv:2505.09388), Phi-3 (arXiv:2404.14219), InternLM2 (arXiv:2403.17297). Reference: the models of
transformers 5.23.

Differences by design: what distinguishes the family (grouped keys, rotary scaling and share, biases, QK norm, sliding
window, tied head) is configuration, and fused matrices (Phi-3's and InternLM2's) are split when a checkpoint is read.
Segments instead of a padding mask, so packed rows and padding on either side are one thing. Rotary frequencies that
depend on the length do so for each segment, and ``steady`` says where that forbids a cache (see ``chiasm.nn.rope``).
The sliding window is one for all layers. No dropout.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from chiasm.lm.base import LM, Cross, LMConfig
from chiasm.nn.again import call
from chiasm.nn.cache import KVCache
from chiasm.nn.masks import Attend, causal, causal_mask
from chiasm.nn.mlp import activation, gated_down
from chiasm.nn.norm import RMSNorm
from chiasm.nn.rope import Rope, RopeScaling, rotate
from chiasm.nn.watch import Watching
from chiasm.registry import register

Turn = tuple[Tensor, Tensor]  # cosines and sines, [B, 1, T, rotary]


@register("lm", "decoder")
class Decoder(LM):
    """Embedding → ``depth`` × (attention, gated MLP) → norm; ``head`` gives logits."""

    class Config(LMConfig):
        """Sizes and switches. ``head_dim`` None: ``dim // heads``; ``kv_heads`` None: as many as ``heads``."""

        type: str = "decoder"
        vocab: int
        dim: int
        depth: int
        heads: int
        kv_heads: int | None = None
        head_dim: int | None = None
        mlp: int
        activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
        norm_eps: float = 1e-5
        rope_theta: float = 10000.0
        rope_scaling: RopeScaling | None = None
        rotary_share: float = 1.0
        max_positions: int
        tied: bool = False
        qkv_bias: bool = False
        out_bias: bool = False
        mlp_bias: bool = False
        qk_norm: bool = False
        sliding_window: int | None = None

        @model_validator(mode="after")
        def _fits(self) -> Decoder.Config:
            if self.head_dim is None and self.dim % self.heads:
                raise ValueError(f"dim {self.dim} is no multiple of heads {self.heads}; give head_dim")
            if self.heads % (self.kv_heads or self.heads):
                raise ValueError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
            if self.rotary % 2 or not 0 < self.rotary <= self.width:
                raise ValueError(
                    f"rotary_share {self.rotary_share} of head_dim {self.width} is {self.rotary}: not even"
                )
            if self.rope_scaling is not None and self.rope_scaling.type == "longrope":
                sizes = {len(self.rope_scaling.short_factor or ()), len(self.rope_scaling.long_factor or ())}
                if sizes != {self.rotary // 2}:
                    raise ValueError(f"longrope needs {self.rotary // 2} short and long factors, got {sorted(sizes)}")
            return self

        @property
        def width(self) -> int:
            """Channels of one head."""
            return self.head_dim or self.dim // self.heads

        @property
        def rotary(self) -> int:
            """Channels of one head that are rotated."""
            return int(self.width * self.rotary_share)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dim, self.vocab, self.depth = config.dim, config.vocab, config.depth
        self.max_positions = longest(config)
        self.rope = Rope(config.rotary, config.rope_theta, config.max_positions, config.rope_scaling)
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.dim, config.vocab, bias=False)
        self.apply(initialise)

    def embed(self, ids: Tensor) -> Tensor:
        """``ids [B, T]`` → ``[B, T, D]``."""
        return self.embedding(ids)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        segments: Tensor,
        cache: KVCache | None = None,
        cross: Cross | None = None,
    ) -> Tensor:
        """``x [B, T, D]``, ``positions``, ``segments`` ``[B, T]`` → hidden states ``[B, T, D]`` after the last norm."""
        if cache is not None:
            cache.advance(segments, positions)
        keys = (segments, positions) if cache is None else (cache.segments, cache.positions)  # each [B, L]
        attend = causal(segments, positions, *keys, window=self.config.sliding_window)
        turn = self.rope(positions, segments, x.dtype)
        for index, layer in enumerate(self.layers):
            if cross is not None and index in cross:
                x = cross[index](x)
            x = call(layer, self.recompute and cache is None, x, turn, attend, cache, index)  # [B, T, D]
        if cross is not None and self.depth in cross:
            x = cross[self.depth](x)
        return self.norm(x)

    def shares(
        self, x: Tensor, positions: Tensor, segments: Tensor, rows: Tensor, last: int | None = None
    ) -> Tensor | None:
        """See the contract. None where learned prefixes or prompts add columns of their own."""
        if self.extra:
            return None
        window = self.config.sliding_window
        attend = causal(segments, positions, window=window)
        visible = causal_mask(segments, positions, segments, positions, window)[:, :, rows]  # [B, 1, R, T]
        watching = Watching(attend.mask, attend.causal, attend.runs, rows, visible)
        depth = len(self.layers)
        first = depth - min(depth, last or max(1, depth // 2))
        turn = self.rope(positions, segments, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, turn, watching if index >= first else attend, None, index)  # [B, T, D]
        return torch.stack(watching.seen).mean(dim=0) if len(watching.seen) == depth - first else None

    def head(self, hidden: Tensor) -> Tensor:
        """``hidden [..., D]`` → logits ``[..., V]``."""
        return F.linear(hidden, self.embedding.weight) if self.lm_head is None else self.lm_head(hidden)  # [..., V]

    def steady(self, shortest: int, longest: int) -> bool:
        """Whether a cache filled at ``shortest`` positions still holds at ``longest``: frequencies may change."""
        return self.rope.steady(shortest, longest)

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """Room for ``capacity`` positions of ``batch`` rows."""
        c = self.config
        return KVCache(c.depth, batch, c.kv_heads or c.heads, capacity, c.width, device, dtype)


class Block(nn.Module):
    """Pre-norm attention and gated MLP, each added to its input."""

    def __init__(self, config: Decoder.Config):
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, turn: Turn, attend: Attend, cache: KVCache | None, index: int) -> Tensor:
        """``x [B, T, D]`` → ``[B, T, D]``."""
        x = x + self.attn(self.attn_norm(x), turn, attend, cache, index)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal attention in which ``heads / kv_heads`` queries share one key and value."""

    def __init__(self, config: Decoder.Config):
        super().__init__()
        self.width = config.width
        heads, kv_heads = config.heads, config.kv_heads or config.heads
        self.q_proj = nn.Linear(config.dim, heads * config.width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_heads * config.width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_heads * config.width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * config.width, config.dim, bias=config.out_bias)
        self.q_norm = RMSNorm(config.width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.width, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, turn: Turn, attend: Attend, cache: KVCache | None, index: int) -> Tensor:
        """``x [B, T, D]`` → ``[B, T, D]``."""
        q, k, v = (p(x).unflatten(-1, (-1, self.width)) for p in (self.q_proj, self.k_proj, self.v_proj))  # [B,T,H,Dh]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, Dh]
        q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.append(index, k, v)  # [B, H_kv, L, Dh]
        y = attend(q, k, v)  # [B, H, T, Dh]
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, T, D]


class MLP(nn.Module):
    """``down(activation(gate(x)) · up(x))``."""

    def __init__(self, config: Decoder.Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.mlp, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.mlp, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp, config.dim, bias=config.mlp_bias)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, D]`` → ``[B, T, D]``."""
        return gated_down(self.gate_proj(x), self.up_proj(x), self.down_proj, self.activation)  # [B, T, D]


def initialise(module: nn.Module) -> None:
    """Normal with deviation 0.02 for matrices and embeddings, zero biases: what the family's reference code uses."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def longest(config: Decoder.Config) -> int:
    """Positions a model can use: the trained ``max_positions``, extended by linear, dynamic and yarn scaling."""
    scaling = config.rope_scaling
    if scaling is None or scaling.factor is None or scaling.type not in ("linear", "dynamic", "yarn"):
        return config.max_positions
    base = config.max_positions if scaling.type != "yarn" else scaling.original_max_position_embeddings or 0
    return max(config.max_positions, int(base * scaling.factor))


__all__ = ["Decoder"]
