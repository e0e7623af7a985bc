"""The published templates by name, each as data.

Sources: ``llava/conversation.py`` of haotian-liu/LLaVA c121f04 and of LLaVA-VL/LLaVA-NeXT, and the training code for
those that are only built there; BLIP-2's from salesforce/LAVIS 506965b; OpenFlamingo's from its ``evaluate.py``
655f693; Idefics' from the processor of transformers 5.23. A name serves to write configurations; what a
model saves is the data.
"""

from __future__ import annotations

from typing import Any

from chiasm.errors import ConfigError, nearest
from chiasm.processing.template import Answer, Turn, TurnsConfig

_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."


def _hashes(system: str, **changes: Any) -> TurnsConfig:
    """``sys###Human: U###Assistant: A###``"""
    return TurnsConfig(
        system=system,
        system_turn=Turn(suffix="###"),
        user_turn=Turn(prefix="Human: ", suffix="###"),
        answer=Answer(prompt="Assistant:", lead=" ", end="###"),
        **changes,
    )


def _vicuna(system: str, **changes: Any) -> TurnsConfig:
    """``sys USER: U ASSISTANT: A</s>``"""
    return TurnsConfig(
        system=system,
        system_turn=Turn(suffix=" "),
        user_turn=Turn(prefix="USER: ", suffix=" "),
        answer=Answer(prompt="ASSISTANT:", lead=" ", end="{eos}"),
        **changes,
    )


def _inst(system: str | None, between: str) -> TurnsConfig:
    """``[INST] <<SYS>>sys<</SYS>> U [/INST] A </s>``"""
    return TurnsConfig(
        system=system,
        system_turn=Turn(prefix="<<SYS>>\n", suffix="\n<</SYS>>\n\n"),
        system_in_user=True,
        user_turn=Turn(prefix="[INST] ", suffix=" [/INST]"),
        answer=Answer(lead=" ", end=" {eos}"),
        between=between,
    )


def _chatml(system: str | None, newline: str, **changes: Any) -> TurnsConfig:
    """``<|im_start|>system\\nsys<|im_end|>`` and so on; ``newline`` follows every ``<|im_end|>``."""
    return TurnsConfig(
        system=system,
        system_turn=Turn(prefix="<|im_start|>system\n", suffix="<|im_end|>" + newline),
        user_turn=Turn(prefix="<|im_start|>user\n", suffix="<|im_end|>" + newline),
        answer=Answer(prompt="<|im_start|>assistant\n", end="<|im_end|>", after=newline),
        controls=("<|im_start|>", "<|im_end|>"),
        **changes,
    )


_FAKE = "<fake_token_around_image>"
_AROUND: dict[str, Any] = {
    "media_at": "inline",
    "media_wrap": (_FAKE, _FAKE),
    "media_suffix": "",
    "share_wrap": True,
}
_QWEN = _chatml("You are a helpful assistant.", "\n", media_at="front_if_single")
_HERMES = _chatml("Answer the questions.", "")

