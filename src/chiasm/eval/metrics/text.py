"""Scores of a short written answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from chiasm.registry import register


@register("metric", "exact")
def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 where the normalised prediction equals any of the normalised answers."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


@register("metric", "word_f1")
def word_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best harmonic mean of word precision and recall over the answers: a rough score for captions."""
    return max((_f1(normalise(prediction).split(), normalise(a).split()) for a in answers), default=0.0)


def normalise(text: str) -> str:
    """Lower case, one space between words, no punctuation at either end of a word."""
    return " ".join(w for w in (word.strip(".,;:!?\"'()[]") for word in text.lower().split()) if w)


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """The fewest insertions, deletions and exchanges that make ``b`` of ``a``: characters of texts, words of lists."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _f1(a: list[str], b: list[str]) -> float:
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else float(a == b)
