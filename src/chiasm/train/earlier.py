"""What an earlier run left in a recipe's folder: whether this run may go on from it, or take its place.

Each stage writes ``begun.json`` when it begins: the settings that shape its model, by dotted name, and a mark of the
weights that the run began with. A stage whose settings differ from the recipe's is never used silently::

    chiasm train r.yaml            over a finished run of another recipe → CheckpointError, both values of what differs
    chiasm train r.yaml --resume   over a stage of other settings        → the same
    chiasm train r.yaml --force    → what the earlier run left is removed first

A recipe that differs only in what changes no weight (logs, workers, held-out data, evaluation) is the same recipe.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from chiasm.convert.io import write_json
from chiasm.data.mixture import Mixture
from chiasm.data.randomness import placed
from chiasm.errors import CheckpointError, ChiasmError, ConfigError, DataError
from chiasm.train.checkpoint import checkpoints, digest
from chiasm.train.recipe import FREE, Recipe, Stage, load_recipe

BEGUN, DONE = "begun.json", "done.json"
SHARED = ("model", "seed", "mixing", "quarantine")
"""Of a recipe, what every stage's model depends on. Not ``bad``: up to a checkpoint no sample was bad, or it was left
out, and what is done with the next one may be decided anew."""


def settings(recipe: Recipe, stage: Stage, mixture: Mixture | None = None) -> dict[str, Any]:
    """What shapes a stage's model, by dotted name; with ``mixture`` also the number and a mark of each source's
    examples.
    """
    values = recipe.dump()
    names = stage.data if stage.data is not None else tuple(recipe.data)
    kept = {key: values[key] for key in SHARED}
    kept["data"] = {name: values["data"].get(name) for name in names}
    kept["stage"] = {key: value for key, value in stage.dump().items() if key not in FREE}
    found = dict(_flat(kept))
    if mixture is not None:
        for number, name in enumerate(mixture.names):
            if name in names:
                found[f"data.{name}, examples"] = mixture.size(number)
                found[f"data.{name}, mark of its texts"] = _texts(mixture, number)
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, each setting that differs; a key that one side does not know is none where it has its default."""
    names = [*now, *(name for name in then if name not in now)]
    return [
        f"{name.removeprefix('stage.')} {_shown(then.get(name))} there, {_shown(now.get(name))} here"
        for name in names
        if then.get(name) != now.get(name) and not _unknown(name, then, now)
    ]


