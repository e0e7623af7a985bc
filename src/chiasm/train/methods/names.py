"""What ``peft`` calls our modules: as transformers' LLaVA classes do, or its causal language models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from chiasm.convert.rules import Alias, AnyRule, fill, match, plan_export, plan_import, prefixed
from chiasm.errors import CheckpointError
from chiasm.presets.hf_export import family
from chiasm.presets.hf_llava import rules as llava_rules
from chiasm.presets.hf_parts import write_lm, write_tower


def naming(model: Any, layout: str = "auto") -> list[AnyRule]:
    """The rules between transformers' names and ours. ``layout``: ``"llava"`` (a whole model of its classes), ``"lm"``
    (the language model alone), ``"auto"`` (the first of them that there is). Raises CheckpointError.
    """
    lm = write_lm(model.lm)[1]
    if layout == "lm":
        return prefixed(lm, "", "lm.")
    try:
        kind, _ = family(model)
        return llava_rules(write_tower(model.encoders["image"])[1], lm, kind != "llava")
    except CheckpointError:
        if layout == "llava":
            raise
        return prefixed(lm, "", "lm.")


def theirs(names: Iterable[str], rules: Sequence[AnyRule]) -> dict[str, str]:
    """Our parameters → theirs, as their modules are called when they run. What has no counterpart is left out."""
    aliases = [rule for rule in rules if isinstance(rule, Alias)]
    found = {}
    for step in plan_export(list(names), rules).steps:
        if len(step.sources) == len(step.targets) == 1:
            name = step.targets[0]
            for alias in reversed(
                aliases
            ):  # the rules' names are those on disk; aliases lead to them from the modules'
                values = match(alias.means, name)
                name = name if values is None else fill(alias.spelled, values)
            found[step.sources[0]] = name
    return found


def ours(names: Iterable[str], rules: Sequence[AnyRule]) -> dict[str, str]:
    """Their parameters → ours. Raises CheckpointError for one that has no counterpart."""
    plan = plan_import(list(names), rules)
    lost = [
        *plan.unknown,
        *plan.incomplete,
        *(s.sources[0] for s in plan.steps if len(s.sources) + len(s.targets) != 2),
    ]
    if lost:
        raise CheckpointError(
            f"{len(lost)} layers of the adapter have no counterpart in this model, the first is {lost[0]!r}"
        )
    return {step.sources[0]: step.targets[0] for step in plan.steps}
