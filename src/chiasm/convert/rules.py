"""Two-way rules between the tensor names of a file ("theirs") and those of our model ("ours").

A rule is a pair of name patterns, and for some a pair of functions on the tensors. Read forwards, a list of rules
imports a checkpoint; read backwards, the same list exports it. Nothing here knows a model: names and tensors only.

In a pattern ``{i}`` and ``{j}`` stand for a number, ``{leaf}`` for one word (``weight`` or ``bias``), ``{rest}`` for
anything that follows. Both sides of a rule use the same placeholders. The first rule that matches a name serves it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from chiasm.errors import CheckpointError

Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]
_KINDS = {"i": r"\d+", "j": r"\d+", "leaf": r"[^.]+", "rest": r".+"}


def _same(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Tensors named like ``theirs`` become those named like ``ours`` by ``forward``; ``backward`` undoes it exactly."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    forward: Change = _same
    backward: Change = _same


@dataclass(frozen=True)
class Drop:
    """Tensors of the file that the model has no place for, and ``why`` that is right. They are not written back."""

    theirs: str
    why: str


@dataclass(frozen=True)
class Tied:
    """A tensor of the file that must be equal to its ``twin`` in the file: the model has one parameter for both."""

    theirs: str
    twin: str


@dataclass(frozen=True)
class Alias:
    """Another spelling, in other versions' files, of the name that rules use. Never written."""

    spelled: str
    means: str


AnyRule = Rule | Drop | Tied | Alias


def rename(theirs: str, ours: str) -> Rule:
    """One tensor under another name."""
    return Rule((theirs,), (ours,))


