"""Metrics against the official evaluators: golden files where they are, formulas and published cases everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chiasm import registry
from chiasm.eval.metrics import captions, choices, vqa
from chiasm.eval.runner import Answer, _over


def golden(shared_data: Path, name: str) -> Any:
    return json.loads((shared_data / "golden_eval" / name).read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------------- golden files


@pytest.mark.data
def test_words_are_normalised_as_the_scripts_do(shared_data: Path):
    cases = golden(shared_data, "vqa/normalisation_cases.json")
    assert len(cases) == 68
    for case in cases:
        assert vqa.vqa_words(case["raw"].replace("\n", " ").replace("\t", " ").strip()) == case["vqa_final"]
        assert vqa.evalai_words(case["raw"]) == case["evalai_m4c_final"]


@pytest.mark.data
def test_textvqa_and_stvqa(shared_data: Path):
    table = golden(shared_data, "textvqa/textvqa_stvqa_anls.json")
    names = {"textvqa": vqa.textvqa, "stvqa_acc": vqa.stvqa, "stvqa_anls": vqa.anls}
    for name, metric in names.items():
        scores = [metric(item["pred_answer"], item["gt_answers"]) for item in table["items"]]
        assert scores == pytest.approx([row[name] for row in table["expected_per_item"]], abs=1e-12)
        assert sum(scores) / len(scores) == pytest.approx(table["expected_total"][name], abs=1e-12)


@pytest.mark.data
def test_anls_and_chartqa(shared_data: Path):
    table = golden(shared_data, "textvqa/anls_and_chartqa_relaxed.json")
    scores = [vqa.anls(item["prediction"], item["answers"]) for item in table["anls_items"]]
    assert scores == pytest.approx([item["stvqa_anls"] for item in table["anls_items"]], abs=1e-12)
    pairs = table["chartqa_relaxed_accuracy"]
    assert [bool(vqa.chartqa(p["prediction"], [p["target"]])) for p in pairs] == [p["correct"] for p in pairs]


@pytest.mark.data
def test_pope(shared_data: Path):
    folder = shared_data / "golden_eval" / "pope"
    said, asked = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines() if line]
        for name in ("answers.jsonl", "coco_pope_random.jsonl")
    )
    expected = golden(shared_data, "pope/expected.json")
    words = [choices.pope_word(answer["answer"]) for answer in said]
    assert [int(word == "yes") for word in words[:50]] == expected["parsed_first_50"]
    pairs = list(zip(words, [question["label"] for question in asked], strict=True))
    for key, pair in {"TP": ("yes", "yes"), "FP": ("yes", "no"), "TN": ("no", "no"), "FN": ("no", "yes")}.items():
        assert pairs.count(pair) == expected[key]
    scores = [choices.pope(answer["answer"], [q["label"]]) for answer, q in zip(said, asked, strict=True)]
    assert sum(scores) / len(scores) == pytest.approx(expected["acc"], abs=1e-12)


@pytest.mark.data
def test_mme(shared_data: Path):
    table = golden(shared_data, "misc/mme_golden.json")
    points: dict[str, list[tuple[str, float]]] = {}
    for item in table["items"]:
        assert choices.mme_word(item["prediction"]) == item["parsed"]
        score = choices.mme(item["prediction"], [item["answer"]])
        points.setdefault(item["category"], []).append((item["question_id"], score))
    assert {name: choices.mme_points(rows) for name, rows in points.items()} == pytest.approx(
        table["expected"]["per_category"]
    )


@pytest.mark.data
def test_scienceqa(shared_data: Path):
    table = golden(shared_data, "scienceqa/parse_golden.json")
    for case in table["extra_cases"]:
        assert (choices.science_letter(case["output"]) or "FAILED") == case["letter"], case
    for row in table["rows"]:
        letter = choices.science_letter(row["output_tail"])
        assert letter is None or "ABCDE".index(letter) == row["expected_index"]


@pytest.mark.data
def test_nlvr(shared_data: Path):
    folder = shared_data / "golden_eval" / "nlvr2"
    lines = [json.loads(line) for line in (folder / "dev_slim.jsonl").read_text(encoding="utf-8").splitlines()]
    said = dict(line.split(",") for line in (folder / "predictions.csv").read_text(encoding="utf-8").split())
    exact = registry.get("metric", "exact")
    scores = [(row["identifier"], exact(said[row["identifier"]], [row["label"]])) for row in lines]
    expected = dict(pair.split("=") for pair in golden(shared_data, "nlvr2/expected.json")["metrics"].split())
    assert sum(score for _, score in scores) / len(scores) == pytest.approx(float(expected["accuracy"]), abs=1e-12)

    def sentence(identifier: str) -> str:
        split, group, _, number = identifier.split("-")
        return f"{split}-{group}-{number}"

    found = choices.consistency([(sentence(name), score) for name, score in scores])
    assert found == pytest.approx(float(expected["consistency"]), abs=1e-12)


# ------------------------------------------------------------------------------------------------ cases by the formulas


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        ("red", ["red"] * 10, 1.0),
        ("Red", ["red"] * 10, 0.0),  # ten equal answers are compared to the letter
        ("Red.", ["red"] * 9 + ["blue"], 1.0),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),  # leaving one of the three out two are left
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6),
        ("red", ["red"] + ["blue"] * 9, 0.3),
        ("", ["red"] * 9 + [""], 0.3),
        ("the  two\tDogs", ["2 dogs"] * 5 + ["dogs"] * 5, 1.0),
        ("dont know", ["don't know"] * 4 + ["no"] * 6, 1.0),
        ("none", ["0"] * 6 + ["none"] * 4, 1.0),
        ("1,000", ["1000"] * 9 + ["1,000"], 1.0),
        ("2.5", ["2.5"] * 9 + ["25"], 1.0),
        ("café", ["café"] * 9 + ["cafe"], 1.0),
        ("A Red.", ["red"], 1.0),  # fewer than four: among them or not
        ("green", ["red", "blue"], 0.0),
    ],
)
def test_vqa_by_its_formula(said: str, answers: list[str], score: float):
    assert vqa.vqa(said, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("y'alldve", "y'alldve"),  # two apostrophes are missing: not in the table
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),  # the script's own slip
        ("Im Ive", "im ive"),  # its keys are capitals, its texts are not
        ("one and a half", "1 and half"),
        ("10.", "10"),
        ("3.14.", "3.14"),
        (".5", ".5"),
        ("a/b", "b"),  # a sign between letters leaves a blank, and an article
        ("a / b", "b"),
        ("(yes)", "yes"),
        ("x-ray", "x ray"),
        ("12:30", "12:30"),
        ("$5", "$5"),
    ],
)
def test_vqa_words(raw: str, expected: str):
    assert vqa.vqa_words(raw) == expected


def test_dots_beyond_the_flag_stay():
    assert vqa.vqa_words("x" + ".x" * 40) == "x" * 33 + ".x" * 8


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        ("", [""], 1.0),
        ("", ["x"], 0.0),
        ("x", [], 0.0),
        ("abcd", ["abxy"], 0.5),  # half is enough
        ("abc", ["axy"], 0.0),
        ("ÉCOLE", ["école"], 1.0),
        ("日本語", ["日本国"], 2 / 3),
        ("kitten", ["sitting", "kitten x"], 1 - 2 / 8),
    ],
)
def test_anls_by_its_formula(said: str, answers: list[str], score: float):
    assert vqa.anls(said, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        ("95", "100", 1.0),
        ("105", "100", 1.0),
        ("94.9", "100", 0.0),
        ("42%", "0.42", 1.0),
        ("42", "42%", 0.0),
        ("0.0", "0", 0.0),
        ("0", "0", 1.0),
        ("Blue", "blue", 1.0),
        ("-3", "3", 0.0),
        ("1,000", "1000", 0.0),
        ("inf", "inf", 0.0),
    ],
)
def test_chartqa_by_its_rule(said: str, answer: str, score: float):
    assert vqa.chartqa(said, [answer]) == score


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("NO", "yes"),
        ("None", "yes"),
        ("It isn't", "yes"),
        ("there is not", "no"),
        ("Yes. No", "yes"),
        ("", "yes"),
        ("no,", "no"),
    ],
)
def test_pope_words(text: str, word: str):
    assert choices.pope_word(text) == word


def test_mme_points_of_nothing_and_of_all():
    assert choices.mme_points([]) == 0
    assert choices.mme_points([("a", 1.0), ("a", 1.0), ("b", 1.0), ("b", 0.0)]) == 75 + 50
    assert choices.consistency([]) == 0 and choices.consistency([("s", 1.0), ("s", 0.0), ("t", 1.0)]) == 0.5


# ------------------------------------------------------------------------------------------------------------- captions


@pytest.mark.data
def test_captions(shared_data: Path):
    table, expected = (golden(shared_data, f"caption_metrics/coco80_{name}.json") for name in ("inputs", "expected"))
    for name in ("references", "candidates"):
        for picture, texts in table[name].items():
            split = table[f"ptb_tokenized_{name}"][picture]
            for text, wanted in zip(texts, split, strict=True) if isinstance(texts, list) else [(texts, split)]:
                wanted = wanted[0] if isinstance(wanted, list) else wanted
                assert " ".join(captions.words(text)) == wanted
    said = {k: v[0] if isinstance(v, list) else v for k, v in table["candidates"].items()}
    pairs = [(said[picture], table["references"][picture]) for picture in expected["image_ids"]]
    corpus = expected["corpus"]
    assert captions.bleu(pairs) == pytest.approx([corpus[f"Bleu_{n}"] for n in range(1, 5)], abs=1e-12)
    for name, metric in (("ROUGE_L", captions.rouge_l), ("CIDEr", captions.cider)):
        scores = metric(pairs)
        assert scores == pytest.approx(expected["per_image"][name], abs=1e-9)
        assert sum(scores) / len(scores) == pytest.approx(corpus[name], abs=1e-9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("A dog isn't running, it's sitting!", "a dog is n't running it 's sitting"),
        ("I can’t; we cannot", "i ca n't we can not"),
        ("Black-and-white TV (old)...", "black-and-white tv old"),
        ("Mr. Smith of the U.S. team", "mr. smith of the u.s. team"),
        ("3.5 miles at 12:30, 1,000 people", "3.5 miles at 12:30 1,000 people"),
        ("un café à côté", "un café à côté"),
        ("一只猫 坐着", "一只猫 坐着"),
        ("rock & roll", "rock & roll"),
    ],
)
def test_words_of_captions(text: str, expected: str):
    assert " ".join(captions.words(text)) == expected


def test_captions_at_the_edges():
    same = [("a cat on a mat", ["a cat on a mat"]), ("two dogs run fast", ["two dogs run fast"])]
    assert captions.rouge_l(same) == pytest.approx([1, 1])
    assert captions.cider(same) == pytest.approx([10, 10])
    assert captions.bleu(same) == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert captions.cider(same[:1]) == [0]  # one picture: no n-gram is rare
    empty = [("", ["a cat"]), ("a dog", ["a dog", ""])]
    assert captions.rouge_l(empty)[0] == 0 and captions.cider(empty)[0] == 0
    assert all(0 <= score <= 1 for score in captions.bleu(empty))
    assert captions.bleu([("", ["a cat"])]) == pytest.approx([0, 0, 0, 0])
    short = captions.bleu([("a cat", ["a cat sat"])])
    assert short[0] == pytest.approx(2.718281828 ** (1 - 3 / 2), rel=1e-6)  # the brevity penalty
    assert captions.bleu([("a a a a", ["a cat", "a a"])])[0] == pytest.approx(2 / 4, rel=1e-6)  # clipped
    p, r = 2 / 2, 2 / 4
    assert captions.rouge_l([("cat mat", ["a cat on mat"])])[0] == pytest.approx(2.44 * p * r / (r + 1.44 * p))


def test_a_metric_over_the_whole_set():
    cider = registry.get("metric", "cider")
    assert cider("a cat", ["a cat"]) == 0 and registry.get("metric", "rouge_l")("a cat", ["a cat"]) == 1
    rows = [("a cat on a mat", ("a cat on a mat",)), ("two dogs run fast", ("two dogs run fast",))]
    answers = [Answer(str(i), "captions", "", "", said, given, 0.0) for i, (said, given) in enumerate(rows)]
    other = Answer("2", "words", "", "", "a", ("a",), 1.0)
    scored = _over([answers[0], other, answers[1]], {"captions": cider, "words": registry.get("metric", "exact")})
    assert [answer.score for answer in scored] == pytest.approx([10, 1, 10])
    assert [answer.id for answer in scored] == ["0", "2", "1"]
