"""From the order of a mixture to batches: which samples share a batch, made ready in workers, from any position on."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from chiasm.data.base import Example, id_of, with_answer
from chiasm.data.mixture import Mixture, Ref, permutation
from chiasm.data.quarantine import Quarantined, Skips
from chiasm.data.randomness import placed
from chiasm.errors import ChiasmError, DataError
from chiasm.types import Batch, Sample


@dataclass(frozen=True)
class Spec:
    """One micro-batch to make: part ``part`` of ``parts`` of optimizer step ``step``, in epoch ``epoch``.

    ``first`` is the place of its first sample in the whole step, whichever rank makes it.
    """

    step: int
    part: int
    parts: int
    epoch: int
    refs: tuple[Ref, ...]
    first: int = 0


@dataclass(frozen=True)
class BatchPlan:
    """Cuts each epoch into optimizer steps of ``accumulate`` micro-batches of ``batch_size`` samples.

    ``bucket`` is the number of steps whose samples are sorted by length before they are cut into micro-batches, which
    are then shuffled (0: no sorting). The last step of an epoch may be smaller; token weighting keeps it exact.
    """

    mixture: Mixture
    batch_size: int
    accumulate: int = 1
    bucket: int = 0

    @property
    def per_step(self) -> int:
        """Samples of a whole step."""
        return self.batch_size * self.accumulate

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, rounded up."""
        return -(-len(self.mixture) // self.per_step)

    def specs(self, start: int, stop: int, rank: int = 0, ranks: int = 1) -> Iterator[Spec]:
        """The micro-batches of steps ``start`` … ``stop - 1``. Depends on the position only, not on what ran before.

        Of several ranks each is given its own share of every step, and all the same number of micro-batches; those of a
        rank for which nothing is left are empty.
        """
        step = start
        while step < stop:
            epoch, first = divmod(step, self.steps_per_epoch)
            for number, parts in self._epoch(epoch, first):
                if epoch * self.steps_per_epoch + number >= stop:
                    return
                step = epoch * self.steps_per_epoch + number
                mine = deal(parts, self.accumulate, rank, ranks)
                for index, (refs, first) in enumerate(mine):
                    yield Spec(step, index, len(mine), epoch, refs, first)
            step += 1

    def _epoch(self, epoch: int, first: int) -> Iterator[tuple[int, list[tuple[Ref, ...]]]]:
        order = self.mixture.order(epoch)  # [n, 2]; made a list by windows only: an epoch may have millions
        window = max(1, self.bucket)
        for start in range(first // window * window, self.steps_per_epoch, window):
            inside = order[start * self.per_step : (start + window) * self.per_step].tolist()
            batches = self._cut([(source, index) for source, index in inside], epoch, start)
            for number in range(start, start + -(-len(batches) // self.accumulate)):
                if number >= first:
                    offset = (number - start) * self.accumulate
                    yield number, batches[offset : offset + self.accumulate]

    def _cut(self, refs: list[Ref], epoch: int, start: int) -> list[tuple[Ref, ...]]:
        if self.bucket:
            refs = sorted(refs, key=self.mixture.hint)
        batches = [tuple(refs[i : i + self.batch_size]) for i in range(0, len(refs), self.batch_size)]
        if self.bucket:
            batches = [
                batches[i] for i in permutation(len(batches), self.mixture.seed, "bucket", epoch, start).tolist()
            ]
        return batches


def deal(parts: Sequence[tuple[Ref, ...]], accumulate: int, rank: int, ranks: int) -> list[tuple[tuple[Ref, ...], int]]:
    """A rank's share of a step: micro-batches with the place of their first sample in the step.

    Whole micro-batches are dealt out where ``accumulate`` is a multiple of the ranks; else each is cut first, into as
    many slices as it takes. A step cut short at the end of an epoch leaves empty slices, never another number of them.
    """
    slices = ranks // math.gcd(accumulate, ranks)
    cut, place = [], 0
    for part in parts:
        for k in range(slices):
            begin, end = len(part) * k // slices, len(part) * (k + 1) // slices
            cut.append((part[begin:end], place + begin))
        place += len(part)
    cut += [((), place)] * (-len(cut) % ranks)
    return cut[rank::ranks]


class Renderer:
    """Examples to batches with a model's own processor: the only way from data to training and evaluation."""

    def __init__(self, processor: Any, max_length: int | None = None, pack: bool = False):
        self.processor = processor
        self.max_length = max_length
        self.pack = pack

    def sample(self, example: Example) -> Sample:
        """One example with its targets. Raises DataError that names it."""
        example = with_answer(example) if example.answers else example
        config = getattr(self.processor, "config", None)
        told = getattr(config, "labels", ()) or getattr(config, "answers", False)
        said = {"answers": example.answers} if told else {}
        sample = self.processor(list(example.messages), id=example.id, train=True, max_length=self.max_length, **said)
        sample.source = example.source
        beside = self.processor.template.beside  # pairs are compared: no token is a target
        if not beside and sample.target_ids is None and not bool(sample.loss_mask.any()):
            raise DataError(
                f"sample {example.id!r}: 0 of its {len(sample)} tokens are learned from; "
                "give it an assistant turn that is not empty and not marked train=False",
                "no_target",
            )
        return sample

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Several examples, padded or packed. Raises DataError."""
        return self.collate([self.sample(example) for example in examples])

    def collate(self, samples: list[Sample]) -> Batch:
        """Several samples, padded or packed."""
        if self.pack:
            samples.sort(key=len, reverse=True)  # the order of the segments in the row, so that ids follow it
        return self.processor.collate(samples, padding_side="right", packed=self.pack)


Bad = tuple[Quarantined, DataError]


class _Made(Dataset):
    """Makes one micro-batch and tells the samples that cannot be used.

    An error travels as a value, so that it arrives as raised, not as a worker's trace.
    """

    def __init__(self, mixture: Mixture, renderer: Renderer):
        self.mixture, self.renderer = mixture, renderer

    def __getitem__(self, spec: Spec) -> tuple[Spec, Batch | ChiasmError | None, list[Bad]]:
        samples: list[Sample] = []
        bad: list[Bad] = []
        try:
            for place, ref in enumerate(spec.refs, spec.first):
                example = None
                try:
                    # The same from any start, by any worker, on any rank.
                    with placed(self.mixture.seed, "sample", spec.step, place):
                        example = self.mixture[ref]
                        samples.append(self.renderer.sample(example))
                except DataError as error:
                    id = example.id if example else id_of(self.mixture.sources[ref[0]], ref[1])
                    name = self.mixture.names[ref[0]]
                    bad.append((Quarantined(name, ref[1], id, error.fault or "record", str(error)), error))
            return spec, self.renderer.collate(samples) if samples else None, bad
        except ChiasmError as error:
            return spec, error, bad


class _Specs:
    def __init__(self, plan: BatchPlan, start: int, stop: int, share: tuple[int, int]):
        self.plan, self.start, self.stop, self.share = plan, start, stop, share

    def __iter__(self) -> Iterator[Spec]:
        return self.plan.specs(self.start, self.stop, *self.share)


def load(
    plan: BatchPlan,
    renderer: Renderer,
    start: int,
    stop: int,
    workers: int = 0,
    skips: Skips | None = None,
    share: tuple[int, int] = (0, 1),
) -> Generator[tuple[Spec, Batch | None], None, None]:
    """The batches of steps ``start`` … ``stop - 1``. Workers start with the first batch asked for.

    ``share`` is ``(rank, ranks)``: each rank is given its own part of every step.

    A sample that cannot be used raises DataError, or is left out where ``skips`` lets it; the other samples keep their
    places. A micro-batch that loses every sample comes as None.
    """
    loader = DataLoader(
        _Made(plan.mixture, renderer),
        sampler=_Specs(plan, start, stop, share),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=False,
        generator=torch.Generator().manual_seed(0),  # else the loader would draw from the global generator
    )
    made_by = iter(loader)
    try:
        while True:
            try:
                spec, made, bad = next(made_by)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                raise died(error, workers) or error from None
            for sample, fault in bad:
                if skips is None:
                    raise fault
                skips.add(spec.step + 1, sample, fault)
            if isinstance(made, ChiasmError):
                raise made
            yield spec, made
    finally:
        _ended(made_by)


def _ended(made_by: Any) -> None:
    """No workers from here on: as long as torch knows of one that died, it says so in the middle of anything."""
    with suppress(RuntimeError):  # also of this
        getattr(made_by, "_shutdown_workers", lambda: None)()


def died(error: Exception, workers: int) -> ChiasmError | None:
    """What to say where the system ended a data worker, which torch tells in the middle of anything; else None."""
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: (\w[\w ]*))?", str(error))
    cut = workers > 0 and isinstance(error, (ConnectionError, EOFError))  # in the middle of handing over a batch
    if found is None and not cut:
        return None
    which = f"process {found[1]}, " if found else ""
    how = f"was ended by the system ({found[2]})" if found and found[2] else "ended before its time"
    return ChiasmError(
        f"a data worker ({which}{workers} in all) {how}, most often for want of memory: set workers below {workers}, "
        "smaller batches or smaller pictures (max_pixels of the front end); --resume goes on from the last checkpoint"
    )
