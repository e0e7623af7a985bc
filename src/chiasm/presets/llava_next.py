"""LLaVA-NeXT (1.6), NeXT-Video and NeXT-Interleave: tiles, clips, and pictures between the words.

Papers: LLaVA-NeXT: Improved reasoning, OCR, and world knowledge (blog, 2024-01); LLaVA-NeXT: A Strong Zero-shot Video
Understanding Model (blog, 2024-04); LLaVA-NeXT-Interleave (arXiv:2407.07895). Reference: haotian-liu/LLaVA c121f04;
LLaVA-VL/LLaVA-NeXT df17966.
"""

from __future__ import annotations

from chiasm.encoders.vit import siglip_so400m_14_384_26
from chiasm.model_config import VLMConfig
from chiasm.presets import evidence
from chiasm.presets.llava import LCS_558K, SHARED, VICUNA, llava_15_7b
from chiasm.presets.lms import hermes_2_yi_34b, llama3_8b, mistral_7b_v02, qwen15_05b, qwen15_7b, vicuna_7b, vicuna_13b
from chiasm.presets.record import CLIP_LICENCE, SIGLIP_LICENCE, Stage, System, published

NEXT_CODE = "LLaVA-VL/LLaVA-NeXT, df17966"
EVERYTHING = ("connectors.*", "lm.*", "encoders.*", "newline")
TOWER = {"encoders.*": 2e-6}
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # pixels, width first
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and deviation
CLIP_336 = "openai/clip-vit-large-patch14-336"
SIGLIP = "google/siglip-so400m-patch14-384"
FALLBACK = "A grid that does not fit the features is an error; the authors' later code falls back to 2 x 2 tiles."
QWEN_MASK = (
    "The authors' mask for Qwen prompts also learns every newline and turn marker of the system and user turns. Here "
    "the answers are learned from, with the marker that ends them; `processing.template.loss=llava_qwen` gives the "
    "authors' mask."
)

ALIGN = Stage(
    name="align",
    data=(LCS_558K,),
    trains=("connectors.*",),
    lr=1e-3,
    batch=256,
    epochs=1,
    max_length=2048,
    template="plain",
    source="as LLaVA-1.5",
)
NEXT_INSTRUCT = Stage(
    name="instruct",
    data=("about 760K conversations: LLaVA-1.5's mix without TextCaps, documents and charts, GPT-4V conversations",),
    trains=EVERYTHING,
    rates=TOWER,
    lr=None,
    batch=None,
    epochs=1,
    max_length=4096,
    template="the language model's own",
    source="blog of 2024-01; the tower's rate stands in the checkpoints' config.json; the others were not published "
    "(the authors' later scripts use 1e-5)",
)

NEXT = System(
    family="LLaVA-NeXT",
    paper="LLaVA-NeXT: Improved reasoning, OCR, and world knowledge (blog, January 2024)",
    link="https://llava-vl.github.io/blog/2024-01-30-llava-next/",
    released="2024-01",
    reference="haotian-liu/LLaVA, c121f04",
    verified=(*evidence.IN_CLASS, *evidence.TILED),
    stages=(ALIGN, NEXT_INSTRUCT),
    differences=(
        *SHARED,
        FALLBACK,
        "At least one row and one column of the unpadded map stay; the authors keep none beyond about 1:1000.",
    ),
)

NEXT_VIDEO = System(
    family="LLaVA-NeXT-Video",
    paper="LLaVA-NeXT: A Strong Zero-shot Video Understanding Model (blog, April 2024)",
    link="https://llava-vl.github.io/blog/2024-04-30-llava-next-video/",
    released="2024-04",
    reference=NEXT_CODE,
    verified=(evidence.WHOLE, *evidence.TILED, evidence.FRAMES),
    stages=(
        ALIGN,
        Stage(
            name="instruct",
            data=("LLaVA-NeXT's pictures", "100K conversations over clips (VideoChatGPT-Instruct)"),
            trains=EVERYTHING,
            rates=TOWER,
            lr=None,
            batch=None,
            epochs=None,
            max_length=4096,
            template="vicuna_v1",
            source="the released checkpoint's model card; rates and batch were not published",
        ),
    ),
    differences=(
        *SHARED,
        FALLBACK,
        "The authors stretch the rotary positions by the number of frames at hand. The preset fixes the factor at "
        "2.5, as the transformers checkpoint does: enough for 32 frames and the words around them.",
    ),
    choices=(
        "The maximal length is 8192: 32 frames are 4608 tokens, more than the 4096 that Vicuna was made for. The "
        "authors stretch the positions for it and raise the limit when the model is used.",
        "Frames are averaged over 2 x 2 patches *before* the connector, as in the release of April 2024 and in "
        "transformers. The authors' present code pools after it, which gives other numbers: two layers with an "
        "activation do not commute with an average.",
    ),
)

