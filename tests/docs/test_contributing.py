"""The connector of CONTRIBUTING.md works as it is printed there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import torch

import chiasm
from chiasm import registry
from chiasm.types import Count, Tokens

ROOT = Path(__file__).resolve().parents[2]


def test_the_printed_connector_works(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    code = next(block for block in blocks if "class GatedLinear" in block)
    module = types.ModuleType("printed_connector")
    monkeypatch.setitem(sys.modules, "printed_connector", module)
    registry.names("connector")
    monkeypatch.setattr(registry, "_entries", {k: dict(v) for k, v in registry._entries.items()})
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    cls = registry.get("connector", "gated_linear")
    assert registry.get("connector", "printed_connector:GatedLinear") is cls
    config = cls.Config()
    connector = cls(config, in_dims={"image": 6}, out_dim=10)
    tokens = connector(Tokens(torch.randn(2, 4, 6), grid=(2, 2)))
    assert tokens.x.shape == (2, 4, 10)
    assert config.count(Count(4, (2, 2))) == Count(4, (2, 2))
    tokens.x.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in connector.parameters())
    for name in ("gated_linear", "printed_connector:GatedLinear"):
        whole = chiasm.preset("llava-1.5-7b", tiny=True).edit(**{"model.connectors.image": {"type": name}})
        assert type(chiasm.build(whole).model.connectors["image"]) is cls
