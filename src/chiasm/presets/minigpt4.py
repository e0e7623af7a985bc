"""MiniGPT-4: BLIP-2's frozen tower and frozen Q-Former, one linear layer that learns, a frozen language model.

Paper: MiniGPT-4 (arXiv:2304.10592). Reference: Vision-CAIR/MiniGPT-4 d94738a ``minigpt4.py``.

The project's source documents list it under gates. It has none: it is a prefix of 32 vectors, and of the whole only
``connectors.image.proj`` learns (LAVIS trains the Q-Former and the tower's last norm as well). The documents' gate over
two encoders is the preset ``minigpt-gated-sketch``. The form on Llama-2 has no Q-Former either: four patches of a row
side by side, and one linear layer.

Differences by design: the separator ``$$`` of the reference, which masks any such text, is nothing here; the opening
token stands once, at the beginning of a conversation; an answer is never cut without its end being cut too.
"""

from __future__ import annotations

from typing import Any

from chiasm.model_config import VLMConfig
from chiasm.presets.blip2 import LICENCE, QFORMER, TINY, TOWER, blip2_opt_27b
from chiasm.presets.lms import vicuna_7b as vicuna_lm_7b
from chiasm.presets.lms import vicuna_13b as vicuna_lm_13b
from chiasm.presets.record import Stage, System, published

CODE = "Vision-CAIR/MiniGPT-4, d94738a"
PROMPT = {  # "###Human: <Img><ImageHere></Img> {} ###Assistant: "
    "type": "turns",
    "user_turn": {"prefix": "###Human: ", "suffix": " "},
    "answer": {"prompt": "###Assistant:", "lead": " ", "end": "###"},
    "media_wrap": ["<Img>", "</Img>"],
    "media_suffix": " ",
}
LLAMA_2_PROMPT = {  # "[INST] <Img><ImageHere></Img> {} [/INST] "
    "type": "turns",
    "user_turn": {"prefix": "[INST] ", "suffix": " "},
    "answer": {"prompt": "[/INST]", "lead": " ", "end": "{eos}"},
    "media_wrap": ["<Img>", "</Img>"],
    "media_suffix": " ",
}
LEARNS = {"*": "freeze", "connectors.image.proj": "train"}  # the plan of both stages
LAYER = ("connectors.image.proj.*",)
VICUNA = LICENCE | {
    "reference code and weights": "BSD-3-Clause (MiniGPT-4, LAVIS)",
    "language model": "LLaMA licence, non-commercial (Vicuna v0)",
}
LLAMA_2 = VICUNA | {"language model": "Llama 2 Community License (Meta)"}
BASE = {"encoders.image": "EVA-CLIP ViT-g/14", "connectors.image": "the Q-Former of BLIP-2 on Flan-T5-XXL"}
NEIGHBOURS = (
    "The order in which four vectors become one: against a sum over patches written out in float64. "
    "`tests/parity/test_minigpt.py`"
)
PROJECTION = (
    "The released file's layout, `model.llama_proj.*`: read into the layer, other tensors refused. "
    "`tests/parity/test_minigpt.py`"
)

MINIGPT_4 = System(
    family="MiniGPT-4",
    paper="MiniGPT-4: Enhancing Vision-Language Understanding with Advanced Large Language Models (arXiv:2304.10592)",
    arxiv="2304.10592",
    released="2023-04",
    reference=CODE,
    stages=(
        Stage(
            name="pretrain",
            data=("LAION-115M, CC3M, CC12M and SBU, drawn 115 to 14",),
            trains=LAYER,
            lr=1e-4,
            batch=256,
            epochs=4,
            max_length=160,
            template="captions alone, after the picture",
            source="train_configs/minigpt4_stage1_pretrain.yaml: an epoch is 5,000 steps, 64 pictures on each of 4",
            warmup=5000,
            last_lr=8e-5,
            weight_decay=0.05,
        ),
        Stage(
            name="align",
            data=("cc_sbu_align: 3,500 long descriptions",),
            trains=LAYER,
            lr=3e-5,
            batch=12,
            epochs=5,
            max_length=160,
            template="its own prompt",
            source="train_configs/minigpt4_stage2_finetune.yaml: an epoch is 200 steps",
            warmup=200,
            last_lr=1e-5,
            weight_decay=0.05,
        ),
    ),
    differences=(
        "The source documents list it under gates. It has none; their gate over two encoders is the preset "
        "`minigpt-gated-sketch`.",
        "`$$` is a text like any other; in the reference it is the padding, and masked wherever a user writes it.",
        "The opening token stands once; the reference puts one before every later question.",
    ),
    choices=("Vicuna v0's tokenizer has a token for padding; a table with a row for it is cut to `model.lm.vocab`.",),
    verified=(TOWER, QFORMER, NEIGHBOURS, PROJECTION, TINY),
)


@published(
    "minigpt-4-vicuna-7b",
    MINIGPT_4,
    base=BASE | {"lm": "Vicuna-7B v0"},
    parameters=7_832_679_936,
    licences=VICUNA,
    counted="transformers' class of BLIP-2 with a Llama, built on the meta device",
)
def vicuna_7b() -> VLMConfig:
    """MiniGPT-4 on Vicuna-7B v0."""
    return blip2_opt_27b().edit(
        **{
            "model.lm": vicuna_lm_7b(max_positions=2048),
            "processing.template": PROMPT,
            "processing.add_bos": True,
        }
    )


@published(
    "minigpt-4-vicuna-13b",
    MINIGPT_4,
    base=BASE | {"lm": "Vicuna-13B v0"},
    parameters=14_110_916_096,
    licences=VICUNA,
    counted="transformers' class of BLIP-2 with a Llama, built on the meta device",
)
def vicuna_13b() -> VLMConfig:
    """MiniGPT-4 on Vicuna-13B v0."""
    return vicuna_7b().edit(**{"model.lm": vicuna_lm_13b(max_positions=2048)})


def strips(**changes: Any) -> VLMConfig:
    """The form without a Q-Former: the class vector left out, four patches of a row side by side, a Llama-2."""
    return vicuna_7b().edit(
        **{
            "model.encoders.image.select": "patch",
            "model.connectors.image": {"type": "neighbours", "factor": 4},
            "model.lm": vicuna_lm_7b(max_positions=4096),
            "processing.template": LLAMA_2_PROMPT,
        },
        **changes,
    )


@published(
    "minigpt-4-llama-2-7b",
    MINIGPT_4,
    base={"encoders.image": "EVA-CLIP ViT-g/14", "lm": "meta-llama/Llama-2-7b-chat-hf"},
    parameters=7_747_440_640,
    licences=LLAMA_2,
    counted="transformers' vision class of BLIP-2, its Llama, and the linear layer by its formula, on the meta device",
)
def llama_2_7b() -> VLMConfig:
    """MiniGPT-4 on Llama-2-7B-chat: no Q-Former, 64 vectors for a picture."""
    return strips()
