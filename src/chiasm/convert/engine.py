"""The strict loader: every tensor of the file is used, every tensor of the model filled, shapes equal, numbers finite.

What does not hold is collected and raised as one ``CheckpointError``. Shapes are compared before anything is read, by
running the rules on tensors of the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from chiasm.convert.io import Weights, fail
from chiasm.convert.rules import AnyRule, Plan, Step, plan_export, plan_import
from chiasm.errors import CheckpointError

SHOWN = 4  # names given of each kind of problem
REMEDY = "Nothing was loaded. Check that the file is whole and belongs to this configuration"


def load_weights(
    module: nn.Module,
    weights: Weights,
    rules: Sequence[AnyRule],
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    part: str | tuple[str, ...] = "",
    others: bool = False,
) -> Plan:
    """Fill all parameters and buffers of ``module`` from ``weights``; gives the plan, with what was dropped and why.

    With ``part``, only those whose names begin with it, or with one of several; with ``others``, the weights may hold
    tensors of other parts.

    A module on the meta device takes the tensors as they are read (in ``dtype``, on ``device``), one on another device
    has them copied into its own. Raises CheckpointError.
    """
    wanted = {name: t for name, t in module.state_dict(keep_vars=True).items() if name.startswith(part)}
    plan = check(weights, wanted, rules, others)
    result: dict[str, Tensor] = {}
    bad: list[str] = []
    with torch.no_grad():
        for name, tensor in _converted(plan, weights, bad):
            place = wanted[name]
            if place.is_meta:
                kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                target = torch.device(device) if device is not None else torch.device("cpu")
            else:
                kind, target = place.dtype, place.device
            moved = tensor.to(target, kind)
            if tensor.is_floating_point() and kind != tensor.dtype and not torch.isfinite(moved).all():
                bad.append(f"{name!r} does not fit into {kind}: its largest value is {tensor.abs().max():.3g}")
            result[name] = moved
    bad += [
        f"{name!r} must be equal to {twin!r}, which the model shares with it, but differs"
        for name, twin in plan.tied.items()
        if not torch.equal(weights.read(name), weights.read(twin))
    ]
    bad += [
        f"{a!r} and {b!r} are one tensor of the model, but differ"
        for a, b in _pairs(wanted)
        if b in result and not torch.equal(result[a], result[b])
    ]
    if bad:
        fail(weights.origin, bad[: 2 * SHOWN], REMEDY)
    _place(module, wanted, result)
    return plan


def check(weights: Weights, wanted: Mapping[str, Tensor], rules: Sequence[AnyRule], others: bool = False) -> Plan:
    """The plan by which ``weights`` become the tensors ``wanted``. Raises CheckpointError listing what does not fit."""
    plan = plan_import(weights.info, rules)
    filled: set[str] = set()
    unused = [] if others else list(plan.unknown)
    misfits: list[str] = []
    if others:
        plan.steps = [step for step in plan.steps if set(step.targets) & wanted.keys()]
        plan.tied = {}
    for step in plan.steps:
        if not set(step.targets) <= wanted.keys():
            unused += step.sources
            continue
        filled |= set(step.targets)
        misfits += _misfits(step, weights, wanted)
    problems = []
    if unused:
        names = [f"{name!r} {list(weights.info[name].shape)}" for name in unused]
        problems.append(f"{len(unused)} tensors of the file have no place in the model: {_list(names)}")
    shared = {b: a for a, b in _pairs(wanted)}
    missing = sorted(name for name in wanted.keys() - filled if shared.get(name) not in filled)
    if missing:
        theirs = _their_names(missing, rules)
        names = [f"{theirs.get(name, repr(name))} {list(wanted[name].shape)}" for name in missing]
        problems.append(f"{len(missing)} tensors of the model are not in the file: {_list(names)}")
    if plan.incomplete:
        names = [f"{name!r} (needs {', '.join(map(repr, rest))})" for name, rest in plan.incomplete.items()]
        problems.append(f"{len(names)} tensors of the file lack a companion: {_list(names)}")
    lost = [f"{name!r} (twin of {twin!r})" for name, twin in plan.tied.items() if twin not in weights.info]
    if lost:
        problems.append(f"{len(lost)} shared tensors stand without their twin: {_list(lost)}")
    if misfits:
        problems.append(f"{len(misfits)} tensors have another shape or type than the model's: {_list(misfits)}")
    if problems:
        fail(weights.origin, problems, REMEDY)
    return plan


def export_tensors(state: Mapping[str, Tensor], rules: Sequence[AnyRule]) -> dict[str, Tensor]:
    """Our tensors under their names: the rules backwards. Raises CheckpointError where one has no counterpart."""
    plan = plan_export(state, rules)
    lost = plan.unknown + list(plan.incomplete)
    if lost:
        fail("export", [f"{len(lost)} tensors have no counterpart there: {_list([repr(n) for n in lost])}"], "")
    result: dict[str, Tensor] = {}
    for step in plan.steps:
        result.update(zip(step.targets, step.change([state[name] for name in step.sources])))
    return result


def _converted(plan: Plan, weights: Weights, bad: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of ours, one step at a time, so that little is in memory at once. Notes what is not finite."""
    for step in plan.steps:
        sources = []
        for name in step.sources:
            tensor = weights.read(name)
            if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not torch.isfinite(tensor).all():
                count = int((~torch.isfinite(tensor)).sum())
                bad.append(f"{name!r} holds {count} values that are NaN or infinite, of {tensor.numel()}")
            sources.append(tensor)
        yield from zip(step.targets, step.change(sources))


