"""Mistakes of published code of this family, each with a test that it is not made here.

OpenFlamingo (open_flamingo 655f693): F1 text before a picture looks at later ones; F2 ids become floats where the model
is of a lower type; F3 gradients are clipped before they are whole; F4 weight decay reaches gates and norms; F5 newer
towers hand over patches after their last norm; F6 one inner width whatever the language model; F7 pictures are mirrored
though texts name sides. transformers: H5 labels crash with added tokens; H6 positions without a picture get a mixture.
F3 is tested in ``tests/recipes/test_loop.py``: clipped once and whole, and a loss that is no number stops a run; the
masks of F4, which here are parameters of their own, in ``tests/recipes/test_rows.py``.
F1 and H6 are also tested in every configuration in ``test_cross_attention.py``; H5 by the gradients of
``test_idefics_hf.py``, whose models have added tokens.
"""

from __future__ import annotations

import pytest
import torch
from hf_folders import photo
from PIL.Image import Transpose

from chiasm.compose import build_model
from chiasm.connectors.resampler import Resampler
from chiasm.errors import DataError
from chiasm.fusion.gated import BlockConfig, GatedBlock, Sight
from chiasm.presets import preset
from chiasm.processing.base import Place
from chiasm.processing.collate import collate
from chiasm.processing.image import ImageFrontEnd
from chiasm.train.optim import Masters, optimizer
from chiasm.train.plan import resolve
from chiasm.types import Image, Layout, MediaItem, Sample, Tokens


def batch_of(*ids: int, picture_at: int | None = 0):
    media = []
    if picture_at is not None:
        media = [MediaItem("image", torch.rand(1, 3, 16, 16), Layout(1, (3, 16, 16)), torch.tensor([picture_at]))]
    return collate([Sample("a", torch.tensor(ids), torch.ones(len(ids)).bool(), media)], 0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = build_model(preset("openflamingo-9b", tiny=True).model)
    for name, p in made.named_parameters():
        if name.endswith("_gate"):
            p.data.fill_(0.7)
    return made


@torch.no_grad()
def test_f1_h6_no_picture_no_mixture():
    """Whatever the pictures are, a blind position gets exactly 0 from attention: not their mean, not nearly 0."""
    block = GatedBlock(BlockConfig(heads=2, head_dim=4, gate_start=0.7), 8, 6)
    x, media = torch.randn(1, 3, 8), 1e4 * torch.randn(1, 5, 6)
    seen = torch.zeros(1, 3, 5, dtype=torch.bool)
    seen[0, 2, 1:3] = True
    found = block(x, media, Sight.of(seen))
    other = block(x, -media, Sight.of(seen))
    assert torch.equal(found[:, :2], other[:, :2]) and (found[:, 2] - other[:, 2]).abs().max() > 1
    assert found.isfinite().all()


def test_f2_ids_stay_ids(model):
    batch = batch_of(3, 300, 511, 7)
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.input_ids.dtype == moved.media["image"].slots.dtype == torch.long
    assert torch.equal(moved.input_ids, batch.input_ids), "511 is no number of bfloat16"
    assert moved.media["image"].inputs.dtype == torch.bfloat16
    low = build_model(preset("openflamingo-9b", tiny=True).model, dtype=torch.bfloat16)
    assert low(moved, logits="all").logits.dtype == torch.bfloat16


def test_f4_decay_is_for_matrices(model):
    plan = resolve(model, {"*": "freeze", "cross": "train", "connectors": "train"}, 1e-3)
    groups = optimizer(Masters(model, plan, None), plan, "adamw", 0.1, (0.9, 0.999)).param_groups
    decayed = {p.ndim for group in groups if group["weight_decay"] for p in group["params"]}
    spared = {p.ndim for group in groups if not group["weight_decay"] for p in group["params"]}
    assert spared == {1} and 1 not in decayed


def test_f5_patches_before_the_last_norm():
    for name in ("openflamingo-3b", "openflamingo-4b", "openflamingo-9b"):
        tower = preset(name).model.encoders["image"]
        assert (tower.layer, tower.post_norm, tower.select) == (-1, "unused", "patch")


def test_f6_inner_width_is_a_choice():
    with torch.device("meta"):
        flamingo = GatedBlock(BlockConfig(), 4096, 1024)
        idefics = GatedBlock(preset("idefics-9b").model.blocks, 4096, 1280)
    assert flamingo.q.out_features == 512 and idefics.q.out_features == 4096


@pytest.mark.parametrize("name", ["openflamingo-9b", "blip2-opt-2.7b", "minigpt-4-vicuna-7b"])
def test_f7_pictures_are_not_changed_by_chance(name: str):
    """The front end is the same in training and in use; LAVIS also draws other changes for one of two sources (B11)."""
    front = preset(name).processing.media["image"]
    assert not {"flip", "mirror", "augment"} & set(type(front).model_fields)
    made, picture = ImageFrontEnd(front), photo(60, 40, 1)
    found = [made(Image(picture), Place("x", 0, 1)).inputs for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    turned = made(Image(picture.transpose(Transpose.FLIP_LEFT_RIGHT)), Place("x", 0, 1)).inputs
    assert (turned - found[0]).abs().max() > 0.1, "a mirrored picture would be seen"


@torch.no_grad()
def test_learned_times_of_frames():
    """Flamingo's resampler over a clip: each frame's time is added to its patches, then all are one source."""
    torch.manual_seed(0)
    values = {"queries": 3, "depth": 1, "heads": 2, "head_dim": 4, "project": False}
    timed = Resampler(Resampler.Config.parse(values | {"frames": 4}), {"image": 8}, 8)
    plain = Resampler(Resampler.Config.parse(values), {"image": 8}, 8)
    plain.load_state_dict({k: v for k, v in timed.state_dict().items() if k != "times"})
    x = torch.randn(5, 6, 8)  # a clip of three frames, and one of two
    found = timed(Tokens(x, runs=(3, 2))).x
    assert found.shape == (2, 3, 8)
    for clip, frames in ((found[0], x[:3]), (found[1], x[3:])):
        whole = torch.cat([frame + timed.times[i] for i, frame in enumerate(frames)])
        torch.testing.assert_close(clip, plain(Tokens(whole[None])).x[0], atol=1e-6, rtol=1e-5)
    assert timed.config.joins_units and not plain.config.joins_units
    with pytest.raises(DataError, match="a clip of 5 frames does not fit the 4 learned times"):
        timed(Tokens(x, runs=(5,)))
