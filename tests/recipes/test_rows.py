"""The method that trains some rows of a language model's tables: the others never move, whatever the optimizer does."""

from __future__ import annotations

import pytest
import torch

from chiasm.compose import build_model
from chiasm.errors import ConfigError
from chiasm.presets import preset
from chiasm.train.methods.base import installed, replace
from chiasm.train.optim import Masters, optimizer
from chiasm.train.plan import apply, prepare, resolve
from chiasm.types import Batch

FIRST, COUNT = 504, 8
TABLE = {"*": "freeze", **dict.fromkeys(("lm.embedding", "lm.lm_head"), f"rows(first={FIRST})")}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(preset("minigpt-5", tiny=True).model)


def batch() -> Batch:
    ids = torch.tensor([[3, 504, 505, 7, 511], [9, 10, 504, 1, 2]])
    ones = torch.ones_like(ids)
    return Batch(ids, torch.arange(5).expand(2, 5), ones, ones.bool(), {}, ["a", "b"])


def loss(model) -> torch.Tensor:
    output = model(batch())
    return torch.nn.functional.cross_entropy(output.logits, output.targets)


def test_only_the_rows_learn_under_decay(model):
    """Weight decay shrinks rows behind a masked gradient (M5), and a mask may be lost (F4): here neither can be."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits = model(batch(), logits="all").logits
    prepare(model, TABLE)
    plan = resolve(model, TABLE, 0.1)
    apply(model, plan)
    assert plan.trainable == 2 * COUNT * model.lm.dim
    torch.testing.assert_close(model(batch(), logits="all").logits, logits, atol=0, rtol=0)
    stepper = optimizer(Masters(model, plan, None), plan, "adamw", 0.5, (0.9, 0.999))
    for group in stepper.param_groups:
        group["lr"] = 0.1
    first = loss(model)
    first.backward()
    stepper.step()
    assert loss(model) < first
    wanted = model(batch(), logits="all").logits
    for name, module in list(installed(model)):
        replace(model, name, module.merged())
    assert not list(installed(model))
    torch.testing.assert_close(model(batch(), logits="all").logits, wanted, atol=1e-6, rtol=1e-6)
    for name, p in model.named_parameters():
        rows = (p != before[name]).flatten(1).any(1).nonzero().flatten().tolist() if p.ndim > 1 else []
        assert rows == ([*range(FIRST, FIRST + COUNT)] if name in ("lm.embedding.weight", "lm.lm_head.weight") else [])
        assert p.ndim > 1 or torch.equal(p, before[name])


def test_gradients_are_those_of_the_whole_tables(model):
    whole = torch.autograd.grad(loss(model), [model.lm.embedding.weight, model.lm.lm_head.weight])
    prepare(model, TABLE)
    own = torch.autograd.grad(loss(model), [model.lm.embedding.rows, model.lm.lm_head.rows])
    for mine, table in zip(own, whole, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, table[FIRST : FIRST + COUNT], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("action", "part", "words"),
    [
        ("rows(first=512)", "lm.embedding", "asks for rows to 513 of lm.embedding, which has 512"),
        ("rows(first=500, count=13)", "lm.lm_head", "asks for rows to 513"),
        ("rows(first=1)", "lm.norm", "finds 0 tables"),
    ],
)
def test_what_is_refused(model, action: str, part: str, words: str):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        resolve(model, {"*": "freeze", part: action}, 0.1)


def test_shared_tables_are_refused():
    tied = preset("minigpt-5", tiny=True).edit(**{"model.lm.tied": True}).model
    with pytest.raises(ConfigError, match="the head of this language model is its embedding"):
        resolve(build_model(tied), {"*": "freeze", "lm.embedding": "rows(first=504)"}, 0.1)