class Earlier:
    """The run that wrote a recipe's folder before this one, if there was any."""

    def __init__(self, recipe: Recipe, mixture: Mixture):
        self.recipe, self.mixture = recipe, mixture
        self.out = Path(recipe.out)
        # The recipe that lies there, for runs that wrote no begun.json; read before this run writes its own.
        self.then = recipe_in(self.out)

    def check(self, resume: bool, force: bool) -> None:
        """Raise CheckpointError where this run would silently use or replace what another recipe made.

        With ``resume`` every stage that left something must have this recipe's settings. Without it a folder must hold
        no checkpoints, and a finished run only of this recipe. ``force``: anything may be replaced. Raises ConfigError
        where both are asked for.
        """
        if resume and force:
            raise ConfigError("resume goes on from what the folder holds and force removes it; give one of the two")
        if force:
            return
        for stage in self.recipe.stages:
            folder = self.out / stage.name
            kept, done = checkpoints(folder / "checkpoints"), (folder / DONE).is_file()
            if kept and not resume:
                raise CheckpointError(
                    f"{folder}: holds checkpoints of an earlier run, the newest {kept[-1].name}; go on from it with "
                    "--resume, give another 'out' folder, or remove what it left with --force"
                )
            if kept or done:
                self._same(stage, "goes on from" if resume else "replaces", resume)
        if not resume:
            self._others()

    def remove(self) -> None:
        """Remove what an earlier run left: its stages, whatever their names, and its model.

        Raises ConfigError where this recipe reads from there.
        """
        folders = self._stages() + ([self.out / "model"] if self.then is not None else [])
        model = self.recipe.model
        start = model.start.folder if model.start is not None else None
        for name in filter(None, (model.folder, start, *model.weights.values())):
            if (
                inside := next((f for f in folders if Path(name).resolve().is_relative_to(f.resolve())), None)
            ) is not None:
                raise ConfigError(
                    f"model: {name} lies in {inside}, which --force would remove; give another 'out' folder"
                )
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def unfinish(self, stage: Stage) -> None:
        """A stage begins: neither it nor one behind it, which would stand on it, counts as finished any more."""
        names = [s.name for s in self.recipe.stages]
        for name in names[names.index(stage.name) :]:
            (self.out / name / DONE).unlink(missing_ok=True)

    def begin(self, stage: Stage, model: nn.Module | None) -> None:
        """Note a stage's settings; ``model``: with the weights that the recipe's model has, before the first stage."""
        noted: dict[str, Any] = {"settings": settings(self.recipe, stage, self.mixture)}
        if model is not None:
            noted |= _mark(model)
        (self.out / stage.name).mkdir(parents=True, exist_ok=True)
        write_json(self.out / stage.name / BEGUN, noted)

    def began_with(self, stage: Stage, model: nn.Module) -> None:
        """Raise CheckpointError unless a finished stage began with these weights, as far as that is known."""
        noted, now = _read(self.out / stage.name / BEGUN), _mark(model)
        if noted.get("device") == now["device"] and noted.get("weights", now["weights"]) != now["weights"]:
            raise CheckpointError(
                f"{self.out / stage.name}: the stage began with other weights of the model (mark {noted['weights']} "
                f"there, {now['weights']} here), under the same recipe: the model's files changed; give another 'out' "
                "folder, or begin anew with --force instead of --resume"
            )

    # ------------------------------------------------------------------------------------------------------- parts

    def _same(self, stage: Stage, does: str, resume: bool) -> None:
        then = _read(self.out / stage.name / BEGUN).get("settings")
        if then is None and self.then is not None:
            old = next((s for s in self.then.stages if s.name == stage.name), None)
            then = settings(self.then, old) if old is not None else None
        if then is None:
            if resume:
                return  # nothing is known; a checkpoint has marks of its own
            raise CheckpointError(
                f"{self.out / stage.name}: holds a finished stage of a recipe that is not known, and this run "
                "replaces it; give another 'out' folder, or --force"
            )
        if found := differences(then, settings(self.recipe, stage, self.mixture)):
            some = "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "")
            remedy = "set the recipe back" if resume else "give --resume with that recipe"
            raise CheckpointError(
                f"{self.out / stage.name}: this run {does} a stage of another recipe: {some}; {remedy}, give another "
                "'out' folder, or remove what the earlier run left with --force" + (" (no --resume)" if resume else "")
            )

    def _others(self) -> None:
        """A finished run whose stages have other names."""
        own = {stage.name for stage in self.recipe.stages}
        others = [f.name for f in self._stages() if f.name not in own and (f / DONE).is_file()]
        if others:
            raise CheckpointError(
                f"{self.out}: holds a finished run of another recipe, with the stages {', '.join(others)} there and "
                f"{', '.join(own)} here; this run would replace its model: give another 'out' folder, or --force"
            )

    def _stages(self) -> list[Path]:
        """The folders that stages of a run wrote."""
        known = {stage.name for stage in self.then.stages} if self.then is not None else set()
        found = [p for p in self.out.iterdir() if p.is_dir()] if self.out.is_dir() else []
        return sorted(p for p in found if p.name in known or (p / BEGUN).is_file() or (p / DONE).is_file())


def recipe_in(out: Path) -> Recipe | None:
    """The recipe of the run that wrote a folder; None where there is none that this version of the package reads."""
    path = out / "recipe.yaml"
    try:
        return load_recipe(path) if path.is_file() else None
    except ChiasmError:
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _mark(model: nn.Module) -> dict[str, str]:
    """Of all weights, and where they were made: random ones are others on another kind of device."""
    names = [name for name, _ in model.named_parameters()]
    return {"weights": digest(model, dict.fromkeys(names)), "device": next(model.parameters()).device.type}


def _texts(mixture: Mixture, number: int) -> str:
    """Of the texts of up to 16 examples, spread over a source; those that cannot be read are told at their turn."""
    usable, mark = mixture.usable(number), hashlib.sha256()
    for place in sorted({round(i * (len(usable) - 1) / 15) for i in range(16)}):
        index = int(usable[place])
        with suppress(DataError), placed(mixture.seed, "mark", index, 0):
            example = mixture[number, index]
            mark.update("\0".join([example.id, *(m.text for m in example.messages)]).encode())
    return mark.hexdigest()[:12]


def _flat(values: Mapping[str, Any], before: str = "") -> Any:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _unknown(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the side that lacks a setting only does not know it: a key of a later version at its default."""
    if ", " in name:
        return name not in then or name not in now
    if name in then and name in now:
        return False
    value = now.get(name, then.get(name))
    field = Stage.model_fields.get(name.removeprefix("stage.")) if name.startswith("stage.") else None
    default = None if field is None else field.get_default(call_default_factory=True)
    return value in (None, {}) or value == (list(default) if isinstance(default, tuple) else default)


def _shown(value: Any) -> str:
    told = "nothing" if value is None else str(value)
    return told if len(told) <= 60 else told[:57] + "..."
