"""Many answers at once: prompts are computed in chunks between the steps of those that already write.

Each ``step`` drops what was cancelled, gives free slots to who waits longest, computes at most ``chunk`` tokens of
prompts, and writes one token of every answer. What begins like something computed before (same ids, same pixels, same
salt) copies its keys and values block by block; who begins like a prompt that is being computed waits for it, so many
questions on one picture cost one prefill.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chiasm.infer.answer import Writer, guess
from chiasm.infer.kept import Kept
from chiasm.infer.prompt import Prompt, chain, marks
from chiasm.infer.request import Finish, Piece
from chiasm.infer.sampling import check_finite
from chiasm.infer.slots import Run, Slots
from chiasm.infer.steps import Steps
from chiasm.types import Batch

AFTER = b"after"
BESIDE = 96
"""Prompt tokens computed in a step beside answers that are being written: a few tokens' time."""


@dataclass(eq=False)
class Job:
    """One answer from queue to end. ``put`` and ``end`` are called by the thread that steps."""

    prompt: Prompt
    writer: Writer
    put: Callable[[Piece], None]
    end: Callable[[Finish], None]
    cancelled: Callable[[], bool] = lambda: False
    salt: str = ""
    alone: Callable[[], Steps] | None = None  # makes the steps of a model that has no slots
    slot: int = -1
    filled: int = 0  # positions computed
    cached: int = 0  # of them, those that were copied
    seed: bytes = b""  # of the hashes
    keys: list[bytes] = field(default_factory=list)  # of the blocks of the prompt
    marks: Tensor | None = None  # [T, 40] of its positions
    x: Tensor | None = None  # [T, D] where the prompt holds media
    steps: Steps | None = None
    begun: float = field(default_factory=time.monotonic)
    first: float = 0.0  # when the first token was chosen

    @property
    def writing(self) -> bool:
        """Whether the whole prompt is computed."""
        return self.filled >= len(self.prompt)