INTERLEAVE = System(
    family="LLaVA-NeXT-Interleave",
    paper="LLaVA-NeXT-Interleave: Tackling Multi-image, Video, and 3D in Large Multimodal Models (arXiv:2407.07895)",
    arxiv="2407.07895",
    released="2024-06",
    reference=NEXT_CODE,
    verified=(evidence.SIGLIP, *evidence.SINGLE[1:]),
    stages=(
        ALIGN,
        Stage(
            name="pictures",
            data=("LLaVA-NeXT's 760K conversations",),
            trains=EVERYTHING,
            rates=TOWER,
            lr=1e-5,
            batch=None,
            epochs=1,
            max_length=None,
            template="qwen_1_5",
            source="the paper continues from a LLaVA-NeXT of pictures; rates as in the authors' scripts of the time",
        ),
        Stage(
            name="interleave",
            data=("M4-Instruct: 1.18M conversations over several pictures, clips, views and patches",),
            trains=EVERYTHING,
            rates=TOWER,
            lr=1e-5,
            batch=None,
            epochs=1,
            max_length=None,
            template="qwen_1_5",
            source="arXiv:2407.07895; rates as in the authors' scripts of the time",
        ),
    ),
    differences=(
        *SHARED,
        QWEN_MASK,
    ),
    choices=("A clip is given as its frames, each of them a picture of 729 vectors, as the authors give it.",),
)


@published(
    "llava-next-vicuna-7b",
    NEXT,
    base={"encoders.image": CLIP_336, "lm": "lmsys/vicuna-7b-v1.5"},
    parameters=7_062_906_880,
    transformers=(7_063_431_168, 32064),
    licences=VICUNA,
)
def llava_next_vicuna_7b() -> VLMConfig:
    """LLaVA-NeXT on Vicuna-7B: the whole picture and up to four tiles of it, unpadded, a newline vector a row."""
    return llava_15_7b().edit(
        **{
            "model.media.image.merge": {"type": "spatial_unpad", "rounding": "trunc"},
            "processing.media.image.fit": "crop",
            "processing.media.image.tiling": {"pinpoints": PINPOINTS, "axes": "wh"},
            "processing.media.image.several": "tile",
            "processing.max_length": 4096,
        }
    )


@published(
    "llava-next-vicuna-13b",
    NEXT,
    base={"encoders.image": CLIP_336, "lm": "lmsys/vicuna-13b-v1.5"},
    parameters=13_350_844_416,
    transformers=(13_351_499_776, 32064),
    licences=VICUNA,
)
def llava_next_vicuna_13b() -> VLMConfig:
    """LLaVA-NeXT on Vicuna-13B."""
    return llava_next_vicuna_7b().edit(**{"model.lm": vicuna_13b()})


@published(
    "llava-next-mistral-7b",
    NEXT,
    base={"encoders.image": CLIP_336, "lm": "mistralai/Mistral-7B-Instruct-v0.2"},
    parameters=7_566_223_360,
    transformers=(7_566_747_648, 32064),
    licences=CLIP_LICENCE | {"language model": "Apache-2.0 (Mistral)"},
)
def llava_next_mistral_7b() -> VLMConfig:
    """LLaVA-NeXT on Mistral-7B-Instruct-v0.2."""
    return llava_next_vicuna_7b().edit(
        **{"model.lm": mistral_7b_v02(), "processing.template": "mistral_instruct"},
    )


