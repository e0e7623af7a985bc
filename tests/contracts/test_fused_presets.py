"""Presets of models that fuse: sizes by the authors' formulas, and that the tiny form reads, answers and matches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image

import chiasm
from chiasm.compose import build_model
from chiasm.fusion.pair import PairConfig, pictures_of
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import VLMConfig
from chiasm.presets import preset, presets, record_of
from chiasm.presets.page import describe, page

NAMES = [record.name for record in presets() if isinstance(record.function().model, PairConfig)]
TOKENIZER = "src/chiasm/weights/tiny-lm"


def linear(a: int, b: int) -> int:
    return a * b + b


def block(d: int, mlp: int) -> int:
    """Attention with four matrices, a perceptron, two norms."""
    return 4 * linear(d, d) + linear(d, mlp) + linear(mlp, d) + 4 * d


def answers(inputs: int, hidden: int, classes: int) -> int:
    return linear(inputs, hidden) + 2 * hidden + linear(hidden, classes)


def words(d: int, v: int) -> int:
    return linear(d, d) + 2 * d + v * d + v


def vilt(task: str) -> int:
    d, kinds = 768, 3 if task == "nlvr2" else 2
    body = (30522 + 40 + 2) * d + 2 * d + linear(3 * 32 * 32, d) + d + 145 * d + kinds * d
    body += 12 * block(d, 3072) + 2 * d + linear(d, d)
    heads = {
        "pretrained": words(d, 30522) + linear(d, 2),
        "vqa": answers(d, 2 * d, 3129),
        "nlvr2": answers(2 * d, 2 * d, 2),
        "retrieval": linear(d, 2) + linear(d, 1),
    }
    return body + heads[task]


def albef(task: str) -> int:
    d, side = 768, 16 if task == "pretrained" else 24
    vision = linear(3 * 256, d) + d + (side * side + 1) * d + 12 * block(d, 3072) + 2 * d
    table = (30522 + 512 + 2) * d + 2 * d
    crossing = block(d, 3072) + 4 * linear(d, d) + 2 * d
    body = vision + table + 6 * block(d, 3072) + 6 * crossing
    compared = 2 * linear(d, 256) + 1
    heads = {
        "pretrained": compared + linear(d, d) + 2 * d + 30522 + linear(d, 2),
        "retrieval": compared + linear(d, 2),
        "vqa": table + 6 * crossing + linear(d, d) + 2 * d + 30522,
        "nlvr2": 6 * (crossing - 2 * linear(d, d)) + linear(d, d) + linear(d, 2),
    }
    return body + heads[task]


def vlmo(net: str, task: str) -> int:
    d, depth, heads, mlp, both = {
        "base": (768, 12, 12, 3072, 2), "base-plus": (544, 24, 16, 2176, 3), "large": (1024, 24, 16, 4096, 3),
    }[net]  # fmt: skip
    side = {"pretrained": 14, "vqa": 30}.get(task, 24)
    kinds = 3 if task == "nlvr2" else 2
    expert = linear(d, mlp) + linear(mlp, d) + 2 * d
    body = (30522 + 2) * d + 2 * d + linear(3 * 256, d) + d + kinds * d + 2 * d + linear(d, d)
    body += depth * (4 * d * d + 3 * d + 2 * d + 2 * expert) + both * expert
    if net == "base-plus":
        body += 40 * d + (side * side + 1) * d
    else:
        body += depth * 2 * d + heads * depth * ((2 * side - 1) ** 2 + 3 + 2 * 196 + 2)
    tasks = {
        "pretrained": words(d, 30522) + linear(d, 2) + 4 * d * d + 2,
        "vqa": answers(d, 2 * d, 3129),
        "nlvr2": answers(2 * d, 2 * d, 2),
        "retrieval": 2 * d * d + 1,
    }
    return body + tasks[task]


def beit3(net: str, task: str) -> int:
    d, depth, mlp = {"base": (768, 12, 3072), "large": (1024, 24, 4096)}[net]
    side = {"vqa": 30, "retrieval": 24, "captions": 30}.get(task, 14)
    expert = 4 * linear(d, d) + linear(d, mlp) + linear(mlp, d) + 2 * (3 * d + mlp)
    body = 64010 * d + linear(3 * 256, d) + 2 * d + (side * side + 3) * d + 1024 * d + 2 * depth * expert
    last = 0 if task in ("vqa", "imagenet") else 4 * d
    tasks = {
        "pretrained": linear(d, 64010) + linear(d, 8192),
        "captions": linear(d, 64010),
        "vqa": 2 * d + linear(d, d) + answers(d, 2 * d, 3129),
        "nlvr2": 8 * d + answers(4 * d, 2 * d, 2),
        "retrieval": 2 * d * d + 1,
        "imagenet": 2 * d + linear(d, 1000),
    }
    return body + last + tasks[task]


def formula(name: str) -> int:
    task = next(
        (t for t in ("vqa", "nlvr2", "retrieval", "captions", "imagenet") if name.endswith("-" + t)), "pretrained"
    )
    net = name.removesuffix("-" + task)
    if net == "vilt-b32":
        return vilt(task)
    if net == "albef":
        return albef(task)
    family, _, size = net.partition("-")
    return {"vlmo": vlmo, "beit3": beit3}[family](size, task)


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str) -> None:
    model = build_model(record_of(name).config().model, "meta")
    assert sum(p.numel() for p in model.parameters()) == record_of(name).parameters == formula(name)


def test_published_sizes() -> None:
    """What the authors print, in millions."""
    for name, millions in (
        ("beit3-base", 276), ("beit3-base-vqa", 228), ("beit3-base-nlvr2", 226), ("beit3-base-captions", 271),
        ("beit3-base-retrieval", 222), ("beit3-large-vqa", 683), ("beit3-large-nlvr2", 681),
    ):  # fmt: skip
        assert abs(record_of(name).parameters / 1e6 - millions) < 1, name


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TOKENIZER)


def small(name: str) -> VLMConfig:
    config = preset(name, tiny=True, vocab=1024)
    return config.edit(**{"processing.masking.token": "<unk>"}) if config.processing.masking else config


def conversation(images: int, color: str, text: str) -> list[Any]:
    pictures = [{"type": "image", "image": Image.new("RGB", (40 + 9 * i, 36), color)} for i in range(images)]
    return [{"role": "user", "content": [*pictures, text]}]


@pytest.mark.parametrize("name", NAMES)
def test_tiny_form(name: str) -> None:
    torch.manual_seed(0)
    vlm = chiasm.build(small(name), tokenizer=tokenizer()).eval()
    for parameter in vlm.parameters():
        if parameter.ndim:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model, images = vlm.model, vlm.config.model.images
    talks = [conversation(images, "red", "a red square"), conversation(images, "blue", "it is blue, and a large one")]
    batch = vlm.processor.batch(talks)

    def read(batch: Any) -> torch.Tensor:
        c = vlm.config.model
        if c.tasks.classes:
            return model.classify(batch)
        if getattr(c, "answer_depth", 0):
            return model.fused(*model.read(batch))[:, 0]
        if getattr(c, "picture_classes", None):
            return model.picture_logits(pictures_of(batch, 1)[0])
        if c.tasks.match or getattr(c, "contrast", None):
            return model.match(batch)[:, None]
        return model.fill(batch)[:, :4].flatten(1)

    with torch.no_grad():
        found = read(batch)
        for row, talk in enumerate(talks):
            assert torch.allclose(read(vlm.processor.batch([talk]))[0], found[row], atol=1e-5)
        other = read(vlm.processor.batch([conversation(images, "blue", "a red square"), talks[1]]))
    assert not torch.allclose(other[0], found[0], atol=1e-6) and torch.allclose(other[1], found[1], atol=1e-5)


def test_pages_tell_what_is_read() -> None:
    told = page(record_of("beit3-base-vqa"))
    assert (
        "3129 classes" in told and "480 x 480 pixels, 30 x 30 patches" in told and "the 3,129 of the authors'" in told
    )
    assert "proportions kept" in describe(record_of("vilt-b32").config())
