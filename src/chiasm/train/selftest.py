"""Whether a run that is killed and resumed ends where the same run ends undisturbed, tried on the user's own recipe.

    once undisturbed → final weights
    n times: start, SIGKILL at a random moment (a step, a save, between stages), resume, … → the same bits

Each run is a process of its own, forked from a server that has imported everything, so that an attempt costs no start.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chiasm.convert.io import open_weights
from chiasm.errors import ChiasmError, ConfigError
from chiasm.train.log import read_log
from chiasm.train.recipe import Recipe

PRELOAD = ["chiasm.train.selftest", "chiasm.train.run", "chiasm.vlm", "torch._dynamo"]
"""What the server imports: the last is otherwise imported by the first step of an optimizer, in seconds."""

SLOWEST = 3600.0
"""Seconds after which a run counts as stuck."""


@dataclass
class Outcome:
    """What a self-test found. ``kills`` are seconds into each attempt; ``differences`` is empty where all is equal."""

    seconds: float  # of the undisturbed run
    runs: int = 0
    kills: list[float] = field(default_factory=list)
    during_save: int = 0  # kills that left a half-written checkpoint behind
    tensors: int = 0
    values: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether every run ended in the same bits."""
        return not self.differences

    def told(self) -> str:
        """In words."""
        head = f"{self.runs} runs, {len(self.kills)} kills ({self.during_save} in the middle of a save)"
        if self.equal:
            size = f"{self.tensors} tensors, {self.values:,} values"
            return f"{head}: every end is bit-equal to the undisturbed one ({size})"
        return f"{head}: NOT equal. " + "; ".join(self.differences[:5])


def shortened(recipe: Recipe, steps: int, save_every: int, out: Path) -> Recipe:
    """The recipe with few steps in every stage, checkpoints often, and neither held-out data nor logs elsewhere."""
    stages = [
        stage.dump()
        | {"steps": min(steps, stage.steps or steps), "epochs": None, "save_every": save_every}
        | {"log_every": 1, "eval_every": None, "check_samples": min(stage.check_samples, 16)}
        for stage in recipe.stages
    ]
    changes = {"stages": stages, "held_out": {}, "out": str(out)}
    if "log" in Recipe.model_fields:
        changes["log"] = {}
    return Recipe.parse(recipe.dump() | changes)


def selftest(
    recipe: Recipe,
    folder: Path,
    runs: int = 3,
    steps: int = 6,
    save_every: int = 1,
    seed: int = 0,
    most_kills: int = 3,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Run the recipe once undisturbed and ``runs`` times with kills at random moments; compare all ends.

    Everything is written below ``folder``, which must be empty or new, and removed again. Raises ConfigError, and
    whatever the recipe itself raises when it is run undisturbed.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds {len(list(folder.iterdir()))} files; the self-test needs an empty folder")
    known = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(PRELOAD)
    values = shortened(recipe, steps, save_every, folder / "straight").dump()
    first = _attempt(context, values, None)  # also warms what is made once, caches of features for instance
    outcome = Outcome(first.seconds)
    say(f"undisturbed: {first.seconds:.1f} s")
    draw = random.Random(seed)
    for number in range(runs):
        out = folder / f"killed-{number}"
        told = values | {"out": str(out)}
        for _ in range(most_kills):
            moment = draw.uniform(0.0, first.seconds)
            attempt = _attempt(context, told, moment)
            if attempt.finished:
                break
            outcome.kills.append(moment)
            outcome.during_save += any(out.glob("*/checkpoints/.step-*"))
        else:
            _attempt(context, told, None)
        outcome.runs += 1
        found = compare(folder / "straight", out, outcome)
        outcome.differences += [f"run {number + 1}: {d}" for d in found]
        say(f"run {number + 1} of {runs}: " + ("equal" if not found else found[0]))
        shutil.rmtree(out)
    shutil.rmtree(folder / "straight")
    return outcome


@dataclass
class Attempt:
    """One process: whether it came to its end, and how long it took."""

    finished: bool
    seconds: float


def _attempt(context: Any, values: Mapping[str, Any], kill_after: float | None) -> Attempt:
    """Train in a process of its own, resuming what is there; with ``kill_after`` seconds from its start, SIGKILL."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(dict(values), sender))
    process.start()
    sender.close()
    try:
        receiver.recv()  # everything is imported: the clock starts
        begun = time.perf_counter()
        process.join(kill_after if kill_after is not None else SLOWEST)
        if process.is_alive():
            process.kill()
            process.join()
            if kill_after is None:
                raise ConfigError(f"the run did not end within {SLOWEST:.0f} s; give fewer steps")
            return Attempt(False, kill_after)
        told = receiver.recv() if receiver.poll() else f"the process ended with status {process.exitcode}"
    except EOFError:
        told, begun = f"the process ended with status {process.exitcode}", time.perf_counter()
    if told:
        raise ChiasmError(f"a run of the self-test failed: {told}")
    return Attempt(True, time.perf_counter() - begun)


def _work(values: dict[str, Any], sender: Any) -> None:
    from chiasm.train.run import train

    sender.send("ready")
    try:
        train(Recipe.parse(values), resume=True, console=Console(file=io.StringIO()))
    except ChiasmError as error:
        sender.send(str(error))
        return
    sender.send("")


def compare(straight: Path, killed: Path, outcome: Outcome | None = None) -> list[str]:
    """Where two finished runs differ: tensors of the final model bit by bit, then the losses of their logs."""
    a, b = open_weights(straight / "model"), open_weights(killed / "model")
    if a.info.keys() != b.info.keys():
        return [f"the models hold different tensors: {sorted(a.info.keys() ^ b.info.keys())[:3]}"]
    differ = []
    for name in a.info:
        x, y = a.read(name), b.read(name)
        same = x.shape == y.shape and x.dtype == y.dtype and torch.equal(_bits(x), _bits(y))
        if not same:
            gap = float((x.double() - y.double()).abs().max()) if x.shape == y.shape else float("nan")
            differ.append((name, gap))
    if outcome is not None:
        outcome.tensors, outcome.values = len(a.info), sum(math.prod(info.shape) for info in a.info.values())
    found = []
    if differ:
        name, gap = max(differ, key=lambda d: d[1])
        found.append(f"{len(differ)} of {len(a.info)} tensors differ, {name} most, by {gap:.1e}")
    return found + _first_step(straight, killed)


def _first_step(straight: Path, killed: Path) -> list[str]:
    """The first step whose logged loss differs, by stage: that is where to look."""
    for log in sorted(straight.glob("*/log.jsonl")):
        other = killed / log.parent.name / "log.jsonl"
        losses = [{r["step"]: r["loss"] for r in read_log(path) if "loss" in r} for path in (log, other)]
        for step, loss in losses[0].items():
            if losses[1].get(step) != loss:
                return [f"stage {log.parent.name}, step {step}: loss {loss} undisturbed, {losses[1].get(step)} resumed"]
    return []


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def dump(outcome: Outcome) -> str:
    """The outcome as JSON."""
    return json.dumps({**vars(outcome), "equal": outcome.equal}, indent=1)
