"""The model of the lowest held-out loss: written when it comes, loadable, and the same after a kill and a resume."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_resume import broken_off, stage_run
from tiny_run import model_config, source, tiny_vlm, tokenizer_folder, write_pictures

import chiasm
from chiasm.convert.io import open_weights
from chiasm.train.best import Best
from chiasm.train.recipe import Recipe
from chiasm.train.run import train

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: 0.5, 6: 0.9}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


class Scores:
    """Held-out losses that depend on the step alone, as those of an exact resume do."""

    def __init__(self, run):
        self.run, self.seen = run, []
        update = run.update
        run.update = lambda step, tally: (setattr(self, "step", step + 1), update(step, tally))[1]
        run.probe = self

    def __call__(self):
        self.seen.append(self.step)
        return {"held_out/loss": LOSSES[self.step]}


def run_with_best(data: Path, out: Path, **settings):
    vlm = tiny_vlm(data)
    best = Best(out / "best", lambda path, tensors, step: vlm.save(path, tensors=tensors))
    run = stage_run(vlm, data, out, **{"eval_every": 1, "save_every": 2, "warmup_ratio": 0.0} | settings)
    run.best = best if run.stage.keep_best else None
    return vlm, run, Scores(run)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = open_weights(folder)
    return {name: found.read(name) for name in found.info}


def test_it_holds_the_model_of_the_lowest_loss_and_the_log_names_it(data, tmp_path):
    vlm, run, _ = run_with_best(data, tmp_path / "run")
    at_four, update = {}, run.update

    def noted(step, tally):
        found = update(step, tally)
        if step + 1 == 4:
            at_four.update({n: p.detach().clone() for n, p in vlm.model.named_parameters()})
        return found

    run.update = noted
    run.fit()
    folder = tmp_path / "run" / "best"
    kept = weights(folder)
    assert all(torch.equal(kept[name], p) for name, p in at_four.items())
    assert any(not torch.equal(kept[n], p) for n, p in vlm.model.named_parameters())  # the run went on from there
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    told = {r["step"]: (r["best/step"], r["best/loss"], r["best/folder"]) for r in log if "best/step" in r}
    assert told == {s: (s, LOSSES[s], str(folder)) for s in (1, 2, 4)}  # an equal loss does not replace the first
    again = chiasm.load(folder)
    assert all(torch.equal(p, kept[n]) for n, p in again.model.named_parameters())
    assert json.loads((folder / "held_out.json").read_text()) == {"step": 4, "loss": 0.5}


@pytest.mark.parametrize("at", [3, 5])
def test_it_survives_a_kill_and_a_resume(data, tmp_path, at):
    """Killed before the lowest loss came, and after it: the folder is that of an undisturbed run."""
    _, straight, _ = run_with_best(data, tmp_path / "straight")
    straight.fit()
    _, broken, _ = run_with_best(data, tmp_path / "broken")
    broken_off(broken, at)
    before = json.loads((tmp_path / "broken" / "best" / "held_out.json").read_text())
    assert before["step"] == {3: 2, 5: 4}[at]
    _, again, scores = run_with_best(data, tmp_path / "broken")
    again.fit(resume=True)
    assert scores.seen[0] == {3: 3, 5: 5}[at]
    wanted, found = weights(tmp_path / "straight" / "best"), weights(tmp_path / "broken" / "best")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)
    assert (tmp_path / "broken" / "best" / "held_out.json").read_text() == json.dumps(
        {"step": 4, "loss": 0.5}, indent=2
    ) + "\n"


def test_a_kill_between_the_two_moves_loses_nothing(data, tmp_path):
    _, run, _ = run_with_best(data, tmp_path / "run")
    broken_off(run, 3)
    folder = tmp_path / "run" / "best"
    wanted = weights(folder)
    os.replace(folder, tmp_path / "run" / ".best.old")
    (tmp_path / "run" / ".best.new.7").mkdir()
    best = Best(folder, lambda *_: None)
    best.begin(resume=True)
    assert best.known == {"step": 2, "loss": 1.0}
    assert all(torch.equal(wanted[n], t) for n, t in weights(folder).items())
    assert not list((tmp_path / "run").glob(".best.*"))
    best.begin(resume=False)
    assert not folder.exists() and best.known is None


def test_in_bf16_the_float32_masters_are_kept_and_frozen_weights_exactly(data, tmp_path):
    vlm, run, _ = run_with_best(data, tmp_path / "run", dtype="bf16", steps=4)
    frozen = {n: p.detach().clone() for n, p in vlm.model.encoders.named_parameters()}
    run.fit()
    kept = weights(tmp_path / "run" / "best")  # the last step is the best: what the stage itself ends with
    assert all(torch.equal(kept[n], p) for n, p in vlm.model.named_parameters())
    assert all(
        kept[f"encoders.{n}"].dtype == torch.float32 and torch.equal(kept[f"encoders.{n}"], p)
        for n, p in frozen.items()
    )


def test_a_recipe_keeps_its_best_with_lora_and_says_where(data, tmp_path):
    stage = {
        "name": "s",
        "plan": {"*": "freeze", "connectors": "train", "lm": "lora(r=2)"},
        "steps": 4,
        "batch_size": 4,
    }
    recipe = {
        "model": {"config": model_config(), "tokenizer": str(tokenizer_folder(data / "tokenizer"))},
        "data": {"colors": {"source": source(data)}},
        "held_out": {"colors": {"source": source(data)}},
        "stages": [stage | {"lr": 1e-2, "eval_every": 2}],
        "eval": {"limit": 4, "max_new_tokens": 2, "shuffled": False, "examples": 0},
        "out": str(data / "run"),
        "device": "cpu",
    }
    file = io.StringIO()
    vlm = train(Recipe.parse(recipe), console=Console(file=file, width=200))
    done = json.loads((data / "run" / "s" / "done.json").read_text())
    assert done["best"]["step"] in (2, 4) and "lowest held-out loss" in file.getvalue()
    best = chiasm.load(data / "run" / "s" / "best")
    assert any(".lora_" in n for n, _ in best.named_parameters())  # not merged
    assert "the lowest held-out loss" in best.config.provenance.history[-1]
    if done["best"]["step"] == 4:
        batch = vlm.processor.batch([[{"role": "user", "content": "Colors?"}]], add_generation_prompt=True)
        with torch.no_grad():
            gap = (best.model(batch, logits="all").logits - vlm.model(batch, logits="all").logits).abs().max()
        assert gap < 1e-4  # what the merged model answers
    assert not (data / "plain").exists()
    recipe["stages"][0] |= {"keep_best": False}
    train(Recipe.parse(recipe | {"out": str(data / "plain")}), console=Console(file=io.StringIO()))
    assert not (data / "plain" / "s" / "best").exists()
