"""Proof that a stage trains what its plan says, and nothing else.

    before step 1 → a mark of every tensor
    after the first step that moves → every trained tensor had a gradient and moved; every frozen one stands still
    at the end → the same again, and the table of it in the terminal, in ``proof.json`` and in the report

Between the first steps and the end a proof costs nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.errors import ChiasmError
from chiasm.train.marks import Mark, marks, not_finite, own
from chiasm.train.plan import part_of

PATIENCE = 2
"""Further steps for a gradient that is exactly 0: what stands behind a tensor that starts at 0 (LoRA's first factor
behind the second, a closed gate) has none until that tensor has moved."""


class ProofError(ChiasmError):
    """A run that does not train what it was told to train. Names the tensors and the remedy."""


@dataclass
class PartProof:
    """What is proved of the tensors of one part that the plan treats alike."""

    part: str
    plan: str  # train or freeze
    tensors: int = 0
    parameters: int = 0
    gradients: int = 0  # tensors that had a finite gradient other than 0
    changed: int = 0  # tensors whose bits are no longer those of the beginning
    unused: int = 0  # tensors that by design never run, so that no gradient can reach them
    without_effect: int = 0  # tensors that run but cancel out, so that their gradient is rounding alone
    smallest: float | None = None  # norm of the weakest gradient among those seen
    largest: float | None = None

    @property
    def holds(self) -> bool:
        """Whether all is as the plan says."""
        if self.plan == "freeze":
            return self.changed == 0
        used = self.tensors - self.unused - self.without_effect
        return self.gradients == used <= self.changed  # weight decay and rounding move the others too


@dataclass
class Report:
    """A stage's proof: ``proved``, ``failed``, or ``open`` where the run ended before something could show."""

    verdict: str
    step: int
    parts: list[PartProof]
    unused: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    open: dict[str, str] = field(default_factory=dict)  # tensor → why nothing is known of it
    first: int | None = None  # the step after which everything was proved for the first time

    def dump(self) -> dict[str, Any]:
        """As written to ``proof.json``."""
        return asdict(self) | {"parts": [asdict(p) | {"holds": p.holds} for p in self.parts]}


