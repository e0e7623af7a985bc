"""Samples into batches: padded on either side, or packed one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from chiasm.errors import DataError
from chiasm.processing.labels import joined
from chiasm.types import Batch, Condition, MediaBatch, MediaItem, Sample


def collate(samples: Sequence[Sample], pad_id: int, padding_side: Literal["right", "left"] = "right") -> Batch:
    """Samples of any lengths → ``Batch [B, T]``. Padding has segment 0, position 0 and is no target."""
    _some(samples)
    width = max(len(s) for s in samples)
    starts = [width - len(s) if padding_side == "left" else 0 for s in samples]
    places = [(row, start, 1) for row, start in enumerate(starts)]
    return _batch(samples, places, len(samples), width, pad_id)


def pack(samples: Sequence[Sample], capacity: int, pad_id: int = 0) -> Batch:
    """Samples one after the other in rows of at most ``capacity`` tokens, each a segment of its own (1, 2, ...).

    First fit, the longest first, so that few positions are padding; ``Batch.ids`` and the media keep the order given.
    Raises DataError where a sample is longer than a row.
    """
    _some(samples)
    if any(s.target_ids is not None for s in samples):
        raise DataError(f"sample {samples[0].id!r}: encoder-decoder samples cannot be packed; pad them")
    rows: list[int] = []  # tokens in each row
    counts: list[int] = []  # samples in each row
    places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(samples)
    for index in sorted(range(len(samples)), key=lambda i: -len(samples[i])):
        size = len(samples[index])
        if size > capacity:
            raise DataError(
                f"sample {samples[index].id!r}: {size} tokens do not fit a packed row of {capacity}; set max_length "
                f"to at most "
                f"{capacity} or make the rows longer"
            )
        row = next((r for r, used in enumerate(rows) if used + size <= capacity), len(rows))
        if row == len(rows):
            rows.append(0)
            counts.append(0)
        counts[row] += 1
        places[index] = (row, rows[row], counts[row])
        rows[row] += size
    return _batch(samples, places, len(rows), max(rows), pad_id)


def _batch(
    samples: Sequence[Sample], places: Sequence[tuple[int, int, int]], rows: int, width: int, pad_id: int
) -> Batch:
    """``places[i]`` is the (row, column, segment) at which sample ``i`` begins."""
    ids = torch.full((rows, width), pad_id, dtype=torch.long)  # [B, T]
    positions = torch.zeros(rows, width, dtype=torch.long)
    segments = torch.zeros(rows, width, dtype=torch.long)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for sample, (row, start, segment) in zip(samples, places, strict=True):
        span = slice(start, start + len(sample))
        ids[row, span] = sample.input_ids
        positions[row, span] = torch.arange(len(sample))
        segments[row, span] = segment
        mask[row, span] = sample.loss_mask
    kinds = dict.fromkeys(item.kind for sample in samples for item in sample.media)
    offsets = [row * width + start for row, start, _ in places]
    media = {kind: _media(kind, samples, offsets) for kind in kinds}
    target_ids, target_mask = _targets(samples, pad_id)
    labelled = bool(mask.any()) or target_ids is not None
    names, sources = [s.id for s in samples], [s.source for s in samples]
    batch = Batch(ids, positions, segments, mask, media, names, target_ids, target_mask, sources, labelled)
    batch.scores, batch.answers = _scores(samples), joined(samples)
    batch.masked_ids, batch.masked = _masked(samples, places, ids)
    batch.origin = samples[0].origin
    return batch


def _scores(samples: Sequence[Sample]) -> torch.Tensor | None:
    """How right each label is ``[B, C]``; None where no sample says so. Raises DataError where only some do."""
    given = [s.scores for s in samples if s.scores is not None]
    if given and len(given) != len(samples):
        lacking = next(s.id for s in samples if s.scores is None)
        raise DataError(f"sample {lacking!r}: has no answer but {len(given)} of {len(samples)} samples of the batch do")
    return torch.stack(given) if given else None


def _masked(
    samples: Sequence[Sample], places: Sequence[tuple[int, int, int]], ids: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The ids with hidden words, and which those are, ``[B, T]`` each; None where no sample has hidden words."""
    if all(s.masked_ids is None for s in samples):
        return None, None
    masked_ids, masked = ids.clone(), torch.zeros_like(ids, dtype=torch.bool)
    for sample, (row, start, _) in zip(samples, places, strict=True):
        if sample.masked_ids is not None and sample.masked is not None:
            masked_ids[row, start : start + len(sample)] = sample.masked_ids
            masked[row, start : start + len(sample)] = sample.masked
    return masked_ids, masked


