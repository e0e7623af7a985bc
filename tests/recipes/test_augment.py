"""Pictures changed at random in training, stochastic depth and rates by layer: by formula, and where each applies."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import chiasm
from chiasm.config import load_yaml
from chiasm.data.augmented import AugmentedRenderer
from chiasm.data.base import Example
from chiasm.data.loader import Renderer
from chiasm.data.randomness import placed
from chiasm.errors import ConfigError, DataError
from chiasm.nn.depth import dropped, set_depth
from chiasm.processing.augment import MOVED, OPERATIONS, Augment
from chiasm.train.plan import resolve
from chiasm.train.recipe import Stage
from chiasm.types import Box, Message, Text
from chiasm.types import Image as Picture

ROOT = Path(__file__).parents[2]
TOKENIZER = str(ROOT / "src" / "chiasm" / "weights" / "tiny-lm")


def picture(height: int = 18, width: int = 23, seed: int = 0, low: int = 30, high: int = 220) -> Image.Image:
    values = np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def grey(x: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 luma in Pillow's whole numbers."""
    return (x[..., 0] * 19595 + x[..., 1] * 38470 + x[..., 2] * 7471 + 0x8000) >> 16


def blended(other: np.ndarray, x: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(other + factor * (x - other), 0, 255)


def equalized(channel: np.ndarray) -> np.ndarray:
    counts = np.bincount(channel.ravel(), minlength=256)
    full = counts[counts > 0]
    step = (full.sum() - full[-1]) // 255
    if len(full) <= 1 or not step:
        return channel
    before = step // 2 + np.concatenate(([0], np.cumsum(counts)[:-1]))
    return np.clip(before // step, 0, 255)[channel]


def smooth(x: np.ndarray) -> np.ndarray:
    """A 3 x 3 filter of ones with 5 in the middle, over 13; the border as it is."""
    out = x.astype(float)
    shifted = sum(x[1 + i : x.shape[0] - 1 + i, 1 + j : x.shape[1] - 1 + j] for i in (-1, 0, 1) for j in (-1, 0, 1))
    out[1:-1, 1:-1] = np.floor((shifted + 4.0 * x[1:-1, 1:-1]) / 13 + 0.5)
    return out


def formula(name: str, x: np.ndarray, level: float) -> np.ndarray:
    factor = 0.1 + 1.8 * level
    if name == "auto_contrast":
        low, high = x.min((0, 1)), x.max((0, 1))
        return np.clip((x - low) * 255.0 / (high - low), 0, 255)
    if name == "equalize":
        return np.stack([equalized(x[..., c]) for c in range(3)], -1)
    if name == "solarize_add":
        return np.where(x < 128, np.clip(x + int(110 * level), 0, 255), x)
    bits = max(1, int(4 * level))
    return {
        "identity": lambda: x,
        "invert": lambda: 255 - x,
        "posterize": lambda: x & (0xFF & ~((1 << (8 - bits)) - 1)),
        "solarize": lambda: np.where(x < 256 * level, x, 255 - x),
        "brightness": lambda: blended(np.zeros(1), x, factor),
        "color": lambda: blended(grey(x)[..., None], x, factor),
        "contrast": lambda: blended(np.full(1, int(grey(x).mean() + 0.5)), x, factor),
        "sharpness": lambda: blended(smooth(x), x, factor),
    }[name]()


@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - MOVED))
def test_colours_by_formula(name: str, level: float):
    image = picture(40, 61)
    found = np.asarray(OPERATIONS[name](image, level, Augment())).astype(int)
    expected = formula(name, np.asarray(image).astype(int), level)
    assert np.abs(found - expected).max() <= (1 if name == "auto_contrast" else 0.9999), "Pillow rounds down"
    assert name == "identity" or (name, level) == ("solarize", 1) or np.abs(found - np.asarray(image)).mean() > 0.5


