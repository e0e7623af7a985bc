"""Every kind of part may come from another package, named by its place: trained, saved, loaded, scored."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import chiasm
from chiasm.train import load_recipe, train

HERE = Path(__file__).parent
TOKENIZER = HERE.parents[1] / "src/chiasm/weights/tiny-lm"
RECIPE = """
out: {out}
model: {{preset: "outside:system", tokenizer: {tokenizer}}}
data: {{colours: {{source: "outside:Colours"}}}}
held_out: {{colours: {{source: {{type: "outside:Colours", length: 3}}, metric: "outside:first_letter"}}}}
stages: [{{name: only, plan: end_to_end, objective: "outside:summed", steps: 60, batch_size: 12, lr: 1e-2}}]
eval: {{max_new_tokens: 3}}
"""


def test_parts_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(out=tmp_path / "run", tokenizer=TOKENIZER))
    vlm = train(load_recipe(tmp_path / "recipe.yaml"), console=Console(quiet=True))
    again = chiasm.load(tmp_path / "run" / "model")
    assert type(again.model).__module__ == "outside"
    assert all(torch.equal(a, b) for a, b in zip(vlm.state_dict().values(), again.state_dict().values(), strict=True))
    source = sys.modules["outside"].Colours(sys.modules["outside"].Colours.Config(length=3))
    assert [again.generate([source[i].messages[0]], max_new_tokens=3) for i in range(3)] == ["blue", "green", "red"]
