"""Several sources as one stream: weights, and an order that is a function of the seed, the epoch and the place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from chiasm import registry
from chiasm.config import Config, part
from chiasm.data.base import Example, Source
from chiasm.data.quarantine import Quarantine
from chiasm.errors import ConfigError, DataError, nearest
from chiasm.types import Message

Ref = tuple[int, int]  # (number of the source, index in it)
Mixing = Literal["proportional", "square_root"]


class Entry(Config):
    """One source of a mixture."""

    source: part("source")  # type: ignore[valid-type]
    weight: float = Field(default=1.0, gt=0)  # how often an example is seen in an epoch; 0.5: another half each epoch
    limit: int | None = Field(default=None, gt=0)  # the first examples only


class HeldOut(Entry):
    """A source that is never trained on, and how its answers are scored.

    Models that compare pictures with texts choose among ``labels``, each written in all ``templates``; without labels
    they search.
    """

    metric: str = "exact"
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)


class Mixture:
    """Examples of several sources by reference ``(source, index)``, and their order in each epoch.

    No example of a source comes a second time before all of them came once, whatever the weight. The order of an epoch
    is computed from ``(seed, epoch)`` alone: a resumed run needs no state but a number.

    ``mixing``: a source's share of an epoch goes by its size times its weight; or, ``"square_root"``, by the root of
    its size times its weight (InstructBLIP, arXiv:2305.06500, section 2.4: small sources are then seen more often,
    large ones less), in epochs as long as all sources together.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        seed: int = 0,
        quarantine: Quarantine | None = None,
        mixing: Mixing = "proportional",
    ):
        if not entries:
            raise ConfigError("no data source is given; add one under 'data'")
        self.names = list(entries)
        self.entries = list(entries.values())
        self.seed, self.mixing = seed, mixing
        self.sources: list[Source] = []
        for name, entry in entries.items():
            source = registry.get("source", entry.source.type)(entry.source)
            if len(source) == 0:
                raise DataError(f"data source {name!r} holds 0 examples; check its file and its split")
            self.sources.append(source)
        self.kept = [self._kept(number, quarantine) for number in range(len(self.sources))]

    def _kept(self, number: int, quarantine: Quarantine | None) -> Tensor | None:
        """The indices ``[n]`` of a source that are used; None: all up to its limit."""
        name, source = self.names[number], self.sources[number]
        out = quarantine.of(name, source) if quarantine else frozenset()
        if not out:
            return None
        size = min(len(source), self.entries[number].limit or len(source))
        mask = torch.ones(len(source), dtype=torch.bool)
        mask[sorted(out)] = False
        kept = mask[:size].nonzero()[:, 0]
        if len(kept) == 0:
            raise DataError(f"data source {name!r}: all of its {size} examples are in the quarantine file")
        return kept

    def size(self, number: int) -> int:
        """Examples of a source that the mixture may use."""
        kept = self.kept[number]
        if kept is not None:
            return len(kept)
        limit = self.entries[number].limit
        return min(len(self.sources[number]), limit) if limit else len(self.sources[number])

    def share(self, number: int) -> int:
        """Examples of a source in one epoch, at least one."""
        if self.mixing == "proportional":
            return max(1, round(self.size(number) * self.entries[number].weight))
        sizes = [self.size(i) for i in range(len(self.sources))]
        roots = [entry.weight * math.sqrt(n) for entry, n in zip(self.entries, sizes, strict=True)]
        return max(1, round(sum(sizes) * roots[number] / sum(roots)))

    def __len__(self) -> int:
        """Examples in one epoch."""
        return sum(self.share(i) for i in range(len(self.sources)))

    def first(self, limit: int | None = None) -> list[Ref]:
        """The first ``limit`` references of each source, source by source."""
        return [(number, i) for number in range(len(self.sources)) for i in self.usable(number)[:limit].tolist()]

    def usable(self, number: int) -> Tensor:
        """The indices ``[n]`` of a source's examples, in their order, without those in quarantine."""
        kept = self.kept[number]
        return torch.arange(self.size(number)) if kept is None else kept

    def order(self, epoch: int) -> Tensor:
        """The references ``[n, 2]`` of an epoch, in their order."""
        runs = []
        for number in range(len(self.sources)):
            indices = self.draw(number, epoch)
            runs.append(torch.stack([torch.full_like(indices, number), indices], dim=1))
        refs = torch.cat(runs)
        return refs[permutation(len(refs), self.seed, "mixture", epoch)]

    def __getitem__(self, ref: Ref) -> Example:
        """The example, marked with its source's name in this mixture. Raises DataError."""
        number, index = ref
        example = self.sources[number][index]
        return replace(example, source=self.names[number])

    def hint(self, ref: Ref) -> int:
        """A cheap guess at how long an example is, only used to put examples of like length together."""
        number, index = ref
        source = self.sources[number]
        measure = getattr(source, "hint", None)
        try:
            return measure(index) if measure else text_length(source[index].messages)
        except DataError:
            return 0  # a bad sample is met, and named, when its batch is made

    def only(self, names: tuple[str, ...] | None) -> Mixture:
        """The same mixture with some of its sources. Raises ConfigError on an unknown name."""
        if names is None:
            return self
        for name in names:
            if name not in self.names:
                raise ConfigError(f"unknown data source {name!r}; {nearest(name, self.names)}")
        chosen = object.__new__(Mixture)
        keep = [self.names.index(name) for name in names]
        chosen.kept = [self.kept[i] for i in keep]
        chosen.names, chosen.seed, chosen.mixing = list(names), self.seed, self.mixing
        chosen.entries, chosen.sources = [self.entries[i] for i in keep], [self.sources[i] for i in keep]
        return chosen

    def draw(self, number: int, epoch: int) -> Tensor:
        """The indices a source gives to an epoch: a window over its endless run of permutations."""
        size, share = self.size(number), self.share(number)
        first, last = epoch * share, (epoch + 1) * share
        lap = first // size
        laps = range(lap, (last - 1) // size + 1)
        run = torch.cat([permutation(size, self.seed, self.names[number], n) for n in laps])
        drawn = run[first - lap * size : last - lap * size]
        kept = self.kept[number]
        return drawn if kept is None else kept[drawn]


def permutation(size: int, *key: object) -> Tensor:
    """A permutation ``[size]`` that depends on ``key`` only, not on any generator's state."""
    digest = hashlib.sha256("/".join(str(k) for k in key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(size, generator=generator)


def text_length(messages: tuple[Message, ...]) -> int:
    """Characters of the text, and a flat amount for each medium."""
    return sum(len(m.text) + 512 * len(m.media) for m in messages)
