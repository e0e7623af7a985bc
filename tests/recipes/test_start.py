"""Fine-tuning begins with a trained model's tensors; every exception is named, and nothing beyond it passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import chiasm
from chiasm.errors import CheckpointError, ConfigError
from chiasm.train.model import open_model, random_parts
from chiasm.train.recipe import ModelSpec
from chiasm.train.start import resized

TOKENIZER = str(Path(chiasm.__file__).parent / "weights" / "tiny-lm")
MASK = {"processing.masking.token": "<unk>"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "vilt"
    spec = ModelSpec(preset="vilt-b32", tiny=True, tokenizer=TOKENIZER, overrides={**MASK, "model.text_vocab": 1024})
    open_model(spec, seed=3, device="cpu").save(folder)
    return folder


def spec(folder: Path, preset: str = "vilt-b32-retrieval", **start: object) -> ModelSpec:
    values = {"folder": str(folder), "fresh": ("rank_score",), "left": ("word_scores",)} | start
    return ModelSpec.parse(
        {"preset": preset, "tiny": True, "tokenizer": TOKENIZER, "overrides": {"model.text_vocab": 1024}}
        | {"start": values}
    )


def test_shared_tensors_are_read_and_heads_begin_as_published(trained: Path) -> None:
    old, new = chiasm.load(trained).model.state_dict(), open_model(spec(trained), seed=5, device="cpu").model
    state = new.state_dict()
    shared = old.keys() & state.keys()
    assert len(shared) == len(state) - 2 and all(torch.equal(old[n], state[n]) for n in shared)
    assert torch.equal(state["rank_score.weight"][0], old["match_scores.weight"][1]), "as ViLT does"
    assert random_parts(spec(trained), new) == {"rank_score"}


def test_what_nothing_names_is_an_error(trained: Path) -> None:
    for start, told in (
        ({"fresh": ()}, "2 tensors of the model that the folder lacks.*rank_score.bias"),
        ({"left": ()}, "tensors of the folder that the model has no place for.*word_scores"),
        ({"fresh": ("rank_score", "pooled")}, "fresh: 'pooled' means no tensor of the model"),
        ({"left": ("word_scores", "codes")}, "left: 'codes' means no tensor of the folder"),
    ):
        with pytest.raises(CheckpointError, match=told):
            open_model(spec(trained, **start), seed=0, device="cpu")
    narrow = spec(trained).model_copy(update={"overrides": {"model.text_vocab": 1024, "model.text_positions": 20}})
    with pytest.raises(CheckpointError, match=r"1 tensors of another shape.*\[34, 32\] → \[20, 32\]"):
        open_model(narrow, seed=0, device="cpu")
    with pytest.raises(ConfigError, match="labels and start belong to a model that is built"):
        open_model(ModelSpec.parse({"folder": str(trained), "start": {"folder": str(trained)}}), seed=0, device="cpu")


def test_tables_of_places_and_kinds_are_carried(trained: Path, tmp_path: Path) -> None:
    old = chiasm.load(trained).model.state_dict()
    heads = ("word_scores", "match_scores")
    pair = open_model(spec(trained, "vilt-b32-nlvr2", fresh=("classifier",), left=heads), seed=0, device="cpu")
    kinds = pair.model.state_dict()["kinds.weight"]
    assert torch.equal(kinds, torch.cat((old["kinds.weight"], old["kinds.weight"][1:])))
    generator = torch.Generator().manual_seed(0)
    config = type("C", (), {"image_size": 32, "patch": 8})()
    for first in (1, 3):
        table, new = torch.randn(first + 16, 6, generator=generator), torch.zeros(first + 36, 6)
        found = resized("body.vision.positions", table, new, config, config)
        grid = table[first:].view(4, 4, 6).permute(2, 0, 1)[None]
        wanted = torch.nn.functional.interpolate(grid, size=6, mode="bicubic")[0].flatten(1).T
        assert torch.equal(found[:first], table[:first]) and torch.allclose(found[first:], wanted, atol=1e-6)
    assert resized("text.positions", torch.zeros(36, 6), torch.zeros(16, 6), config, config).shape == (36, 6)


def test_albef_doubles_its_fusion_layers_and_begins_its_decoder_as_them(tmp_path: Path) -> None:
    sizes = {"model.text_vocab": 1024, "model.vision.dim": 32}
    base = ModelSpec.parse({"preset": "albef", "tiny": True, "tokenizer": TOKENIZER, "overrides": sizes | MASK})
    whole = open_model(base, seed=3, device="cpu")
    whole.save(tmp_path / "albef")
    old = whole.model.state_dict()

    def tuned(preset: str, overrides: dict[str, object], **start: object) -> dict[str, torch.Tensor]:
        heads = ("body.image_proj", "body.text_proj", "body.word_scores", "match_scores", "temperature")
        values = {"folder": str(tmp_path / "albef"), "left": (*heads, "follower", "*queue*")} | start
        table = {
            "preset": preset,
            "tiny": True,
            "tokenizer": TOKENIZER,
            "overrides": sizes | overrides,
            "start": values,
        }
        return open_model(ModelSpec.parse(table), seed=0, device="cpu").model.state_dict()

    copies = {f"body.fusion.{i}": f"body.fusion.{i // 2}" for i in range(4)}
    pairs = tuned("albef-nlvr2", {}, copies=copies, fresh=("classifier",))
    for name in [n for n in old if n.startswith("body.fusion.1.")]:
        for layer in (2, 3):
            assert torch.equal(pairs[name.replace("fusion.1", f"fusion.{layer}")], old[name])
    copies = {"decoder.blocks": "body.fusion", "decoder.words": "body.words", "decoder.word_scores": "body.word_scores"}
    answers = tuned("albef-vqa", {"model.answer_depth": 2}, copies=copies)
    assert all(torch.equal(answers[f"decoder.{n[5:]}"], t) for n, t in old.items() if n.startswith("body.word"))
    looks = [n for n in answers if n.startswith("decoder.blocks") and ".cross." in n]
    assert looks
    with pytest.raises(CheckpointError, match=r"'decoder\.blocks' does not hold what 'body\.texts'"):
        tuned("albef-vqa", {"model.answer_depth": 2}, copies={"decoder.blocks": "body.texts"})
