"""A model spread over the ranks: torch's FSDP2 over the blocks of encoders and language model (``parallel: shard``).

Reference: ``torch.distributed.fsdp.fully_shard`` (torch 2.13). Parameters, gradients and moments live in pieces, one a
rank; a block's weights are gathered while it runs. Frozen parts are spread too.

Gathering is a meeting of all ranks, so all must run the same blocks in the same order. Before each micro-batch the
ranks tell each other which kinds of media they hold; where one has a kind, every other runs that encoder and connector
too, on a medium without slots: no sequence sees its vectors, so its gradients are zeros exactly, and every meeting is
kept while the others compute theirs. Where sizes of pictures are encoded one after the other, that holds for each
size. (A batch of zero pictures would do, but not every tower takes one.) A rank that has no sample left runs a row of
two tokens, whose loss counts 0 times.

FSDP's own arithmetic is a mean over ranks; its divisor is set to 1, so that sums stay sums.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from chiasm.data.loader import Spec
from chiasm.errors import ConfigError
from chiasm.train.distributed import Ranks, Turn, whole
from chiasm.types import Batch, Condition, Layout, MediaBatch


class Shards(Ranks):
    """One of several processes, each with a piece of the model."""

    sharded = True

    def __init__(self, device: str, patience: float = 600.0):
        super().__init__(device, patience)
        kind = torch.device(device).type
        self.mesh = init_device_mesh(kind, (self.count,))
        self.low: torch.dtype | None = None
        self.model: Any = None

    # -------------------------------------------------------------------------------------------------------- model

    def place(self, model: nn.Module, dtype: str) -> nn.Module:
        """A copy of the model whose parameters are pieces; ``model`` itself is emptied until ``whole`` fills it."""
        self.low = torch.bfloat16 if dtype == "bf16" else None
        for name, p in model.named_parameters():
            if not p.is_floating_point():
                raise ConfigError(f"parallel: shard cannot spread {name} of type {p.dtype}; use parallel: replicate")
            p.data = p.data.to(torch.float32)
        # Modules are copied, tensors shared: FSDP then exchanges the copy's parameters and leaves the model's.
        shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        run = copy.deepcopy(model, shared)
        # Nothing here works in place on what the model returns, which torch cannot know.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        policy = MixedPrecisionPolicy(param_dtype=self.low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        loose = set(run.parameters(recurse=False))  # vectors of the model's own, such as newline: not every layout
        for block in blocks(run):  # uses them, so their gradients are summed by name
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        fully_shard(run, mesh=self.mesh, mp_policy=policy, ignored_params=loose)
        for p in loose:
            p.data = p.data.to(self.device)
        for name in ("embed_images", "embed_texts"):  # what two towers are run by, beside forward
            if hasattr(run, name):
                register_fsdp_forward_method(run, name)
        for module in run.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        for p in model.parameters():
            if p not in loose:
                p.data = torch.empty(0, dtype=p.dtype)
        if self.low is not None:
            run.register_forward_pre_hook(lambda _, given: (given[0].to(self.device, self.low), *given[1:]))
        self.model = run
        return run

    @torch.no_grad()
    def whole(self, model: nn.Module) -> nn.Module:
        """Fill the ordinary model, on the CPU, from the pieces of all ranks."""
        self.reshard()
        pieces = dict(self.model.named_parameters(remove_duplicate=False))
        filled: set[int] = set()
        with self.watchdog.waiting("gathering the model"):
            for name, p in model.named_parameters(remove_duplicate=False):
                if id(p) not in filled:  # shared ones once
                    filled.add(id(p))
                    p.data = whole(pieces[name].detach()).cpu()
                    p.grad = None
        self.model = None
        return model

    def reshard(self) -> None:
        """Let go of gathered weights, which the optimizer would leave behind and which may be in bfloat16."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def input_dtype(self, model: Any) -> torch.dtype:
        """The type that a gathered block computes in."""
        return self.low or torch.float32

    # ------------------------------------------------------------------------------------------------------ batches

    def told(self, batch: Batch | None) -> dict[str, Any]:
        """The kinds of media, and what is needed to run their parts without one."""
        return {kind: forms(media) for kind, media in (batch.media if batch is not None else {}).items()}

    def completed(self, spec: Spec, batch: Batch | None, turns: Sequence[Turn]) -> tuple[Spec, Batch | None]:
        """The batch with a medium nowhere of the kinds, and of the sizes that are encoded one after the other, which
        only others have; all kinds in one order.
        """
        self.watchdog.at(f"step {spec.step + 1}, micro-batch {spec.part + 1} of {spec.parts}", waits=True)
        wanted: dict[str, dict[tuple[int, ...], Form]] = {}
        for kind, found in (item for turn in turns for item in turn.media.items()):
            wanted[kind] = found | wanted.get(kind, {})
        batch = padding() if batch is None else batch
        media = {}
        for kind, sizes in sorted(wanted.items()):
            own = batch.media.get(kind)
            held = {layout.shape for layout in own.layouts} if own else set()
            others = [nowhere(sizes[size]) for size in sorted(sizes.keys() - held)]
            if not self.model.size_by_size:
                others = [] if own else others[:1]
            media[kind] = beside([own, *others] if own else others)
        batch.media = media
        return spec, batch

    # ---------------------------------------------------------------------------------------------------- gradients

    @torch.no_grad()
    def reduce(self, masters: Any) -> list[Tensor]:
        """FSDP has summed the pieces' gradients; those of loose parameters are summed here."""
        self.reshard()
        self.sum_gradients([p for p in masters.masters.values() if not isinstance(p, DTensor)])
        return [local(g) for g in masters.gradients()]

    @torch.no_grad()
    def norm(self, masters: Any) -> Tensor:
        """The norm ``[]`` over all ranks' pieces; what every rank holds whole is counted once."""
        square = torch.zeros((), device=self.device, dtype=torch.float64)
        for p in masters.masters.values():
            if isinstance(p, DTensor) and p.grad is not None:
                square += local(p.grad).double().square().sum()
        dist.all_reduce(square)
        for p in masters.masters.values():
            if not isinstance(p, DTensor) and p.grad is not None:
                square += p.grad.double().square().sum()
        return square.sqrt()


