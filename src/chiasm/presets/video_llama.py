"""Video-LLaMA's vision branch: BLIP-2's Q-Former on each frame, frame positions, a small Q-Former over the clip.

Paper: Video-LLaMA (arXiv:2306.02858). Reference: DAMO-NLP-SG/Video-LLaMA 2143b4d ``video_llama.py``, its YAML files.

The project's source documents draw a hierarchical Q-Former without naming a system; this is the nearest published one,
and the connector ``multiscale`` is their other form, over the scales of one picture.

Differences by design: the audio branch (ImageBind and a Q-Former of its own) is not built; clips of one batch may have
different lengths; the opening token stands once. A picture is a clip of one frame, as in the reference.
"""

from __future__ import annotations

from chiasm.model_config import VLMConfig
from chiasm.presets.blip2 import QFORMER, TOWER
from chiasm.presets.lms import vicuna_13b
from chiasm.presets.minigpt4 import BASE, VICUNA, vicuna_7b
from chiasm.presets.record import Stage, System, published

PROMPT = {  # "###Human: <Video><ImageHere></Video> {} ###Assistant: "
    "type": "turns",
    "user_turn": {"prefix": "###Human: ", "suffix": " "},
    "answer": {"prompt": "###Assistant:", "lead": " ", "end": "###"},
    "media_wrap": ["<Video>", "</Video>"],
    "media_suffix": " ",
}
LEARNS = tuple(f"connectors.image.{name}" for name in ("positions", "queries", "clip.*", "proj.*"))
COUNTED = (
    "transformers' vision class of BLIP-2, its Q-Former twice (12 blocks crossing every second, 2 blocks crossing "
    "each), its Llama, and queries, positions and the linear layer by their formulas, on the meta device"
)

VIDEO_LLAMA = System(
    family="Video-LLaMA",
    paper="Video-LLaMA: An Instruction-tuned Audio-Visual Language Model for Video Understanding (arXiv:2306.02858)",
    arxiv="2306.02858",
    released="2023-06",
    reference="DAMO-NLP-SG/Video-LLaMA, 2143b4d",
    stages=(
        Stage(
            name="pretrain",
            data=("WebVid-2M", "pictures with captions of LLaVA's CC3M, drawn 100 to 24"),
            trains=LEARNS,
            lr=1e-4,
            batch=None,
            epochs=5,
            max_length=32,
            template="captions alone, after the clip",
            source="train_configs/visionbranch_stage1_pretrain.yaml: an epoch is 2,500 steps of 32 clips a GPU",
            warmup=2500,
            last_lr=8e-5,
            weight_decay=0.05,
        ),
        Stage(
            name="instruct",
            data=("cc_sbu_align", "LLaVA-Instruct-150K", "VideoChat's 11K conversations on clips"),
            trains=LEARNS,
            lr=3e-5,
            batch=None,
            epochs=3,
            max_length=320,
            template="its own prompt",
            source="train_configs/visionbranch_stage2_finetune.yaml: an epoch is 1,000 steps of 4 clips a GPU",
            warmup=1000,
            last_lr=1e-5,
            weight_decay=0.05,
        ),
    ),
    differences=(
        "The source documents draw a hierarchical Q-Former and name no system: this is the nearest published one, the "
        "connector `hierarchical`; their other form, over the scales of one picture, is the connector `multiscale`, of "
        "which no published system was found.",
        "The audio branch is not built: the vision branch alone is what both stages above train.",
        "Clips of one batch may have different lengths; the reference takes equal ones.",
        "The linear layer starts new or from MiniGPT-4's released file (`llama_proj_model`), which "
        "`load_part('minigpt4', FILE)` reads; the frames' Q-Former starts as BLIP-2's (`connectors.image.frame` of a "
        "recipe's `weights`). What Video-LLaMA released, `load_part('video_llama', FILE)` reads.",
        "Which frames were taken, and when, is text that the user writes; the reference's demo adds a sentence.",
    ),
    verified=(
        TOWER,
        QFORMER,
        "The two levels: the connector equals transformers' two Q-Formers with frame positions between them, in "
        "float64, for clips of unequal lengths. `tests/parity/test_minigpt.py`, `tests/parity/test_bridges.py`",
        "The files: a random model written under LAVIS's and the authors' names, read back whole. "
        "`tests/parity/test_minigpt.py`",
        "The tiny form: a batch of pictures and a clip equals each alone, and an answer depends on its own media only. "
        "`tests/contracts/test_presets.py`",
    ),
)


@published(
    "video-llama-7b",
    VIDEO_LLAMA,
    base=BASE | {"lm": "Vicuna-7B v0"},
    parameters=7_851_634_176,
    licences=VICUNA,
    counted=COUNTED,
)
def video_llama_7b() -> VLMConfig:
    """Video-LLaMA's vision branch on Vicuna-7B: 8 frames, 32 vectors for a whole clip."""
    stream = {"encoders": ["image"], "connector": "image", "merge": {"type": "flat"}}
    return vicuna_7b().edit(
        **{
            "model.connectors.image": {"type": "hierarchical"},
            "model.media.video": stream,
            "processing.media.video": {
                "type": "video",
                "frames": 8,
                "image": {"type": "image", "size": 224, "fit": "squash"},
            },
            "processing.template": PROMPT,
        }
    )


@published(
    "video-llama-13b",
    VIDEO_LLAMA,
    base=BASE | {"lm": "Vicuna-13B v0"},
    parameters=14_129_870_336,
    licences=VICUNA,
    counted=COUNTED,
)
def video_llama_13b() -> VLMConfig:
    """Video-LLaMA's vision branch on Vicuna-13B."""
    return video_llama_7b().edit(**{"model.lm": vicuna_13b(max_positions=2048)})
