"""Beam search of one conversation.

Reference: ``GenerationMixin._beam_search`` of transformers 5.23 with ``early_stopping=False``: of the ``(1 + stop
ids) · n`` best continuations the finished ones among the first ``n`` are kept by their score, sum of
log-probabilities divided by length^penalty, and the first ``n`` unfinished ones go on. The search ends when no
running beam, at its present length, beats the worst finished one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chiasm.infer.sampling import check_finite

IMPOSSIBLE = -1e9


@dataclass
class Beams:
    """The running and the finished answers of one conversation. ``ends(ids)`` says whether an answer is complete."""

    width: int
    length_penalty: float
    spare: int  # continuations looked at, at least twice the width
    ends: Callable[[Sequence[int]], bool]
    running: list[list[int]] = field(default_factory=list)
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self.running = [[] for _ in range(self.width)]
        # All beams begin equal: only the first may be continued, or they would stay equal.
        self.scores = torch.full((self.width,), IMPOSSIBLE)
        self.scores[0] = 0.0

    def advance(self, log_probabilities: Tensor) -> tuple[list[int], list[int]]:
        """``[n, V]`` of each running beam's next token → for each beam from now on: which it continues, its new id."""
        vocab = log_probabilities.shape[-1]
        totals = (log_probabilities + self.scores.to(log_probabilities.device).unsqueeze(1)).flatten()  # [n*V]
        best, places = totals.topk(min(self.spare, len(totals)))  # [spare]
        best, places = best.cpu(), places.cpu()
        check_finite(float(best[0]))
        parents, tokens = (places // vocab).tolist(), (places % vocab).tolist()
        answers = [[*self.running[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        ended = [self.ends(answer) for answer in answers]
        for rank, answer in enumerate(answers[: self.width]):
            if ended[rank]:
                self.finished.append((float(best[rank] / len(answer) ** self.length_penalty), answer))
        self.finished = sorted(self.finished, key=lambda scored: -scored[0])[: self.width]

        open_scores = best + torch.tensor(ended, dtype=best.dtype) * IMPOSSIBLE
        self.scores, chosen = open_scores.topk(self.width)
        self.running = [answers[i] for i in chosen.tolist()]
        self.done = all(ended) or self._settled()
        return [parents[i] for i in chosen.tolist()], [tokens[i] for i in chosen.tolist()]

    def best(self) -> tuple[float, list[int]]:
        """Score and ids of the best answer."""
        return self.finished[0] if self.finished else (float(self.scores[0]), self.running[0])

    def _settled(self) -> bool:
        if len(self.finished) < self.width:
            return False
        reachable = float(self.scores[0]) / len(self.running[0]) ** self.length_penalty
        return reachable <= self.finished[-1][0]
