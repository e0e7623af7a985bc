"""Held-out evaluation and the report: batch size does not matter, shuffled pictures do, nothing is left unescaped."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console
from tiny_run import model_config, renderer, source, tiny_vlm, tokenizer_folder, write_pictures

import chiasm
from chiasm import registry
from chiasm.data.base import Example
from chiasm.data.mixture import Entry, HeldOut, Mixture
from chiasm.errors import ConfigError, DataError
from chiasm.eval import compare, evaluate, evaluate_recipe, held_out
from chiasm.eval.runner import Answer, Comparison, Result
from chiasm.eval.write import choose, with_queries
from chiasm.report.curve import Line, curve
from chiasm.report.run import picture_urls
from chiasm.train import Recipe, train
from chiasm.train.loop import StageRun
from chiasm.train.recipe import Stage
from chiasm.types import Message, Text

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A model that has learned the colours of twelve pictures by heart, and those pictures."""
    folder = tmp_path_factory.mktemp("learned")
    write_pictures(folder, 12)
    vlm = tiny_vlm(folder)
    stage = Stage(name="s", plan="end_to_end", steps=200, batch_size=12, lr=4e-3, warmup_ratio=0.05)
    mixture = Mixture({"colors": Entry(source=source(folder))})
    StageRun(vlm.model, renderer(vlm), stage, mixture, folder / "run", None, QUIET).fit()
    examples, metrics = held_out({"colors": HeldOut(source=source(folder))})
    return vlm, [e for e in examples if len(e.messages) == 2], metrics


def test_own_pictures_against_shuffled_ones(learned):
    vlm, examples, metrics = learned
    found = compare(vlm, examples, metrics=metrics, max_new_tokens=20)
    assert found.true.score == 1.0 and found.shuffled.score == 0.0
    assert len(found.shuffled.answers) == len(examples) == 9
    assert found.rows() == [("colors", 9, 1.0, 0.0), ("all", 9, 1.0, 0.0)]
    assert found.true.over(["colors"]) == 1.0
    with pytest.raises(DataError, match="0 of 9 answers belong to the tasks nothing"):
        found.true.over(["nothing"])


def test_batch_size_changes_nothing(learned):
    vlm, examples, _ = learned
    runs = [evaluate(vlm, examples, batch_size=n, max_new_tokens=20).answers for n in (1, 4, 9)]
    assert runs[0] == runs[1] == runs[2]
    assert [a.id for a in runs[0]] == [e.id for e in examples]


def test_receipt_says_how(learned):
    vlm, examples, _ = learned
    receipt = evaluate(vlm, examples[:2], max_new_tokens=4, shuffle_images=True, seed=3).receipt
    assert receipt["shuffled_images"] and receipt["seed"] == 3 and receipt["max_new_tokens"] == 4