def split(theirs: str, ours: Sequence[str], sizes: Sequence[int], dim: int = 0) -> Rule:
    """One tensor that is several of ours joined along ``dim``, with their ``sizes`` (fused q, k, v; gate and up)."""

    def into_ours(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors[0].split(list(sizes), dim)

    return Rule((theirs,), tuple(ours), into_ours, lambda parts: [_cat(parts, dim)])


def merge(theirs: Sequence[str], ours: str, sizes: Sequence[int], dim: int = 0) -> Rule:
    """Several tensors that are one of ours, joined along ``dim``, with their ``sizes``."""

    def into_theirs(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors[0].split(list(sizes), dim)

    return Rule(tuple(theirs), (ours,), lambda parts: [_cat(parts, dim)], into_theirs)


def transpose(theirs: str, ours: str, first: int = 0, second: int = 1) -> Rule:
    """One tensor with two dimensions exchanged (a convolution's matrix, GPT-2's linear layers)."""

    def swap(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensors[0].transpose(first, second)]

    return Rule((theirs,), (ours,), swap, swap)


def squeeze(theirs: str, ours: str, leading: int = 1) -> Rule:
    """One tensor that has ``leading`` dimensions of size 1 in the file and none of them with us."""

    def into_ours(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        shape = tensors[0].shape
        if any(size != 1 for size in shape[:leading]):
            raise RuntimeError(f"shape {list(shape)} does not start with {leading} dimensions of size 1")
        return [tensors[0].reshape(shape[leading:])]

    def into_theirs(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensors[0].reshape((1,) * leading + tuple(tensors[0].shape))]

    return Rule((theirs,), (ours,), into_ours, into_theirs)


def prefixed(rules: Iterable[AnyRule], theirs: str = "", ours: str = "") -> list[AnyRule]:
    """The rules of a component at its place in a larger model: both sides get their prefix."""
    placed: list[AnyRule] = []
    for rule in rules:
        if isinstance(rule, Rule):
            names = tuple(theirs + n for n in rule.theirs), tuple(ours + n for n in rule.ours)
            placed.append(replace(rule, theirs=names[0], ours=names[1]))
        elif isinstance(rule, Drop):
            placed.append(Drop(theirs + rule.theirs, rule.why))
        elif isinstance(rule, Tied):
            placed.append(Tied(theirs + rule.theirs, theirs + rule.twin))
        else:
            placed.append(Alias(theirs + rule.spelled, theirs + rule.means))
    return placed


@dataclass(frozen=True)
class Step:
    """One use of a rule: the tensors it reads and those it makes."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    change: Change


@dataclass
class Plan:
    """What a list of rules makes of a list of names."""

    steps: list[Step] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)  # name → why
    tied: dict[str, str] = field(default_factory=dict)  # name → its twin, both as spelled in the file
    unknown: list[str] = field(default_factory=list)  # no rule matches
    incomplete: dict[str, list[str]] = field(default_factory=dict)  # name → the companions it needs and lacks


def plan_import(names: Iterable[str], rules: Sequence[AnyRule]) -> Plan:
    """How the tensors called ``names`` in a file become ours. Raises CheckpointError where two spell one name."""
    spelled = _canonical(names, rules)
    plan = Plan()
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]] = {}
    for name in spelled:
        for number, rule in enumerate(rules):
            if isinstance(rule, Alias):
                continue
            found = _find(rule.theirs if isinstance(rule, Rule) else (rule.theirs,), name)
            if found is None:
                continue
            which, values = found
            if isinstance(rule, Drop):
                plan.dropped[spelled[name]] = rule.why
            elif isinstance(rule, Tied):
                twin = fill(rule.twin, values)
                plan.tied[spelled[name]] = spelled.get(twin, twin)
            else:
                groups.setdefault((number, tuple(sorted(values.items()))), {})[which] = name
            break
        else:
            plan.unknown.append(spelled[name])
    for (number, items), members in groups.items():
        rule = rules[number]
        assert isinstance(rule, Rule)
        values = dict(items)
        wanted = [fill(t, values) for t in rule.theirs]
        lacking = [w for i, w in enumerate(wanted) if i not in members]
        if lacking:
            plan.incomplete |= {spelled[m]: lacking for m in members.values()}
        else:
            targets = tuple(fill(o, values) for o in rule.ours)
            plan.steps.append(Step(tuple(spelled[w] for w in wanted), targets, rule.forward))
    return plan


def plan_export(names: Iterable[str], rules: Sequence[AnyRule]) -> Plan:
    """How our tensors called ``names`` become the file's: the same rules, backwards."""
    turned = [Rule(r.ours, r.theirs, r.backward, r.forward) for r in rules if isinstance(r, Rule)]
    return plan_import(names, turned)


def fill(pattern: str, values: Mapping[str, str]) -> str:
    """The pattern with its placeholders replaced."""
    for key, value in values.items():
        pattern = pattern.replace("{" + key + "}", value)
    return pattern


def _canonical(names: Iterable[str], rules: Sequence[AnyRule]) -> dict[str, str]:
    """The name that the rules use → the name in the file. Aliases apply one after the other, in order."""
    aliases = [rule for rule in rules if isinstance(rule, Alias)]
    result: dict[str, str] = {}
    for name in names:
        canonical = name
        for alias in aliases:
            values = match(alias.spelled, canonical)
            if values is not None:
                canonical = fill(alias.means, values)
        if canonical in result:
            raise CheckpointError(f"tensors {result[canonical]!r} and {name!r} of the file are one tensor of the model")
        result[canonical] = name
    return result


def _find(patterns: Sequence[str], name: str) -> tuple[int, dict[str, str]] | None:
    for which, pattern in enumerate(patterns):
        values = match(pattern, name)
        if values is not None:
            return which, values
    return None


def match(pattern: str, name: str) -> dict[str, str] | None:
    """The values of the placeholders with which ``pattern`` is ``name``; None where it is not."""
    found = _compiled(pattern).fullmatch(name)
    return None if found is None else found.groupdict()


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", pattern)
    text = ""
    for i, piece in enumerate(pieces):
        text += f"(?P<{piece}>{_KINDS[piece]})" if i % 2 else re.escape(piece)
    return re.compile(text)


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(list(parts), dim)
