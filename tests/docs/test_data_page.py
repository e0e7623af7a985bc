"""The data page: its table parses, its code runs, and the kinds and sources it names are those there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from chiasm import registry
from chiasm.data.check import KINDS
from chiasm.train import Recipe

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_recipe_s_data_parses():
    data = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.S).group(1))
    stage = {"name": "s", "steps": 1, "lr": 1e-3}
    recipe = Recipe.parse(data | {"model": {"preset": "llava-1.5-7b"}, "stages": [stage]})
    assert set(recipe.data) == {"chat", "pairs", "tables", "quiz"}
    assert recipe.quarantine == "quarantine.jsonl" and recipe.bad.most(5000) == 5
    assert Recipe.parse(recipe.dump()) == recipe


def test_the_code_runs():
    space: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.S).group(1), space)
    assert space["seen"] == pytest.approx((0.1, 0.3, 2 / 3, 2 / 3)) and space["back"] == pytest.approx(
        (30, 40, 200, 150)
    )


def test_every_source_and_kind_is_named():
    own = [n for n in registry.names("source") if registry.get("source", n).__module__.startswith("chiasm.")]
    assert len(own) > 10
    for name in own:
        assert f"`{name}`" in PAGE or name.startswith("playground"), name
    for name in KINDS:
        assert f"`{name}`" in PAGE, name
