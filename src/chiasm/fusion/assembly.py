"""The parts of a model that joins encoders to a language model: built, widths handed on, counts checked."""

from __future__ import annotations

from typing import Any, Literal

import torch

from chiasm import registry
from chiasm.connectors.base import Connector
from chiasm.encoders.base import Encoder
from chiasm.errors import ConfigError, nearest
from chiasm.lm.base import LM
from chiasm.types import Condition, Layout


def assemble(
    config: Any, width: int | Literal["lm", "encoder"] = "lm"
) -> tuple[dict[str, Encoder], dict[str, Connector], LM]:
    """The parts of a configuration with ``encoders``, ``connectors``, ``lm`` and ``media`` (streams by kind).

    A connector is given the widths of the encoders that its streams name, and the ``width`` it maps to: the language
    model's, its encoder's or a number. Raises ConfigError where streams disagree or name what is not there.
    """
    encoders = {name: registry.get("encoder", c.type)(c) for name, c in config.encoders.items()}
    lm = registry.get("lm", config.lm.type)(config.lm)
    connectors = {}
    for name, c in config.connectors.items():
        in_dims = {source: encoders[source].dim for source in _sources(config, name)}
        own = next(iter(in_dims.values()))
        out_dim = width if isinstance(width, int) else {"lm": lm.dim, "encoder": own}[width]
        connectors[name] = registry.get("connector", c.type)(c, in_dims=in_dims, out_dim=out_dim)
    return encoders, connectors, lm


def check_streams(config: Any) -> None:
    """Raise ConfigError where a stream names a connector that is not there."""
    for kind, stream in config.media.items():
        if stream.connector not in config.connectors:
            known = nearest(stream.connector, config.connectors)
            raise ConfigError(f"the stream of {kind} goes through connector {stream.connector!r}; {known}")


def check_stream(model: Any, kind: str, shape: tuple[int, ...]) -> None:
    """Run the encoders and the connector of one kind of media on a unit of ``shape`` and compare with what is counted.

    Meant for a model on the meta device, where running costs nothing. Raises ConfigError with both numbers.
    """
    config, stream = model.config, model.config.stream(kind)
    inputs = torch.empty(1, *shape, device=model.device)
    features = {name: model.encoders[name](inputs) for name in stream.encoders}
    for name, tokens in features.items():
        _compare(f"encoder {name!r}", kind, shape, config.encoders[name].count(shape).tokens, tokens.x.shape[1])
    if stream.pool and stream.pool_at == "before":
        features = {name: stream.pool.apply(tokens) for name, tokens in features.items()}
    connector = model.connectors[stream.connector]
    cond = blank_condition(1, model.device) if config.connectors[stream.connector].conditioned else None
    tokens = connector(features if len(features) > 1 else next(iter(features.values())), cond)
    if stream.pool and stream.pool_at == "after":
        tokens = stream.pool.apply(tokens)
    counted = config.unit_count(kind, shape).tokens
    _compare(f"connector {stream.connector!r}", kind, shape, counted, tokens.x.shape[1])
    config.count(kind, Layout(1, shape, original=(shape[-2], shape[-1]) if len(shape) > 2 else (0, 0)))


def blank_condition(items: int, device: Any) -> Condition:
    """An instruction of one token for each of ``items``: for runs on the meta device, where only shapes count."""
    return Condition(
        torch.zeros(items, 1, dtype=torch.long, device=device), torch.ones(items, 1, dtype=torch.bool, device=device)
    )


def _sources(config: Any, connector: str) -> tuple[str, ...]:
    """The encoders that feed a connector: those of the streams that name it."""
    found: set[tuple[str, ...]] = {stream.encoders for stream in config.media.values() if stream.connector == connector}
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
