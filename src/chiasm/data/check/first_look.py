"""A look at the samples before the first step: every error that a sample would raise in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chiasm.data.loader import Renderer
from chiasm.data.mixture import Mixture, Ref
from chiasm.data.quarantine import BadSamples
from chiasm.errors import DataError

MOST = 5  # errors shown


@dataclass(frozen=True)
class Checked:
    """What the look found: how many samples were rendered, and their lengths in tokens."""

    samples: int
    of: int
    longest: int
    longest_id: str
    mean_length: float
    mean_targets: float
    bad: int = 0  # samples that cannot be used, which the run will skip
    cut: int = 0  # samples longer than max_length, whose ends are not seen
    lost: int = 0  # tokens that the longest of these loses


def check(
    mixture: Mixture,
    renderer: Renderer,
    limit: int,
    advance: Callable[[int, int], None] | None = None,
    bad: BadSamples | None = None,
) -> Checked:
    """Open and render ``limit`` samples (all where there are no more), as training will.

    Small sources are seen whole first: with several sources each gets its share of ``limit`` in the order of the first
    epoch. Of sources whose records are quick to open every record is parsed, whatever ``limit``. Raises one DataError
    that tells every bad sample found, the first ``MOST`` in full, where there are more than ``bad`` lets be skipped.
    """
    refs = _spread(mixture, limit)
    problems = _records(mixture, set(refs)) if limit else []
    longest, longest_id, total, targets, lost = 0, "", 0, 0, []
    for done, ref in enumerate(refs):
        try:
            sample = renderer.sample(mixture[ref])
        except DataError as error:
            problems.append(str(error))
            continue
        total += len(sample)
        targets += int(sample.loss_mask.sum()) if sample.target_ids is None else len(sample.target_ids)
        if len(sample) > longest:
            longest, longest_id = len(sample), sample.id
        if sample.lost:
            lost.append(sample.lost)
        if advance and done % 16 == 0:
            advance(done, len(refs))
    n = max(1, len(refs) - len(problems))
    if len(problems) <= (bad.most(len(mixture)) if bad else 0):
        ends = (len(problems), len(lost), max(lost, default=0))
        return Checked(len(refs), _distinct(mixture), longest, longest_id, total / n, targets / n, *ends)
    if len(problems) == 1:
        raise DataError(problems[0])
    more = f"\n  … and {len(problems) - MOST} more" if len(problems) > MOST else ""
    told = "\n  ".join(problems[:MOST]) + more
    raise DataError(f"{len(problems)} of the {_distinct(mixture)} samples cannot be used:\n  {told}")


def _records(mixture: Mixture, seen: set[Ref]) -> list[str]:
    """What is wrong with the records of the quick sources, save those that are rendered anyway."""
    problems = []
    for number, source in enumerate(mixture.sources):
        for index in mixture.usable(number).tolist() if source.quick else ():
            if (number, index) not in seen:
                try:
                    source[index]
                except DataError as error:
                    problems.append(str(error))
    return problems


def _distinct(mixture: Mixture) -> int:
    return sum(mixture.size(i) for i in range(len(mixture.sources)))


def _spread(mixture: Mixture, limit: int) -> list[Ref]:
    """At most ``limit`` references: small sources whole, the rest shared out evenly, in the order of epoch 0."""
    left, allowed = limit, {}
    by_size = sorted(range(len(mixture.sources)), key=mixture.size)
    for done, number in enumerate(by_size):
        allowed[number] = min(mixture.size(number), left // (len(by_size) - done))
        left -= allowed[number]
    refs: list[Ref] = []
    for number in range(len(mixture.sources)):
        order = mixture.draw(number, 0).tolist()
        seen = dict.fromkeys(order)
        rest = (i for i in mixture.usable(number).tolist() if i not in seen)
        chosen = [*seen][: allowed[number]]
        while len(chosen) < allowed[number]:
            chosen.append(next(rest))
        refs += [(number, index) for index in chosen]
    return refs