def bilinear(x: np.ndarray, column: float, row: float, fill: tuple[int, int, int]) -> Any:
    """The picture at a point whose pixel centres lie at halves; None at its border, where codes differ."""
    height, width = x.shape[:2]
    if column < 0 or row < 0 or column >= width or row >= height:
        return np.array(fill, float)
    column, row = column - 0.5, row - 0.5
    i, j = math.floor(row), math.floor(column)
    if i < 0 or j < 0 or i + 1 >= height or j + 1 >= width:
        return None
    a, b = row - i, column - j
    top, below = (1 - b) * x[i, j] + b * x[i, j + 1], (1 - b) * x[i + 1, j] + b * x[i + 1, j + 1]
    return (1 - a) * top + a * below


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", sorted(MOVED))
def test_places_by_formula(name: str, sign: int):
    image, given = picture(), Augment(shift=7, fill=(9, 80, 200))
    x, v = np.asarray(image).astype(float), sign * 0.6
    found = np.asarray(OPERATIONS[name](image, v, given)).astype(float)
    height, width = x.shape[:2]
    angle, compared = math.radians(30 * v), 0
    for row in range(height):
        for column in range(width):
            at, down = column + 0.5, row + 0.5
            if name == "rotate":  # counter-clockwise about the middle
                dx, dy = at - width / 2, down - height / 2
                at = math.cos(angle) * dx - math.sin(angle) * dy + width / 2
                down = math.sin(angle) * dx + math.cos(angle) * dy + height / 2
            elif name.startswith("shear"):
                at, down = (at + 0.3 * v * down, down) if name == "shear_x" else (at, down + 0.3 * v * at)
            else:
                at, down = (at + 7 * v, down) if name == "translate_x" else (at, down + 7 * v)
            expected = bilinear(x, at, down, given.fill)
            if expected is not None and min(abs(at % width), abs(down % height)) > 1e-6:
                compared += 1
                assert np.abs(found[row, column] - expected).max() <= 1.01, (row, column)
    assert compared > 0.6 * height * width and np.abs(found - x).mean() > 1


def test_a_part_is_drawn_as_it_should_be():
    """Area and ratio of sides lie within bounds, all of the picture is reached, and a strip gives its middle."""
    augment, shares, ratios, seen = Augment(crop=(0.3, 0.8)), [], [], np.zeros((60, 80), bool)
    torch.manual_seed(0)
    for _ in range(400):
        left, top, right, bottom = augment.part(80, 60)
        assert 0 <= left < right <= 80 and 0 <= top < bottom <= 60
        shares.append((right - left) * (bottom - top) / 4800)
        ratios.append((right - left) / (bottom - top))
        seen[top:bottom, left:right] = True
    assert 0.28 < min(shares) < 0.34 and 0.74 < max(shares) < 0.83
    assert 0.72 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.37 and seen.all()
    square = Augment(crop=(0.3, 0.6), ratio=(0.8, 1.25))  # such a part always fits: nothing is drawn again
    parts = [square.part(200, 200) for _ in range(400)]
    assert np.mean([(r - x) * (b - y) / 40000 for x, y, r, b in parts]) == pytest.approx(0.45, abs=0.015)
    assert np.mean([math.log((r - x) / (b - y)) for x, y, r, b in parts]) == pytest.approx(0, abs=0.02)
    assert augment.part(1000, 10) == (493, 0, 506, 10)
    assert Augment(crop=(1, 1), ratio=(1, 1)).part(32, 32) == (0, 0, 32, 32)


def test_how_often():
    torch.manual_seed(1)
    image = picture()
    turned = np.asarray(image)[:, ::-1]
    flips = sum(np.array_equal(np.asarray(Augment(flip=0.3)(image)), turned) for _ in range(400))
    assert 90 < flips < 150
    chosen = Augment(number=2, chance=0.5, operations=("invert",))
    done = sum(not np.array_equal(np.asarray(chosen(image)), np.asarray(image)) for _ in range(400))
    assert 160 < done < 240, "of two inversions exactly one is done half of the time"


# ------------------------------------------------------------------------------------------------------------ renderer


