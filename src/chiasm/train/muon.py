"""Muon: the momentum of each linear layer's matrix, made orthogonal; AdamW for everything else.

    G ── m ← 0.95 m + 0.05 G ──▶ 0.05 G + 0.95 m ──▶ nearest orthogonal matrix O
    W ← (1 − lr · decay) W − lr · 0.2 √max(R, C) · O

Source: Jordan et al. 2024 (the method and the Newton–Schulz coefficients); Liu et al. 2025, arXiv:2502.16982 (decay,
and the factor that makes an update as large as AdamW's usually is, so that AdamW's learning rates keep their meaning).
Embeddings and the output head stay with AdamW, as both sources say. For the matrices it needs half of AdamW's memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95
UPDATE = 0.2  # root mean square of an AdamW update, as measured by Liu et al.


class Muon(torch.optim.AdamW):
    """Steps the groups with ``matrices`` true by Muon, the others by AdamW."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step. A matrix's gradient is used up by it, so that AdamW finds none there."""
        for group in self.param_groups:
            if group["matrices"]:
                self._turn(group)
        return super().step(closure)

    def _turn(self, group: dict[str, Any]) -> None:
        """Matrices of one shape are made orthogonal together."""
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for p in group["params"]:
            if p.grad is not None:
                shapes.setdefault(p.shape, []).append(p)
        for shape, params in shapes.items():
            scale = group["lr"] * UPDATE * max(shape) ** 0.5
            for p, update in zip(params, orthogonal(torch.stack([self._momentum(p) for p in params]))):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(p.dtype), alpha=-scale)
                p.grad = None

    def _momentum(self, p: nn.Parameter) -> Tensor:
        """Nesterov's look ahead of the running mean of the gradient ``[R, C]``."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(state["momentum"], MOMENTUM)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Matrices ``[..., R, C]`` with the same singular vectors and all singular values near 1 (0.7 … 1.2).

    Five Newton–Schulz steps of a quintic polynomial: matrix products only.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def matrices(model: nn.Module) -> set[str]:
    """Names of the weights that Muon treats: those of linear layers, less the ones that write to a vocabulary."""
    words = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m.weight.ndim == 2 and m.out_features not in words
    }
