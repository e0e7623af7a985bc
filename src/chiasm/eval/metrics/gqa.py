"""GQA's numbers: accuracy, consistency, validity, plausibility and distribution, from its own files.

Paper: Hudson and Manning, GQA (arXiv:1902.09506). Reference: the data set's own ``eval.py``; predictions are read as
LLaVA's converter hands them to it (c121f04): without full stops at the end, in lower case. Grounding is left out: it
asks for one map of attention over the picture for each question.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from chiasm.errors import DataError
from chiasm.registry import register

COMMON = ("color", "material", "shape")  # what may be answered where a question asks what two things have in common
FREE_STEPS = ("exist", "query: name", "choose name")  # of a question's program; they are not counted as reasoning

Record = Mapping[str, Any]


@dataclass(frozen=True)
class GQAScores:
    """GQA's table over balanced questions. All are shares in [0, 1] but ``distribution``, where less is better.

    ``consistency`` is None where entailed questions were not asked, ``validity`` and ``plausibility`` where no choices
    were given. ``by`` has the accuracy by structural type, semantic type, words of the question and steps to reason.
    """

    accuracy: float
    binary: float
    open: float
    distribution: float
    consistency: float | None
    validity: float | None
    plausibility: float | None
    by: dict[str, dict[Any, float]]


@register("metric", "gqa")
def gqa(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction, read as ``gqa_word`` does, is one of the answers to the letter."""
    return float(gqa_word(prediction) in answers)


def gqa_word(text: str) -> str:
    """An answer as LLaVA hands it to GQA's script."""
    return text.rstrip(".").lower()


def gqa_scores(
    questions: Mapping[str, Record],
    said: Mapping[str, str],
    choices: Mapping[str, Record] | None = None,
    entailed: bool = False,
) -> GQAScores:
    """GQA's table from its files: questions by identifier, the answers given to them, and the choices file.

    ``entailed`` counts consistency, for which all questions must be given and answered, those outside the balanced set
    too: testdev_balanced alone cannot give it. Raises DataError where a question, an answer or its choices are missing.
    """
    balanced = {name: question for name, question in questions.items() if question["isBalanced"]}
    if not balanced:
        raise DataError(
            f"GQA's scores are over balanced questions, and none of {len(questions)} is; give a file that has them"
        )
    read = {name: gqa_word(text) for name, text in said.items()}
    for name in questions if entailed else balanced:
        _of(read, name, "answer", "answer every question, or leave it out of the questions")
    right = {name: float(read[name] == question["answer"]) for name, question in questions.items() if name in read}
    marks = [(question, right[name]) for name, question in balanced.items()]
    kinds = _means((_kind(question), mark) for question, mark in marks)
    held = _entailed(questions, balanced, right) if entailed else []
    return GQAScores(
        accuracy=fmean(mark for _, mark in marks),
        binary=kinds.get("binary", 0.0),
        open=kinds.get("open", 0.0),
        distribution=_distribution(balanced, read),
        consistency=(fmean(held) if held else 0.0) if entailed else None,
        validity=_allowed(balanced, read, choices, "valid") if choices is not None else None,
        plausibility=_allowed(balanced, read, choices, "plausible") if choices is not None else None,
        by={
            "structural": _means((question["types"]["structural"], mark) for question, mark in marks),
            "semantic": _means((question["types"]["semantic"], mark) for question, mark in marks),
            "words": _means((len(question["question"].split()), mark) for question, mark in marks),
            "steps": _means((_steps(question), mark) for question, mark in marks),
        },
    )


def _kind(question: Record) -> str:
    """ "open" where something is to be named, else "binary": yes or no, or one of two that the question names."""
    return "open" if question["types"]["structural"] == "query" else "binary"


def _steps(question: Record) -> int:
    program = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(not any(free in step for free in FREE_STEPS) for step in program)


def _entailed(
    questions: Mapping[str, Record], balanced: Mapping[str, Record], right: Mapping[str, float]
) -> list[float]:
    """For each question that was answered rightly: the accuracy on those others whose answers follow from it."""
    found = []
    for name, question in balanced.items():
        others = [other for other in question["entailed"] if other != name]
        if right[name] and others:
            remedy = f'"{name}" entails it; give all of GQA\'s questions, or leave out entailed=True'
            for other in others:
                _of(questions, other, "question", remedy)
            found.append(fmean(right[other] for other in others))
    return found


def _allowed(balanced: Mapping[str, Record], read: Mapping[str, str], choices: Mapping[str, Record], key: str) -> float:
    """The share of answers among a question's choices: of its kind (valid), or seen in the world (plausible)."""
    found = []
    for name, question in balanced.items():
        choice = _of(choices, name, "entry of the choices", "give the choices of the same split")
        found.append(read[name] in (COMMON if "Common" in question["types"]["detailed"] else choice[key]))
    return fmean(found)


def _distribution(balanced: Mapping[str, Record], read: Mapping[str, str]) -> float:
    """Chi-square of predicted against true answers in each global group, weighed by the group's size, over 100.

    As in the script an answer that is true nowhere in its group adds nothing; questions without a group do not count.
    """
    true: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for name, question in balanced.items():
        group = question["groups"]["global"]
        if group is not None:
            true[group][question["answer"]] += 1
            given[group][read[name]] += 1
    sizes = {group: counts.total() for group, counts in true.items()}
    square = {g: sum((given[g][word] - n) ** 2 / n for word, n in counts.items()) for g, counts in true.items()}
    return sum(square[g] * n for g, n in sizes.items()) / sum(sizes.values()) / 100 if sizes else 0.0


def _means(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    rows: dict[Any, list[float]] = defaultdict(list)
    for key, mark in pairs:
        rows[key].append(mark)
    return {key: fmean(rows[key]) for key in sorted(rows)}


def _of(table: Mapping[str, Any], name: str, what: str, remedy: str) -> Any:
    if name not in table:
        raise DataError(f'GQA: question "{name}" has no {what} among {len(table)}: {remedy}')
    return table[name]
