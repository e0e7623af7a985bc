"""SigLIP 2 at any size and proportions (NaFlex): the published sizes.

Paper: SigLIP 2 (arXiv:2502.14786, section 2.4). Reference: google-research/big_vision; ``Siglip2Model`` of transformers
5.23. A picture has as many patches as ``processing.media.image.patches`` allows, 256 as published; the same checkpoint
reads more (the paper evaluates up to 1,024).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from chiasm.model_config import VLMConfig
from chiasm.presets.towers import SIGLIP_2, enter

SIZES = {  # width, blocks, heads, width of the perceptron; parameters
    "b16": ((768, 12, 12, 3072), 375_234_050),
    "so400m-16": ((1152, 27, 16, 4304), 1_135_670_962),
}


def _naflex(dim: int, depth: int, heads: int, mlp: int) -> VLMConfig:
    sizes: dict[str, Any] = {"dim": dim, "depth": depth, "heads": heads, "mlp": mlp, "activation": "gelu_tanh"}
    text = {"type": "text", "vocab": 256000, "positions": 64, "norm_eps": 1e-6, "causal": False}
    return VLMConfig.parse(
        {
            "model": {
                "type": "dual_tower",
                "dim": dim,
                "encoders": {"image": {"type": "naflex", **sizes}, "text": {**text, **sizes}},
                "connectors": {
                    "image": {"type": "map_head", "heads": heads, "mlp": mlp},
                    "text": {"type": "pooled", "pool": "last", "project": "linear_bias"},
                },
                "scale_init": 10.0,
                "max_scale": None,
                "bias_init": -10.0,
            },
            "processing": {
                "template": {"type": "pair", "length": 64, "fill": True, "clean": "lower"},
                "media": {"image": {"type": "naflex", "placeholder": None}},
            },
        }
    )


for _name, (_sizes, _count) in SIZES.items():
    enter(
        f"siglip2-{_name}-naflex", SIGLIP_2, _count,
        f"SigLIP 2 {_name} at any size and proportions (NaFlex), many languages.", partial(_naflex, *_sizes),
    )  # fmt: skip
