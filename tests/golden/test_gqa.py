"""GQA's table by its formulas, counted by hand and by scipy; error rates of speech against jiwer's stored numbers."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from chiasm import registry
from chiasm.errors import DataError
from chiasm.eval.metrics import speech
from chiasm.eval.metrics.gqa import gqa_scores


def question(answer: str, structural: str = "query", group: str | None = "color", **more: Any) -> dict[str, Any]:
    """A record as GQA's files have them."""
    program = [("select", "car (1)"), ("query", "color")]
    return {
        "question": "What color is the car?",
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": structural, "semantic": "attr", "detailed": more.pop("detailed", "color")},
        "groups": {"global": group, "local": None},
        "entailed": [],
        "semantic": [{"operation": o, "argument": a, "dependencies": []} for o, a in more.pop("program", program)],
    } | more


QUESTIONS = {
    "a": question("red", entailed=["a", "b", "u", "v"]),  # right; of b, u and v one is: 1/3
    "b": question("yes", "verify", None, entailed=["a"], question="Is it red ?"),  # wrong: what it entails is not asked
    "c": question("blue", entailed=["c"]),  # right, entails only itself: does not count
    "d": question("red"),  # wrong
    "e": question("left", "choose", "place", entailed=["a", "d"]),  # right: 1/2
    "f": question("color", "compare", None, detailed="twoCommon"),  # wrong, "shape" is among what may be common
    "u": question("no", "verify", None, isBalanced=False, entailed=["d"]),  # right, but not of the balanced ones
    "v": question("no", "logical", None, isBalanced=False),
}
SAID = {"a": "Red.", "b": "no", "c": "blue", "d": "green", "e": "left", "f": "shape", "u": "no", "v": "yes"}
CHOICES = {
    "a": {"valid": ["red", "blue"], "plausible": ["red"]},
    "b": {"valid": ["yes", "no"], "plausible": ["yes", "no"]},
    "c": {"valid": ["red", "blue"], "plausible": ["red"]},
    "d": {"valid": ["red", "green"], "plausible": ["red"]},
    "e": {"valid": ["right"], "plausible": ["right"]},
    "f": {"valid": [], "plausible": []},
}


def test_gqa_counted_by_hand():
    scores = gqa_scores(QUESTIONS, SAID, CHOICES, entailed=True)
    assert scores.accuracy == pytest.approx(3 / 6)
    assert scores.open == pytest.approx(2 / 3) and scores.binary == pytest.approx(1 / 3)
    assert scores.consistency == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert scores.validity == pytest.approx(5 / 6)  # not e
    assert scores.plausibility == pytest.approx(3 / 6)  # a, b and f
    # colours: red twice asked and once said, blue as often as asked, green asked nowhere; places: as asked
    assert scores.distribution == pytest.approx(((1 / 2 + 0) * 3 + 0 * 1) / 4 / 100)
    assert scores.by["structural"] == pytest.approx({"query": 2 / 3, "verify": 0, "choose": 1, "compare": 0})
    assert scores.by["semantic"] == {"attr": 0.5}
    assert scores.by["words"] == pytest.approx({4: 0, 5: 3 / 5})


def test_gqa_without_the_rest():
    balanced = {name: row for name, row in QUESTIONS.items() if row["isBalanced"]}
    scores = gqa_scores(balanced, {name: SAID[name] for name in balanced})
    assert (scores.consistency, scores.validity, scores.plausibility) == (None, None, None)
    assert scores.accuracy == gqa_scores(QUESTIONS, SAID).accuracy == pytest.approx(3 / 6)
    wrong = gqa_scores(QUESTIONS, dict.fromkeys(SAID, "nothing"), entailed=True)
    assert (wrong.accuracy, wrong.consistency) == (0, 0)
    alone = gqa_scores({"b": QUESTIONS["b"]}, {"b": "yes"})
    assert (alone.accuracy, alone.binary, alone.open, alone.distribution) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("program", "steps"),
    [
        ([("select", "car (1)"), ("query", "color")], 2),
        ([("select", "car (1)"), ("exist", "?")], 1),
        ([("select", "car (1)"), ("relate", "_,left of,s (2)"), ("query", "name")], 2),
        ([("select", "car (1)"), ("choose name", "car|bus")], 1),
        ([("select", "car (1)"), ("choose color", "red|blue"), ("verify rel", "man,on,o (3)")], 3),
    ],
)
def test_gqa_steps(program: list[tuple[str, str]], steps: int):
    assert gqa_scores({"q": question("red", program=program)}, {"q": "red"}).by["steps"] == {steps: 1}


