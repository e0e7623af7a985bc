"""Two towers against transformers: features, embeddings, logits, gradients of the contrastive loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from towers_kit import SIZE, batch, filled, hf_align, hf_clip, hf_siglip
from weights import lively

from chiasm.compose import build_model
from chiasm.convert import maps_towers
from chiasm.fusion.dual_tower import DualTower

VIT = {"type": "vit", "image_size": SIZE, "patch": 8, "depth": 2, "post_norm": "applied"}


def clip() -> DualTower.Config:
    return DualTower.Config.parse(
        {
            "dim": 32,
            "encoders": {
                "image": {
                    **VIT, "dim": 48, "heads": 4, "mlp": 96, "activation": "quick_gelu", "norm_eps": 1e-5,
                    "patch_bias": False, "pre_norm": True, "select": "cls",
                },
                "text": {"type": "text", "vocab": 100, "dim": 64, "depth": 2, "heads": 4, "mlp": 128, "positions": 20},
            },
            "connectors": {"image": {"type": "pooled"}, "text": {"type": "pooled", "pool": "last"}},
        }
    )  # fmt: skip


def siglip() -> DualTower.Config:
    text = {
        "type": "text", "vocab": 50, "dim": 32, "depth": 2, "heads": 2, "mlp": 64, "positions": 16,
        "activation": "gelu_tanh", "norm_eps": 1e-6, "causal": False,
    }  # fmt: skip
    return DualTower.Config.parse(
        {
            "dim": 32, "max_scale": None, "bias_init": -10.0, "scale_init": 10.0,
            "encoders": {
                "image": {**VIT, "dim": 32, "heads": 2, "mlp": 64, "activation": "gelu_tanh", "cls": False},
                "text": text,
            },
            "connectors": {
                "image": {"type": "map_head", "heads": 2, "mlp": 64},
                "text": {"type": "pooled", "pool": "last", "project": "linear_bias"},
            },
        }
    )  # fmt: skip


def align() -> DualTower.Config:
    text = {"type": "bert", "vocab": 50, "dim": 32, "depth": 2, "heads": 2, "mlp": 64, "positions": 32}
    stages = [
        {"channels": 16, "expand": 1},
        {"channels": 24, "kernel": 5, "stride": 2, "repeats": 2, "expand": 6},
        {"channels": 32, "stride": 2, "expand": 4},
    ]
    image = {
        "type": "efficientnet", "image_size": SIZE, "width": 0.5, "depth": 1.2, "stages": stages, "square_padding": [4]
    }  # fmt: skip
    return DualTower.Config.parse(
        {
            "dim": 16, "max_scale": None, "scale": "divisor", "scale_init": 1.0,
            "encoders": {"image": image, "text": {**text, "pooler": "unused"}},
            "connectors": {
                "image": {"type": "pooled", "pool": "mean", "project": "none"},
                "text": {"type": "pooled", "pool": "first", "project": "linear_bias"},
            },
        }
    )  # fmt: skip


CASES: dict[str, Any] = {
    "clip": (clip, hf_clip, maps_towers.clip_hf, [[98, 5, 6, 7, 99], [98, 9, 99], [98, 1, 2, 3, 4, 5, 99]]),
    "align": (align, hf_align, maps_towers.align_hf, [[2, 5, 6, 7, 3], [2, 9, 3], [2, 1, 2, 3, 4, 5, 3]]),
    "siglip": (siglip, hf_siglip, maps_towers.siglip_hf, [[5, 6, 1, *[1] * 13], [8, 9, 7, 1, *[1] * 12]]),
}


@pytest.mark.parametrize("name", CASES)
def test_embeddings_and_logits(name: str, rng: torch.Generator):
    config, theirs, rules, texts = CASES[name]
    hf = lively(theirs())
    model = build_model(config())
    filled(model, hf.state_dict(), rules())
    given = batch(torch.randn(3, 3, SIZE, SIZE, generator=rng), texts)
    mask = None if name == "siglip" else given.segment_ids
    with torch.no_grad():
        if name == "align":
            hf.temperature.fill_(0.05)
            model.temperature.fill_(0.05)
        expected = hf(pixel_values=given.media["image"].inputs, input_ids=given.input_ids, attention_mask=mask)
        out = model(given)
    assert expected.logits_per_image.std(0).min() > 1e-3  # pictures differ
    torch.testing.assert_close(out.named["image/embeds"], expected.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.named["text/embeds"], expected.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.named["logits_per_image"], expected.logits_per_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.named["logits_per_text"], expected.logits_per_text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.embed_images(given), expected.image_embeds, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in hf.parameters())


def test_fresh_towers_start_as_openai_publishes_them():
    """CLIP from nothing: deviations by the published formulas, not those of the port, where two are exchanged."""
    torch.manual_seed(0)
    dim, depth = 256, 4
    values = clip().dump()
    values["encoders"]["image"].update(dim=dim, heads=4, mlp=4 * dim, depth=depth, image_size=64, patch=8)
    values["encoders"]["text"].update(dim=dim, heads=4, mlp=4 * dim, depth=depth, vocab=2000, positions=77)
    model = build_model(DualTower.Config.parse(values))
    found = {name: float(tensor.detach().std()) for name, tensor in model.named_parameters() if tensor.ndim > 1}
    layer = torch.nn.MultiheadAttention(dim, 4)
    expected = {
        "encoders.text.embedding.weight": 0.02,
        "encoders.text.positions": 0.01,
        "encoders.text.blocks.1.attn.q.weight": dim**-0.5,
        "encoders.text.blocks.1.attn.out.weight": dim**-0.5 * (2 * depth) ** -0.5,
        "encoders.text.blocks.1.mlp.fc1.weight": (2 * dim) ** -0.5,
        "encoders.text.blocks.1.mlp.fc2.weight": dim**-0.5 * (2 * depth) ** -0.5,
        "connectors.text.proj.weight": dim**-0.5,
        "connectors.image.proj.weight": dim**-0.5,
        "encoders.image.positions": dim**-0.5,
        "encoders.image.blocks.2.attn.q.weight": float(layer.in_proj_weight.detach().std()),
        "encoders.image.blocks.2.attn.out.weight": float(layer.out_proj.weight.detach().std()),
        "encoders.image.blocks.2.mlp.fc1.weight": float(torch.nn.Linear(dim, 4 * dim).weight.detach().std()),
    }
    for name, deviation in expected.items():
        assert found[name] == pytest.approx(deviation, rel=0.03), name
    assert float(model.scale().detach()) == pytest.approx(1 / 0.07, rel=1e-5)
