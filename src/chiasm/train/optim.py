"""The optimizer: AdamW or Muon over float32 masters, decay groups, warm-up and cosine.

With ``dtype: bf16`` the model's own tensors are bfloat16, and the optimizer works on float32 copies of the trained ones
(masters): gradients of all micro-batches are summed in float32, and a step below bfloat16's spacing is kept. Nothing is
cast in the forward pass, unlike autocast, which casts every weight each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from chiasm.errors import ConfigError
from chiasm.train.heap import page_out
from chiasm.train.muon import Muon, matrices
from chiasm.train.plan import Plan


class Masters:
    """The float32 tensors that are optimized, by name, and their exchange with the model's own.

    In float32 the masters are the parameters themselves and every method is free; a model in another type is cast.
    ``restore`` gives the model back in float32: trained tensors from their masters, frozen ones exactly as they were.
    """

    def __init__(self, model: nn.Module, plan: Plan, low: torch.dtype | None):
        self.model = model
        self.low = low
        named = dict(model.named_parameters())
        self.trained = {name: p for name, p in named.items() if plan.rates[name] is not None}
        self.frozen: dict[str, Tensor] = {}
        if low is None:
            for p in named.values():
                if p.dtype != torch.float32:
                    p.data = p.data.to(torch.float32)
            self.masters = self.trained
            return
        self.masters = {
            name: nn.Parameter(p.detach().to(torch.float32, copy=True), requires_grad=True)
            for name, p in self.trained.items()
        }
        for name, p in named.items():
            if name not in self.trained and p.dtype != low:
                self.frozen[name] = p.data.cpu()
            wide, p.data = p.data, p.data.to(low)
            if wide.dtype != low:
                page_out(wide)
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._take(name, p))
            for name, p in self.trained.items()
        ]

    def collect(self) -> None:
        """Add the model's gradients of one micro-batch to those of the masters.

        A backward pass does so by itself, for each parameter as soon as its gradient is whole: the model's own
        gradients never stand in memory all at once.
        """
        if self.low is not None:
            for name, p in self.trained.items():
                self._take(name, p)

    def _take(self, name: str, p: nn.Parameter) -> None:
        if p.grad is not None:
            master = self.masters[name]
            if master.grad is None:
                master.grad = p.grad.to(torch.float32)
            else:
                master.grad.add_(p.grad)
            p.grad = None

    @torch.no_grad()
    def hold(self, bounds: Mapping[str, tuple[float, float]]) -> None:
        """Put parameters that are trained back between their lowest and highest value, by name."""
        for name, (low, high) in bounds.items():
            if name in self.masters:
                self.masters[name].clamp_(low, high)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters' values into the model."""
        if self.low is not None:
            for name, p in self.trained.items():
                p.copy_(self.masters[name])

    @torch.no_grad()
    def restore(self) -> None:
        """End of the stage: the model in float32 again."""
        if self.low is None:
            return
        for hook in self.hooks:
            hook.remove()
        for name, p in self.trained.items():
            p.data = self.masters[name].data
            p.grad = None
        for name, p in self.model.named_parameters():
            if name not in self.trained:
                p.data = self.frozen.get(name, p.data).to(p.device, torch.float32)
        self.low = None

    def tensors(self) -> dict[str, Tensor]:
        """All parameters by name in float32, as ``restore`` would leave them; shared ones under each of their names."""
        named = self.model.named_parameters()
        values = {id(p): self.masters.get(name, self.frozen.get(name, p)).detach() for name, p in named}
        everywhere = self.model.named_parameters(remove_duplicate=False)
        return {name: values[id(p)].to(torch.float32) for name, p in everywhere}

    def gradients(self) -> list[Tensor]:
        """All gradients that are there."""
        return [p.grad for p in self.masters.values() if p.grad is not None]


def optimizer(
    masters: Masters, plan: Plan, kind: str, weight_decay: float, betas: tuple[float, float], eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW, or Muon for the matrices of linear layers and AdamW for the rest (``kind``: "adamw", "muon").

    A group for each learning rate, decay on matrices only (as the published recipes: not on biases, norms and other
    vectors). Fused where the device has the kernel. Raises ConfigError for Muon over pieces of matrices.
    """
    turned = matrices(masters.model) if kind == "muon" else set()
    groups: dict[tuple[float, bool, bool, type], list[nn.Parameter]] = {}
    for name, p in masters.masters.items():
        rate = plan.rates[name]
        assert rate is not None
        if name in turned and isinstance(p, DTensor):
            raise ConfigError(
                f"optimizer: muon needs whole matrices and {name!r} is in pieces; use adamw or parallel: replicate"
            )
        groups.setdefault((rate, p.ndim >= 2, name in turned, type(p)), []).append(p)  # pieces and wholes do not mix
    fused = all(p.device.type in ("cpu", "cuda") for p in masters.masters.values())
    settings: list[dict[str, Any]] = [
        {"params": params, "lr": rate, "base": rate, "weight_decay": weight_decay if decays else 0.0, "matrices": turn}
        for (rate, decays, turn, _), params in groups.items()
    ]
    made = Muon if kind == "muon" else torch.optim.AdamW
    return made(settings, betas=betas, eps=eps, fused=fused)


def factor(step: int, total: int, warmup_ratio: float, schedule: str) -> float:
    """The share of the learning rate at ``step`` (from 0), as transformers' schedules give it: linear from 0 over
    ``ceil(total · warmup_ratio)`` steps, then a half cosine to 0, a line to 0, or flat.
    """
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return max(0.0, 1.0 - progress) if schedule == "linear" else 1.0


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group its own learning rate times ``share``."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * share


@torch.no_grad()
def scale_and_clip(gradients: Iterable[Tensor], weight: float, max_norm: float, known: Tensor | None = None) -> float:
    """Turn gradients of a sum into those of the mean over ``weight`` and clip their common norm to ``max_norm``.

    ``known`` is their norm ``[]`` where these are only a rank's pieces.

    Returns the norm before clipping; where it is not finite the gradients are left alone.
    """
    gradients = list(gradients)
    if not gradients:
        return 0.0
    if known is None:
        norms = torch._foreach_norm(gradients)
        known = torch.linalg.vector_norm(torch.stack([n.to(gradients[0].device) for n in norms]))
    norm = float(known) / weight
    if math.isfinite(norm):
        torch._foreach_mul_(gradients, min(1.0, max_norm / (norm + 1e-6)) / weight)
    return norm
