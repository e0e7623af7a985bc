"""Answers to yes-or-no and multiple-choice questions, read as the benchmarks' own scripts read them.

References: RUCAIBox/POPE ``evaluate.py`` 3df3ba1; LLaVA's ``eval_science_qa.py`` c121f04; MME as in lmms-eval 75571cf.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from chiasm.registry import register


@register("metric", "pope")
def pope(prediction: str, answers: Sequence[str]) -> float:
    """1 where the first sentence means what an accepted answer ("yes" or "no") says: see ``pope_word``."""
    return float(pope_word(prediction) in {answer.strip().lower() for answer in answers})


@register("metric", "mme")
def mme(prediction: str, answers: Sequence[str]) -> float:
    """1 where the answer begins with yes or no as accepted; MME's points of a category are made by ``mme_points``."""
    return float(mme_word(prediction) in {answer.strip().lower() for answer in answers})


@register("metric", "scienceqa")
def scienceqa(prediction: str, answers: Sequence[str]) -> float:
    """1 where the letter of the answer, where it has one, is accepted."""
    return float(science_letter(prediction) in {answer.strip().upper() for answer in answers})


def pope_word(text: str) -> str:
    """ "no" where a word before the first full stop is exactly "No", "no" or "not", else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_word(text: str) -> str:
    """ "yes", "no" or "other": by the whole word, its letter, or the first four characters."""
    text = text.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def mme_points(scores: Sequence[tuple[str, float]]) -> float:
    """Points of a category, 0 to 200, from (picture, score of a question): accuracy, and pictures that are all right.

    Both are in per cent.
    """
    if not scores:
        return 0.0
    pictures: dict[str, list[float]] = {}
    for picture, score in scores:
        pictures.setdefault(picture, []).append(score)
    whole = sum(all(found) for found in pictures.values()) / len(pictures)
    return 100 * sum(score for _, score in scores) / len(scores) + 100 * whole


def science_letter(text: str) -> str | None:
    """The letter of "B", "B. ..." or of the only "The answer is B." in a text; None where it says none so."""
    if text in tuple("ABCDE"):
        return text
    if len(text) >= 3 and text[0].isupper() and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z])\.", text)
    return found[0] if len(found) == 1 else None


def consistency(scores: Sequence[tuple[str, float]]) -> float:
    """The share of groups all of whose answers are right, from (group, score): NLVR's second number.

    A group is a sentence: NLVR2's identifier without its third field, NLVR's before the last dash.
    """
    groups: dict[str, bool] = {}
    for group, score in scores:
        groups[group] = groups.get(group, True) and score == 1
    return sum(groups.values()) / len(groups) if groups else 0.0
