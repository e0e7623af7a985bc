"""CLIP's residual network: a stem of three convolutions, and an average in front of every stride.

Paper: CLIP (arXiv:2103.00020, section 2.4). Reference: ``ModifiedResNet`` of openai/CLIP d05afc4, equal to 1e-5 in
float32 with the same weights. Its attention pooling is the connector ``clip_pool``.

Differences by design: the map before the pooling is what the tower gives, so that a connector may read it whole.
Initialisation: convolutions by He et al. (arXiv:1502.01852) for the outputs (OpenAI leaves torch's own), norms 1 and 0,
and the last norm of every block 0, so that a block starts as its shortcut.

Letters: ``U`` pictures, ``C`` channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.errors import DataError
from chiasm.nn.again import call
from chiasm.registry import register
from chiasm.types import Count, Tokens

GROWTH = 4  # channels out of a block for each inside
STRIDE = 32  # pixels a side of one place of the map


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; an average of ``stride`` x ``stride`` does the striding."""

    def __init__(self, channels: int, inner: int, stride: int):
        super().__init__()
        out = inner * GROWTH
        self.stride = stride
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out)
        changes = stride > 1 or channels != out
        self.short_conv = nn.Conv2d(channels, out, 1, bias=False) if changes else None
        self.short_norm = nn.BatchNorm2d(out) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """``x [U, C, height, width]`` → ``[U, C', height/stride, width/stride]``."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(self._average(y)))  # [U, C', height/stride, width/stride]
        if self.short_conv is not None and self.short_norm is not None:
            x = self.short_norm(self.short_conv(self._average(x)))  # [U, C', height/stride, width/stride]
        return F.relu(y + x)

    def _average(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


@register("encoder", "resnet")
class ResNet(Encoder):
    """Stem, four stages; the places of the last map as tokens, row by row."""

    class Config(EncoderConfig):
        """``blocks`` of the four stages, ``width`` of the first. The map has a place for 32 x 32 pixels."""

        type: str = "resnet"
        image_size: PositiveInt = 224
        blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (3, 4, 6, 3)
        width: PositiveInt = 64
        channels: PositiveInt = 3

        @property
        def dim(self) -> int:
            """Channels of the last map."""
            return self.width * 8 * GROWTH

        def count(self, shape: tuple[int, ...]) -> Count:
            """Places of the map of a picture of ``shape (channels, height, width)``. Raises DataError."""
            if len(shape) != 3 or shape[0] != self.channels or shape[1] % STRIDE or shape[2] % STRIDE:
                raise DataError(
                    f"a picture of shape ({self.channels}, height, width) with sides divisible by {STRIDE} was "
                    f"expected, got {tuple(shape)}"
                )
            rows, columns = shape[1] // STRIDE, shape[2] // STRIDE
            return Count(rows * columns, (rows, columns))

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dim = config.dim
        width = config.width
        self.conv1 = nn.Conv2d(config.channels, width // 2, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.stages = nn.ModuleList()
        channels = width
        for number, count in enumerate(config.blocks):
            inner, stride = width * 2**number, 1 if number == 0 else 2
            stage = nn.ModuleList()
            for place in range(count):
                stage.append(Bottleneck(channels, inner, stride if place == 0 else 1))
                channels = inner * GROWTH
            self.stages.append(stage)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, as the head of this file says."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)

    def forward(self, inputs: Tensor) -> Tokens:
        """``inputs [U, channels, height, width]`` → ``Tokens(x [U, rows·columns, D])``. Raises DataError."""
        grid = self.config.count(tuple(inputs.shape[1:])).grid
        x = inputs.to(self.conv1.weight.dtype)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2), (self.conv3, self.norm3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)  # [U, width, height/4, width/4]
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = call(block, self.recompute, x)
        return Tokens(x.flatten(2).transpose(1, 2), grid=grid)  # [U, rows*columns, D]


_SIZES = {  # blocks of the stages, width, pixels
    "RN50": ((3, 4, 6, 3), 64, 224),
    "RN101": ((3, 4, 23, 3), 64, 224),
    "RN50x4": ((4, 6, 10, 6), 80, 288),
    "RN50x16": ((6, 8, 18, 8), 96, 384),
    "RN50x64": ((3, 15, 36, 10), 128, 448),
}


def clip_resnet(name: str) -> ResNet.Config:
    """A published tower: RN50, RN101, RN50x4, RN50x16 or RN50x64."""
    blocks, width, image_size = _SIZES[name]
    return ResNet.Config(blocks=blocks, width=width, image_size=image_size)