def towers() -> Any:
    config = load_yaml(ROOT / "recipes" / "clip-playground.yaml")["model"]["config"]
    return chiasm.build(config, tokenizer=TOKENIZER)


def fused(name: str) -> Any:
    config = chiasm.preset(name, tiny=True, vocab=1024).edit(**{"processing.masking.token": "<unk>"})
    return chiasm.build(config, tokenizer=TOKENIZER)


def example(*parts: Any) -> Example:
    return Example("one", (Message("user", (Picture(picture(40, 60)), *parts)),), "made")


def pixels(renderer: Renderer, one: Example, seed: int = 0) -> torch.Tensor:
    with placed(seed):
        return renderer.sample(one).media[0].inputs


def test_training_samples_alone_are_changed():
    processor, one = towers().processor, example(Text("a red circle"))
    plain = pixels(Renderer(processor), one)
    whole = AugmentedRenderer(processor, Augment(crop=(1, 1), ratio=(1, 60)))
    changed = AugmentedRenderer(processor, Augment(crop=(0.2, 0.5), flip=0.5, number=2))
    first = pixels(changed, one, 3)
    assert first.shape == plain.shape and torch.equal(first, pixels(changed, one, 3))
    assert not torch.equal(first, pixels(changed, one, 4)) and not torch.equal(first, plain)
    assert torch.equal(first, pixels(pickle.loads(pickle.dumps(changed)), one, 3)), "a worker makes the same"
    assert torch.equal(pixels(Renderer(changed.processor), one), plain), "what is held out is as it is"
    assert (pixels(whole, one) - plain).abs().max() > 0  # bicubic instead of bilinear, over the same part


def test_boxes_are_not_broken():
    processor = towers().processor
    boxed, told = example(Text("at"), Box((1, 2, 30, 20))), example(Text("it is at [0.10, 0.20, 0.50, 0.60]"))
    for moving in (Augment(crop=(0.5, 1)), Augment(flip=0.5), Augment(number=1, operations=("rotate",))):
        for one in (boxed, told):
            with pytest.raises(DataError, match="moves what they show"):
                AugmentedRenderer(processor, moving).sample(one)
    colours = AugmentedRenderer(processor, Augment(number=2, chance=1, operations=("brightness", "equalize")))
    plain = Renderer(processor).sample(boxed)
    assert torch.equal(colours.sample(boxed).input_ids, plain.input_ids)
    assert torch.equal(colours.sample(told).input_ids, Renderer(processor).sample(told).input_ids)


def test_refusals():
    given: dict[str, Any] = {"name": "s", "lr": 1e-3, "steps": 1}
    with pytest.raises(ConfigError, match="leave one of them out"):
        Stage.parse({**given, "augment": {"flip": 0.5}, "feature_cache": "features"})
    with pytest.raises(ConfigError, match=r"unknown operation 'rotat'.*rotate"):
        Stage.parse({**given, "augment": {"number": 1, "operations": ["rotat"]}})
    with pytest.raises(ConfigError, match="lower bound"):
        Augment(crop=(0.9, 0.2))
    vilt = fused("vilt-b32")
    with pytest.raises(ConfigError, match=r"leave augment\.crop out"):
        AugmentedRenderer(vilt.processor, Augment(crop=(0.5, 1)))
    AugmentedRenderer(vilt.processor, Augment(number=2)).sample(example(Text("a red circle")))
    silent = towers().processor
    silent.front_ends = {}
    with pytest.raises(ConfigError, match="takes none"):
        AugmentedRenderer(silent, Augment(flip=0.5))


# ------------------------------------------------------------------------------------------------------------- blocks


def test_branches_left_out_by_formula():
    torch.manual_seed(0)
    branch = torch.randn(4000, 3, 5, dtype=torch.float64)
    found = dropped(branch, 0.3, True)
    left = (found == 0).flatten(1).all(1)
    assert 0.26 < left.double().mean() < 0.34
    torch.testing.assert_close(found[~left], branch[~left] / 0.7)
    assert dropped(branch, 0.3, False) is branch and dropped(branch, 0.0, True) is branch


