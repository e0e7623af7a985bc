"""Results on disk: ``results.json`` (table and receipt), ``answers.jsonl``, ``report.html``."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import chiasm
from chiasm.data.base import Example
from chiasm.errors import ConfigError, DataError
from chiasm.eval.pairs import compare_pairs, compares
from chiasm.eval.runner import Answer, Comparison, Ranks, compare, held_out, question
from chiasm.processing.fingerprint import fingerprint
from chiasm.report.looking import queries_of
from chiasm.report.run import Shown, StageReport, picture_urls, sheet_url, write_report


def evaluate_recipe(
    vlm: Any, recipe: Any, out: Any, console: Console | None = None, ranks: Ranks | None = None, **changes: Any
) -> Comparison:
    """See ``chiasm.eval.evaluate_recipe``."""
    console = console or Console()
    if not recipe.held_out:
        raise ConfigError("the recipe has 0 held-out sources; name some under 'held_out'")
    spec = type(recipe.eval).parse(recipe.eval.dump() | {k: v for k, v in changes.items() if v is not None})
    out_of_use = recipe.left_out()
    examples, metrics = held_out(recipe.held_out, spec.limit, out_of_use and out_of_use.held_out())
    runs = 2 if spec.shuffled else 1
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"held-out answers ({len(examples)} examples)", total=runs * len(examples))
        comparison = _compared(vlm, recipe, spec, examples, lambda _, step: progress.advance(task, step)) or compare(
            vlm,
            examples,
            spec.shuffled,
            metrics=metrics,
            batch_size=spec.batch_size,
            max_new_tokens=spec.max_new_tokens,
            seed=recipe.seed,
            advance=lambda done, step: progress.advance(task, step),
            ranks=ranks,
            candidates=spec.candidates,
            rank_by=spec.rank_by,
        )
    if ranks and ranks.rank:
        return comparison  # rank 0 writes
    console.print(results_table(comparison))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    receipt = _receipt(vlm, recipe, comparison)
    results = {
        "table": [dict(zip(("task", "n", "true", "shuffled"), r)) for r in comparison.rows()],
        "receipt": receipt,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    with (out / "answers.jsonl").open("w", encoding="utf-8") as file:
        for pictures, result in (("true", comparison.true), ("shuffled", comparison.shuffled)):
            for answer in result.answers if result else ():
                file.write(json.dumps({"pictures": pictures, **asdict(answer)}, ensure_ascii=False) + "\n")
    path = write_run_report(recipe, out, comparison, examples, spec.examples, receipt, vlm)
    console.print(f"Report: {path}", highlight=False, soft_wrap=True)
    return comparison


def _compared(vlm: Any, recipe: Any, spec: Any, examples: list[Example], advance: Any) -> Comparison | None:
    """The evaluation of a model that compares pictures with texts, on every rank alike; None for one that answers."""
    if not compares(vlm):
        return None
    return compare_pairs(vlm, examples, recipe.held_out, spec.shuffled, spec.batch_size, recipe.seed, advance)


def write_run_report(
    recipe: Any,
    out: Any,
    comparison: Comparison | None,
    examples: list[Example] | None = None,
    shown: int = 0,
    receipt: dict[str, Any] | None = None,
    vlm: Any = None,
) -> Path:
    """``report.html`` from what a run left in the folder ``out``, and its held-out answers where there are any.

    With ``vlm`` some of the examples also show what each query of its connector looks at, where it has queries.
    """
    out = Path(out)
    stages = [StageReport.read(out / s.name, s.dump()) for s in recipe.stages if (out / s.name / "log.jsonl").is_file()]
    chosen = choose(comparison, examples or [], shown) if comparison else []
    cards = with_queries(vlm, chosen) if vlm is not None else [card for card, _ in chosen]
    text = yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True)
    rows = comparison.rows() if comparison else []
    return write_report(out / "report.html", recipe.name, stages, rows, cards, receipt or {}, text)


def choose(comparison: Comparison, examples: list[Example], most: int) -> list[tuple[Shown, Example]]:
    """Examples for the report: in turn from every task, a wrong one after every two right ones where there are such."""
    by_place = dict(zip(_places(examples), examples, strict=True))
    placed = list(zip(_places(comparison.true.answers), comparison.true.answers, strict=True))
    of = {id(a): by_place.get(p, by_place.get((*p[:2], 0))) for p, a in placed}  # a search asks twice of an example
    again = comparison.shuffled.answers if comparison.shuffled else []
    shuffled = {place: answer.prediction for place, answer in zip(_places(again), again, strict=True)}
    other = {id(a): shuffled.get(p) for p, a in placed}
    lines: dict[str, list[Any]] = {}
    for answer in comparison.true.answers:
        lines.setdefault(answer.task or answer.source, []).append(answer)
    queues = []
    for answers in lines.values():
        right, wrong = [a for a in answers if a.score >= 1], [a for a in answers if a.score < 1]
        mixed = []
        while right or wrong:
            mixed += [*right[:2], *wrong[:1]]
            right, wrong = right[2:], wrong[1:]
        queues.append(mixed)
    chosen = [queue[i] for i in range(max(map(len, queues), default=0)) for queue in queues if i < len(queue)][:most]
    return [(_card(a, example, other[id(a)]), example) for a in chosen if (example := of[id(a)]) is not None]


def _places(items: Sequence[Example | Answer]) -> list[tuple[str, str, int]]:
    """Source, id, and how many before have the same: ids that come more than once are told apart by their order."""
    seen: dict[tuple[str, str], int] = {}
    found = []
    for item in items:
        key = (item.source, item.id)
        found.append((*key, seen.get(key, 0)))
        seen[key] = seen.get(key, 0) + 1
    return found


def _card(answer: Answer, example: Example, shuffled: str | None) -> Shown:
    return Shown(
        id=answer.id,
        task=answer.task or answer.source,
        question=answer.question,
        prediction=answer.prediction,
        target=answer.answers[0],
        score=answer.score,
        shuffled=shuffled,
        pictures=picture_urls(example),
        earlier=_earlier(example),
    )


def with_queries(vlm: Any, chosen: list[tuple[Shown, Example]], most: int = 6) -> list[Shown]:
    """The cards, the first ``most`` that have a picture with what each query of the connector looks at."""
    found = []
    for card, example in chosen:
        sheets: list[str] = []
        if most and card.pictures:
            most -= 1
            with suppress(DataError):  # an example that cannot be asked has no queries to show
                asked = question(example)[0]
                sheets = [sheet_url(picture) for picture in queries_of(vlm, asked, card.id, across=3).values()]
        found.append(replace(card, queries=sheets))
    return found


def _earlier(example: Example) -> list[tuple[str, str]]:
    """The turns before the question; none where there is no question (a picture and its text)."""
    try:
        return [(m.role, m.text) for m in question(example)[0][:-1]]
    except DataError:
        return []


def results_table(comparison: Comparison) -> Table:
    """The scores by task for the terminal."""
    table = Table(title="Held-out scores", title_justify="left", title_style="bold", header_style="bold", box=None)
    table.add_column("task")
    for column in ("examples", "its own pictures", "shuffled pictures"):
        table.add_column(column, justify="right")
    for task, n, true, shuffled in comparison.rows():
        style = "bold" if task == "all" else None
        table.add_row(
            task, str(n), f"{100 * true:.1f} %", "" if shuffled is None else f"{100 * shuffled:.1f} %", style=style
        )
    return table


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _receipt(vlm: Any, recipe: Any, comparison: Comparison) -> dict[str, Any]:
    """What a number was made with: enough to make it again, or to see why another one differs."""
    return {
        "model": vlm.config.hash(),
        "fingerprint": _hash(fingerprint(vlm.processor)),  # prompts and pixels of the probe conversations
        "history": list(vlm.config.provenance.history),
        "recipe": recipe.hash(),
        "held_out": {name: entry.dump() for name, entry in recipe.held_out.items()},
        "evaluation": comparison.true.receipt,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "device": str(vlm.model.device),
        "versions": {"chiasm": chiasm.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
