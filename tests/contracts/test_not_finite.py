"""A model whose numbers are NaN or infinite gives no answer: an error says so, on every way to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checkpoint_kit import build, make_tokenizer

import chiasm
from chiasm.errors import NumberError
from chiasm.infer.constraints import Choices
from chiasm.infer.slots import Slots

QUESTION = [{"role": "user", "content": "x"}]


@pytest.fixture(params=[float("nan"), float("inf")])
def broken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chiasm.VLM]:
    vlm = build(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    with torch.no_grad():
        vlm.model.lm.norm.weight.fill_(request.param)
    yield vlm


WAYS: dict[str, Callable[[chiasm.VLM], Any]] = {
    "greedy": lambda v: v.generate(QUESTION, max_new_tokens=3),
    "several": lambda v: v.generate([QUESTION, QUESTION], max_new_tokens=3),
    "streamed": lambda v: list(v.generate(QUESTION, max_new_tokens=3, stream=True)),
    "sampled": lambda v: v.generate(QUESTION, max_new_tokens=3, temperature=1.0, top_p=0.9, seed=0),
    "beams": lambda v: v.generate(QUESTION, max_new_tokens=3, num_beams=2),
    "without a cache": lambda v: v.generate(QUESTION, max_new_tokens=3, use_cache=False),
    "constrained": lambda v: v.generate(QUESTION, max_new_tokens=3, constraint=Choices(["a", "b"])),
    "ranked": lambda v: v.rank(QUESTION, ["a", "b"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_answer(broken: chiasm.VLM, way: str) -> None:
    with pytest.raises(NumberError, match="NaN"):
        WAYS[way](broken)


def test_numbers_that_break_on_the_way(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    """The prompt's scores are sound; those of the second token are not."""
    vlm = build(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    run, calls = Slots.run, []

    def failing(slots: Slots, runs: Any, best: int | None = None) -> torch.Tensor:
        calls.append(len(runs))
        return run(slots, runs, best) * (1.0 if len(calls) == 1 else float("nan"))

    monkeypatch.setattr(Slots, "run", failing)
    with pytest.raises(NumberError):
        vlm.generate(QUESTION, max_new_tokens=3, ignore_eos=True)
    assert calls == [1, 1]
