"""The main job end to end: two pretrained parts become a vision-language model, in two stages, and are put to the test.

``run`` is what ``chiasm demo`` and ``make demo`` call. It only tells a story around the ordinary parts: the recipe is
``recipes/demo.yaml`` (a copy of it ships with the package), training is ``chiasm.train``, evaluation ``chiasm.eval``.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from chiasm.data.sources.playground import SCENE_AND_DIGIT_TASKS, Playground
from chiasm.eval.runner import Comparison
from chiasm.eval.write import evaluate_recipe
from chiasm.train.earlier import recipe_in
from chiasm.train.log import terminal
from chiasm.train.recipe import Recipe, load_recipe
from chiasm.train.run import Run

HERE = Path(__file__).parent
WEIGHTS = HERE.parent / "weights"  # the shipped parts; recipes/tiny-tower.yaml and recipes/tiny-lm.yaml make them
PICTURES = ("scene_qa", "scene_count", "scene_reasoning", "digit_qa", "chart_qa", "reading", "document")


@dataclass
class Log:
    """What the demo tells: on the console, and as one JSON record a step in ``log.jsonl``."""

    console: Console
    path: Path
    begun: float = field(default_factory=time.perf_counter)
    steps: int = 5
    number: int = 0

    def say(self, text: str) -> None:
        """A line of the story."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[dict[str, Any]]:
        """A step with its time; what is put into the record is written to the log."""
        self.number += 1
        self.say(f"\n[bold]{self.number}/{self.steps} {title}[/bold]")
        record: dict[str, Any] = {}
        begun = time.perf_counter()
        yield record
        seconds = time.perf_counter() - begun
        line = {
            "step": name,
            "seconds": round(seconds, 2),
            "total": round(time.perf_counter() - self.begun, 2),
        } | record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.say(f"[dim]{seconds:.0f} s[/dim]")


def demo_recipe(out: str | Path, share: float = 1.0) -> Recipe:
    """The demo's recipe with the shipped parts, writing to ``out``. ``share`` scales the steps and the held-out set."""
    parts = {"encoders.image": str(WEIGHTS / "tiny-tower"), "lm": str(WEIGHTS / "tiny-lm")}
    changes: dict[str, Any] = {"out": str(out), "model.tokenizer": str(WEIGHTS / "tiny-lm"), "model.weights": parts}
    recipe = load_recipe(HERE / "recipe.yaml", changes)
    if share == 1.0:
        return recipe
    for number, stage in enumerate(recipe.stages):
        changes[f"stages.{number}.steps"] = max(1, round((stage.steps or 1) * share))
    for name, entry in recipe.held_out.items():
        tasks = len(getattr(entry.source, "tasks", ())) or 1
        changes[f"held_out.{name}.limit"] = max(2 * tasks, round(getattr(entry.source, "length", 1) * share))
    return load_recipe(HERE / "recipe.yaml", changes)


def run(out: str | Path, share: float = 1.0, console: Console | None = None) -> Comparison:
    """Train, evaluate, give the scores. In ``out``: ``stage1_align``, ``stage2_instruct``, ``model``, ``report.html``,
    ``results.json``, ``answers.jsonl``, ``pictures``, ``log.jsonl``.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.jsonl").unlink(missing_ok=True)
    log = Log(console or terminal(), out / "log.jsonl")
    recipe = demo_recipe(out, share)
    with log.step("parts", "A vision tower and a language model that have never met") as record:
        job = Run(recipe, None, log.console, force=_demo(out))  # a quick look is followed by a longer one
        record |= _introduce(job, log)
        job.prepare()
    for stage, title in zip(recipe.stages, _TITLES, strict=True):
        with log.step(stage.name, title) as record:
            log.say(_EXPLAINED[stage.plan if isinstance(stage.plan, str) else "instruct"])
            job.stage(stage, resume=False)
            record["steps"] = stage.steps
    with log.step(
        "evaluation", "Held-out questions: with their own pictures, and with those of other questions"
    ) as record:
        log.say("Where the second column were as good as the first, the model would not be looking at its pictures.")
        comparison = evaluate_recipe(job.vlm, recipe, out, console=log.console)
        record |= _judge(comparison, log)
    with log.step("results", "Where things are") as record:
        record["pictures"] = _pictures(job.vlm, out, log)
        record["peak_mib"] = peak = _peak()
    log.say(f"\nDone in {time.perf_counter() - log.begun:.0f} s, with at most {peak:.0f} MiB of memory.")
    return comparison


def _demo(out: Path) -> bool:
    """Whether a folder holds an earlier demo, which may be replaced; any other run may not."""
    found = recipe_in(out)
    return found is not None and found.name == "demo"


_TITLES = (
    "Stage 1, align: the connector learns to describe pictures in the language model's own vectors",
    "Stage 2, instruct: connector and language model learn to answer questions",
)
_EXPLAINED = {
    "align": "Tower and language model are frozen; only the connector between them is trained, from nothing.",
    "instruct": "The tower stays frozen. Several questions about each picture, several turns in each conversation.",
}


def _introduce(job: Run, log: Log) -> dict[str, Any]:
    """Say which parts there are and how large they are."""
    model = job.vlm.model
    sizes = {
        "vision tower": sum(p.numel() for p in model.encoders.parameters()),
        "connector": sum(p.numel() for p in model.connectors.parameters()),
        "language model": sum(p.numel() for p in model.lm.parameters()),
    }
    whence = {"connector": "fresh, random", "vision tower": "shipped", "language model": "shipped, has only read text"}
    for name, size in sizes.items():
        log.say(f"  {name}: {size:,} parameters ({whence[name]})")
    log.say(f"  results go to {escape(str(job.out))}, as they come")
    return {"parameters": sizes}


def _judge(comparison: Comparison, log: Log) -> dict[str, Any]:
    """The two numbers that the demo is about."""
    true = comparison.true.over(SCENE_AND_DIGIT_TASKS)
    shuffled = comparison.shuffled.over(SCENE_AND_DIGIT_TASKS) if comparison.shuffled else None
    told = "" if shuffled is None else f", [bold]{100 * shuffled:.1f} %[/bold] with shuffled ones"
    log.say(f"Scene and digit tasks: [bold]{100 * true:.1f} %[/bold] with the true pictures{told}.")
    table = {task: [n, score, other] for task, n, score, other in comparison.rows()}
    return {"scene_and_digit": true, "scene_and_digit_shuffled": shuffled, "table": table}


def _pictures(vlm: Any, out: Path, log: Log) -> list[str]:
    """Save some held-out pictures, and say how to ask about them."""
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    source = Playground(Playground.Config(tasks=PICTURES, split="test", length=len(PICTURES), seed=99))
    commands = []
    for index, task in enumerate(PICTURES):
        example = source[index]
        path = folder / f"{task}.png"
        example.messages[0].media[0].data.save(path)
        commands.append(f'chiasm chat {out / "model"} {path} "{example.messages[0].text}"')
    log.say(f"  report     {escape(str(out / 'report.html'))}")
    log.say(f"  model      {escape(str(out / 'model'))}")
    log.say(f"  answers    {escape(str(out / 'answers.jsonl'))}")
    log.say("Ask it yourself, about pictures that it has never seen:")
    for command in commands:
        log.say(f"  {escape(command)}")
    return commands


def _peak() -> float:
    """The most memory that the process or one of its workers held, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    most = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most / unit


__all__ = ["demo_recipe", "run"]
