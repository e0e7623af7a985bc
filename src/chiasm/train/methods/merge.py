"""Merging with a proof: the model must answer the same before and after, or nothing is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.errors import CheckpointError, ConfigError
from chiasm.nn.modes import evaluating
from chiasm.processing.fingerprint import probes
from chiasm.train.methods.base import installed, replace

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Proof:
    """How far the logits of the probes moved: the largest difference, relative to the largest logit where that is over
    1, on ``positions`` positions of ``probes`` conversations; ``layers`` were merged.
    """

    gap: float
    probes: int
    positions: int
    layers: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers merged; logits of {self.positions} positions in {self.probes} conversations moved "
            f"by at most {self.gap:.1e}"
        )


def mergeable(model: nn.Module) -> dict[str, nn.Module]:
    """The installed layers that a plain layer can take the place of."""
    return {name: module for name, module in installed(model) if hasattr(module, "merged")}


def merge(vlm: Any, tolerance: float = TOLERANCE, conversations: Sequence[Any] | None = None) -> Proof:
    """Put plain layers in place of all LoRA and QLoRA layers of ``vlm``, in float32, and prove that nothing changed.

    The proof runs the built-in probe conversations (text, pictures, several turns) and ``conversations``. Raises
    ConfigError where there is nothing to merge, CheckpointError where logits move by more than ``tolerance``, also
    in float64: the model is then as it was.
    """
    model = vlm.model
    layers = mergeable(model)
    if not layers:
        others = sorted({module.method.type for _, module in installed(model)})
        raise ConfigError(f"there is nothing to merge: the model carries {', '.join(others) or 'no method'}")
    narrow = [n for n, p in model.named_parameters() if torch.finfo(p.dtype).bits < 32]
    if narrow:
        raise ConfigError(
            f"merging rounds unless it is done in float32; {len(narrow)} parameters are narrower, the first is "
            f"{narrow[0]!r}: load the model with dtype='float32'"
        )
    gap, count, logits = _replaced(vlm, layers, conversations)
    if not gap <= tolerance and model.dtype == torch.float32:
        # Float32 rounding can exceed the tolerance where logits are large. Float64 tells it from a wrong merge.
        _put_back(model, layers)
        model.double()
        gap, count, logits = _replaced(vlm, layers, conversations)
        if not gap <= tolerance:
            _put_back(model, layers)
        model.float()
    elif not gap <= tolerance:
        _put_back(model, layers)
    if not gap <= tolerance:
        raise CheckpointError(
            f"merged logits differ from the unmerged by {gap:.3g}, {tolerance:g} is allowed: nothing was merged. Is a "
            "layer used without being called, or is its dropout not off in eval mode?"
        )
    return Proof(gap, count, logits, len(layers))


def _replaced(vlm: Any, layers: dict[str, nn.Module], conversations: Sequence[Any] | None) -> tuple[float, int, int]:
    """Put the plain layers in place; the largest gap of the logits, the number of probes and of logits."""
    before = probe_logits(vlm, conversations)
    for name, module in layers.items():
        replace(vlm.model, name, module.merged())  # type: ignore[operator]
    after = probe_logits(vlm, conversations)
    gap = max(distance(a, b) for a, b in zip(before, after, strict=True))
    return gap, len(before), sum(len(rows) for rows in before)


def _put_back(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, module in layers.items():
        replace(model, name, module)


@torch.no_grad()
def probe_logits(vlm: Any, conversations: Sequence[Any] | None = None) -> list[Tensor]:
    """The logits ``[T, V]`` of the probe conversations, in eval mode, float32 on the CPU. Probes that the model has no
    room for are left out.
    """
    found: list[Tensor] = []
    room = getattr(vlm.model.lm, "max_positions", None)
    with evaluating(vlm.model):
        for messages in [*probes(vlm.processor).values(), *(conversations or ())]:
            batch = vlm.processor.batch([messages], add_generation_prompt=True).to(vlm.device, dtype=vlm.dtype)
            if room is None or batch.input_ids.shape[1] <= room:
                found.append(vlm.model(batch, logits="all").logits[0].float().cpu())  # [T, V]
    if not found:
        raise CheckpointError(f"no probe conversation fits into the model's {room} positions: nothing can be proved")
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of logits, divided by the largest of them where that is over 1. NaN is infinite."""
    gap = float((a - b).abs().max()) / max(1.0, float(a.abs().max()))
    return gap if gap == gap else float("inf")
