"""Attention inside the pieces of packed rows against the block-diagonal mask it replaces."""

from __future__ import annotations

import pytest
import torch

from chiasm.nn.masks import Attend, causal, causal_mask, runs

ROWS = {
    "packed": [[1] * 7 + [2] * 3 + [3] * 5],
    "two rows": [[1] * 5 + [2] * 10, [1] * 12 + [2] + [0] * 2],
    "left padding": [[0] * 4 + [1] * 11, [1] * 15],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_masked_form(name: str, dtype: torch.dtype):
    segments = torch.tensor(ROWS[name])
    positions = torch.zeros_like(segments)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(len(segments), h, 15, 8, generator=generator).to(dtype) for h in (4, 2, 2)]
    slope = torch.randn(len(segments), 4, 15, 8, generator=generator).to(dtype) * (segments != 0)[:, None, :, None]
    found = []
    for attend in (causal(segments, positions), Attend(mask=causal_mask(segments, positions, segments, positions))):
        inputs = [v.clone().requires_grad_() for v in values]
        result = attend(*inputs)
        result.backward(slope)
        found.append([result * (segments != 0)[:, None, :, None], *(i.grad for i in inputs)])
    assert causal(segments, positions).runs
    bound = 1e-6 if dtype == torch.float32 else 3e-2
    for ours, reference in zip(*found, strict=True):
        assert (ours - reference).abs().max() <= bound * reference.abs().max()


def test_a_torn_segment_keeps_the_mask():
    segments = torch.tensor([[1, 1, 2, 2, 1]])
    assert runs(segments) == () and causal(segments, torch.zeros_like(segments)).mask is not None


def test_a_window_keeps_the_mask():
    segments = torch.tensor([[1, 1, 1, 2, 2]])
    assert causal(segments, torch.tensor([[0, 1, 2, 0, 1]]), window=2).mask is not None
