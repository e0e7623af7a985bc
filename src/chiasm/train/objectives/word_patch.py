"""Word-patch alignment: how far the words have to be carried to lie on the patches of their picture.

Papers: ViLT (arXiv:2102.03334), UNITER (arXiv:1909.11740); IPOT (arXiv:1802.04307) finds the transport by proximal
steps. Reference: ``objectives.py`` of dandelin/ViLT 762fd39.

Costs are one minus cosines. The text's first and last token and the picture's class vector take no part. Gradients
reach the costs, not the plan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.fusion.pair import Joint


def distances(joint: Joint) -> Tensor:
    """The cost of the best transport between the words and the patches of each sample ``[B]``, in float32 or wider."""
    words, patches = joint.hidden[:, joint.words], joint.hidden[:, joint.picture]  # [B, T, D], [B, N, D]
    words_in, patches_in = inside(joint)
    wide = torch.float64 if words.dtype == torch.float64 else torch.float32
    x, y = (F.normalize(states.to(wide), dim=-1, eps=1e-5) for states in (words, patches))
    cost = (1 - x @ y.transpose(1, 2)).masked_fill(~(words_in[:, :, None] & patches_in[:, None, :]), 0)  # [B, T, N]
    return (cost * plan(cost.detach(), words_in, patches_in)).sum((1, 2))  # [B]


def inside(joint: Joint) -> tuple[Tensor, Tensor]:
    """Which words ``[B, T]`` and which vectors of the picture ``[B, N]`` take part."""
    words, patches = joint.mask[:, joint.words].clone(), joint.mask[:, joint.picture].clone()
    words[torch.arange(len(words)), words.sum(1) - 1] = False
    words[:, 0] = False
    patches[:, 0] = False
    return words, patches


@torch.no_grad()
def plan(cost: Tensor, rows: Tensor, columns: Tensor, beta: float = 0.5, steps: int = 50) -> Tensor:
    """IPOT: ``cost [B, M, N]``, of which ``rows [B, M]`` and ``columns [B, N]`` take part → how much goes where.

    Each row gives ``1 / rows``, each column takes ``1 / columns``. Where a side is empty, nothing goes.
    """
    both = rows[:, :, None] & columns[:, None, :]  # [B, M, N]
    many_rows, many_columns = (side.sum(1)[:, None].to(cost.dtype).clamp(min=1) for side in (rows, columns))  # [B, 1]
    kernel = torch.exp(-cost / beta).masked_fill(~both, 0)
    moved = both.to(cost.dtype)
    give = rows / many_rows  # [B, M]
    for _ in range(steps):
        held = kernel * moved
        take = _inverse(many_columns * torch.einsum("bmn,bm->bn", held, give), columns)  # [B, N]
        give = _inverse(many_rows * torch.einsum("bmn,bn->bm", held, take), rows)  # [B, M]
        moved = give[:, :, None] * held * take[:, None, :]
    return moved


def _inverse(x: Tensor, there: Tensor) -> Tensor:
    return torch.where(there, 1 / torch.where(there & (x > 0), x, torch.ones_like(x)), torch.zeros_like(x))
