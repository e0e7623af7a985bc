"""Held-out examples through ``generate``, scored by task; and the same with the pictures of other examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol

from chiasm import registry
from chiasm.data.base import Example, with_answer
from chiasm.data.mixture import HeldOut, Mixture
from chiasm.data.quarantine import Quarantine
from chiasm.data.shuffle import shuffled as shuffle
from chiasm.errors import ConfigError, DataError, nearest
from chiasm.types import Message


class Ranks(Protocol):
    """What an evaluation needs of the processes that share it: see ``chiasm.train.distributed``."""

    rank: int
    count: int

    def gather(self, value: Any, place: str = "") -> list[Any]:
        """The values of all ranks, in the order of the ranks."""
        ...


Advance = Callable[[int, int], None]  # (examples done, of them since the last call)


@dataclass(frozen=True)
class Answer:
    """One scored example."""

    id: str
    source: str
    task: str
    question: str
    prediction: str
    answers: tuple[str, ...]
    score: float


@dataclass
class Result:
    """All answers of an evaluation and what it was made with."""

    answers: list[Answer]
    receipt: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The mean over all examples."""
        return fmean([a.score for a in self.answers]) if self.answers else 0.0

    def by_task(self) -> dict[str, tuple[float, int]]:
        """Mean score and number of examples of each task, in the order the tasks came."""
        tasks: dict[str, list[float]] = {}
        for a in self.answers:
            tasks.setdefault(a.task or a.source, []).append(a.score)
        return {task: (fmean(scores), len(scores)) for task, scores in tasks.items()}

    def over(self, tasks: Sequence[str]) -> float:
        """The mean score over the examples of some tasks. Raises DataError where there are none."""
        scores = [a.score for a in self.answers if (a.task or a.source) in tasks]
        if not scores:
            raise DataError(f"0 of {len(self.answers)} answers belong to the tasks {', '.join(tasks)}")
        return fmean(scores)


@dataclass
class Comparison:
    """The same examples with their own pictures and with those of others (None where that was not run)."""

    true: Result
    shuffled: Result | None

    def rows(self) -> list[tuple[str, int, float, float | None]]:
        """``(task, examples, score with the true pictures, with shuffled ones)``; the last row is over all."""
        other = self.shuffled.by_task() if self.shuffled else {}
        rows = [(task, n, score, other.get(task, (None, 0))[0]) for task, (score, n) in self.true.by_task().items()]
        total = self.shuffled.score if self.shuffled and self.shuffled.answers else None
        return [*rows, ("all", len(self.true.answers), self.true.score, total)]


def held_out(
    entries: Mapping[str, HeldOut], limit: int | None = None, quarantine: Quarantine | None = None
) -> tuple[list[Example], dict[str, str]]:
    """The first ``limit`` examples of each held-out source, and the metric of each by name. Raises DataError."""
    mixture = Mixture(entries, quarantine=quarantine)
    examples = [mixture[ref] for ref in mixture.first(limit)]
    return examples, {name: entry.metric for name, entry in entries.items()}


