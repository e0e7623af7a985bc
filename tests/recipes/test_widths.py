"""Packed rows filled up to few widths: the same losses and gradients, little waste, and only where it pays."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import renderer, tiny_vlm, write_mixed

from chiasm.nn.masks import causal
from chiasm.train import widths
from chiasm.train.loop import StageRun
from chiasm.train.objectives import cross_entropy as module
from chiasm.train.objectives import objective
from chiasm.train.recipe import Stage
from chiasm.train.widths import few, filled, fills


def test_few_widths_and_little_waste():
    lengths = range(1, 20_000)
    found = [few(n) for n in lengths]
    assert all(n <= w and w % 16 == 0 for n, w in zip(lengths, found, strict=True)) and found == sorted(found)
    assert all(w - n < max(16, n / 16) for n, w in zip(lengths, found, strict=True))
    for low in (256, 512, 1024, 8192):
        inside = {w for w in found if low < w <= 2 * low}
        assert len(inside) == 16
        some = range(low + 1, 2 * low + 1)
        assert sum(few(n) - n for n in some) / sum(some) < 0.025


@pytest.fixture
def packed(tmp_path: Path):
    """Four samples as unlike as can be, in one row, whose length is none of the few."""
    mixture = write_mixed(tmp_path)
    vlm = tiny_vlm(tmp_path)
    batch = renderer(vlm, pack=True).batch([mixture[ref] for ref in mixture.first()])
    assert len(batch.input_ids) == 1 and batch.input_ids.shape[1] != few(batch.input_ids.shape[1])
    return vlm.model, batch


def test_a_filled_row_has_the_same_losses_and_gradients(packed):
    model, batch = packed
    wide = filled(batch)
    assert wide.input_ids.shape == (1, few(batch.input_ids.shape[1])) and batch.input_ids.shape != wide.input_ids.shape
    assert int((wide.segment_ids != 0).sum()) == int((batch.segment_ids != 0).sum())
    # The filling is part of the last piece: no piece of its own, whose shape would be one more.
    pieces, more = (causal(b.segment_ids, b.positions).runs[0] for b in (batch, wide))
    assert pieces[:-1] == more[:-1] and sum(more) == wide.input_ids.shape[1]
    found = []
    for given in (batch, wide):
        model.zero_grad(set_to_none=True)
        loss = objective("next_token")(model, given)
        loss.total.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss, grads))
    (plain, gradients), (other, again) = found
    assert other.weight == plain.weight and float(other.total.detach()) == pytest.approx(
        float(plain.total.detach()), rel=1e-6
    )
    assert gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        assert (again[name] - gradient).abs().max() <= 2e-6 * max(1.0, float(gradient.abs().max())), name


def test_what_is_no_packed_row_stays_as_it_is(packed, tmp_path):
    _, batch = packed
    mixture = write_mixed(tmp_path)
    rows = renderer(tiny_vlm(tmp_path)).batch([mixture[ref] for ref in mixture.first()])
    assert filled(rows) is rows
    wide = filled(batch)
    assert filled(wide) is wide


def test_rows_are_filled_where_kernels_cost_more_than_arithmetic(packed, monkeypatch):
    model, _ = packed
    assert fills(model, low=True) and not fills(model, low=False)
    monkeypatch.setattr(widths, "SMALL", 1000)
    assert not fills(model, low=True)


@pytest.mark.parametrize(
    ("settings", "few_widths"),
    [({"pack": True, "dtype": "bf16"}, True), ({"pack": True}, False), ({"dtype": "bf16"}, False)],
)
def test_training_fills_packed_rows_in_bfloat16(tmp_path, settings, few_widths):
    mixture, vlm, seen = write_mixed(tmp_path), tiny_vlm(tmp_path), []
    stage = Stage(name="s", plan="instruct", steps=4, batch_size=3, lr=1e-3, **settings)
    run = StageRun(vlm.model, renderer(vlm, pack=stage.pack), stage, mixture, tmp_path / "run",
                   console=Console(file=io.StringIO()))  # fmt: skip
    inner = run.objective
    run.objective = lambda model, batch: (seen.append(batch.input_ids.shape[1]), inner(model, batch))[1]
    run.fit()
    assert all(n == few(n) for n in seen) == few_widths, seen


def test_the_head_runs_on_few_numbers_of_rows_in_bfloat16(monkeypatch):
    """Rows of zeros behind the targets add nothing to losses or gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(151, 24, generator=generator).bfloat16()
    states, targets = torch.randn(37, 24, generator=generator).bfloat16(), torch.randint(0, 151, (37,))
    found, shapes = [], []
    for padded in (True, False):
        leaf, head = states.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
        with monkeypatch.context() as patch:
            if not padded:
                patch.setattr(module, "few", lambda n: n)
            shapes.append([])
            run = lambda x, head=head: (shapes[-1].append(len(x)), x @ head.T)[1]  # noqa: E731
            total, losses = module.cross_entropy(leaf, targets, run)
            total.backward()
        found.append((losses, leaf.grad, head.grad))
    assert shapes == [[1, 48], [1, 37]]
    for ours, plain in zip(*found, strict=True):
        assert ours.shape == plain.shape and (ours - plain).abs().max() <= 1e-2 * plain.abs().max()
    assert torch.equal(found[0][0], found[1][0])
