"""Mixtures of pictures, smoothed classes, and ALBEF's assignment of texts, by formula."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import chiasm
from chiasm.errors import ConfigError, DataError
from chiasm.train.objectives import objective
from chiasm.train.objectives.assignment import assigned
from chiasm.train.objectives.mixed import Mixing, mixed
from chiasm.types import Batch, Layout, MediaBatch

ROOT = Path(__file__).parents[2]
TOKENIZER = str(ROOT / "src" / "chiasm" / "weights" / "tiny-lm")


def batch(count: int = 5, texts: int = 0) -> Batch:
    inputs = torch.arange(1, count + 1).float().view(-1, 1, 1, 1).expand(count, 3, 12, 20).clone()
    layouts = [Layout(1, (3, 12, 20), (0, 0), (12, 20))] * count
    media = MediaBatch(inputs, layouts, torch.zeros(0, dtype=torch.long), [0] * count, list(range(count)))
    ids = torch.ones(count, texts, dtype=torch.long)
    names = [str(i) for i in range(count)]
    return Batch(ids, ids.clone(), ids.bool(), ids.clone(), {"image": media}, names, scores=torch.eye(count))


@dataclass
class Model:
    """Logits that depend on the pictures' means, so that what was shown can be read from them."""

    training: bool = True

    def classify(self, given: Batch) -> torch.Tensor:
        self.seen = given.media["image"].inputs
        return self.seen.mean((1, 2, 3))[:, None] * torch.linspace(-1, 1, 5)


def test_mixup_by_formula():
    torch.manual_seed(0)
    shares = []
    for _ in range(300):
        found, scores = mixed(batch(), torch.eye(5), Mixing(mixup=0.8))
        share = float(scores[0, 0])
        shares.append(share)
        expected = share * torch.eye(5) + (1 - share) * torch.eye(5).flip(0)
        torch.testing.assert_close(scores, expected)
        x = torch.arange(1, 6).float()
        torch.testing.assert_close(found.media["image"].inputs[:, 2, 5, 7], share * x + (1 - share) * x.flip(0))
    values = torch.tensor(shares)
    assert values.mean() == pytest.approx(0.5, abs=0.06)
    assert values.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.2), "of Beta(0.8, 0.8)"


def test_cutmix_by_formula():
    torch.manual_seed(0)
    areas = []
    for _ in range(300):
        found, scores = mixed(batch(), torch.eye(5), Mixing(cutmix=1.0))
        other = found.media["image"].inputs[0, 0] == 5
        area = float(other.float().mean())
        areas.append(area)
        rows, columns = other.any(1), other.any(0)
        assert torch.equal(other, rows[:, None] & columns[None]), "one rectangle"
        torch.testing.assert_close(scores[0], torch.tensor([1 - area, 0, 0, 0, area]))
        assert torch.equal(found.media["image"].inputs[2], batch().media["image"].inputs[2]), (
            "the middle is its own pair"
        )
    assert 0 <= min(areas) < 0.05 and 0.6 < max(areas) <= 1
    assert 0.25 < sum(areas) / 300 < 0.45  # boxes are cut at the border


def test_chances_and_refusals():
    torch.manual_seed(0)
    whole = batch()
    assert mixed(whole, torch.eye(5), Mixing(mixup=1, chance=0.0))[0] is whole
    kinds = []
    for _ in range(300):
        inputs = mixed(batch(), torch.eye(5), Mixing(mixup=0.8, cutmix=1, switch=0.3))[0].media["image"].inputs[0, 0]
        kinds.append(bool((inputs == inputs[0, 0]).all() and inputs[0, 0] not in (1, 5)))
    assert 0.6 < sum(kinds) / 300 < 0.8, "mixup where cutmix is not drawn"
    with pytest.raises(ConfigError, match="have texts"):
        mixed(batch(texts=3), torch.eye(5), Mixing(mixup=1))
    with pytest.raises(ConfigError, match="both 0"):
        Mixing()
    with pytest.raises(ConfigError, match="soft scores stand"):
        objective({"type": "classes", "scores": "soft", "smoothing": 0.1})


