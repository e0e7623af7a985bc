"""The plain vision transformer with a head of 1,000 classes, at every published size.

Paper: ViT (arXiv:2010.11929). Reference: google-research/vision_transformer c6de1e5.
"""

from __future__ import annotations

from functools import partial

from chiasm.model_config import VLMConfig
from chiasm.presets.record import System
from chiasm.presets.towers import LICENCES, READ_CLASS, WEB, enter, front_end, stage

VIT = System(
    family="ViT",
    paper="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale (arXiv:2010.11929)",
    arxiv="2010.11929",
    released="2020-10",
    reference="google-research/vision_transformer, c6de1e5; transformers 5.23",
    stages=(
        stage(
            name="fine-tune",
            data=("ImageNet-1k, after ImageNet-21k or JFT-300M",),
            lr=0.03,
            batch=512,
            max_length=None,
            source="the authors' README: SGD with momentum, 20,000 steps, gradients clipped at 1",
            warmup=500,
        ),
    ),
    differences=(
        "Pictures are resized with antialiasing (Pillow), as in transformers; the authors' TensorFlow resize has none, "
        "which moves pixels by about 1e-2.",
        "The exact GELU, as in transformers; the authors' flax code has its tanh form, up to 4.7e-4 away.",
    ),
    verified=(
        "Logits and loss of a small random model within 1e-5 of transformers', folders in and out. "
        "`tests/parity/test_classifier.py`",
    ),
)
LICENCES["ViT"] = WEB | {"reference code and weights": "Apache-2.0 (Google)"}
_VITS = {"ti": (192, 12, 3, 768), "s": (384, 12, 6, 1536), "b": (768, 12, 12, 3072), "l": (1024, 24, 16, 4096),
         "h": (1280, 32, 16, 5120)}  # fmt: skip


def _vit(net: str, patch: int, size: int) -> VLMConfig:
    dim, depth, heads, mlp = _VITS[net]
    sizes = {"image_size": size, "patch": patch, "dim": dim, "depth": depth, "heads": heads, "mlp": mlp}
    return VLMConfig.parse(
        {
            "model": {
                "type": "classifier",
                "encoders": {"image": {"type": "vit", **sizes, **READ_CLASS}},
                "connectors": {"image": {"type": "pooled", "pool": "first", "project": "linear_bias"}},
                "classes": 1000,
            },
            "processing": {
                "template": {"type": "pair", "read": "none"},
                "media": {"image": front_end(size, "squash", (0.5,) * 3, (0.5,) * 3, resample="bilinear")},
            },
        }
    )


for (_net, _patch, _size), _count in {
    ("ti", 16, 224): 5_717_416, ("s", 16, 224): 22_050_664, ("b", 16, 224): 86_567_656, ("b", 32, 224): 88_224_232,
    ("l", 16, 224): 304_326_632, ("l", 32, 224): 306_535_400, ("h", 14, 224): 632_045_800,
    ("b", 16, 384): 86_859_496, ("b", 32, 384): 88_297_192, ("l", 16, 384): 304_715_752, ("l", 32, 384): 306_632_680,
}.items():  # fmt: skip
    _words = f"The plain vision transformer {_net.title()}/{_patch} at {_size} pixels with a head of 1,000 classes."
    enter(f"vit-{_net}{_patch}-{_size}", VIT, _count, _words, partial(_vit, _net, _patch, _size))
