"""ALBEF's fine-tunings against their formulas in float64: weighed answers with a follower, retrieval by picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from chiasm.errors import ConfigError, DataError
from chiasm.processing.labels import joined, written
from chiasm.train.objectives import momentum, objective
from chiasm.train.objectives.contrastive import picture_keys
from chiasm.train.objectives.matching import hard_negatives
from chiasm.types import Answers, Message, Sample, Text
from parity.test_albef import Theirs, inputs, made
from parity.test_albef_objective import ALPHA, RATE, batch

GIVEN = Answers(
    torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2], [1, 5, 9, 2], [1, 8, 2, 0]]),
    torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]).bool(),
    torch.tensor([0.7, 0.3, 1.0, 0.6]),
    torch.tensor([0, 0, 1, 2]),
)


def asked() -> Any:
    return replace(batch(), masked=None, masked_ids=None, answers=GIVEN)


def by_hand(theirs: Theirs, marks: tuple[str, ...]) -> torch.Tensor:
    """The sum over questions, answer by answer and word by word."""
    words, pictures = inputs()
    shares = {}
    for mark in marks:
        bert = f"text_encoder{mark}.bert."
        question = theirs.fuse(theirs.text(words, bert), words.mask, [theirs.image(pictures.pixels, mark)], bert)
        name = f"text_decoder{mark}."
        decoder = Theirs({n.replace(name, "text_decoder."): t for n, t in theirs.t.items() if n.startswith(name)})
        rows = GIVEN.owners
        shares[mark] = decoder.answer(GIVEN.ids, question[rows], words.mask[rows]).softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for a in range(4):
        for s in range(int(GIVEN.mask[a].sum()) - 1):
            p = shares[""][a, s]
            loss = -p[GIVEN.ids[a, s + 1]].log()
            if "_m" in shares:
                loss = (1 - ALPHA) * loss - ALPHA * (shares["_m"][a, s] * p.log()).sum()
            total = total + GIVEN.shares[a].double() * loss
    return total


def test_weighed_answers() -> None:
    model, theirs = made(contrast=None, answer_depth=2)
    loss = objective("albef_answers")(model.train(), asked())
    assert loss.weight == 3 and abs(float(loss.total.detach()) - float(by_hand(theirs, ("",)))) < 1e-4
    loss.total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_weighed_answers_taught_by_the_follower() -> None:
    """The copies move first, then give the soft targets: names and order of the authors."""
    model, theirs = made(copies=True, contrast=None, answer_depth=2, momentum={"rate": RATE})
    for name in list(theirs.t):
        copy = name.replace("visual_encoder", "visual_encoder_m")
        copy = copy.replace("text_encoder.", "text_encoder_m.").replace("text_decoder.", "text_decoder_m.")
        if copy != name and "_m." not in name:
            theirs.t[copy] = RATE * theirs.t[copy] + (1 - RATE) * theirs.t[name]
    loss = objective({"type": "albef_answers", "alpha": ALPHA})(model.train(), asked())
    wanted = by_hand(theirs, ("", "_m"))
    assert abs(float(loss.total.detach()) - float(wanted)) < 1e-4
    with torch.no_grad():
        objective("albef_answers")(model.eval(), asked())
    assert float(model.followed) == 1, "an evaluation moves nothing"
    seen = objective({"type": "albef_answers", "alpha": 0.4, "ramp": 4})
    assert seen._share(model) == pytest.approx(0.1)


def test_answers_of_people() -> None:
    class Letters:
        prefix, suffix, eos_id = [1], [2], 2

        def encode_pieces(self, pieces: Any) -> Any:
            return type("E", (), {"ids": [ord(c) for c in pieces[0].text]})

    question = [Message("user", (Text("what?"),))]
    found = written(Letters(), question, ["no", "yes", "no", "no"], "sample 'a'")
    assert found is not None and found.ids.tolist() == [[1, 110, 111, 2, 0], [1, 121, 101, 115, 2]]
    assert found.mask.sum(1).tolist() == [4, 5] and found.shares.tolist() == [0.75, 0.25]
    alone = written(Letters(), [*question, Message("assistant", (Text("no"),))], (), "sample 'b'")
    empty = torch.zeros(1, dtype=torch.long)
    one, two, none = (Sample(n, empty, empty.bool(), answers=a) for n, a in (("a", found), ("b", alone), ("c", None)))
    both = joined([two, one])
    assert both is not None and both.owners.tolist() == [0, 1, 1] and both.ids.shape == (3, 5)
    assert joined([none]) is None
    with pytest.raises(DataError, match=r"'c'.* no answer but 1 of 2"):
        joined([one, none])
    with pytest.raises(DataError, match="one of 2 answers is empty"):
        written(Letters(), question, ["no", " "], "sample 'a'")


def test_what_is_refused() -> None:
    model, _ = made(tasks={"match": True})
    with pytest.raises(ConfigError, match=r"set model\.answer_depth"):
        objective("albef_answers")(model, asked())
    model, _ = made(contrast=None, answer_depth=2)
    with pytest.raises(DataError, match=r"'a'.*set processing\.answers"):
        objective("albef_answers")(model, batch())


def test_retrieval_by_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of one picture, in the batch and in the queue, are all right, in equal shares, and no wrong pairs."""
    model, theirs = made(copies=True, momentum={"rate": RATE, "queue": 5}, tasks={"match": True})
    model.config = model.config.edit(**{"momentum.pictures": True})
    data = replace(batch(), masked=None, masked_ids=None)
    data.media["image"].inputs[2] = data.media["image"].inputs[0]
    keys = picture_keys(data)
    model.register_buffer("queue_keys", torch.tensor([0, int(keys[1]), 0, int(keys[0]), 0]))
    drawn: list[Any] = []
    monkeypatch.setattr(
        momentum, "hard_negatives", lambda a, b, never: (drawn.append(never), hard_negatives(a, b, never))[1]
    )
    loss = objective({"type": "albef", "alpha": ALPHA, "words": False})(model.train(), data)
    assert set(loss.parts) == {"contrast", "matching"}
    words, pixels = inputs()[0], data.media["image"].inputs
    for name in list(theirs.t):
        copy = name.replace("visual_encoder", "visual_encoder_m").replace("text_encoder", "text_encoder_m")
        copy = copy.replace("vision_proj", "vision_proj_m").replace("text_proj", "text_proj_m")
        if "_m." not in name and copy != name and copy in theirs.t:
            theirs.t[copy] = RATE * theirs.t[copy] + (1 - RATE) * theirs.t[name]

    def vectors(mark: str) -> list[torch.Tensor]:
        states = theirs.image(pixels, mark), theirs.text(words, f"text_encoder{mark}.bert.")
        return [
            F.normalize(theirs.linear(f"{n}_proj{mark}", s[:, 0]), dim=-1)
            for n, s in zip(("vision", "text"), states, strict=True)
        ]

    right = torch.tensor([[1, 0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0, 1, 0]]).double()
    own, taught = vectors(""), vectors("_m")
    wanted = 0.0
    for side, queue in ((0, "text_queue"), (1, "image_queue")):
        columns = torch.cat((taught[1 - side], theirs.t[queue].T))
        soft, logits = taught[side] @ columns.T / 0.2, own[side] @ columns.T / 0.2
        targets = ALPHA * soft.softmax(1) + (1 - ALPHA) * right / right.sum(1, keepdim=True)
        wanted = wanted - (targets * logits.log_softmax(1)).sum(1).mean() / 2
    assert abs(float(loss.parts["contrast"][0]) / 3 - float(wanted)) < 1e-5
    assert torch.equal(drawn[0], torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool())
    assert torch.equal(model.queue_keys[:3], keys)
    for _ in range(30):
        images, texts = hard_negatives(torch.zeros(3, 3), never=drawn[0])
        assert images.tolist()[0] == images.tolist()[2] == 1 and texts.tolist()[0] == texts.tolist()[2] == 1
