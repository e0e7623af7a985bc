"""Objectives of models that fuse, against formulas: matching, alignment by transport, masked data, captions, answers.

Transport is computed by loops as IPOT's paper writes it; divergences and entropies by torch's own functions in float64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.fusion.modality_experts import ModalityExperts
from chiasm.fusion.multiway import Multiway
from chiasm.fusion.pair import Joint
from chiasm.fusion.single_stream import SingleStream
from chiasm.train.objectives import objective, pretraining
from chiasm.train.objectives.masked_data import ProjectionConfig, RandomProjection, blocks
from chiasm.train.objectives.matching import half_wrong
from chiasm.train.objectives.ranking import others
from chiasm.train.objectives.word_patch import distances, inside, plan
from chiasm.types import Batch, Layout, MediaBatch
from parity.weights import randomise

SMALL = {"text_vocab": 40, "dim": 24, "depth": 2, "heads": 3, "mlp": 32, "image_size": 16, "patch": 4}


def batch(count: int = 4, images: int = 1, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(5)
    segments = (torch.arange(7) < torch.tensor([7, 5, 6, 4])[:count, None]).long()
    ids = torch.randint(4, 40, (count, 7), generator=generator) * segments
    pixels = torch.randn(count * images, 3, size, size, generator=generator)
    owners = [row for row in range(count) for _ in range(images)]
    slots = torch.zeros(0, dtype=torch.long)
    media = MediaBatch(pixels, [Layout(1, (3, size, size))] * len(owners), slots, [0] * len(owners), owners)
    none = torch.zeros(count, 7, dtype=torch.bool)
    found = Batch(ids, segments.cumsum(1) - 1, segments, none, {"image": media}, [f"s{i}" for i in range(count)])
    found.masked = none.clone()
    found.masked[:, 2] = True
    found.masked[0, 4] = True
    found.masked_ids = ids.masked_fill(found.masked, 3)
    return found


def vilt(**tasks: Any) -> SingleStream:
    config = SingleStream.Config.parse(SMALL | {"text_positions": 8, "tasks": tasks})
    return randomise(SingleStream(config), seed=3)  # type: ignore[return-value]


def transport(cost: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """IPOT with beta 0.5 and 50 steps over one sample, in plain loops (float64)."""
    m, n = len(rows), len(columns)
    c = [[float(cost[i, j]) for j in columns] for i in rows]
    kernel = [[math.exp(-c[i][j] / 0.5) for j in range(n)] for i in range(m)]
    moved, give = [[1.0] * n for _ in range(m)], [1.0 / m] * m
    for _ in range(50):
        held = [[kernel[i][j] * moved[i][j] for j in range(n)] for i in range(m)]
        take = [1 / (n * sum(held[i][j] * give[i] for i in range(m))) for j in range(n)]
        give = [1 / (m * sum(held[i][j] * take[j] for j in range(n))) for i in range(m)]
        moved = [[give[i] * held[i][j] * take[j] for j in range(n)] for i in range(m)]
    found = torch.zeros_like(cost)
    for a, i in enumerate(rows):
        for b, j in enumerate(columns):
            found[i, j] = moved[a][b]
    return found


def test_transport() -> None:
    generator = torch.Generator().manual_seed(1)
    cost = torch.rand(2, 5, 6, generator=generator, dtype=torch.float64) * 2
    rows = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]).bool()
    columns = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0]]).bool()
    found = plan(cost, rows, columns)
    for b in range(2):
        wanted = transport(cost[b], rows[b].nonzero()[:, 0].tolist(), columns[b].nonzero()[:, 0].tolist())
        assert torch.allclose(found[b], wanted, atol=1e-9)
        assert torch.allclose(
            found[b][rows[b]].sum(1), torch.full((int(rows[b].sum()),), 1 / int(rows[b].sum())).double(), atol=1e-2
        )
    empty = plan(cost, torch.zeros_like(rows), columns)
    assert torch.equal(empty, torch.zeros_like(cost))


def test_alignment_costs_are_cosines_of_what_counts() -> None:
    model, data = vilt(), batch()
    words, pictures = model.read(data)
    joint = model.joint(words, pictures[0])
    taken, patches = inside(joint)
    assert taken.sum(1).tolist() == [5, 3, 4, 2] and not taken[:, 0].any() and patches.sum(1).tolist() == [16] * 4
    found = distances(joint)
    for b in range(4):
        x, y = joint.hidden[b, :7].double(), joint.hidden[b, 7:].double()
        cost = (1 - F.cosine_similarity(x[:, None], y[None], dim=-1)).detach()
        chosen = taken[b].nonzero()[:, 0].tolist(), patches[b].nonzero()[:, 0].tolist()
        wanted = (cost * transport(cost, *chosen)).sum()
        assert abs(float(found[b].detach()) - float(wanted.detach())) < 1e-5
    grown = Joint(joint.hidden * 3, joint.mask, joint.words, joint.picture)
    assert torch.allclose(distances(grown), found, atol=1e-5)


def test_vilt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = vilt(words=True, match=True), batch()
    words, pictures = model.read(data)
    right = torch.tensor([True, False, True, False])
    rows = torch.tensor([0, 2, 2, 1])
    joint = model.joint(words, pictures[0].pick(rows))
    monkeypatch.setattr(pretraining, "half_wrong", lambda *_: (joint, right))
    loss = objective("vilt")(model, data)
    logits = model.match_logits(joint).double()
    matching = -logits.log_softmax(1)[torch.arange(4), right.long()].mean()
    hidden = model.joint(type(words)(data.masked_ids, words.mask), pictures[0])
    shares = model.word_head(hidden.hidden[:, :7][data.masked]).double().log_softmax(1)
    masked = -shares[torch.arange(5), data.input_ids[data.masked]].mean()
    moved = distances(joint).double()
    alignment = (moved[0] + moved[2] - moved[1] - moved[3]) / 4
    assert abs(float((loss.total / 4).detach()) - float((masked + matching + 0.1 * alignment).detach())) < 1e-5
    loss.total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_half_of_a_batch_is_wrong() -> None:
    model, data = vilt(match=True), batch()
    words, pictures = model.read(data)
    own = model.joint(words, pictures[0]).pooled
    torch.manual_seed(0)
    for _ in range(5):
        joint, right = half_wrong(model, words, pictures[0])
        same = torch.isclose(joint.pooled, own, atol=1e-6).all(1)
        assert torch.equal(same, right) and int(right.sum()) == 2
    with pytest.raises(DataError, match="micro-batch, which holds 1"):
        objective({"type": "matching", "negatives": "even"})(model, batch(1))


def test_vlmo() -> None:
    config = SMALL | {"text_distance": 9, "both_from": 1, "contrast": True, "contrast_both": True}
    made = ModalityExperts(ModalityExperts.Config.parse(config | {"tasks": {"words": True, "match": True}}))
    model, data = randomise(made, seed=2), batch()
    parts = objective({"type": "vlmo", "matching": 0, "words": 0})(model, data)
    words, pictures = model.read(data)
    images, texts = model.image_states(pictures[0], both=True), model.text_states(words, both=True)
    wanted = []
    for index, (name, scale) in enumerate((("", model.logit_scale), ("_both", model.logit_scale_both))):
        x = F.normalize(model.projections["image" + name](images[index][:, 0]).double(), dim=-1)
        y = F.normalize(model.projections["text" + name](texts[index][:, 0]).double(), dim=-1)
        scores = scale.double().exp() * x @ y.T
        wanted.append((-scores.log_softmax(1).diag().mean() - scores.log_softmax(0).diag().mean()) / 2)
    assert abs(float(parts.total.detach()) / 4 - float((sum(wanted) / 2).detach())) < 1e-5
    whole = objective("vlmo")(model, data)
    names = {name: float(total) / count for name, (total, count) in whole.parts.items()}
    assert abs(float(whole.total.detach()) / 4 - (names["contrast"] + names["matching"] + 0.25 * names["words"])) < 1e-5
    whole.total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_words_of_texts_alone() -> None:
    config = SMALL | {"text_distance": 9, "both_from": 1, "tasks": {"words": True}}
    model, data = randomise(ModalityExperts(ModalityExperts.Config.parse(config)), seed=2), batch()
    words, _ = model.read(data)
    data.media = {}
    found = objective("masked_words")(model, data)
    states = model.text_states(type(words)(data.masked_ids, words.mask))[0]
    shares = model.word_head(states[data.masked]).double().log_softmax(1)
    wanted = -shares[torch.arange(5), data.input_ids[data.masked]].sum()
    assert found.weight == 5 and abs(float(found.total.detach()) - float(wanted.detach())) < 1e-4


def beit(**options: Any) -> Multiway:
    config = SMALL | {"text_positions": 12, "codes": 11, "tasks": {"words": True}} | options
    return randomise(Multiway(Multiway.Config.parse(config)), seed=4)  # type: ignore[return-value]


MASKED = {"type": "masked_data", "smallest": 2, "visual_tokenizer": {"patch": 4, "codes": 11, "dim": 5}}


def test_masked_data() -> None:
    model, data = beit(), batch()
    loss = objective(MASKED)
    torch.manual_seed(7)
    found = loss(model, data)
    torch.manual_seed(7)
    covered = torch.stack([blocks(4, 4, 0.4, 2) for _ in range(4)]).flatten(1)
    assert covered.sum(1).tolist() == [6] * 4 and found.weight == 5 + 24
    words, pictures = model.read(data)
    joint = model.joint(type(words)(data.masked_ids, words.mask), pictures[0], covered=covered)
    said = model.word_head(joint.hidden[:, joint.words][data.masked]).double().log_softmax(1)
    seen = model.code_head(joint.hidden[:, 1:17][covered]).double().log_softmax(1)
    codes = loss.tokenizer(pictures[0].pixels)[covered]
    wanted = -said[torch.arange(5), data.input_ids[data.masked]].sum() - seen[torch.arange(24), codes].sum()
    assert abs(float(found.total.detach()) - float(wanted.detach())) < 1e-3 and len(codes.unique()) > 3
    found.total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_masked_data_of_one_kind_alone() -> None:
    model, data = beit(), batch()
    data.media = {}
    assert objective(MASKED)(model, data).weight == 5
    pictures = batch()
    pictures.input_ids = pictures.segment_ids = torch.zeros(4, 0, dtype=torch.long)
    assert objective(MASKED)(model, pictures).weight == 24
    with pytest.raises(
        ConfigError, match="gives 16 words of 9 for a picture, the model has 16 patches and a head of 11"
    ):
        objective(MASKED | {"visual_tokenizer": {"patch": 4, "codes": 9}})(model, batch())
    with pytest.raises(ConfigError, match="is unknown; 'random_projection'"):
        objective(MASKED | {"visual_tokenizer": {"type": "vqkd"}})


def test_the_visual_tokenizer_tells_patches_apart() -> None:
    made = RandomProjection(ProjectionConfig(patch=4, codes=11, dim=5))
    pixels = batch().media["image"].inputs
    found = made(pixels)
    assert found.shape == (4, 16) and len(found.unique()) > 5
    assert torch.equal(found, RandomProjection(made.config)(pixels * 2 + 3))  # brightness and contrast do not matter
    one = pixels[0, :, 4:8, 8:12].reshape(-1).double()
    one = (one - one.mean()) / (one.var(unbiased=False) + 1e-5).sqrt()
    nearest = (made.vectors.double() @ F.normalize(one @ made.projection.double(), dim=0)).argmax()
    assert int(nearest) == int(found[0, 1 * 4 + 2])


def test_masked_captions() -> None:
    model, data = beit(), batch()
    words, pictures = model.read(data)
    joint = model.joint(type(words)(data.masked_ids, words.mask), pictures[0], causal=True)
    shares = model.word_head(joint.hidden[:, joint.words][data.masked]).double().log_softmax(1)
    target = torch.full_like(shares, 0.1 / 39)
    target[torch.arange(5), data.input_ids[data.masked]] = 0.9
    each = F.kl_div(shares, target, reduction="none").sum(1).detach()
    found = objective("masked_captions")(model, data)
    assert found.weight == 5 and abs(float(found.total.detach()) - float(each.sum())) < 1e-4
    best = objective({"type": "masked_captions", "drop_worst": 0.2})(model, data)
    assert best.weight == 4 and abs(float(best.total.detach()) - float(each.sort().values[:4].sum())) < 1e-4
    plain = objective({"type": "masked_captions", "smoothing": 0.0})(model, data)
    assert abs(float(plain.total.detach()) + float(shares[target == 0.9].sum().detach())) < 1e-4


def test_classes() -> None:
    model, data = vilt(classes=3), batch()
    data.scores = torch.tensor([[1.0, 0, 0], [0.3, 0.9, 0], [0, 0, 1.0], [0, 0.6, 0.6]])
    logits = model.classify(data).double()
    soft = objective({"type": "classes", "scores": "soft"})(model, data)
    wanted = F.binary_cross_entropy_with_logits(logits, data.scores.double()) * 3
    assert abs(float(soft.total.detach()) / 4 - float(wanted.detach())) < 1e-6
    one = objective("classes")(model, data)
    assert abs(float(one.total.detach()) / 4 - float(F.cross_entropy(logits, data.scores.argmax(1)).detach())) < 1e-6
    chosen = logits.argmax(1)
    assert float(one.parts["accuracy"][0]) == pytest.approx(sum(float(data.scores[i, c]) for i, c in enumerate(chosen)))
    data.scores = None
    with pytest.raises(DataError, match=r"sample 's0': has no answer to learn: set processing\.labels"):
        objective("classes")(model, data)


def test_ranking_is_the_own_text_among_others() -> None:
    """Cross-entropy over the own text and wrong ones; a text of equal tokens is none of those."""
    model, data = vilt(rank=True, match=True), batch()
    data.input_ids[3, :] = data.input_ids[0]
    data.segment_ids[3, :] = data.segment_ids[0]
    data.positions[3, :] = data.positions[0]
    words, pictures = model.read(data)
    loss = objective({"type": "ranking", "wrong": 2})(model, data)
    assert loss.weight == 4
    model = model.double()
    pictures[0].pixels = pictures[0].pixels.double()
    scores = torch.stack(
        [model.rank(model.joint(words.pick(torch.tensor([t] * 4)), pictures[0])) for t in range(4)], 1
    ).detach()  # [pictures, texts]
    possible = []
    for b, wrong in enumerate(([1, 2], [0, 2, 3], [0, 1, 3], [1, 2])):
        pairs = [[x, y] for x in wrong for y in wrong if x < y]
        possible.append([float(-scores[b, [b, *pair]].log_softmax(0)[0]) for pair in pairs])
    sums = [w + x + y + z for w in possible[0] for x in possible[1] for y in possible[2] for z in possible[3]]
    assert min(abs(float(loss.total.detach()) - s) for s in sums) < 1e-5
    rows, allowed = others(torch.tensor([7, 8, 9, 7]), 3)
    assert rows[:, 0].tolist() == [0, 1, 2, 3] and allowed.sum(1).tolist() == [3, 4, 4, 3]
    assert {*rows[0][allowed[0]].tolist()} == {0, 1, 2} and {*rows[1][allowed[1]].tolist()} == {0, 1, 2, 3}
    with pytest.raises(ConfigError, match=r"set model\.tasks\.rank"):
        objective("ranking")(Multiway(Multiway.Config.parse(SMALL | {"text_positions": 9})), data)
    with pytest.raises(DataError, match="micro-batch, which holds 1"):
        objective("ranking")(vilt(rank=True, match=True), batch(1))
