"""The contract of models that join media to language and write text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from chiasm.config import PartConfig
from chiasm.errors import ConfigError, nearest
from chiasm.types import Batch, Layout, Output

Asked = Literal["all", "labels", "states", "last"]


def check_asked(logits: str) -> None:
    """Raises ConfigError for logits that nobody knows how to give."""
    if logits not in get_args(Asked):
        raise ConfigError(f"logits={logits!r}; {nearest(logits, get_args(Asked))}")


class FusionConfig(PartConfig):
    """A whole model: its parts, and how they are joined. ``count`` is picklable arithmetic over configurations."""

    def count(self, kind: str, layout: Layout) -> int:
        """Tokens that one medium takes in the sequence."""
        raise NotImplementedError

    @property
    def vocab(self) -> int | None:
        """Rows of the table that token ids are looked up in, where the configuration tells."""
        return getattr(getattr(self, "lm", None), "vocab", None)


class Fusion(nn.Module):
    """Takes a ``Batch``, returns an ``Output``. One file of this folder for each way of joining."""

    Config: type[FusionConfig] = FusionConfig
    config: FusionConfig
    size_by_size: bool = False  # media of several sizes in a batch are encoded one size after the other
    silent: str = ""  # for a model that writes no text: what to do with it instead

    @classmethod
    def compose(cls, config: Any) -> Fusion:
        """Build the parts of a configuration, handing widths from part to part, and join them. Raises ConfigError."""
        raise NotImplementedError

    def check_counts(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare counted with produced tokens for a unit of each kind (meta device). Raises ConfigError."""
        raise NotImplementedError

    def forward(self, batch: Batch, logits: Asked | None = "labels", cache: Any = None) -> Output:
        """Batch ``[B, T]`` → ``Output``: hidden ``[B, T, D]`` and the logits asked for, as ``Output`` says."""
        raise NotImplementedError

    def step(self, ids: Tensor, positions: Tensor, segments: Tensor, cache: Any) -> Tensor:
        """One decoding step: ``ids [B, 1]``, ``positions [B, 1]``, ``segments [B, 1]`` → logits ``[B, V]``."""
        raise NotImplementedError

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Room for ``capacity`` positions of ``batch`` rows, on the model's device and in its type."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's parameters."""
        return next(self.parameters()).dtype
