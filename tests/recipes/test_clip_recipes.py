"""Recipes of two towers in their tiny forms, their published numbers, and the same run on one rank and on two."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from ranks import launch
from rich.console import Console

import chiasm
from chiasm.train import load_recipe, train

ROOT = Path(__file__).parents[2]


def tiny(name: str, out: Path, **changes):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", {"out": str(out), **changes}, tiny=True)
    return recipe, train(recipe, console=Console(file=io.StringIO()))


def log_of(out: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_tiny_form_trains(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe, vlm = tiny(name, tmp_path)
    last = log_of(tmp_path, recipe.stages[0].name)[-1]
    assert last["step"] == 3 and {"in_batch_accuracy", "scale", "loss"} <= last.keys()
    assert ("bias" in last) == (name == "siglip")
    again = chiasm.load(tmp_path / "model")
    assert again.num_parameters() == vlm.num_parameters()
    assert again.embed(texts=["a red circle"]).shape == (1, vlm.config.model.dim)
    proof = json.loads((tmp_path / recipe.stages[0].name / "proof.json").read_text())
    assert proof["verdict"] == "proved"


def test_the_playground_recipe_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    changes = {"model.config.model.encoders.image.depth": 1, "model.config.model.encoders.text.depth": 1}
    tiny("clip-playground", tmp_path, **changes)
    rows = {row["task"]: row for row in json.loads((tmp_path / "results.json").read_text())["table"]}
    assert rows["objects: 48 labels"]["n"] == 12 and rows["objects: 48 labels"]["shuffled"] is not None
    assert {"captions: picture → text, R@1", "captions: text → picture, R@10"} <= rows.keys()
    assert "held_out/loss" in log_of(tmp_path, "contrastive")[-1]
    assert "which of 48 labels" in (tmp_path / "report.html").read_text()


@pytest.mark.data
def test_small_images(tmp_path, monkeypatch, shared_data):
    monkeypatch.chdir(ROOT)
    tiny("clip-small-images", tmp_path)
    rows = {row["task"]: row for row in json.loads((tmp_path / "results.json").read_text())["table"]}
    assert rows["digits: 10 labels"]["n"] == rows["clothes: 10 labels"]["n"] == 20


def test_published_numbers():
    clip, siglip = (load_recipe(ROOT / "recipes" / f"{n}.yaml") for n in ("clip", "siglip"))
    for recipe in (clip, siglip):
        assert recipe.stages[0].batch_size * recipe.stages[0].accumulate == 32_768
    stage, model = clip.stages[0], clip.model.config["model"]
    assert (stage.lr, stage.betas, stage.eps, stage.weight_decay, stage.epochs) == (5e-4, (0.9, 0.98), 1e-6, 0.2, 32)
    assert round(stage.warmup_ratio * 32 * 400e6 / 32_768) == pytest.approx(2000, abs=10)
    assert chiasm.build(config(clip), device="meta").num_parameters() == 151_277_313 and model["dim"] == 512
    other = chiasm.build(config(siglip), device="meta")
    assert other.num_parameters() == 203_155_970
    assert siglip.model.config["model"]["bias_init"] == -10 and siglip.stages[0].betas[1] == 0.95
    assert math.log(siglip.model.config["model"]["scale_init"]) == pytest.approx(2.302585)


def config(recipe):
    return recipe.model.config


def on_ranks(folder: Path, name: str, accumulate: int, mode: str) -> list[dict]:
    """Three steps over ten pairs: the last one has two, so that of four slices of a step some are empty."""
    changes = {"stages.0.batch_size": 4, "stages.0.accumulate": accumulate, "stages.0.log_every": 1}
    changes |= {"data.pairs.source.length": 10, "parallel": mode, "device": "cpu", "stages.0.dtype": "float32"}
    tiny(name, folder / "run", **changes)
    return log_of(folder / "run", "contrastive" if name == "clip" else "sigmoid")


@pytest.mark.parametrize(("name", "accumulate", "mode"), [("clip", 4, "shard"), ("siglip", 2, "replicate")])
def test_two_ranks_take_the_steps_of_one(tmp_path, monkeypatch, name, accumulate, mode):
    monkeypatch.chdir(ROOT)
    alone = launch(1, on_ranks, tmp_path / "one", name, accumulate, "replicate")[0]
    both = launch(2, on_ranks, tmp_path / "two", name, accumulate, mode)[0]
    assert [r["step"] for r in both] == [1, 2, 3]
    for a, b in zip(alone, both, strict=True):
        for key in ("loss", "grad_norm", "scale", "in_batch_accuracy"):
            assert a[key] == pytest.approx(b[key], rel=2e-5, abs=1e-6), (a["step"], key)
