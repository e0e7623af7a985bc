"""Several processes that train one model: who makes which samples, and what is joined when.

    global step ─deal─▶ each rank its micro-batches ─▶ loss sums, gradients of sums
                ─▶ gradients and weights summed over all ranks ─▶ gradient / weight of the whole step ─▶ AdamW

Nothing is a mean over ranks, so the step is that of one process that sees the whole batch, however unequal the ranks'
images and tokens are. ``Alone`` is one process; ``Ranks`` replicates the model, and sums gradients by parameter name
once a step: a rank whose samples held no image adds zeros, and none waits for another inside a forward or backward
pass. ``chiasm.train.shard`` spreads the model itself.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chiasm.data.loader import Spec
from chiasm.data.quarantine import Quarantined
from chiasm.errors import ChiasmError, DataError
from chiasm.train.watchdog import Watchdog
from chiasm.types import Batch

Mode = Literal["replicate", "shard"]
BUCKET = 32 * 2**20
"""Bytes of gradients that are summed over the ranks at once."""


class RankError(ChiasmError):
    """Another rank stopped, or the ranks do not agree. Names the rank."""


@dataclass
class Turn:
    """What a rank tells the others of its next micro-batch, before any of them runs it."""

    step: int = -1
    ended: bool = False
    error: str | None = None
    bad: list[tuple[int, Quarantined, str, str]] = field(default_factory=list)
    media: dict[str, Any] = field(default_factory=dict)  # kind → shape of a unit and what else an empty one needs


class Alone:
    """One process: everything is at hand already."""

    rank, count = 0, 1
    sharded = False
    talk: Any = None  # the process group of small Python values

    @property
    def first(self) -> bool:
        """Whether this rank writes logs, checkpoints and models."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """This rank and the number of ranks, as the loader wants them."""
        return self.rank, self.count

    def seeds(self, seed: int) -> tuple[int, ...]:
        """What this rank's random generators start from."""
        return (seed,) if self.count == 1 else (seed, self.rank)

    def gather(self, value: Any, place: str = "") -> list[Any]:
        """The values of all ranks, in the order of the ranks."""
        return [value]

    def wait(self, place: str) -> None:
        """Go on when every rank is here."""

    def place(self, model: nn.Module, dtype: str) -> nn.Module:
        """The model that is run in training."""
        return model

    def whole(self, model: nn.Module) -> nn.Module:
        """The ordinary model again, with what was learned."""
        return model

    def reshard(self) -> None:
        """Let go of weights that were gathered to be computed with, so that parameters are this rank's pieces again."""

    def input_dtype(self, model: Any) -> torch.dtype:
        """The type in which pictures are handed to the model."""
        return model.dtype  # type: ignore[no-any-return]

    def skips(self, skips: Any) -> Any:
        """The counter of bad samples that the loader is given."""
        return skips

    def stream(self, made: Iterator[tuple[Spec, Batch | None]]) -> Iterator[tuple[Spec, Batch | None, set[str]]]:
        """The micro-batches, each with the kinds of media that came on any rank."""
        for spec, batch in made:
            yield spec, batch, set(batch.media) if batch is not None else set()

    def joined(self, tally: Any) -> Any:
        """The sums of a step over all ranks."""
        return tally

    def reduce(self, masters: Any) -> list[Tensor]:
        """Sum the step's gradients over the ranks; returns the tensors to be scaled, those of this rank."""
        return masters.gradients()  # type: ignore[no-any-return]

    def norm(self, masters: Any) -> Tensor | None:
        """The norm ``[]`` of all gradients where ranks hold different pieces of them; None: as the tensors are."""
        return None

    def alike(self, what: str, mark: str) -> None:
        """Raise RankError unless all ranks have the same mark."""


ALONE = Alone()


