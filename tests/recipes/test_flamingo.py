"""Flamingo's recipe: a mixture of documents and pairs, two frozen models, and what is trained between them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import chiasm
from chiasm.data.sources.shots import Shots
from chiasm.errors import ConfigError, DataError
from chiasm.train import load_recipe, train
from chiasm.train.speed import blocks

ROOT = Path(__file__).parents[2]
PLAY = {"type": "playground", "tasks": ["scene_qa", "digit_qa"], "length": 12}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("flamingo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        recipe = load_recipe(ROOT / "recipes" / "flamingo.yaml", {"out": str(out)}, tiny=True)
        before = {n: p.detach().clone() for n, p in start(recipe).model.named_parameters()}
        vlm = train(recipe, console=Console(file=io.StringIO()))
    return recipe, before, vlm, out


def start(recipe):
    from chiasm.train.model import open_model

    return open_model(recipe.model, recipe.seed, "cpu")


def test_frozen_stand_still_and_the_rest_is_proved(done):
    _, before, vlm, out = done
    proof = json.loads((out / "mix" / "proof.json").read_text())
    assert proof["verdict"] == "proved" and proof["open"] == {}
    parts = {(p["part"], p["plan"]): p for p in proof["parts"]}
    assert set(parts) == {
        ("encoders.image", "freeze"),
        ("lm", "freeze"),
        ("connectors.image", "train"),
        ("cross", "train"),
    }
    assert parts["cross", "train"]["gradients"] == parts["cross", "train"]["tensors"]
    for name, p in vlm.model.named_parameters():
        frozen = name.startswith(("encoders.", "lm."))
        assert torch.equal(p.detach().cpu(), before[name]) == frozen, name
        assert p.requires_grad != frozen and not (frozen and p.grad is not None)
    assert all(g.item() != 0 for b in vlm.model.cross for g in (b.attn_gate, b.mlp_gate)), "gates start shut and open"


def test_saved_loaded_and_asked(done):
    _, _, vlm, out = done
    again = chiasm.load(out / "model")
    mine, theirs = vlm.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    example = Shots(Shots.Config.parse({"source": PLAY, "count": 2}))[3]
    prompt = example.messages[:-1]
    answer = again.generate(prompt, max_new_tokens=6)
    assert "".join(again.generate(prompt, max_new_tokens=6, stream=True)) == answer
    assert again.generate([prompt, prompt[-1:]], max_new_tokens=6)[0] == answer
    assert again.generate(prompt, max_new_tokens=6, num_beams=2) is not None


def test_where_it_looks(done):
    """The gated blocks tell their attention, of the last picture; the gradient tells what earlier words carry on."""
    from chiasm.infer.look import look

    vlm = done[2]
    example = Shots(Shots.Config.parse({"source": PLAY, "count": 1}))[0]
    found = look(vlm.model, vlm.processor, example.messages[:-1], "red", "red")
    assert found.method == "attention" and len(found.heats) == 2
    assert [heat.share for heat in found.heats] == pytest.approx([0, 1], abs=1e-4)
    slopes = look(vlm.model, vlm.processor, example.messages[:-1], "red", "red", method="gradient")
    shares = [heat.share for heat in slopes.heats]
    assert min(shares) > 0 and sum(shares) == pytest.approx(1, abs=1e-3)


def test_the_report_shows_what_each_latent_looks_at(done):
    page = (done[3] / "report.html").read_text()
    assert page.count("What each query looks at") == 2, "one for each example that it shows"


def test_too_many_shots_are_refused(done):
    vlm = done[2]
    many = Shots(Shots.Config.parse({"source": PLAY, "count": 9}))[0]
    with pytest.raises(DataError, match="holds 10 media, this model takes at most 9: leave out shots"):
        vlm.processor(many.messages, id="x")


def test_compiled_and_sharded_blocks_are_found(done):
    vlm = done[2]
    assert {*vlm.model.cross} <= {*blocks(vlm.model)}
    from chiasm.train import shard

    assert {*vlm.model.cross} <= {*shard.blocks(vlm.model)}


def test_shots():
    source = Shots(Shots.Config.parse({"source": PLAY, "count": (1, 3), "seed": 5}))
    example = source[4]
    assert len(source) == 12 and example == source[4], "drawn from the seed and the number"
    questions = [m for m in example.messages if m.role == "user"]
    assert 2 <= len(questions) <= 4 and all(len(m.media) == 1 for m in questions)
    assert example.messages[-2:] == source.source[4].messages and example.answers == source.source[4].answers
    assert len({m.text for m in questions}) > 1 and source.id_of(4) == "4"
    lengths = {len(source[i].messages) for i in range(12)}
    assert lengths == {4, 6, 8}
    last = Shots(Shots.Config.parse({"source": PLAY, "count": 2, "learn": "last"}))[0]
    assert [m.train for m in last.messages if m.role == "assistant"] == [False, False, None]
    other = Shots(Shots.Config.parse({"source": PLAY, "of": PLAY | {"seed": 9, "length": 3}, "count": 3}))[0]
    assert len(other.messages) == 8
    with pytest.raises(ConfigError, match="12 shots are asked for, but there are 11 other examples"):
        Shots(Shots.Config.parse({"source": PLAY, "count": 12}))
    with pytest.raises(ConfigError, match="two in rising order"):
        Shots.Config.parse({"source": PLAY, "count": (3, 1)})
