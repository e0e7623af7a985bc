"""Contrastive objectives: published formulas, a step cut in every way, ranks, duplicates, the bound of the scale."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import launch
from torch import Tensor, nn

from chiasm.errors import ChiasmError, ConfigError, DataError
from chiasm.train import distributed, together
from chiasm.train.objectives import objective
from chiasm.train.objectives.contrastive import picture_keys, text_keys
from chiasm.types import Batch, Layout, MediaBatch

WIDTH = 6
BOTH = ["contrastive", "sigmoid"]


class Towers(nn.Module):
    """The least that a contrastive objective asks of a model: two maps to unit vectors, a scale, a bias."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.pictures = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, WIDTH))
            self.words = nn.Embedding(20, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(5.0)))
        self.bias = nn.Parameter(torch.tensor(-2.0))
        self.double()
        self.device = torch.device("cpu")

    def embed_images(self, batch: Batch) -> Tensor:
        return F.normalize(self.pictures(batch.media["image"].inputs.flatten(1).double()), dim=-1)

    def embed_texts(self, batch: Batch) -> Tensor:
        return F.normalize(self.words(batch.input_ids).mean(1), dim=-1)

    def scale(self) -> Tensor:
        return self.logit_scale.exp()

    def scale_bounds(self) -> dict[str, tuple[float, float]]:
        return {"logit_scale": (0.0, math.log(100.0))}


