"""Room for the keys and values of several conversations side by side, and the decoder that fills it.

A slot is a row of one tensor ``[layers, 2, slots, H_kv, L, Dh]``, taken once. Nothing is padded: tokens of several
conversations stand one after the other in one row of matrix products (``Run`` says which belong where), and each
attends in its own slot. Short runs go through the compiled step where there is one (``chiasm.nn.decode``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.fusion.splice import Splice
from chiasm.lm.decoder import MLP, Attention, Block, Decoder
from chiasm.nn.decode import Compiled
from chiasm.nn.rope import rotate
from chiasm.nn.scores import attention


@dataclass
class Run:
    """Tokens of one slot from position ``start`` on. ``x [t, D]`` stands for ``ids`` where some are media's."""

    slot: int
    start: int
    ids: list[int]
    x: Tensor | None = None
    wanted: str = "last"  # positions whose logits are wanted: "none", "last", "all"

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.start + len(self.ids)


class Slots:
    """A pool of ``count`` slots of ``length`` positions for a model that ``fits``."""

    def __init__(self, model: Splice, count: int, length: int, block: int = 16):
        self.model, self.lm = model, model.lm
        c: Any = model.lm.config
        shape = (c.depth, 2, count, c.kv_heads or c.heads, length, c.width)
        # What was never written is never read by the compiled step; batched attention multiplies it with zero.
        self.pool = torch.empty(shape, device=model.device, dtype=model.dtype)
        self.compiled = Compiled.of(model.lm, self.pool)
        if self.compiled is None:
            self.pool.zero_()
        self.count, self.length, self.block = count, length, block
        self.free = list(range(count))
        self.threads = torch.get_num_threads()

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether a model is computed here: a plain splice into our own decoder, without learned prefixes or hooks."""
        lm = getattr(model, "lm", None)
        if type(model) is not Splice or type(lm) is not Decoder or lm.extra:
            return False
        blocks = all(
            type(b) is Block and type(b.attn) is Attention and type(b.mlp) is MLP and type(b).forward is Block.forward
            for b in lm.layers
        )
        return blocks and not any(m._forward_hooks or m._forward_pre_hooks for m in lm.modules())

    def take(self) -> int:
        """A free slot, the lowest."""
        self.free.sort()
        return self.free.pop(0)

    def give(self, slot: int) -> None:
        """A slot back."""
        self.free.append(slot)

    def read(self, slot: int, number: int) -> Tensor:
        """A copy of block ``number`` of a slot: ``[layers, 2, H_kv, block, Dh]``."""
        return self.pool[:, :, slot, :, number * self.block : (number + 1) * self.block].clone()

    def write(self, slot: int, number: int, block: Tensor) -> None:
        """Put a block that ``read`` gave, or its first positions, into a slot."""
        self.pool[:, :, slot, :, number * self.block : number * self.block + block.shape[3]] = block

    def run(self, runs: Sequence[Run], best: int | None = None) -> Tensor:
        """Compute runs of different slots, or following runs of one; logits ``[n, V]`` float32 of all wanted.

        ``best``: logits that are not among so many highest of their row may be minus infinity. None: all are asked for.
        """
        total = sum(len(run.ids) for run in runs)
        if self.compiled is not None and total <= self.compiled.rows:
            return self._step(runs, self.compiled, best)
        hidden = self._forward(runs, total)  # [T, D]
        rows = torch.tensor(wanted(runs), device=hidden.device, dtype=torch.long)
        return self.lm.head(hidden[rows]).float()  # [n, V]

    def _step(self, runs: Sequence[Run], compiled: Compiled, best: int | None) -> Tensor:
        ids = torch.tensor([i for run in runs for i in run.ids])
        slots = torch.tensor([run.slot for run in runs for _ in run.ids], dtype=torch.int32)
        positions = torch.tensor([p for run in runs for p in range(run.start, run.end)], dtype=torch.int32)
        ends = torch.tensor(wanted(runs), dtype=torch.int32)
        x = self._vectors(runs).float() if any(run.x is not None for run in runs) else None
        prompt = any(run.wanted != "all" for run in runs)
        return compiled.step(ids, slots, positions, ends, self.threads, x, prompt, best)

    def _vectors(self, runs: Sequence[Run]) -> Tensor:
        """What the tokens of all runs are for the decoder: ``[T, D]``."""
        device = self.model.device
        found = [self.lm.embed(torch.tensor(run.ids, device=device)) if run.x is None else run.x for run in runs]
        return torch.cat(found)

    def _forward(self, runs: Sequence[Run], total: int) -> Tensor:
        """The decoder over all runs at once → hidden states ``[T, D]`` after the last norm."""
        device = self.model.device
        lm: Any = self.lm
        x = self._vectors(runs)  # [T, D]
        positions = torch.cat([torch.arange(run.start, run.end, device=device) for run in runs]).unsqueeze(0)  # [1, T]
        turn = lm.rope(positions, torch.ones_like(positions), x.dtype)
        attend = (_Together if len(runs) > 1 and total == len(runs) else _Apart)(self.pool, runs, lm.config)
        x = x.unsqueeze(0)  # [1, T, D]
        for index, block in enumerate(lm.layers):
            attn = block.attn
            h = block.attn_norm(x)
            q, k, v = (p(h).unflatten(-1, (-1, attn.width)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            if attn.q_norm is not None:
                q, k = attn.q_norm(q), attn.k_norm(k)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [1, H, T, Dh]
            y = attend(index, rotate(q, *turn), rotate(k, *turn), v)  # [1, H, T, Dh]
            x = x + attn.o_proj(y.transpose(1, 2).flatten(2))  # [1, T, D]
            x = x + block.mlp(block.mlp_norm(x))
        return lm.norm(x)[0]


class _Apart:
    """Attention of each run in its slot."""

    def __init__(self, pool: Tensor, runs: Sequence[Run], config: Any):
        self.pool, self.runs, self.window = pool, runs, config.sliding_window
        self.masks = [self._mask(run, config.heads // (config.kv_heads or config.heads)) for run in runs]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [1, H, T, Dh]``, ``k`` and ``v`` ``[1, H_kv, T, Dh]`` → ``[1, H, T, Dh]``."""
        found, first = [], 0
        for run, mask in zip(self.runs, self.masks, strict=True):
            part = slice(first, first + len(run.ids))
            keys, values = self.pool[layer, 0, run.slot], self.pool[layer, 1, run.slot]  # [H_kv, L, Dh]
            keys[:, run.start : run.end] = k[0, :, part]
            values[:, run.start : run.end] = v[0, :, part]
            if mask is None:
                seen, held = keys[None, :, : run.end], values[None, :, : run.end]  # [1, H_kv, end, Dh]
                found.append(attention(q[:, :, part], seen, held, causal=len(run.ids) > 1))
            else:
                found.append(_masked(q[0, :, part], keys[:, : run.end], values[:, : run.end], mask))
            first = part.stop
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def _mask(self, run: Run, group: int) -> Tensor | None:
        """What is added to the scores ``[G*t, end]``; None where causality alone, or nothing, is left out."""
        narrow = self.window is not None and run.end > self.window
        if not narrow and (run.start == 0 or len(run.ids) == 1):
            return None
        device = self.pool.device
        rows = torch.arange(run.start, run.end, device=device).unsqueeze(1)  # [t, 1]
        columns = torch.arange(run.end, device=device)
        hidden = columns > rows
        if narrow:
            hidden |= columns <= rows - self.window
        mask = torch.zeros(hidden.shape, device=device, dtype=self.pool.dtype)
        return mask.masked_fill_(hidden, float("-inf")).repeat(group, 1)


