"""The loop's lookout: proofs after the first steps and at the end, and the place where a number stopped being one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from chiasm.data.base import Example
from chiasm.data.loader import Spec, load
from chiasm.data.randomness import placed
from chiasm.errors import ChiasmError, DataError
from chiasm.train import proof
from chiasm.train.faults import first_bad
from chiasm.train.kept import check_reach
from chiasm.train.masks import check_masks
from chiasm.train.proof import Proof, ProofError, Report
from chiasm.types import Batch


class Watch:
    """Watches a ``StageRun``, whose masters are made and whose weights are those of the beginning.

    ``random`` names the parts that were drawn at random and never trained: a connector among them must not stay frozen
    while media pass through it. Raises ProofError, or tells it and goes on where the stage says ``proof: tell``.
    """

    def __init__(self, run: Any, resumed: bool, random: Collection[str] = ()):
        self.run, self.random = run, set(random)
        self.console: Console = run.console
        self.stop = run.stage.proof == "stop"
        check_reach(run.stage.table(), run.masters.masters)
        epoch = run.batches.steps_per_epoch
        self.proof = Proof(run.stage.name, run.model, run.masters.masters, epoch, resumed)
        self.read = False  # whether a batch's mask was read back
        self.said = False

    def batch(self, batch: Batch, spec: Spec) -> None:
        """A micro-batch, before it is used."""
        if not self.proof.watching and self.read:
            return
        self.proof.saw(batch.media)
        self._judged(lambda: self._connected(batch))
        if not self.read:
            self.read = True
            self._judged(lambda: self._masked(batch, spec))

    def gradients(self) -> None:
        """Before an optimizer step."""
        self.proof.gradients()

    def stepped(self, step: int, share: float) -> None:
        """After optimizer step ``step`` (from 1) at ``share`` of the learning rate."""
        if not self.proof.watching:
            return
        self._judged(lambda: self.proof.stepped(step, share))
        if self.proof.first is not None and not self.said:
            self.said = True
            own, still = len(self.proof.trained) - len(self.proof.excused), len(self.proof.frozen)
            self.console.print(
                f"Proof after step {step}: all {own} trained tensors had a gradient and moved, "
                f"all {still} frozen ones stand still",
                highlight=False,
            )

    def finish(self, step: int) -> Report:
        """The proof of the whole stage: into ``proof.json`` and the terminal."""
        try:
            self._judged(lambda: self.proof.finish(step))
        finally:
            report = self.proof.last or self.proof.report(step)
            self._write(report)
        print_proof(self.console, self.run.stage.name, report)
        return report

    def why(self, step: int, batch: Batch | None = None) -> str:
        """The first bad module of a micro-batch on the device, or of all those of step ``step`` (from 0)."""
        model, objective = self.run.model, self.run.objective
        try:
            if batch is not None:
                return first_bad(model, lambda: objective(model, batch).total)
            told = ""
            for _, made in load(self.run.batches, self.run.renderer, step, step + 1):
                if made is not None:
                    again = made.to(model.device, dtype=model.dtype)
                    told = first_bad(model, lambda again=again: objective(model, again).total)  # type: ignore[misc]
                    if "first bad" in told:
                        return told + f"; in the micro-batch of {', '.join(made.ids[:8])}"
            return told
        except (ChiasmError, RuntimeError) as error:
            return f"the first bad module was not found: {error}"

    @torch.no_grad()
    def culprits(self, step: int, ids: Collection[str]) -> list[str]:
        """Which of the samples ``ids`` of step ``step`` (from 0) give, each alone, a loss that is no number; none where
        all of them do.
        """
        run, found = self.run, []
        for spec in run.batches.specs(step, step + 1) if len(ids) > 1 else ():
            for place, ref in enumerate(spec.refs, spec.first):
                try:
                    with placed(run.batches.mixture.seed, "sample", step, place):
                        example = run.batches.mixture[ref]
                        if example.id not in ids:
                            continue
                        loss = run.objective(run.model, run.moved(run.renderer.batch([example])))
                except (ChiasmError, RuntimeError):
                    continue  # what fails otherwise says nothing about numbers
                if not torch.isfinite(loss.total.detach()):
                    found.append(example.id)
        return found if len(found) < len(ids) else []

    # ---------------------------------------------------------------------------------------------------- parts

    def _write(self, report: Report) -> None:
        if self.run.ranks.first:
            proof.write(report, Path(self.run.out) / "proof.json")

    def _judged(self, check: Any) -> None:
        try:
            check()
        except ProofError as error:
            if self.stop:
                self._write(self.proof.report(0))
                raise
            self.console.print(f"[bold red]Proof failed:[/] {error}", highlight=False, markup=True)
            self.proof.first = self.proof.first or 0  # told once

    def _connected(self, batch: Batch) -> None:
        """No picture may pass through a connector that is random and stays so."""
        media = getattr(self.run.model.config, "media", {})
        for kind in batch.media:
            stream = media.get(kind)
            part = f"connectors.{stream.connector}" if stream is not None and hasattr(stream, "connector") else ""
            rates = [rate for name, rate in self.run.plan.rates.items() if name.startswith(part + ".")]
            if part in self.random and rates and all(rate is None for rate in rates):
                raise ProofError(
                    f"stage {self.run.stage.name!r}: {part} is frozen at random values: none of its {len(rates)} "
                    f"tensors was loaded or trained before, so every {kind} comes through as noise; train it "
                    f"in the plan, or load it (model.weights.{part})"
                )

    def _masked(self, batch: Batch, spec: Spec) -> None:
        mixture = self.run.batches.mixture
        examples: dict[str, Example] = {}
        twice: set[str] = set()
        for ref in spec.refs:
            try:
                example = mixture[ref]
            except DataError:
                continue  # met, and judged, where the batch was made
            if example.id in examples:
                twice.add(example.id)
            examples[example.id] = example
        known = {id: example for id, example in examples.items() if id not in twice}
        check_masks(self.run.renderer.processor, batch, known, self.run.renderer.max_length)


def print_proof(console: Console, stage: str, report: Report) -> None:
    """The proof as a table: part, plan, tensors, gradients, changes."""
    style = {"proved": "green", "open": "yellow", "failed": "bold red"}[report.verdict]
    console.print(f"[bold]Proof of stage {stage}:[/] [{style}]{report.verdict}[/] after step {report.step}")
    table = Table(header_style="bold", box=None)
    for name in ("part", "plan"):
        table.add_column(name, no_wrap=True)
    for name in ("tensors", "gradient", "changed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("first gradients", no_wrap=True)  # the norms of the weakest and of the strongest
    for p in report.parts:
        gradients = f"{p.smallest:.1e} … {p.largest:.1e}" if p.smallest is not None else ""
        cells = [str(p.tensors), str(p.gradients) if p.plan == "train" else "", str(p.changed)]
        shade = ("" if p.plan == "train" else "dim") if p.holds else "red"
        table.add_row(p.part, p.plan, *cells, gradients, style=shade)
    console.print(table)
    for what, count in (("never run", "unused"), ("cancel out", "without_effect")):
        excused = ", ".join(f"{getattr(p, count)} of {p.part}" for p in report.parts if getattr(p, count))
        if excused:
            console.print(f"  trained tensors that by design {what}: {excused}", highlight=False)
    if report.open:
        name, why = next(iter(report.open.items()))
        console.print(f"  nothing is known of {len(report.open)} tensors, the first is {name}: {why}", highlight=False)
