"""Ranking answers: log-probabilities of transformers' BLIP-2 and InstructBLIP, sums and means, one look a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import photo
from test_blip2_hf import QUESTIONS, inputs, make, talk

import chiasm
from chiasm.data.base import Example
from chiasm.errors import ConfigError, DataError
from chiasm.eval.runner import evaluate
from chiasm.processing.messages import parse

WORDS = ["a cat", "two dogs run across the field", "no", "yes"]


@pytest.fixture(scope="module", params=["opt", "t5", "instruct"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kit = make(request.param, tmp_path_factory.mktemp(request.param) / "folder")
    kit.vlm, kit.kind = chiasm.load(kit.folder), request.param
    return kit


@torch.no_grad()
def of_transformers(made: Any, question: str, picture: Any, answer: str) -> tuple[float, int]:
    """The sum over the answer and its end, from the logits of transformers' class."""
    given = inputs(made, question, picture)
    end = {"opt": "\n", "t5": "</s>", "instruct": "</s>"}[made.kind]
    lead = " " if made.kind == "instruct" else ""
    answer_ids = made.tokenizer(lead + answer + end, add_special_tokens=False).input_ids
    if made.written:
        start = made.model.config.text_config.decoder_start_token_id
        logits = made.model(**given, decoder_input_ids=torch.tensor([[start, *answer_ids[:-1]]])).logits[0]
    else:
        before = given["input_ids"].shape[1]
        ids = torch.cat((given["input_ids"], torch.tensor([answer_ids])), 1)
        more = given | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = made.model(**more).logits[0, before - 1 : -1]
    chances = logits.log_softmax(-1).gather(1, torch.tensor(answer_ids)[:, None])
    return float(chances.sum()), len(answer_ids)


def test_sums_and_means_are_those_of_transformers(made: Any):
    picture = photo(40, 30)
    expected = {word: of_transformers(made, QUESTIONS[0], picture, word) for word in WORDS}
    for by in ("sum", "mean"):
        found = made.vlm.rank(talk(QUESTIONS[0], picture), WORDS, by)
        assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)
        for ranked in found:
            total, count = expected[ranked.text]
            assert ranked.tokens == count and ranked.log_probability == pytest.approx(total, abs=2e-4)
            assert ranked.score == pytest.approx(total if by == "sum" else total / count, abs=2e-4)
    assert len({r.tokens for r in found}) > 1, "padding must matter"


def test_a_picture_is_looked_at_once_and_batches_change_nothing(made: Any):
    seen: list[int] = []
    hook = made.vlm.model.encoders["image"].register_forward_hook(lambda *a: seen.append(len(a[1][0])))
    try:
        whole = made.vlm.rank(talk(QUESTIONS[1], photo(40, 30)), WORDS)
        assert seen == [1]
        parts = made.vlm.rank(talk(QUESTIONS[1], photo(40, 30)), WORDS, batch_size=1)
        other = made.vlm.rank(talk(QUESTIONS[1], photo(20, 50)), WORDS)
    finally:
        hook.remove()
    assert seen == [1] * 6
    for a, b in zip(whole, parts, strict=True):
        assert a.text == b.text and a.score == pytest.approx(b.score, abs=1e-4)
    assert max(abs(a.score - b.score) for a, b in zip(whole, other, strict=True)) > 1e-3, "the picture must matter"


def test_earlier_answers_do_not_count(made: Any):
    picture = photo(40, 30)
    first = talk(QUESTIONS[0], picture)
    talked = [*first, {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "Sure?"}]
    found = {r.text: r.tokens for r in made.vlm.rank(talked, WORDS)}
    assert found == {r.text: r.tokens for r in made.vlm.rank(first, WORDS)}


def test_an_evaluation_ranks_where_it_is_told(made: Any):
    talks = [parse(talk(QUESTIONS[0], photo(40 + i, 30)), "t") for i in range(3)]
    tasks = ["closed", "open", "closed"]
    examples = [Example(f"e{i}", t, "s", task, ("yes",)) for i, (t, task) in enumerate(zip(talks, tasks, strict=True))]
    result = evaluate(made.vlm, examples, max_new_tokens=3, candidates={"closed": WORDS}, rank_by="mean")
    plain = evaluate(made.vlm, examples, max_new_tokens=3)
    for i in (0, 2):
        assert result.answers[i].prediction == made.vlm.rank(talks[i], WORDS, "mean")[0].text
    assert result.answers[1].prediction == plain.answers[1].prediction
    assert result.receipt["rank_by"] == "mean" and "rank_by" not in plain.receipt
    with pytest.raises(ConfigError, match="task 'close', which no example has; did you mean 'closed'"):
        evaluate(made.vlm, examples, candidates={"close": WORDS})


def test_what_is_refused(made: Any, tmp_path: Path):
    asked = talk(QUESTIONS[0], photo(40, 30))
    for candidates, told in (
        ([], "give at least one"),
        ("yes", "needs a list of candidate answers, got 'yes'"),
        (["yes", "no", "yes"], "candidate 'yes' stands twice in the list of 3"),
        (["yes", " "], "the answer is empty"),
    ):
        with pytest.raises(DataError, match=told):
            made.vlm.rank(asked, candidates)
    with pytest.raises(DataError, match="ends with 'assistant'; its last turn must be the user's"):
        made.vlm.rank(talk(QUESTIONS[0], photo(40, 30), "a cat"), WORDS)
    with pytest.raises(ConfigError, match="by 'sum' or 'mean', not by 'max'"):
        made.vlm.rank(asked, WORDS, "max")
