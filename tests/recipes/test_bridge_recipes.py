"""Recipes of the query-transformer family in their tiny forms, one stage after the other, and square-root mixing."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import chiasm
from chiasm.data.mixture import Entry, Mixture
from chiasm.presets import presets
from chiasm.train import load_recipe, train
from chiasm.train.model import open_model

ROOT = Path(__file__).parents[2]
QUIET = Console(file=io.StringIO())


def trained(name: str, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    monkeypatch.chdir(ROOT)  # paths in recipes are relative to the repository
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", {"out": str(out), **changes}, tiny=True)
    vlm = train(recipe, console=QUIET)
    proof = json.loads((out / recipe.stages[-1].name / "proof.json").read_text())
    assert proof["verdict"] in ("proved", "open")
    return vlm


def test_from_the_first_stage_to_instructblip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each stage takes from the one before what is published: queries without text, then both halves from both."""
    first = trained("blip2-stage1", tmp_path / "1", monkeypatch, held_out={})
    line = json.loads((tmp_path / "1" / "represent" / "log.jsonl").read_text().splitlines()[0])
    assert {"contrast", "matching", "writing"} <= line.keys()
    weights = {"model.weights": {"connectors.image": str(tmp_path / "1" / "model")}, "held_out": {}}
    second = trained("blip2", tmp_path / "2", monkeypatch, **weights, **{"stages.0.lr": 2e-5})
    mine, theirs = (v.model.connectors["image"].state_dict() for v in (second, first))
    assert not any(".text_" in name or "body.text" in name for name in mine)
    for name in ("queries", "body.layers.2.cross.k.weight", "body.layers.0.query_mlp.fc1.weight"):
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-3, rtol=0)
    bridge = "connectors.image."
    halves = {f"{bridge}text_half": str(tmp_path / "1/model"), f"{bridge}query_half": str(tmp_path / "2/model")}
    changes = {"held_out": {}, "model.weights": halves, "stages.0.lr": 2e-5, "model.overrides": reads()}
    third = trained("instructblip", tmp_path / "3", monkeypatch, **changes).model.connectors["image"].state_dict()
    text = first.model.connectors["image"].state_dict()
    for name in ("body.text.words.weight", "body.layers.1.text_mlp.fc2.weight"):
        torch.testing.assert_close(third[name], text[name], atol=1e-3, rtol=0)


def reads() -> dict[str, Any]:
    """The second half as the first stage's tiny form has it."""
    text = {"vocab": 1024, "positions": 96}
    return {
        **{"model.lm.vocab": 1024, "model.connectors.image.text": text, "processing.template": "simple"},
        "processing.instruction": {"max_length": 96},
    }


def test_a_first_stage_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The model that a first stage leaves writes a caption for a picture, and has a held-out score."""
    trained("blip2-stage1", tmp_path, monkeypatch)
    vlm = chiasm.load(tmp_path / "model")
    from PIL import Image

    picture = {"type": "image", "image": Image.new("RGB", (30, 20))}
    text = vlm.generate([{"role": "user", "content": [picture]}], max_new_tokens=5)
    assert isinstance(text, str)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 16


def test_minigpt4_learns_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained("minigpt4", tmp_path, monkeypatch, held_out={})
    rows = json.loads((tmp_path / "align" / "plan.json").read_text())
    vlm = chiasm.load(tmp_path / "model")
    layer = vlm.model.connectors["image"].proj
    assert sum(r["parameters"] for r in rows if r["lr"] is not None) == sum(p.numel() for p in layer.parameters())


def moved(vlm: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in vlm.model.named_parameters() if not torch.equal(p, before[name])}


def drawn(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights that a recipe's tiny form begins with."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", {"out": str(out)}, tiny=True)
    return {n: p.detach().clone() for n, p in open_model(recipe.model, recipe.seed, "cpu").model.named_parameters()}


def test_minigpt5_learns_its_tokens_and_their_mapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing else moves, of the two tables eight rows; both terms are told, and the distance to the texts falls."""
    before = drawn("minigpt5", tmp_path, monkeypatch)
    vlm = trained("minigpt5", tmp_path, monkeypatch, **{"stages.0.log_every": 1})
    tables = ("lm.embedding.weight", "lm.lm_head.weight")
    assert moved(vlm, before) == {n for n in before if n.startswith("mapper.")} | set(tables)
    for name in tables:
        rows = (vlm.model.get_parameter(name) != before[name]).any(1).nonzero().flatten().tolist()
        assert rows == list(range(881, 889))
    log = [json.loads(line) for line in (tmp_path / "vokens" / "log.jsonl").read_text().splitlines()]
    log = [record for record in log if "features" in record]
    assert "text" in log[-1] and 0 < log[-1]["features"] < log[0]["features"]
    again = chiasm.load(tmp_path / "model")
    assert again.tokenizer.id_of("[IMG7]") == 888 and again.tokenizer.decode([888]) == ""


