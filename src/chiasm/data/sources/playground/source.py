"""The playground as data sources: ``playground`` has the pictures, ``playground_text`` the same world in words."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, Literal

from pydantic import field_validator

from chiasm.data.base import Example, Source, SourceConfig
from chiasm.data.sources.playground.charts import Charts
from chiasm.data.sources.playground.digits import Crowds, Digits
from chiasm.data.sources.playground.pairs import Clips, Pairs
from chiasm.data.sources.playground.scenes import Scenes, Singles
from chiasm.data.sources.playground.words import Bills, Signs
from chiasm.data.sources.playground.world import SPLITS, Family, Question, Split, chance, further, invent
from chiasm.errors import DataError, nearest
from chiasm.registry import register
from chiasm.types import Media, Message, Text

SCENES, DIGITS, CHARTS, SIGNS, BILLS, PAIRS, CLIPS = Scenes(), Digits(), Charts(), Signs(), Bills(), Pairs(), Clips()
CROWDS, SINGLES = Crowds("crowd", 3, 9), Singles()
FAMILIES: tuple[Family, ...] = (SCENES, DIGITS, CHARTS, SIGNS, BILLS, PAIRS, CLIPS, CROWDS, SINGLES)


@dataclass(frozen=True)
class Task:
    """Which family is asked which kinds of questions, and after how many earlier turns."""

    family: Family
    kinds: tuple[str, ...]
    before: int = 0


TASKS: dict[str, Task] = {
    "scene_qa": Task(SCENES, ("color", "shape", "where", "what", "size")),
    "scene_count": Task(SCENES, ("count_all", "count_color", "count_shape")),
    "scene_reasoning": Task(SCENES, ("relation", "relative_color", "relative_shape")),
    "scene_turns": Task(SCENES, ("color", "shape", "where", "what"), before=2),
    "digit_qa": Task(DIGITS, ("digit_of_color", "digit_at", "color_of_digit", "count_digits")),
    "digit_reasoning": Task(DIGITS, ("largest", "smallest", "sum", "greater")),
    "chart_qa": Task(CHARTS, CHARTS.kinds),
    "reading": Task(SIGNS, SIGNS.kinds),
    "document": Task(BILLS, BILLS.kinds),
    "comparison": Task(PAIRS, PAIRS.kinds),
    "clip": Task(CLIPS, CLIPS.kinds),
    "crowd_caption": Task(CROWDS, ("caption",)),
    "caption": Task(SCENES, ("caption",)),
    "digit_caption": Task(DIGITS, ("caption",)),
    "chart_caption": Task(CHARTS, ("caption",)),
    "sign_caption": Task(SIGNS, ("caption",)),
    "bill_caption": Task(BILLS, ("caption",)),
    "pair_caption": Task(PAIRS, ("caption",)),
    "clip_caption": Task(CLIPS, ("caption",)),
    "single": Task(SINGLES, SINGLES.kinds),
}
SCENE_AND_DIGIT_TASKS = ("scene_qa", "scene_count", "scene_reasoning", "scene_turns", "digit_qa", "digit_reasoning")
CAPTION_TASKS = tuple(name for name, task in TASKS.items() if task.kinds == ("caption",))
LABEL_TASKS = ("single",)  # the answer is one of a few labels: for classification
QUESTION_TASKS = tuple(name for name in TASKS if name not in (*CAPTION_TASKS, *LABEL_TASKS))


class PlaygroundConfig(SourceConfig):
    """``tasks`` are taken in turn (twice named, twice as often); ``turns`` questions are asked of a picture."""

    type: str = "playground"
    split: Literal["train", "validation", "test"] = "train"
    tasks: tuple[str, ...] = QUESTION_TASKS
    length: int = 10_000
    turns: int = 1
    size: int = 72
    seed: int = 0

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"the playground has no task {task!r}; {nearest(task, TASKS)}")
        if not tasks:
            raise ValueError("the playground needs at least one task")
        return tasks


class PlaygroundTextConfig(PlaygroundConfig):
    """As the playground's; ``size`` has no meaning here. ``shorthand`` is the share told in code words, one a place."""

    type: str = "playground_text"
    shorthand: float = 0.0


