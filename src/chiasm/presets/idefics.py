"""Idefics: Flamingo reproduced on LLaMA, with SwiGLU blocks and RMS norms.

Paper: OBELICS (arXiv:2306.16527). Reference: the port in transformers 5.23, whose sizes and options its released
``config.json`` files give.
"""

from __future__ import annotations

from typing import Any

from chiasm.encoders.vit import ViT
from chiasm.model_config import VLMConfig
from chiasm.presets.lms import vicuna_7b
from chiasm.presets.record import Stage, System, published

TRAINED = ("connectors.*", "cross.*", "lm.embedding.*", "lm.lm_head.*")
LICENCE = {
    "code": "Apache-2.0",
    "reference code": "Apache-2.0 (transformers)",
    "trained weights": "MIT (HuggingFaceM4)",
    "image encoder": "MIT (CLIP of LAION)",
    "language model": "LLaMA licence, non-commercial research (Meta)",
    "data": "the licences of OBELICS, Wikipedia, LAION and PMD, whose pictures and pages are their owners'",
}
CARD = "the model card, whose numbers were not at hand where this was written"
WHOLE = (
    "The whole model: token ids and pixels equal to those of transformers' processor, logits within 1e-5 and gradients "
    "within 1e-4 with gates open, the same text greedily and by beams, alone and in batches, with pictures before, "
    "between and after texts, side by side and none; read, saved and exported. `tests/parity/test_idefics_hf.py`"
)
RESAMPLER = (
    "The resampler: within 1e-5 of transformers' `IdeficsPerceiverResampler`, with and without norms on queries and "
    "keys. `tests/parity/test_bridges.py`"
)
TINY = (
    "The tiny form: a batch of one picture, none and two equals each alone, and an answer depends on its own picture "
    "only; every parameter that runs gets a gradient once the gates are open. `tests/contracts/test_presets.py`"
)

MIX = Stage(
    name="mix",
    data=("OBELICS documents", "Wikipedia", "LAION pairs", "PMD pairs"),
    trains=TRAINED,
    lr=None,
    batch=None,
    epochs=None,
    max_length=1024,
    template="idefics",
    source=CARD,
)
SPEAK = Stage(
    name="instruct",
    data=("supervised and instruction data sets listed on the model card",),
    trains=("*",),
    lr=None,
    batch=None,
    epochs=None,
    max_length=2048,
    template="idefics_instruct",
    source=CARD,
)

IDEFICS = System(
    family="Idefics",
    paper="OBELICS: An Open Web-Scale Filtered Dataset of Interleaved Image-Text Documents (arXiv:2306.16527)",
    arxiv="2306.16527",
    released="2023-08",
    reference="transformers 5.23, `models/idefics`",
    stages=(MIX, SPEAK),
    differences=(
        "The added tokens (`<fake_token_around_image>`, `<image>`, in the instruct models `<end_of_utterance>`) are "
        "the last rows of one table; transformers keeps them in tables of their own. A folder is read and written "
        "either way.",
        "transformers cannot compute a loss for them (its labels crash where there are added tokens); here they are "
        "tokens like any other.",
        "A text after an end token and before the next picture sees none in transformers; here what follows an end "
        "token is another conversation, which sees its own pictures only.",
        "Keys and values of pictures are computed once for an answer; transformers computes them at every token.",
        "Against OpenFlamingo: blocks before the first layer of every four (there the last), as many heads as the "
        "language model (there 8 of 64), SwiGLU (there GELU), RMS norms (there layer norms), norms on queries and keys "
        "of each head, a ReLU in the resampler (there GELU), and the class vector beside the patches.",
    ),
    choices=(
        "The turns of the base model are written as in transformers' examples (`User:`, `Assistant:`, a line break at "
        "the end); the model was trained on documents, and any text may be given.",
    ),
    verified=(WHOLE, RESAMPLER, TINY),
)


def clip_vit_h14(**changes: Any) -> ViT.Config:
    """CLIP ViT-H/14 of LAION, read after its last block and before its last norm, the class vector kept."""
    sizes: dict[str, Any] = {"image_size": 224, "patch": 14, "dim": 1280, "depth": 32, "heads": 16, "mlp": 5120}
    kind: dict[str, Any] = {
        "activation": "gelu",
        "norm_eps": 1e-5,
        "patch_bias": False,
        "pre_norm": True,
        "post_norm": "unused",
    }
    return ViT.Config(**(sizes | kind | {"select": "cls_patch"} | changes))


BASE_9B = {"encoders.image": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "lm": "huggyllama/llama-7b"}
BASE_80B = BASE_9B | {"lm": "huggyllama/llama-65b"}
INSTRUCT = {"processing.template": "idefics_instruct"}


@published("idefics-9b", IDEFICS, base=BASE_9B, parameters=8_929_679_632, licences=LICENCE)
def idefics_9b() -> VLMConfig:
    """Idefics-9B: LLaMA-7B with a block before the first layer of every four."""
    return VLMConfig.parse(
        {
            "model": {
                "type": "cross_attention",
                "encoders": {"image": clip_vit_h14()},
                "connectors": {
                    "image": {
                        **{"type": "resampler", "heads": 16, "head_dim": 96, "activation": "relu"},
                        **{"head_norm": True, "project": False},
                    }
                },
                "lm": vicuna_7b(vocab=32002, max_positions=2048, norm_eps=1e-6),
                "placement": {"every": 4, "rule": "before_first"},
                "blocks": {
                    **{"heads": 32, "head_dim": None, "mlp": 11008, "gated_mlp": True, "activation": "silu"},
                    **{"norm": "rms", "norm_eps": 1e-6, "head_norm": True},
                },
            },
            "processing": {
                "template": "idefics",
                "media": {"image": {"type": "image", "size": 224, "fit": "squash"}},
                "max_length": 2047,
                "add_bos": True,
            },
        }
    )


@published("idefics-9b-instruct", IDEFICS, base={"all": "Idefics-9B"}, parameters=8_929_687_824, licences=LICENCE)
def idefics_9b_instruct() -> VLMConfig:
    """Idefics-9B-instruct: one more token, which ends a turn."""
    return idefics_9b().edit(**INSTRUCT, **{"model.lm.vocab": 32003})


@published("idefics-80b", IDEFICS, base=BASE_80B, parameters=79_967_843_624, licences=LICENCE)
def idefics_80b() -> VLMConfig:
    """Idefics-80B: LLaMA-65B."""
    large = {"dim": 8192, "depth": 80, "heads": 64, "mlp": 22016, "norm_eps": 1e-5}
    blocks = {"heads": 64, "mlp": 22016, "norm_eps": 1e-5}
    return idefics_9b().edit(
        **{f"model.lm.{key}": value for key, value in large.items()},
        **{f"model.blocks.{key}": value for key, value in blocks.items()},
    )


@published("idefics-80b-instruct", IDEFICS, base={"all": "Idefics-80B"}, parameters=79_967_860_008, licences=LICENCE)
def idefics_80b_instruct() -> VLMConfig:
    """Idefics-80B-instruct."""
    return idefics_80b().edit(**INSTRUCT, **{"model.lm.vocab": 32003})