def test_minigpt_v2_goes_through_three_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One layer and LoRA on queries and values, merged with its proof after every stage."""
    before = drawn("minigpt-v2", tmp_path, monkeypatch)
    vlm = trained("minigpt-v2", tmp_path, monkeypatch)
    layers = range(vlm.config.model.lm.depth)
    lora = {f"lm.layers.{i}.attn.{x}_proj.weight" for i in layers for x in "qv"}
    layer = {n for n in before if n.startswith("connectors.image.proj.")}
    assert moved(vlm, before) == lora | layer
    for stage in ("pretrain", "multi_task", "instruct"):
        assert json.loads((tmp_path / stage / "done.json").read_text())["steps"] == 3
    published = load_recipe(ROOT / "recipes" / "minigpt-v2.yaml")
    assert [s.batch_size * s.accumulate for s in published.stages] == [96, 64, 24]


def test_video_llamas_audio_branch_learns_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Positions, queries, Q-Former and layer of the branch for sounds move, and nothing else; stages as published."""
    before = drawn("video-llama-audio", tmp_path, monkeypatch)
    vlm = trained("video-llama-audio", tmp_path, monkeypatch)
    assert moved(vlm, before) == {n for n in before if n.startswith("connectors.audio.")}
    record = next(p for p in presets() if p.name == "video-llama-7b-audio")
    stages = load_recipe(ROOT / "recipes" / "video-llama-audio.yaml").stages
    for published, mine in zip(record.stages, stages, strict=True):
        assert published.lr == mine.lr and published.warmup == round(mine.warmup_ratio * mine.steps)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) >= 8


def test_video_llama_learns_what_stands_over_the_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = drawn("video-llama", tmp_path, monkeypatch)
    vlm = trained("video-llama", tmp_path, monkeypatch)
    learned = ("positions", "queries", "clip.", "proj.")
    wanted = {n for n in before if n.startswith(tuple(f"connectors.image.{name}" for name in learned))}
    assert moved(vlm, before) == wanted and not any(".frame." in n for n in wanted)
    record = next(p for p in presets() if p.name == "video-llama-7b")
    stages = load_recipe(ROOT / "recipes" / "video-llama.yaml").stages
    assert [s.lr for s in stages] == [s.lr for s in record.system.stages]
    assert [s.steps * s.warmup_ratio for s in stages] == pytest.approx(
        [s.warmup for s in record.system.stages], rel=1e-3
    )
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {a["task"] for a in answers} == {"clip", "scene_qa"} and len(answers) == 16, "with own and with other media"


def test_minigpt4_at_published_size():
    """Frozen parts have neither gradient nor optimizer state; what learns is 768 x 4096 and a bias."""
    from chiasm.presets.minigpt4 import LEARNS
    from chiasm.train.plan import resolve

    model = chiasm.build(chiasm.preset("chiasm.presets.minigpt4:vicuna_7b"), device="meta").model
    assert resolve(model, LEARNS, 1e-4).trainable == (768 + 1) * 4096


@pytest.mark.parametrize("name", ["blip2-opt-2.7b", "instructblip-vicuna-7b"])
def test_numbers_stand_in_the_preset_too(name: str):
    mine = load_recipe(ROOT / "recipes" / f"{name.partition('-')[0]}.yaml").stages[-1]
    published = next(p for p in presets() if p.name == name).system.stages[1]
    assert (mine.lr, mine.weight_decay) == (published.lr, published.weight_decay)


# ------------------------------------------------------------------------------------------------------- mixing


def mixture(**settings: Any) -> Mixture:
    sizes = {"large": 400, "middle": 100, "small": 4}
    weights = settings.pop("weights", {})
    source = {"type": "playground", "tasks": ["scene_qa"]}
    entries = {n: Entry(source=source | {"length": k}, weight=weights.get(n, 1.0)) for n, k in sizes.items()}
    return Mixture(entries, seed=3, **settings)


def shares(mixed: Mixture, epoch: int = 0) -> list[int]:
    return torch.bincount(mixed.order(epoch)[:, 0], minlength=3).tolist()


def test_square_roots_of_sizes_decide():
    """p_d = √N_d / Σ √N_d of an epoch as long as all sources together: 20, 10 and 2 of 32 parts of 504."""
    assert shares(mixture()) == [400, 100, 4]
    mixed = mixture(mixing="square_root")
    assert shares(mixed) == [round(504 * r / 32) for r in (20, 10, 2)] == [315, 158, 32] and len(mixed) == 505
    tweaked = shares(mixture(mixing="square_root", weights={"small": 5.0}))
    total = sum(w * math.sqrt(n) for w, n in ((1, 400), (1, 100), (5, 4)))
    assert tweaked == [round(504 * w * math.sqrt(n) / total) for w, n in ((1, 400), (1, 100), (5, 4))]
    some = mixed.only(("large", "small"))
    assert some.share(0) == round(404 * 20 / 22) and some.mixing == "square_root"


def test_no_example_comes_again_before_all_came():
    mixed = mixture(mixing="square_root")
    small = torch.cat([mixed.draw(2, epoch) for epoch in range(3)])
    for start in range(0, len(small) - 3, 4):
        assert small[start : start + 4].sort().values.tolist() == [0, 1, 2, 3]
    large = torch.cat([mixed.draw(0, epoch) for epoch in range(2)])[:400]
    assert len(set(large.tolist())) == 400
    assert torch.equal(mixed.order(5), mixture(mixing="square_root").order(5))


def test_a_part_in_a_command_is_one_name():
    """``model.weights.connectors.image=FOLDER`` on the command line, and the same written as a table."""
    dotted = {"model.weights.connectors.image": "a", "model.weights.lm": "b"}
    recipe = load_recipe(ROOT / "recipes" / "instructblip.yaml", dotted, tiny=True)
    assert recipe.model.weights == {"connectors.image": "a", "lm": "b"}
