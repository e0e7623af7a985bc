"""Scores of captions as COCO counts them: BLEU, ROUGE-L and CIDEr-D over a whole set.

Papers: BLEU (Papineni et al., 2002); ROUGE (Lin, 2004); CIDEr (arXiv:1411.5726). Reference: pycocoevalcap 1.2, equal on
the golden captions. Texts are compared as words of the Penn treebank, in lower case and without punctuation; Stanford's
tokenizer is a Java program, so its rules for captions are written out here (``words``). METEOR needs its own Java
program and tables, and is left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from chiasm.registry import register

Pairs = Sequence[tuple[str, Sequence[str]]]  # a caption, and those it is compared with
Grams = Counter[tuple[str, ...]]

DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", "(", ")", "[", "]", "{", "}", '"'}
ORDERS = 4
_ABBREVIATION = r"(?:mr|mrs|ms|dr|jr|sr|st|ave|blvd|rd|vs|etc|co|inc|ltd|corp|[a-z](?:\.[a-z])+)\."
_NUMBER = r"(?:\d+ )?\d+/\d+|\d+(?:[.,:]\d+)+"  # 22 3/4 is one word, with a blank that does not break
_WORD = r"[^\W_]+(?:[-'&/@][^\W_]+)*"
_TOKEN = re.compile(rf"(?<!\w)(?:{_ABBREVIATION}|(?:{_NUMBER})(?!\w))|\.\.\.|--+|{_WORD}|\S")
_ENDING = re.compile(r"^(.+?)('s|'m|'d|'re|'ve|'ll|n't)$")
_SPLIT = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")}


class OverAll:
    """A metric whose score of one caption depends on the whole set: ``over`` gives a score for each."""

    def __init__(self, over: Callable[[Pairs], list[float]]):
        self.over = over

    def __call__(self, prediction: str, answers: Sequence[str]) -> float:
        """The score in a set of this one caption."""
        return self.over([(prediction, answers)])[0]


def words(text: str) -> list[str]:
    """The words of a caption, in lower case: clitics by themselves ("isn't" is "is n't"), punctuation left out."""
    found: list[str] = []
    for token in _TOKEN.findall(text.lower().replace("\u2019", "'")):
        token = token.replace(" ", "\xa0")
        ending = _ENDING.match(token)
        found += _SPLIT.get(token) or (ending.groups() if ending else (token,))
    return [token for token in found if token not in DROPPED]


def bleu(pairs: Pairs) -> list[float]:
    """BLEU-1 to BLEU-4 of a set: clipped matches of all captions by their n-grams, times the brevity penalty.

    The length of the nearest reference counts. As there, 1e-15 and 1e-9 keep a set without matches from 0 / 0.
    """
    hits, given, length, wanted = [0] * ORDERS, [0] * ORDERS, 0, 0
    for caption, references in pairs:
        said, others = _parted(caption), [_parted(reference) for reference in references]
        length += len(said)
        wanted += min((len(other) for other in others), key=lambda n: (abs(n - len(said)), n))
        for n in range(ORDERS):
            most: Grams = Counter()
            for other in others:
                most |= _grams(other, n + 1)
            hits[n] += sum((_grams(said, n + 1) & most).values())
            given[n] += max(0, len(said) - n)
    product, scores = 1.0, []
    for n in range(ORDERS):
        product *= (hits[n] + 1e-15) / (given[n] + 1e-9)
        scores.append(product ** (1 / (n + 1)))
    ratio = (length + 1e-15) / (wanted + 1e-9)
    return [score * math.exp(min(0.0, 1 - 1 / ratio)) for score in scores]


def rouge_l(pairs: Pairs) -> list[float]:
    """ROUGE-L of each caption: the best precision and the best recall of a longest common run of words, beta 1.2."""
    found = []
    for caption, references in pairs:
        said, others = words(caption), [words(reference) for reference in references]
        common = [_longest(said, other) for other in others]
        precision = max(n / len(said) if said else 0.0 for n in common)
        recall = max(n / len(other) if other else 0.0 for n, other in zip(common, others, strict=True))
        both = precision and recall
        found.append((1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if both else 0.0)
    return found


def cider(pairs: Pairs) -> list[float]:
    """CIDEr-D of each caption: likeness of n-grams weighed by how rare they are in the references of this set.

    Times 10; the score of a set is the mean. In a set of one picture no n-gram is rare, and all scores are 0.
    """
    others = [[_all_grams(_parted(reference)) for reference in references] for _, references in pairs]
    seen: Counter[tuple[str, ...]] = Counter()
    for references in others:
        seen.update({gram for reference in references for gram in reference})
    whole = math.log(len(pairs)) if pairs else 0.0
    found = []
    for (caption, _), references in zip(pairs, others, strict=True):
        said = _vector(_all_grams(_parted(caption)), seen, whole)
        scores = [_alike(said, _vector(reference, seen, whole)) for reference in references]
        found.append(10 * sum(scores) / len(scores))
    return found


register("metric", "cider")(OverAll(cider))
register("metric", "rouge_l")(OverAll(rouge_l))


Vector = tuple[list[dict[tuple[str, ...], float]], list[float], int]  # weights by order, their norms, the length


def _vector(grams: Grams, seen: Grams, whole: float) -> Vector:
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
    for gram, count in grams.items():
        weights[len(gram) - 1][gram] = count * (whole - math.log(max(1, seen[gram])))
    norms = [math.sqrt(sum(value**2 for value in part.values())) for part in weights]
    return weights, norms, sum(count for gram, count in grams.items() if len(gram) == 2)


def _alike(said: Vector, other: Vector) -> float:
    """The mean over orders of the clipped cosine, less where lengths (counted in pairs of words) differ."""
    total = 0.0
    for mine, theirs, a, b in zip(said[0], other[0], said[1], other[1], strict=True):
        if a and b:
            total += (
                sum(min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, value in mine.items()) / a / b
            )
    return total / ORDERS * math.exp(-((said[2] - other[2]) ** 2) / (2 * 6.0**2))


def _parted(text: str) -> list[str]:
    """Words as BLEU and CIDEr part them: at every blank, where ROUGE keeps those within a word."""
    return " ".join(words(text)).split()


def _all_grams(said: Sequence[str]) -> Grams:
    return sum((_grams(said, n) for n in range(1, ORDERS + 1)), Counter())


def _grams(said: Sequence[str], n: int) -> Grams:
    return Counter(tuple(said[i : i + n]) for i in range(len(said) - n + 1))


def _longest(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
