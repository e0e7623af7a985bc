"""A vision transformer that classifies against transformers: folders in and out, logits, loss, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from weights import lively

import chiasm
from chiasm.errors import CheckpointError, ConfigError, DataError
from chiasm.vlm import VLM

NAMES = ["cat", "dog", "red car", "tree", "boat"]


def pictures() -> list[Image.Image]:
    values = np.random.default_rng(1)
    return [Image.fromarray(values.integers(0, 255, size, dtype=np.uint8)) for size in ((50, 41, 3), (33, 60, 3))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        layer_norm_eps=1e-6, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)},
    )  # fmt: skip
    model = lively(ViTForImageClassification(config))
    model.save_pretrained(place)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def vit(folder: Path) -> VLM:
    return chiasm.load(folder)


def given(vlm: VLM, **more: Any) -> Any:
    return vlm.processor.batch(
        [[{"role": "user", "content": [{"type": "image", "image": picture}]}] for picture in pictures()], **more
    )


def test_logits_and_loss(folder: Path, vit: VLM):
    theirs = ViTForImageClassification.from_pretrained(folder).eval()
    pixels = ViTImageProcessor.from_pretrained(folder)(pictures(), return_tensors="pt").pixel_values
    batch = given(vit)
    torch.testing.assert_close(batch.media["image"].inputs, pixels, atol=1e-6, rtol=1e-6)
    right = torch.tensor([3, 1])
    with torch.no_grad():
        expected = theirs(pixels, labels=right)
        logits = vit.model(batch).logits
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(F.cross_entropy(logits, right), expected.loss, atol=1e-5, rtol=1e-5)
    shares = vit.classify(images=pictures())
    torch.testing.assert_close(shares, expected.logits.softmax(-1), atol=1e-5, rtol=1e-5)
    assert list(vit.config.processing.labels) == NAMES and shares.std() > 1e-3
    assert vit.num_parameters() == sum(p.numel() for p in theirs.parameters())


def test_the_objective_learns_from_labels(vit: VLM):
    from chiasm import registry

    objective = registry.get("objective", "classes")
    turns = [
        [{"role": "user", "content": [{"type": "image", "image": picture}]}, {"role": "assistant", "content": name}]
        for picture, name in zip(pictures(), ("dog", "boat"), strict=True)
    ]
    batch = vit.processor.batch(turns, train=True)
    loss = objective(objective.Config())(vit.model, batch)
    with torch.no_grad():
        expected = F.cross_entropy(vit.model.classify(batch), torch.tensor([1, 4]), reduction="sum")
    torch.testing.assert_close(loss.total.detach() if hasattr(loss, "total") else loss[0].detach(), expected)


def test_saved_exported_and_read_again(folder: Path, vit: VLM, tmp_path: Path):
    ours = chiasm.load(vit.save(tmp_path / "ours"))
    assert torch.equal(ours.classify(images=pictures()), vit.classify(images=pictures()))
    vit.export(tmp_path / "out")
    again = ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = again(given(vit).media["image"].inputs).logits
        torch.testing.assert_close(logits, vit.model.classify(given(vit)), atol=1e-6, rtol=1e-6)
    assert again.config.id2label == dict(enumerate(NAMES))
    assert chiasm.load(tmp_path / "out").config.model == vit.config.model


def test_what_is_refused(vit: VLM, tmp_path: Path):
    with pytest.raises(ConfigError, match="writes no text"):
        vit.generate([{"role": "user", "content": [{"type": "image", "image": pictures()[0]}]}])
    with pytest.raises(ConfigError, match="gives no vectors"):
        vit.embed(images=pictures())
    with pytest.raises(DataError, match="0 images for 1 samples"):
        vit.model(vit.processor.batch([[{"role": "user", "content": "only words"}]]))
    with pytest.raises(DataError, match="put it in a list"):
        vit.classify(images="a.jpg")


def test_the_tower_alone_is_still_a_part(folder: Path, tmp_path: Path):
    """``load_part`` reads the tower of a folder that classifies into another model."""
    from chiasm.checkpoints.parts import read_part

    tower = read_part(folder, "encoders.image")
    assert tower.type == "vit" and tower.depth == 2
    model = ViTForImageClassification.from_pretrained(folder).vit
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no reader knows"):
        chiasm.load(tmp_path)