@published(
    "llava-next-hermes-34b",
    NEXT,
    base={"encoders.image": CLIP_336, "lm": "NousResearch/Nous-Hermes-2-Yi-34B"},
    parameters=34_751_166_464,
    transformers=(34_752_083_968, 64064),
    licences=CLIP_LICENCE | {"language model": "Apache-2.0 (Nous-Hermes-2-Yi-34B)"},
)
def llava_next_hermes_34b() -> VLMConfig:
    """LLaVA-NeXT on Nous-Hermes-2-Yi-34B."""
    return llava_next_vicuna_7b().edit(
        **{"model.lm": hermes_2_yi_34b(), "processing.template": "chatml_direct"},
    )


@published(
    "llava-next-llama3-8b",
    NEXT,
    base={"encoders.image": CLIP_336, "lm": "meta-llama/Meta-Llama-3-8B-Instruct"},
    parameters=8_354_752_512,
    transformers=(8_355_276_800, 128320),
    licences=CLIP_LICENCE | {"language model": "Meta Llama 3 Community License"},
    notes=(
        "The authors' padding token for Llama 3 has the id of '!', so their training text loses its exclamation "
        "marks; padding here is no token of the text.",
    ),
)
def llava_next_llama3_8b() -> VLMConfig:
    """LLaVA-NeXT on Llama-3-8B-Instruct (May 2024)."""
    return llava_next_vicuna_7b().edit(
        **{"model.lm": llama3_8b(), "processing.template": "llava_llama_3", "processing.max_length": 8192},
    )


@published(
    "llava-next-video-7b",
    NEXT_VIDEO,
    base={"encoders.image": CLIP_336, "lm": "lmsys/vicuna-7b-v1.5"},
    parameters=7_062_906_880,
    transformers=(7_063_431_168, 32064),
    licences=VICUNA,
)
def llava_next_video_7b() -> VLMConfig:
    """LLaVA-NeXT-Video on Vicuna-7B: 32 frames of 12 x 12 averaged patches, and pictures as in LLaVA-NeXT."""
    frames = {"encoders": ["image"], "connector": "image", "merge": {"type": "frames", "newline": "none"}}
    average = {"pool": {"mode": "average", "stride": 2}, "pool_at": "before"}
    return llava_next_vicuna_7b().edit(
        **{
            "model.lm": vicuna_7b(rope_scaling={"type": "linear", "factor": 2.5}),
            "model.media.video": frames | average,
            "processing.media.video": {
                "type": "video",
                "frames": 32,
                "image": {"type": "image", "size": 336, "fit": "crop"},
            },
            "processing.max_length": 8192,
        }
    )


@published(
    "llava-next-interleave-7b",
    INTERLEAVE,
    base={"encoders.image": SIGLIP, "lm": "Qwen/Qwen1.5-7B-Chat"},
    parameters=8_140_576_288,
    transformers=(8_141_100_576, 152000),
    licences=SIGLIP_LICENCE | {"language model": "Tongyi Qianwen License (Qwen1.5-7B)"},
)
def llava_next_interleave_7b() -> VLMConfig:
    """LLaVA-NeXT-Interleave on Qwen1.5-7B: 27 x 27 patches of each picture, any number of pictures anywhere."""
    return llava_15_7b().edit(
        **{
            "model.encoders.image": siglip_so400m_14_384_26(),
            "model.lm": qwen15_7b(),
            "processing.template": "qwen_1_5",
            "processing.media.image": {"type": "image", "size": 384, "fit": "squash", "mean": HALF, "std": HALF},
            "processing.max_length": 32768,
        }
    )


@published(
    "llava-next-interleave-0.5b",
    INTERLEAVE,
    base={"encoders.image": SIGLIP, "lm": "Qwen/Qwen1.5-0.5B-Chat"},
    parameters=863_965_728,
    transformers=(864_031_264, 152000),
    licences=SIGLIP_LICENCE | {"language model": "Tongyi Qianwen Research License (Qwen1.5-0.5B)"},
    notes=("The head is the embedding (tied), and counted once.",),
)
def llava_next_interleave_05b() -> VLMConfig:
    """LLaVA-NeXT-Interleave on Qwen1.5-0.5B."""
    return llava_next_interleave_7b().edit(**{"model.lm": qwen15_05b()})
