"""ALBEF's pre-training losses against their formulas in float64, in the order of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.train.objectives import momentum, objective
from chiasm.train.objectives.matching import hard_negatives
from chiasm.types import Batch, Layout, MediaBatch
from parity.formulas import open_to
from parity.test_albef import PATCH, SIDE, Theirs, inputs, made

QUEUE, RATE, ALPHA = 7, 0.9, 0.3


def batch() -> Batch:
    words, pictures = inputs()
    size = SIDE * PATCH
    media = MediaBatch(
        pictures.pixels, [Layout(1, (3, size, size))] * 3, torch.zeros(0, dtype=torch.long), [0] * 3, [0, 1, 2]
    )
    segments = words.mask.long()
    found = Batch(words.ids, segments.cumsum(1) - 1, segments, words.mask & False, {"image": media}, ["a", "b", "c"])
    found.masked = torch.zeros_like(words.mask)
    found.masked[[0, 0, 1, 2], [1, 3, 2, 4]] = True
    found.masked_ids = words.ids.masked_fill(found.masked, 3)
    return found


def cosine_side(x: Tensor, taught: Tensor, columns: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scores, soft = x @ columns.T / temperature, taught @ columns.T / temperature
    targets = ALPHA * soft.softmax(1) + (1 - ALPHA) * torch.eye(3, columns.shape[0], dtype=torch.float64)
    return -(targets * scores.log_softmax(1)).sum(1).mean(), scores[:, :3]


def expected(theirs: Theirs, data: Batch, negatives: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    words, pictures = inputs()
    pixels, mask = pictures.pixels, words.mask
    for name in list(theirs.t):  # the copies move before they are used
        copy = name.replace("visual_encoder", "visual_encoder_m").replace("text_encoder", "text_encoder_m")
        copy = copy.replace("vision_proj", "vision_proj_m").replace("text_proj", "text_proj_m")
        if "_m." not in name and copy != name and copy in theirs.t:
            theirs.t[copy] = RATE * theirs.t[copy] + (1 - RATE) * theirs.t[name]
    image, text = theirs.image(pixels), theirs.text(words)
    image_m, text_m = theirs.image(pixels, "_m"), theirs.text(words, "text_encoder_m.bert.")
    x, y = (F.normalize(theirs.linear(p, s[:, 0]), dim=-1) for p, s in (("vision_proj", image), ("text_proj", text)))
    x_m, y_m = (
        F.normalize(theirs.linear(p, s[:, 0]), dim=-1) for p, s in (("vision_proj_m", image_m), ("text_proj_m", text_m))
    )
    one, _ = cosine_side(x, x_m, torch.cat((y_m, theirs.t["text_queue"].T)), 0.2)
    two, _ = cosine_side(y, y_m, torch.cat((x_m, theirs.t["image_queue"].T)), 0.2)
    wrong_image, wrong_text = negatives
    rows = [(i, i, 1) for i in range(3)] + [(i, int(wrong_image[i]), 0) for i in range(3)]
    rows += [(int(wrong_text[i]), i, 0) for i in range(3)]
    parts = []
    for t, i, right in rows:
        fused = theirs.fuse(text[t : t + 1], mask[t : t + 1], [image[i : i + 1]])
        parts.append(-theirs.linear("itm_head", fused[:, 0]).log_softmax(-1)[0, right])

    def shares(mark: str, picture: Tensor) -> Tensor:
        bert = f"text_encoder{mark}.bert."
        x = theirs.words(bert, data.masked_ids)
        for k in range(2):
            x = theirs.layer(f"{bert}encoder.layer.{k}", x, open_to(mask))
        x = theirs.fuse(x, mask, [picture], bert)
        head = f"text_encoder{mark}.cls.predictions."
        return theirs.scores(head, bert + "embeddings.word_embeddings.weight", x)[data.masked].softmax(-1)

    own, taught = shares("", image), shares("_m", image_m)
    right = -own.log()[torch.arange(4), data.input_ids[data.masked]].mean()
    soft = -(taught * own.log()).sum(1).mean()
    return {
        "contrast": (one + two) / 2,
        "matching": torch.stack(parts).mean(),
        "words": (1 - ALPHA) * right + ALPHA * soft,
        "x_m": x_m,
        "y_m": y_m,
    }


def model_and_formulas() -> tuple[Any, Theirs]:
    return made(copies=True, momentum={"rate": RATE, "queue": QUEUE}, tasks={"words": True, "match": True})


def test_the_three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, theirs = model_and_formulas()
    data, negatives = batch(), (torch.tensor([1, 2, 0]), torch.tensor([2, 0, 0]))
    monkeypatch.setattr(momentum, "hard_negatives", lambda *scores: negatives)
    wanted = expected(theirs, data, negatives)
    model.train()
    loss = objective({"type": "albef", "alpha": ALPHA})(model, data)
    for name in ("contrast", "matching", "words"):
        found = float(loss.parts[name][0]) / 3
        assert abs(found - float(wanted[name])) < 1e-5, (name, found, float(wanted[name]))
    total = 3 * sum(float(wanted[name]) for name in ("contrast", "matching", "words"))
    assert loss.weight == 3 and abs(float(loss.total.detach()) - total) < 1e-4
    assert torch.allclose(model.image_queue[:3].double(), wanted["x_m"], atol=1e-5) and int(model.queue_place) == 3
    assert torch.allclose(model.text_queue[:3].double(), wanted["y_m"], atol=1e-5)
    loss.total.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_an_evaluation_changes_nothing() -> None:
    model, _ = model_and_formulas()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        objective("albef")(model.eval(), batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_alpha_grows_and_the_temperature_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = momentum.losses
    monkeypatch.setattr(
        momentum, "losses", lambda m, b, alpha, *rest: (seen.append(alpha), real(m, b, alpha, *rest))[1]
    )
    model, _ = model_and_formulas()
    with torch.no_grad():
        model.temperature.fill_(0.9)
    loss = objective({"type": "albef", "alpha": 0.4, "ramp": 2})
    for _ in range(4):
        loss(model.train(), batch())
    assert seen == [0.0, 0.2, 0.4, 0.4] and float(model.temperature.detach()) == 0.5


def test_hard_negatives_follow_the_scores() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([[9.0, 5.0, 0.0], [0.0, 9.0, 5.0], [5.0, 0.0, 9.0]])
    found = [hard_negatives(scores) for _ in range(60)]
    images, texts = (torch.stack(side) for side in zip(*found, strict=True))
    assert not (images == torch.arange(3)).any() and not (texts == torch.arange(3)).any()
    assert ((texts == torch.tensor([1, 2, 0])).float().mean() > 0.9) and (
        images == torch.tensor([2, 0, 1])
    ).float().mean() > 0.9
    flat = torch.zeros(3, 3)
    flat[0, 0] = 200.0  # every wrong share rounds to nothing: still a wrong one is drawn
    assert int(hard_negatives(flat)[1][0]) in (1, 2)


def test_a_model_without_a_follower_is_refused() -> None:
    model, _ = made(tasks={"words": True, "match": True})
    with pytest.raises(ConfigError, match="trains an albef model with momentum"):
        objective("albef")(model, batch())
    model, _ = model_and_formulas()
    bare = batch()
    bare.masked = bare.masked_ids = None
    with pytest.raises(ConfigError, match=r"set processing\.masking"):
        objective("albef")(model, bare)