def test_an_example_without_question_or_answer_is_refused(learned):
    vlm, _, _ = learned
    asked = Message("user", (Text("What?"),))
    with pytest.raises(DataError, match="'a': has 0 accepted answers"):
        evaluate(vlm, [Example("a", (asked,))])
    with pytest.raises(DataError, match="'b': has no question"):
        evaluate(vlm, [Example("b", (Message("assistant", (Text("That."),)),))])


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "score"),
    [
        ("exact", " Red. ", ["red"], 1.0),
        ("exact", "dark red", ["red"], 0.0),
        ("exact", "two", ["2", "two"], 1.0),
        ("vqa", "the red door", ["red door"], 1.0),
        ("vqa", "red", ["red"] * 2 + ["blue"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("vqa", "red", ["red"] * 10, 1.0),
        ("word_f1", "a red house", ["a red barn", "sea"], 2 / 3),
        ("word_f1", "sky", ["a red barn"], 0.0),
    ],
)
def test_metrics(metric, prediction, answers, score):
    assert registry.get("metric", metric)(prediction, answers) == pytest.approx(score)


class Page(HTMLParser):
    """Collects addresses and tags; complains about what does not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action")]
        if tag not in ("meta", "img", "br", "line", "circle", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "circle", "path"):
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two stages through ``train``, with an evil question among the held-out ones."""
    folder = tmp_path_factory.mktemp("finished")
    records = json.loads(write_pictures(folder).read_text())
    for record in records:
        record["conversations"][0]["value"] = '<image>\n<script>alert("x")</script>'
    (folder / "held.json").write_text(json.dumps(records))
    values = {
        "name": "A <b>bold</b> run",
        "model": {"config": model_config(), "tokenizer": str(tokenizer_folder(folder / "tokenizer"))},
        "data": {"colors": {"source": source(folder)}},
        "held_out": {"evil": {"source": source(folder) | {"file": str(folder / "held.json")}}},
        "stages": [
            {
                "name": "align",
                "plan": "align",
                "steps": 6,
                "batch_size": 2,
                "lr": 1e-3,
                "eval_every": 2,
                "log_every": 1,
            },
            {
                "name": "instruct",
                "steps": 6,
                "batch_size": 2,
                "lr": 1e-3,
                "eval_every": 3,
                "log_every": 1,
                "save_every": 2,
            },
        ],
        "eval": {"max_new_tokens": 4},
        "out": str(folder / "run"),
    }
    recipe = Recipe.parse(values)
    return folder, recipe, train(recipe, console=QUIET)


def test_what_a_run_leaves(finished):
    folder, _, vlm = finished
    out = folder / "run"
    log = [json.loads(line) for line in (out / "align" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "lr", "grad_norm", "tokens", "samples_per_s"} <= set(log[0])
    assert [r["step"] for r in log if "held_out/loss" in r] == [2, 4, 6]
    assert all(r["held_out/loss_shuffled"] > 0 for r in log if "held_out/loss" in r)
    results = json.loads((out / "results.json").read_text())
    assert results["table"][0]["n"] == 8 and results["receipt"]["recipe"]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert {a["pictures"] for a in answers} == {"true", "shuffled"} and len(answers) == 16
    assert not (out / "instruct" / "checkpoints").exists()
    again = chiasm.load(out / "model")
    for (name, a), (_, b) in zip(vlm.named_parameters(), again.named_parameters(), strict=True):
        assert a.equal(b), name
    assert len(again.config.provenance.history) >= 2


def test_examples_of_one_id_are_shown_with_their_own_pictures(finished):
    """As in LLaVA's files, where an id is that of the picture: and two sources may use the same ids."""
    folder, _, vlm = finished
    data = Mixture({name: Entry(source=source(folder)) for name in ("one", "two")})
    examples = [replace(data[ref], id="same") for ref in data.first(3)]
    answers = [Answer("same", e.source, "", f"q{i}", f"a{i}", ("red",), 1.0) for i, e in enumerate(examples)]
    others = [replace(a, prediction=f"b{i}") for i, a in enumerate(answers)]
    result = Comparison(Result(answers, {}), Result(others[:2] + others[3:], {}))
    chosen = choose(result, examples, 99)
    assert {card.prediction: example for card, example in chosen} == {f"a{i}": e for i, e in enumerate(examples)}
    assert {c.prediction: c.shuffled for c, _ in chosen} == {
        **{"a0": "b0", "a1": "b1", "a2": None},
        **{f"a{i}": f"b{i}" for i in (3, 4, 5)},
    }
    assert all(card.pictures == picture_urls(example) for card, example in chosen)
    assert [card.question for card in with_queries(vlm, chosen)] == [card.question for card, _ in chosen]


def test_report_is_one_page_and_escapes(finished):
    folder, _, _ = finished
    path = folder / "run" / "report.html"
    html = path.read_text()
    page = Page()
    page.feed(html)
    assert not page.open and "script" not in page.tags
    assert page.addresses and all(a.startswith("data:image/") for a in page.addresses)
    assert "A &lt;b&gt;bold&lt;/b&gt; run" in html and "&lt;script&gt;" in html
    assert html.count("<svg") == 2 and path.stat().st_size < 3_000_000
    assert not re.search(r"https?://", html)


def test_finished_stages_are_not_run_again(finished):
    folder, recipe, vlm = finished
    stamp = (folder / "run" / "align" / "log.jsonl").stat().st_mtime_ns
    again = train(recipe, resume=True, console=QUIET)
    assert (folder / "run" / "align" / "log.jsonl").stat().st_mtime_ns == stamp
    for (name, a), (_, b) in zip(vlm.named_parameters(), again.named_parameters(), strict=True):
        assert a.equal(b), name


def test_eval_of_a_saved_model(finished, tmp_path):
    folder, recipe, _ = finished
    vlm = chiasm.load(folder / "run" / "model")
    found = evaluate_recipe(vlm, recipe, tmp_path, console=QUIET, limit=3, shuffled=False)
    assert len(found.true.answers) == 3 and found.shuffled is None
    first = json.loads((folder / "run" / "answers.jsonl").read_text().splitlines()[0])
    assert first["prediction"] == found.true.answers[0].prediction
    assert (tmp_path / "report.html").is_file()
    with pytest.raises(ConfigError, match="0 held-out sources"):
        evaluate_recipe(vlm, recipe.edit(held_out={}), tmp_path, console=QUIET)


def test_curve_places_points():
    svg = curve([Line("a", "held", [(0, 0.0), (10, 4.0)])], "loss")
    assert 'd="M52.0 228.0 L708.0 12.0"' in svg
    assert curve([], "nothing") == ""
