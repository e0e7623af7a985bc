"""Attention of whole sequences: torch's kernel, or one of ours where that is faster.

Reference: ``torch.nn.functional.scaled_dot_product_attention``. On CPUs its bfloat16 kernel reaches a fraction of the
matrix-product rate; two batched products with a softmax between them are 1.3 to 2.5 times as fast at the lengths of a
conversation or a tower. Their scores are rounded to bfloat16, as in transformers' "eager" attention. Without gradients
a compiled kernel reads the projections as they lie and keeps scores in float32 (``native/tower.cpp``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.nn import kernels

LONGEST = 768
"""Positions beyond which the kernel, which never holds all scores, is used again."""

STEP = 16
"""Causal attention fills lengths up to a multiple of this: every other shape of a product is a kernel that has to be
made, and that stays in memory; lengths of conversations are all different."""


def merged(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, causal: bool) -> Tensor:
    """``q``, ``k``, ``v [B, N, H·Dh]``, ``mask [B, N]`` (True: may be attended to) or None → ``[B, N, H·Dh]``.

    There may be fewer queries than keys, without ``causal``.
    """
    alike = 1 < q.shape[1] == k.shape[1] <= LONGEST
    if alike and q.shape[2] // heads % 2 == 0 and all(map(kernels.plain, (q, k, v))):
        return kernels.attend(q, k, v, heads, mask, causal)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, Dh]
    if mask is None:
        mixed = attention(q, k, v, causal)  # [B, H, N, Dh]
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])  # [B, H, N, Dh]
    return mixed.transpose(1, 2).flatten(2)  # [B, N, H*Dh]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """``q [B, H, T, Dh]``, ``k`` and ``v`` ``[B, H_kv, T, Dh]`` → ``[B, H, T, Dh]``."""
    written = q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < q.shape[2] == k.shape[2] <= LONGEST
    if written:
        return _written(q, k, v, causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


@torch.compiler.disable
def _written(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return _Written.apply(q, k, v, causal)  # type: ignore[no-any-return]


class _Written(torch.autograd.Function):
    """``softmax(q kᵀ / √Dh) v``; queries that share a key are the rows of one product."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """``q [B, H, T, Dh]``, ``k`` and ``v`` ``[B, H_kv, T, Dh]`` → ``[B, H, T, Dh]``."""
        batch, heads, length, dim = q.shape
        kv_heads, wide = k.shape[1], -(-length // STEP) * STEP if causal else length
        q, k, v = (_filled(x, wide) for x in (q, k, v))  # no position looks at those behind it
        groups = heads // kv_heads
        rows = q.reshape(-1, groups * wide, dim)  # [B*H_kv, G*T, Dh]
        keys, values = k.reshape(-1, wide, dim), v.reshape(-1, wide, dim)  # [B*H_kv, T, Dh]
        scale = dim**-0.5
        if causal:
            later = q.new_full((wide, wide), float("-inf")).triu_(1).repeat(groups, 1)  # [G*T, T]
            scores = torch.baddbmm(later.expand(len(rows), -1, -1), rows, keys.mT, alpha=scale)
        else:
            scores = torch.bmm(rows * scale, keys.mT)  # [B*H_kv, G*T, T]
        shares = torch.softmax(scores, -1)  # [B*H_kv, G*T, T]
        ctx.save_for_backward(rows, keys, values, shares)
        ctx.scale, ctx.sizes = scale, (batch, (heads, kv_heads, kv_heads), length, wide)
        return torch.bmm(shares, values).view(batch, heads, wide, dim)[:, :, :length]  # [B, H, T, Dh]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """``slopes[0] [B, H, T, Dh]`` → the gradients of ``q``, ``k`` and ``v``."""
        rows, keys, values, shares = ctx.saved_tensors
        batch, heads, length, wide = ctx.sizes
        out = _filled(slopes[0], wide).reshape(rows.shape)  # [B*H_kv, G*T, Dh]
        of_values = torch.bmm(shares.mT, out)  # [B*H_kv, T, Dh]
        of_shares = torch.bmm(out, values.mT)  # [B*H_kv, G*T, T]
        of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        of_rows = torch.bmm(of_scores, keys).mul_(ctx.scale)
        of_keys = torch.bmm(of_scores.mT, rows).mul_(ctx.scale)
        found = zip((of_rows, of_keys, of_values), heads, strict=True)
        return *(gradient.view(batch, h, wide, -1)[:, :, :length] for gradient, h in found), None


def _filled(x: Tensor, wide: int) -> Tensor:
    """``x [B, H, T, Dh]`` → ``[B, H, wide, Dh]``, with zeros behind."""
    return x if x.shape[2] == wide else F.pad(x, (0, 0, 0, wide - x.shape[2]))