def _media(kind: str, samples: Sequence[Sample], offsets: Sequence[int]) -> MediaBatch:
    """All media of a kind, units one after the other, slots as flat positions of ``[B*T]``."""
    found: list[tuple[int, MediaItem]] = [(o, i) for o, s in enumerate(samples) for i in s.media if i.kind == kind]
    first_owner, first = found[0]
    if all(item.ragged for _, item in found):
        sides = [max(sizes) for sizes in zip(*(item.inputs.shape[1:] for _, item in found), strict=True)]
        found = [(owner, replace(item, inputs=_filled(item.inputs, sides))) for owner, item in found]
        first = found[0][1]
    for owner, item in found:
        if item.slots is None:
            raise DataError(f"sample {samples[owner].id!r}: a {kind} has no slots; make samples with a Processor")
        if item.inputs.shape[1:] != first.inputs.shape[1:]:
            raise DataError(
                f"sample {samples[owner].id!r}: a {kind} has units of shape {tuple(item.inputs.shape[1:])} but sample "
                f"{samples[first_owner].id!r} has {tuple(first.inputs.shape[1:])}; one batch takes one shape: batch "
                f"samples of "
                "equal shape together, or give the front end one fixed size"
            )
    return MediaBatch(
        inputs=torch.cat([item.inputs for _, item in found]),  # [sum of units, *shape]
        layouts=[item.layout for _, item in found],
        slots=torch.cat([item.slots + offsets[owner] for owner, item in found if item.slots is not None]),
        counts=[len(item.slots) for _, item in found if item.slots is not None],
        owners=[owner for owner, _ in found],
        keys=[item.key for _, item in found] if any(item.key for _, item in found) else [],
        given=[len(item.inputs) for _, item in found],
        cond=_condition([item.cond for _, item in found]),
    )


def _filled(inputs: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """``[U, C, height, width]`` with zeros on the right and below, ``[U, N, C]`` with zeros behind, up to ``sides``."""
    missing = [side - own for side, own in zip(sides, inputs.shape[1:], strict=True)]
    return torch.nn.functional.pad(inputs, [n for size in reversed(missing) for n in (0, size)])


def _condition(rows: Sequence[torch.Tensor | None]) -> Condition | None:
    """The instruction of each item, padded on the right; None where the items have none."""
    held = [row for row in rows if row is not None]
    if len(held) != len(rows):
        if held:
            raise DataError(
                f"{len(held)} of {len(rows)} media carry an instruction; make all samples with one Processor"
            )
        return None
    lengths = torch.tensor([len(row) for row in held])
    ids = pad_sequence(held, batch_first=True)  # [items, L]
    return Condition(ids, torch.arange(ids.shape[1]) < lengths.unsqueeze(1))


def _targets(samples: Sequence[Sample], pad_id: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The decoder's side ``[B, S]``, padded on the right, and which of it counts."""
    having = [s.target_ids for s in samples if s.target_ids is not None]
    if not having:
        return None, None
    if len(having) != len(samples):
        lacking = next(s.id for s in samples if s.target_ids is None)
        raise DataError(
            f"sample {lacking!r}: has no decoder side but {len(having)} of {len(samples)} samples of the batch do"
        )
    width = max(len(t) for t in having)
    ids = torch.full((len(samples), width), pad_id, dtype=torch.long)  # [B, S]
    mask = torch.zeros(len(samples), width, dtype=torch.bool)
    for row, target in enumerate(having):
        ids[row, : len(target)] = target
        mask[row, : len(target)] = True
    return ids, mask


def _some(samples: Sequence[Sample]) -> None:
    if not samples:
        raise DataError("a batch of no samples; give at least one")
