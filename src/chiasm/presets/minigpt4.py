"""MiniGPT-4: BLIP-2's frozen tower and frozen Q-Former, one linear layer that learns, a frozen Vicuna.

Paper: MiniGPT-4 (arXiv:2304.10592). Reference: Vision-CAIR/MiniGPT-4 d94738a ``minigpt4.py``.

The project's source documents list it under gates. It has none: it is a prefix of 32 vectors, and of the whole only
``connectors.image.proj`` learns (LAVIS trains the Q-Former and the tower's last norm as well). The documents' gate is
the connector ``gate``.

Differences by design: the separator ``$$`` of the reference, which masks any such text, is nothing here; the opening
token stands once, at the beginning of a conversation; an answer is never cut without its end being cut too.
"""

from __future__ import annotations

from chiasm.model_config import VLMConfig
from chiasm.presets.blip2 import blip2_opt_27b
from chiasm.presets.lms import vicuna_7b as vicuna_lm_7b
from chiasm.presets.lms import vicuna_13b as vicuna_lm_13b

PROMPT = {  # "###Human: <Img><ImageHere></Img> {} ###Assistant: "
    "type": "turns",
    "user_turn": {"prefix": "###Human: ", "suffix": " "},
    "answer": {"prompt": "###Assistant:", "lead": " ", "end": "###"},
    "media_wrap": ["<Img>", "</Img>"],
    "media_suffix": " ",
}
LEARNS = {"*": "freeze", "connectors.image.proj": "train"}  # the plan of both stages


def vicuna_7b() -> VLMConfig:
    """MiniGPT-4 on Vicuna-7B v0: ``chiasm.preset("chiasm.presets.minigpt4:vicuna_7b")``."""
    return blip2_opt_27b().edit(
        **{
            "model.lm": vicuna_lm_7b(max_positions=2048),
            "processing.template": PROMPT,
            "processing.add_bos": True,
        }
    )


def vicuna_13b() -> VLMConfig:
    """MiniGPT-4 on Vicuna-13B v0."""
    return vicuna_7b().edit(**{"model.lm": vicuna_lm_13b(max_positions=2048)})
