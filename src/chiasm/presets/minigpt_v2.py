"""MiniGPT-v2: a frozen tower at 448 pixels, strips of four patches, one linear layer, a Llama-2 that learns by LoRA.

Paper: MiniGPT-v2 (arXiv:2310.09478). Reference: Vision-CAIR/MiniGPT-4 d94738a ``minigpt_v2.py``.

A question says what is asked of it by a word in brackets, which is plain text to the tokenizer: ``asked`` writes it.
Boxes are written ``{<x1><y1><x2><y2>}`` in whole numbers from 0 to 100 of the picture's width and height.

Differences by design: as in ``minigpt4``. LoRA is no part of the preset, as it is none of the published sizes: a recipe
asks for it (rank 64, alpha 16, on queries and values).
"""

from __future__ import annotations

from chiasm.errors import ConfigError, nearest
from chiasm.model_config import VLMConfig
from chiasm.presets.blip2 import TINY, TOWER
from chiasm.presets.minigpt4 import CODE, LLAMA_2, MINIGPT_4, NEIGHBOURS, PROJECTION, strips
from chiasm.presets.record import Stage, System, published

TASKS = ("vqa", "caption", "grounding", "refer", "identify", "detection")
LEARNS = ("connectors.image.proj.*", "lm.layers.*.attn.q_proj.*", "lm.layers.*.attn.v_proj.*")


def asked(task: str, words: str) -> str:
    """The question ``words`` as MiniGPT-v2 is asked it: ``[vqa] What is this?``. Raises ConfigError."""
    if task not in TASKS:
        raise ConfigError(f"MiniGPT-v2 has no task {task!r}; {nearest(task, TASKS)}")
    return f"[{task}] {words}"


def _stage(name: str, data: str, lr: float | None) -> Stage:
    return Stage(
        name=name,
        data=(data,),
        trains=LEARNS,
        lr=lr,
        batch=None,
        epochs=None,
        max_length=1024,
        template="its own prompt",
        source="the order of stages: the paper; rates of the last: train_configs/minigptv2_finetune.yaml; those of the "
        "others were not looked up",
        warmup=None,
        last_lr=1e-6,
        weight_decay=0.05,
    )


MINIGPT_V2 = System(
    family="MiniGPT-v2",
    paper="MiniGPT-v2: Large Language Model as a Unified Interface for Vision-Language Multi-task Learning "
    "(arXiv:2310.09478)",
    arxiv="2310.09478",
    released="2023-10",
    reference=CODE,
    stages=(
        _stage("pretrain", "weakly labelled pictures and fine-grained data sets", None),
        _stage("multi-task", "the fine-grained data sets alone", None),
        _stage("instruct", "multi-modal instructions and conversations", 1e-5),
    ),
    differences=(
        *MINIGPT_4.differences[1:],
        "The matrices that LoRA changes are listed as what learns; LoRA itself is a method that a recipe asks for.",
    ),
    verified=(TOWER, NEIGHBOURS, PROJECTION, TINY),
)


@published(
    "minigpt-v2",
    MINIGPT_V2,
    base={"encoders.image": "EVA-CLIP ViT-g/14", "lm": "meta-llama/Llama-2-7b-chat-hf"},
    parameters=7_748_521_984,
    licences=LLAMA_2,
    counted="transformers' vision class of BLIP-2 at 448 pixels, its Llama, and the linear layer by its formula",
    notes=("LoRA of rank 64 on queries and values adds 33,554,432 parameters, 2·64·8192 a block.",),
)
def minigpt_v2() -> VLMConfig:
    """MiniGPT-v2 on Llama-2-7B-chat: 256 vectors for a picture of 448 pixels."""
    return strips(
        **{
            "model.encoders.image.image_size": 448,
            "processing.media.image.size": 448,
            "processing.max_length": 1024,
        }
    )
