"""Fine-tunings of ViLT, ALBEF, VLMo and BEiT-3: each parses, says how it is run, begins as published, and trains."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import chiasm
from chiasm.errors import ConfigError
from chiasm.presets import preset, presets
from chiasm.train import load_recipe, train
from chiasm.train.model import built_config
from chiasm.train.plan import matches, resolve
from chiasm.train.recipe import ModelSpec
from chiasm.vlm import build

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes" / "finetune").glob("*.yaml"))
NAMES = [path.stem for path in FILES]
FOLDERS = {"vilt": "vilt-b32", "albef": "albef", "vlmo": "vlmo-base", "beit3": "beit3-base"}


def test_every_task_of_the_base_models_has_a_recipe():
    """A preset for a task, of the sizes that are fine-tuned here, and the recipe that makes it, one to one."""
    tuned = {load_recipe(path).model.preset for path in FILES}
    bases = tuple(f"{name}-" for name in FOLDERS.values())
    known = {p.name for p in presets() if p.name.startswith(bases) and not p.name.startswith("vlmo-base-plus")}
    assert tuned == known and len(FILES) == 15  # ALBEF has a pass of its own before NLVR2


@pytest.mark.parametrize("name", NAMES)
def test_begins_as_published_and_names_every_exception(name):
    """On the meta device: what is fresh, copied and left accounts for every tensor of both models."""
    path = ROOT / "recipes" / "finetune" / f"{name}.yaml"
    assert any(f"recipes/finetune/{name}.yaml" in line for line in path.read_text().splitlines()[:2])
    recipe = load_recipe(path)
    start = recipe.model.start
    spec = recipe.model.model_copy(update={"labels": None, "start": None, "tokenizer": None})
    new = build(built_config(spec), device="meta").model
    old = build(preset(FOLDERS[name.partition("-")[0]]), device="meta").model
    given, wanted = set(old.state_dict()), set(new.state_dict())
    for to, source in start.copies.items():
        twins = {to + n[len(source) :] for n in given if n.startswith(source + ".")}
        assert twins and twins <= wanted, to
        given |= twins
    fresh = {n for n in wanted if start.is_fresh(n)}
    left = {n for n in given if any(matches(pattern, n) for pattern in start.left)}
    assert wanted - fresh == given - left and fresh <= wanted - (given - left)
    for stage in recipe.stages:
        resolve(new, stage.table(), stage.lr)


def test_layers_below_learn_more_slowly():
    """BEiT-3's decay: 0.65 times as fast for each layer below the head, embeddings lowest of all."""
    for name, lr in (("nlvr2", 7e-4), ("retrieval", 2e-4), ("imagenet", 7e-4)):
        recipe = load_recipe(ROOT / "recipes" / "finetune" / f"beit3-{name}.yaml")
        spec = recipe.model.model_copy(update={"labels": None, "start": None, "tokenizer": None})
        stage, model = recipe.stages[0], build(built_config(spec), device="meta").model
        rates = resolve(model, stage.table(), stage.lr, stage.layer_decay).rates
        for layer in range(12):
            rate = lr * 0.65 ** (12 - layer)
            assert rates[f"layers.{layer}.mlp_norm.image.weight"] == pytest.approx(rate)
        assert rates["patch.weight"] == rates["image_positions"] == pytest.approx(lr * 0.65**13)
        assert max(rate or 0 for rate in rates.values()) == lr and rates["covered"] is None


@pytest.mark.parametrize("name", NAMES)
def test_tiny_form_trains(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(ROOT / "recipes" / "finetune" / f"{name}.yaml", {"out": str(tmp_path)}, tiny=True)
    train(recipe, console=Console(file=io.StringIO()))
    for stage in recipe.stages:
        log = [json.loads(line) for line in (tmp_path / stage.name / "log.jsonl").read_text().splitlines()]
        assert log[-1]["step"] == 3
        assert json.loads((tmp_path / stage.name / "proof.json").read_text())["verdict"] == "proved"
    assert chiasm.load(tmp_path / "model").num_parameters() > 0


def test_labels_come_from_a_file(tmp_path):
    file = tmp_path / "answers.json"
    file.write_text('["yes", "no", "two"]')
    spec = ModelSpec(preset="vilt-b32-vqa", tiny=True, labels=str(file))
    assert built_config(spec).processing.labels == ("yes", "no", "two")
    for text, told in (
        ("[1]", "must hold a list"),
        ('["a", "a"]', "each of them once"),
        ("{", "no JSON file"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=told):
            built_config(spec)
