"""SigLIP 2's NaFlex against transformers: patches of pictures of many sizes, features, batches of unequal lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_towers_hf import siglip2_folder
from transformers import Siglip2ImageProcessorPil

import chiasm
from chiasm.encoders.naflex import NaFlex
from chiasm.errors import CheckpointError, DataError
from chiasm.infer import embed
from chiasm.processing.base import Place
from chiasm.processing.naflex import NaFlexFrontEnd
from chiasm.types import Image as Picture
from chiasm.types import Layout

SIDES = [(64, 64), (640, 480), (480, 640), (33, 60), (500, 40), (7, 900), (1, 1), (17, 16), (224, 223)]
PLACE = Place("s", 0, 1)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("naflex") / "hf"
    theirs = siglip2_folder(folder)
    return folder, theirs, chiasm.load(folder)


@pytest.mark.parametrize(("patch", "patches"), [(16, 256), (16, 1024), (8, 20), (14, 64), (16, 1)])
def test_patches_are_those_of_transformers(patch: int, patches: int):
    theirs = Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=patches)
    ours = NaFlexFrontEnd(NaFlexFrontEnd.Config(patch=patch, patches=patches))
    for width, height in SIDES:
        expected = theirs(picture(width, height), return_tensors="pt")
        item = ours(Picture(picture(width, height)), PLACE)
        rows, columns = item.layout.grid
        assert [rows, columns] == expected.spatial_shapes[0].tolist(), (width, height)
        assert rows * columns == int(expected.pixel_attention_mask.sum()) == item.inputs.shape[1] <= patches
        assert item.layout.shape == tuple(item.inputs.shape[1:]) and item.layout.original == (height, width)
        torch.testing.assert_close(
            item.inputs[0], expected.pixel_values[0, : rows * columns].float(), atol=1e-6, rtol=1e-6
        )


def test_the_layout_is_known_from_the_header(tmp_path: Path):
    front = NaFlexFrontEnd(NaFlexFrontEnd.Config())
    picture(300, 170).save(tmp_path / "a.png")
    medium = Picture(str(tmp_path / "a.png"))
    assert front.layout(medium, PLACE) == front(medium, PLACE).layout
    (tmp_path / "b.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"b\.png"):
        front(Picture(str(tmp_path / "b.png")), PLACE)


def test_vectors_of_any_proportions_are_those_of_transformers(both: tuple[Path, Any, Any]):
    """What transformers pads to 20 patches is as long as the longest picture here."""
    folder, theirs, vlm = both
    shown = [picture(*side) for side in SIDES]
    given = Siglip2ImageProcessorPil.from_pretrained(folder)(shown, return_tensors="pt")
    with torch.no_grad():
        expected = theirs.get_image_features(**given)
        expected = getattr(expected, "pooler_output", expected)
        states = theirs.vision_model(**given).last_hidden_state
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(vlm.embed(images=shown, batch=4), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vlm.embed(images=shown[:1]), expected[:1], atol=1e-5, rtol=1e-5)
    assert float((expected @ expected.T).fill_diagonal_(0).max()) < 0.9999, "the pictures are told apart"
    samples = [vlm.processor(embed.conversation(one, "image")) for one in shown]
    batch = vlm.processor.collate(samples)
    media = batch.media["image"]
    with torch.no_grad():
        tokens = vlm.model.encoders["image"](media.inputs, media.layouts)
    for i, layout in enumerate(media.layouts):
        length = layout.grid[0] * layout.grid[1]
        torch.testing.assert_close(tokens.x[i, :length], states[i, :length], atol=1e-5, rtol=1e-5)
        assert tokens.mask[i].sum() == length and not tokens.x[i, length:].any()


def test_every_parameter_learns_and_what_fills_up_does_not_matter():
    torch.manual_seed(0)
    tower = NaFlex(NaFlex.Config(side=3, patch=4, dim=24, depth=2, heads=2, mlp=48))
    inputs = torch.randn(3, 12, 48)
    layouts = [Layout(1, (12, 48), (3, 4)), Layout(1, (2, 48), (1, 2)), Layout(1, (6, 48), (6, 1))]
    tokens = tower(inputs, layouts)
    changed = inputs.clone()
    changed[1, 2:], changed[2, 6:] = 99.0, -99.0
    assert torch.equal(tower(changed, layouts).x, tokens.x)
    (tokens.x * torch.randn(3, 12, 24)).sum().backward()
    idle = {f"blocks.{i}.attn.k.bias" for i in range(2)}  # one number on all scores of a query
    assert {n for n, p in tower.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6} <= idle
    with pytest.raises(DataError, match="3 pictures of at most 12 patches"):
        tower(inputs, [Layout(1, (20, 48), (4, 5))] * 3)
    with pytest.raises(DataError, match=r"shape \(patches, 48\) was expected"):
        tower(torch.randn(1, 5, 47))


def test_more_patches_of_the_same_checkpoint(both: tuple[Path, Any, Any]):
    """The number of patches is an option of the processing: positions are stretched to whatever grid there is."""
    folder, theirs, vlm = both
    front = vlm.config.processing.media["image"]
    more = NaFlexFrontEnd(front.edit(patches=60))
    item = more(Picture(picture(640, 480)), PLACE)
    given = Siglip2ImageProcessorPil.from_pretrained(folder, max_num_patches=60)(
        [picture(640, 480)], return_tensors="pt"
    )
    with torch.no_grad():
        states = theirs.vision_model(**given).last_hidden_state
        found = vlm.model.encoders["image"](item.inputs, [item.layout])
    length = item.inputs.shape[1]
    assert length > 40
    torch.testing.assert_close(found.x[0], states[0, :length], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_read_is_refused(both: tuple[Path, Any, Any], tmp_path: Path):
    import json
    import shutil

    folder, _, _ = both
    for name, change in (("preprocessor_config.json", {"do_normalize": False}), ("config.json", {"num_patches": 10})):
        place = tmp_path / name
        shutil.copytree(folder, place)
        values = json.loads((place / name).read_text())
        (values if "do_normalize" in change else values["vision_config"]).update(change)
        (place / name).write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=next(iter(change))):
            chiasm.load(place)
