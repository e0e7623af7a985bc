"""The recipes of ViLT, ALBEF, VLMo and BEiT-3 in their tiny forms; an interrupted ALBEF goes on as if it were not."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import chiasm
from chiasm.train import load_recipe, train

ROOT = Path(__file__).parents[2]


def run(name: str, out: Path, resume: bool = False, **changes):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", {"out": str(out), **changes}, tiny=True)
    return recipe, train(recipe, resume=resume, console=Console(file=io.StringIO()))


@pytest.mark.parametrize("name", ["vilt", "albef", "vlmo", "beit3"])
def test_tiny_form_trains(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe, vlm = run(name, tmp_path)
    for stage in recipe.stages:
        log = [json.loads(line) for line in (tmp_path / stage.name / "log.jsonl").read_text().splitlines()]
        assert log[-1]["step"] == 3
        assert json.loads((tmp_path / stage.name / "proof.json").read_text())["verdict"] == "proved"
    again = chiasm.load(tmp_path / "model")
    state = vlm.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


def test_an_interrupted_run_goes_on_with_its_follower_and_queues(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, whole = run("albef", tmp_path / "whole")
    from chiasm.train import loop

    kept = loop.StageRun.update

    def dies(self, step, tally):
        if step == 2:
            raise KeyboardInterrupt
        return kept(self, step, tally)

    monkeypatch.setattr(loop.StageRun, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        run("albef", tmp_path / "cut")
    monkeypatch.setattr(loop.StageRun, "update", kept)
    _, resumed = run("albef", tmp_path / "cut", resume=True)
    assert int(whole.model.queue_place) == 3 * 8 and float(whole.model.followed) == 6
    state = whole.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, state[name]), name
