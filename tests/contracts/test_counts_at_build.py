"""A part that counts other tokens than it produces is refused when the model is built, with both numbers."""

from __future__ import annotations

import pytest

import chiasm
from chiasm import registry
from chiasm.connectors.linear import Linear
from chiasm.errors import ConfigError
from chiasm.types import Count


class Miscounting(Linear):
    class Config(Linear.Config):
        type: str = "tests.contracts.test_counts_at_build:Miscounting"

        def count(self, source):
            return Count(super().count(source).tokens + 1)


def test_a_wrong_count_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_entries", {k: dict(v) for k, v in registry._entries.items()})
    registry.register("connector", "miscounting")(Miscounting)
    config = chiasm.preset("llava-1.5-7b", tiny=True)
    chiasm.build(config, device="meta")
    wrong = config.edit(**{"model.connectors.image": {"type": "miscounting"}})
    with pytest.raises(ConfigError, match=r"connector 'image' counts \d+ tokens .* but produces \d+"):
        chiasm.build(wrong, device="meta")
