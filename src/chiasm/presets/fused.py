"""Models that read words and pictures together, at every published size: ViLT, ALBEF, VLMo, BEiT-3.

Papers: ViLT (arXiv:2102.03334), ALBEF (arXiv:2107.07651), VLMo (arXiv:2111.02358), BEiT-3 (arXiv:2208.10442). Each
system is pre-trained once and fine-tuned for each task with another head, often at another picture size, so each pair
of size and task is a preset: a row of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from chiasm.encoders.vit import vit_b16
from chiasm.model_config import VLMConfig
from chiasm.presets.record import Stage, System, published
from chiasm.processing.image import CLIP_MEAN, CLIP_STD

ANSWERS = 3129  # of VQA v2: those that nine people or more gave
HALF = (0.5, 0.5, 0.5)
COUNTED = "the sum over the tensors of the authors' classes, each by its formula"
PICTURES_4M = ("COCO, Visual Genome, SBU, Conceptual Captions 3M: 4M pictures",)
UNLABELLED = (
    "The answers of VQA v2 are not shipped: set `processing.labels` to the 3,129 of the authors' list before training "
    "or answering."
)
LICENCES = {
    "code": "Apache-2.0",
    "data": "the licences of COCO, Visual Genome, SBU and Conceptual Captions, whose pictures are their owners'",
}


def _stage(**values: Any) -> Stage:
    common: dict[str, Any] = {"trains": ("*",), "template": "pair", "schedule": "linear", "epochs": None}
    return Stage(**common | values)


VILT = System(
    family="ViLT",
    paper="ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision (arXiv:2102.03334)",
    arxiv="2102.03334",
    released="2021-02",
    reference="dandelin/ViLT, 762fd39",
    stages=(
        _stage(
            name="pretrain", data=PICTURES_4M, lr=1e-4, batch=4096, max_length=40, warmup=2500, weight_decay=0.01,
            source="vilt/config.py: 100,000 or 200,000 steps; objective `vilt`",
        ),
        _stage(
            name="finetune", data=("VQA v2; NLVR2; COCO or Flickr30k",), lr=1e-4, batch=256, epochs=10, max_length=40,
            warmup=0.1, weight_decay=0.01, rates={"classifier": 1e-3},
            source="vilt/config.py: NLVR2 with batches of 128; heads of new tasks ten times as fast",
        ),
    ),
    differences=(
        "No dropout (0.1 there), and no RandAugment.",
        "Wrong pictures come from the micro-batch, there from the whole data set.",
        "Patches that only pad a batch are left out; there masked ones are drawn at random. The number of patches is "
        "bounded in training only.",
    ),
    verified=(
        "States, pooled vectors, logits and losses of small random models within 1e-5 of every class of transformers, "
        "folders in and out. `tests/parity/test_vilt.py`, `tests/parity/test_vilt_hf.py`",
        "Pixels and padding equal, bit by bit, to those of transformers' PIL processor. "
        "`tests/parity/test_vilt_pixels.py`",
        "Matching, transport and masked words against their formulas. `tests/parity/test_fusion_objectives.py`",
    ),
)  # fmt: skip
ALBEF = System(
    family="ALBEF",
    paper="Align before Fuse: Vision and Language Representation Learning with Momentum Distillation "
    "(arXiv:2107.07651)",
    arxiv="2107.07651",
    released="2021-07",
    reference="salesforce/ALBEF, b9727e4",
    stages=(
        _stage(
            name="pretrain", data=PICTURES_4M, lr=1e-4, batch=512, epochs=30, max_length=25, schedule="cosine",
            last_lr=1e-5, warmup=2000, weight_decay=0.02, source="configs/Pretrain.yaml; objective `albef`",
        ),
        _stage(
            name="finetune", data=("COCO or Flickr30k; VQA v2; NLVR2",), lr=1e-5, batch=256, epochs=5, max_length=30,
            schedule="cosine", last_lr=1e-6, weight_decay=0.02,
            source="configs/Retrieval_coco.yaml; Flickr 10 epochs; VQA 2e-5, 8 epochs; NLVR2 2e-5, 10 epochs",
        ),
    ),
    differences=(
        "No dropout (BERT: 0.1), and no RandAugment.",
        "Shares of wrong pairs get 1e-4 each before one is drawn, as in the authors' retrieval code; their "
        "pre-training code does not and fails where all shares round to nothing.",
        "Fine-tuned presets have no momentum copies; `model.momentum` gives them back.",
    ),
    verified=(
        "Towers, fusion, heads, decoder and ranking of answers, followers and queues within 1e-5 of the formulas in "
        "float64 over tensors with the authors' names. `tests/parity/test_albef.py`",
        "Contrast with queue and soft targets, hard matching, distilled masked words likewise. "
        "`tests/parity/test_albef_objective.py`",
    ),
)  # fmt: skip
VLMO = System(
    family="VLMo",
    paper="VLMo: Unified Vision-Language Pre-Training with Mixture-of-Modality-Experts (arXiv:2111.02358)",
    arxiv="2111.02358",
    released="2021-11",
    reference="microsoft/unilm vlmo, 768a3c8",
    stages=(
        _stage(
            name="text", data=("Wikipedia and Books: text alone, after BEiT's pictures",), lr=2e-4, batch=1024,
            max_length=196, warmup=0.1, weight_decay=0.01,
            trains=("text.*", "kinds.*", "blocks.*.mlp.text.*", "blocks.*.norm2.text.*", "word_scores.*", "biases",
                    "norm.*"),
            source="run.py: 200,000 steps, attention frozen",
        ),
        _stage(
            name="pairs", data=PICTURES_4M, lr=2e-4, batch=1024, max_length=40, warmup=0.1, weight_decay=0.01,
            source="run.py: 200,000 steps; base plus 1e-4, large 5e-5; objective `vlmo`",
        ),
    ),
    differences=(
        "No stochastic depth and no dropout.",
        "Contrast and hard negatives are within the micro-batch, there over all ranks.",
        "Texts are not padded to 40 words.",
    ),
    verified=(
        "Three routes, biases of places, heads within 1e-5 of the formulas in float64 over tensors with the authors' "
        "names; the table carried to larger pictures. `tests/parity/test_vlmo.py`",
        "Contrast by both routes. `tests/parity/test_fusion_objectives.py`",
    ),
)  # fmt: skip
BEIT3 = System(
    family="BEiT-3",
    paper="Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language Tasks (arXiv:2208.10442)",
    arxiv="2208.10442",
    released="2022-08",
    reference="microsoft/unilm beit3, 768a3c8; torchscale 0.3.0",
    stages=(
        _stage(
            name="pretrain", data=("21M pairs, 14M pictures, 160 GB of text",), lr=1e-3, batch=6144, max_length=64,
            schedule="cosine", warmup=10000, weight_decay=0.05,
            source="the paper: 1,000,000 steps, betas 0.9 and 0.98; objective `masked_data`; the code is not released",
        ),
        _stage(
            name="finetune", data=("VQA v2; NLVR2; COCO; Flickr30k; ImageNet",), lr=3e-5, batch=128, epochs=10,
            max_length=64, schedule="cosine", weight_decay=0.01, rates={"classifier": 6e-4},
            source="get_started_for_vqav2.md; NLVR2 7e-4, layer decay 0.65, 20 epochs; retrieval 2e-4, batch 3072; "
                   "captions 4e-5",
        ),
    ),
    differences=(
        "No stochastic depth. Layer-wise decay of the learning rate is written as rates by name in a plan.",
        "The released code has no third expert, and so has this.",
    ),
    choices=(
        "The visual tokenizer of the pre-training (VQ-KD of BEiT v2) is an interface, `visual_tokenizer`; built in is "
        "a random projection with fixed directions (BEST-RQ), which needs no training.",
    ),
    verified=(
        "Three ways, causal words, hidden patches and all heads within 1e-5 of the formulas in float64 over tensors "
        "with the authors' names. `tests/parity/test_beit3.py`",
        "Masked data modelling and captions likewise. `tests/parity/test_fusion_objectives.py`",
        "Token numbers of a sentencepiece model as fairseq counts them. `tests/golden/test_fairseq_tokenizer.py`",
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- configurations


def _picture(size: int, mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF) -> dict[str, Any]:
    return {"type": "image", "placeholder": None, "size": size, "fit": "squash", "mean": mean, "std": std}


def _config(
    model: dict[str, Any],
    picture: dict[str, Any],
    length: int,
    asks: bool | str,
    masking: dict[str, Any] | None,
    clean: str = "none",
) -> VLMConfig:
    reads = asks if isinstance(asks, str) else "user" if asks else "last"
    template = {"type": "pair", "length": length, "read": reads, "clean": clean}
    processing = {"template": template, "media": {"image": picture}, "masking": masking}
    return VLMConfig.parse({"model": model, "processing": processing})


WHOLE_WORDS = {"share": 0.15, "whole_words": True, "last": False}
TASKS: dict[str, dict[str, Any]] = {
    "pretrained": {"words": True, "match": True},
    "vqa": {"classes": ANSWERS},
    "nlvr2": {"classes": 2},
}


def _vilt(task: str) -> VLMConfig:
    tasks = TASKS.get(task, {"match": True, "rank": True})
    pair = {"images": 2, "kinds": 3} if task == "nlvr2" else {}
    model = {"type": "single_stream", "tasks": tasks, **pair}
    model |= {"sampled_patches": 200} if task == "pretrained" else {}
    masking = WHOLE_WORDS if task == "pretrained" else None
    return _config(model, {"type": "proportional"}, 40, task in ("vqa", "nlvr2"), masking)


def _albef(task: str) -> VLMConfig:
    size = 256 if task == "pretrained" else 384
    model: dict[str, Any] = {"type": "albef", "vision": vit_b16(size, select="cls_patch"), "tasks": {"match": True}}
    if task == "pretrained":
        model |= {"tasks": TASKS[task], "momentum": {}}
    elif task == "vqa":
        model |= {"tasks": {}, "contrast": None, "answer_depth": 6}
    elif task == "nlvr2":
        model |= {"tasks": {"classes": 2}, "contrast": None, "images": 2}
    masking = {"share": 0.15, "draw": "each", "whole_words": False, "last": True} if task == "pretrained" else None
    length = {"pretrained": 25, "vqa": 40}.get(task, 30)
    return _config(model, _picture(size, CLIP_MEAN, CLIP_STD), length, task in ("vqa", "nlvr2"), masking, "albef")


_VLMO: dict[str, dict[str, Any]] = {
    "base": {},
    "base-plus": {
        "dim": 544, "depth": 24, "heads": 16, "mlp": 2176, "both_from": 21, "places": "vectors", "layer_scale": None,
    },
    "large": {"dim": 1024, "depth": 24, "heads": 16, "mlp": 4096, "both_from": 21},
}  # fmt: skip


def _vlmo(net: str, task: str) -> VLMConfig:
    size = {"pretrained": 224, "vqa": 480}.get(task, 384)
    model = {"type": "modality_experts", "image_size": size, **_VLMO[net], "tasks": TASKS.get(task, {})}
    if task in ("pretrained", "retrieval"):
        model |= {"contrast": True, "contrast_both": task == "pretrained"}
    if task == "nlvr2":
        model |= {"images": 2, "kinds": 3}
    masking = WHOLE_WORDS if task == "pretrained" else None
    return _config(model, _picture(size), 40, task in ("vqa", "nlvr2"), masking)


_BEIT3: dict[str, dict[str, Any]] = {"base": {}, "large": {"dim": 1024, "depth": 24, "heads": 16, "mlp": 4096}}


def _beit3(net: str, task: str) -> VLMConfig:
    size = {"vqa": 480, "retrieval": 384, "captions": 480}.get(task, 224)
    model: dict[str, Any] = {"type": "multiway", "image_size": size, **_BEIT3[net], "tasks": {}}
    if task == "pretrained":
        model |= {"tasks": {"words": True}, "codes": 8192}
    elif task == "captions":
        model |= {"tasks": {"words": True}}
    elif task == "retrieval":
        model |= {"contrast": True}
    elif task == "imagenet":
        model |= {"picture_classes": 1000, "last_norm": False}
    else:
        model |= {"tasks": TASKS[task], "images": 2 if task == "nlvr2" else 1, "last_norm": task != "vqa"}
    shares = {"pretrained": 0.5, "captions": 0.7}
    masking = {"share": shares[task], "token": "<mask>", "whole_words": False, "last": True} if task in shares else None
    reads: bool | str = "none" if task == "imagenet" else task in ("vqa", "nlvr2")
    return _config(model, _picture(size), 32 if task == "captions" else 64, reads, masking)


# ----------------------------------------------------------------------------------------------------------- presets


def _enter(name: str, system: System, parameters: int, words: str, make: Callable[[], VLMConfig], task: str) -> None:
    """One preset: a function with its words, entered with its record."""

    def function() -> VLMConfig:
        return make()

    function.__doc__, function.__name__, function.__qualname__ = words, name, name
    notes = (UNLABELLED,) if task == "vqa" else ()
    record = {"base": {}, "parameters": parameters, "licences": LICENCES, "counted": COUNTED, "notes": notes}
    published(name, system, **record)(function)  # type: ignore[arg-type]


_WORDS = {
    "pretrained": "as pre-trained, with its heads",
    "vqa": "for questions with 3,129 answers",
    "nlvr2": "for true or false of two pictures",
    "retrieval": "for retrieval",
    "captions": "for captions",
    "imagenet": "for the 1,000 classes of ImageNet",
}
COUNTS = {
    ("vilt-b32", "pretrained"): 135_660_092,
    ("vilt-b32", "vqa"): 117_588_537,
    ("vilt-b32", "nlvr2"): 113_962_754,
    ("vilt-b32", "retrieval"): 111_597_315,
    ("albef", "pretrained"): 209_937_725,
    ("albef", "vqa"): 290_336_058,
    ("albef", "nlvr2"): 259_381_250,
    ("albef", "retrieval"): 209_560_835,
    ("vlmo-base", "pretrained"): 202_414_750,
    ("vlmo-base", "vqa"): 182_380_185,
    ("vlmo-base", "nlvr2"): 178_571_234,
    ("vlmo-base", "retrieval"): 177_383_137,
    ("vlmo-base-plus", "pretrained"): 184_980_734,
    ("vlmo-base-plus", "vqa"): 171_249_433,
    ("vlmo-base-plus", "nlvr2"): 168_260_290,
    ("vlmo-base-plus", "retrieval"): 167_662_433,
    ("vlmo-large", "pretrained"): 599_086_142,
    ("vlmo-large", "vqa"): 572_124_473,
    ("vlmo-large", "nlvr2"): 567_326_978,
    ("vlmo-large", "retrieval"): 565_218_561,
    ("beit3-base", "pretrained"): 276_510_730,
    ("beit3-base", "vqa"): 228_110_649,
    ("beit3-base", "nlvr2"): 225_719_810,
    ("beit3-base", "retrieval"): 222_458_881,
    ("beit3-base", "captions"): 270_751_754,
    ("beit3-base", "imagenet"): 221_754_856,
    ("beit3-large", "pretrained"): 746_709_514,
    ("beit3-large", "vqa"): 682_985_529,
    ("beit3-large", "nlvr2"): 681_109_506,
    ("beit3-large", "retrieval"): 675_188_737,
    ("beit3-large", "captions"): 739_033_610,
    ("beit3-large", "imagenet"): 673_725_416,
}  # parameters that are learned: without ALBEF's momentum copies
for (_name, _task), _count in COUNTS.items():
    _net = _name.removeprefix("vlmo-").removeprefix("beit3-")
    _make: Callable[[], VLMConfig]
    if _name == "vilt-b32":
        _system, _make = VILT, partial(_vilt, _task)
    elif _name == "albef":
        _system, _make = ALBEF, partial(_albef, _task)
    elif _name.startswith("vlmo"):
        _system, _make = VLMO, partial(_vlmo, _net, _task)
    else:
        _system, _make = BEIT3, partial(_beit3, _net, _task)
    _ending = "" if _task == "pretrained" else f"-{_task}"
    _title = _system.family + ("" if _net == _name else f" {_net.replace('-', ' ')}")
    _enter(_name + _ending, _system, _count, f"{_title} {_WORDS[_task]}.", _make, _task)