def _masked(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """``q [H, t, Dh]``, ``keys`` and ``values`` ``[H_kv, L, Dh]``, ``mask [G*t, L]`` → ``[1, H, t, Dh]``."""
    rows = q.reshape(len(keys), -1, q.shape[-1])  # [H_kv, G*t, Dh]
    scores = torch.baddbmm(mask.expand(len(keys), -1, -1), rows, keys.mT, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), values).view(1, *q.shape)


class _Together:
    """One token of each of several slots: one batched attention."""

    def __init__(self, pool: Tensor, runs: Sequence[Run], config: Any):
        self.pool = pool
        self.slots = torch.tensor([run.slot for run in runs], device=pool.device)
        self.ends = torch.tensor([run.start for run in runs], device=pool.device)  # [R]
        self.longest = max(run.end for run in runs)
        columns = torch.arange(self.longest, device=pool.device)
        mask = columns <= self.ends.unsqueeze(1)  # [R, L]
        if config.sliding_window is not None:
            mask &= columns > self.ends.unsqueeze(1) - config.sliding_window
        self.mask = mask[:, None, None]  # [R, 1, 1, L]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [1, H, R, Dh]``, ``k`` and ``v`` ``[1, H_kv, R, Dh]`` → ``[1, H, R, Dh]``."""
        for side, new in ((0, k), (1, v)):
            self.pool[layer, side][self.slots, :, self.ends] = new[0].transpose(0, 1)
        keys, values = self.pool[layer, :, :, :, : self.longest].index_select(1, self.slots)  # [R, H_kv, L, Dh] each
        q = q[0].transpose(0, 1).unsqueeze(2)  # [R, H, 1, Dh]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1])
        return y.squeeze(2).transpose(0, 1).unsqueeze(0)


def wanted(runs: Sequence[Run]) -> list[int]:
    """Rows, among the tokens of all runs, whose logits are wanted."""
    rows, first = [], 0
    for run in runs:
        last = first + len(run.ids)
        rows += {"none": [], "last": [last - 1], "all": list(range(first, last))}[run.wanted]
        first = last
    return rows


__all__ = ["Run", "Slots"]
