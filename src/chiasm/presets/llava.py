"""LLaVA-1, LLaVA-1.5 and LLaVA-1.5-HD: a CLIP tower, a small connector, a Vicuna.

Papers: Visual Instruction Tuning (arXiv:2304.08485); Improved Baselines with Visual Instruction Tuning
(arXiv:2310.03744). Reference: haotian-liu/LLaVA c121f04.
"""

from __future__ import annotations

from chiasm.encoders.vit import clip_vit_l14, clip_vit_l14_336
from chiasm.model_config import VLMConfig
from chiasm.presets import evidence
from chiasm.presets.lms import vicuna_7b, vicuna_13b
from chiasm.presets.record import CLIP_LICENCE, Stage, System, published

CODE = "haotian-liu/LLaVA, c121f04"
CONNECTOR, LANGUAGE = ("connectors.*",), ("connectors.*", "lm.*")
VICUNA = CLIP_LICENCE | {"language model": "Llama 2 Community License (Vicuna v1.5)"}
LCS_558K = "LCS-558K: pictures of LAION, CC and SBU with BLIP captions"
SLOTS = "A picture's slots are counted and laid out before the model runs; the authors splice inside the model."
DUMMY = "A sample without a picture needs no dummy picture."
CUT = "A conversation that is too long is never cut inside a picture; the authors cut at the right, whatever it hits."
MASK = (
    "The loss mask is made while the conversation is rendered. The authors search the text afterwards, and drop a "
    "whole sample (all labels masked) where the search disagrees with the tokenizer."
)
SHARED = (SLOTS, DUMMY, CUT, MASK)

LLAVA_1 = System(
    family="LLaVA-1",
    paper="Visual Instruction Tuning (arXiv:2304.08485)",
    arxiv="2304.08485",
    released="2023-04",
    reference=CODE,
    stages=(
        Stage(
            name="align",
            data=("CC3M-595K: filtered captions of CC3M",),
            trains=CONNECTOR,
            lr=2e-3,
            batch=128,
            epochs=1,
            max_length=2048,
            template="plain",
            source="scripts/pretrain.sh; the README of v1.0.1",
        ),
        Stage(
            name="instruct",
            data=("LLaVA-Instruct-158K: 58K conversations, 23K descriptions, 77K reasoning",),
            trains=LANGUAGE,
            lr=2e-5,
            batch=32,
            epochs=3,
            max_length=2048,
            template="v0_train",
            source="scripts/finetune_full_schedule.sh; the README of v1.0.1",
        ),
    ),
    differences=(
        *SHARED,
        "The first release spelled a picture as 256 added tokens between two others, and so had more rows of "
        "vocabulary. The preset takes the form of release 1.0.0, which splices: 32000 rows, nothing added.",
        "The authors train on one form of the v0 prompt (line breaks after the turns) and infer with another (none). "
        "Here one template serves both: the second, `llava_v0`; `processing.template=v0_train` gives the first.",
        "The authors' mask of the v0 prompt leaves two tokens of each human turn, and drifts by one token a turn. "
        "Here answers are learned from, and nothing else.",
    ),
    verified=evidence.SINGLE,
)

LLAVA_15 = System(
    family="LLaVA-1.5",
    paper="Improved Baselines with Visual Instruction Tuning (arXiv:2310.03744)",
    arxiv="2310.03744",
    released="2023-10",
    reference=CODE,
    verified=(*evidence.IN_CLASS, *evidence.SINGLE),
    stages=(
        Stage(
            name="align",
            data=(LCS_558K,),
            trains=CONNECTOR,
            lr=1e-3,
            batch=256,
            epochs=1,
            max_length=2048,
            template="plain",
            source="scripts/v1_5/pretrain.sh",
        ),
        Stage(
            name="instruct",
            data=("LLaVA-Mix-665K: Instruct-158K, ShareGPT, and academic questions with a format prompt",),
            trains=LANGUAGE,
            lr=2e-5,
            batch=128,
            epochs=1,
            max_length=2048,
            template="vicuna_v1",
            source="scripts/v1_5/finetune.sh",
        ),
    ),
    differences=(
        *SHARED,
        "Both stages pad pictures to a square. The authors' script of the first stage sets no aspect ratio, and so "
        "crops.",
    ),
)

LLAVA_15_HD = System(
    family="LLaVA-1.5-HD",
    paper="Improved Baselines with Visual Instruction Tuning (arXiv:2310.03744), section on higher resolution",
    arxiv="2310.03744",
    released="2023-10",
    reference="none: neither code nor weights were published",
    stages=LLAVA_15.stages,
    differences=SHARED,
    choices=(
        "Grids: 1x1 to 1x6, 2x2, 2x3 and their transposes, of tiles of 224 pixels: all grids of at most six tiles "
        "that the paper allows. Of equally good grids the first in that order wins.",
        "Tiles are laid out, unpadded and ended by a row vector exactly as LLaVA-NeXT's code does, which is the "
        "published successor of the idea; the low-resolution picture comes first, stretched, as there.",
        "The recipe is that of LLaVA-1.5; the paper gives no other.",
    ),
    verified=evidence.TILED,
)


