"""What ends a run in the middle says so in one error: a full disk, a killed worker, one bad sample among many."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from tiny_run import model_config, source, tokenizer_folder, write_pictures

from chiasm.data.loader import Renderer
from chiasm.errors import CheckpointError, ChiasmError, ConfigError, DataError
from chiasm.train import Recipe, checkpoint, disk, train
from chiasm.train.checkpoint import checkpoints
from chiasm.train.loop import NotFinite, StageRun

QUIET = Console(file=io.StringIO())


def recipe(folder: Path, **stage: Any) -> Recipe:
    usual = {"name": "s", "plan": "instruct", "steps": 4, "batch_size": 4, "lr": 1e-3, "check_samples": 0}
    values = {
        "model": {"config": model_config(), "tokenizer": str(tokenizer_folder(folder / "tokenizer"))},
        "data": {"colors": {"source": source(folder)}},
        "stages": [usual | {"log_every": 1} | stage],
        "out": str(folder / "run"),
        "device": "cpu",
    }
    return Recipe.parse(values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def refused(made: Recipe, match: str, kind: type[ChiasmError]) -> str:
    with pytest.raises(kind, match=match) as caught:
        train(made, console=QUIET)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize("error", ["system", "safetensors"])
def test_a_disk_that_fills_up_in_a_save_leaves_the_checkpoint_before(folder, monkeypatch, error):
    written, save_file = [], checkpoint.save_file

    def full(tensors, path):
        written.append(path)
        if len(written) == 4:  # the second file of the second checkpoint
            Path(path).write_bytes(b"half")
            if error == "system":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a write names no file
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        told = refused(
            recipe(folder, save_every=1), "No space left on device; .* are free on the disk", CheckpointError
        )
    last = folder / "run" / "s" / "checkpoints" / "step-000001"
    assert f"--resume goes on from {last}" in told
    assert [p.name for p in last.parent.iterdir()] == ["step-000001"]  # nothing half done takes up what room there is
    assert train(recipe(folder, save_every=1), resume=True, console=QUIET) is not None


def test_a_run_that_has_no_room_is_not_begun(folder, monkeypatch):
    free = SimpleNamespace(free=100_000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda place: free)
    needed = 12 * 25_888 / 2**20  # weights and two moments of what is trained
    match = rf"a checkpoint of the largest stage, or its model, take {needed:.1f} MiB and 0\.1 MiB are free"
    refused(recipe(folder, save_every=1), match, ConfigError)
    assert not (folder / "run").exists()
    free.free = 12 * 25_888
    train(recipe(folder, save_every=1), console=QUIET)


def test_a_folder_that_cannot_be_written_is_told_before_the_model_is_opened(folder, monkeypatch):
    (folder / "file").write_text("")
    told = refused(recipe(folder).edit(out=str(folder / "file" / "run")), "out: .*file is a file", ConfigError)
    assert "give another 'out'" in told
    (folder / "run").mkdir()
    (folder / "run" / "s").write_text("")
    refused(recipe(folder), r"run/s is a file where a folder is needed", ConfigError)
    (folder / "run" / "s").unlink()
    monkeypatch.setattr(disk.os, "access", lambda *_: False)  # as for a user who is not root
    refused(recipe(folder), r"out: .*run cannot be written by this user", ConfigError)


def test_a_file_of_the_data_that_cannot_be_read_is_no_full_disk(tmp_path):
    with pytest.raises(PermissionError), disk.telling(tmp_path / "run", ["s"]):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/x.json")
    own = str(tmp_path / "run" / "log")
    match = r"run/log: could not be written: Permission denied.*no checkpoint yet"
    with pytest.raises(CheckpointError, match=match), disk.telling(tmp_path / "run", ["s"]):
        raise PermissionError(errno.EACCES, "Permission denied", own)


# ------------------------------------------------------------------------------------------------------------- workers


def test_a_killed_worker_is_told_with_the_remedy(folder, monkeypatch):
    """With more steps than the workers prefetch; torch tells it wherever the run happens to be."""
    update = StageRun.update

    def kill(self, step, tally):
        for process in multiprocessing.active_children() if step == 1 else ():
            os.kill(process.pid, signal.SIGKILL)
        return update(self, step, tally)

    monkeypatch.setattr(StageRun, "update", kill)
    told = refused(recipe(folder, steps=60, workers=1, save_every=1), r"a data worker \(.*1 in all\)", ChiasmError)
    assert "memory: set workers below 1" in told and "--resume" in told
    assert checkpoints(folder / "run" / "s" / "checkpoints")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_after_the_look_is_named(folder, monkeypatch, workers):
    update = StageRun.update

    def damage(self, step, tally):
        for path in (folder / "pictures").iterdir():
            path.write_bytes(path.read_bytes()[:60])
        return update(self, step, tally)

    monkeypatch.setattr(StageRun, "update", damage)
    made = recipe(folder, steps=40, workers=workers, check_samples=100)
    refused(made, r"sample 'p\d', medium 1 of 1: picture '.*\.png' cannot be decoded .*truncated", DataError)


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("settings", [{}, {"pack": True}, {"dtype": "bf16"}])
def test_one_bad_sample_is_told_from_the_others_of_its_batch(folder, monkeypatch, settings):
    sample = Renderer.sample

    def broken(self, example):
        made = sample(self, example)
        if example.id == "p3":
            made.media[0].inputs[0, 0, 0, 0] = torch.nan
        return made

    monkeypatch.setattr(Renderer, "sample", broken)
    told = refused(recipe(folder, **settings), r"samples: .*p\d, p\d, p\d.*, of which p3 alone would do it", NotFinite)
    assert "first bad module: encoders.image.patch" in told


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", ["model", "../up", "a/b", "", ".", "recipe.yaml", "a\nb"])
def test_a_stage_is_named_as_a_folder_can_be(folder, name):
    with pytest.raises(ConfigError, match=r"stages\.0\.name: a stage's name is that of its folder"):
        recipe(folder, name=name)


def test_a_learning_rate_of_0_is_told_once(folder):
    with pytest.raises(ConfigError) as caught:
        recipe(folder, lr=0)
    assert str(caught.value) == "Recipe: stages.0.lr: Input should be greater than 0, got 0"


def test_the_first_look_says_what_is_cut(folder):
    said = io.StringIO()
    train(recipe(folder, max_length=30, check_samples=8), console=Console(file=said, width=300))
    assert "8 of 8 samples looked at, all can be used, " in said.getvalue()
    assert "without their ends, which are beyond max_length 30 by up to 26 tokens" in said.getvalue()