def evaluate(
    vlm: Any,
    examples: Sequence[Example],
    metrics: str | Mapping[str, str] = "exact",
    batch_size: int = 16,
    max_new_tokens: int = 32,
    shuffle_images: bool = False,
    seed: int = 0,
    advance: Advance | None = None,
    ranks: Ranks | None = None,
    candidates: Mapping[str, Sequence[str]] | None = None,
    rank_by: str = "sum",
) -> Result:
    """Greedy answers to the last question of each example, scored by ``metrics`` (one name, or one for each source).

    ``candidates`` by task: there the answer is the most likely of them, by ``rank_by`` ("sum" or "mean" of its
    log-probabilities), not what the model would write. ``shuffle_images`` gives every example the media of another one
    of its task: a model that reads its pictures falls to what the question alone tells. ``ranks`` share the batches,
    each run once, and all get the whole result. Raises DataError for an example without question or answer, before any
    is run, and ConfigError for candidates of no task.
    """
    score = {source: registry.get("metric", _metric(metrics, source)) for source in {e.source for e in examples}}
    pairs = [(example, *question(example)) for example in examples]  # all are looked at before the first is run
    if shuffle_images:
        examples = shuffle(examples, seed)
        pairs = [(example, *question(example)) for example in examples]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "decoding": "greedy", "batch_size": batch_size}
    if candidates:
        _check_tasks(candidates, examples)
        settings |= {"candidates": {task: list(c) for task, c in candidates.items()}, "rank_by": rank_by}
    receipt = {"shuffled_images": shuffle_images, "seed": seed, "examples": len(pairs), **settings}
    result = Result([], receipt | {"metrics": metrics if isinstance(metrics, str) else dict(metrics)})
    # Prompts of like length share a batch; the answers come back in the order of the examples.
    order = sorted(range(len(pairs)), key=lambda i: sum(len(m.text) for m in pairs[i][1]))
    found: dict[int, Answer] = {}
    starts = range(0, len(order), batch_size)
    for start in starts[ranks.rank :: ranks.count] if ranks else starts:  # the same batches, dealt to the ranks
        rows = order[start : start + batch_size]
        closed = [i for i in rows if candidates and pairs[i][0].task in candidates]
        told = {i: vlm.rank(list(pairs[i][1]), candidates[pairs[i][0].task], rank_by)[0].text for i in closed}  # type: ignore[index]
        written = [i for i in rows if i not in told]
        texts = vlm.generate([list(pairs[i][1]) for i in written], max_new_tokens=max_new_tokens)
        for i, text in sorted({**told, **dict(zip(written, texts, strict=True))}.items()):
            example, prompt, answers = pairs[i]
            value = score[example.source](text, answers)
            found[i] = Answer(example.id, example.source, example.task, prompt[-1].text, text.strip(), answers, value)
        if advance:
            advance(start + len(rows), len(rows))
    if ranks:
        for others in ranks.gather(found, "the end of the evaluation"):
            found |= others
    result.answers = _over([found[i] for i in range(len(pairs))], score)
    return result


def _over(answers: list[Answer], metrics: Mapping[str, Any]) -> list[Answer]:
    """The answers with the scores of metrics that look at a whole source at once (``over``), as CIDEr does."""
    for source, metric in metrics.items():
        if hasattr(metric, "over"):
            places = [i for i, answer in enumerate(answers) if answer.source == source]
            scores = metric.over([(answers[i].prediction, answers[i].answers) for i in places])
            for i, score in zip(places, scores, strict=True):
                answers[i] = replace(answers[i], score=score)
    return answers


def compare(vlm: Any, examples: Sequence[Example], shuffled: bool = True, **settings: Any) -> Comparison:
    """``evaluate`` with the true pictures and, where asked, with shuffled ones."""
    true = evaluate(vlm, examples, **settings)
    return Comparison(true, evaluate(vlm, examples, shuffle_images=True, **settings) if shuffled else None)


def question(example: Example) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The conversation up to its last question, and the accepted answers. Raises DataError."""
    messages = with_answer(example).messages
    if len(messages) < 2 or messages[-2].role != "user":
        raise DataError(f"sample {example.id!r}: has no question before its answer; the user's turn must be there")
    return messages[:-1], example.answers or (messages[-1].text,)


def _check_tasks(candidates: Mapping[str, Sequence[str]], examples: Sequence[Example]) -> None:
    tasks = sorted({e.task for e in examples})
    for task in candidates:
        if task not in tasks:
            raise ConfigError(f"candidates are given for task {task!r}, which no example has; {nearest(task, tasks)}")


def _metric(metrics: str | Mapping[str, str], source: str) -> str:
    return metrics if isinstance(metrics, str) else metrics.get(source, "exact")
