"""Nothing learned is lost on the way to the disk; a method that reaches too far or nowhere is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import model_config, source, tiny_vlm, tokenizer_folder, write_pictures

from chiasm.errors import CheckpointError, ConfigError
from chiasm.train import run as run_module
from chiasm.train.kept import check_reach, check_saved, through_merge
from chiasm.train.proof import ProofError
from chiasm.train.recipe import Recipe
from chiasm.train.run import train

LORA = {"*": "freeze", "connectors": "train", "lm": "lora(r=4)"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def recipe(data: Path, plan) -> Recipe:
    stage = {"name": "s", "plan": plan, "steps": 4, "lr": 1e-2, "batch_size": 2}
    values = {
        "model": {"config": model_config(), "tokenizer": str(tokenizer_folder(data / "tokenizer"))},
        "data": {"colors": {"source": source(data)}},
        "stages": [stage],
        "out": str(data / "run"),
        "device": "cpu",
    }
    return Recipe.parse(values)


def go(made: Recipe):
    return train(made, console=Console(file=io.StringIO()))


def test_a_right_merge_passes(data):
    vlm = go(recipe(data, LORA))
    assert not [n for n, _ in vlm.named_parameters() if "lora" in n]
    assert check_saved(vlm.model, data / "run" / "model") == len(vlm.model.state_dict())


def test_a_lost_merge_is_caught(data, monkeypatch):
    """The adapter is taken off, as it should be, but was never added to the weights."""
    settle = run_module.settle

    def sabotaged(vlm, *rest):
        for name, p in vlm.model.named_parameters():
            if name.endswith("lora_b"):
                p.data.zero_()
        return settle(vlm, *rest)

    monkeypatch.setattr(run_module, "settle", sabotaged)
    with pytest.raises(ProofError, match=r"after the merge \d+ tensors are as before the merge \(lm.layers.0"):
        go(recipe(data, LORA))


def test_a_merge_that_loses_the_connector_is_caught(data, monkeypatch):
    settle = run_module.settle

    def sabotaged(vlm, *rest):
        told = settle(vlm, *rest)
        torch.nn.init.normal_(vlm.model.connectors["image"].layers[0].weight)
        return told

    monkeypatch.setattr(run_module, "settle", sabotaged)
    with pytest.raises(ProofError, match=r"after the merge 1 tensors changed \(connectors.image.layers.0.weight\)"):
        go(recipe(data, LORA))


def test_names_that_vanish_are_caught(tmp_path):
    model = tiny_vlm(tmp_path).model
    names = [n for n, _ in model.named_parameters() if n.startswith("connectors")]
    with pytest.raises(ProofError, match="4 tensors are gone"), through_merge(model, names):
        del model.connectors["image"]


def test_a_saved_folder_that_lacks_the_connector_is_caught(data, monkeypatch):
    from chiasm.vlm import VLM

    save = VLM.save

    def sabotaged(self, folder, *rest, **options):
        kept = self.model.state_dict
        without = {n: t for n, t in kept().items() if not n.startswith("connectors")}
        monkeypatch.setattr(self.model, "state_dict", lambda *a, **k: without)
        try:
            return save(self, folder, *rest, **options)
        finally:
            monkeypatch.setattr(self.model, "state_dict", kept)

    monkeypatch.setattr(VLM, "save", sabotaged)
    with pytest.raises(
        CheckpointError, match=r"4 of \d+ tensors of the trained model were not saved \(connectors.image"
    ):
        go(recipe(data, "instruct"))


def test_a_saved_tensor_that_differs_is_caught(tmp_path):
    vlm = tiny_vlm(tmp_path)
    vlm.save(tmp_path / "model")
    assert check_saved(vlm.model, tmp_path / "model") > 40
    vlm.model.lm.norm.weight.data[0] += 1e-6
    with pytest.raises(CheckpointError, match=r"'lm.norm.weight' differs"):
        check_saved(vlm.model, tmp_path / "model")


@pytest.mark.parametrize("pattern", ["*attn*", "*"])
def test_lora_that_matches_too_much_is_refused_before_the_first_step(data, pattern):
    with pytest.raises(ConfigError, match=r"reaches \d+ tensors of 'encoders'.*name the part that is meant"):
        go(recipe(data, {"lm": "train", "connectors": "train", "encoders": "freeze", pattern: "lora(r=4)"}))
    assert not (data / "run" / "s" / "log.jsonl").exists()


def test_lora_that_matches_nothing_is_refused_before_the_first_step(data):
    for pattern, told in (("lm.*.query", "matches 0 of"), ("lm.norm", "finds 0 linear layers")):
        with pytest.raises(ConfigError, match=told):
            go(recipe(data, {"*": "freeze", "connectors": "train", pattern: "lora(r=4)"}))


def test_what_is_named_may_be_reached():
    names = ["encoders.image.blocks.0.attn.q.lora_a", "lm.layers.0.attn.q_proj.lora_a"]
    check_reach({"*": "freeze", "lm": "freeze", "encoders.image.blocks.0*": "lora(r=4)"}, names)
    check_reach({"*attn*": "lora(r=4)", "encoders": "freeze"}, names[1:])
    check_reach({"lm": "freeze", "*.norm*": "train"}, ["lm.norm.weight"])
    with pytest.raises(ConfigError, match="put the row 'lm': freeze last"):
        check_reach({"lm": "freeze", "*attn*": {"type": "lora", "r": 4}}, names)
