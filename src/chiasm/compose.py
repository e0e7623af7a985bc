"""A model from its configuration. Each way of joining composes its own parts; here they get their device and type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from chiasm import registry
from chiasm.config import PartConfig
from chiasm.errors import ConfigError, nearest
from chiasm.fusion.base import Fusion, FusionConfig

SHORT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Types by the names that recipes and other trainers use."""


def as_device(device: str | torch.device | None) -> torch.device | None:
    """A device that is there; None stays None. Raises ConfigError."""
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"unknown device {device!r}; give cpu, cuda, cuda:1 or mps") from None
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(found.type)
    if there is not None and (found.index or 0) >= there:
        raise ConfigError(f"device {str(found)!r} is not there: torch sees {there} of that kind; give cpu")
    return found


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch type from its name, also a short one as recipes write it. Raises ConfigError."""
    if dtype is None:
        return None
    found = dtype if isinstance(dtype, torch.dtype) else SHORT.get(str(dtype)) or getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"unknown dtype {dtype!r}; {nearest(str(dtype), ['float32', 'bfloat16', 'float16', 'float64'])}"
        )
    return found


def build_model(config: FusionConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Fusion:
    """The fusion model of a configuration, freshly initialised. On ``"meta"`` it has shapes but no memory.

    Raises ConfigError where parts do not fit each other.
    """
    with _placed(device, dtype):
        model: Fusion = registry.get("fusion", config.type).compose(config)
        return model


def install(model: Fusion, methods: Iterable[Any]) -> None:
    """Put methods (LoRA, adapters, prefixes, ...) where the records of a configuration say."""
    for record in methods:
        method = registry.get("method", record.method.type)(record.method)
        for name in record.modules:
            method.install(model, name)


def installed(model: Fusion) -> list[tuple[PartConfig, tuple[str, ...]]]:
    """The methods that a model carries and the modules they changed, so that a saved model can be built again."""
    found: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        method = getattr(module, "method", None)
        if isinstance(method, PartConfig):
            names = found.setdefault(method, [])
            changed = name.rpartition(".")[0] if module.beside else name
            if changed not in names:
                names.append(changed)
    return [(method, tuple(names)) for method, names in found.items()]


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
