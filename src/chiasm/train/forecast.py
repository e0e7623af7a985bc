"""How much memory a stage will need, found by running one step without memory.

The model's shapes (tensors on the ``meta`` device) go through forward, loss and backward with the longest sample, while
a counter follows what is alive at each moment. Nothing is estimated per layer, so methods, frozen parts and any
composition are counted as they are. Attention is counted as the fused kernels do it: its matrix is never stored.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.checkpoints.hub import local_folder
from chiasm.data.loader import Renderer
from chiasm.data.mixture import Mixture
from chiasm.fusion.splice import labelled
from chiasm.nn.again import computed_again_in
from chiasm.train.methods.table import skeleton
from chiasm.train.model import built_config
from chiasm.train.objectives.base import Objective, StepObjective, objective
from chiasm.train.objectives.cross_entropy import cross_entropy
from chiasm.train.objectives.next_token import next_token
from chiasm.train.plan import Action, Plan, apply, prepare, resolve, settled
from chiasm.train.recipe import Recipe, Stage
from chiasm.train.shapes import Mixed, counters_kept, words_kept
from chiasm.train.speed import parts
from chiasm.train.together import joined
from chiasm.train.ways import open_processor, staged
from chiasm.types import Batch, Sample
from chiasm.vlm import build, read_config


@dataclass(frozen=True)
class Forecast:
    """Bytes. ``activations`` is what forward, loss and backward need at the worst moment beside all that stays."""

    weights: int  # of the model, in the type it computes in
    masters: int  # float32 copies; 0 where the model is in float32 itself
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.masters + self.optimizer + max(self.gradients, self.activations)

    def table(self) -> list[tuple[str, int]]:
        """Its rows."""
        return [
            ("weights", self.weights),
            ("float32 masters", self.masters),
            ("optimizer", self.optimizer),
            ("gradients", self.gradients),
            ("activations and gradients at the worst moment", self.activations),
            ("peak", self.total),
        ]


def forecast(
    model: nn.Module,
    table: Mapping[str, Action],
    batch: Batch,
    dtype: str = "float32",
    accumulate: int = 1,
    recompute: bool = False,
    objective: Objective = next_token,
) -> Forecast:
    """What a step on ``batch`` needs, when ``model`` (with memory or without) is trained by this plan's table.

    ``dtype``, ``recompute`` and ``objective`` are the stage's; ``accumulate`` over 1 keeps gradients while further
    micro-batches run. Raises RuntimeError where a part reads numbers that are not there.
    """
    shapes: Any = skeleton(model)
    prepare(shapes, table)
    plan = resolve(shapes, table, 1.0)
    apply(shapes, plan)
    for part in parts(shapes):
        part.recompute = recompute
    low = torch.bfloat16 if dtype == "bf16" else torch.float32
    for p in shapes.parameters():
        p.data = p.data.to(low)
    tensors = {id(t): t for t in [*shapes.parameters(), *shapes.buffers()]}
    trained = sum(p.numel() for p in shapes.parameters() if p.requires_grad)
    copies = sum(t.numel() for t in shapes.parameters()) if low is torch.bfloat16 else 0
    kept = 4 * trained if accumulate > 1 else 0
    return Forecast(
        weights=sum(t.nbytes for t in tensors.values()),
        masters=4 * (copies if _device(model) == "cpu" else trained) if copies else 0,
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=kept + _peak(shapes, batch, low, objective, accumulate),
    )


@dataclass(frozen=True)
class Foreseen:
    """A stage before it runs. ``memory`` is None where ``why`` says."""

    stage: Stage
    plan: Plan
    memory: Forecast | None
    why: str
    looked: int
    longest: int
    longest_id: str


def foresee(recipe: Recipe, samples: int = 1000) -> Iterator[Foreseen]:
    """Each stage of a recipe: its plan, and the memory of a batch like the longest of the first ``samples``.

    No weights are read or made. Raises ConfigError, DataError and CheckpointError as training would.
    """
    processor = open_processor(recipe.model)
    config = read_config(local_folder(recipe.model.folder)) if recipe.model.folder else built_config(recipe.model)
    model = build(config.model_copy(update={"weights": {}, "tokenizer": None}), device="meta").model
    mixture = Mixture(recipe.data, recipe.seed, recipe.left_out())
    for stage in recipe.stages:
        renderer = Renderer(staged(processor, stage), stage.max_length, stage.pack)
        batch, longest, looked = longest_batch(renderer, mixture.only(stage.data), stage.batch_size, samples)
        plan = resolve(model, stage.table(), stage.lr)
        memory, why = None, ""
        try:
            loss = objective(stage.objective, processor)
            memory = forecast(model, stage.table(), batch, stage.dtype, stage.accumulate, stage.recompute, loss)
        except (RuntimeError, NotImplementedError) as error:  # a part that reads numbers while it runs
            why = f"a part cannot run without numbers ({str(error).splitlines()[0]})"
        yield Foreseen(stage, plan, memory, why, looked, len(longest), longest.id)
        settled(model, stage.table())


def longest_batch(renderer: Renderer, mixture: Mixture, size: int, samples: int) -> tuple[Batch, Sample, int]:
    """A batch of ``size`` like the longest of the first ``samples``, that sample, and how many were looked at."""
    refs = mixture.first(max(1, samples // len(mixture.sources)))
    longest = max((renderer.sample(mixture[ref]) for ref in refs), key=len)
    return renderer.collate([replace(longest, media=list(longest.media)) for _ in range(size)]), longest, len(refs)


def step_peak(shapes: Any, batch: Batch, dtype: torch.dtype) -> int:
    """The most bytes alive during forward, loss and backward of a model on ``meta``, without the model itself."""
    targets = len(labelled(batch)[0])
    empty = batch.to("meta", dtype=dtype)
    with Alive() as alive, _Fused(), computed_again_in(_Fused):
        hidden = shapes(empty, logits=None).hidden  # [B, T, D]
        states = hidden.flatten(0, 1)[:targets]  # [n, D]
        total, _ = cross_entropy(states, torch.empty(targets, dtype=torch.long, device="meta"), shapes.lm.head)
        del hidden, states
        if total.requires_grad:
            total.backward()
        del total
    for p in shapes.parameters():
        p.grad = None
    return alive.peak


def _peak(shapes: Any, batch: Batch, dtype: torch.dtype, objective: Objective, accumulate: int) -> int:
    if objective is next_token:
        return step_peak(shapes, batch, dtype)
    return objective_peak(shapes, batch, dtype, objective, accumulate)


def objective_peak(shapes: Any, batch: Batch, dtype: torch.dtype, objective: Objective, accumulate: int) -> int:
    """As ``step_peak``, for any objective. Where samples of several micro-batches are compared, the rows of all of them
    are there while one of them runs, as in ``chiasm.train.together``.
    """
    counters_kept(shapes)
    given = words_kept(batch, dtype)
    with Alive() as alive, Mixed(), _Fused(), computed_again_in(_Fused):
        if not isinstance(objective, StepObjective) or accumulate == 1:
            _slopes(objective(shapes, given).total)
        else:
            with torch.no_grad():
                once = objective.embed(shapes, given)
            rows = joined([once] * accumulate)
            _slopes(objective.compare(shapes, rows).total)
            again = objective.embed(shapes, given)
            learned = {name: v for name, v in again.vectors.items() if v.requires_grad}
            torch.autograd.backward(list(learned.values()), [rows.vectors[n][: len(v)] for n, v in learned.items()])
            del again, learned, rows, once
    for p in shapes.parameters():
        p.grad = None
    return alive.peak


def _slopes(total: Tensor) -> None:
    if total.requires_grad:
        total.backward()


class Alive(TorchDispatchMode):
    """Follows the bytes of tensors made inside: ``now`` alive, ``peak`` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[weakref.ref[Any], int] = {}
        self._here: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; note what storage its result has."""
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._here:
                self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        size, place = storage.nbytes(), storage._cdata

        def gone(_: Any) -> None:
            self.now -= size
            self._here.discard(place)
            self._known.pop(ref, None)

        ref = weakref.ref(storage, gone)
        self._known[ref] = size
        self._here.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Fused(TorchFunctionMode):
    """Attention that keeps its inputs, its output and one number a row, as fused kernels do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace attention, run everything else."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            added = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if added is None or not added.requires_grad:  # where a bias is learned, no fused kernel runs
                return _Attention.apply(*args[:3])
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """The shapes of attention and of its gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [B, H, T, Dh]``, ``k`` and ``v`` ``[B, H, L, Dh]`` → ``[B, H, T, Dh]``."""
        y = q.new_empty(*q.shape[:-1], v.shape[-1])  # [B, H, T, Dh]
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """Slopes of the shapes of ``q``, ``k`` and ``v``."""
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type
