"""Exact resume where a step is more than a sum over tokens: gradient caching, queues and followers, first stages.

Real kills, by the self-test that users have: each recipe in its tiny form, SIGKILL at random moments, the same bits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from chiasm.cli import main
from chiasm.train import load_recipe
from chiasm.train.selftest import selftest

ROOT = Path(__file__).parents[2]


def killed(name: str, folder: Path, runs: int, kills: int, **changes):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", changes, tiny=True)
    outcome = selftest(recipe, folder, runs=runs, steps=4, seed=5, most_kills=kills)
    assert outcome.equal, outcome.differences
    assert outcome.kills and outcome.tensors > 10
    return outcome


def test_kills_end_in_the_same_bits(tmp_path, monkeypatch):
    """CLIP with two micro-batches a step, so that its gradients are cached. (ALBEF's queues: test_fused_recipes.)"""
    monkeypatch.chdir(ROOT)
    assert load_recipe(ROOT / "recipes" / "clip.yaml", tiny=True).stages[0].accumulate == 2
    killed("clip", tmp_path / "self", runs=1, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "siglip", "albef", "blip2-stage1", "vilt", "vlmo", "beit3"])
def test_many_kills_end_in_the_same_bits(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    killed(name, tmp_path / "self", runs=5, kills=3)


@pytest.mark.slow
def test_the_command_on_a_first_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(load_recipe(ROOT / "recipes" / "blip2-stage1.yaml", tiny=True).dump()))
    words = [
        "selftest",
        "resume",
        str(path),
        "--runs",
        "2",
        "--kills",
        "2",
        "--steps",
        "3",
        f"out={tmp_path / 'unused'}",
    ]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0 and "bit-equal" in result.output, result.output
