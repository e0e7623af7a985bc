"""Weights of 8 or 4 bits: a transform over a built model, for inference.

int8: one scale for each output row. int4: one scale for each 64 weights of a row. Both are symmetric and rounded to
the nearest; the scale of a group of 4 bits is the one of a few that leaves the least squared error. Activations of few
rows are rounded to 8 bits while multiplying, with a scale for each 128 (int8) or 64 (int4) of them. Reference for the
scheme: ggml's Q8_0 and Q4_0, which differ in group sizes.

Packed weights lie in panels of 16 rows, in the order in which the kernels multiply them (``native/matrix.h``). Where
the compiled kernels are missing, the matrix is widened before each product: right, but slow.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import CheckpointError, ConfigError, nearest
from chiasm.nn.kernels import INT4, INT8, KINDS, PANEL, Matrix, Work, floats, library, linear

LAYERS = r"(^|\.)lm\.layers\."
STACKS = r"(^|\.)(blocks|layers|text|fusion)\.\d+\."
"""The blocks of towers and of fused models, which have no language model."""
GROUP = 64
BITS = {"int8": 8, "int4": 4}
FEWEST = 64
"""Inputs below which a matrix is left as it is: there would be nothing to gain."""


class Quantized(nn.Module):
    """A linear layer ``[n, k]`` with weights of ``bits`` bits, padded to whole groups and panels with zeros."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int):
        super().__init__()
        self.bits, (self.out_features, self.in_features) = bits, weight.shape
        packed, scales = (pack8 if bits == 8 else pack4)(weight.detach().float())
        self.register_buffer("packed", packed)
        self.scales: Tensor
        self.packed: Tensor
        self.kind = weight.dtype
        # Not a buffer: casting a model must not round the scales.
        self.scales = scales
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._ready: tuple[Matrix, list[Tensor]] | None = None

    def matrix(self) -> Matrix:
        """The layer as the kernels read it."""
        return self._native()[0]

    def tensors(self) -> list[Tensor]:
        """What must stay alive while ``matrix`` is used."""
        return self._native()[1]

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., k]`` → ``[..., n]``. Where a gradient is wanted, by the widened matrix: the kernels give none."""
        wanted = torch.is_grad_enabled() and x.requires_grad
        if x.dtype in KINDS and x.device.type == "cpu" and library() is not None and not wanted:
            return linear(self.matrix(), own_work(), x)
        return F.linear(x, self.widened(x.dtype).to(x.device), None if self.bias is None else self.bias.to(x.dtype))

    def widened(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights ``[n, k]`` as numbers again."""
        wide = unpack8(self.packed, self.scales) if self.bits == 8 else unpack4(self.packed, self.scales)
        return wide[: self.out_features, : self.in_features].to(dtype)

    def _native(self) -> tuple[Matrix, list[Tensor]]:
        if self._ready is None:
            keep: list[Tensor] = [self.packed, self.scales]
            stride = self.packed[0].numel() // PANEL
            size = (self.out_features, self.in_features, stride, INT8 if self.bits == 8 else INT4)
            matrix = Matrix(self.packed.data_ptr(), self.scales.data_ptr(), floats(self.bias, keep), *size, 0)
            self._ready = matrix, keep
        return self._ready

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: no address of this one's memory."""
        return {**self.__dict__, "_ready": None}

    def extra_repr(self) -> str:
        """Shown in the printed model."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


_works = threading.local()


def own_work() -> Work:
    """The memory that this thread's calls work in: a server looks into a model while its engine runs it."""
    if not hasattr(_works, "work"):
        _works.work = Work()
    found: Work = _works.work
    return found


