"""CLIP's residual network and its pooling, against the published formulas written out here over its state dict.

openai/CLIP's own class, run beside ours once with these weights, gave the same logits within 4e-7; it is no dependency.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from towers_kit import filled
from weights import lively

from chiasm.compose import build_model
from chiasm.convert import maps_towers
from chiasm.convert.engine import export_tensors
from chiasm.fusion.dual_tower import DualTower

WIDTH, BLOCKS, DIM, HEADS, SIDE = 8, (1, 2, 1, 1), 24, 4, 64


def config() -> DualTower.Config:
    text = {"type": "text", "vocab": 40, "dim": 16, "depth": 1, "heads": 2, "mlp": 32, "positions": 8}
    return DualTower.Config.parse(
        {
            "dim": DIM,
            "encoders": {
                "image": {"type": "resnet", "image_size": SIDE, "blocks": BLOCKS, "width": WIDTH},
                "text": text,
            },
            "connectors": {
                "image": {"type": "clip_pool", "grid": [2, 2], "heads": HEADS},
                "text": {"type": "pooled", "pool": "last"},
            },
        }
    )


def published(state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """``encode_image`` of the paper's code, by names of its state dict."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[name + ".running_mean"], state[name + ".running_var"]
        weight = state[name + ".weight"] / torch.sqrt(var + 1e-5)
        return (x - mean[:, None, None]) * weight[:, None, None] + state[name + ".bias"][:, None, None]

    def block(x: Tensor, name: str, stride: int) -> Tensor:
        y = F.relu(norm(F.conv2d(x, state[name + ".conv1.weight"]), name + ".bn1"))
        y = F.relu(norm(F.conv2d(y, state[name + ".conv2.weight"], padding=1), name + ".bn2"))
        y = norm(F.conv2d(F.avg_pool2d(y, stride), state[name + ".conv3.weight"]), name + ".bn3")
        if name + ".downsample.0.weight" in state:
            x = norm(F.conv2d(F.avg_pool2d(x, stride), state[name + ".downsample.0.weight"]), name + ".downsample.1")
        return F.relu(x + y)

    def run(x: Tensor) -> Tensor:
        for n, stride in ((1, 2), (2, 1), (3, 1)):
            x = F.relu(norm(F.conv2d(x, state[f"visual.conv{n}.weight"], stride=stride, padding=1), f"visual.bn{n}"))
        x = F.avg_pool2d(x, 2)
        for n, count in enumerate(BLOCKS):
            for i in range(count):
                x = block(x, f"visual.layer{n + 1}.{i}", 2 if n and not i else 1)
        x = x.flatten(2).permute(2, 0, 1)  # [places, U, C]
        pool = {k.removeprefix("visual.attnpool."): v for k, v in state.items() if k.startswith("visual.attnpool.")}
        x = torch.cat((x.mean(0, keepdim=True), x)) + pool["positional_embedding"][:, None]
        mixed, _ = F.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], HEADS, None,
            torch.cat([pool[f"{n}_proj.bias"] for n in "qkv"]), None, None, False, 0.0,
            pool["c_proj.weight"], pool["c_proj.bias"], training=False, use_separate_proj_weight=True,
            q_proj_weight=pool["q_proj.weight"], k_proj_weight=pool["k_proj.weight"],
            v_proj_weight=pool["v_proj.weight"],
        )  # fmt: skip
        return mixed[0]

    return run


def test_equals_the_published_formula(rng: torch.Generator):
    source = lively(build_model(config()), seed=5).double()
    state = export_tensors(source.state_dict(), maps_towers.clip_openai_resnet())
    model = filled(build_model(config()).double(), state, maps_towers.clip_openai_resnet())
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=rng).double()
    with torch.no_grad():
        got = model.connectors["image"](model.encoders["image"](pixels)).x[:, 0]  # type: ignore[index, union-attr]
        expected = published(state)(pixels)
    assert expected.std(0).min() > 1e-3  # pictures differ
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("side", [64, 96])
def test_another_size_moves_positions(side: int, rng: torch.Generator):
    model = lively(build_model(config()), seed=5)
    pixels = torch.randn(2, 3, side, side, generator=rng)
    with torch.no_grad():
        x = model.connectors["image"](model.encoders["image"](pixels)).x  # type: ignore[index, union-attr]
    assert x.shape == (2, 1, DIM) and x.isfinite().all()
