"""Stages and recipes that follow a QLoRA stage: what goes on does, and what cannot is refused before the first step."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from tiny_run import model_config, source, tokenizer_folder, write_pictures

import chiasm
from chiasm.cli import main
from chiasm.errors import ConfigError
from chiasm.train.forecast import foresee
from chiasm.train.recipe import Recipe
from chiasm.train.run import train

QLORA = {"*": "freeze", "connectors": "train", "lm": "qlora(r=2)"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def recipe(data: Path, out: str, *plans, folder: Path | None = None) -> Recipe:
    stage = {"steps": 3, "batch_size": 2, "lr": 1e-2, "warmup_ratio": 0.0}
    config = {"config": model_config(), "tokenizer": str(tokenizer_folder(data / "tokenizer"))}
    values = {
        "model": {"folder": str(folder)} if folder else config,
        "data": {"colors": {"source": source(data)}},
        "stages": [{"name": f"s{i}", "plan": plan, **stage} for i, plan in enumerate(plans)],
        "out": str(data / out),
        "device": "cpu",
    }
    return Recipe.parse(values)


def run(*given, **options):
    return train(recipe(*given, **options), console=Console(file=io.StringIO()))


def adapters(vlm) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in vlm.named_parameters() if ".lora_" in n}


def test_the_same_method_goes_on_where_it_was(data):
    """In a second stage and in a later recipe, also at a learning rate of its own; the 4-bit codes stay as they are."""
    slower = QLORA | {"lm": {"type": "qlora", "r": 2, "lr": 1e-3}}
    vlm = run(data, "one", QLORA, {"*": "freeze", "connectors": "train"}, slower)
    first, second = (chiasm.load(data / "one" / name / "model") for name in ("s0", "s1"))
    assert all(torch.equal(p, adapters(second)[n]) for n, p in adapters(first).items())  # frozen in between
    assert all(not torch.equal(p, adapters(vlm)[n]) for n, p in adapters(first).items() if n.endswith("lora_b"))
    later = run(data, "two", QLORA, folder=data / "one" / "model")
    assert all(not torch.equal(p, adapters(later)[n]) for n, p in adapters(vlm).items())
    codes = {n: b for n, b in first.model.named_buffers() if n.endswith("codes")}
    assert len(codes) == 14
    assert all(torch.equal(b, dict(later.model.named_buffers())[n]) for n, b in codes.items())


@pytest.mark.parametrize("plan", ["instruct", {"*": "freeze", "lm": "lora(r=2)"}, {"*": "freeze", "lm": "qlora(r=4)"}])
def test_what_cannot_follow_is_refused_before_step_one(data, plan):
    words = r"14 of 14 weights that are kept in 4 bits .* chiasm merge FOLDER MERGED"
    with pytest.raises(ConfigError, match=words):
        run(data, "run", QLORA, plan)
    assert not (data / "run" / "s0").exists()  # the first stage was not run in vain
    with pytest.raises(ConfigError, match=words):
        list(foresee(recipe(data, "run", QLORA, plan)))


def test_the_remedy_works(data):
    """Merged as the error says, whatever was refused trains."""
    whole = run(data, "one", QLORA)
    for plan in ("instruct", {"*": "freeze", "lm": "lora(r=2)"}):
        with pytest.raises(ConfigError, match="chiasm merge"):
            run(data, "two", plan, folder=data / "one" / "model")
    words = ["merge", str(data / "one" / "model"), str(data / "merged")]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0 and "14 layers merged" in result.output
    batch = whole.processor.batch([[{"role": "user", "content": "Colors?"}]], add_generation_prompt=True)
    with torch.no_grad():
        a, b = (m.model(batch, logits="all").logits for m in (whole, chiasm.load(data / "merged")))
    assert torch.allclose(a, b, atol=1e-4)
    run(data, "two", {"*": "freeze", "lm": "lora(r=2)"}, "instruct", folder=data / "merged")
    assert json.loads((data / "two" / "model" / "config.json").read_text())["methods"] == []


def test_lora_is_merged_between_stages_so_anything_may_follow(data):
    lora = {"*": "freeze", "connectors": "train", "lm": "lora(r=2)"}
    run(data, "run", lora, {"*": "freeze", "lm": "lora(r=4)"}, "instruct", QLORA)
    assert json.loads((data / "run" / "model" / "config.json").read_text())["methods"][0]["method"]["type"] == "qlora"