class Proof:
    """Watches one stage. ``trained`` are the tensors that the optimizer moves, by their names in the model.

    Call ``saw`` with the kinds of media of each batch, ``gradients`` before and ``stepped`` after each optimizer step,
    ``finish`` at the end. Raises ProofError, from ``stepped`` and ``finish``.
    """

    def __init__(
        self, stage: str, model: nn.Module, trained: Mapping[str, Tensor], epoch: int = 1, resumed: bool = False
    ):
        self.stage, self.model, self.trained = stage, model, dict(trained)
        self.epoch = epoch  # steps after which every sample was seen once
        self.resumed = resumed
        self.unused = {name for name in never_run(model) if name in self.trained}
        self.without_effect = {name for name in cancelling(model) if name in self.trained} - self.unused
        self.excused = self.unused | self.without_effect
        self.frozen = frozen_tensors(model, self.trained)
        self.before = marks({**self.trained, **self.frozen})
        self.norms: dict[str, float] = {}  # of the first gradient that was not 0
        self.pushed: set[str] = set()  # had such a gradient in a step that moved, so must have moved
        self.now: set[str] = set()  # have one in the step that comes
        self.zero: set[str] = set()  # had a gradient, but each of its values was 0
        self.kinds: set[str] = set()
        self.looked = False  # whether all values were once found to be numbers
        self.moving = 0  # steps that had a learning rate above 0
        self.first: int | None = None  # the step after which all was shown
        self.last: Report | None = None

    # ---------------------------------------------------------------------------------------------- while it runs

    @property
    def watching(self) -> bool:
        """Whether there is something left to be shown."""
        return self.first is None

    def saw(self, kinds: Iterable[str]) -> None:
        """The kinds of media that came."""
        self.kinds.update(kinds)

    @torch.no_grad()
    def gradients(self) -> None:
        """Look at the gradients of a whole step, before the optimizer uses them."""
        if not self.watching:
            return
        known = self.pushed | self.excused
        have = [n for n, p in self.trained.items() if n not in known and p.grad is not None]
        found = torch._foreach_norm([self.trained[n].grad.float() for n in have]) if have else []  # type: ignore[union-attr]
        whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in found]  # pieces on several ranks
        values = torch.stack([n.cpu() for n in whole]).tolist() if whole else []
        for name, norm in zip(have, values, strict=True):
            if norm > 0 and norm < float("inf"):
                self.norms.setdefault(name, norm)
                self.now.add(name)
                self.zero.discard(name)
            elif name not in self.norms:
                self.zero.add(name)

    def stepped(self, step: int, share: float) -> None:
        """After optimizer step ``step`` (from 1) at ``share`` of the learning rate. Raises ProofError."""
        if not self.watching:
            return
        if not self.looked:
            self.looked = True
            self._numbers(step)
        if share > 0:
            self.pushed |= self.now
            self.moving += 1
            if self.moving == 1:
                self._still(step)
        self.now = set()
        left = self._left()
        late = {n for n in left if self._overdue(n, step)}
        if late:
            raise ProofError(self._no_gradient(sorted(late), step))
        if self.moving and not left:
            self._moved(step)
            self.first = step

    def _left(self) -> list[str]:
        return [n for n in self.trained if n not in self.pushed and n not in self.excused]

    def _overdue(self, name: str, step: int) -> bool:
        if name in self.norms:
            return False  # it had one in a step of the warm-up that moved nothing, and the data since did not need it
        if self.resumed and self.moving < self.epoch:
            return False  # what was proved before the interruption is not asked for again at once
        if step >= self.epoch and self.moving > PATIENCE:
            return True  # every sample was seen once
        kinds = kinds_of(self.model, name)
        if kinds is None or (kinds and not kinds & self.kinds):
            return False  # nothing came that this tensor works on
        return self.moving > PATIENCE if name in self.zero else True

    def _no_gradient(self, names: list[str], step: int) -> str:
        kinds = kinds_of(self.model, names[0])
        if kinds and not kinds & self.kinds:
            why = f"no {' or '.join(sorted(kinds))} came in {step} steps: add such data, or freeze the part in the plan"
        elif names[0] in self.zero:
            why = "each value of their gradient is 0: a part between them and the loss multiplies by 0"
        else:
            why = (
                "the loss does not depend on them: a detach or no_grad stands between, requires_grad was switched off "
                "after the plan was applied, or they never run: repair the part, or freeze them in the plan"
            )
        return (
            f"stage {self.stage!r}, after step {step}: {len(names)} of {len(self.trained)} trained tensors had no "
            f"gradient ({_some(names)}): {why}"
        )

    def _numbers(self, step: int) -> None:
        """Weights that are no numbers need not show in the loss: torch's attention on the CPU turns NaN into 0."""
        tensors = {**self.trained, **self.frozen}
        bad = not_finite(tensors)
        if bad:
            count = int((~torch.isfinite(own(tensors[bad[0]]))).sum())
            raise ProofError(
                f"stage {self.stage!r}, after step {step}: {len(bad)} of {len(tensors)} tensors hold values that "
                f"are not finite ({_some(bad)}; {count} of {tensors[bad[0]].numel()} of the first), although the loss "
                "is: the weights are damaged; load them again, or start from an earlier checkpoint"
            )

    def _moved(self, step: int, now: Mapping[str, Mark] | None = None) -> None:
        now = now or marks({n: self.trained[n] for n in self.pushed})
        same = [n for n in self.trained if n in self.pushed and now[n] == self.before[n]]
        if same and not self.resumed:
            raise ProofError(
                f"stage {self.stage!r}, after step {step}: {len(same)} of {len(self.trained)} trained tensors had a "
                f"gradient but did not change ({_some(same)}): the optimizer does not hold them, or the learning rate "
                "is below the spacing of their numbers: raise it"
            )

    def _still(self, step: int, now: Mapping[str, Mark] | None = None) -> None:
        now = now or marks(self.frozen)
        moved = [n for n in self.frozen if now[n] != self.before[n]]
        if moved:
            raise ProofError(
                f"stage {self.stage!r}, after step {step}: {len(moved)} of {len(self.frozen)} frozen tensors changed "
                f"({_some(moved)}): something other than the plan writes them (an optimizer made elsewhere, "
                "statistics of a norm layer, an in-place operation): repair it, or train them in the plan"
            )

    # ---------------------------------------------------------------------------------------------- at the end

    def finish(self, step: int) -> Report:
        """The proof over the whole stage. Raises ProofError where a frozen tensor moved or a trained one did not; its
        ``report`` says the same as a table.
        """
        now = marks({**self.trained, **self.frozen})
        self.last = self.report(step, now)
        self._numbers(step)
        if self.moving:
            self._still(step, now)
            left = [n for n in self._left() if n not in self.norms]
            if self.watching and not self.resumed and self.moving > PATIENCE and left:
                raise ProofError(self._no_gradient(sorted(left), step))
            self._moved(step, now)
        return self.last

    def report(self, step: int, now: Mapping[str, Mark] | None = None) -> Report:
        """What is known now, without judging."""
        now = now or marks({**self.trained, **self.frozen})
        rows: dict[tuple[str, str], PartProof] = {}
        for name, tensor in {**self.trained, **self.frozen}.items():
            plan = "train" if name in self.trained else "freeze"
            row = rows.setdefault((part_of(name), plan), PartProof(part_of(name), plan))
            row.tensors += 1
            row.parameters += tensor.numel()
            row.changed += now[name] != self.before[name]
            row.unused += name in self.unused
            row.without_effect += name in self.without_effect
            norm = self.norms.get(name)
            if norm is not None:
                row.gradients += 1
                row.smallest = min(norm, row.smallest if row.smallest is not None else norm)
                row.largest = max(norm, row.largest if row.largest is not None else norm)
        left = {n: self._why_open(n) for n in self._left()}
        if not self.moving:
            left |= dict.fromkeys(self.norms, "every step had a learning rate of 0: set warmup_ratio to 0")
        parts = sorted(rows.values(), key=lambda r: (r.part, r.plan))
        verdict = "open" if left else "proved" if all(p.holds for p in parts) else "failed"
        return Report(verdict, step, parts, sorted(self.unused), sorted(self.without_effect), left, self.first)

    def _why_open(self, name: str) -> str:
        if not self.moving:
            return "every step had a learning rate of 0: set warmup_ratio to 0"
        if name in self.norms:
            return "it had gradients only while the learning rate was 0"
        kinds = kinds_of(self.model, name)
        if kinds and not kinds & self.kinds:
            return f"no {' or '.join(sorted(kinds))} came"
        return f"no gradient in {self.moving} steps, too few to judge"


