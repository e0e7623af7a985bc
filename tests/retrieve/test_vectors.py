"""Exact search is exact, whatever the vectors; the 8-bit copies only save reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from chiasm.errors import DataError
from chiasm.nn import kernels
from chiasm.retrieve import vectors as module
from chiasm.retrieve.vectors import Exact, Faiss, narrowed


def clouds(count: int, dim: int, spread: float) -> torch.Tensor:
    """Unit vectors around ten centres; a small ``spread`` makes thousands of nearly equal cosines."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(10, dim, generator=generator)
    where = torch.randint(0, 10, (count,), generator=generator)
    return normalize(centres[where] + spread * torch.randn(count, dim, generator=generator), dim=1)


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.001])
@pytest.mark.parametrize("queries", [1, 40])
def test_exact(tmp_path: Path, monkeypatch, spread, queries):
    monkeypatch.setattr(module, "BLOCK", 700)  # several blocks
    x = clouds(2000, 24, spread)
    x[5] = x[1200]  # equal vectors: the lower row comes first
    store = Exact(tmp_path, "x", 24, 0, cut=True)
    assert store.add(x[:900]) == range(900) and store.add(x[900:]) == range(900, 2000)
    removed = [0, 7, 1999, 301, *range(703, 1199)]  # of the second block few are left
    removed += [r for r in range(1201, 1398) if r % 50]
    store.remove(removed)
    asked = torch.cat([x[1200:1201], clouds(39, 24, 1.0)])[:queries]
    scores, rows = store.search(asked, 12)
    wanted = asked @ x.T
    wanted[:, removed] = -9
    assert torch.allclose(scores, wanted.topk(12).values, atol=1e-6)
    assert torch.allclose(wanted.gather(1, rows), scores, atol=1e-6)
    assert rows[0, :2].tolist() == [5, 1200] or spread == 0.001
    assert not set(rows.flatten().tolist()) & set(removed)
    again = Exact(tmp_path, "x", 24, 2000, removed)
    assert torch.equal(again.search(asked, 12)[1], rows) and len(again) == 2000 - len(removed)


def sorted_by_hand(x: torch.Tensor, query: torch.Tensor, k: int, removed: set[int]) -> list[tuple[float, int]]:
    """All cosines, added in float64 and kept as float32, best first, the lower row first among equals."""
    found = (x.double() @ query.double()).float().tolist()
    return sorted((-score, row) for row, score in enumerate(found) if row not in removed)[:k]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("queries", [1, 6, 40])
@pytest.mark.parametrize("crowd", ["alike", "copies", "far"])
def test_always_what_sorting_gives(tmp_path: Path, monkeypatch, crowd, queries, native):
    """Also where thousands are equal or nearly so, with either way of multiplying."""
    if not native:
        monkeypatch.setattr(kernels, "compiled", lambda name: None)
    monkeypatch.setattr(module, "BLOCK", 700)
    monkeypatch.setattr(module, "READ", 64)
    x = clouds(1500, 40, 1.0 if crowd == "far" else 2e-4)
    if crowd == "copies":
        x = x[torch.randint(0, 30, (1500,), generator=torch.Generator().manual_seed(9))]
    removed = {3, 4, 5, 800, *range(1400, 1500)}
    store = Exact(tmp_path, "x", 40, 0, cut=True)
    store.add(x)
    store.remove(sorted(removed))
    asked = torch.cat([x[7:8], clouds(queries, 40, 1.0)])[:queries]
    scores, rows = store.search(asked, 25)
    for query, mine, where in zip(asked, scores.tolist(), rows.tolist(), strict=True):
        assert [(-s, r) for s, r in zip(mine, where, strict=True)] == sorted_by_hand(x, query, 25, removed)


@pytest.mark.skipif(kernels.compiled("nearest") is None, reason="no C++ compiler: torch computes everything")
@pytest.mark.parametrize("dim", [1, 8, 63, 64, 65, 200, 1152])
def test_compiled_products_are_whole_numbers(dim):
    generator = torch.Generator().manual_seed(dim)
    x, q = (torch.randint(-127, 128, (n, dim), generator=generator, dtype=torch.int8) for n in (301, 7))
    x[0], q[0] = -127, 127  # the largest that a product can be
    for count in (1, 4, 7):
        assert torch.equal(kernels.products(x, q[:count]), (q[:count].long() @ x.T.long()).int())


def test_few_vectors_are_read(tmp_path: Path):
    """The point of the copies: of ten thousand vectors a query reads a few."""
    x = clouds(10_000, 64, 1.0)
    store = Exact(tmp_path, "x", 64, 0, cut=True)
    store.add(x)
    store.search(x[:1], 1)
    found, rows = next(store._few(x[17:18], slice(0, 10_000), 10, [-1.0]))
    assert 10 <= len(found) == len(rows) < 400


def test_the_bound_holds():
    """No product of copies is further from the true one than the search allows."""
    x, q = clouds(500, 32, 1.0), clouds(20, 32, 1.0)
    for scale in (1.0, 0.37):  # vectors shorter than 1 too
        codes, step, loss = narrowed(x * scale)
        query_codes, query_step, query_loss = narrowed(q)
        about = (codes.float() @ query_codes.float().T) * step.unsqueeze(1) * query_step
        room = loss.unsqueeze(1) + (1 + loss.unsqueeze(1)) * query_loss
        assert bool(((about - scale * x @ q.T).abs() <= room + 1e-6).all())


def test_more_asked_than_there_are(tmp_path: Path):
    store = Exact(tmp_path, "x", 8, 0, cut=True)
    assert store.search(torch.ones(2, 8), 3)[0].shape == (2, 0)
    store.add(clouds(3, 8, 1.0))
    store.remove([1])
    scores, rows = store.search(torch.ones(1, 8), 5)
    assert sorted(rows[0].tolist()) == [0, 2] and scores.shape == (1, 2)
    with pytest.raises(DataError, match="width 8"):
        store.add(torch.zeros(1, 9))


def test_faiss(tmp_path: Path):
    pytest.importorskip("faiss")
    x = clouds(3000, 24, 0.3)
    store = Faiss(Exact(tmp_path, "x", 24, 0, cut=True))
    store.add(x)
    store.remove([17])
    store.save()
    assert (tmp_path / "x.faiss").is_file()
    scores, rows = store.search(x[:50], 10)
    wanted = x[:50] @ x.T
    wanted[:, 17] = -9
    best = wanted.topk(10)
    hit = (rows.unsqueeze(2) == best.indices.unsqueeze(1)).any(2).float().mean()
    assert hit > 0.95, f"recall {hit}"
    assert torch.allclose(scores, wanted.gather(1, rows), atol=1e-6), "cosines are exact"
    again = Faiss(Exact(tmp_path, "x", 24, 3000, [17]))
    assert again.made is not None and torch.equal(again.search(x[:50], 10)[1], rows)
    again.add(x[:1])
    assert Faiss(Exact(tmp_path, "x", 24, 3001, [17])).made is None, "a structure of other rows is made again"
