"""What makes training fast or small changes nothing of what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import renderer, source, tiny_vlm, write_pictures

from chiasm.data.mixture import Entry, Mixture
from chiasm.train import speed
from chiasm.train.objectives.next_token import next_token
from chiasm.train.recipe import Stage


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def gradients(vlm, data: Path, pack: bool = False, **settings) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of four samples under a stage's settings, and how often the blocks ran."""
    mixture = Mixture({"colors": Entry(source=source(data))})
    batch = renderer(vlm, pack=pack).batch([mixture[0, i] for i in range(4)])
    calls = []
    hooks = [b.mlp.register_forward_pre_hook(lambda *_: calls.append(1)) for b in speed.blocks(vlm.model)]
    speed.prepare(vlm.model, Stage(name="s", lr=1e-3, steps=1, **settings))
    try:
        vlm.model.train()
        next_token(vlm.model, batch).total.backward()
    finally:
        speed.settle(vlm.model)
        for hook in hooks:
            hook.remove()
    found = {name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad()
    return found, len(calls)


@pytest.mark.parametrize("pack", [False, True])
def test_recomputed_equals_plain(data, tmp_path, pack: bool):
    vlm = tiny_vlm(tmp_path)
    plain, once = gradients(vlm, data, pack)
    again, twice = gradients(vlm, data, pack, recompute=True)
    assert len(plain) > 30 and plain.keys() == again.keys()
    assert (once, twice) == (4, 8)  # two blocks of the tower, two of the decoder
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert not any(part.recompute for part in speed.parts(vlm.model))


@pytest.mark.slow
@pytest.mark.parametrize("pack", [False, True])
def test_compiled_equals_plain(data, tmp_path, pack: bool):
    vlm = tiny_vlm(tmp_path)
    plain, _ = gradients(vlm, data, pack)
    compiled, _ = gradients(vlm, data, pack, compile=True)
    for name, g in plain.items():
        assert (g - compiled[name]).abs().max() <= 2e-6 * max(1.0, float(g.abs().max())), name