@published(
    "llava-1-7b",
    LLAVA_1,
    base={"encoders.image": "openai/clip-vit-large-patch14", "lm": "Vicuna-7B v0 (LLaMA-7B)"},
    parameters=7_045_793_792,
    counted="the sum of transformers' CLIPVisionModel and LlamaForCausalLM and of 1025 x 4096 for the connector",
    licences=CLIP_LICENCE | {"language model": "LLaMA licence, non-commercial (Vicuna v0)"},
    notes=("The transformers layout cannot hold a linear connector: there is no export to it.",),
)
def llava_1_7b() -> VLMConfig:
    """LLaVA-1 on Vicuna-7B: 16 x 16 patches of a 224-pixel crop, one linear layer."""
    return VLMConfig.parse(
        {
            "model": {
                "type": "splice",
                "encoders": {"image": clip_vit_l14()},
                "connectors": {"image": {"type": "linear"}},
                "lm": vicuna_7b(max_positions=2048),
                "media": {"image": {"encoders": ["image"], "connector": "image", "merge": {"type": "flat"}}},
            },
            "processing": {
                "template": "llava_v0",
                "media": {"image": {"type": "image", "size": 224, "fit": "crop"}},
                "max_length": 2048,
            },
        }
    )


@published(
    "llava-1-13b",
    LLAVA_1,
    base={"encoders.image": "openai/clip-vit-large-patch14", "lm": "Vicuna-13B v0 (LLaMA-13B)"},
    parameters=13_324_292_096,
    counted="the sum of transformers' CLIPVisionModel and LlamaForCausalLM and of 1025 x 5120 for the connector",
    licences=CLIP_LICENCE | {"language model": "LLaMA licence, non-commercial (Vicuna v0)"},
    notes=("The transformers layout cannot hold a linear connector: there is no export to it.",),
)
def llava_1_13b() -> VLMConfig:
    """LLaVA-1 on Vicuna-13B."""
    return llava_1_7b().edit(**{"model.lm": vicuna_13b(max_positions=2048)})


@published(
    "llava-1.5-7b",
    LLAVA_15,
    base={"encoders.image": "openai/clip-vit-large-patch14-336", "lm": "lmsys/vicuna-7b-v1.5"},
    parameters=7_062_902_784,
    transformers=(7_063_427_072, 32064),
    licences=VICUNA,
)
def llava_15_7b() -> VLMConfig:
    """LLaVA-1.5 on Vicuna-7B: 24 x 24 patches of a picture padded to a square, two layers between."""
    return llava_1_7b().edit(
        **{
            "model.encoders.image": clip_vit_l14_336(),
            "model.connectors.image": {"type": "mlp", "depth": 2, "activation": "gelu"},
            "model.lm": vicuna_7b(),
            "processing.template": "vicuna_v1",
            "processing.media.image.size": 336,
            "processing.media.image.fit": "pad",
            "processing.media.image.pad_color": "mean",
        }
    )


@published(
    "llava-1.5-13b",
    LLAVA_15,
    base={"encoders.image": "openai/clip-vit-large-patch14-336", "lm": "lmsys/vicuna-13b-v1.5"},
    parameters=13_350_839_296,
    transformers=(13_351_494_656, 32064),
    licences=VICUNA,
)
def llava_15_13b() -> VLMConfig:
    """LLaVA-1.5 on Vicuna-13B."""
    return llava_15_7b().edit(**{"model.lm": vicuna_13b()})


@published(
    "llava-1.5-hd-7b",
    LLAVA_15_HD,
    base={"encoders.image": "openai/clip-vit-large-patch14", "lm": "lmsys/vicuna-7b-v1.5"},
    parameters=7_062_579_200,
    counted="not published; transformers' LLaVA-NeXT class built with this tower and vocabulary",
    licences=VICUNA,
    notes=("The paper reports the 13B model only.",),
)
def llava_15_hd_7b() -> VLMConfig:
    """LLaVA-1.5-HD on Vicuna-7B: up to six tiles of 224 pixels, beside the whole picture."""
    grids = [(a, b) for a, b in HD_GRIDS] + [(b, a) for a, b in HD_GRIDS if a != b]  # columns, rows
    return llava_15_7b().edit(
        **{
            "model.encoders.image": clip_vit_l14(),
            "model.media.image.merge": {"type": "spatial_unpad", "rounding": "trunc"},
            "processing.media.image.size": 224,
            "processing.media.image.fit": "crop",
            "processing.media.image.tiling": {"pinpoints": [(224 * a, 224 * b) for a, b in grids], "axes": "wh"},
        }
    )


HD_GRIDS = ((1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (2, 2), (2, 3))


@published(
    "llava-1.5-hd-13b",
    LLAVA_15_HD,
    base={"encoders.image": "openai/clip-vit-large-patch14", "lm": "lmsys/vicuna-13b-v1.5"},
    parameters=13_350_516_736,
    counted="not published; transformers' LLaVA-NeXT class built with this tower and vocabulary",
    licences=VICUNA,
)
def llava_15_hd_13b() -> VLMConfig:
    """LLaVA-1.5-HD on Vicuna-13B, as in the paper."""
    return llava_15_hd_7b().edit(**{"model.lm": vicuna_13b()})