class Scheduler:
    """Steps the answers of one model. Only one thread may use it at a time."""

    def __init__(
        self,
        model: Any,
        slots: Slots | None,
        most: int,
        prefixes: Kept | None = None,
        features: Kept | None = None,
        chunk: int = 512,
        seed: Callable[[], bytes] = lambda: b"",
    ):
        self.model, self.slots, self.most, self.chunk = model, slots, most, chunk
        self.prefixes, self.features, self.seed = prefixes, features, seed
        self.waiting: deque[Job] = deque()
        self.filling: list[Job] = []
        self.writing: list[Job] = []
        self.totals = dict.fromkeys(
            ("prompt_tokens", "cached_tokens", "generated_tokens", "steps", "guessed", "guessed_right"), 0
        )

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.filling or self.writing)

    @property
    def jobs(self) -> list[Job]:
        """All that have not ended."""
        return [*self.writing, *self.filling, *self.waiting]

    @torch.inference_mode()
    def step(self) -> None:
        """One step of everything. A fault of one job ends that job."""
        self.totals["steps"] += 1
        for job in [job for job in self.jobs if job.cancelled()]:
            self.drop(job, "cancelled")
        self._admit()
        if self.slots is not None:
            self._fill(self.slots)
            self._write(self.slots, [job for job in self.writing if job.steps is None])
        for job in [job for job in self.writing if job.steps is not None]:
            self._guarded(job, self._write_alone)

    def drop(self, job: Job, reason: str = "error", error: Exception | None = None) -> None:
        """End a job and give back what it holds."""
        for jobs in (self.waiting, self.filling, self.writing):
            if job in jobs:
                jobs.remove(job)
        if job.slot >= 0 and self.slots is not None:
            if reason in ("stop", "length"):
                self._remember_answer(job, self.slots)
            self.slots.give(job.slot)
        job.slot, job.x, job.steps = -1, None, None
        count, now = len(job.writer.ids), time.monotonic()
        spent = now - job.first if job.first else 0.0
        job.end(
            Finish(
                reason,  # type: ignore[arg-type]
                len(job.prompt),
                count,
                job.cached,
                error,
                job.first - job.begun if job.first else 0.0,
                (count - 1) / spent if count > 1 and spent > 0 else 0.0,
                job.prompt.media_tokens,
                job.writer.sampler.seeds[0],
            )
        )

    def _guarded(self, job: Job, what: Callable[[Job], None]) -> None:
        try:
            what(job)
        except Exception as error:
            self.drop(job, "error", error)

    # ------------------------------------------------------------------------------------------------ prompts

    def _admit(self) -> None:
        room = self.most - len(self.filling) - len(self.writing)
        keeps = self.prefixes is not None or self.features is not None
        state = self.seed() if keeps and room and self.waiting else b""  # of the weights, once for all who come now
        while self.waiting and len(self.filling) + len(self.writing) < self.most:
            job = self.waiting.popleft()
            self.totals["prompt_tokens"] += len(job.prompt)
            if job.alone is not None or self.slots is None:
                self.writing.append(job)
                self._guarded(job, self._open_alone)
                if self.writing:
                    return  # it computed a whole prompt: let the others step
            else:
                job.slot = self.slots.take()
                self.filling.append(job)
                self._guarded(job, lambda job: self._open(job, state))

    def _open_alone(self, job: Job) -> None:
        assert job.alone is not None
        job.steps, job.filled = job.alone(), len(job.prompt)

    def _open(self, job: Job, state: bytes) -> None:
        """Hashes of what the prompt begins with, where anything is remembered."""
        if self.prefixes is None and self.features is None:
            return
        job.seed = hashlib.sha256(state + b"\0" + job.salt.encode()).digest()
        if self.prefixes is not None and self.slots is not None:
            job.keys, job.marks = chain(job.prompt, self.slots.block, job.seed), marks(job.prompt)

    def _copy(self, job: Job, slots: Slots, pending: set[bytes]) -> bool:
        """Copy the blocks that are remembered. False: the next one is being computed by another job."""
        if self.prefixes is None:
            return True
        # At least the last position is computed, for its logits are the first token's.
        while job.filled % slots.block == 0 and job.filled + slots.block < len(job.prompt):
            number = job.filled // slots.block
            block = self.prefixes.get(job.keys[number])
            if block is None:
                if job.keys[number] in pending:
                    return False
                break
            slots.write(job.slot, number, block)
            job.filled += slots.block
            job.cached += slots.block
            self.totals["cached_tokens"] += slots.block
        if job.filled % slots.block == 0:
            self._copy_part(job, slots, job.filled // slots.block)
        return True

    def _copy_part(self, job: Job, slots: Slots, number: int) -> None:
        """Copy what a block has in common with the one that was remembered after the same beginning."""
        assert self.prefixes is not None and job.marks is not None
        told = self.prefixes.get(AFTER + _before(job, number))
        block = None if told is None else self.prefixes.get(told[:32].numpy().tobytes())
        if told is None or block is None:
            return
        own = job.marks[job.filled : min(job.filled + slots.block, len(job.prompt) - 1)]
        same = (own == told[32:].view(-1, own.shape[1])[: len(own)]).all(1).int().cumprod(0)
        count = int(same.sum())
        slots.write(job.slot, number, block[..., :count, :])
        job.filled += count
        job.cached += count
        self.totals["cached_tokens"] += count

    def _fill(self, slots: Slots) -> None:
        """At most a chunk of the prompts' tokens, the longest waiting first."""
        # While more wait for a first token than write, a whole chunk: answers that begin together share their steps.
        left = BESIDE if len(self.writing) >= max(1, len(self.filling)) else self.chunk
        runs: list[tuple[Job, Run]] = []
        pending: set[bytes] = set()
        for job in list(self.filling):
            if left <= 0:
                break
            if not self._copy(job, slots, pending):
                continue
            self._guarded(job, self._embed)
            if job.slot < 0:
                continue
            end = min(job.filled + left, len(job.prompt))
            x = None if job.x is None else job.x[job.filled : end]
            ids = job.prompt.ids[job.filled : end].tolist()
            runs.append((job, Run(job.slot, job.filled, ids, x, "last" if end == len(job.prompt) else "none")))
            pending.update(job.keys[job.filled // slots.block :])
            left -= len(ids)
        if not runs:
            return
        logits = slots.run([run for _, run in runs], _asked([job for job, run in runs if run.wanted == "last"]))
        row = 0
        for job, run in runs:
            self._remember(job, slots, run.end)
            job.filled = run.end
            if job.writing:
                self.filling.remove(job)
                self.writing.append(job)
                job.x = None
                self._guarded(job, lambda job, row=row: self._take(job, job.writer.choose(logits[row])))  # type: ignore[misc]
                row += 1

    def _remember(self, job: Job, slots: Slots, end: int) -> None:
        if self.prefixes is not None and job.marks is not None:
            for number in range(job.filled // slots.block, end // slots.block):
                if job.keys[number] not in self.prefixes:
                    self.prefixes.put(job.keys[number], slots.read(job.slot, number))
                    told = job.marks[number * slots.block : (number + 1) * slots.block].flatten()
                    key = torch.frombuffer(bytearray(job.keys[number]), dtype=torch.uint8)
                    self.prefixes.put(AFTER + _before(job, number), torch.cat((key, told)))

    def _remember_answer(self, job: Job, slots: Slots) -> None:
        """The answer's blocks too: the next turn of the conversation begins with them."""
        if self.prefixes is not None:
            whole = torch.cat((job.prompt.ids, torch.tensor(job.writer.ids[:-1], dtype=torch.long)))
            if len(whole) // slots.block > len(job.keys):
                job.keys, job.marks = chain(job.prompt, slots.block, job.seed, whole), marks(job.prompt, whole)
                self._remember(job, slots, len(whole))

    def _embed(self, job: Job) -> None:
        """The vectors of a prompt with media that were not copied: text embedded, media encoded or remembered."""
        prompt = job.prompt
        if job.x is not None or all(int(medium.slots[-1]) < job.filled for medium in prompt.media):
            return
        x = self.model.lm.embed(prompt.ids.to(self.model.device)).clone()  # [T, D]
        for medium in prompt.media:
            if int(medium.slots[-1]) < job.filled:
                continue  # all of it was copied
            key = job.seed + medium.key  # other weights give other vectors, and nobody learns who sent a picture
            vectors = None if self.features is None else self._remembered(key)
            if vectors is None:
                moved = self._moved(medium)
                vectors = self.model.encode(medium.kind, moved, [prompt.name], {})  # [N, D]
                if self.features is not None:
                    self.features.put(key, vectors)
            x[medium.slots.to(x.device)] = vectors.to(x.dtype)
        job.x = x

    def _remembered(self, key: bytes) -> Tensor | None:
        assert self.features is not None
        self.features.asked += 1
        held = self.features.get(key)
        self.features.found += held is not None
        return held

    def _moved(self, medium: Any) -> Any:
        none = torch.zeros(1, 0, dtype=torch.long)
        batch = Batch(none, none, none, none, {medium.kind: medium.batch})
        return batch.to(self.model.device, self.model.dtype).media[medium.kind]

    # ------------------------------------------------------------------------------------------------ answers

    def _write(self, slots: Slots, jobs: list[Job]) -> None:
        """One token, or more where guesses come true, of every answer in a slot."""
        if not jobs:
            return
        runs = []
        for job in jobs:
            last, place = job.writer.ids[-1], len(job.prompt) + len(job.writer.ids) - 1
            guesses = self._guesses(job, slots.length - place - 1)
            runs.append(Run(job.slot, place, [last, *guesses], None, "all"))
        logits = slots.run(runs, _asked(jobs))  # [sum of run lengths, V]
        best = logits.argmax(dim=-1)  # [sum of run lengths]
        highest = logits.gather(1, best.unsqueeze(1)).squeeze(1).tolist()
        chosen = list(zip(best.tolist(), highest, strict=True))
        row = 0
        for job, run in zip(jobs, runs, strict=True):
            self._guarded(job, lambda job, row=row, run=run: self._accept(job, run, logits, chosen, row))  # type: ignore[misc]
            row += len(run.ids)

    def _accept(self, job: Job, run: Run, logits: Tensor, best: list[tuple[int, float]], row: int) -> None:
        writer = job.writer
        for offset in range(len(run.ids)):
            token, highest = best[row + offset]
            check_finite(highest)
            if not writer.takes(token):
                token = writer.choose(logits[row + offset])
            self._take(job, token)
            right = offset + 1 < len(run.ids) and run.ids[offset + 1] == token
            self.totals["guessed_right"] += right
            if job.writer.reason or not right:
                return

    def _guesses(self, job: Job, room: int) -> list[int]:
        most = min(job.writer.sampling.prompt_lookup, room, job.writer.limit - len(job.writer.ids) - 1)
        if most <= 0 or not job.writer.plain:
            return []
        found = guess([*job.prompt.ids.tolist(), *job.writer.ids], most)
        self.totals["guessed"] += len(found)
        return found

    def _write_alone(self, job: Job) -> None:
        assert job.steps is not None
        if job.writer.ids:
            job.steps.advance(torch.tensor([job.writer.ids[-1]], device=job.steps.logits.device))
        self._take(job, job.writer.choose(job.steps.logits[0]))

    def _take(self, job: Job, token: int) -> None:
        """A token was chosen."""
        job.first = job.first or time.monotonic()
        self.totals["generated_tokens"] += 1
        piece = job.writer.push(token)
        if piece is not None:
            job.put(piece)
        if job.writer.reason:
            long = job.writer.reason in ("length", "positions")
            self.drop(job, "length" if long else "stop")


def _asked(jobs: Sequence[Job]) -> int | None:
    """How many of the best tokens these answers ask for; None where one asks for all logits."""
    asked = [job.writer.asks for job in jobs]
    return None if None in asked else max(asked, default=1)  # type: ignore[type-var]


def _before(job: Job, number: int) -> bytes:
    """The hash of what stands before block ``number``."""
    return job.keys[number - 1] if number else job.seed


__all__ = ["Job", "Scheduler"]
