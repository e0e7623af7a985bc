"""InstructBLIP: BLIP-2 whose queries also read the instruction, so that what they take from a picture depends on it.

Paper: InstructBLIP (arXiv:2305.06500). Reference: salesforce/LAVIS 506965b; the port in transformers 5.23.

Where the project's source documents list it under cross-attention: only the Q-Former crosses; the language model
reads a prefix of 32 vectors and then the instruction once more. It is classed here as a query transformer.
"""

from __future__ import annotations

from dataclasses import replace

from chiasm.model_config import VLMConfig
from chiasm.presets.blip2 import (
    BRIDGE,
    CODE,
    DTYPE,
    FLAN,
    LAVIS,
    LICENCE,
    SCHEDULE,
    STAGE_2,
    TINY,
    TOWER,
    ZERO,
    blip2_flan_t5_xl,
    blip2_flan_t5_xxl,
    blip2_opt_27b,
)
from chiasm.presets.lms import vicuna_7b, vicuna_13b
from chiasm.presets.record import Stage, System, published

READS = {"model.connectors.image.text": {"vocab": 30523, "positions": 512}, "model.connectors.image.instruction": True}
VICUNA = LICENCE | {"language model": "LLaMA licence, non-commercial (Vicuna v1.1)"}
BASE = {"encoders.image": "EVA-CLIP ViT-g/14", "connectors.image": "BLIP-2, with the text half of its first stage"}

INSTRUCT_BLIP = System(
    family="InstructBLIP",
    paper="InstructBLIP: Towards General-purpose Vision-Language Models with Instruction Tuning (arXiv:2305.06500)",
    arxiv="2305.06500",
    released="2023-05",
    reference=CODE,
    stages=(
        Stage(**{**STAGE_2.__dict__, "name": "BLIP-2", "template": "its two stages"}),
        Stage(
            name="instruct",
            data=("13 held-in of 26 data sets, drawn by the square roots of their sizes",),
            trains=BRIDGE,
            lr=1e-5,
            batch=None,
            epochs=None,
            max_length=384,
            template="instructblip",
            source="the paper: at most 60,000 steps; batch 192, 128 or 64 by the size of the language model. The code "
            "for training was not published",
            warmup=1000,
            weight_decay=0.05,
        ),
    ),
    differences=(
        "The source documents list it under cross-attention. Only the Q-Former crosses; the language model reads a "
        "prefix of 32 vectors. Cross-attention in the language model is `openflamingo-3b` and its like.",
        ZERO,
        DTYPE,
        SCHEDULE,
        "An instruction that is longer than the Q-Former's positions is refused; LAVIS cuts it on the left after 128 "
        "tokens.",
        "In LAVIS, Vicuna's opening and unknown tokens are both `</s>`. Here the opening token is the one that the "
        "tokenizer names; that of the checkpoints in the transformers layout is `</s>`.",
        "Of several turns, the Q-Former reads the last question (LAVIS knows one turn only).",
    ),
    choices=(
        "A model trained from BLIP-2 must be given the text half of its first stage: the second stage dropped it, "
        "and a random one would read nothing. A recipe names both: `connectors.image.text_half` and "
        "`connectors.image.query_half` among its weights.",
    ),
    verified=(
        TOWER,
        "The Q-Former with its instruction: states within 1e-5 and gradients within 1e-4 of transformers' "
        "`InstructBlipQFormerModel`, padded instructions too. `tests/parity/test_qformer.py`",
        "The whole model: ids of both vocabularies, logits within 1e-5, gradients within 1e-4 and the same text as "
        "transformers' class, read from a folder that it wrote. `tests/parity/test_blip2_hf.py`",
        LAVIS,
        TINY,
    ),
)


@published(
    "instructblip-vicuna-7b",
    INSTRUCT_BLIP,
    base=BASE | {"lm": "Vicuna-7B v1.1"},
    parameters=7_913_210_624,
    licences=VICUNA,
)
def instructblip_vicuna_7b() -> VLMConfig:
    """InstructBLIP on Vicuna-7B, with one token added for padding."""
    return blip2_opt_27b().edit(
        **READS,
        **{
            "model.lm": vicuna_7b(vocab=32001, max_positions=2048, norm_eps=1e-6),
            "processing.template": "instructblip",
            "processing.instruction": {"max_length": 512},
        },
    )


