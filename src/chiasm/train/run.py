"""A whole run: model, data, stages, held-out evaluation, report. Everything that can be refused is, before step 1."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from torch import Tensor

from chiasm import registry
from chiasm.convert.io import write_json
from chiasm.data.augmented import AugmentedRenderer
from chiasm.data.check import Checked, check
from chiasm.data.loader import BatchPlan, Renderer
from chiasm.data.mixture import Mixture
from chiasm.errors import DataError
from chiasm.eval.pairs import check_pairs, compares
from chiasm.eval.runner import question
from chiasm.eval.write import evaluate_recipe, write_run_report
from chiasm.train import disk
from chiasm.train.best import Best
from chiasm.train.distributed import ALONE, Alone, started
from chiasm.train.earlier import DONE, Earlier
from chiasm.train.kept import check_saved, through_merge
from chiasm.train.live import LivePage
from chiasm.train.log import terminal
from chiasm.train.loop import Around, StageRun
from chiasm.train.methods.settle import settle
from chiasm.train.methods.table import skeleton
from chiasm.train.model import best_device, open_model, random_parts, trained_parts
from chiasm.train.objectives import objective
from chiasm.train.plan import prepare as put
from chiasm.train.plan import quantises, resolve, settled
from chiasm.train.probe import Probe
from chiasm.train.recipe import Recipe, Stage
from chiasm.train.sinks import Sink, open_sinks
from chiasm.train.ways import staged


def train(
    recipe: Recipe, vlm: Any = None, resume: bool = False, console: Console | None = None, force: bool = False
) -> Any:
    """Run a recipe's stages and its evaluation; returns the trained VLM, in eval mode.

    ``vlm`` is trained instead of the model that the recipe names. ``resume`` goes on from the newest checkpoint in
    ``recipe.out``: finished stages are loaded, not run again. ``force`` removes what another recipe left there. Raises
    ConfigError, DataError and CheckpointError before the first step, NotFinite at the first loss that is no number.

    Under ``torchrun`` all processes call this alike; rank 0 tells and writes.
    """
    with started(best_device(recipe.device), recipe.parallel, recipe.patience) as ranks:
        run = Run(recipe, vlm, console or terminal(quiet=not ranks.first), ranks, resume, force)
        return _train(run, resume)


def _train(run: Run, resume: bool) -> Any:
    try:
        with disk.telling(run.out, [stage.name for stage in run.recipe.stages]):
            run.prepare()
            for stage in run.recipe.stages:
                run.stage(stage, resume)
            run.evaluate()
    except BaseException as error:
        run.show("stopped", str(error) or type(error).__name__)
        raise
    run.show("finished")
    return run.vlm


class Run:
    """The state of a run: its model, its data and where results go.

    ``resume``, ``force``: what is done with an earlier run in the same folder. Raises what ``train`` raises.
    """

    def __init__(
        self,
        recipe: Recipe,
        vlm: Any,
        console: Console,
        ranks: Alone = ALONE,
        resume: bool = False,
        force: bool = False,
    ):
        self.recipe, self.console, self.ranks = recipe, console, ranks
        self.device = best_device(recipe.device)
        self.home = "cpu" if ranks.sharded else self.device  # where the model is while it is not trained
        self.out = Path(recipe.out)
        disk.check(self.out, [stage.name for stage in recipe.stages])
        self.page: LivePage | None = None
        recipe.log.check()
        for stage in recipe.stages:
            objective(stage.objective)
        out = recipe.left_out()
        self.mixture = Mixture(recipe.data, recipe.seed, out, recipe.mixing)
        self.held_out = Mixture(recipe.held_out, recipe.seed, out and out.held_out()) if recipe.held_out else None
        for entry in recipe.held_out.values():
            registry.get("metric", entry.metric)
        self.earlier, self.force, self.given = Earlier(recipe, self.mixture), force, vlm is not None
        self.earlier.check(resume, force)
        self.vlm = vlm if vlm is not None else open_model(recipe.model, recipe.seed, self._opened_on())
        self.random = random_parts(recipe.model, self.vlm.model) if vlm is None else set()
        self.base = recipe.model.folder  # where the weights that a stage begins with are saved, if they are

    def prepare(self) -> None:
        """Every stage's plan and steps, and the samples of every stage's sources, looked at before the first step."""
        steps: list[int] = []
        shapes, largest = skeleton(self.vlm.model), 0
        for stage in self.recipe.stages:
            plan = resolve(shapes, stage.table(), stage.lr, stage.layer_decay)
            whole = sum(row.parameters for row in plan.rows if "4 bits" not in row.action)
            largest = max(largest, 4 * whole, 12 * plan.trainable if stage.save_every else 0)
            settled(shapes, stage.table())
            mixture = self.mixture.only(stage.data)
            steps.append(stage.total_steps(BatchPlan(mixture, stage.batch_size, stage.accumulate).steps_per_epoch))
            with self.console.status(f"looking at the samples of stage {stage.name}"):
                found = check(mixture, self._renderer(stage), stage.check_samples, bad=self.recipe.bad)
            self.console.print(_told(stage, found), highlight=False, soft_wrap=True)
        if self.held_out:
            examples = [self.held_out[ref] for ref in self.held_out.first(self.recipe.eval.limit)]
            if compares(self.vlm):
                check_pairs(examples, self.recipe.held_out)
            else:
                for example in examples:
                    question(example)
            check(self.held_out, Renderer(self.vlm.processor), self.recipe.eval.loss_samples)
        disk.room(self.out, largest, "a checkpoint of the largest stage, or its model,")
        self.ranks.wait("the beginning of the run")  # all have looked at what an earlier run left
        if self.ranks.first:
            self._begin(steps)

    def _begin(self, steps: list[int]) -> None:
        """The run's folder, its recipe, and its live page where that is asked for."""
        if self.force:
            self.earlier.remove()
        self.out.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.recipe.dump(), sort_keys=False, allow_unicode=True)
        (self.out / "recipe.yaml").write_text(text, encoding="utf-8")
        if (seconds := self.recipe.log.seconds) is not None:
            stages = [(s.name, n, s.dump()) for s, n in zip(self.recipe.stages, steps, strict=True)]
            self.page = LivePage(self.out, self.recipe.name, stages, seconds)
            self.console.print(f"Live page: {self.page.show('running')}", highlight=False, soft_wrap=True)

    def _opened_on(self) -> str:
        """Where the model is read: on the CPU if the first stage quantises it, for it may fit nowhere else before."""
        return "cpu" if quantises(self.recipe.stages[0].table()) else self.home

    def stage(self, stage: Stage, resume: bool) -> None:
        """Run a stage, or load its result where it was finished before."""
        folder = self.out / stage.name
        done = folder / DONE
        first = stage is self.recipe.stages[0] and not self.given
        if resume and done.is_file():
            from chiasm.vlm import load

            if first:
                self.earlier.began_with(stage, self.vlm.model)
            self.base = json.loads(done.read_text())["model"]
            if self.ranks.first:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a kill may have come between the two
            self.vlm = load(self.base, device=self.home)
            self.random -= trained_parts(resolve(self.vlm.model, stage.table(), stage.lr))
            self.console.print(f"Stage {stage.name} was finished before; its model is loaded", highlight=False)
            return
        self.ranks.wait(f"the beginning of stage {stage.name}")
        if self.ranks.first:
            self.earlier.unfinish(stage)
            self.earlier.begin(stage, self.vlm.model if first else None)
        renderer = self._renderer(stage)
        if quantises(stage.table()):
            put(self.vlm.model, stage.table(), self.recipe.seed)
            self.vlm.to(self.home)
        run = StageRun(
            *(self.vlm.model, renderer, stage, self.mixture, folder),
            probe=self._probe(renderer, stage),
            console=self.console,
            around=Around(
                *(self.recipe.seed, self.recipe.bad, self.random),
                sinks=lambda start: self._sinks(stage, folder, start),
                ranks=self.ranks,
                best=Best(folder / "best", lambda path, tensors, step: self._keep(stage, path, tensors, step)),
            ),
        )
        run.fit(resume)
        self.random -= trained_parts(run.plan)
        if run.probe and (told := run.probe.told()):  # type: ignore[attr-defined]
            self.console.print(told, highlight=False)
        last = stage.name == self.recipe.stages[-1].name
        model = self.out / "model" if last else folder / "model"
        event = f"stage {stage.name}: {run.steps} steps of {run.batches.per_step} samples, recipe {self.recipe.hash()}"
        self.vlm.config = self.vlm.config.model_copy(update={"provenance": self.vlm.config.provenance.add(event)})
        with TemporaryDirectory() as elsewhere:  # every rank merges, the first writes
            adapter = folder / "adapter" if self.ranks.first else Path(elsewhere)
            learned = [name for name, rate in run.plan.rates.items() if rate is not None]
            with through_merge(self.vlm.model, learned, moved=run.watch.proof.first is not None):
                told = settle(self.vlm, run.plan, adapter, self.base)
        if told:
            self.console.print(f"Stage {stage.name}: {told}", highlight=False, soft_wrap=True)
        self.base = str(model)
        if self.ranks.first:
            self._save(stage, run, model, folder)
        self.ranks.wait(f"the model of stage {stage.name}")

    def _keep(self, stage: Stage, path: Path, tensors: Mapping[str, Tensor], step: int) -> None:
        """Write the model as it is after a step."""
        event = f"stage {stage.name}: the lowest held-out loss, after step {step}, recipe {self.recipe.hash()}"
        config = self.vlm.config.model_copy(update={"provenance": self.vlm.config.provenance.add(event)})
        type(self.vlm)(config, self.vlm.model, self.vlm.processor).save(path, tensors=tensors)

    def _save(self, stage: Stage, run: StageRun, model: Path, folder: Path) -> None:
        """What a finished stage leaves in its folder."""
        self.vlm.save(model)
        check_saved(self.vlm.model, model)
        (folder / "plan.json").write_text(json.dumps([vars(row) for row in run.plan.rows], indent=1))
        best = {"best": run.best.known} if run.best and run.best.known else {}
        write_json(folder / DONE, {"model": str(model), "steps": run.steps, **best})
        shutil.rmtree(
            folder / "checkpoints", ignore_errors=True
        )  # the stage can no longer be resumed, only its model used
        self.console.print(f"Stage {stage.name} done: model in {model}", highlight=False)

    def show(self, state: str, why: str = "") -> None:
        """Write the live page, where there is one."""
        if self.page is not None:
            with contextlib.suppress(OSError):  # a page is no reason to stop, nor to hide why the run did
                self.page.show(state, why)

    def _sinks(self, stage: Stage, folder: Path, start: int) -> list[Sink]:
        found = open_sinks(self.recipe.log, self.recipe.name, stage.name, folder, stage.dump(), start)
        return [*found, self.page] if self.page is not None else found

    def evaluate(self) -> None:
        """The held-out evaluation of the last model, and the report of the run."""
        self.vlm.to(self.device)
        if self.held_out:
            ranks = self.ranks if self.ranks.count > 1 else None
            self.comparison = evaluate_recipe(self.vlm, self.recipe, self.out, console=self.console, ranks=ranks)
        elif self.ranks.first:
            path = write_run_report(self.recipe, self.out, None)
            self.console.print(f"Report: {path}", highlight=False, soft_wrap=True)

    def _renderer(self, stage: Stage) -> Renderer:
        """The stage's own template and processing; the saved model keeps its own."""
        processor = staged(self.vlm.processor, stage)
        if stage.augment is not None:
            return AugmentedRenderer(processor, stage.augment, stage.max_length, stage.pack)
        return Renderer(processor, stage.max_length, stage.pack)

    def _probe(self, renderer: Renderer, stage: Stage) -> Probe:
        """Over held-out examples; where there are none, over training data, for the meter alone."""
        mixture = self.held_out or self.mixture.only(stage.data)
        examples = []
        for s, i in mixture.order(0)[: self.recipe.eval.loss_samples].tolist():
            try:
                examples.append(mixture[s, i])
            except DataError:
                if self.held_out:
                    raise
        seen = self.held_out is None
        made = objective(stage.objective, renderer.processor)
        return Probe(self.vlm.model, renderer, made, examples, stage.batch_size, seen)


def _told(stage: Stage, found: Checked) -> str:
    usable = f"{found.bad} of them will be skipped" if found.bad else "all can be used"
    if found.cut:
        limit = f"max_length {stage.max_length}" if stage.max_length is not None else "the model's max_length"
        usable += f", {found.cut} without their ends, which are beyond {limit} by up to {found.lost} tokens"
    return (
        f"Stage {stage.name}: {found.samples} of {found.of} samples looked at, {usable}; "
        f"{found.mean_length:.0f} tokens each, {found.mean_targets:.0f} of them learned; "
        f"the longest has {found.longest} ({found.longest_id})"
    )
