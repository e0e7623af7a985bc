"""One of each kind of part, from outside the package and registered nowhere: a recipe names them by their place.

This file is what a stranger would write. It uses public names only, and nothing of chiasm was changed for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image as Pillow
from torch import Tensor, nn

from chiasm.connectors.base import Connector, ConnectorConfig, sole
from chiasm.data.base import Example, Source, SourceConfig
from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.fusion.merge import Merge, MergeConfig
from chiasm.fusion.splice import Splice
from chiasm.model_config import VLMConfig
from chiasm.processing.template import Template, TemplateConfig
from chiasm.train.objectives.base import Loss
from chiasm.types import Batch, Count, Image, Layout, Media, Message, Piece, Text, Tokens

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


class Squares(Encoder):
    """A convolution."""

    class Config(EncoderConfig):
        type: str = "outside:Squares"
        patch: int = 16
        width: int = 16

        def count(self, shape: tuple[int, ...]) -> Count:
            side = shape[1] // self.patch
            return Count(side * side, (side, side))

    def __init__(self, config: Config):
        super().__init__()
        self.dim = config.width
        self.conv = nn.Conv2d(3, config.width, config.patch, config.patch)

    def forward(self, inputs: Tensor) -> Tokens:
        x = self.conv(inputs)  # [U, D, side, side]
        return Tokens(x.flatten(2).transpose(1, 2), grid=(x.shape[2], x.shape[3]))


class Gated(Connector):
    """The connector of CONTRIBUTING.md, without its name."""

    class Config(ConnectorConfig):
        type: str = "outside:Gated"

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            assert isinstance(source, Count)
            return source

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.proj = nn.Linear(sole(in_dims, config.type), out_dim)
        self.gate = nn.Linear(sole(in_dims, config.type), out_dim)

    def forward(self, tokens: Tokens, cond: Any = None) -> Tokens:
        return Tokens(self.proj(tokens.x) * self.gate(tokens.x).sigmoid(), tokens.mask, tokens.grid)


class Twice(Merge):
    """Every token stands there twice."""

    class Config(MergeConfig):
        type: str = "outside:Twice"

        def count(self, layout: Layout, unit: Count) -> int:
            return 2 * layout.units * unit.tokens

    def __call__(self, x: Tensor, unit: Count, layout: Layout, newline: Tensor | None) -> Tensor:
        return torch.cat([x.flatten(0, 1)] * 2)


class Own(Splice):
    """A way of joining."""

    class Config(Splice.Config):
        type: str = "outside:Own"


class Plainest(Template):
    """The parts of the messages, and a token behind an answer."""

    end = "<|end|>"
    controls = ("<|end|>",)

    class Config(TemplateConfig):
        type: str = "outside:Plainest"

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, where: str) -> list[Piece]:
        pieces: list[Piece] = []
        media = 0
        for message in messages:
            answer = message.role == "assistant"
            for part in message.parts:
                if isinstance(part, Media):
                    pieces.append(Piece(self.placeholders[part.kind], literal=True, medium=media))
                    media += 1
                elif isinstance(part, Text):
                    pieces.append(Piece(part.text, train=answer))
            pieces.append(Piece(self.end, literal=True, train=True) if answer else Piece(" ="))
        return pieces


class Colours(Source):
    """Squares of one colour."""

    class Config(SourceConfig):
        type: str = "outside:Colours"
        length: int = 12

    def __len__(self) -> int:
        return int(self.config.length)

    def __getitem__(self, index: int) -> Example:
        name = sorted(COLOURS)[index % 3]
        picture = Pillow.new("RGB", (20 + index, 20), COLOURS[name])
        asked = Message("user", (Image(picture), Text("Which colour?")))
        return Example(str(index), (asked, Message("assistant", (Text(name),))), answers=(name,))


def summed(model: Any, batch: Batch) -> Loss:
    """Cross-entropy, as torch has it."""
    output = model(batch, logits="labels")
    return Loss(
        nn.functional.cross_entropy(output.logits.float(), output.targets, reduction="sum"), len(output.targets)
    )


def first_letter(prediction: str, answers: Sequence[str]) -> float:
    """1 where the first letter is right."""
    return float(prediction[:1] in {answer[:1] for answer in answers})


def system() -> VLMConfig:
    """A preset."""
    lm = {"type": "decoder", "vocab": 1024, "dim": 32, "depth": 1, "heads": 2, "mlp": 64, "max_positions": 256}
    stream = {"encoders": ["image"], "connector": "image", "merge": "outside:Twice"}
    model = {"encoders": {"image": "outside:Squares"}, "connectors": {"image": "outside:Gated"}, "lm": lm}
    processing = {"template": "outside:Plainest", "media": {"image": {"type": "image", "size": 32, "fit": "squash"}}}
    return VLMConfig.parse(
        {"model": {"type": "outside:Own", **model, "media": {"image": stream}}, "processing": processing}
    )
