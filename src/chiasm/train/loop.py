"""One stage of training: batches in, optimizer steps out.

    for each step: micro-batches → objective (sum, weight) → backward of the sum → divide by the whole step's weight
                   → clip → AdamW → log, held-out loss, checkpoint

The gradient is that of the mean over all target tokens of the step, however the step is cut into micro-batches. An
objective that compares samples with each other gets all micro-batches of a step at once: see ``together``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from chiasm.data.features import FeatureCache
from chiasm.data.loader import BatchPlan, Renderer, Spec, died, load
from chiasm.data.mixture import Mixture
from chiasm.data.quarantine import BadSamples, Skips
from chiasm.data.randomness import forked
from chiasm.errors import CheckpointError, ChiasmError, ConfigError, DataError
from chiasm.train import checkpoint, optim, speed, together, widths
from chiasm.train.best import Best
from chiasm.train.distributed import ALONE, Alone
from chiasm.train.heap import Heap, few_kernels
from chiasm.train.log import Bars, JsonLog, print_plan
from chiasm.train.objectives.base import Objective, StepObjective, objective
from chiasm.train.plan import Plan, apply, prepare, resolve, set_modes
from chiasm.train.recipe import Stage
from chiasm.train.sinks import Log, OpenSinks
from chiasm.train.usage import Usage, Waits
from chiasm.train.watch import Watch
from chiasm.types import Batch


class NotFinite(ChiasmError):
    """A loss or gradient that is no number. Names the step and the samples."""


@dataclass
class Tally:
    """Sums over the micro-batches of a step, or over the steps between two log lines."""

    total: float | Tensor = 0.0
    weight: float = 0.0
    samples: int = 0
    positions: int = 0
    parts: dict[str, tuple[float | Tensor, float | Tensor]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add another tally's sums."""
        self.total += other.total
        self.weight += other.weight
        self.samples += other.samples
        self.positions += other.positions
        for name, (total, weight) in other.parts.items():
            old = self.parts.get(name, (0.0, 0.0))
            self.parts[name] = (old[0] + total, old[1] + weight)
        self.ids += other.ids

    def kept(self) -> dict[str, Any]:
        """What a checkpoint keeps so that the next line of a resumed log is the same; counts for speed begin anew."""
        return {"total": float(self.total), "weight": float(self.weight), "parts": self.parts}

    def read(self) -> Tally:
        """The same in plain numbers: the one place where the host waits for the device's sums."""
        values = [self.total, *(value for pair in self.parts.values() for value in pair)]
        held = [v.detach().double() for v in values if isinstance(v, Tensor)]
        numbers = iter(torch.stack(held).tolist() if held else ())
        total, *rest = (next(numbers) if isinstance(v, Tensor) else v for v in values)
        parts = dict(zip(self.parts, zip(rest[::2], rest[1::2], strict=True), strict=True))
        return replace(self, total=total, parts=parts)

    def means(self) -> dict[str, float]:
        """The mean loss, that of each source where there are several, and what else the objective counts."""
        means = {name: float(total / weight) for name, (total, weight) in self.parts.items() if weight}
        sources = {f"loss/{name}": mean for name, mean in means.items() if name.startswith("source/")}
        others = {name: mean for name, mean in means.items() if not name.startswith("source/")}
        return {"loss": float(self.total / max(1.0, self.weight))} | (sources if len(sources) > 1 else {}) | others


@dataclass(frozen=True)
class Around:
    """What a stage is given by the run that it belongs to.

    ``random`` names the parts that were drawn at random and never trained; ``sinks`` opens where the log goes beside
    its file; ``best`` keeps the model of the lowest held-out loss.
    """

    seed: int = 0
    bad: BadSamples = field(default_factory=BadSamples)
    random: Collection[str] = ()
    sinks: OpenSinks = lambda start: ()
    ranks: Alone = ALONE
    best: Best | None = None


