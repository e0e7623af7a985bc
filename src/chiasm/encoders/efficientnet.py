"""EfficientNet: inverted bottlenecks whose width and depth grow by two factors; the picture tower of ALIGN.

Paper: EfficientNet (arXiv:1905.11946), ALIGN (arXiv:2102.05918). Reference: ``AlignVisionModel`` of transformers 5.23,
equal to 1e-5 in float32.

Differences by design: the running averages of the norms move by a hundredth a step (transformers hands Keras's momentum
of 0.99 to torch, where it means the opposite: they would be overwritten each step); no block is dropped in training.
Initialisation: convolutions by He et al. for the outputs, norms 1 and 0.

Letters: ``U`` pictures, ``C`` channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from chiasm.config import Config
from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.errors import ConfigError, DataError
from chiasm.nn.again import call
from chiasm.registry import register
from chiasm.types import Count, Tokens

MOMENTUM = 0.01  # of the norms' running averages


class Stage(Config):
    """Blocks of one kind, before the two factors: channels out, kernel, stride of the first, how many, expansion."""

    channels: PositiveInt
    kernel: PositiveInt = 3
    stride: PositiveInt = 1
    repeats: PositiveInt = 1
    expand: PositiveInt = 6


B0 = (
    Stage(channels=16, expand=1),
    Stage(channels=24, stride=2, repeats=2),
    Stage(channels=40, kernel=5, stride=2, repeats=2),
    Stage(channels=80, stride=2, repeats=3),
    Stage(channels=112, kernel=5, repeats=3),
    Stage(channels=192, kernel=5, stride=2, repeats=4),
    Stage(channels=320),
)


class Block(nn.Module):
    """Expand, one convolution a channel, squeeze and excite, project; a shortcut where the shape stays."""

    def __init__(self, channels: int, out: int, stage: Stage, stride: int, squeeze: float, eps: float, square: bool):
        super().__init__()
        inner, asked = channels * stage.expand, max(1, int(channels * squeeze))
        self.stride, self.shortcut = stride, False
        around = stage.kernel // 2
        before = around if square else around - 1  # an even side is padded less in front, as TensorFlow does
        self.padding = (before, around, before, around) if stride == 2 else (around,) * 4
        wider = stage.expand != 1
        self.expand = nn.Conv2d(channels, inner, 1, bias=False) if wider else None
        self.expand_norm = nn.BatchNorm2d(inner, eps, MOMENTUM) if wider else None
        self.depthwise = nn.Conv2d(inner, inner, stage.kernel, stride, groups=inner, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(inner, eps, MOMENTUM)
        self.reduce = nn.Conv2d(inner, asked, 1)
        self.excite = nn.Conv2d(asked, inner, 1)
        self.project = nn.Conv2d(inner, out, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(out, eps, MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """``x [U, C, height, width]`` → ``[U, C', height/stride, width/stride]``."""
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = F.silu(self.expand_norm(self.expand(y)))  # [U, expand*C, height, width]
        y = F.silu(self.depthwise_norm(self.depthwise(F.pad(y, self.padding))))
        share = torch.sigmoid(self.excite(F.silu(self.reduce(y.mean((2, 3), keepdim=True)))))  # [U, expand*C, 1, 1]
        y = self.project_norm(self.project(y * share))  # [U, C', height/stride, width/stride]
        return x + y if self.shortcut else y


@register("encoder", "efficientnet")
class EfficientNet(Encoder):
    """Stem and blocks; the places of the last map as tokens, row by row."""

    class Config(EncoderConfig):
        """``width`` and ``depth`` are the two factors; channels are rounded to multiples of ``divisor``.

        ``square_padding`` numbers the blocks that are padded alike on all sides although they stride.
        """

        type: str = "efficientnet"
        image_size: PositiveInt = 289
        width: PositiveFloat = 2.0
        depth: PositiveFloat = 3.1
        divisor: PositiveInt = 8
        stem: PositiveInt = 32
        stages: tuple[Stage, ...] = B0
        squeeze: PositiveFloat = 0.25
        square_padding: tuple[int, ...] = ()
        norm_eps: float = 1e-3
        channels: PositiveInt = 3

        @model_validator(mode="after")
        def _fits(self) -> EfficientNet.Config:
            for stage in self.stages:
                if stage.stride > 2 or stage.kernel % 2 == 0:
                    raise ConfigError(
                        f"efficientnet: a stage has stride {stage.stride} and kernel {stage.kernel}; strides are 1 or "
                        "2, kernels odd"
                    )
            return self

        def wide(self, channels: int) -> int:
            """Channels times ``width``, to the nearest multiple of ``divisor`` that is not a tenth less."""
            grown = channels * self.width
            rounded = max(self.divisor, int(grown + self.divisor / 2) // self.divisor * self.divisor)
            return rounded if rounded >= 0.9 * grown else rounded + self.divisor

        def plan(self) -> list[tuple[Stage, int]]:
            """Every block: its stage, and its stride."""
            found = []
            for stage in self.stages:
                for number in range(math.ceil(self.depth * stage.repeats)):
                    found.append((stage, stage.stride if number == 0 else 1))
            return found

        @property
        def dim(self) -> int:
            """Channels of the last map."""
            return self.wide(self.stages[-1].channels)

        def count(self, shape: tuple[int, ...]) -> Count:
            """Places of the map of a picture of ``shape (channels, height, width)``. Raises DataError."""
            if len(shape) != 3 or shape[0] != self.channels:
                raise DataError(f"a picture of shape ({self.channels}, height, width) was expected, got {tuple(shape)}")
            rows, columns = shape[1] // 2, shape[2] // 2
            for number, (_, stride) in enumerate(self.plan()):
                if stride == 2:
                    more = number in self.square_padding
                    rows, columns = (rows + more) // 2, (columns + more) // 2
            if not rows or not columns:
                raise DataError(f"a picture of {shape[1]}x{shape[2]} pixels is too small for this tower; resize it")
            return Count(rows * columns, (rows, columns))

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dim = config.dim
        channels = config.wide(config.stem)
        self.stem = nn.Conv2d(config.channels, channels, 3, stride=2, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels, config.norm_eps, MOMENTUM)
        self.blocks = nn.ModuleList()
        before: Stage | None = None
        for number, (stage, stride) in enumerate(config.plan()):
            out, square = config.wide(stage.channels), number in config.square_padding
            block = Block(channels, out, stage, stride, config.squeeze, config.norm_eps, square)
            block.shortcut = stride == 1 and stage is before  # never the first block of a stage
            self.blocks.append(block)
            channels, before = out, stage
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, as the head of this file says."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, inputs: Tensor) -> Tokens:
        """``inputs [U, channels, height, width]`` → ``Tokens(x [U, rows·columns, D])``. Raises DataError."""
        grid = self.config.count(tuple(inputs.shape[1:])).grid
        x = F.pad(inputs.to(self.stem.weight.dtype), (0, 1, 0, 1))
        x = F.silu(self.stem_norm(self.stem(x)))  # [U, C, height/2, width/2]
        for block in self.blocks:
            x = call(block, self.recompute, x)
        return Tokens(x.flatten(2).transpose(1, 2), grid=grid)  # [U, rows*columns, D]
