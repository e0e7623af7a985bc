"""Media spliced into the sequence of a language model: the visual prefix, and its interleaved form.

Paper: Visual Instruction Tuning (LLaVA, arXiv:2304.08485); Improved Baselines (LLaVA-1.5, arXiv:2310.03744);
LLaVA-NeXT (2024); LLaVA-OneVision (arXiv:2408.03326). Reference: haotian-liu/LLaVA ``llava_arch.py``, c121f04.

Differences by design: slots are counted and laid out before the model runs, so nothing is searched, cut or padded here;
a sample without media needs no dummy picture; padding reaches no position that counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from chiasm import registry
from chiasm.config import Config, part
from chiasm.connectors.base import Connector
from chiasm.encoders.base import Encoder
from chiasm.errors import ConfigError, DataError, nearest
from chiasm.fusion.assembly import assemble, check_stream, check_streams
from chiasm.fusion.base import Asked, Fusion, FusionConfig, check_asked
from chiasm.fusion.pool import Pool
from chiasm.fusion.ragged import alike, look
from chiasm.lm.base import LM
from chiasm.types import Batch, Condition, Count, Layout, MediaBatch, Output, Tokens


class Stream(Config):
    """The way of one kind of media: its encoders, its connector, and how units become one run of tokens."""

    encoders: tuple[str, ...] = ("image",)
    connector: str = "image"
    merge: part("merge") = Field(default={"type": "flat"}, validate_default=True)  # type: ignore[valid-type]
    pool: Pool | None = None
    pool_at: Literal["before", "after"] = "after"  # of the connector


@registry.register("fusion", "splice")
class Splice(Fusion):
    """Encoder → connector → merge → the slots of the language model's input."""

    size_by_size = True

    class Config(FusionConfig):
        """Parts by name; ``media`` says for each kind of media which parts serve it."""

        type: str = "splice"
        encoders: dict[str, part("encoder")]  # type: ignore[valid-type]
        connectors: dict[str, part("connector")]  # type: ignore[valid-type]
        lm: part("lm")  # type: ignore[valid-type]
        media: dict[str, Stream] = Field(default_factory=lambda: {"image": Stream()})

        def stream(self, kind: str) -> Stream:
            """The stream of a kind of media. Raises ConfigError where the model has none."""
            if kind not in self.media:
                raise ConfigError(f"this model takes no {kind}; {nearest(kind, self.media)}")
            return self.media[kind]

        def unit_count(self, kind: str, shape: tuple[int, ...]) -> Count:
            """Tokens of one unit after encoder, pool and connector."""
            stream = self.stream(kind)
            counts = {name: self.encoders[name].count(shape) for name in stream.encoders}
            if stream.pool and stream.pool_at == "before":
                counts = {name: stream.pool.count(count) for name, count in counts.items()}
            count = self.connectors[stream.connector].count(_one_or_all(counts))
            return stream.pool.count(count) if stream.pool and stream.pool_at == "after" else count

        def joined(self, kind: str, layout: Layout) -> Layout:
            """The layout after the connector, which may make one unit of a medium's many."""
            joins = self.connectors[self.stream(kind).connector].joins_units
            return replace(layout, units=1, grid=(0, 0)) if joins else layout

        def count(self, kind: str, layout: Layout) -> int:
            """Tokens of one medium in the sequence."""
            unit = self.unit_count(kind, layout.shape)
            return self.stream(kind).merge.count(self.joined(kind, layout), unit)

        def needs_newline(self) -> bool:
            """True where any stream's merge uses the newline vector."""
            return any(stream.merge.needs_newline for stream in self.media.values())

    config: Config

    def __init__(self, config: Config, encoders: Mapping[str, Encoder], connectors: Mapping[str, Connector], lm: LM):
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleDict(encoders)
        self.connectors = nn.ModuleDict(connectors)
        self.lm = lm
        self.merges = {k: registry.get("merge", s.merge.type)(s.merge) for k, s in config.media.items()}
        self.newline = nn.Parameter(torch.randn(lm.dim) / lm.dim**0.5) if config.needs_newline() else None

    @classmethod
    def compose(cls, config: Config) -> Splice:
        """The model of a configuration. Raises ConfigError where parts do not fit each other."""
        check_streams(config)
        return cls(config, *assemble(config))

    def check_counts(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare counted with produced tokens of a unit of each kind. Raises ConfigError with both numbers."""
        for kind, shape in shapes.items():
            check_stream(self, kind, shape)

    def forward(self, batch: Batch, logits: Asked | None = "labels", cache: Any = None) -> Output:
        """``batch [B, T]`` → ``Output``: hidden ``[B, T, D]`` and logits at the positions asked for."""
        named: dict[str, Any] = {}
        x = self.splice(batch, named)  # [B, T, D]
        if self.lm.encoder_decoder:
            return self._decode(batch, x, logits, named)
        hidden = self.lm(x, batch.positions, batch.segment_ids, cache=cache)  # [B, T, D]
        output = Output(hidden, named=named)
        if logits == "all":
            output.logits = self.lm.head(hidden)  # [B, T, V]
        elif logits == "last":
            output.logits = self.lm.head(hidden[torch.arange(len(hidden), device=hidden.device), last(batch)])  # [B, V]
        elif logits is not None:
            self._at_labels(output, batch.input_ids, *labelled(batch), logits)
        return output

    def splice(self, batch: Batch, named: dict[str, Any]) -> Tensor:
        """The language model's input ``[B, T, D]``: embedded text, with the media's vectors in their slots."""
        x = self.lm.embed(batch.input_ids)  # [B, T, D]
        flat = x.flatten(0, 1)  # [B*T, D]
        for kind, media in batch.media.items():
            vectors = self.encode(kind, media, batch.ids, named)  # [sum of counts, D]
            vectors = vectors[: len(media.slots)]  # a medium without slots runs its parts and is seen nowhere
            flat = flat.index_copy(0, media.slots, vectors.to(flat.dtype))
        padding = (batch.segment_ids == 0).unsqueeze(-1)
        return flat.view_as(x).masked_fill(padding, 0)  # [B, T, D]

    def encode(self, kind: str, media: MediaBatch, ids: list[str], named: dict[str, Any]) -> Tensor:
        """All media of a kind → their vectors ``[sum of counts, D]``. Raises DataError where a count is not kept."""
        runs: list[Any] = [None] * len(media.layouts)
        for items, same in alike(media, self.config.encoders):
            for item, run in zip(items, self._encode(kind, same, ids, named), strict=True):
                runs[item] = run
        named[f"{kind}/merged"] = runs
        return torch.cat(runs)  # [sum of counts, D]

    def _encode(self, kind: str, media: MediaBatch, ids: list[str], named: dict[str, Any]) -> list[Tensor]:
        """Media of one size → a run ``[M, D]`` for each."""
        stream = self.config.stream(kind)
        features = media.features or {n: look(self.encoders[n], media) for n in stream.encoders}  # each [U, N, D_in]
        named[f"{kind}/features"] = _one_or_all(features)
        if stream.pool and stream.pool_at == "before":
            features = {name: stream.pool.apply(tokens) for name, tokens in features.items()}
        tokens = self.connectors[stream.connector](*self._handed(stream, media, features, ids))  # [U, N', D]
        named[f"{kind}/projected"] = tokens
        return self.merge(kind, media, tokens, ids)

    def merge(self, kind: str, media: MediaBatch, tokens: Tokens, ids: list[str]) -> list[Tensor]:
        """Projected tokens ``[U, N', D]`` → a run ``[M, D]`` for each medium. Raises DataError, as ``encode`` does."""
        stream = self.config.stream(kind)
        if stream.pool and stream.pool_at == "after":
            tokens = stream.pool.apply(tokens)
        runs, start = [], 0
        unit = Count(tokens.x.shape[1], tokens.grid)
        for given, count, owner in zip(media.layouts, media.counts, media.owners, strict=True):
            layout = self.config.joined(kind, given)
            run = self.merges[kind](tokens.x[start : start + layout.units], unit, layout, self.newline)  # [M, D]
            if len(run) != count:
                raise DataError(
                    f"sample {ids[owner]!r}: its {kind} was counted as {count} tokens but gave {len(run)}; the "
                    "processor and the model belong to different configurations: load both from one folder"
                )
            runs.append(run)
            start += layout.units
        return runs

    def _handed(
        self, stream: Stream, media: MediaBatch, features: Mapping[str, Tokens], ids: list[str]
    ) -> tuple[Any, Condition | None]:
        """What a connector is given: features, and the instruction where it reads one, a row for each unit."""
        config = self.config.connectors[stream.connector]
        units = tuple(layout.units for layout in media.layouts)
        if config.joins_units:
            features = {name: replace(tokens, runs=units) for name, tokens in features.items()}
        if not config.conditioned:
            return _one_or_all(features), None
        if media.cond is None:
            raise DataError(
                f"sample {ids[media.owners[0]]!r}: connector {stream.connector!r} reads the instruction, but the batch "
                "holds none: set processing.instruction, and make the batch with the model's own processor"
            )
        if config.joins_units:
            return _one_or_all(features), media.cond
        owner = [item for item, count in enumerate(units) for _ in range(count)]
        rows = torch.tensor(owner, device=media.cond.ids.device)  # [U]
        return _one_or_all(features), Condition(media.cond.ids[rows], media.cond.mask[rows])

    def media(self, batch: Batch, x: Tensor, named: dict[str, Any]) -> Any:
        """What stands beside the sequence ``x [B, T, D]`` for the language model to look at: here nothing."""
        return None

    def states(self, x: Tensor, positions: Tensor, segments: Tensor, media: Any = None, cache: Any = None) -> Tensor:
        """The input ``x [B, T, D]`` that ``splice`` gives, and what stands beside it → hidden states ``[B, T, D]``."""
        return self.lm(x, positions, segments, cache=cache)

    def step(self, ids: Tensor, positions: Tensor, segments: Tensor, cache: Any) -> Tensor:
        """``ids [B, 1]`` → logits ``[B, V]`` of the next token."""
        hidden = self.lm(self.lm.embed(ids), positions, segments, cache=cache)  # [B, 1, D]
        return self.lm.head(hidden[:, -1])  # [B, V]

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Room for ``capacity`` positions of ``batch`` rows."""
        return self.lm.new_cache(batch, capacity + self.lm.extra, self.device, self.dtype)

    def _decode(self, batch: Batch, x: Tensor, logits: Asked | None, named: dict[str, Any]) -> Output:
        """Encoder-decoder: the spliced sequence is the encoder's, ``target_ids [B, S]`` the decoder's."""
        if batch.target_ids is None or batch.target_mask is None:
            raise DataError("an encoder-decoder language model needs target_ids; make the batch with its own processor")
        memory = self.lm.encode(x, batch.segment_ids)  # [B, T, D]
        hidden = self.lm.decode(batch.target_ids, memory, batch.segment_ids)  # [B, S, D]
        output = Output(hidden, named=named | {"memory": memory})
        if logits == "all":
            output.logits = self.lm.head(hidden)  # [B, S, V]
        elif logits == "last":
            output.logits = self.lm.head(hidden[:, -1])  # [B, V]
        elif logits is not None:
            rows, columns = torch.nonzero(batch.target_mask[:, 1:], as_tuple=True)
            self._at_labels(output, batch.target_ids, rows, columns, logits)
        return output

    def _at_labels(self, output: Output, ids: Tensor, rows: Tensor, columns: Tensor, asked: Asked) -> None:
        """Logits, or the vectors they are made of, at the ``n`` positions whose next token is a target."""
        check_asked(asked)
        states = output.hidden[rows, columns]  # [n, D]
        output.targets, output.target_rows = ids[rows, columns + 1], rows
        if asked == "labels":
            output.logits = self.lm.head(states)  # [n, V]
        else:
            output.states, output.head = states, self.lm.head


def labelled(batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows and columns ``[n]`` whose next token is a target of the same segment."""
    positions, width = batch.label_positions(), batch.input_ids.shape[1]
    return positions // width, positions % width


def last(batch: Batch) -> Tensor:
    """The column ``[B]`` of each row's last position that is not padding."""
    columns = torch.arange(batch.segment_ids.shape[1], device=batch.segment_ids.device)
    return ((batch.segment_ids != 0) * columns).argmax(dim=1)


def _one_or_all(values: Mapping[str, Any]) -> Any:
    return next(iter(values.values())) if len(values) == 1 else dict(values)


__all__ = ["Splice", "Stream", "Tokens", "labelled", "last"]
