"""Every recipe parses, says how it is run, holds the published numbers, and trains in its tiny form."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image as Pillow
from rich.console import Console

import chiasm
from chiasm.config import override
from chiasm.data.loader import Renderer
from chiasm.data.mixture import Mixture
from chiasm.errors import ConfigError
from chiasm.presets import presets
from chiasm.processing.base import Place
from chiasm.processing.image import ImageFrontEnd
from chiasm.processing.processor import ProcessingConfig
from chiasm.train import load_recipe, train
from chiasm.train.model import built_config
from chiasm.train.plan import part_of, resolve
from chiasm.train.ways import open_processor, staged
from chiasm.types import Image
from chiasm.vlm import build

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
PUBLISHED = ("llava-1", "llava-1.5", "llava-next", "llava-onevision")
WITH_METHODS = ("llava-1.5-lora", "one-24gb-gpu")
REAL = ("stories", "nlvr", "photos")


def tiny(name: str, out: Path, monkeypatch: pytest.MonkeyPatch, **changes):
    monkeypatch.chdir(ROOT)  # paths in recipes are relative to the repository
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", {"out": str(out), **changes}, tiny=True)
    return recipe, train(recipe, console=Console(file=io.StringIO()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_opens_with_its_command(path):
    lines = path.read_text().splitlines()
    assert any(line.startswith("#") and f"recipes/{path.name}" in line for line in lines[:4])
    load_recipe(path)
    load_recipe(path, tiny=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_stand_in_the_preset_too(name):
    """Two places that were written apart from each other: the recipe, and the record behind the preset's page."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    record = next(p for p in presets() if p.name == recipe.model.preset)
    for mine, published in zip(recipe.stages, record.system.stages, strict=True):
        assert published.lr in (None, mine.lr)
        assert published.batch in (None, mine.batch_size * mine.accumulate)
        assert published.epochs in (None, mine.epochs)
        assert published.warmup == mine.warmup_ratio and published.weight_decay == mine.weight_decay


def test_onevision_has_its_four_stages():
    """What trains, at which rate, and how finely a picture is cut: by the paper's table, for 2000 x 1000 pixels."""
    recipe = load_recipe(ROOT / "recipes" / "llava-onevision.yaml")
    config = built_config(recipe.model)
    model = build(config.model_copy(update={"weights": {}, "tokenizer": None}), device="meta").model
    picture, found = Image(Pillow.new("RGB", (2000, 1000))), []
    for stage in recipe.stages:
        rates = resolve(model, stage.table(), stage.lr).rates
        parts = {part_of(name): rate for name, rate in rates.items()}
        processing = ProcessingConfig.parse(override(config.processing.dump(), stage.processing))
        layout = ImageFrontEnd(processing.media["image"]).layout(picture, Place("s", 0, 1))
        found.append((parts["encoders.image"], parts["connectors.image"], parts["lm"], layout.units - 1))
        assert config.model.count("image", layout) <= 729 * (1 + min(9, layout.units - 1)) * 1.1
    assert found == [(None, 1e-3, None, 0), (2e-6, 1e-5, 1e-5, 2), *[(2e-6, 1e-5, 1e-5, 18)] * 2]
    assert [stage.batch_size * stage.accumulate for stage in recipe.stages] == [512, 256, 256, 256]


def test_a_stage_sees_pictures_by_its_own_processing(tmp_path, monkeypatch):
    """The log counts positions: stage 1 of LLaVA-NeXT gets one unit a picture, stage 2 tiles; the model keeps them."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(ROOT / "recipes" / "llava-next.yaml", tiny=True)
    processor, example = open_processor(recipe.model), Mixture(recipe.data)[0, 0]
    first, second = (len(Renderer(staged(processor, stage)).sample(example).media[0].inputs) for stage in recipe.stages)
    assert (first, second > 1) == (1, True)
    assert staged(processor, recipe.stages[1]) is processor
    wrong = recipe.stages[0].model_copy(update={"processing": {"media.imgae.tiling": None}})
    with pytest.raises(ConfigError, match=r"no medium 'imgae'.*image"):
        staged(processor, wrong)


@pytest.mark.parametrize("name", [*PUBLISHED, *WITH_METHODS])
def test_tiny_form_trains(name, tmp_path, monkeypatch):
    recipe, vlm = tiny(name, tmp_path, monkeypatch)
    steps = [
        json.loads(line)["step"] for line in (tmp_path / recipe.stages[-1].name / "log.jsonl").read_text().splitlines()
    ]
    assert steps[-1] == recipe.stages[-1].steps
    assert chiasm.load(tmp_path / "model").num_parameters() == vlm.num_parameters()


@pytest.mark.parametrize("name", REAL)
def test_shipped_parts_are_configured_as_in_the_demo(name):
    """Where a recipe reads the package's own tower or language model, its configuration must be theirs."""
    demo, mine = (load_recipe(ROOT / "recipes" / f"{n}.yaml").model for n in ("demo", name))
    for part, folder in mine.weights.items():
        kind, _, key = part.partition(".")
        configs = [
            m.config["model"]["encoders"][key] if kind == "encoders" else m.config["model"]["lm"] for m in (demo, mine)
        ]
        assert demo.weights[part] != folder or configs[0] == configs[1]


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_input_in_its_tiny_form(name, tmp_path, monkeypatch, shared_data):
    """People's sentences, real photos, and a language model that was trained on something else entirely."""
    from chiasm.eval import evaluate_recipe

    # The small parts that ship with the package have their own tests: here the towers are random, the stories are real.
    weights = {"lm": "../shared/data/weights/stories260K"} if name == "stories" else {}
    recipe, _ = tiny(name, tmp_path, monkeypatch, **{"model.weights": weights})
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    vlm = chiasm.load(tmp_path / "model")
    found = evaluate_recipe(vlm, recipe, tmp_path / "again", console=Console(file=io.StringIO()), limit=4)
    first = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])
    assert found.true.answers[0].prediction == first["prediction"]
