"""Video-LLaMA: BLIP-2's Q-Former on each frame and a small one over the clip; another small one over its sound.

Paper: Video-LLaMA (arXiv:2306.02858). Reference: DAMO-NLP-SG/Video-LLaMA 2143b4d ``video_llama.py``, its YAML files;
facebookresearch/ImageBind 53680b0 for the tower of the second branch.

    clip  → tower → Q-Former on each frame, plus frame positions → 2-layer Q-Former → linear layer → 32 vectors
    sound → 8 pieces of 2 s → ImageBind, one vector each, plus positions → 2-layer Q-Former → linear layer → 8 vectors

``video-llama-…`` has the vision branch alone, ``video-llama-…-audio`` both; a clip and its sound are two media of a
message, and ``heard`` writes the question that the reference's demo puts to the two.

The project's source documents draw a hierarchical Q-Former without naming a system; this is the nearest published one,
and the connector ``multiscale`` is their other form, over the scales of one picture.

Differences by design: clips of one batch may have different lengths; the opening token stands once; the published
training of the second branch shows it pictures through ImageBind's tower for pictures, whose vectors lie in the same
space, and that tower is not built: here it learns from sounds. A picture is a clip of one frame, as in the reference.
"""

from __future__ import annotations

from typing import Any

from chiasm.model_config import VLMConfig
from chiasm.presets.blip2 import QFORMER, TOWER
from chiasm.presets.lms import vicuna_13b
from chiasm.presets.minigpt4 import BASE, VICUNA, vicuna_7b
from chiasm.presets.record import Stage, System, published

PROMPT = {  # "###Human: <Video><ImageHere></Video> {} ###Assistant: "
    "type": "turns",
    "user_turn": {"prefix": "###Human: ", "suffix": " "},
    "answer": {"prompt": "###Assistant:", "lead": " ", "end": "###"},
    "wraps": {"image": ["<Image>", "</Image>"], "video": ["<Video>", "</Video>"]},
    "media_suffix": " ",
}
SOUND = {"type": "audio", "clips": 8, "channels": "first"}
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
        "These presets are the vision branch, which both stages above train; `video-llama-7b-audio` and "
        "`video-llama-13b-audio` have the audio branch too.",
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


# --------------------------------------------------------------------------------------------------------- with sound

HEARS = tuple(f"connectors.audio.{name}" for name in ("positions", "queries", "body.*", "proj.*"))
COUNTED_TOO = (
    COUNTED + "; for sounds ImageBind's tower by the shapes of its released file, transformers' Q-Former of two blocks "
    "that cross to width 1024, 8 queries, 8 positions and a linear layer"
)
TO_HEAR = "through ImageBind's tower for pictures: no sounds with captions were used"

VIDEO_LLAMA_AUDIO = System(
    family="Video-LLaMA, both branches",
    paper=VIDEO_LLAMA.paper,
    arxiv="2306.02858",
    released="2023-06",
    reference="DAMO-NLP-SG/Video-LLaMA, 2143b4d; facebookresearch/ImageBind, 53680b0",
    stages=(
        Stage(
            name="pretrain_audio",
            data=("WebVid-2M", f"LLaVA's CC3M, drawn 100 to 24, {TO_HEAR}"),
            trains=HEARS,
            lr=1e-4,
            batch=None,
            epochs=5,
            max_length=32,
            template="captions alone, after the medium",
            source="train_configs/audiobranch_stage1_pretrain.yaml: an epoch is 5,000 steps of 32 a GPU",
            warmup=5000,
            last_lr=8e-5,
            weight_decay=0.05,
        ),
        Stage(
            name="instruct_audio",
            data=("cc_sbu_align", "LLaVA-Instruct-150K", f"VideoChat's 11K conversations on clips, {TO_HEAR}"),
            trains=HEARS,
            lr=3e-5,
            batch=None,
            epochs=3,
            max_length=512,
            template="its own prompt",
            source="train_configs/audiobranch_stage2_finetune.yaml: an epoch is 1,000 steps of 4 a GPU",
            warmup=400,
            last_lr=1e-5,
            weight_decay=0.05,
        ),
    ),
    differences=(
        "The published training shows the audio branch pictures and clips through ImageBind's tower for pictures: its "
        "vectors lie in one space with those of sounds. That tower is not built, and `recipes/video-llama-audio.yaml` "
        "trains the branch on sounds with texts.",
        "Of ImageBind the tower for sounds alone is read; its stochastic depth is left out.",
        "A file without sound, or one that cannot be decoded, is an error; the reference's demo goes on without sound.",
        "Sounds are cut and measured as ImageBind does, in float64, and rounded to 2⁻¹⁴; resampling is torchaudio's "
        "formula.",
        "`chiasm.presets.video_llama.heard` writes the demo's question with single spaces; there it carries the indent "
        "of its source lines.",
        *VIDEO_LLAMA.differences[2:],
    ),
    verified=(
        *VIDEO_LLAMA.verified,
        "Sounds: the filter bank of transformers' `ASTFeatureExtractor` within 1e-4, tones at other rates against "
        "themselves; the tower against torch's `MultiheadAttention(add_bias_kv=True)` in float64; the audio branch "
        "against transformers' Q-Former; the files of ImageBind and of the audio branch, written under their names and "
        "read back. No released file could be opened here. `tests/parity/test_imagebind_sound.py`",
    ),
)


def heard(question: str, sound: Any, clip: Any) -> list[dict[str, Any]]:
    """The messages in which the reference's demo asks about a clip and its sound (paths, bytes, or open media)."""
    return [
        {
            "role": "user",
            "content": [
                "Close your eyes, open your ears and you imagine only based on the sound that: ",
                {"type": "audio", "audio": sound},
                ". Close your ears, open your eyes and you see that ",
                {"type": "video", "video": clip},
                f". Now answer my question based on what you have just seen and heard. {question}",
            ],
        }
    ]


def _with_sound(config: VLMConfig) -> VLMConfig:
    """The second branch beside the first; media stand where they are named."""
    return config.edit(
        **{
            "model.encoders.audio": {"type": "imagebind_audio"},
            "model.connectors.audio": {"type": "timeline"},
            "model.media.audio": {"encoders": ["audio"], "connector": "audio", "merge": {"type": "flat"}},
            "processing.media.audio": SOUND | {"placeholder": config.processing.media["video"].placeholder},
            "processing.template.media_at": "inline",
        }
    )


@published(
    "video-llama-7b-audio",
    VIDEO_LLAMA_AUDIO,
    base=BASE | {"encoders.audio": "ImageBind-Huge", "lm": "Vicuna-7B v0"},
    parameters=7_960_725_504,
    licences=VICUNA | {"audio encoder": "CC BY-NC 4.0 (ImageBind)"},
    counted=COUNTED_TOO,
)
def video_llama_7b_audio() -> VLMConfig:
    """Video-LLaMA with both branches on Vicuna-7B: 32 vectors for a clip, 8 for its sound."""
    return _with_sound(video_llama_7b())


@published(
    "video-llama-13b-audio",
    VIDEO_LLAMA_AUDIO,
    base=BASE | {"encoders.audio": "ImageBind-Huge", "lm": "Vicuna-13B v0"},
    parameters=14_239_749_120,
    licences=VICUNA | {"audio encoder": "CC BY-NC 4.0 (ImageBind)"},
    counted=COUNTED_TOO,
)
def video_llama_13b_audio() -> VLMConfig:
    """Video-LLaMA with both branches on Vicuna-13B."""
    return _with_sound(video_llama_13b())
