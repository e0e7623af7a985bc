"""Muon against torch's own, and what it is given."""

from __future__ import annotations

import torch
from tiny_run import model_config
from torch import nn

from chiasm.train.muon import Muon, matrices, orthogonal
from chiasm.vlm import build


def test_singular_values_come_near_one_and_directions_stay():
    for shape in [(8, 24), (24, 8), (16, 16)]:
        x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        inside = u.mT @ orthogonal(x) @ v.mT  # [3, K, K]
        values = inside.diagonal(dim1=-2, dim2=-1)
        assert values.min() > 0.6 and values.max() < 1.3
        assert (inside - torch.diag_embed(values)).abs().max() < 1e-4


def test_steps_equal_those_of_torch_up_to_its_bfloat16():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(24, 48, bias=False), nn.Linear(24, 48, bias=False)
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    group = {"params": [ours.weight], "lr": 0.01, "weight_decay": 0.1, "matrices": True}
    mine = Muon([group], fused=True)
    reference = torch.optim.Muon([theirs.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        gradient = torch.randn(48, 24, generator=torch.Generator().manual_seed(step))
        ours.weight.grad, theirs.weight.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
        assert ours.weight.grad is None  # used up: AdamW must not step it again
    moved = (theirs.weight - start).norm()
    assert moved > 0.1 and (ours.weight - theirs.weight).norm() < 0.02 * moved


def test_embeddings_heads_and_vectors_stay_with_adamw():
    model = build(model_config()).model
    names = matrices(model)
    assert "lm.layers.0.attn.q_proj.weight" in names and "connectors.image.layers.0.weight" in names
    assert not {n for n in names if "embedding" in n or "lm_head" in n or n.endswith("bias") or "norm" in n}
    assert names <= {n for n, p in model.named_parameters() if p.ndim == 2}