@pytest.mark.parametrize("name", ["vit-b16-224", "beit3-base", "vlmo-base", "vilt-b32"])
def test_every_stack_has_depth(name: str):
    """The rates rise from 0 to the last block's; in evaluation nothing changes, in training each sample does."""
    torch.manual_seed(0)
    vlm = chiasm.build(chiasm.preset(name, tiny=True)) if name.startswith("vit-") else fused(name)
    text = () if name.startswith("vit-") else (Text("a red circle"),)
    batch = vlm.processor.batch([example(*text).messages])

    def run() -> torch.Tensor:
        with torch.no_grad():
            if name.startswith("vit-"):
                return vlm.model.classify(batch)
            return vlm.model(batch).hidden

    vlm.model.eval()
    before = run()
    assert set_depth(vlm.model, 0.9) > 0
    assert torch.equal(run(), before)
    rates = [m.drop_path for m in vlm.model.modules() if hasattr(m, "drop_path")]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.9) and rates == sorted(rates)
    vlm.model.train()
    assert len({tuple(run().flatten()[:8].tolist()) for _ in range(12)}) > 2
    set_depth(vlm.model, 0.0)
    vlm.model.eval()
    torch.testing.assert_close(run(), before)


def test_no_block_to_leave_out_is_an_error():
    with pytest.raises(ConfigError, match="no block"):
        set_depth(torch.nn.Linear(2, 2), 0.1)


def test_rates_by_layer_are_the_published_ones():
    """BEiT-3 base on NLVR2: 7e-4 and 0.65, as the assigner of its authors gives them to each name."""
    config = chiasm.preset("beit3-base-nlvr2").edit(**{"processing.labels": ["False", "True"]})
    with torch.device("meta"):
        model = chiasm.build(config, device="meta").model
    rates = resolve(model, {"*": "train", "covered": "freeze", "classifier": 1e-3}, 7e-4, 0.65).rates
    for name, rate in rates.items():
        if name.startswith("layers."):
            expected: Any = 7e-4 * 0.65 ** (12 - int(name.split(".")[1]))
        elif name.split(".")[0] in ("cls", "patch", "image_positions", "text_positions", "words"):
            expected = 7e-4 * 0.65**13
        else:
            expected = None if name == "covered" else 1e-3 if name.startswith("classifier") else 7e-4
        assert rate == (None if expected is None else pytest.approx(expected)), name
    with pytest.raises(ConfigError, match="no stack"):
        resolve(torch.nn.Linear(2, 2), {"*": "train"}, 1e-3, 0.5)
    tower = chiasm.build(chiasm.preset("clip-vit-b32"), device="meta").model
    rates = resolve(tower, {"*": "train"}, 1.0, 0.5).rates
    assert rates["encoders.image.positions"] == 0.5**13 and rates["encoders.text.blocks.11.norm1.bias"] == 0.5
    assert rates["logit_scale"] == rates["connectors.image.proj.weight"] == rates["encoders.text.norm.bias"] == 1


def test_a_recipe_trains_with_all_of_them(tmp_path: Path):
    from chiasm.train import load_recipe, train

    changes = {
        "out": str(tmp_path / "run"),
        "stages.0.augment": {"crop": [0.5, 1], "flip": 0.5, "number": 2},
        "stages.0.drop_path": 0.2,
        "stages.0.layer_decay": 0.7,
        "held_out": {},
    }
    recipe = load_recipe(ROOT / "recipes" / "clip-playground.yaml", changes, tiny=True)
    train(recipe)
    vlm = chiasm.load(tmp_path / "run" / "model")
    assert all(m.drop_path == 0 for m in vlm.model.modules() if hasattr(m, "drop_path"))
    plan = (tmp_path / "run" / "contrastive" / "plan.json").read_text()
    assert "0.0014" in plan and "0.00098" in plan, "of 0.002: 0.7 and 0.49 of it"