def batch(first: int, count: int, equal: tuple[int, ...] = ()) -> Batch:
    """Samples ``first``, ``first + 1``, ...: each its own picture and text; those in ``equal`` share the text of 0."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(40, 3, 2, 2, generator=generator)
    ids = torch.randint(0, 20, (40, 4), generator=generator)
    ids[list(equal)] = ids[0].clone()
    rows = slice(first, first + count)
    media = MediaBatch(
        pixels[rows], [Layout(1, (3, 2, 2))] * count, torch.zeros(0, dtype=torch.long), [0] * count, [*range(count)]
    )
    ones = torch.ones(count, 4, dtype=torch.long)
    positions = torch.arange(4).expand(count, 4)
    names = [f"s{i}" for i in range(first, first + count)]
    return Batch(ids[rows], positions, ones, torch.zeros(count, 4).bool(), {"image": media}, names)


def by_hand(name: str, model: Towers, whole: Batch, same: Tensor, duplicates: str = "negatives") -> Tensor:
    """The published loss over a whole step, a mean over its pairs, written out."""
    images, texts = model.embed_images(whole), model.embed_texts(whole)
    n, eye = len(images), torch.eye(len(images), dtype=torch.bool)
    if name == "sigmoid":
        logits = model.scale() * images @ texts.T + model.bias
        right = same if duplicates == "positives" else eye
        losses = -F.logsigmoid(torch.where(right, 1.0, -1.0) * logits)
        return (losses * (eye | ~same) if duplicates == "left_out" else losses).sum() / n
    total = 0.0
    for logits in (model.scale() * images @ texts.T, model.scale() * texts @ images.T):
        if duplicates == "left_out":
            logits = logits.masked_fill(same & ~eye, float("-inf"))
        right = same if duplicates == "positives" else eye
        total = total - (logits.softmax(1) * right).sum(1).log().mean()
    return total / 2


def gradients(model: Towers) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected(name: str, whole: Batch, same: Tensor, duplicates: str = "negatives") -> tuple[float, dict[str, Tensor]]:
    model = Towers()
    loss = by_hand(name, model, whole, same, duplicates)
    loss.backward()
    return loss.item(), gradients(model)


def step(name: str, sizes: list[int], equal: tuple[int, ...] = (), ranks=distributed.ALONE, model=None, **options):
    """A step of micro-batches of these sizes, dealt to the ranks in turn; the mean loss and its gradients here."""
    model = model or Towers()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    mine = [batch(s, n, equal) for s, n in zip(starts, sizes)][ranks.rank :: ranks.count]
    several = len(sizes) > ranks.count
    loss = together.backward(
        objective({"type": name, **options}),
        model,
        [lambda b=b: b for b in mine if b.ids],
        several,
        ranks,
        lambda: None,
    )
    weight = sum(sizes)
    found = {n: (p.grad if p.grad is not None else torch.zeros_like(p)) / weight for n, p in model.named_parameters()}
    return loss.total.item() / weight, found, loss


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in b)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("chunk", [None, 3])
def test_the_published_formulas(name, chunk):
    whole = batch(0, 7)
    mean, slopes = expected(name, whole, torch.eye(7, dtype=torch.bool))
    got, found, loss = step(name, [7], chunk=chunk)
    assert abs(got - mean) < 1e-9 and apart(found, slopes) < 1e-9
    assert loss.weight == 7 and float(slopes["logit_scale"].abs()) > 1e-3


def test_transformers_computes_the_same():
    pytest.importorskip("transformers")
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    model, whole = Towers(), batch(0, 7)
    logits = model.scale() * model.embed_texts(whole) @ model.embed_images(whole).T
    loss = objective("contrastive")(model, whole)
    assert float(loss.total / loss.weight) == pytest.approx(float(image_text_contrastive_loss(logits)), abs=1e-9)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("duplicates", ["negatives", "positives", "left_out"])
@pytest.mark.parametrize("sizes", [[8], [3, 3, 2]])
def test_equal_texts(name, duplicates, sizes):
    equal = (0, 2, 5)
    same = torch.eye(8, dtype=torch.bool)
    same[torch.tensor(equal).unsqueeze(1), torch.tensor(equal)] = True
    mean, slopes = expected(name, batch(0, 8, equal), same, duplicates)
    got, found, _ = step(name, sizes, equal, duplicates=duplicates, chunk=3)
    assert abs(got - mean) < 1e-9 and apart(found, slopes) < 1e-9
    if duplicates != "negatives":
        assert abs(mean - expected(name, batch(0, 8, equal), same)[0]) > 1e-3, "the choice matters"


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("duplicates", ["negatives", "positives", "left_out"])
def test_equal_pictures(name, duplicates):
    """Two captions of one picture: each is right for the other's row too, or is not compared with it."""
    whole = batch(0, 8)
    whole.media["image"].inputs[[3, 6]] = whole.media["image"].inputs[1].clone()
    same = torch.eye(8, dtype=torch.bool)
    same[torch.tensor([[1], [3], [6]]), torch.tensor([1, 3, 6])] = True
    mean, slopes = expected(name, whole, same, duplicates)
    model = Towers()
    loss = objective({"type": name, "duplicates": duplicates, "chunk": 3})(model, whole)
    (loss.total / loss.weight).backward()
    assert abs(float(loss.total.detach()) / loss.weight - mean) < 1e-9 and apart(gradients(model), slopes) < 1e-9


def test_keys_tell_what_the_model_sees():
    one = batch(0, 6, (0, 3))
    one.media["image"].inputs[4] = one.media["image"].inputs[1]
    assert [(a, b) for a in range(6) for b in range(a) if text_keys(one)[a] == text_keys(one)[b]] == [(3, 0)]
    assert [(a, b) for a in range(6) for b in range(a) if picture_keys(one)[a] == picture_keys(one)[b]] == [(4, 1)]
    padded = batch(0, 6)
    padded.input_ids = F.pad(padded.input_ids, (0, 2))
    padded.positions, padded.segment_ids = F.pad(padded.positions, (0, 2)), F.pad(padded.segment_ids, (0, 2))
    assert torch.equal(text_keys(padded), text_keys(batch(0, 6))), "padding is no text"


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("sizes", [[4, 4], [3, 3, 1], [2, 2, 2, 1]])
def test_micro_batches_are_one_step(name, sizes):
    """GradCache: the full batch's gradient, the scale's included."""
    n = sum(sizes)
    mean, slopes = expected(name, batch(0, n), torch.eye(n, dtype=torch.bool))
    got, found, _ = step(name, sizes)
    assert abs(got - mean) < 1e-9 and apart(found, slopes) < 1e-9


