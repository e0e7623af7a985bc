"""NF4: weights in 4 bits, by blocks of 64, as levels of a normal distribution; the blocks' scales in 8 bits by option.

Paper: QLoRA (arXiv:2305.14314), the levels from its appendix E. Reference: the ``nf4`` type of ``bitsandbytes``, whose
levels and codes these are.

Differences by design: the 8-bit scales are evenly spaced over each group of 256 (the reference spaces them as floating
numbers). Scales are kept as the bits of their float32 numbers, so that casting a model to bfloat16 leaves them alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # weights that share a scale
GROUP = 256  # scales that share a second scale

LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
_MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2


@dataclass(frozen=True)
class NF4:
    """A quantised tensor. ``codes``: two weights a byte; ``scales``: one a block.

    Without double quantisation ``scales`` are float32 bits (int32) and the rest is None; with it they are int8, counted
    in ``steps`` (float32 bits, one a group) from ``middle`` (float32 bits, one number).
    """

    codes: Tensor  # [ceil(n / 64) * 32] uint8
    scales: Tensor  # [ceil(n / 64)] int32 or int8
    steps: Tensor | None  # [ceil(blocks / 256)] int32
    middle: Tensor | None  # [1] int32


def quantise(weight: Tensor, double: bool) -> NF4:
    """The nearest level of each weight, relative to the largest of its block. Runs in float32."""
    if weight.is_meta:
        return _empty(weight, double)
    blocks = _rows(weight.detach().float().flatten(), BLOCK)  # [b, 64]
    scales = blocks.abs().amax(1)  # [b]
    relative = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    levels = torch.bucketize(relative, _MIDDLES.to(weight.device)).to(torch.uint8).flatten()  # [b * 64]
    codes = levels[0::2] << 4 | levels[1::2]  # [b * 32]
    if not double:
        return NF4(codes, _bits(scales), None, None)
    middle = scales.mean()
    groups = _rows(scales - middle, GROUP)  # [g, 256]
    steps = groups.abs().amax(1) / 127  # [g]
    whole = torch.round(groups / steps.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).to(torch.int8)
    return NF4(codes, whole.flatten()[: len(scales)], _bits(steps), _bits(middle.view(1)))


def dequantise(packed: NF4, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight ``shape`` that the codes stand for."""
    scales = packed.scales
    if packed.steps is not None and packed.middle is not None:
        steps = _numbers(packed.steps).repeat_interleave(GROUP)[: len(scales)]  # [b]
        scales = scales.float() * steps + _numbers(packed.middle)  # [b]
    else:
        scales = _numbers(scales)
    levels = torch.stack((packed.codes >> 4, packed.codes & 15), dim=1).view(-1, BLOCK)  # [b, 64]
    values = LEVELS.to(packed.codes.device)[levels.int()] * scales.unsqueeze(1)  # [b, 64]
    return values.flatten()[: shape.numel()].view(shape).to(dtype)


def _rows(flat: Tensor, width: int) -> Tensor:
    """``[n]`` → ``[ceil(n / width), width]``, filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % width)).view(-1, width)


def _bits(numbers: Tensor) -> Tensor:
    return numbers.to(torch.float32).contiguous().view(torch.int32)


def _numbers(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


def _empty(weight: Tensor, double: bool) -> NF4:
    """The shapes of a quantised weight, without memory."""
    blocks = -(-weight.numel() // BLOCK)

    def room(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=weight.device)

    codes = room(blocks * BLOCK // 2, torch.uint8)
    if not double:
        return NF4(codes, room(blocks, torch.int32), None, None)
    groups = -(-blocks // GROUP)
    return NF4(codes, room(blocks, torch.int8), room(groups, torch.int32), room(1, torch.int32))
