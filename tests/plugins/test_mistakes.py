"""What a stranger forgets in a part of one's own is told at the build, with the part's name and what to give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import chiasm
from chiasm.connectors.base import Connector, ConnectorConfig, sole
from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.errors import ConfigError
from chiasm.types import Count, Tokens


class Line(Connector):
    """A connector that is right; the others each change one thing."""

    class Config(ConnectorConfig):
        type: str = "test_mistakes:Line"

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            assert isinstance(source, Count)
            return source

    def __init__(self, config: Any, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.proj = nn.Linear(sole(in_dims, "line"), out_dim)

    def forward(self, tokens: Any, cond: Any = None) -> Any:
        return Tokens(self.proj(tokens.x), tokens.mask, tokens.grid)


class NoCount(Line):
    class Config(ConnectorConfig):
        type: str = "test_mistakes:NoCount"


class Miscounts(Line):
    def forward(self, tokens: Any, cond: Any = None) -> Any:
        return Tokens(self.proj(tokens.x)[:, 1:])


class GivesATensor(Line):
    def forward(self, tokens: Any, cond: Any = None) -> Any:
        return self.proj(tokens.x)


class OfAnotherWidth(Line):
    def forward(self, tokens: Any, cond: Any = None) -> Any:
        return Tokens(torch.cat([self.proj(tokens.x)] * 2, dim=-1))


class NoConfig(nn.Module):
    pass


class Squares(Encoder):
    """An encoder that is right."""

    class Config(EncoderConfig):
        type: str = "test_mistakes:Squares"

        def count(self, shape: tuple[int, ...]) -> Count:
            return Count(4, (2, 2))

    def __init__(self, config: Any):
        super().__init__()
        self.dim = 8
        self.conv = nn.Conv2d(3, 8, 12, 12)

    def forward(self, inputs: Any) -> Any:
        return Tokens(self.conv(inputs).flatten(2).transpose(1, 2), grid=(2, 2))


class NoWidth(Squares):
    def __init__(self, config: Any):
        super().__init__(config)
        del self.dim


class Flat(Squares):
    def forward(self, inputs: Any) -> Any:
        return Tokens(self.conv(inputs).flatten(1))


def built(kind: str, name: str) -> chiasm.VLM:
    config = chiasm.preset("llava-1.5-7b", tiny=True)
    return chiasm.build(config.edit(**{f"model.{kind}.image": {"type": f"test_mistakes:{name}"}}))


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("connectors", "NoCount", r"\(test_mistakes:NoCount\) behind encoder 'image' \(vit\).*a Config without count"),
        ("connectors", "Miscounts", r"counts 36 tokens for a image .* but produces 35"),
        ("connectors", "GivesATensor", r"connector 'image' gave Tensor: its forward returns chiasm.types.Tokens"),
        ("connectors", "OfAnotherWidth", r"connector 'image' gave x \[1, 36, 128\] for one unit, \[1, N, 64\] was"),
        ("connectors", "NoConfig", r"has no Config that is a PartConfig"),
        ("connectors", "NotThere", r"cannot be imported: .*NotThere"),
        ("encoders", "NoWidth", r"encoder 'image' \(NoWidth\) sets no dim"),
        ("encoders", "Flat", r"encoder 'image' gave x \[1, 32\] for one unit, \[1, N, 8\] was expected"),
    ],
)
def test_a_mistake_is_told(kind: str, name: str, said: str):
    with pytest.raises((ConfigError, chiasm.ChiasmError), match=said):
        built(kind, name)


def test_the_right_ones_are_built():
    assert type(built("connectors", "Line").model.connectors["image"]) is Line
    assert type(built("encoders", "Squares").model.encoders["image"]) is Squares
