"""Published formulas written out in float64 over tensors with the authors' names: what fusion models are compared with.

Nothing of the package is used here. Norms, attention and GELU are written out; a tensor is found by its published name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Formulas:
    """Layers by their names in a checkpoint."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.t = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.t[name + ".weight"].T
        return y + self.t[name + ".bias"] if name + ".bias" in self.t else y

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
        return scaled * self.t[name + ".weight"] + self.t[name + ".bias"]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    @staticmethod
    def attend(
        q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        """``q [B, T, D]``, ``k``, ``v [B, L, D]``, ``allowed [B, T, L]``, ``bias [H, T, L]``: head by head."""
        size, out = q.shape[-1] // heads, []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
            scores = scores if bias is None else scores + bias[h]
            if allowed is not None:
                scores = scores.masked_fill(~allowed, float("-inf"))
            shares = torch.exp(scores - scores.amax(-1, keepdim=True))
            out.append(shares / shares.sum(-1, keepdim=True) @ v[..., part])
        return torch.cat(out, -1)

    def patches(self, name: str, pixels: Tensor, patch: int) -> Tensor:
        """A convolution of stride ``patch``, as sums over cut pictures."""
        cut = pixels.double().unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, rows, columns, p, p]
        return torch.einsum("bcrspq,dcpq->brsd", cut, self.t[name + ".weight"]).flatten(1, 2) + self.t[name + ".bias"]


def open_to(mask: Tensor, rows: int | None = None) -> Tensor:
    """``mask [B, L]`` → ``[B, rows or L, L]``: all look at what is there."""
    return mask[:, None, :].expand(-1, rows or mask.shape[1], -1)


def close(found: Tensor, wanted: Tensor, mask: Tensor | None = None) -> None:
    """Equal to 1e-5, and not by being nothing."""
    found, wanted = (found[mask], wanted[mask]) if mask is not None else (found, wanted)
    assert wanted.abs().max() > 0.05
    assert torch.allclose(found.double(), wanted, atol=1e-5, rtol=1e-5), float((found - wanted).abs().max())


def drawn(shapes: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Random tensors of the same names and shapes: norms near one, nothing constant."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in shapes.items():
        noise = torch.randn(tensor.shape, generator=generator)
        lowered = name.lower()
        scale = ("norm" in lowered or "_ln" in lowered) and lowered.endswith("weight")
        found[name] = 1 + noise * 0.2 if scale else noise * 0.3
    return found
