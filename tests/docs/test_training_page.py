"""The training page: its recipe parses, its plan resolves, the keys and files it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from chiasm.config import load_yaml
from chiasm.presets import preset
from chiasm.train import Recipe, Stage

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


def test_recipe_parses(tmp_path):
    (tmp_path / "recipe.yaml").write_text(BLOCKS[0])
    recipe = Recipe.parse(load_yaml(tmp_path / "recipe.yaml"))
    assert preset(recipe.model.preset) and recipe.stages[1].save_every == 500


def test_plan_resolves():
    from chiasm.compose import build_model
    from chiasm.train.plan import resolve

    table = Stage(name="s", lr=1e-3, **yaml.safe_load(BLOCKS[1].replace("e-", ".0e-"))).table()
    plan = resolve(build_model(preset("llava-1.5-7b").model, device="meta"), table, 1e-3)
    assert plan.rates["encoders.image.blocks.11.mlp.fc1.weight"] == 2e-6
    assert plan.rates["encoders.image.blocks.1.mlp.fc1.weight"] is None
    assert plan.rates["connectors.image.layers.0.weight"] == 1e-4 and plan.rates["lm.norm.weight"] == 1e-3


def test_names():
    for key in ("check_samples", "batch_size", "accumulate", "bucket", "pack", "log_every", "eval_every", "keep_last"):
        assert key in PAGE and key in Stage.model_fields
