"""Proof that a stage trains what its plan says, and nothing else.

    before step 1 → a mark of every tensor
    after the first step that moves → every trained tensor had a gradient and moved; every frozen one stands still
    at the end → the same again, and the table of it in the terminal, in ``proof.json`` and in the report

A mark is two integer sums over a tensor's bits: exact, so that the smallest change of one number shows, and as cheap as
reading the tensor once. Between the first steps and the end a proof costs nothing.
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
from chiasm.train.faults import finite
from chiasm.train.plan import part_of

Mark = tuple[int, int]

PATIENCE = 2
"""Further steps for a gradient that is exactly 0: what stands behind a tensor that starts at 0 (LoRA's first factor
behind the second, a closed gate) has none until that tensor has moved."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW, _CHUNK = 1024, 1 << 22


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
    smallest: float | None = None  # norm of the weakest gradient among those seen
    largest: float | None = None

    @property
    def holds(self) -> bool:
        """Whether all is as the plan says."""
        if self.plan == "freeze":
            return self.changed == 0
        used = self.tensors - self.unused
        return self.gradients == used <= self.changed  # weight decay moves unused ones too


@dataclass
class Report:
    """A stage's proof: ``proved``, ``failed``, or ``open`` where the run ended before something could show."""

    verdict: str
    step: int
    parts: list[PartProof]
    unused: list[str] = field(default_factory=list)
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
        self.frozen = frozen_tensors(model, self.trained)
        self.before = marks({**self.trained, **self.frozen})
        self.norms: dict[str, float] = {}  # of the first gradient that was not 0
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
        have = [n for n, p in self.trained.items() if n not in self.norms and p.grad is not None]
        found = torch._foreach_norm([self.trained[n].grad.float() for n in have]) if have else []  # type: ignore[union-attr]
        whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in found]  # pieces on several ranks
        values = torch.stack([n.cpu() for n in whole]).tolist() if whole else []
        for name, norm in zip(have, values, strict=True):
            if norm > 0 and norm < float("inf"):
                self.norms[name] = norm
                self.zero.discard(name)
            else:
                self.zero.add(name)

    def stepped(self, step: int, share: float) -> None:
        """After optimizer step ``step`` (from 1) at ``share`` of the learning rate. Raises ProofError."""
        if not self.watching:
            return
        if not self.looked:
            self.looked = True
            self._numbers(step)
        if share > 0:
            self.moving += 1
            if self.moving == 1:
                self._still(step)
        left = self._left()
        late = {n for n in left if self._overdue(n, step)}
        if late:
            raise ProofError(self._no_gradient(sorted(late), step))
        if self.moving and not left:
            self._moved(step)
            self.first = step

    def _left(self) -> list[str]:
        return [n for n in self.trained if n not in self.norms and n not in self.unused]

    def _overdue(self, name: str, step: int) -> bool:
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
            count = int((~torch.isfinite(_own(tensors[bad[0]]))).sum())
            raise ProofError(
                f"stage {self.stage!r}, after step {step}: {len(bad)} of {len(tensors)} tensors hold values that "
                f"are not finite ({_some(bad)}; {count} of {tensors[bad[0]].numel()} of the first), although the loss "
                "is: the weights are damaged; load them again, or start from an earlier checkpoint"
            )

    def _moved(self, step: int, now: Mapping[str, Mark] | None = None) -> None:
        now = now or marks({n: self.trained[n] for n in self.norms})
        same = [n for n in self.norms if now[n] == self.before[n]]
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
            if self.watching and not self.resumed and self.moving > PATIENCE and (left := self._left()):
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
        return Report(verdict, step, parts, sorted(self.unused), left, self.first)

    def _why_open(self, name: str) -> str:
        if not self.moving:
            return "every step had a learning rate of 0: set warmup_ratio to 0"
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
    found = []
    for prefix, module in model.named_modules():
        tell = getattr(module, "unused", None)
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


@torch.no_grad()
def marks(tensors: Mapping[str, Tensor]) -> dict[str, Mark]:
    """The mark of each tensor; of one in pieces on several ranks, the sum over them, so that all ranks see the same.

    One transfer from the device for all of them.
    """
    found: list[Tensor] = []
    for tensor in tensors.values():
        found += _mark(_own(tensor))
    if not found:
        return {}
    devices: dict[torch.device, list[int]] = {}
    for i, value in enumerate(found):
        devices.setdefault(value.device, []).append(i)
    numbers = [0] * len(found)
    for places in devices.values():
        together = torch.stack([found[i] for i in places])
        if any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
            torch.distributed.all_reduce(together)
        for i, value in zip(places, together.tolist(), strict=True):
            numbers[i] = value
    return {name: (numbers[2 * i], numbers[2 * i + 1]) for i, name in enumerate(tensors)}


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating tensors that hold a value which is no finite number."""
    floats = {name: _own(t) for name, t in tensors.items() if t.is_floating_point()}
    if not floats:
        return []
    # a sum of absolute values is finite unless a value is not, or it overflows; only then is each value looked at
    sums = torch.stack(
        [t.abs().sum(dtype=torch.float64 if t.device.type != "mps" else None).cpu() for t in floats.values()]
    )
    pieces = any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
    if pieces:
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, sums)
        sums = torch.stack(gathered).sum(0)
    odd = (~torch.isfinite(sums)).tolist()
    return [name for name, o in zip(floats, odd, strict=True) if o and (pieces or not finite(floats[name]))]


def _own(tensor: Tensor) -> Tensor:
    """This rank's piece of a tensor; the tensor itself where it is whole."""
    local = getattr(tensor, "to_local", None)
    return (local() if local is not None else tensor).detach()


def _mark(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The sum ``[]`` of a tensor's numbers read as integers, and the same weighted by their column, in int64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.contiguous().reshape(-1).view(_BITS[tensor.element_size()])  # [n]
    weights = torch.arange(1, _ROW + 1, device=flat.device)
    plain, weighted = torch.zeros((), dtype=torch.int64, device=flat.device), 0
    for piece in flat.split(_CHUNK):
        whole = len(piece) // _ROW * _ROW
        columns = piece[:whole].view(-1, _ROW).sum(0, dtype=torch.int64)  # [1024]
        rest = piece[whole:].to(torch.int64)
        columns[: len(rest)] += rest
        plain = plain + columns.sum()
        weighted = weighted * 31 + (columns * weights).sum()
    return plain, torch.as_tensor(weighted, device=flat.device)


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
