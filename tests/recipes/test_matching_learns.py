"""BLIP-2's first stage learns to match: right pairs from wrong ones, on pictures that it never saw.

Hard wrong pairs from the first step on, a narrow Q-Former from nothing, the demo's frozen tower. What first weights,
learning rate and hard pairs are worth: ``benchmarks/stage1.py``.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch

from chiasm.connectors.qformer import QFormer, deviation


@pytest.fixture(scope="module")
def stage1(of_benchmarks: Any) -> Any:
    """The benchmark's file as a module."""
    return of_benchmarks("stage1")


@pytest.mark.slow
def test_matching_leaves_its_prior(stage1: Any):
    """Two of three pairs are wrong, so the prior is 0.667; with pictures exchanged nothing is known of them."""
    vlm = stage1.build(64, 4)
    learn, held = (
        stage1.Pairs(vlm, stage1.objects(seed, count), name)
        for seed, count, name in ((1, 1200, "learn"), (2, 240, "held"))
    )
    found = stage1.run(vlm, learn, held, 3e-3, 1.0, None, Namespace(steps=300, batch=24))
    assert found["hard"] > 0.8 and found["even"] > 0.88, found
    held.features = held.features.roll(7, dims=0)
    assert stage1.judged(vlm.model, held, 0.0, 24)["matching"] < 0.72


@pytest.mark.parametrize("dim", [32, 128, 768])
def test_first_weights_let_as_much_through_at_any_width(dim: int):
    """The deviation of a linear layer's output is that of BERT's at its own width; tables keep 0.02."""
    torch.manual_seed(0)
    text = {"vocab": 200, "positions": 40}
    made = QFormer(QFormer.Config(dim=dim, heads=4, mlp=4 * dim, depth=2, text=text), {"image": dim}, 8)
    x = torch.randn(400, dim)
    with torch.no_grad():
        through = [layer(x).std() for layer in (made.body.layers[0].attn.q, made.body.layers[1].query_mlp.fc1)]
    assert all(abs(float(s) - 0.02 * 768**0.5) < 0.03 for s in through)
    assert deviation(768) == 0.02
    tables = (made.queries, made.body.text.words.weight, made.body.text.positions.weight)
    assert all(0.018 < float(t.std()) < 0.022 for t in tables)