class Ranks(Alone):
    """One of several processes, each with the whole model (``parallel: replicate``)."""

    def __init__(self, device: str, patience: float = 600.0):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.device = device
        # Small Python values travel by the CPU, beside whatever the accelerator does.
        self.talk = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, wait_for_workers=False)
        self.watchdog = Watchdog(store, self.rank, self.count, patience)
        self.pending: list[tuple[int, Quarantined, str, str]] = []
        self.counted: Any = None

    def close(self) -> None:
        """Stop the watchdog."""
        self.watchdog.close()

    def gather(self, value: Any, place: str = "a meeting") -> list[Any]:
        """The values of all ranks, in the order of the ranks."""
        found: list[Any] = [None] * self.count
        with self.watchdog.waiting(place):
            dist.all_gather_object(found, value, group=self.talk)
        return found

    def wait(self, place: str) -> None:
        """Go on when every rank is here."""
        self.gather(None, place)

    def alike(self, what: str, mark: str) -> None:
        """Raise RankError unless all ranks have the same mark."""
        marks = self.gather(mark, f"comparing {what}")
        other = next((r for r, m in enumerate(marks) if m != marks[0]), None)
        if other is not None:
            raise RankError(
                f"{what} of rank {other} is {marks[other]}, that of rank 0 is {marks[0]}: all ranks must start from "
                "the same files and the same recipe"
            )

    # ------------------------------------------------------------------------------------------------------ batches

    def skips(self, skips: Any) -> Any:
        """Bad samples are counted when all ranks' are known, so that all skip, or stop, together."""
        self.counted = skips
        return self

    def add(self, step: int, sample: Quarantined, error: DataError) -> None:
        """A bad sample of this rank: told to all before the next micro-batch."""
        self.pending.append((step, sample, str(error), error.fault))

    def stream(self, made: Iterator[tuple[Spec, Batch | None]]) -> Iterator[tuple[Spec, Batch | None, set[str]]]:
        """The micro-batches, each when all ranks have theirs. An error of one rank stops all."""
        made = iter(made)
        while True:
            turn, spec, batch, raised = Turn(), None, None, None
            self.watchdog.at("making a batch")
            try:
                spec, batch = next(made)
                turn.step, turn.media = spec.step, self.told(batch)
            except StopIteration:
                turn.ended = True
            except ChiasmError as error:
                turn.error, raised = str(error), error
            turn.bad, self.pending = self.pending, []
            turns = self.gather(turn, f"the batch of step {turn.step + 1}")
            self._judge(turns, raised)
            if turn.ended or spec is None:
                return
            self.watchdog.at(f"step {spec.step + 1}")
            yield *self.completed(spec, batch, turns), {kind for t in turns for kind in t.media}

    def told(self, batch: Batch | None) -> dict[str, Any]:
        """What the others must know of a batch's media."""
        return dict.fromkeys(batch.media if batch is not None else ())

    def completed(self, spec: Spec, batch: Batch | None, turns: Sequence[Turn]) -> tuple[Spec, Batch | None]:
        """The micro-batch that this rank runs."""
        return spec, batch

    def _judge(self, turns: Sequence[Turn], raised: ChiasmError | None) -> None:
        for turn in turns:
            for step, sample, message, fault in turn.bad:
                self.counted.add(step, sample, DataError(message, fault))
        if raised is not None:
            raise raised
        for rank, turn in enumerate(turns):
            if turn.error is not None:
                raise RankError(f"rank {rank} stopped: {turn.error}")
        steps = [(t.ended, t.step) for t in turns]
        if len(set(steps)) > 1:
            raise RankError(f"the ranks are at different steps ({[s + 1 for _, s in steps]}): their data differ")

    # ---------------------------------------------------------------------------------------------------- gradients

    def joined(self, tally: Any) -> Any:
        """The sums of a step over all ranks, added in the order of the ranks: the same numbers everywhere."""
        total = type(tally)()
        for other in self.gather(tally, "the sums of a step"):
            total.add(other)
        return total

    @torch.no_grad()
    def reduce(self, masters: Any) -> list[Tensor]:
        """Sum the gradients of the step over the ranks. A parameter without one on every rank stays without."""
        parameters = list(masters.masters.values())
        with self.watchdog.waiting("summing gradients"):
            self.sum_gradients(parameters)
        return masters.gradients()  # type: ignore[no-any-return]

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """All-reduce, parameter by parameter in their order, in buckets."""
        if not parameters:
            return
        flags = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(flags)
        there = [p for p, f in zip(parameters, flags.tolist(), strict=True) if f]
        for p in there:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in there if p.grad is not None]):
            flat = torch.cat([g.flatten() for g in bucket])  # [n]
            dist.all_reduce(flat)
            for gradient, piece in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(piece.view_as(gradient))


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is spread over the ranks, which all meet here; any other is returned as it is."""
    gathered = getattr(tensor, "full_tensor", None)
    return tensor if gathered is None else gathered()


def like(full: Tensor, tensor: Any) -> Tensor:
    """``full``, the same on every rank, spread as ``tensor`` is."""
    if not hasattr(tensor, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(tensor.device), tensor.device_mesh, tensor.placements)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients of one type, of about ``BUCKET`` bytes."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


@contextmanager
def told_apart(rank: int) -> Iterator[None]:
    """Inside, a connection that another rank closed by ending is a RankError: what went wrong is said by that rank."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("closed by peer", "reset by peer", "Broken pipe")):
            raise
        raise RankError(
            f"rank {rank}: another rank ended in the middle of the run and closed its connection; its own message says "
            "why: look there first"
        ) from None


@contextmanager
def started(device: str, mode: Mode = "replicate", patience: float = 600.0) -> Iterator[Any]:
    """The ranks of this job: those of ``torchrun``, of a process group that exists, or this process alone.

    NCCL on CUDA, gloo elsewhere. On CUDA the process takes the device of its local rank.
    """
    running = dist.is_available() and dist.is_initialized()
    if not running and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not running:
        limit = datetime.timedelta(seconds=max(60.0, 2 * patience))  # the watchdog speaks first
        dist.init_process_group("nccl" if cuda else "gloo", timeout=limit)
    from chiasm.train.shard import Shards

    ranks = (Shards if mode == "shard" else Ranks)(device, patience)
    try:
        with told_apart(ranks.rank):
            yield ranks
            ranks.wait("the end")
    finally:
        ranks.close()
    if not running:
        ranks.wait("parting")  # rank 0 holds the store that the others' watchdogs read until now
        dist.destroy_process_group()