def pack8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[n, k]`` → bytes ``[N / 16, K / 4, 16, 4]`` with 128 added, scales ``[N]``; N, K: whole panels and groups."""
    weight = F.pad(weight, (0, -weight.shape[1] % GROUP, 0, -weight.shape[0] % PANEL))  # [N, K]
    scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    rounded = (weight / scales.unsqueeze(1)).round().clamp(-127, 127).to(torch.int16) + 128
    return _panels(rounded.to(torch.uint8), 4), scales


def unpack8(packed: Tensor, scales: Tensor) -> Tensor:
    """The inverse of ``pack8``, rounded: ``[N, K]``."""
    return (_rows(packed).float() - 128) * scales.to(packed.device).unsqueeze(1)


def pack4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[n, k]`` → bytes ``[N / 16, K / 8, 16, 4]``, scales ``[N / 16, K / 64, 16]``.

    The low halves of four bytes are the first four of eight following weights, with 8 added.
    """
    weight = F.pad(weight, (0, -weight.shape[1] % GROUP, 0, -weight.shape[0] % PANEL))  # [N, K]
    groups = weight.unflatten(1, (-1, GROUP))  # [N, G, 64]
    peak = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))  # [N, G, 1]: its sign gets the value -8
    best, error = torch.ones_like(peak), torch.full_like(peak, torch.inf)
    for steps in (-8.0, -7.5, -7.0, -6.5, 7.0):
        scale = torch.where(peak == 0, 1.0, peak / steps)
        off = (((groups / scale).round().clamp(-8, 7) * scale - groups) ** 2).sum(2, keepdim=True)
        best, error = torch.where(off < error, scale, best), torch.minimum(off, error)
    values = (groups / best).round().clamp(-8, 7).to(torch.int8) + 8  # [N, G, 64]
    low, high = values.flatten(1).unflatten(1, (-1, 2, 4)).unbind(2)  # [N, K / 8, 4] each
    packed = _panels((low | (high << 4)).to(torch.uint8).flatten(1), 4)
    return packed, best.squeeze(2).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def unpack4(packed: Tensor, scales: Tensor) -> Tensor:
    """The inverse of ``pack4``, rounded: ``[N, K]``."""
    both = _rows(packed).unflatten(1, (-1, 4))  # [N, K / 8, 4]
    values = torch.stack((both & 15, both >> 4), dim=2).flatten(1).unflatten(1, (-1, GROUP))  # [N, G, 64]
    each = scales.to(packed.device).transpose(1, 2).flatten(0, 1)  # [N, G]
    return ((values.float() - 8) * each.unsqueeze(2)).flatten(1)


def _panels(rows: Tensor, each: int) -> Tensor:
    """``[N, C]`` → ``[N / 16, C / each, 16, each]``."""
    return rows.unflatten(1, (-1, each)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def _rows(panels: Tensor) -> Tensor:
    """The inverse of ``_panels``."""
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)


def quantize(model: nn.Module, how: str, names: str = LAYERS, keep: Sequence[str] = ()) -> list[str]:
    """Replace the linear layers of ``model`` whose names match; gives those names. The model is changed in place.

    ``how`` is "int8" or "int4". ``names`` is a regular expression, by default the layers of the language model;
    ``keep`` are expressions of layers that stay as they are. Raises ConfigError.
    """
    if how not in BITS:
        raise ConfigError(f"unknown quantization {how!r}; {nearest(how, BITS)}")
    found = []
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module.in_features < FEWEST or not re.search(names, name):
            continue
        if any(re.search(pattern, name) for pattern in keep):
            continue
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, Quantized(module.weight, module.bias, BITS[how]))
        found.append(name)
    if not found:
        raise ConfigError(f"no linear layer of {FEWEST} or more inputs matches {names!r}: nothing was quantized")
    return found


def quantize_model(model: Any, how: str, names: str | None = None, keep: Sequence[str] = ()) -> list[str]:
    """``quantize`` for a whole model: its language model's layers, and its head in 8 bits; where it has none, the
    blocks of its towers.

    A tied head becomes a matrix of its own; the embedding that ids are looked up in stays.
    """
    lm: Any = getattr(model, "lm", None)
    found = quantize(model, how, (STACKS if lm is None else LAYERS) if names is None else names, keep)
    if names is None and hasattr(lm, "lm_head") and not any(re.search(p, "lm.lm_head") for p in keep):
        weight = lm.embedding.weight if lm.lm_head is None else lm.lm_head.weight
        if type(lm.lm_head) in (nn.Linear, type(None)) and weight.shape[1] >= FEWEST:
            lm.lm_head = Quantized(weight, None, 8)
            found.append("lm.lm_head")
    return found


def refuse_quantized(model: nn.Module) -> None:
    """Raises CheckpointError for a model with quantized weights: what was rounded is not what should be kept."""
    found = next((name for name, module in model.named_modules() if isinstance(module, Quantized)), None)
    if found is not None:
        raise CheckpointError(f"{found} has quantized weights, which are for inference only: save the model before")


def how_quantized(model: nn.Module) -> str | None:
    """``"int8"``, ``"int4"``, or None for a model without rounded weights; the narrowest of its layers counts."""
    found = [module.bits for module in model.modules() if isinstance(module, Quantized)]
    return f"int{min(found)}" if found else None


__all__ = ["Quantized", "how_quantized", "quantize", "quantize_model", "refuse_quantized"]