# ------------------------------------------------------------------------------------------------------------- tensors


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, sharing its memory; a tensor that is no piece is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: the members of the outermost lists of equal modules."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1:
            found.extend(m for m in module if any(True for _ in m.parameters()))
            return
        for child in module.children():
            visit(child)

    for room in ("encoders", "cross", "lm"):
        if hasattr(model, room):
            visit(getattr(model, room))
    return found


def write(path: Path, masters: Any, optimizer: torch.optim.Optimizer, group: Any) -> None:
    """Weights and moments in torch's distributed format: each rank writes its own pieces."""
    checkpoints.save(_values(masters, optimizer), checkpoint_id=path, process_group=group)


def read(path: Path, masters: Any, optimizer: torch.optim.Optimizer, group: Any) -> set[str]:
    """Fill masters and moments, pieces of any number of ranks or whole tensors; returns the names that were saved."""
    saved = checkpoints.FileSystemReader(path).read_metadata().state_dict_metadata
    names = {key.removeprefix("weights/") for key in saved if key.startswith("weights/")}
    if names != set(masters.masters):
        return names
    fused = bool(optimizer.defaults.get("fused"))
    for key in (key for key in saved if key.startswith("moments/")):
        name, _, kind = key.removeprefix("moments/").rpartition("/")
        p = masters.masters[name].detach()
        plain = torch.zeros((), device=p.device if fused else "cpu")  # the count of steps
        optimizer.state[masters.masters[name]][kind] = plain if kind == "step" else torch.zeros_like(p)
    values = _values(masters, optimizer)
    checkpoints.load(values, checkpoint_id=path, process_group=group, no_dist=group is None)
    return names


def _values(masters: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {f"weights/{name}": p.detach() for name, p in masters.masters.items()}
    for name, p in masters.masters.items():
        found |= {f"moments/{name}/{key}": value for key, value in optimizer.state.get(p, {}).items()}
    return found


Form = tuple[tuple[int, ...], Layout, int, int | None]


def forms(media: MediaBatch) -> dict[tuple[int, ...], Form]:
    """What another rank needs to run a kind's parts, for each size of its units: a unit's shape, the smallest medium,
    its tokens, the instruction's length.
    """
    instruction = None if media.cond is None else media.cond.ids.shape[1]
    sizes = {layout.shape for layout in media.layouts}
    found = {}
    for size in sizes:
        items = [i for i, layout in enumerate(media.layouts) if layout.shape == size]
        smallest = min(items, key=lambda i: media.counts[i])
        shape = size if len(sizes) > 1 else tuple(media.inputs.shape[1:])
        found[size] = (shape, media.layouts[smallest], media.counts[smallest], instruction)
    return found


def beside(parts: Sequence[MediaBatch]) -> MediaBatch:
    """Media of one kind as one batch: those with slots come first. Zeros fill up to the largest size."""
    first = parts[0]
    if len(parts) == 1:
        return first
    largest = [max(sides) for sides in zip(*(part.inputs.shape[1:] for part in parts), strict=True)]
    cond = None
    if first.cond is not None:
        conds = [part.cond for part in parts if part.cond is not None]
        length = [max(c.ids.shape[1] for c in conds)]
        ids, mask = (torch.cat([filled(t, length) for t in many]) for many in zip(*((c.ids, c.mask) for c in conds)))
        cond = Condition(ids, mask)
    return replace(
        first,
        inputs=torch.cat([filled(part.inputs, largest) for part in parts]),
        layouts=[layout for part in parts for layout in part.layouts],
        counts=[count for part in parts for count in part.counts],
        owners=[owner for part in parts for owner in part.owners],
        cond=cond,
    )


def filled(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows ``[N, ...]`` filled up with zeros to ``[N, *shape]``, behind what they hold."""
    found = rows.new_zeros(len(rows), *shape)
    corner: Any = (slice(None), *map(slice, rows.shape[1:]))
    found[corner] = rows
    return found


def nowhere(given: Form) -> MediaBatch:
    """A medium of zeros without slots: its vectors enter no sequence."""
    shape, layout, count, instruction = given
    cond = None
    if instruction is not None:
        ids = torch.zeros(1, instruction, dtype=torch.long)
        cond = Condition(ids, torch.ones_like(ids).bool())
    slots = torch.zeros(0, dtype=torch.long)
    return MediaBatch(torch.zeros(layout.units, *shape), [layout], slots, [count], [0], cond=cond)


def padding() -> Batch:
    """One row ``[1, 2]`` that belongs to no sample; its loss, of one target, is multiplied by 0: all parts are run, and
    nothing is learned.
    """
    ids = torch.zeros(1, 2, dtype=torch.long)
    one = torch.ones_like(ids)
    return Batch(ids, torch.arange(2).unsqueeze(0), one, one.bool(), ids=[""], sources=[""])
