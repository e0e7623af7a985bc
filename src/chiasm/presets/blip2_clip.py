"""BLIP-2 with CLIP ViT-L/14 in place of EVA-CLIP: the smaller towers of the paper's tables.

Paper: BLIP-2 (arXiv:2301.12597). Reference: salesforce/LAVIS 506965b, ``clip_vit.py`` with ``vit_model: clip_L``.

The tower is built with 23 of its 24 blocks, so what it gives is the state after the last block but one; its class
vector is kept and CLIP's own last norm is not built. The norm that follows, ``encoders.image.post_norm``, is LAVIS's
``ln_vision``, which learns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chiasm.encoders.vit import ViT
from chiasm.model_config import VLMConfig
from chiasm.presets import evidence
from chiasm.presets.blip2 import (
    FLAN,
    OPT,
    QFORMER,
    STAGE_2,
    STAGE_2_T5,
    TINY,
    _system,
    blip2_flan_t5_xl,
    blip2_opt_27b,
)
from chiasm.presets.record import System, published

CLIP = {"image encoder": "MIT (CLIP)"}
BASE = {"encoders.image": "CLIP ViT-L/14", "connectors.image": "bert-base-uncased"}
COUNTED = (
    "transformers' `CLIPVisionModel` of 23 blocks, its Q-Former of BLIP-2 over width 1024 and its language model, and "
    "the queries and the projection by their formulas, built on the meta device"
)


def clip_l() -> ViT.Config:
    """CLIP ViT-L/14 as LAVIS cuts it."""
    sizes: dict[str, Any] = {"image_size": 224, "patch": 14, "dim": 1024, "depth": 23, "heads": 16, "mlp": 4096}
    kind = {"activation": "quick_gelu", "norm_eps": 1e-5, "patch_bias": False, "pre_norm": True}
    return ViT.Config(**(sizes | kind | {"select": "cls_patch"}))


def _clip(second: object) -> System:
    system = _system(second)  # type: ignore[arg-type]
    note = (
        "LAVIS configures the first stage (`blip2_pretrain_vitL`) and the second on Flan-T5-XL "
        "(`blip2_pretrain_flant5xl_vitL`) with this tower, and none on OPT."
    )
    return replace(system, choices=(*system.choices, note), verified=(evidence.CLIP, QFORMER, TINY))


@published(
    "blip2-clip-l-opt-2.7b",
    _clip(STAGE_2),
    base=BASE | {"lm": "facebook/opt-2.7b"},
    parameters=3_045_772_288,
    licences=OPT | CLIP,
    counted=COUNTED,
)
def blip2_clip_l_opt_27b() -> VLMConfig:
    """BLIP-2 on CLIP ViT-L/14 and OPT-2.7B."""
    return blip2_opt_27b().edit(**{"model.encoders.image": clip_l()})


@published(
    "blip2-clip-l-flan-t5-xl",
    _clip(STAGE_2_T5),
    base=BASE | {"lm": "google/flan-t5-xl"},
    parameters=3_243_538_944,
    licences=FLAN | CLIP,
    counted=COUNTED,
)
def blip2_clip_l_flan_t5_xl() -> VLMConfig:
    """BLIP-2 on CLIP ViT-L/14 and Flan-T5-XL."""
    return blip2_flan_t5_xl().edit(**{"model.encoders.image": clip_l()})
