"""Who attends to whom in a causal model: the earlier positions of the same segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.nn.scores import attention


@dataclass(frozen=True)
class Attend:
    """What attention is given: a mask ``[B, 1, T, L]`` (True: attend), or plain causality, or nothing.

    ``runs`` are the lengths of the pieces that each of ``B`` equally cut rows falls into: attention then runs inside
    the pieces only, without a mask and without the arithmetic between them.
    """

    mask: Tensor | None = None
    causal: bool = False
    runs: tuple[tuple[int, ...], ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [B, H, T, Dh]``, ``k`` and ``v`` ``[B, H_kv, L, Dh]`` → ``[B, H, T, Dh]``."""
        if self.runs:
            return self._in_runs(q, k, v)
        if self.mask is None:
            return attention(q, k, v, self.causal)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=grouped)

    @torch.compiler.disable  # the lengths differ from batch to batch: compiled, each would be a program of its own
    def _in_runs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of each piece of each row alone. Cut by ``split``, whose gradient is one concatenation."""
        inside = Attend(causal=True)
        rows = []
        for number, lengths in enumerate(self.runs):
            cut = (x[number : number + 1].split(lengths, dim=2) for x in (q, k, v))  # each [1, H, t, Dh]
            rows.append(torch.cat([inside(*piece) for piece in zip(*cut, strict=True)], dim=2))
        return torch.cat(rows)  # [B, H, T, Dh]


def causal(
    segments: Tensor,
    positions: Tensor,
    key_segments: Tensor | None = None,
    key_positions: Tensor | None = None,
    window: int | None = None,
) -> Attend:
    """Attention of the last ``T`` of ``L`` columns.

    ``segments``, ``positions`` ``[B, T]`` are the queries', ``key_segments``, ``key_positions`` ``[B, L]`` those of all
    columns so far (None: the queries' own). Order is by column; the sliding window counts positions, so padding between
    a prompt and its answer does not shorten it. A padded query attends to itself only: no row is empty, so none is NaN.
    """
    if key_segments is None or key_positions is None:
        key_segments, key_positions = segments, positions
    fits = window is None or key_segments.shape[1] <= window
    # Reading a value from an accelerator would stall it, so the short cut is only looked for on the CPU.
    if fits and segments.device.type == "cpu":
        if segments.shape[1] == key_segments.shape[1]:
            if is_plain(segments):
                return Attend(causal=True)
            if key_segments is segments and (lengths := runs(segments)):
                return Attend(runs=lengths)
        elif segments.shape[1] == 1 and bool((key_segments == segments).all()):
            return Attend()
    return Attend(mask=causal_mask(segments, positions, key_segments, key_positions, window))


def causal_mask(
    segments: Tensor, positions: Tensor, key_segments: Tensor, key_positions: Tensor, window: int | None = None
) -> Tensor:
    """The boolean mask ``[B, 1, T, L]`` of ``causal``."""
    t, length = segments.shape[1], key_segments.shape[1]
    columns = torch.arange(length, device=segments.device)
    queries = columns[length - t :].unsqueeze(1)  # [T, 1]
    mask = (segments.unsqueeze(2) == key_segments.unsqueeze(1)) & (segments != 0).unsqueeze(2)  # [B, T, L]
    mask &= columns <= queries
    if window is not None:
        mask &= key_positions.unsqueeze(1) > positions.unsqueeze(2) - window
    mask |= columns == queries
    return mask.unsqueeze(1)  # [B, 1, T, L]


def runs(segments: Tensor) -> tuple[tuple[int, ...], ...]:
    """The lengths of the runs of equal segments in each row of ``[B, T]``; nothing where a segment is torn apart.

    Padding in front is a run like any other, padding behind belongs to the run before it: what it attends to nobody
    reads.
    """
    found = []
    for row in segments:
        names, counts = row.unique_consecutive(return_counts=True)
        lengths = counts.tolist()
        if len(lengths) > 1 and int(names[-1]) == 0:
            lengths[-2:] = [sum(lengths[-2:])]
        names = names[names != 0]
        if len(names.unique()) != len(names):
            return ()
        found.append(tuple(lengths))
    return tuple(found)


def is_plain(segments: Tensor) -> bool:
    """Whether each row of ``[B, T]`` is one segment, with padding only after it: then causality alone is enough.

    What follows a row's segment is padding whose outputs nobody reads, so it needs no mask of its own.
    """
    first = segments[:, :1]
    alone = (segments == first) | (segments == 0)
    closed = segments[:, 1:] <= segments[:, :-1]
    return bool((first != 0).all() & alone.all() & closed.all())
