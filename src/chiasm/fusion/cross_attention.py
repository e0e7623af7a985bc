"""Media that a language model looks at through gated blocks between its layers, instead of reading them as tokens.

Papers: Flamingo (arXiv:2204.14198); OpenFlamingo (arXiv:2308.01390); Idefics (arXiv:2306.16527). Reference:
open_flamingo 655f693 ``flamingo_lm.py`` and ``helpers.py``; ``IdeficsModel`` of transformers 5.23, equal to 1e-5.

A medium takes one token of the sequence, its placeholder (``<image>``); its vectors stand beside the sequence. A
position sees the last medium at or before it in its own segment (``attend="last"``), or all of them (``"all"``). Both
models stay as they were trained: while the gates are shut, the result is that of the language model alone.

What the three systems do differently is configuration:

                     Flamingo               OpenFlamingo          Idefics
    stands before    one layer of every N   the last of every N   the first of every N
    sees             the last medium        the last medium       the last medium
    perceptron       squared ReLU           GELU                  SwiGLU
    norms            layer                  layer                 RMS, on queries and keys of a head too
    heads            not published here     8 x 64                the language model's own
    resampler        learned frame times    none                  ReLU, norms on queries and keys of a head

Differences by design: a position without a medium gets exactly 0 in every mode (in OpenFlamingo text before the first
picture looks at all later ones when it may see more than the last). Any decoder layers, any encoder, any connector
and several kinds of media, packed rows too. Keys and values of media are computed once for an answer. Flamingo's
random choice between the last and the next picture in training is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from chiasm import registry
from chiasm.config import Config as Values
from chiasm.connectors.base import Connector
from chiasm.encoders.base import Encoder
from chiasm.errors import ConfigError, DataError
from chiasm.fusion.assembly import assemble, check_streams
from chiasm.fusion.base import Asked
from chiasm.fusion.cross_cache import CrossCache
from chiasm.fusion.gated import BlockConfig, GatedBlock, Sight
from chiasm.fusion.splice import Splice, labelled, last
from chiasm.lm.base import LM
from chiasm.nn.again import call
from chiasm.types import Batch, Layout, MediaBatch, Output


class Placement(Values):
    """Before which layers of the language model a block stands; layer ``depth`` means after the last.

    ``rule``: before the last layer of every ``every`` (OpenFlamingo), before the first (Idefics), or after each run
    of ``every``. ``layers`` names them instead.
    """

    every: PositiveInt = 4
    rule: Literal["before_last", "before_first", "after"] = "before_last"
    layers: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _rises(self) -> Placement:
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ConfigError(f"placement.layers {list(self.layers)} must name layers, each once, in their order")
        return self

    def places(self, depth: int) -> tuple[int, ...]:
        """The layers of a model with ``depth`` of them. Raises ConfigError where there are none, or no such layer."""
        if self.layers is not None:
            if self.layers[0] < 0 or self.layers[-1] > depth:
                raise ConfigError(f"placement.layers {list(self.layers)}: the language model has layers 0 to {depth}")
            return self.layers
        first = {"before_last": self.every - 1, "before_first": 0, "after": self.every}[self.rule]
        found = tuple(range(first, depth + (self.rule == "after"), self.every))
        if not found:
            raise ConfigError(
                f"placement: every {self.every} layers is more than the {depth} of the language model; give at most "
                f"{depth}"
            )
        return found


@dataclass(frozen=True)
class Media:
    """The media of a batch, row by row: ``x [B, L, D]``, and for each vector the number of its medium in the row
    ``times [B, L]`` (from 1; 0: padding) and its segment ``[B, L]``. ``marks [B, T]``: media that begin up to there.
    """

    x: Tensor
    times: Tensor
    segments: Tensor
    marks: Tensor

    def reorder(self, rows: Tensor) -> Media:
        """The same with row ``rows[i]`` as row ``i``."""
        return Media(*(t.index_select(0, rows) for t in (self.x, self.times, self.segments, self.marks)))

    def up_to(self, columns: int) -> Tensor:
        """``marks`` for a sequence that has grown to ``columns`` by text: ``[B, columns]``."""
        return torch.cat((self.marks, self.marks[:, -1:].expand(-1, columns - self.marks.shape[1])), dim=1)


@registry.register("fusion", "cross_attention")
class CrossAttention(Splice):
    """Encoder → connector → gated blocks between the layers of the language model."""

    class Config(Splice.Config):
        """``width``: channels of what the blocks look at; None: the encoder's own. ``blocks`` are all alike."""

        type: str = "cross_attention"
        width: PositiveInt | None = None
        placement: Placement = Placement()
        blocks: BlockConfig = BlockConfig()
        attend: Literal["last", "all"] = "last"

        def vectors(self, kind: str, layout: Layout) -> int:
            """Vectors of one medium that the blocks look at."""
            return super().count(kind, layout)

        def count(self, kind: str, layout: Layout) -> int:
            """Tokens of one medium in the sequence: its placeholder."""
            self.stream(kind)
            return 1

    config: Config

    def __init__(self, config: Config, encoders: Mapping[str, Encoder], connectors: Mapping[str, Connector], lm: LM):
        super().__init__(config, encoders, connectors, lm)
        if not lm.depth:
            raise ConfigError(
                f"{config.type}: lm {config.lm.type!r} has no place for cross-attention between its layers: use lm "
                "'decoder' or 'gpt'"
            )
        self.places = config.placement.places(lm.depth)
        self.width: int = config.width or next(iter(encoders.values())).dim
        self.cross = nn.ModuleList(GatedBlock(config.blocks, lm.dim, self.width) for _ in self.places)
        if self.newline is not None:
            self.newline = nn.Parameter(torch.randn(self.width) / self.width**0.5)

    @classmethod
    def compose(cls, config: Any) -> CrossAttention:
        """The model of a configuration. Raises ConfigError where parts do not fit each other."""
        check_streams(config)
        encoders, connectors, lm = assemble(config, width=config.width or "encoder")
        if config.width is None and len({encoder.dim for encoder in encoders.values()}) > 1:
            raise ConfigError("the encoders have different widths: set width, and let the connectors map to it")
        return cls(config, encoders, connectors, lm)

    # ---------------------------------------------------------------------------------------------------- run

    def forward(self, batch: Batch, logits: Asked | None = "labels", cache: CrossCache | None = None) -> Output:
        """``batch [B, T]`` → ``Output``: hidden ``[B, T, D]`` and logits at the positions asked for."""
        named: dict[str, Any] = {}
        x = self.splice(batch, named)  # [B, T, D]
        media = self.media(batch, x, named)
        hidden = self.states(x, batch.positions, batch.segment_ids, media, cache)  # [B, T, D]
        output = Output(hidden, named=named)
        if logits == "all":
            output.logits = self.lm.head(hidden)  # [B, T, V]
        elif logits == "last":
            output.logits = self.lm.head(hidden[torch.arange(len(hidden), device=hidden.device), last(batch)])  # [B, V]
        elif logits is not None:
            self._at_labels(output, batch.input_ids, *labelled(batch), logits)
        return output

    def splice(self, batch: Batch, named: dict[str, Any]) -> Tensor:
        """The language model's input ``[B, T, D]``: embedded ids, placeholders among them; padding is 0."""
        return self.lm.embed(batch.input_ids).masked_fill((batch.segment_ids == 0).unsqueeze(-1), 0)  # [B, T, D]

    def states(
        self,
        x: Tensor,
        positions: Tensor,
        segments: Tensor,
        media: Media | None = None,
        cache: CrossCache | None = None,
    ) -> Tensor:
        """``x [B, T, D]``, what it may look at (new media, and those of the cache) → hidden states ``[B, T, D]``."""
        if cache is None:
            assert media is not None, "without a cache the media must be given"
            sight = self._sight(media.up_to(x.shape[1]), segments, media.times, media.segments)
            return self.lm(x, positions, segments, cross=self._cross(sight, lambda i: media.x))
        marks = cache.add(x, media, self.cross)  # [B, T]
        sight = self._sight(marks, segments, cache.times, cache.of)
        return self.lm(x, positions, segments, cache=cache.text, cross=self._cross(sight, lambda i: cache.kept[i]))

    def step(self, ids: Tensor, positions: Tensor, segments: Tensor, cache: CrossCache) -> Tensor:
        """``ids [B, 1]`` → logits ``[B, V]`` of the next token."""
        hidden = self.states(self.lm.embed(ids), positions, segments, None, cache)  # [B, 1, D]
        return self.lm.head(hidden[:, -1])  # [B, V]

    def new_cache(self, batch: int, capacity: int) -> CrossCache:
        """Room for ``capacity`` positions of ``batch`` rows; media are kept as they come."""
        return CrossCache(super().new_cache(batch, capacity), len(self.places), batch, self.device)

    def _cross(self, sight: Sight, media: Callable[[int], Any]) -> dict[int, Callable[[Tensor], Tensor]]:
        """For each place a function of the hidden states ``[B, T, D]``, as the language model wants them."""

        def run(i: int) -> Callable[[Tensor], Tensor]:
            return lambda x: call(self.cross[i], self.lm.recompute, x, media(i), sight)

        return {place: run(i) for i, place in enumerate(self.places)}

    def _sight(self, marks: Tensor, segments: Tensor, times: Tensor, of: Tensor) -> Sight:
        """Of positions ``[B, T]`` over media vectors ``[B, L]``."""
        marks, times = marks.unsqueeze(2), times.unsqueeze(1)  # [B, T, 1], [B, 1, L]
        seen = times == marks if self.config.attend == "last" else times <= marks  # [B, T, L]
        return Sight.of(seen & (times > 0) & (segments.unsqueeze(2) == of.unsqueeze(1)))

    # -------------------------------------------------------------------------------------------------- media

    def media(self, batch: Batch, x: Tensor, named: dict[str, Any]) -> Media:
        """All media of a batch, encoded and put beside the row they stand in, on the device and in the type of ``x``.

        A row without media has one vector of padding, so that every part runs and has a gradient (of 0).
        """
        rows, columns = batch.input_ids.shape
        vectors, slots, held = [], [], [[] for _ in range(rows)]  # type: ignore[var-annotated]
        start = item = 0
        for kind, media in batch.media.items():
            runs = self.encode(kind, media, batch.ids, named).split(
                [self.config.vectors(kind, m) for m in media.layouts]
            )
            vectors += runs
            slots.append(media.slots)
            for row, run in zip(rows_of(batch, media), runs):  # a medium without a slot runs its parts and is not seen
                held[row].append((start, len(run), item))
                start, item = start + len(run), item + 1
            start += sum(len(run) for run in runs[len(media.slots) :])
        named["media"] = held
        pool = torch.cat([*(run.to(x.dtype) for run in vectors), x.new_zeros(1, self.width)])  # [S+1, D]
        place, owner = (t.to(x.device) for t in _index(held, len(pool) - 1, item))  # [B, L]
        at = torch.cat([*slots, batch.input_ids.new_zeros(0)])  # [items]
        marked = batch.input_ids.new_zeros(rows * columns).index_fill(0, at, 1).view(rows, columns)  # [B, T]
        marks = marked.cumsum(dim=1)  # [B, T]
        none = batch.input_ids.new_zeros(1)
        times = torch.cat([marks.flatten()[at], none])[owner]  # [B, L]
        segments = torch.cat([batch.segment_ids.flatten()[at], none])[owner]  # [B, L]
        return Media(pool[place], times, segments, marks)

    def encode(self, kind: str, media: MediaBatch, ids: list[str], named: dict[str, Any]) -> Tensor:
        """All media of a kind → their vectors ``[sum of counts, D_media]``. Raises DataError."""
        if len(media.slots) > len(media.layouts) or any(count != 1 for count in media.counts):
            raise DataError(
                f"sample {ids[media.owners[0]]!r}: {len(media.layouts)} media of kind {kind} take {len(media.slots)} "
                "tokens, one each was expected; make the batch with the model's own processor"
            )
        counts = [self.config.vectors(kind, layout) for layout in media.layouts]
        return super().encode(kind, replace(media, counts=counts), ids, named)


def rows_of(batch: Batch, media: MediaBatch) -> list[int]:
    """The row of the batch that each medium stands in; empty for media without a slot."""
    if not len(media.slots):
        return []
    if len(batch.ids) == len(batch.input_ids):  # padded: a row a sample
        return list(media.owners)
    if len(batch.input_ids) == 1:
        return [0] * len(media.owners)
    return (media.slots // batch.input_ids.shape[1]).tolist()


def _index(held: list[list[tuple[int, int, int]]], padding: int, none: int) -> tuple[Tensor, Tensor]:
    """For each row and place of ``L``: the vector's number, and its medium's; padding has numbers of its own."""
    longest = max(1, *(sum(count for _, count, _ in row) for row in held))
    place, owner = torch.full((len(held), longest), padding), torch.full((len(held), longest), none)  # [B, L]
    for number, row in enumerate(held):
        at = 0
        for start, count, item in row:
            place[number, at : at + count] = torch.arange(start, start + count)
            owner[number, at : at + count] = item
            at += count
    return place, owner


__all__ = ["BlockConfig", "CrossAttention", "CrossCache", "Media", "Placement", "rows_of"]