class StageRun:
    """Trains a model by one stage's configuration. ``fit`` returns the log; the model is changed in place.

    ``probe`` gives the held-out records (a dict of numbers) at every ``eval_every`` steps. Raises DataError,
    ConfigError and CheckpointError before the first step, NotFinite at the first loss or gradient that is no number.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        stage: Stage,
        mixture: Mixture,
        out: Path,
        probe: Callable[[], dict[str, float]] | None = None,
        console: Console | None = None,
        around: Around = Around(),
    ):
        self.model, self.renderer, self.stage, self.out, self.probe = model, renderer, stage, out, probe
        self.console, self.around = console or Console(), around
        self.seed, self.ranks = around.seed, around.ranks
        self.best = around.best if stage.eval_every and stage.keep_best else None
        self.objective: Objective = objective(stage.objective, renderer.processor)
        self.batches = BatchPlan(mixture.only(stage.data), stage.batch_size, stage.accumulate, stage.bucket)
        self.steps = stage.total_steps(self.batches.steps_per_epoch)
        self.plan: Plan = resolve(model, stage.table(), stage.lr, stage.layer_decay)
        self.low = torch.bfloat16 if stage.dtype == "bf16" and not self.ranks.sharded else None  # pieces are masters
        # What the objective keeps within bounds after each step (a contrastive scale).
        self.bounds = self.objective.bounds(model) if isinstance(self.objective, StepObjective) else {}
        self.log, self.usage, self.waits, self.heap = Log(), Usage(), Waits(), Heap()
        self.since = Tally()  # since the last line of the log

    def fit(self, resume: bool = False) -> None:
        """Run the stage from its first step, or from its newest checkpoint."""
        few_kernels()
        prepare(self.model, self.stage.table(), self.seed)
        apply(self.model, self.plan)
        mark = checkpoint.digest(self.model, self.plan.rates)
        self.ranks.alike("the weights", checkpoint.digest(self.model, dict.fromkeys(self.plan.rates)))
        ordinary, self.model = self.model, self.ranks.place(self.model, self.stage.dtype)
        if self.ranks.sharded and self.probe:
            self.probe.use(self.model)  # type: ignore[attr-defined]
        self.masters = optim.Masters(self.model, self.plan, self.low)
        self.optimizer = optim.optimizer(
            self.masters, self.plan, self.stage.optimizer, self.stage.weight_decay, self.stage.betas, self.stage.eps
        )
        self.agree = {"stage": self.stage.identity(), "steps": self.steps, "seed": self.seed, "frozen": mark}
        self.fills = self.stage.pack and widths.fills(self.model, self.low is not None)
        print_plan(self.console, self.stage.name, self.plan)
        folder = self.stage.feature_cache
        if folder and self.ranks.sharded:
            raise ConfigError("feature_cache needs the whole encoder on each rank; use parallel: replicate")
        self.features = FeatureCache(folder, self.model) if folder else None
        try:
            self._prepared(resume)
        except RuntimeError as error:  # torch tells that a worker died wherever the run is, also where it tidies up
            raise died(error, self.stage.workers) or error from None
        self.model = self.ranks.whole(ordinary).eval()
        if self.ranks.sharded and self.probe:
            self.probe.use(self.model)  # type: ignore[attr-defined]

    def _prepared(self, resume: bool) -> None:
        """The steps, with the model as the stage wants it; it is given back as it was."""
        try:
            speed.prepare(self.model, self.stage)
            # Dropout may draw from the global generators, on each rank another; the caller's are left as they were.
            with forked(*self.ranks.seeds(self.seed)):
                self.watch = Watch(self, resume, self.around.random)
                start = self._restore() if resume else self._fresh()
                if self.best:
                    self.best.begin(resume, self.ranks.first)
                if self.ranks.first:
                    self.log = Log(
                        JsonLog(self.out / "log.jsonl", start if resume else None), *self.around.sinks(start)
                    )
                self._run(start)
        finally:
            self.log.close()
            self.masters.restore()
            speed.settle(self.model)
            self.model.eval()

    def _run(self, start: int) -> None:
        most = self.around.bad.most(len(self.batches.mixture))
        name = "skipped.jsonl" if self.ranks.first else f".skipped.{self.ranks.rank}.jsonl"
        skips = Skips(self.out / name, most, start if start else None)
        renderer = self.features.renderer(self.renderer) if self.features else self.renderer
        made = load(
            *(self.batches, renderer, start, self.steps, self.stage.workers),
            skips=self.ranks.skips(skips),
            share=self.ranks.share,
        )
        clock = time.perf_counter()
        with closing(made), Bars(self.console, self.stage.name, self.steps, start) as bars:
            step_tally, held = Tally(), []
            for spec, batch, kinds in self.waits.over(self.ranks.stream(made)):
                self.watch.proof.saw(kinds)
                if isinstance(self.objective, StepObjective):
                    held.append((spec, batch))
                elif batch is not None:
                    step_tally.add(self.backward(batch, spec))
                if spec.part + 1 < spec.parts:
                    continue
                if held:
                    step_tally, held = self.backward_step(held), []
                step_tally = self.ranks.joined(step_tally.read())
                # A step whose samples were all skipped changes nothing.
                norm, share = self.update(spec.step, step_tally) if step_tally.ids else (0.0, 0.0)
                self.since.add(step_tally)
                step_tally, done = Tally(), spec.step + 1
                bars.advance(done)
                if done % self.stage.log_every == 0 or done == self.steps:
                    now = time.perf_counter()
                    bars.update(done, self._record(done, spec, self.since, norm, share, now - clock))
                    self.since, clock = Tally(), now
                pause = self._pause(done)
                clock, self.waits.paused = clock + pause, self.waits.paused + pause
        self.log.close()
        self.watch.finish(self.steps)
        if self.best and (told := self.best.told()):
            self.console.print(f"Stage {self.stage.name}: {told}", highlight=False, soft_wrap=True)
        self.console.print(f"Stage {self.stage.name}: {self.waits.told(self.stage.workers)}", highlight=False)
        if self.features:
            self.console.print(f"Stage {self.stage.name}: {self.features.told()}", highlight=False)

    def backward(self, batch: Batch, spec: Spec) -> Tally:
        """Gradients of one micro-batch's loss sum, added to those that are there. Raises NotFinite."""
        if any(batch.ids):
            self.watch.batch(batch, spec)
        batch = self.moved(batch)
        loss = self.objective(self.model, batch)
        total = loss.total.detach()
        if total.device.type == "cpu" and not math.isfinite(float(total)):  # accelerators are asked once a step
            raise NotFinite(self._not_finite(spec.step, f"the loss is {float(total)}", batch.ids, batch))
        if loss.total.requires_grad:
            (loss.total if any(batch.ids) else 0 * loss.total).backward()
            self.masters.collect()
        if not any(batch.ids):  # padding, so that this rank keeps in step
            return Tally()
        return Tally(total, loss.weight, len(batch.ids), batch.input_ids.numel(), dict(loss.parts), list(batch.ids))

    def backward_step(self, parts: list[tuple[Spec, Batch | None]]) -> Tally:
        """Gradients of a whole step's loss, for an objective that compares its samples. Raises NotFinite."""
        assert isinstance(self.objective, StepObjective)
        specs, batches = [s for s, _ in parts], [(s, b) for s, b in parts if b is not None]
        for spec, batch in batches:
            if any(batch.ids):
                self.watch.batch(batch, spec)
        placed = [lambda batch=batch: self.moved(batch) for _, batch in batches]  # type: ignore[misc]
        several = specs[0].parts > 1  # the same on all ranks
        loss = together.backward(self.objective, self.model, placed, several, self.ranks, self.masters.collect)
        tally = Tally(**together.counted(loss, [batch for _, batch in batches]))
        if not together.finite(loss.total):
            why = f"the loss is {float(loss.total)}"
            raise NotFinite(self._not_finite(specs[0].step, why, tally.ids, batches[0][1] if batches else None))
        return tally

    def moved(self, batch: Batch) -> Batch:
        """The batch where the model is, with stored features where they are kept, in one of few widths."""
        batch = batch.to(self.model.device, dtype=self.ranks.input_dtype(self.model))
        batch = widths.filled(batch) if self.fills else batch
        return self.features.fill(batch) if self.features else batch

    def update(self, step: int, tally: Tally) -> tuple[float, float]:
        """One optimizer step from the summed gradients. Returns the gradient norm and the schedule's share."""
        if tally.weight == 0:
            raise DataError(f"step {step + 1}: 0 target tokens in {len(tally.ids)} samples: {_some(tally.ids)}")
        if not math.isfinite(tally.total):
            raise NotFinite(self._not_finite(step, f"the loss is {tally.total}", tally.ids))
        gradients = self.ranks.reduce(self.masters)
        norm = optim.scale_and_clip(gradients, tally.weight, self.stage.max_grad_norm, self.ranks.norm(self.masters))
        if not math.isfinite(norm):
            raise NotFinite(self._not_finite(step, f"the gradient norm is {norm}", tally.ids))
        share = optim.factor(step, self.steps, self.stage.warmup_ratio, self.stage.schedule)
        optim.set_rates(self.optimizer, share)
        self.watch.gradients()
        self.optimizer.step()
        self.masters.hold(self.bounds)
        self.optimizer.zero_grad(set_to_none=True)
        self.masters.publish()
        self.watch.stepped(step + 1, share)
        self.heap.stepped()
        return norm, share

    def _record(self, done: int, spec: Spec, tally: Tally, norm: float, share: float, seconds: float) -> dict[str, Any]:
        steps = (done - 1) % self.stage.log_every + 1
        record = {"step": done, "epoch": spec.epoch, **tally.means()}
        record |= {"lr": self.stage.lr * share, "grad_norm": norm, "tokens": int(tally.weight)}
        record |= {"samples_per_s": tally.samples / seconds, "positions_per_s": tally.positions / seconds}
        record |= {"seconds_per_step": seconds / steps, "data_wait": self.waits.since() / seconds, **self.usage.read()}
        self.log.write(record)
        return record

    def _pause(self, done: int) -> float:
        """Held-out loss and checkpoint where they are due; returns the seconds they took."""
        begun = time.perf_counter()
        every = self.stage.eval_every
        record: dict[str, Any] = {}
        if self.probe and (done == self.steps or (every and done % every == 0)):
            self.model.eval()
            with forked(self.seed, "probe"):
                record = self.probe()
            if self.best and "held_out/loss" in record:
                record |= self.best.seen(done, record["held_out/loss"], self.masters, self.ranks)
            if record:  # without held-out data, nothing is known of an objective that the meter cannot read
                self.log.write({"step": done, **record})
            set_modes(self.model)
        if self.stage.save_every and done % self.stage.save_every == 0 and done < self.steps:
            state = self.agree | {"held_out": record.get("held_out/loss"), "since": self.since.kept()}
            folder, keep = self.out / "checkpoints", self.stage.keep_last
            checkpoint.save(folder, done, self.masters, self.optimizer, state, keep, self.ranks)
        return time.perf_counter() - begun

    def _fresh(self) -> int:
        if self.ranks.first:
            checkpoint.clean(self.out / "checkpoints")
        if checkpoint.checkpoints(self.out / "checkpoints"):
            raise CheckpointError(
                f"{self.out}: holds checkpoints of an earlier run; resume it, or give another 'out' folder"
            )
        return 0

    def _restore(self) -> int:
        if self.ranks.first:
            checkpoint.clean(self.out / "checkpoints")
        found = checkpoint.checkpoints(self.out / "checkpoints")
        if not found:
            return 0
        kept = json.loads((found[-1] / "state.json").read_text()).get("since", {})
        self.since = Tally(kept.get("total", 0.0), kept.get("weight", 0.0), parts=kept.get("parts", {}))
        return checkpoint.restore(found[-1], self.masters, self.optimizer, self.agree, self.ranks)

    def _not_finite(self, step: int, what: str, ids: list[str], batch: Batch | None = None) -> str:
        alone = ""
        if self.ranks.sharded:
            why = "the first bad module is sought by one rank alone"
        else:
            why = self.watch.why(step, batch)
            if not isinstance(self.objective, StepObjective) and (found := self.watch.culprits(step, ids)):
                alone = f", of which {_some(found)} alone would do it"
        return (
            f"stage {self.stage.name!r}, step {step + 1}: {what}; samples: {_some(ids)}{alone}; {why}. "
            "Look at these samples, lower the learning rate, or use float32"
        )


def _some(ids: list[str], most: int = 8) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