@pytest.mark.parametrize("name", BOTH)
def test_both_passes_draw_the_same(name):
    """With dropout, the second pass must see the units that the first one dropped: checked by finite differences."""

    def loss(shift: float) -> float:
        torch.manual_seed(3)
        model = Towers(dropout=0.5)
        with torch.no_grad():
            model.pictures[0].weight[2, 3] += shift
        return step(name, [3, 3], model=model)[0]

    torch.manual_seed(3)
    found = step(name, [3, 3], model=Towers(dropout=0.5))[1]["pictures.0.weight"][2, 3]
    assert float(found) == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, abs=1e-8) != 0


def test_a_model_that_does_not_repeat_is_refused():
    class Restless(Towers):
        calls = 0.0

        def embed_texts(self, batch: Batch) -> Tensor:
            self.calls += 1
            return super().embed_texts(batch).roll(int(self.calls), 1)

    with pytest.raises(ChiasmError, match="other text vectors of the same batch the second time"):
        step("contrastive", [3, 3], model=Restless())


def test_running_statistics_count_once():
    class Normed(Towers):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH).double()

        def embed_texts(self, batch: Batch) -> Tensor:
            return self.norm(super().embed_texts(batch))

    model = Normed()
    step("contrastive", [3, 3], model=model)
    assert int(model.norm.num_batches_tracked) == 2


CUTS = [[4, 4, 4, 4], [3, 3, 3, 2], [3, 3, 1, 0], [2, 2, 2, 2, 2, 2, 2, 1], [3, 0, 0, 0]]


def on_ranks(folder: Path) -> dict:
    found = {}
    with distributed.started("cpu", patience=150) as ranks:
        for name in BOTH:
            for sizes in CUTS:
                for duplicates in ("negatives", "positives", "left_out"):
                    options = {"duplicates": duplicates, "chunk": 3}
                    mean, slopes, _ = step(name, sizes, (0, 2, 5), ranks, **options)
                    if ranks.count > 1:
                        for slope in [*slopes.values()]:
                            torch.distributed.all_reduce(slope)
                    total = sum(ranks.gather(mean))
                    found[name, tuple(sizes), duplicates] = total, slopes
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_take_the_gradient_of_one(tmp_path, count):
    """Gradients summed over the ranks are those of one process that sees the whole step, however unequal the shares."""
    results = launch(count, on_ranks, tmp_path)
    for (name, sizes, duplicates), _ in results[0].items():
        n, equal = sum(sizes), (0, 2, 5)
        same = torch.eye(n, dtype=torch.bool)
        inside = torch.tensor([i for i in equal if i < n])
        same[inside.unsqueeze(1), inside] = True
        mean, slopes = expected(name, batch(0, n, equal), same, duplicates)
        for result in results:
            total, found = result[name, sizes, duplicates]
            assert abs(total - mean) < 1e-9, (name, sizes)
            assert apart(found, slopes) <= 1e-6, (name, sizes)


def test_bad_input():
    one = batch(0, 3)
    one.media["image"].owners = [0, 0, 2]
    with pytest.raises(DataError, match="'s0' has 2 pictures"):
        objective("contrastive")(Towers(), one)
    tiled = batch(0, 2)
    tiled.media["image"].layouts[1] = Layout(3, (3, 2, 2))
    with pytest.raises(DataError, match=r"'s1'.* 3 units"):
        objective("contrastive")(Towers(), tiled)
    model = Towers()
    model.bias = None
    with pytest.raises(ConfigError, match="bias"):
        objective("sigmoid")(model, batch(0, 2))
    with pytest.raises(ConfigError, match="unknown key 'duplicate'"):
        objective({"type": "contrastive", "duplicate": "positives"})
    with pytest.raises(ConfigError, match="'next_token' has no options"):
        objective({"type": "next_token", "chunk": 3})
