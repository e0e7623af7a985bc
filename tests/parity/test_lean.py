"""The functions that keep less for the way back, against what autograd makes of their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chiasm.nn.mlp import activation, gated, gated_down
from chiasm.nn.norm import RMSNorm, _Lean


def tensors(*shape: int, dtype: torch.dtype = torch.float32, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def gradients(function, slope: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    result.backward(slope)
    return [result.detach(), *(x.grad for x in leaves)]


def test_norm_equals_autograd_in_float32():
    x, slope, _ = tensors(2, 5, 48)
    weight = torch.rand(48) + 0.5
    formula = lambda x, w: w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))  # noqa: E731
    given = x.clone()
    ours = gradients(lambda x, w: _Lean.apply(x, w, 1e-5), slope, x, weight)
    again = gradients(lambda x, w: _Lean.apply(given, w, 1e-5) + 0 * x, slope, x, weight)
    assert torch.equal(given, x) and torch.equal(again[2], ours[2])  # others read the input too: it stays as it is
    for a, b in zip(ours, gradients(formula, slope, x, weight), strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


def test_norm_in_bfloat16():
    """The same output bit by bit as without gradients; gradients no further from float32's than autograd's."""
    x, slope, _ = tensors(2, 5, 48, dtype=torch.bfloat16)
    norm = RMSNorm(48).bfloat16()
    norm.weight.data += 0.3 * tensors(48, dtype=torch.bfloat16, count=1)[0]
    with torch.no_grad():
        plain = norm(x)
    leaf = x.clone().requires_grad_()
    out = norm(leaf)
    out.backward(slope)
    assert torch.equal(out, plain)
    exact = gradients(
        lambda x, w: F.rms_norm(x, (48,), w, 1e-5), slope.float(), x.float(), norm.weight.detach().float()
    )
    assert (leaf.grad.float() - exact[1]).norm() <= 5e-3 * exact[1].norm()
    assert (norm.weight.grad.float() - exact[2]).norm() <= 5e-3 * exact[2].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_equals_autograd(dtype: torch.dtype):
    gate, up, slope = tensors(2, 5, 48, dtype=dtype)
    assert activation("silu") is F.silu
    ours = gradients(lambda g, u: gated(g, u, F.silu), slope, gate, up)
    theirs = gradients(lambda g, u: F.silu(g) * u, slope, gate, up)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= (1e-6 if dtype == torch.float32 else 2e-2) * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_and_projected_equals_autograd(dtype: torch.dtype):
    """With the layer's input computed again: output bit by bit, gradients, and nothing kept but gate and up."""
    gate, up, slope = tensors(2, 5, 48, dtype=dtype)
    down = torch.nn.Linear(48, 24, bias=False).to(dtype)
    slope = slope[..., :24]
    found = []
    for function in (lambda g, u: gated_down(g, u, down, F.silu), lambda g, u: down(F.silu(g) * u)):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            found.append([*gradients(function, slope, gate, up), down.weight.grad])
        down.zero_grad(set_to_none=True)
        found[-1].append(sum(kept))
    assert found[0].pop() == 2 * gate.numel() + down.weight.numel() < found[1].pop()
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= (1e-6 if dtype == torch.float32 else 2e-2) * b.abs().max()


def test_a_layer_that_is_looked_at_frozen_or_another_runs_as_it_is():
    gate, up, _ = tensors(2, 5, 48)
    seen = []
    for change in ("hook", "frozen", "bias", "kind"):
        down = (torch.nn.Linear if change != "kind" else type("Mine", (torch.nn.Linear,), {}))(48, 24, change == "bias")
        down.weight.requires_grad_(change != "frozen")
        if change == "hook":
            down.register_forward_hook(lambda *_: seen.append(1))
        leaf = gate.clone().requires_grad_()
        result = gated_down(leaf, up, down, F.silu)
        assert "GatedDown" not in type(result.grad_fn).__name__, change
        assert torch.equal(result, down(F.silu(gate) * up))
    assert seen


def test_other_activations_are_not_taken_for_silu():
    gate, up, slope = tensors(2, 5, 48)
    ours = gradients(lambda g, u: gated(g, u, F.gelu), slope, gate, up)
    for a, b in zip(ours, gradients(lambda g, u: F.gelu(g) * u, slope, gate, up), strict=True):
        assert torch.equal(a, b)