def test_gqa_distribution_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    draw, words, rows, said = random.Random(0), ["red", "blue", "green", "tan"], {}, {}
    for i in range(600):
        rows[str(i)] = question(draw.choice(words), group=("color", "shade", "paint")[min(i % 5, 2)])
        said[str(i)] = draw.choice(words)
    total = 0.0
    for group in ("color", "shade", "paint"):
        names = [name for name, row in rows.items() if row["groups"]["global"] == group]
        given, true = Counter(said[name] for name in names), Counter(rows[name]["answer"] for name in names)
        total += stats.chisquare([given[word] for word in words], [true[word] for word in words])[0] * len(names)
    found = gqa_scores(rows, said).distribution
    assert found > 0.01 and found == pytest.approx(total / 600 / 100, rel=1e-12)


@pytest.mark.parametrize(
    ("questions", "said", "more", "message"),
    [
        ({"u": QUESTIONS["u"]}, SAID, {}, "none of 1 is"),
        (QUESTIONS, {"a": "red"}, {}, '"b" has no answer'),
        (QUESTIONS, {k: v for k, v in SAID.items() if k != "v"}, {"entailed": True}, '"v" has no answer'),
        ({"a": QUESTIONS["a"]}, SAID, {"entailed": True}, '"b" has no question.*"a" entails it'),
        ({"a": QUESTIONS["a"]}, SAID, {"choices": {}}, '"a" has no entry of the choices'),
    ],
)
def test_gqa_says_what_is_missing(questions: Any, said: Any, more: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        gqa_scores(questions, said, **more)


@pytest.mark.parametrize(
    ("said", "score"), [("Red.", 1), ("red...", 1), ("RED", 1), ("a red", 0), (" red", 0), ("", 0)]
)
def test_gqa_of_one_answer(said: str, score: float):
    assert registry.get("metric", "gqa")(said, ["red"]) == score


@pytest.mark.data
def test_error_rates(shared_data: Path):
    *cases, corpus = json.loads((shared_data / "golden_eval/misc/wer_golden.json").read_text(encoding="utf-8"))
    pairs = [(case["hypothesis"], case["reference"]) for case in cases]
    for pair, case in zip(pairs, cases, strict=True):
        assert speech.word_error_rate([pair]) == pytest.approx(case["wer"], abs=1e-12)
        assert speech.character_error_rate([pair]) == pytest.approx(case["cer"], abs=1e-12)
    assert speech.word_error_rate(pairs) == pytest.approx(corpus["wer"], abs=1e-12)
    assert speech.character_error_rate(pairs) == pytest.approx(corpus["cer"], abs=1e-12)


def test_word_accuracy():
    score = registry.get("metric", "word_accuracy")
    assert score("a x c", ["a b c d"]) == 0.5 and score("a x c", ["a b c d", "a x"]) == 0.5
    assert score("x y z", ["a"]) == 0  # three edits for one word
    assert (score("", [""]), score("x", [""]), score("", ["x"])) == (1, 0, 0)
    assert speech.word_error_rate([("x y z", "a")]) == 3
    with pytest.raises(DataError, match="1 texts have 0"):
        speech.word_error_rate([("x", " ")])