def _misfits(step: Step, weights: Weights, wanted: Mapping[str, Tensor]) -> list[str]:
    """Differences in shape or kind of number between what a step makes and what the model has."""
    infos = [weights.info[name] for name in step.sources]
    label = " + ".join(repr(name) for name in step.sources)
    shapes = " + ".join(str(list(info.shape)) for info in infos)
    try:
        made = step.change([torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos])
    except (RuntimeError, IndexError, ValueError):
        expected = ", ".join(f"{name!r} {list(wanted[name].shape)}" for name in step.targets)
        return [f"{label} is {shapes} in the file and cannot become {expected}"]
    result = []
    for name, tensor in zip(step.targets, made):
        place = wanted[name]
        if tensor.shape != place.shape:
            result.append(f"{label} is {list(tensor.shape)} in the file, {list(place.shape)} in the model ({name!r})")
        elif (
            tensor.is_floating_point() != place.is_floating_point() or tensor.dtype.itemsize == 1 < place.dtype.itemsize
        ):
            result.append(f"{label} is {tensor.dtype} in the file, {place.dtype} in the model ({name!r})")
    return result


def _place(module: nn.Module, wanted: Mapping[str, Tensor], result: dict[str, Tensor]) -> None:
    """Copy or assign. Names that were one parameter stay one (a transformers model with a tied head)."""
    if not any(tensor.is_meta for tensor in wanted.values()):
        with torch.no_grad():
            for name, tensor in result.items():
                wanted[name].copy_(tensor)
        return
    shared: dict[int, str] = {}
    for name, place in wanted.items():
        first = shared.setdefault(id(place), name)
        if isinstance(place, nn.Parameter):
            result[name] = result[first] if first != name else nn.Parameter(result[name], place.requires_grad)
    module.load_state_dict(result, strict=True, assign=True)


def _pairs(wanted: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Names of the model that are the same parameter."""
    first: dict[int, str] = {}
    return [(first[id(t)], name) for name, t in wanted.items() if first.setdefault(id(t), name) != name]


def _their_names(names: Sequence[str], rules: Sequence[AnyRule]) -> dict[str, str]:
    """For our tensors, how they would be called in the file."""
    plan = plan_export(names, rules)
    found = {source: step.targets[0] for step in plan.steps for source in step.sources}
    return {name: f"{theirs!r} ({name!r})" if theirs != name else repr(name) for name, theirs in found.items()}


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


__all__ = ["CheckpointError", "check", "export_tensors", "load_weights"]
