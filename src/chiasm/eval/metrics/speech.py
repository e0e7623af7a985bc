"""Error rates of what was heard: edits to get from the text said to the text heard, over the length of the text said.

As jiwer counts them by default: case and punctuation count, words are parted at blanks. The rate of a set is all its
edits over all its lengths, not the mean of rates; it can pass 1 where more was heard than said.
"""

from __future__ import annotations

from collections.abc import Sequence

from chiasm.errors import DataError
from chiasm.eval.metrics.text import edits
from chiasm.registry import register


def word_error_rate(pairs: Sequence[tuple[str, str]]) -> float:
    """WER of (text heard, text said) pairs. Raises DataError where nothing was said in all of them."""
    return _rate([(heard.split(), said.split()) for heard, said in pairs], "words")


def character_error_rate(pairs: Sequence[tuple[str, str]]) -> float:
    """CER of (text heard, text said) pairs, blanks inside counted. Raises DataError where nothing was said in all."""
    return _rate([(heard.strip(), said.strip()) for heard, said in pairs], "characters")


@register("metric", "word_accuracy")
def word_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 less the word error rate against the nearest answer, not below 0: here, as in all scores, more is better."""
    rates = [word_error_rate([(prediction, answer)]) for answer in answers if answer.split()]
    return max(0.0, 1 - min(rates)) if rates else float(not prediction.split())


def _rate(pairs: Sequence[tuple[Sequence[str], Sequence[str]]], unit: str) -> float:
    length = sum(len(said) for _, said in pairs)
    if not length:
        raise DataError(
            f"an error rate is over the {unit} that were said, and {len(pairs)} texts have 0; leave them out"
        )
    return sum(edits(heard, said) for heard, said in pairs) / length