def test_smoothing_is_torchs_and_training_alone_is_softened():
    given, model = batch(), Model()
    loss = objective({"type": "classes", "smoothing": 0.1})(model, given)
    logits = model.classify(given)
    expected = F.cross_entropy(logits, torch.arange(5), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss.total, expected)
    model.training = False
    for settings in ({"smoothing": 0.1}, {"mixing": {"mixup": 0.8, "cutmix": 1.0}}):
        told = objective({"type": "classes", **settings})(model, given)
        torch.testing.assert_close(told.total, F.cross_entropy(logits, torch.arange(5), reduction="sum"))
        assert torch.equal(model.seen, given.media["image"].inputs)
    torch.manual_seed(3)
    model.training = True
    both = objective({"type": "classes", "smoothing": 0.1, "mixing": {"mixup": 0.8}})(model, given)
    share = float((5 - model.seen[0, 0, 0, 0]) / 4)
    target = torch.eye(5) * 0.9 + 0.02
    target = share * target + (1 - share) * target.flip(0)
    wanted = -(target * model.classify(replaced(given, model.seen)).log_softmax(1)).sum()
    torch.testing.assert_close(both.total, wanted)


def replaced(given: Batch, inputs: torch.Tensor) -> Batch:
    found = batch()
    found.media["image"].inputs = inputs
    return found


# ---------------------------------------------------------------------------------------------------------- assignment


def test_pictures_are_assigned_as_published():
    """A third neither; else the own one, first or second, beside one drawn by likeness."""
    torch.manual_seed(0)
    scores = torch.tensor([[9.0, 2.0, 0.0, -9.0], [2, 9, 0, 0], [0, 0, 9, 5], [0, 0, 5, 9]])
    counts, drawn = torch.zeros(3), torch.zeros(4, 4)
    for _ in range(1500):
        first, second, right = assigned(scores)
        counts += torch.bincount(right, minlength=3)
        for own, (a, b, answer) in enumerate(zip(first.tolist(), second.tolist(), right.tolist(), strict=True)):
            assert a != b and {0: a == own, 1: b == own, 2: own not in (a, b)}[answer]
            if answer != 2:
                drawn[own, b if answer == 0 else a] += 1
    torch.testing.assert_close(counts / counts.sum(), torch.tensor([1 / 3] * 3), atol=0.02, rtol=0)
    shares = (scores.softmax(1) + 1e-4).fill_diagonal_(0)
    torch.testing.assert_close(drawn / drawn.sum(1, True), shares / shares.sum(1, True), atol=0.04, rtol=0)


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    preset = chiasm.preset("albef-nlvr2", tiny=True, vocab=1024)
    wanted = {"model.assign": True, "model.contrast": 16, "model.tasks.classes": None, "processing.labels": []}
    vlm = chiasm.build(preset.edit(**(wanted | changes)), tokenizer=TOKENIZER)
    for p in vlm.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return vlm


def pairs(vlm: Any, count: int) -> Batch:
    from PIL import Image

    said = ["a red ring", "two blue stars", "a small cross", "a green circle", "one square"]
    pictures = [Image.new("RGB", (40, 40), (50 * i, 200 - 40 * i, 90)) for i in range(count)]
    messages = [[{"role": "user", "content": [{"type": "image", "image": x}, t]}] for x, t in zip(pictures, said)]
    return vlm.processor.batch(messages)


def test_the_loss_by_formula():
    vlm = model().eval()
    given = pairs(vlm, 5)
    torch.manual_seed(11)
    loss = objective("text_assignment")(vlm.model, given)
    body = vlm.model.body
    with torch.no_grad():
        states = body.vision(given.media["image"].inputs).x
        vectors = F.normalize(states[:, 0] @ body.image_proj.weight.T + body.image_proj.bias, dim=1)
        torch.manual_seed(11)
        first, second, right = assigned(vectors @ vectors.T / 0.07)
        mask = given.segment_ids != 0
        total = 0.0
        for i in range(5):  # one text at a time, its pictures picked by hand
            x = body.words(given.input_ids[i : i + 1])
            for block in body.text:
                x = block(x, mask[i : i + 1])
            for number, block in enumerate(body.fusion):
                x = block(x, mask[i : i + 1], states[[int((first, second)[number % 2][i])]])
            logits = x[0, 0] @ vlm.model.assign_scores.weight.T + vlm.model.assign_scores.bias
            total -= float(logits.log_softmax(0)[right[i]])
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-5) and loss.weight == 5
    loss.total.backward()
    assert body.image_proj.weight.grad is None and body.fusion[0].cross.q.weight.grad.abs().sum() > 0
    assert math.isfinite(float(loss.total.detach()))


def test_assignment_refuses():
    vlm = model()
    with pytest.raises(DataError, match="at least 3"):
        objective("text_assignment")(vlm.model, pairs(vlm, 2))
    with pytest.raises(ConfigError, match="assign: true"):
        objective("text_assignment")(chiasm.build(chiasm.preset("albef", tiny=True, vocab=1024)).model, pairs(vlm, 3))
    with pytest.raises(ConfigError, match="images: 2"):
        chiasm.preset("albef", tiny=True, vocab=1024).edit(**{"model.assign": True})
