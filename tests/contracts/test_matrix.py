"""Every encoder with every connector, every merge, language model and way of joining: it works, or says why not.

A combination is built from a plain configuration by the public names, trained one step, asked, saved and loaded. The
ones that are refused are named here, each with the words that it must say; nothing is refused later than at the build.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from checkpoint_kit import make_tokenizer
from matrix_kit import CONNECTORS, DEFAULT, ENCODERS, FUSIONS, LMS, MERGES, TABLES, configuration, outcome, picture

import chiasm
from chiasm import registry

# What does not fit, as (condition, what is said). The first that holds must be the error; without one it must work.
NO_TEXT = ("text", "bert")
MAPS = ("pixel_shuffle", "mqt", "multiscale")  # connectors that need a grid
JOINED = ("hierarchical", "timeline")  # connectors that join the units of a medium: there are no tiles left
REFUSED = [
    (lambda c: c["connector"] == "gate", r"connector 'gate' joins two encoders, got 1"),
    (lambda c: c["fusion"] == "cross_attention" and c["lm"] in ("hf", "hf/t5"), r"lm 'hf' has no place for cross"),
    (lambda c: c["connector"] == "map_head" and c["encoder"] == "resnet" and c["fusion"] != "cross_attention", "width"),
    (lambda c: c["fusion"] == "vokens" and c["lm"] == "hf/t5", r"vokens: lm 'hf' is an encoder with a decoder"),
    (lambda c: c["encoder"] in NO_TEXT, r"encoder '\w+' reads the ids of a text, of shape \(T,\), got \(3, 32, 32\)"),
    (
        lambda c: c["encoder"] == "naflex" and c["merge"].startswith("spatial") and c["connector"] not in JOINED,
        "form a grid",
    ),
    (lambda c: c["connector"] in MAPS and c["encoder"] in ("vit/cls", "vit/cls_patch", "naflex"), "form a grid"),
    (lambda c: c["connector"] == "clip_pool" and c["encoder"] in ("vit/cls", "vit/cls_patch", "naflex"), "reads a map"),
    (lambda c: c["connector"] == "neighbours" and c["encoder"] in ("vit/cls", "vit/cls_patch"), "cannot be joined by"),
    (lambda c: c["connector"] == "dynamic" and c["encoder"] in ("vit/cls", "resnet"), "keeps 5 patches"),
]


def expected(chosen: dict[str, str]) -> str:
    names = {**DEFAULT, **chosen}
    return next((said for holds, said in REFUSED if holds(names)), "^works$")


def pairs(*axes: tuple[str, str]) -> list[dict[str, str]]:
    """Each part of one kind with each of another, all else as in ``DEFAULT``, none twice."""
    found = {}
    for a, b in axes:
        for x, y in itertools.product(TABLES[a], TABLES[b]):
            whole = {**DEFAULT, a: x, b: y}
            found.setdefault(tuple(sorted(whole.items())), {a: x, b: y})
    return list(found.values())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def check(tokenizer: Path, chosen: dict[str, str], folder: Path | None) -> None:
    said = outcome(tokenizer, folder, **chosen)
    assert re.search(expected(chosen), said), f"{chosen}: {said}"
    if said != "works":
        names = {**DEFAULT, **chosen}
        parts = {part for part in names.values() for word in [part.split("/")[0]] if re.search(rf"\b{word}\b", said)}
        assert len(parts) >= 2, f"an error names both parts: {said}"


def test_every_part_is_in_the_matrix():
    """A new part adds a line to ``matrix_kit``, or a reason here."""
    apart = {
        "imagebind_audio": "hears: tests of sounds",
        **dict.fromkeys(("albef", "modality_experts", "multiway", "single_stream"), "one stack with parts of its own"),
        **dict.fromkeys(("classifier", "dual_tower", "query_text"), "writes nothing: test_towers_and_connectors.py"),
    }
    for kind, table in (("encoder", ENCODERS), ("connector", CONNECTORS), ("lm", LMS), ("merge", MERGES)):
        missing = set(registry.names(kind)) - {key.split("/")[0] for key in table} - set(apart)
        ours = {name for name in missing if registry.get(kind, name).__module__.startswith("chiasm.")}
        assert not ours, f"{kind}s that no combination is tried with: {ours}"
    fusions = {n for n in registry.names("fusion") if registry.get("fusion", n).__module__.startswith("chiasm.")}
    assert fusions <= set(FUSIONS) | set(apart)


NEAR = pairs(("encoder", "connector"), ("fusion", "lm"), ("connector", "merge"), ("fusion", "connector"))


@pytest.mark.parametrize("chosen", NEAR[::4], ids=lambda c: "+".join(c.values()))
def test_pairs(chosen: dict[str, str], tokenizer: Path, tmp_path: Path):
    """A quarter of the pairs; the others and all else under ``slow``. Files for every part once."""
    pytest.importorskip("transformers")
    check(tokenizer, chosen, tmp_path / "model" if "mlp" in chosen.values() else None)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_whole_matrix(encoder: str, fusion: str, tokenizer: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    for connector, lm, merge in itertools.product(CONNECTORS, LMS, MERGES):
        chosen = {"encoder": encoder, "fusion": fusion, "connector": connector, "lm": lm, "merge": merge}
        check(tokenizer, chosen, tmp_path / "model")


# ------------------------------------------------------------------------------------------------------- several sizes


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
@pytest.mark.parametrize("front", ["naflex", "proportional"])
def test_pictures_of_several_sizes_in_one_batch(front: str, fusion: str, tokenizer: Path):
    """As if each were alone: no padding is taken for a picture, and a tower of many sizes is told each grid."""
    values = configuration(encoder="naflex" if front == "naflex" else "vit", fusion=fusion)
    if front == "proportional":
        values["processing"]["media"]["image"] = {"type": "proportional", "shortest_edge": 32, "multiple": 8}
    vlm = chiasm.build(values, tokenizer=tokenizer).eval()
    for parameter in vlm.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    asked = [
        [{"role": "user", "content": [{"type": "image", "image": picture(size)}, {"type": "text", "text": "What?"}]}]
        for size in ((60, 20), (30, 30), (20, 60), (60, 20))
    ]
    together = vlm.model(vlm.processor.batch(asked, add_generation_prompt=True), logits="last").logits
    for row, question in zip(together, asked, strict=True):
        alone = vlm.model(vlm.processor.batch([question], add_generation_prompt=True), logits="last").logits[0]
        torch.testing.assert_close(row, alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together[0], together[3], atol=1e-6, rtol=1e-5)
    assert (together[0] - together[2]).abs().max() > 1e-4


# ----------------------------------------------------------------------------------------------------------- one vector

POOLS = ("pooled", "map_head", "clip_pool")


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("fusion", ["dual_tower", "classifier"])
def test_models_of_one_vector(fusion: str, encoder: str, tokenizer: Path):
    """Towers and classifiers: connectors that pool work, the others are refused by the names of both parts."""
    pytest.importorskip("transformers")
    tower, front, _ = ENCODERS[encoder]
    for connector in ("pooled", "map_head", "clip_pool", "linear", "qformer", "gate"):
        parts = {"type": connector, **CONNECTORS[connector]}
        if fusion == "dual_tower":
            text = {"type": "text", "vocab": 300, "dim": 16, "depth": 1, "heads": 2, "mlp": 20, "positions": 16}
            words = {"encoders": {"image": tower, "text": text}, "dim": 16, "type": fusion}
            model = words | {"connectors": {"image": parts, "text": {"type": "pooled", "pool": "last"}}}
            processing = {"template": {"type": "pair", "length": 16}, "media": {"image": front}}
        else:
            model = {"type": fusion, "classes": 16, "encoders": {"image": tower}, "connectors": {"image": parts}}
            processing = {"template": {"type": "pair", "length": 16, "read": "none"}, "media": {"image": front}}
        try:
            vlm = chiasm.build(
                {"model": model, "processing": processing}, tokenizer=tokenizer if fusion == "dual_tower" else None
            ).eval()
        except chiasm.ChiasmError as error:
            assert encoder in NO_TEXT or connector not in POOLS or connector != "pooled", str(error)
            assert connector in str(error) or encoder.split("/")[0] in str(error)
            continue
        assert connector in POOLS or encoder == "vit/cls"
        pictures = [picture((60, 20)), picture((20, 60))]
        found = vlm.embed(images=pictures) if fusion == "dual_tower" else vlm.classify(images=pictures)
        alone = vlm.embed(images=pictures[:1]) if fusion == "dual_tower" else vlm.classify(images=pictures[:1])
        assert found.shape == (2, 16) and torch.isfinite(found).all()
        torch.testing.assert_close(found[:1], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_classifier_is_told_the_grid_of_each_picture():
    """NaFlex reads positions by it: a picture of 2 x 6 patches is not one of 1 x 12."""
    tower, front, _ = ENCODERS["naflex"]
    model = {"type": "classifier", "classes": 3, "encoders": {"image": tower}, "connectors": {"image": "pooled"}}
    processing = {"template": {"type": "pair", "length": 16, "read": "none"}, "media": {"image": front}}
    vlm = chiasm.build({"model": model, "processing": processing}).eval()
    for parameter in vlm.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    batch = vlm.processor.batch([[{"role": "user", "content": [{"type": "image", "image": picture((60, 20))}]}]])
    media = batch.media["image"]
    assert media.layouts[0].grid == (2, 6)
    network = vlm.model
    told = network.connectors["image"](network.encoders["image"](media.inputs, media.layouts)).x[:, 0]
    torch.testing.assert_close(network.classify(batch), told)
    assert (told - network.connectors["image"](network.encoders["image"](media.inputs)).x[:, 0]).abs().max() > 1e-3
