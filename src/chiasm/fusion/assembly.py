"""The parts of a model that joins encoders to a language model: built, widths handed on, counts checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from chiasm import registry
from chiasm.connectors.base import Connector
from chiasm.encoders.base import Encoder
from chiasm.errors import ChiasmError, ConfigError, nearest
from chiasm.lm.base import LM
from chiasm.nn.modes import evaluating
from chiasm.types import Condition, Layout, Tokens


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
        in_dims = {source: _width(source, encoders[source]) for source in _sources(config, name)}
        own = next(iter(in_dims.values()))
        out_dim = width if isinstance(width, int) else {"lm": lm.dim, "encoder": own}[width]
        try:
            connectors[name] = registry.get("connector", c.type)(c, in_dims=in_dims, out_dim=out_dim)
        except ConfigError as error:
            raise ConfigError(f"{_named(config, name, tuple(in_dims))}, lm {config.lm.type!r}: {error}") from None
    return encoders, connectors, lm


def _width(name: str, encoder: Encoder) -> int:
    """The width of an encoder. Raises ConfigError where it does not say it."""
    if not isinstance(getattr(encoder, "dim", None), int):
        raise ConfigError(f"encoder {name!r} ({type(encoder).__name__}) sets no dim, the width of its vectors")
    return encoder.dim


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
    stream = model.config.stream(kind)
    try:
        _tried(model, kind, shape)
    except (ChiasmError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError):
            error = ConfigError("a Config without count(): it says how many tokens come out before anything runs")
        told = f"{_named(model.config, stream.connector, stream.encoders)}, merge {stream.merge.type!r}"
        raise ConfigError(f"{told}: units of {kind} of shape {shape} do not go through: {error}") from None


def _tried(model: Any, kind: str, shape: tuple[int, ...]) -> None:
    config, stream = model.config, model.config.stream(kind)
    counted = config.unit_count(kind, shape).tokens
    patches = any(model.encoders[name].reads_layouts for name in stream.encoders)
    grid, original = ((1, shape[0]), (0, 0)) if patches else ((0, 0), shape[-2:] if len(shape) > 2 else (0, 0))
    merged = getattr(config, "vectors", config.count)  # beside the sequence or in it
    merged(kind, Layout(1, shape, grid, (original[0], original[1])))
    inputs = torch.empty(1, *shape, device=model.device)
    features = {name: model.encoders[name](inputs) for name in stream.encoders}
    for name, tokens in features.items():
        _sound(f"encoder {name!r}", tokens, model.encoders[name].dim)
        _compare(f"encoder {name!r}", kind, shape, config.encoders[name].count(shape).tokens, tokens.x.shape[1])
        tokens.mask = None if patches else tokens.mask  # a unit alone is not filled up
    if stream.pool and stream.pool_at == "before":
        features = {name: stream.pool.apply(tokens) for name, tokens in features.items()}
    connector = model.connectors[stream.connector]
    cond = blank_condition(1, model.device) if config.connectors[stream.connector].conditioned else None
    tokens = connector(features if len(features) > 1 else next(iter(features.values())), cond)
    lm = getattr(model, "lm", None)  # a first stage has none: its heads read the width as it is
    width = getattr(model, "width", tokens.x.shape[-1] if lm is None else lm.dim)
    _sound(f"connector {stream.connector!r}", tokens, width)
    if stream.pool and stream.pool_at == "after":
        tokens = stream.pool.apply(tokens)
    _compare(f"connector {stream.connector!r}", kind, shape, counted, tokens.x.shape[1])


def check_pooled(model: Any, kind: str, shape: tuple[int, ...]) -> None:
    """The same for a model that makes one vector of a unit: an encoder of ``kind`` and its connector or head."""
    types = f"encoder {kind!r} ({model.config.encoders[kind].type}), connector ({model.config.connectors[kind].type})"
    try:
        counted = model.config.encoders[kind].count(shape).tokens
        with evaluating(model):  # a batch norm takes no batch of one in training
            tokens = model.encoders[kind](torch.empty(1, *shape, device=model.device))
            _sound(f"encoder {kind!r}", tokens, model.encoders[kind].dim)
            _compare(f"encoder {kind!r}", kind, shape, counted, tokens.x.shape[1])
            produced = model.connectors[kind](tokens).x.shape[1]
    except ChiasmError as error:
        raise ConfigError(f"{types}: units of {kind} of shape {shape} do not go through: {error}") from None
    if produced != 1:
        raise ConfigError(
            f"{types}: {counted} tokens of a {kind} become {produced} vectors, a {model.config.type} wants 1 of each: "
            "take a connector that pools them (pooled, map_head, clip_pool)"
        )


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


def _named(config: Any, connector: str, encoders: Sequence[str]) -> str:
    """A connector and what feeds it, by name and type."""
    sources = ", ".join(f"{name!r} ({config.encoders[name].type})" for name in encoders)
    return f"connector {connector!r} ({config.connectors[connector].type}) behind encoder {sources}"


def _sound(owner: str, tokens: Any, width: int) -> None:
    """Raise ConfigError for what is not ``Tokens(x [1, N, width])``: a part of somebody's own is not done yet."""
    if not isinstance(tokens, Tokens):
        raise ConfigError(f"{owner} gave {type(tokens).__name__}: its forward returns chiasm.types.Tokens(x [U, N, D])")
    if tokens.x.ndim != 3 or tokens.x.shape[0] != 1 or tokens.x.shape[2] != width:
        raise ConfigError(f"{owner} gave x {list(tokens.x.shape)} for one unit, [1, N, {width}] was expected")


def _compare(owner: str, kind: str, shape: tuple[int, ...], counted: int, produced: int) -> None:
    if counted != produced:
        raise ConfigError(
            f"{owner} counts {counted} tokens for a {kind} of shape {shape} but produces {produced}: mend "
            "its Config.count"
        )