@published(
    "instructblip-vicuna-13b",
    INSTRUCT_BLIP,
    base=BASE | {"lm": "Vicuna-13B v1.1"},
    parameters=14_191_448_832,
    licences=VICUNA,
)
def instructblip_vicuna_13b() -> VLMConfig:
    """InstructBLIP on Vicuna-13B."""
    return instructblip_vicuna_7b().edit(**{"model.lm": vicuna_13b(vocab=32001, max_positions=2048, norm_eps=1e-6)})


@published(
    "instructblip-flan-t5-xl",
    INSTRUCT_BLIP,
    base=BASE | {"lm": "google/flan-t5-xl"},
    parameters=4_022_969_088,
    licences=FLAN,
)
def instructblip_flan_t5_xl() -> VLMConfig:
    """InstructBLIP on Flan-T5-XL."""
    return blip2_flan_t5_xl().edit(**READS, **{"processing.instruction": {"max_length": 512}})


@published(
    "instructblip-flan-t5-xxl",
    INSTRUCT_BLIP,
    base=BASE | {"lm": "google/flan-t5-xxl"},
    parameters=12_310_119_168,
    licences=FLAN,
)
def instructblip_flan_t5_xxl() -> VLMConfig:
    """InstructBLIP on Flan-T5-XXL."""
    return blip2_flan_t5_xxl().edit(**READS, **{"processing.instruction": {"max_length": 512}})


# ---------------------------------------------------------------------------------------------------------------- clips

INSTRUCT_BLIP_VIDEO = replace(
    INSTRUCT_BLIP,
    family="InstructBLIP-Video",
    differences=(
        *INSTRUCT_BLIP.differences,
        "A clip has 4 frames, as transformers' class takes it; any other number is `processing.media.video.frames`. "
        "Pictures stay pictures of 32 vectors; there a picture is repeated four times to make a clip.",
    ),
    choices=(
        *INSTRUCT_BLIP.choices,
        "Weights are InstructBLIP's: nothing was trained on clips. transformers publishes the form; LAVIS reads clips "
        "the same way, frame by frame.",
    ),
    verified=(
        *INSTRUCT_BLIP.verified[:2],
        "Clips: the vectors of every frame and the logits within 1e-5 of transformers' "
        "`InstructBlipVideoForConditionalGeneration`, several clips with instructions of unequal lengths; its folder "
        "read and written. Its processor needs torchvision and was not run. `tests/parity/test_minigpt.py`",
        TINY,
    ),
)


def _clips(config: VLMConfig) -> VLMConfig:
    """Clips beside pictures: 4 frames, each through the Q-Former with the instruction, one after the other."""
    return config.edit(
        **{
            "model.media.video": {"encoders": ["image"], "connector": "image", "merge": {"type": "flat"}},
            "processing.media.video": {
                "type": "video",
                "frames": 4,
                "image": {"type": "image", "size": 224, "fit": "squash"},
            },
        }
    )


@published(
    "instructblip-video-vicuna-7b",
    INSTRUCT_BLIP_VIDEO,
    base=BASE | {"lm": "Vicuna-7B v1.1"},
    parameters=7_913_210_624,
    licences=VICUNA,
)
def instructblip_video_vicuna_7b() -> VLMConfig:
    """InstructBLIP on Vicuna-7B reading clips: 4 frames of 32 vectors."""
    return _clips(instructblip_vicuna_7b())


@published(
    "instructblip-video-flan-t5-xl",
    INSTRUCT_BLIP_VIDEO,
    base=BASE | {"lm": "google/flan-t5-xl"},
    parameters=4_022_969_088,
    licences=FLAN,
)
def instructblip_video_flan_t5_xl() -> VLMConfig:
    """InstructBLIP on Flan-T5-XL reading clips."""
    return _clips(instructblip_flan_t5_xl())
