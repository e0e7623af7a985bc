"""LLaVA-OneVision: one model for single pictures, several pictures and clips.

Paper: LLaVA-OneVision: Easy Visual Task Transfer (arXiv:2408.03326). Reference: LLaVA-VL/LLaVA-NeXT df17966.
"""

from __future__ import annotations

from chiasm.model_config import VLMConfig
from chiasm.presets import evidence
from chiasm.presets.llava import LCS_558K, SHARED
from chiasm.presets.llava_next import (
    EVERYTHING,
    FALLBACK,
    HALF,
    NEXT_CODE,
    QWEN_MASK,
    SIGLIP,
    TOWER,
    llava_next_interleave_7b,
)
from chiasm.presets.lms import qwen2_05b, qwen2_7b, qwen2_72b
from chiasm.presets.record import SIGLIP_LICENCE, Stage, System, published
from chiasm.processing.tiling import pinpoints


def _stage(name: str, data: str) -> Stage:
    """The three stages after the first differ in their data alone."""
    return Stage(
        name=name,
        data=(data,),
        trains=EVERYTHING,
        rates=TOWER,
        lr=1e-5,
        batch=256,
        epochs=1,
        max_length=32768,
        template="qwen_1_5",
        source="scripts/train/finetune_{si,ov}.sh (batch: their comments)",
    )


ONEVISION = System(
    family="LLaVA-OneVision",
    paper="LLaVA-OneVision: Easy Visual Task Transfer (arXiv:2408.03326)",
    arxiv="2408.03326",
    released="2024-08",
    reference=NEXT_CODE,
    verified=(*evidence.IN_CLASS, evidence.SIGLIP, *evidence.TILED[1:], evidence.FRAMES),
    stages=(
        Stage(
            name="align",
            data=(LCS_558K,),
            trains=("connectors.*",),
            lr=1e-3,
            batch=512,
            epochs=1,
            max_length=8192,
            template="plain",
            source="scripts/train/pretrain_siglip.sh; the batch from the paper, as remembered",
        ),
        _stage("knowledge", "4M: captions written anew, documents, Chinese, text"),
        _stage("single picture", "3.2M conversations over one picture"),
        _stage("onevision", "1.6M: 800K single pictures again, 560K over several pictures, 350K clips"),
    ),
    differences=(
        *SHARED,
        FALLBACK,
        QWEN_MASK,
        "The size of a shrunk map is at least 1 x 1; the authors fail on proportions beyond about 1:1000.",
    ),
    choices=(
        "A clip ends with one newline vector, as in the released models. The authors' present default puts one after "
        "each row of each frame (LLaVA-Video's way): `model.media.video.merge.newline=grid`.",
    ),
)


@published(
    "llava-onevision-7b",
    ONEVISION,
    base={"encoders.image": SIGLIP, "lm": "Qwen/Qwen2-7B-Instruct"},
    parameters=8_030_348_832,
    transformers=(8_030_807_584, 152128),
    licences=SIGLIP_LICENCE | {"language model": "Apache-2.0 (Qwen2-7B)"},
)
def llava_onevision_7b() -> VLMConfig:
    """LLaVA-OneVision on Qwen2-7B: up to 6 x 6 tiles shrunk to nine tiles' worth; 14 x 14 vectors a frame."""
    frames = {"encoders": ["image"], "connector": "image", "merge": {"type": "frames", "newline": "one_token"}}
    halve = {"pool": {"mode": "bilinear", "stride": 2}, "pool_at": "after"}
    squash = {"type": "image", "size": 384, "fit": "squash", "mean": HALF, "std": HALF}
    return llava_next_interleave_7b().edit(
        **{
            "model.lm": qwen2_7b(),
            "model.media.image.merge": {"type": "spatial_unpad", "rounding": "trunc", "max_tiles": 9},
            "model.media.video": frames | halve,
            "processing.media.image.tiling": {"pinpoints": pinpoints("(1x1),...,(6x6)", 384), "axes": "wh"},
            "processing.media.image.several": "pad",
            "processing.media.video": {"type": "video", "frames": 32, "image": squash},
        }
    )


@published(
    "llava-onevision-0.5b",
    ONEVISION,
    base={"encoders.image": SIGLIP, "lm": "Qwen/Qwen2-0.5B-Instruct"},
    parameters=893_618_208,
    transformers=(893_675_552, 152000),
    licences=SIGLIP_LICENCE | {"language model": "Apache-2.0 (Qwen2-0.5B)"},
    notes=("The head is the embedding (tied), and counted once.",),
)
def llava_onevision_05b() -> VLMConfig:
    """LLaVA-OneVision on Qwen2-0.5B."""
    return llava_onevision_7b().edit(**{"model.lm": qwen2_05b()})


@published(
    "llava-onevision-72b",
    ONEVISION,
    base={"encoders.image": SIGLIP, "lm": "Qwen/Qwen2-72B-Instruct"},
    parameters=73_180_522_016,
    transformers=(73_181_570_592, 152128),
    licences=SIGLIP_LICENCE | {"language model": "Tongyi Qianwen License (Qwen2-72B)"},
)
def llava_onevision_72b() -> VLMConfig:
    """LLaVA-OneVision on Qwen2-72B."""
    return llava_onevision_7b().edit(**{"model.lm": qwen2_72b()})
