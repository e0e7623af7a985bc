"""VQA's accuracy and TextVQA's, number for number as the official scripts count them.

References: GT-Vision-Lab/VQA ``vqaEval.py`` a013f00; LLaVA's ``m4c_evaluator.py`` c121f04 (TextVQA, ST-VQA, ANLS).
Their quirks are part of the numbers, so they are kept, and said where they stand. Equal to both on the golden cases.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from chiasm.eval.metrics.text import edits
from chiasm.registry import register

SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_COUNTED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED)}
ARTICLES = ("a", "an", "the")
DOTS = 32  # the scripts pass a flag where a count belongs: at most so many dots are taken away

# Contractions that are put right where their apostrophe, or one of two, is left out.
_ONE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
_TWO = """couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"""
CONTRACTIONS = {word.replace("'", ""): word for word in _ONE.split()} | {"somebody'd": "somebodyd"}  # sic
CONTRACTIONS |= {w[:i] + w[i + 1 :]: w for w in _TWO.split() for i, sign in enumerate(w) if sign == "'"}


@register("metric", "vqa")
def vqa(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with ten people: the mean, over leaving each out, of min(those of the others who said so / 3, 1).

    As in the official script, texts are normalised only where the people do not all say the same to the letter. With
    fewer than four answers, where that formula could never give 1: whether the answer is among them, normalised.
    """
    given, accepted = re.sub("[\n\t]", " ", prediction).strip(), list(answers)
    if len(accepted) < 4 or len(set(accepted)) > 1:
        given, accepted = vqa_words(given), [vqa_words(answer) for answer in accepted]
    return _agreement(given, accepted) if len(accepted) >= 4 else float(given in accepted)


@register("metric", "textvqa")
def textvqa(prediction: str, answers: Sequence[str]) -> float:
    """The same agreement as TextVQA's script counts it: always normalised, and "'s" and commas as EvalAI has them."""
    given, accepted = evalai_words(prediction), [evalai_words(answer) for answer in answers]
    return _agreement(given, accepted) if len(accepted) >= 4 else float(given in accepted)


@register("metric", "stvqa")
def stvqa(prediction: str, answers: Sequence[str]) -> float:
    """1 where the answer is one of the accepted, both normalised as EvalAI does."""
    return float(evalai_words(prediction) in {evalai_words(answer) for answer in answers})


@register("metric", "anls")
def anls(prediction: str, answers: Sequence[str]) -> float:
    """The best of ``1 - edits / longer length`` over the answers, in lower case; below 0.5 it counts as 0 (ST-VQA)."""
    found = [_likeness(prediction.lower().strip(), answer.lower().strip()) for answer in answers]
    return max((score if score >= 0.5 else 0.0 for score in found), default=0.0)


@register("metric", "chartqa")
def chartqa(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy: a number within 5 % of an accepted one ("42%" is 0.42), else the same text.

    As in the official script a target of 0, and a number that is written with commas, must be matched as text.
    """
    return max((float(_relaxed(prediction, answer)) for answer in answers), default=0.0)


def vqa_words(text: str) -> str:
    """A text as the VQA script compares it."""
    return _words(_unsigned(text, r"(\d)(,)(\d)"))


def evalai_words(text: str) -> str:
    """A text as EvalAI and TextVQA's script compare it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_unsigned(re.sub("[\n\t]", " ", text).strip(), r"(?<=\d)(,)+(?=\d)"))


def _agreement(given: str, accepted: Sequence[str]) -> float:
    same = [answer == given for answer in accepted]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def _unsigned(text: str, comma: str) -> str:
    """Without signs: dropped where one stands beside a blank or a number has a comma, a blank in their place else."""
    numbered, found = re.search(comma, text), text
    for sign in SIGNS:
        beside = f"{sign} " in text or f" {sign}" in text or numbered
        found = found.replace(sign, "" if beside else " ")
    return re.sub(r"\.(?!\d)", "", found, count=DOTS)


def _words(text: str) -> str:
    """Lower case, numbers from zero to ten as digits, no articles, apostrophes put right."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _likeness(a: str, b: str) -> float:
    """1 where two texts are equal, 0 where nothing of the longer one is left."""
    return 1 - edits(a, b) / max(len(a), len(b)) if a or b else 1.0


def _relaxed(prediction: str, answer: str) -> bool:
    given, wanted = _number(prediction), _number(answer)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= 0.05
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
