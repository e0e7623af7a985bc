"""A model from its configuration: builds the parts, hands widths from part to part, checks that counts are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from chiasm import registry
from chiasm.errors import ConfigError, nearest
from chiasm.fusion.base import Fusion, FusionConfig
from chiasm.types import Layout


def build_model(config: FusionConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Fusion:
    """The fusion model of a configuration, freshly initialised. On ``"meta"`` it has shapes but no memory.

    Raises ConfigError where parts do not fit each other.
    """
    with _placed(device, dtype):
        encoders = {name: registry.get("encoder", c.type)(c) for name, c in config.encoders.items()}
        lm = registry.get("lm", config.lm.type)(config.lm)
        connectors = {}
        for name, c in config.connectors.items():
            sources = _sources(config, name)
            in_dims = {source: encoders[source].dim for source in sources}
            connectors[name] = registry.get("connector", c.type)(c, in_dims=in_dims, out_dim=lm.dim)
        return registry.get("fusion", config.type)(config, encoders, connectors, lm)


def check_counts(config: FusionConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Run encoder and connector of each stream on the meta device and compare with what the configuration counts.

    ``shapes`` gives the shape of one unit for each kind of media. Raises ConfigError with both numbers.
    """
    model = build_model(config, device="meta")
    for kind, shape in shapes.items():
        stream = config.stream(kind)
        inputs = torch.empty(1, *shape, device="meta")
        features = {name: model.encoders[name](inputs) for name in stream.encoders}
        for name, tokens in features.items():
            _compare(f"encoder {name!r}", kind, shape, config.encoders[name].count(shape).tokens, tokens.x.shape[1])
        if stream.pool and stream.pool_at == "before":
            features = {name: stream.pool.apply(tokens) for name, tokens in features.items()}
        tokens = model.connectors[stream.connector](features if len(features) > 1 else next(iter(features.values())))
        if stream.pool and stream.pool_at == "after":
            tokens = stream.pool.apply(tokens)
        counted = config.unit_count(kind, shape).tokens
        _compare(f"connector {stream.connector!r}", kind, shape, counted, tokens.x.shape[1])
        layout = Layout(1, shape, original=(shape[-2], shape[-1]) if len(shape) > 2 else (0, 0))
        config.count(kind, layout)


def _sources(config: FusionConfig, connector: str) -> tuple[str, ...]:
    """The encoders that feed a connector: those of the streams that name it."""
    found = {stream.encoders for stream in config.media.values() if stream.connector == connector}
    if len(found) != 1:
        raise ConfigError(
            f"connector {connector!r} is fed by {len(found)} different sets of encoders; it needs exactly one"
        )
    sources = found.pop()
    for source in sources:
        if source not in config.encoders:
            raise ConfigError(f"connector {connector!r} reads encoder {source!r}; {nearest(source, config.encoders)}")
    return sources


def _compare(owner: str, kind: str, shape: tuple[int, ...], counted: int, produced: int) -> None:
    if counted != produced:
        raise ConfigError(
            f"{owner} counts {counted} tokens for a {kind} of shape {shape} but produces {produced}: mend "
            "its Config.count"
        )


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
