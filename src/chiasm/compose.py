"""A model from its configuration. Each way of joining composes its own parts; here they get their device and type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from chiasm import registry
from chiasm.fusion.base import Fusion, FusionConfig


def build_model(config: FusionConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Fusion:
    """The fusion model of a configuration, freshly initialised. On ``"meta"`` it has shapes but no memory.

    Raises ConfigError where parts do not fit each other.
    """
    with _placed(device, dtype):
        model: Fusion = registry.get("fusion", config.type).compose(config)
        return model


def check_counts(config: FusionConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare counted with produced tokens on the meta device, for a unit of the given shape of each kind of media.

    Raises ConfigError that names the part and both numbers.
    """
    build_model(config, device="meta").check_counts(shapes)


@contextmanager
def _placed(device: Any, dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
