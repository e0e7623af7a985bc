"""What made the vectors of an index: weights, network, processing. Two marks differ where vectors would."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chiasm.config import diff
from chiasm.errors import ConfigError
from chiasm.nn.quant import how_quantized
from chiasm.processing import fingerprint


def mark(vlm: Any) -> dict[str, Any]:
    """The mark of a model, as JSON values."""
    return {
        "dim": vlm.config.model.dim,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "quantized": how_quantized(vlm.model),
        "network": vlm.config.model.dump(),
        "weights": weights_hash(vlm.model),
        "processing": vlm.processor.config.dump(),
        "fingerprint": fingerprint.fingerprint(vlm.processor),
    }


def check_mark(vlm: Any, stored: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    """Raises ConfigError that says in what the model of an index differs from this one."""
    difference = _difference(vlm, stored, own)
    if difference:
        raise ConfigError(
            f"{folder}: this index was made by another model or with other processing: {difference}. Its vectors mean "
            "nothing to this model: search with the model that made it, or index again into another folder"
        )


def _difference(vlm: Any, stored: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    for part in ("network", "processing"):
        changed = diff(stored[part], own[part])
        if changed:
            key, (before, now) = next(iter(changed.items()))
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            return f"{part}: {key} was {before!r}, is {now!r} now{more}"
    if stored["dtype"] != own["dtype"]:
        return f"its weights were {stored['dtype']}, these are {own['dtype']} (--dtype {stored['dtype']})"
    if stored.get("quantized") != own["quantized"]:  # an index of before weights could be rounded says nothing
        before, now = stored.get("quantized"), own["quantized"]
        rest = f"with --quantize {before}" if before else "without --quantize"
        return f"its weights were {before or 'not quantized'}, these are {now or 'not'} ({rest})"
    if stored["weights"] != own["weights"]:
        return f"weights: their hash was {stored['weights']}, is {own['weights']} now"
    return fingerprint.compare(vlm.processor, stored["fingerprint"])


def weights_hash(module: nn.Module) -> str:
    """A hash of all weights and buffers: names, shapes and every byte."""
    made = hashlib.blake2b(digest_size=8)
    for name, value in module.state_dict().items():
        made.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        made.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return made.hexdigest()