@register("source", "playground")
class Playground(Source):
    """Pictures with exact answers, drawn on demand: example ``i`` depends on the configuration and on ``i`` alone."""

    Config: type[PlaygroundConfig] = PlaygroundConfig
    name = "playground"

    def __len__(self) -> int:
        return self.config.length

    def __getitem__(self, index: int) -> Example:
        """The example; its id names split, seed, task, kind of the last question and its number in the task."""
        thing, task, questions, rng = self.compose(index)
        media = task.family.draw(thing, self.config.size, rng)
        return self.example(index, questions, media)

    def hint(self, index: int) -> int:
        """About how long an example is, by its task alone: nothing is drawn.

        Coarse on purpose: finer classes would fill a batch with one task, and its gradient with one task's noise.
        """
        return self._lengths[index % len(self.config.tasks)]

    @cached_property
    def _lengths(self) -> list[int]:
        """Hundreds of characters in a few examples of each task, on average."""
        step, few = len(self.config.tasks), 6
        found = []
        for task in range(step):
            indices = range(task, min(self.config.length, task + few * step), step)
            texts = [sum(len(q.text) + len(q.answer) for q in self.compose(i)[2]) for i in indices]
            found.append(100 * round(sum(texts) / max(1, len(texts)) / 100))
        return found

    def compose(self, index: int) -> tuple[Any, Task, list[Question], Random]:
        """Thing and questions of an example, not drawn yet. The last question is the one that is scored."""
        c = self.config
        if not 0 <= index < c.length:
            raise DataError(f"{self.name}: example {index} was asked for, there are {c.length}")
        name, turn = self.place(index)
        task = TASKS[name]
        rng = chance(self.config.seed, name, c.split, turn)
        kind = task.kinds[turn % len(task.kinds)]
        thing, question = invent(task.family, kind, turn // len(task.kinds), c.split, rng)
        earlier = more(task.family, thing, {question.text}, task.before or c.turns - 1, rng)
        return thing, task, [*earlier, question], rng

    def place(self, index: int) -> tuple[str, int]:
        """The task of an example, and its number among the task's examples. With split and seed, all it depends on."""
        tasks = self.config.tasks
        lap, slot = divmod(index, len(tasks))
        return tasks[slot], lap * tasks.count(tasks[slot]) + tasks[:slot].count(tasks[slot])

    def example(self, index: int, questions: list[Question], media: tuple[Media, ...]) -> Example:
        """The conversation: media first, then questions and answers in turn."""
        c = self.config
        messages = []
        for i, q in enumerate(questions):
            messages.append(Message("user", (*(media if i == 0 else ()), Text(q.text))))
            messages.append(Message("assistant", (Text(q.answer),)))
        (task, number), last = self.place(index), questions[-1]
        id = f"{self.name}/{c.split}/{c.seed}/{task}/{last.kind}/{number}"
        return Example(id, tuple(messages), self.name, task, (last.answer,))


@register("source", "playground_text")
class PlaygroundText(Playground):
    """The same world in words: the description stands where the picture would, so a language model learns it unseen."""

    Config = PlaygroundTextConfig
    name = "playground_text"

    def __getitem__(self, index: int) -> Example:
        """The example; caption tasks let the model write the description itself."""
        thing, task, questions, rng = self.compose(index)
        code = task.family.shorthand(thing) if rng.random() < self.config.shorthand else None
        if code is None and questions[-1].kind == "caption":
            return self.example(index, questions, ())
        told = Text(code or task.family.caption(thing).answer)
        return self.example(index, questions, (told, Text(" ")))  # type: ignore[arg-type]


def more(family: Family, thing: Any, asked: set[str], count: int, rng: Random) -> list[Question]:
    """Up to ``count`` further questions, no two alike."""
    found: list[Question] = []
    for _ in range(count * 4):
        if len(found) == count:
            break
        question = further(
            family, thing, rng.choice((*family.kinds, "caption")) if count > 2 else rng.choice(family.kinds), rng
        )
        if question is not None and question.text not in asked:
            asked.add(question.text)
            found.append(question)
    return found


__all__ = [
    "CAPTION_TASKS",
    "FAMILIES",
    "LABEL_TASKS",
    "QUESTION_TASKS",
    "SCENE_AND_DIGIT_TASKS",
    "SPLITS",
    "TASKS",
    "Playground",
    "PlaygroundText",
    "Split",
]
