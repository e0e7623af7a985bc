"""What a change of a model's numbers does to its words: two sets of logits compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Quality:
    """``kl``: mean Kullback-Leibler divergence in nats of the changed from the original distributions, ``worst`` its
    largest; ``agreement``: share of the ``positions`` whose likeliest token is the same."""

    kl: float
    worst: float
    agreement: float
    positions: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.5f} nats (worst {self.worst:.4f}), same best token at {self.agreement:.1%} of "
            f"{self.positions} positions"
        )


def quality(original: Iterable[Tensor], changed: Iterable[Tensor]) -> Quality:
    """Compare logits ``[n, V]`` of the same positions, one pair for each prompt."""
    divergences: list[float] = []
    same = 0
    for first, second in zip(original, changed, strict=True):
        p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)  # [n, V]
        divergences += (p.exp() * (p - q)).sum(-1).clamp(min=0).tolist()
        same += int((first.argmax(-1) == second.argmax(-1)).sum())
    count = len(divergences)
    return Quality(sum(divergences) / count, max(divergences), same / count, count)


__all__ = ["Quality", "quality"]
