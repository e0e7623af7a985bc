"""Rotary position embedding and its extensions to longer contexts.

Papers: RoFormer (arXiv:2104.09864); position interpolation, "linear" (arXiv:2306.15595); NTK-aware scaling that grows
with the sequence, "dynamic" (bloc97 and emozilla, 2023); YaRN (arXiv:2309.00071); LongRoPE (arXiv:2402.13753);
"llama3" (Llama 3.1's release). Reference: transformers ``modeling_rope_utils.py``, whose key names the configuration
keeps.

Differences by design: where frequencies depend on the length of the sequence ("dynamic", "longrope"), the length is
that of each segment, not the longest of the batch, so a batch gives what its rows give alone; and nothing is
remembered between calls. States computed at one length are then not those of another, so a cache may not cross such a
change: ``Rope.steady`` says where it would, and generation computes afresh there instead of going on with stale keys.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from chiasm.config import Config

NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


class RopeScaling(Config):
    """How a model reaches beyond the positions it was trained on. Names are those of transformers' ``rope_scaling``."""

    type: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        missing = [name for name in NEEDED[self.type] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"rope scaling {self.type!r} needs {', '.join(missing)}")
        return self


class Rope:
    """Angles of rotary positions for ``dim`` channels of each head.

    Not a module: the frequencies are computed from the configuration on the CPU in float32 and kept once per device, so
    that building on the meta device or casting the model cannot lose or round them.
    """

    def __init__(self, dim: int, theta: float, max_positions: int, scaling: RopeScaling | None = None):
        self.dim, self.theta, self.max_positions, self.scaling = dim, theta, max_positions, scaling
        self.varies = scaling is not None and scaling.type in ("dynamic", "longrope")
        self.amplitude = attention_amplitude(scaling, max_positions)
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}

    def __call__(self, positions: Tensor, segments: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``positions``, ``segments`` ``[B, T]`` → cosines and sines ``[B, 1, T, dim]`` in ``dtype``."""
        frequencies = self._frequencies(positions, segments)  # [dim/2] or [B, T, dim/2]
        angles = positions.unsqueeze(-1).float() * frequencies  # [B, T, dim/2]
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)  # [B, 1, T, dim]
        return (angles.cos() * self.amplitude).to(dtype), (angles.sin() * self.amplitude).to(dtype)

    def steady(self, shortest: int, longest: int) -> bool:
        """Whether all lengths from ``shortest`` to ``longest`` have the same frequencies."""
        if self.scaling is None or not self.varies:
            return True
        if self.scaling.type == "longrope":
            original = _given(self.scaling.original_max_position_embeddings)
            return longest <= original or shortest > original
        return longest <= self.max_positions

    def _frequencies(self, positions: Tensor, segments: Tensor) -> Tensor:
        tables = self._on(positions.device)
        if not self.varies or self.scaling is None:
            return tables[0]
        lengths = segment_lengths(positions, segments).unsqueeze(-1)  # [B, T, 1]
        if self.scaling.type == "longrope":
            return torch.where(lengths > _given(self.scaling.original_max_position_embeddings), tables[1], tables[0])
        # NTK: the base grows with the length, so that the slowest channel is stretched by it and the fastest kept.
        factor = self.scaling.factor or 1.0
        reach = lengths.clamp(min=self.max_positions).float() / self.max_positions
        base = self.theta * (factor * reach - (factor - 1)) ** (self.dim / (self.dim - 2))  # [B, T, 1]
        return 1.0 / base ** exponents(self.dim).to(positions.device)  # [B, T, dim/2]

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._tables:
            tables = frequency_tables(self.dim, self.theta, self.scaling)
            self._tables[device] = tuple(table.to(device) for table in tables)
        return self._tables[device]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, H, T, Dh]`` turned in its first ``cos.shape[-1]`` channels (half-split pairs), the rest kept."""
    dim = cos.shape[-1]
    turned, kept = x[..., :dim], x[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def segment_lengths(positions: Tensor, segments: Tensor) -> Tensor:
    """``[B, T]`` each → the length ``[B, T]`` so far of the segment that each position belongs to."""
    table = positions.new_zeros(len(positions), segments.shape[1] + 1)  # segment numbers never exceed the columns
    table = table.scatter_reduce(1, segments, positions + 1, reduce="amax")
    return table.gather(1, segments)


def exponents(dim: int) -> Tensor:
    """``0, 2/dim, 4/dim … [dim/2]`` on the CPU in float32."""
    return torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim


def frequency_tables(dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, ...]:
    """The turns per position ``[dim/2]`` of each channel pair; two tables (short, long) for longrope."""
    plain = 1.0 / theta ** exponents(dim)
    if scaling is None or scaling.type == "dynamic":
        return (plain,)
    if scaling.type == "linear":
        return (plain / _given(scaling.factor),)
    if scaling.type == "llama3":
        return (_llama3(plain, scaling),)
    if scaling.type == "yarn":
        return (_yarn(plain, dim, theta, scaling),)
    tables = []
    for name in ("short_factor", "long_factor"):
        factors = torch.tensor(getattr(scaling, name), dtype=torch.float32, device="cpu")
        tables.append(1.0 / (factors * theta ** exponents(dim)))
    return tuple(tables)


def attention_amplitude(scaling: RopeScaling | None, max_positions: int) -> float:
    """The factor on cosines and sines that yarn and longrope use to sharpen attention over long contexts; else 1."""
    if scaling is None or scaling.type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    original = _given(scaling.original_max_position_embeddings)
    if scaling.type == "longrope":
        factor = scaling.factor if scaling.factor is not None else max_positions / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    factor = _given(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return _yarn_amplitude(factor, scaling.mscale) / _yarn_amplitude(factor, scaling.mscale_all_dim)
    return _yarn_amplitude(factor, 1.0)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow channels are slowed by ``factor``, fast ones kept, those between blended by wavelength."""
    factor, low, high = _given(scaling.factor), _given(scaling.low_freq_factor), _given(scaling.high_freq_factor)
    turns = _given(scaling.original_max_position_embeddings) / (2 * math.pi / plain)  # whole turns in the old context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(plain: Tensor, dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Channels that turn more than ``beta_fast`` times in the old context are kept, fewer than ``beta_slow`` slowed."""
    original = _given(scaling.original_max_position_embeddings)

    def channel(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if high == low else high  # a step instead of a division by zero
    slowed = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return plain / _given(scaling.factor) * slowed + plain * (1 - slowed)


def _yarn_amplitude(factor: float, strength: float) -> float:
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


def _given(value: float | None) -> float:
    assert value is not None  # RopeScaling has checked what its type needs
    return value
