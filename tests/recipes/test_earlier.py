"""A folder that holds another run is neither gone on from nor replaced silently: both values and the remedy."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from rich.console import Console
from tiny_run import model_config, source, tiny_vlm, tokenizer_folder, write_pictures

from chiasm.cli import main
from chiasm.errors import CheckpointError, ConfigError
from chiasm.train import Recipe, train
from chiasm.train.earlier import BEGUN, DONE, differences
from chiasm.train.log import read_log
from chiasm.train.loop import StageRun

QUIET = Console(file=io.StringIO())


def recipe(folder: Path, **changes: Any) -> Recipe:
    stage = {"steps": 2, "batch_size": 2, "lr": 1e-3, "check_samples": 4}
    values = {
        "model": {"config": model_config(), "tokenizer": str(tokenizer_folder(folder / "tokenizer"))},
        "data": {"colors": {"source": source(folder)}},
        "stages": [{"name": "one", "plan": "align", **stage}, {"name": "two", "plan": "instruct", **stage}],
        "out": str(folder / "run"),
        "device": "cpu",
    }
    return Recipe.parse(values).edit(**changes)


def stamp(folder: Path) -> int:
    return (folder / "run" / "model" / "model.safetensors").stat().st_mtime_ns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


@pytest.fixture
def finished(folder: Path) -> Path:
    train(recipe(folder), console=QUIET)
    return folder


def refused(folder: Path, match: str, resume: bool, **changes: Any) -> str:
    before, told = stamp(folder), (folder / "run" / "recipe.yaml").read_text()
    with pytest.raises(CheckpointError, match=match) as caught:
        train(recipe(folder, **changes), resume=resume, console=QUIET)
    assert stamp(folder) == before and (folder / "run" / "recipe.yaml").read_text() == told
    assert "\n" not in str(caught.value) and "--force" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("resume", [False, True])
def test_another_recipe_neither_replaces_a_finished_run_nor_reuses_its_stages(finished, resume):
    told = refused(
        finished, r"run/two: .* another recipe: lr 0\.001 there, 0\.0005 here;", resume, **{"stages.1.lr": 5e-4}
    )
    assert ("goes on from" if resume else "replaces") in told
    changes = {"stages.0.plan": {"*": "freeze", "connectors": 1e-2}, "seed": 3}
    told = refused(finished, r"run/one: .*seed 0 there, 3 here", resume, **changes)
    assert "plan align there, nothing here" in told and "plan.connectors nothing there, 0.01 here" in told
    more = {"model.config.model.lm.depth": 3}
    refused(finished, r"model\.config\.model\.lm\.depth 2 there, 3 here", resume, **more)
    refused(finished, r"data\.colors\.limit nothing there, 5 here", resume, **{"data.colors.limit": 5})
    # The file of the data has another record under the same name.
    records = json.loads((finished / "train.json").read_text())
    (finished / "train.json").write_text(json.dumps([*records, records[0] | {"id": "p8"}]))
    refused(finished, r"data\.colors, examples 8 there, 9 here", resume)
    records[3]["conversations"][1]["value"] = "another answer"
    (finished / "train.json").write_text(json.dumps(records))
    refused(finished, r"data\.colors, mark of its texts \w{12} there, \w{12} here", resume)


def test_the_same_recipe_goes_on_and_begins_anew(finished):
    """What changes no weight is no other recipe: logs, workers, held-out data."""
    free = {"stages.0.log_every": 1, "stages.1.save_every": 1, "eval.limit": 2, "name": "another", "bad": "skip"}
    held = {"held_out": {"colors": {"source": source(finished)}}}
    before = (finished / "run" / "one" / "log.jsonl").stat().st_mtime_ns
    train(recipe(finished, **free, **held), resume=True, console=QUIET)
    assert (finished / "run" / "one" / "log.jsonl").stat().st_mtime_ns == before
    train(recipe(finished), console=QUIET)
    assert (finished / "run" / "one" / "log.jsonl").stat().st_mtime_ns > before


def test_force_removes_what_was_there_and_begins_anew(finished):
    (finished / "run" / "notes.txt").write_text("mine")
    one = recipe(finished).edit(stages=[{"name": "only", "plan": "align", "steps": 1, "lr": 1e-3}])
    with pytest.raises(CheckpointError, match="with the stages one, two there and only here"):
        train(one, console=QUIET)
    with pytest.raises(ConfigError, match="one of the two"):
        train(one, resume=True, force=True, console=QUIET)
    vlm = train(one, force=True, console=QUIET)
    left = {p.name for p in (finished / "run").iterdir()}
    assert {"only", "model", "notes.txt"} <= left and not {"one", "two"} & left
    assert "stage only: 1 steps" in vlm.config.provenance.history[-1]
    train(recipe(finished, out=str(finished / "new")), force=True, console=QUIET)  # nothing there: nothing to remove


def test_force_does_not_remove_what_the_recipe_begins_with(finished):
    after = recipe(finished).edit(model={"folder": str(finished / "run" / "model")}, **{"stages.1.lr": 1e-4})
    with pytest.raises(ConfigError, match=r"run/model lies in .*, which --force would remove"):
        train(after, force=True, console=QUIET)
    assert (finished / "run" / "model" / "config.json").is_file() and (finished / "run" / "one" / DONE).is_file()


class Killed(Exception):
    pass


def test_a_checkpoint_of_other_settings_is_refused_with_both_values(folder, monkeypatch):
    update = StageRun.update

    def stop(self, step, tally):
        if step == 3:
            raise Killed
        return update(self, step, tally)

    long = {"stages.0.steps": 5, "stages.0.save_every": 1}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageRun, "update", stop)
        train(recipe(folder, **long), console=QUIET)
    with pytest.raises(CheckpointError, match=r"run/one: .*lr 0\.001 there, 0\.002 here; .*set the recipe back"):
        train(recipe(folder, **long, **{"stages.0.lr": 2e-3}), resume=True, console=QUIET)
    with pytest.raises(CheckpointError, match=r"an earlier run, the newest step-000003; go on .*--resume"):
        train(recipe(folder, **long), console=QUIET)
    train(recipe(folder, **long, **{"stages.1.lr": 2e-3}), resume=True, console=QUIET)  # not begun: free to change
    assert [r["step"] for r in read_log(folder / "run" / "one" / "log.jsonl") if "loss" in r] == [5]


def test_a_stage_behind_one_that_runs_again_runs_again(finished):
    (finished / "run" / "one" / DONE).unlink()
    before = (finished / "run" / "two" / "log.jsonl").stat().st_mtime_ns
    train(recipe(finished), resume=True, console=QUIET)
    assert (finished / "run" / "two" / "log.jsonl").stat().st_mtime_ns > before


def test_other_weights_under_the_same_name_are_noticed(folder):
    tiny_vlm(folder).save(folder / "start")
    own = recipe(folder, model={"folder": str(folder / "start")})
    train(own, console=QUIET)
    train(own, resume=True, console=QUIET)
    tiny_vlm(folder, seed=1).save(folder / "start")
    with pytest.raises(CheckpointError, match=r"one: the stage began with other weights .*mark \w{12} there, \w{12}"):
        train(own, resume=True, console=QUIET)


def test_runs_of_earlier_versions_are_known_by_their_recipe(finished):
    for stage in ("one", "two"):
        (finished / "run" / stage / BEGUN).unlink()
    refused(finished, r"lr 0\.001 there, 0\.0005 here", False, **{"stages.1.lr": 5e-4})
    train(recipe(finished), resume=True, console=QUIET)
    (finished / "run" / "recipe.yaml").write_text("name: [")
    refused(finished, r"run/one: holds a finished stage of a recipe that is not known", False)
    train(recipe(finished), resume=True, console=QUIET)


def test_a_setting_that_came_later_is_no_difference_at_its_default():
    now = {"stage.optimizer": "adamw", "stage.betas": [0.9, 0.999], "model.start": None, "stage.lr": 1.0}
    assert differences({"stage.lr": 1.0}, now) == []
    assert differences({"stage.lr": 1.0}, now | {"stage.optimizer": "muon"}) == ["optimizer nothing there, muon here"]


def test_the_command_says_it_in_a_line_and_forces(finished):
    path = finished / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(finished).dump()))
    torch.manual_seed(0)
    result = CliRunner().invoke(main, ["train", str(path), "stages.0.steps=3"])
    assert result.exit_code == 1 and "steps 2 there, 3 here" in result.output and "Traceback" not in result.output
    result = CliRunner().invoke(main, ["train", str(path), "stages.0.steps=3", "--force"])
    assert result.exit_code == 0, result.output
    noted = json.loads((finished / "run" / "one" / BEGUN).read_text())
    assert noted["settings"]["stage.steps"] == 3 and len(noted["weights"]) == 12