TEMPLATES: dict[str, TurnsConfig] = {
    "v0": _hashes(_HUMAN),
    "llava_v0": _hashes(_HUMAN),
    # What LLaVA-1's training wrote; its inference used "v0".
    "v0_train": TurnsConfig(
        system=_HUMAN,
        system_turn=Turn(suffix="\n\n### "),
        user_turn=Turn(prefix="Human: ", suffix="\n### "),
        answer=Answer(prompt="Assistant:", lead=" ", end="\n###", after=" "),
    ),
    "v0_mmtag": _hashes(_MMTAG, media_wrap=("<Image>", "</Image>")),
    "v1": _vicuna(_USER),
    "vicuna_v1": _vicuna(_USER),
    "llava_v1": _vicuna(_HUMAN),
    "v1_mmtag": _vicuna(_MMTAG, media_wrap=("<Image>", "</Image>")),
    "plain": TurnsConfig(user_text=False, answer=Answer(end="\n"), media_suffix=""),
    "llava_llama_2": _inst(_LLAMA_2, "{bos}"),
    "mistral_instruct": _inst(None, ""),
    "mpt": _chatml(_MPT, ""),
    "chatml_direct": _HERMES,
    "mistral_direct": _HERMES,
    "qwen_1_5": _QWEN,
    "qwen_2": _QWEN,
    "qwen_2_5": _QWEN.edit(system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "llava_llama_3": TurnsConfig(
        system=_LLAMA_2,
        system_turn=Turn(prefix="<|start_header_id|>system<|end_header_id|>\n\n", suffix="<|eot_id|>"),
        user_turn=Turn(prefix="<|start_header_id|>user<|end_header_id|>\n\n", suffix="<|eot_id|>"),
        answer=Answer(prompt="<|start_header_id|>assistant<|end_header_id|>\n\n", end="<|eot_id|>"),
        controls=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strip=True,
        media_at="front_if_single",
    ),
    # Gemma knows no system turn: a system text opens the first user turn.
    "gemma_instruct": TurnsConfig(
        system_turn=Turn(suffix="\n\n"),
        system_in_user=True,
        user_turn=Turn(prefix="<start_of_turn>user\n", suffix="<end_of_turn>\n"),
        answer=Answer(prompt="<start_of_turn>model\n", end="<end_of_turn>", after="\n"),
        controls=("<start_of_turn>", "<end_of_turn>"),
        media_at="front_if_single",
    ),
    # For small models and new tokenizers: as few tokens as will do.
    "simple": TurnsConfig(
        user_turn=Turn(prefix="Q: ", suffix="\n"), answer=Answer(prompt="A:", lead=" ", end="{eos}"), between="\n"
    ),
    # BLIP-2: pictures stand before the token that opens the text, with or without them; a line break ends an answer
    # of OPT. Prompts are the user's: "Question: ... Short answer:".
    "blip2_opt": TurnsConfig(answer=Answer(end="\n"), media_suffix="", opening="{bos}"),
    "instructblip": TurnsConfig(answer=Answer(lead=" ", end="{eos}"), media_suffix="", opening="{bos}"),
    "blip2_t5": TurnsConfig(answer=Answer(end="{eos}"), media_suffix=""),
    # OpenFlamingo: a picture, its text, the token that ends the chunk; shots are turns that follow each other. Prompts
    # are the user's: "Output:" after the picture for captions, "Question:... Short answer:" for questions.
    "openflamingo": TurnsConfig(
        answer=Answer(end="<|endofchunk|>"), media_at="inline", media_suffix="", controls=("<|endofchunk|>",)
    ),
    # Idefics: as the examples of transformers write prompts. A text that opens a turn brings its own space.
    "idefics": TurnsConfig(
        user_turn=Turn(prefix="User:", suffix="\n"),
        answer=Answer(prompt="Assistant:", lead=" ", end="\n"),
        controls=(_FAKE,),
        **_AROUND,
    ),
    "idefics_instruct": TurnsConfig(
        user_turn=Turn(prefix="User:", suffix="<end_of_utterance>\n"),
        answer=Answer(prompt="Assistant:", lead=" ", end="<end_of_utterance>", after="\n"),
        controls=(_FAKE, "<end_of_utterance>"),
        **_AROUND,
    ),
    # BLIP-2's first stage, of which BERT reads the captions: the picture stands beside the text.
    "blip2_caption": TurnsConfig(user_text=False, answer=Answer(end="[SEP]"), media_suffix="", controls=("[SEP]",)),
    "bare": TurnsConfig(user_turn=Turn(suffix="\n"), answer=Answer(end="{eos}")),
}


def template(name: str) -> TurnsConfig:
    """The template of this name. Raises ConfigError with the nearest names."""
    if name not in TEMPLATES:
        raise ConfigError(f"unknown template {name!r}; {nearest(name, TEMPLATES)}")
    return TEMPLATES[name]
