"""What a change of a model's numbers does to its words or its vectors: two sets of them compared."""

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


@dataclass(frozen=True)
class Nearness:
    """``cosine``: mean of each vector with what it became, ``worst`` the least; ``kept``: of each one's ``of`` nearest
    others before, the share that is among its ``of`` nearest after; ``count`` vectors."""

    cosine: float
    worst: float
    kept: float
    of: int
    count: int

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.5f} (worst {self.worst:.5f}), {self.kept:.1%} of the {self.of} nearest kept, over "
            f"{self.count} vectors"
        )


def nearness(original: Tensor, changed: Tensor, of: int = 10) -> Nearness:
    """Compare vectors of unit length ``[n, D]``, one row each."""
    first, second = original.double(), changed.double()  # [n, D]
    cosines = (first * second).sum(1)  # [n]
    of = min(of, len(first) - 1)
    kept = 1.0
    if of > 0:
        near = [(x @ x.T).fill_diagonal_(-2).topk(of, 1).indices for x in (first, second)]  # [n, of] each
        kept = float((near[0].unsqueeze(2) == near[1].unsqueeze(1)).any(2).double().mean())
    return Nearness(float(cosines.mean()), float(cosines.min()), kept, of, len(first))


__all__ = ["Nearness", "Quality", "nearness", "quality"]
