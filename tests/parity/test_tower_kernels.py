"""The compiled kernels of towers against the formulas in float64: attention, activations, and whole blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chiasm.encoders.text import TextEncoder
from chiasm.encoders.vit import ViT
from chiasm.nn import kernels
from chiasm.nn.mlp import MLP, activation
from chiasm.nn.norm import LayerNorm
from chiasm.nn.packed import Packed

pytestmark = pytest.mark.skipif(kernels.tower() is None, reason="no compiler, or a processor without bfloat16 products")
SHAPES = [(2, 50, 12, 64), (3, 7, 2, 16), (2, 77, 8, 64), (2, 65, 4, 72), (1, 2, 1, 2), (2, 33, 3, 88), (1, 768, 2, 32)]


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


@pytest.mark.parametrize("kind", ["all", "causal", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_the_formula(shape: tuple[int, int, int, int], kind: str):
    batch, length, count, width = shape
    q, k, v = (drawn(seed, batch, length, count * width) for seed in range(3))
    allowed = torch.ones(batch, 1, length, length, dtype=torch.bool)
    mask = None
    if kind == "causal":
        allowed = allowed.tril()
    if kind == "masked":
        mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(9)) > 0.4
        mask[:, 0] = True
        allowed = allowed & mask[:, None, None, :]
    found = kernels.attend(q, k, v, count, mask, kind == "causal").double()
    wide = [heads(x.double(), count) for x in (q, k, v)]
    scores = wide[0] @ wide[1].mT * width**-0.5
    wanted = (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ wide[2]).transpose(1, 2).flatten(2)
    # Shares and results are rounded to bfloat16, of 8 bits.
    assert (found - wanted).abs().max() <= 2**-8 * v.abs().max()
    assert (found - wanted).norm() <= 2**-8 * wanted.norm()


def test_what_is_no_number_is_not_hidden():
    q, k, v = (drawn(seed, 1, 9, 32) for seed in range(3))
    for broken in range(3):
        given = [q.clone(), k.clone(), v.clone()]
        given[broken][0, 4, 3] = torch.nan
        assert kernels.attend(*given, 2, None, False)[0, 4, :16].isnan().all() or broken == 2
        assert kernels.attend(*given, 2, None, False)[0, 4].isnan().any()
    blind = kernels.attend(q, k, v, 2, torch.zeros(1, 9, dtype=torch.bool), False)
    assert torch.equal(blind, torch.zeros_like(blind)), "who may see nothing gets zeros"


@pytest.mark.parametrize("name", list(kernels.ACTIVATIONS))
@pytest.mark.parametrize("count", [1, 16, 4095, 9000])
def test_activations_are_the_formulas(name: str, count: int):
    x = 4 * drawn(count, count)
    wanted = activation(name)(x.double())
    found = kernels.activate_(x.clone(), name).double()
    assert ((found - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6).all()  # rounded once
    assert kernels.activate_(torch.tensor([torch.nan]).bfloat16(), name).isnan().all()
    ends = torch.tensor([-3e38, -1e4, -130.0, -86.0, 86.0, 1e4, 3e38, torch.inf]).bfloat16()
    torch.testing.assert_close(kernels.activate_(ends.clone(), name), activation(name)(ends.float()).bfloat16())


@pytest.mark.parametrize("dim", [16, 40, 96, 1152])
def test_the_norm_is_the_formula(dim: int):
    x, weight, bias = 3 + 5 * drawn(1, 3, 7, dim), drawn(2, dim), drawn(3, dim)
    wide = x.double()
    unit = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    wanted = unit * weight.double() + bias.double()
    found = kernels.layer_norm(x, weight, bias, 1e-5).double()
    assert ((found - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5).all()  # rounded once
    x[0, 3, 1] = torch.nan
    assert torch.equal(kernels.layer_norm(x, weight, bias, 1e-5).isnan().any(-1), x.isnan().any(-1))
    norm = LayerNorm(dim).bfloat16()
    norm(x).float().nansum().backward()  # where a slope is wanted torch computes
    assert norm.weight.grad is not None


@torch.inference_mode()
def test_towers_with_and_without(monkeypatch: pytest.MonkeyPatch):
    """Whole towers in bfloat16 are no further from float32 with the kernels than without."""
    vision = ViT(ViT.Config(image_size=48, patch=16, dim=96, depth=3, heads=3, mlp=192, activation="quick_gelu"))
    text = TextEncoder(TextEncoder.Config(vocab=90, dim=96, depth=3, heads=3, mlp=192, positions=20))
    both = TextEncoder(TextEncoder.Config(vocab=90, dim=96, depth=3, heads=3, mlp=192, positions=20, causal=False))
    ids = torch.randint(0, 90, (5, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(20) < torch.tensor([20, 3, 11, 19, 7]).unsqueeze(1)
    for tower, given in ((vision, (drawn(1, 5, 3, 48, 48).float(),)), (text, (ids, mask)), (both, (ids, mask))):
        for i, p in enumerate(tower.parameters()):
            p.data += 0.15 * drawn(i, *p.shape).float()
        wide = tower(*given).x
        tower.bfloat16()
        low = [x.bfloat16() if x.is_floating_point() else x for x in given]
        kept = mask if len(given) == 2 else torch.ones(wide.shape[:2], dtype=torch.bool)
        ours = (tower(*low).x.float() - wide)[kept].norm()
        with monkeypatch.context() as without:
            without.setattr(kernels, "tower", lambda: None)
            plain = (tower(*low).x.float() - wide)[kept].norm()
        assert 0 < ours <= 1.05 * plain


def test_gradients_and_hooks_take_the_plain_way():
    mlp = MLP(8, 16, "quick_gelu").bfloat16()
    x = drawn(3, 2, 8)
    seen = []
    handle = mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        mlp(x)
        assert torch.equal(seen[0], F.linear(x, mlp.fc1.weight, mlp.fc1.bias)), "what a hook keeps is not written over"
    handle.remove()
    mlp(x).sum().backward()
    assert mlp.fc1.weight.grad is not None and bool(mlp.fc1.weight.grad.abs().sum() > 0)


def test_laid_out_weights_change_nothing():
    """Within a block they are kept, weights that were changed are laid out again, and hooks see their layer."""
    tower = ViT(ViT.Config(image_size=48, patch=16, dim=96, depth=2, heads=3, mlp=192, activation="quick_gelu"))
    for i, p in enumerate(tower.parameters()):
        p.data += 0.15 * drawn(i, *p.shape).float()
    tower.bfloat16()
    x, packed = drawn(1, 5, 3, 56, 50), Packed()  # some pixels lie beyond the last whole patch
    with torch.no_grad():
        plain = tower(x).x.float()
        with packed.used():
            kept = tower(x).x.float()
            assert len(packed.held) == 13 and (kept - plain).norm() < 0.02 * plain.norm()
            tower.blocks[0].mlp.fc2.weight.mul_(-1)
            assert (tower(x).x.float() - kept).norm() > 0.1 * plain.norm()
            tower.blocks[0].mlp.fc2.weight.mul_(-1)
            assert torch.equal(tower(x).x.float(), kept)
            seen = []
            handle = tower.blocks[0].attn.q.register_forward_hook(lambda module, args, out: seen.append(out))
            tower(x)
            handle.remove()
            assert len(seen) == 1
        before = dict(packed.held)
        tower(x)
        assert packed.held == before, "outside of the block nothing is kept"