def write(report: Report, path: Path) -> None:
    """``proof.json``, written aside and moved into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(report.dump(), indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


# ------------------------------------------------------------------------------------------------------------ tensors


def never_run(model: nn.Module) -> list[str]:
    """Parameters that by design have no part in the result, as their modules tell by a method ``unused() -> names``."""
    return _declared(model, "unused")


def cancelling(model: nn.Module) -> list[str]:
    """Parameters whose gradient is exactly 0 in theory though they run: their modules tell by ``without_effect()``.

    Softmax does not see a number that is added to all scores of a query, so a bias of attention's keys changes nothing.
    What such a parameter gets in practice is rounding, which may be 0: no proof can ask for it.
    """
    return _declared(model, "without_effect")


def _declared(model: nn.Module, by: str) -> list[str]:
    found = []
    for prefix, module in model.named_modules():
        tell = getattr(module, by, None)
        if callable(tell):
            found += [f"{prefix}.{name}" if prefix else name for name in tell()]
    return found


def moving(model: nn.Module) -> list[str]:
    """Buffers that training changes though nothing learns them (momentum copies, queues, running statistics)."""
    tell = getattr(model, "moving", None)
    return list(tell()) if callable(tell) else []


def frozen_tensors(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that must stand still: parameters outside the plan, and saved buffers of parts frozen whole."""
    frozen: dict[str, Tensor] = {n: p.data for n, p in model.named_parameters() if n not in trained}
    saved = set(model.state_dict(keep_vars=True)) - set(moving(model))
    for prefix, module in model.named_modules():
        below = f"{prefix}." if prefix else ""
        if any(name.startswith(below) for name in trained):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if below + name in saved:
                frozen[below + name] = buffer
    return frozen


def kinds_of(model: Any, name: str) -> set[str] | None:
    """The kinds of media a parameter works on; empty: on every sample; None: on some layouts only, so nothing is known.

    Told by the model's configuration; a model that has no ``media`` works on everything.
    """
    media = getattr(getattr(model, "config", None), "media", None)
    if not media:
        return set()
    room, _, rest = name.partition(".")
    own = rest.partition(".")[0]
    if room == "connectors":
        return {kind for kind, stream in media.items() if stream.connector == own}
    if room == "encoders":
        return {kind for kind, stream in media.items() if own in stream.encoders}
    if room == "cross":
        return set(media)
    return None if not rest else set()  # a vector of the model's own, such as newline


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
