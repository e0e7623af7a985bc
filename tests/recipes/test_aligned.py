"""The alignment term against its formula in float64, and where it has no part."""

from __future__ import annotations

import pytest
import torch
from tiny_run import renderer, tiny_vlm, write_mixed

from chiasm.train.objectives import objective
from chiasm.train.objectives.next_token import next_token

SHARE = 0.7


@pytest.fixture
def parts(tmp_path):
    vlm, mixture = tiny_vlm(tmp_path), write_mixed(tmp_path)
    batch = renderer(vlm).batch([mixture[0, i] for i in range(4)])
    return vlm.model, batch


def by_hand(model, batch) -> tuple[float, int]:
    """Sample by sample from the spliced row: picture vectors from their slots, texts from the embedding's rows."""
    row = model.splice(batch, {}).detach().double().flatten(0, 1)
    media, table = batch.media["image"], model.lm.embedding.weight.detach().double()
    at = dict(zip(range(len(media.counts)), torch.split(media.slots, media.counts), strict=True))
    pairs = []
    for sample in range(len(batch.ids)):
        mine = [at[i] for i, owner in enumerate(media.owners) if owner == sample]
        said = batch.input_ids[sample][batch.loss_mask[sample]]
        if mine and len(said):
            pairs.append((row[torch.cat(mine)].mean(0), table[said].mean(0)))
    total = 0.0
    for i, (v, _) in enumerate(pairs):
        for j, (_, t) in enumerate(pairs):
            total += float((v @ t / v.norm() / t.norm() - int(i == j)) ** 2)
    return total / len(pairs) ** 2, len(pairs)


def test_the_term_is_its_formula(parts):
    model, batch = parts
    plain, loss = next_token(model, batch), objective({"type": "aligned", "share": SHARE})(model, batch)
    term, pairs = by_hand(model, batch)
    assert pairs > 1 and term > 0.01
    assert loss.weight == plain.weight
    assert float((loss.total - plain.total).detach()) == pytest.approx(SHARE * plain.weight * term, rel=1e-4)
    total, weight = loss.parts["alignment"]
    assert float(total) / weight == pytest.approx(term, rel=1e-4)


def test_the_connector_learns_from_it_and_the_embedding_does_not(parts):
    model, batch = parts
    for p in model.parameters():
        p.grad = None
    difference = objective({"type": "aligned"})(model, batch).total - next_token(model, batch).total
    difference.backward()
    assert model.connectors["image"].layers[0].weight.grad.abs().max() > 1e-5
    assert (
        model.lm.embedding.weight.grad.abs().max() < 1e-4 * model.connectors["image"].layers[0].weight.grad.abs().max()
    )


def test_without_two_pictures_it_is_the_cross_entropy(tmp_path):
    vlm, mixture = tiny_vlm(tmp_path), write_mixed(tmp_path)
    batch = renderer(vlm).batch([next(e for e in (mixture[0, i] for i in range(4)) if e.messages[0].media)])
    loss = objective("aligned")(vlm.model, batch)
    assert float(loss.total) == float(next_token(vlm.model, batch).total) and "alignment" not in loss.parts
