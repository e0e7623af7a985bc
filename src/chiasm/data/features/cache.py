"""A frozen encoder's features between data and model: workers skip what is stored, the trainer fills in the rest."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.data.features.content import Contents, processing_hash, weights_hash
from chiasm.data.features.store import FeatureStore
from chiasm.data.loader import Renderer
from chiasm.errors import ConfigError
from chiasm.processing.base import FrontEnd, Place
from chiasm.types import Batch, Media, MediaBatch, MediaItem, Tokens


class StoredFrontEnd(FrontEnd):
    """A front end that opens a medium only where its features are not stored yet."""

    def __init__(self, inner: FrontEnd, store: FeatureStore, contents: Contents):
        super().__init__(inner.config)
        self.inner, self.kind, self.store, self.contents = inner, inner.kind, store, contents

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        """The item with its key: without a unit where its features are stored, else as the front end makes it."""
        content = self.contents.of(medium)
        key = f"{content}-{processing_hash(self.inner, place)}" if content else ""
        layout = self.store.layout(key)
        if layout is not None:
            return MediaItem(self.kind, torch.empty(0, *layout.shape), layout, key=key)
        return replace(self.inner(medium, place), key=key)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the front end can do."""
        if name == "inner":  # while being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)


class StoredRenderer(Renderer):
    """A renderer whose batches lack the media that are stored: only for a trainer that fills them in."""

    def __init__(self, plain: Renderer, stores: dict[str, FeatureStore]):
        processor, contents = copy.copy(plain.processor), Contents()
        processor.front_ends = {
            kind: StoredFrontEnd(f, stores[kind], contents) if kind in stores else f
            for kind, f in processor.front_ends.items()
        }
        super().__init__(processor, plain.max_length, plain.pack)
        self.plain, self.stores = plain, stores

    def __reduce__(self) -> Any:
        return StoredRenderer, (self.plain, self.stores)


class FeatureCache:
    """The stores of a model's kinds of media whose encoders are frozen. Kinds whose encoder trains are left out.

    ``folder`` may be shared by runs, ranks and models: each encoder with its weights, in its type, has its own part.
    ``limit`` is the number of bytes each kind of media may fill.
    """

    def __init__(self, folder: str | Path, model: Any, limit: int | None = None):
        self.model, self.stores, self.trains = model, {}, []
        self.encoded = self.read = 0  # media
        self.seconds, self.reading = 0.0, 0.0
        for kind, stream in model.config.media.items():
            if any(p.requires_grad for name in stream.encoders for p in model.encoders[name].parameters()):
                self.trains.append(kind)
                continue
            self.stores[kind] = FeatureStore(Path(folder) / _mark(model, stream.encoders), limit)

    def renderer(self, plain: Renderer) -> Renderer:
        """The renderer that skips what is stored; ``plain`` itself where nothing can be."""
        return StoredRenderer(plain, dict(self.stores)) if self.stores else plain

    def fill(self, batch: Batch) -> Batch:
        """Give every medium of a batch (on the model's device) its features: read, or encoded and stored."""
        for kind, media in batch.media.items():
            if kind in self.stores and media.keys:
                media.features = self._features(self.stores[kind], kind, media)
        return batch

    def told(self) -> str:
        """What the cache did, and what it saved, as measured."""
        if not self.stores:
            return f"feature cache: off, the encoder of {', '.join(self.trains)} trains"
        size = sum(store.bytes for store in self.stores.values()) / 2**20
        each = self.seconds / self.encoded if self.encoded else 0.0
        saved = max(0.0, self.read * each - self.reading)
        gain = f", about {saved:.1f} s of encoding saved ({1000 * each:.1f} ms each)" if self.encoded else ""
        stored = sum(len(store) for store in self.stores.values())
        return (
            f"feature cache: {stored} media stored in {size:.1f} MiB; encoded {self.encoded}, read {self.read} times"
            f" in {self.reading:.2f} s{gain}"
        )

    def _features(self, store: FeatureStore, kind: str, media: MediaBatch) -> dict[str, Tokens]:
        begun = time.perf_counter()
        found = [store.get(key) for key in media.keys]
        offsets = [sum(media.given[:i]) for i in range(len(media.given))]
        first: dict[str, int] = {}  # the same medium twice in a batch is encoded once
        for i, key in enumerate(media.keys):
            if found[i] is None and not media.given[i]:
                raise ConfigError(
                    f"the features of a {kind} were stored in {store.folder} and are gone; give each run that is "
                    "under way its own folder, or do not remove files of it"
                )
            if found[i] is None:
                first.setdefault(key or f"#{i}", i)
        self.read += len(media.keys) - len(first)
        encoded = self._encode(kind, media, [(i, offsets[i]) for i in first.values()])
        store.add([(media.keys[i], media.layouts[i], encoded[i]) for i in first.values()])
        each = [by or encoded[first[key or f"#{i}"]] for i, (key, by) in enumerate(zip(media.keys, found, strict=True))]
        names = self.model.config.stream(kind).encoders
        result = {name: _joined([by[name] for by in each], self.model) for name in names}
        if not first:
            self.reading += time.perf_counter() - begun
        return result

    @torch.no_grad()
    def _encode(self, kind: str, media: MediaBatch, items: Sequence[tuple[int, int]]) -> dict[int, dict[str, Tokens]]:
        """Items (number, first row of ``inputs``) → their features by encoder."""
        if not items:
            return {}
        begun = time.perf_counter()
        inputs = torch.cat([media.inputs[start : start + media.given[i]] for i, start in items])  # [U, *shape]
        result: dict[int, dict[str, Tokens]] = {i: {} for i, _ in items}
        for name in self.model.config.stream(kind).encoders:
            tokens = self.model.encoders[name](inputs)  # [U, N, D]
            if tokens.mask is not None:
                raise ConfigError(
                    f"encoder {name!r} gives masked features, which cannot be stored; leave the cache out"
                )
            runs: Sequence[Tensor] = tokens.x.split([media.given[i] for i, _ in items])
            for (i, _), run in zip(items, runs, strict=True):
                result[i][name] = Tokens(run, grid=tokens.grid)
        self.encoded += len(items)
        self.seconds += time.perf_counter() - begun
        return result


def _joined(parts: Sequence[Tokens], model: Any) -> Tokens:
    """The features of all items of a batch ``[sum of units, N, D]``, on the model's device."""
    x = torch.cat([p.x.to(model.device, non_blocking=True) for p in parts])
    return Tokens(x, grid=parts[0].grid)


def _mark(model: Any, encoders: Sequence[str]) -> str:
    """The folder of some encoders: configuration, weights and type."""
    marks = [f"{model.config.encoders[n].hash()}{weights_hash(model.encoders[n])}" for n in encoders]
    return "-".join(mark[:6] + mark[12:28] for mark in marks)
