"""Towers with weights of 8 bits: what it does to vectors, and that an index knows it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from retrieve_kit import picture, towers

from chiasm.cli import main
from chiasm.errors import CheckpointError, ConfigError
from chiasm.nn.quality import nearness
from chiasm.nn.quant import Quantized, how_quantized
from chiasm.vlm import VLM, load

TEXTS = ["a red circle", "two blue stars", "a ring on the left", "a large green cross below a small square"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(towers(dim=64).save(tmp_path_factory.mktemp("model") / "towers"))


def shown(folder: Path, count: int) -> list[str]:
    return [str(picture(folder / f"{i:02}.png", i)) for i in range(count)]


def by_formula(vlm: VLM) -> VLM:
    """The same model with every rounded matrix as plain numbers again."""
    plain = copy.deepcopy(vlm)
    for name, module in list(plain.model.named_modules()):
        if isinstance(module, Quantized):
            layer = torch.nn.Linear(module.in_features, module.out_features).to(plain.dtype)
            layer.weight.data, layer.bias.data = module.widened(plain.dtype), module.bias.data.to(plain.dtype)
            owner, _, last = name.rpartition(".")
            setattr(plain.model.get_submodule(owner), last, layer)
    return plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_tells_what_becomes_of_vectors(tmp_path: Path, saved: str, dtype: str):
    vlm, paths = load(saved, dtype=dtype), shown(tmp_path, 12)
    before = torch.cat((vlm.embed(images=paths), vlm.embed(texts=TEXTS)))
    told = vlm.quantize("int8", images=paths, texts=TEXTS)
    after = torch.cat((vlm.embed(images=paths), vlm.embed(texts=TEXTS)))
    cosines = (before.double() * after.double()).sum(1)
    assert (
        told.worst == pytest.approx(float(cosines.min())) and told.count == 16 and 0.99 < told.worst < told.cosine < 1
    )
    assert "nearest kept" in str(told) and how_quantized(vlm.model) == "int8"
    rounded = {name for name, module in vlm.model.named_modules() if isinstance(module, Quantized)}
    assert {name.split(".")[1] for name in rounded} == {"image", "text"} and len(rounded) == 12
    plain = torch.cat([by_formula(vlm).embed(images=paths), by_formula(vlm).embed(texts=TEXTS)])
    off = (plain - after).norm(dim=1)  # activations are rounded too, which leaves less than the weights' own rounding
    assert off.max() < 0.06 and off.mean() < (before - after).norm(dim=1).mean() * 2
    with pytest.raises(CheckpointError, match="quantized"):
        vlm.save(tmp_path / "copy")


def test_neighbours_are_counted_by_formula():
    values = torch.Generator().manual_seed(0)
    first = torch.nn.functional.normalize(torch.randn(30, 8, generator=values).double(), dim=1)
    second = torch.nn.functional.normalize(first + 0.4 * torch.randn(30, 8, generator=values).double(), dim=1)
    kept = 0
    for i in range(30):
        near = [
            sorted((j for j in range(30) if j != i), key=lambda j: -float(x[i] @ x[j]))[:10] for x in (first, second)
        ]
        kept += len(set(near[0]) & set(near[1]))
    told = nearness(first, second)
    assert told.kept == pytest.approx(kept / 300) and 0.2 < told.kept < 0.95
    assert nearness(first, first).kept == 1 and nearness(first[:1], first[:1]).kept == 1


def test_refusals(saved: str):
    vlm = load(saved)
    with pytest.raises(ConfigError, match="not both"):
        vlm.quantize("int8", [[{"role": "user", "content": "?"}]], texts=TEXTS)
    with pytest.raises(ConfigError, match="nothing was quantized"):
        vlm.quantize("int8", names="nothing")


def run(*words: object, fails: bool = False) -> str:
    done = CliRunner().invoke(main, [str(w) for w in words])
    assert (done.exit_code != 0) == fails, done.output
    return " ".join(done.output.split())


def test_an_index_knows_that_its_model_was_rounded(tmp_path: Path, saved: str):
    shown(tmp_path / "photos", 5)
    run("index", tmp_path / "photos", "--model", saved, "--dtype", "bfloat16", "--quantize", "int8")
    assert "cosine" in run("search", "a red circle", "--in", tmp_path / "photos"), "opened as it was made"
    assert "5 as before" in run("index", tmp_path / "photos")
    whole = ("search", "red", "--in", tmp_path / "photos", "--model", saved, "--dtype", "bfloat16")
    assert "were int8, these are not (with --quantize int8)" in run(*whole, fails=True)
    assert "cosine" in run(*whole, "--quantize", "int8")
    assert "do not go together" in run("index", tmp_path / "photos", "--ray", 1, "--quantize", "int8", fails=True)
