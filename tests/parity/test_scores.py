"""Attention written out against torch's kernel and against float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chiasm.nn.scores import _Written, attention


def values(dtype: torch.dtype, heads: int, kv_heads: int, length: int = 33) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, 16), (2, kv_heads, length, 16), (2, kv_heads, length, 16), (2, heads, length, 16)]
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def run(function, q, k, v, slope) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    result = function(*inputs)
    result.backward(slope)
    return [result.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [33, 32, 2])  # filled up by 15, by nothing, by 14
def test_written_out_equals_the_kernel(causal: bool, kv_heads: int, length: int):
    """In float32 the two are one function; forwards and backwards."""
    tensors = values(torch.float32, 4, kv_heads, length)
    ours = run(lambda *x: _Written.apply(*x, causal), *tensors)
    theirs = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True), *tensors)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_is_about_as_near_to_float32_as_eager_attention(causal: bool):
    tensors = values(torch.bfloat16, 4, 2)
    exact = run(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True),
        *(x.float() for x in tensors),
    )

    def eager(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = q @ k.mT * 16**-0.5
        if causal:
            scores = scores + torch.full((33, 33), float("-inf"), dtype=scores.dtype).triu(1)
        return scores.float().softmax(-1).to(q.dtype) @ v

    ours, theirs = run(lambda q, k, v: attention(q, k, v, causal), *tensors), run(eager, *tensors)
    for a, b, reference in zip(ours, theirs, exact, strict=True):
        assert (a.float() - reference).norm() <= 1.25 * (b.float() - reference).norm()
