"""Examples of another source put one after the other: shots before a question, or a document of pictures and texts.

What Flamingo (arXiv:2204.14198) and OpenFlamingo train on as web documents, and ask few-shot questions with. A
conversation is ``count`` other examples, each with its own media and answer, and then the example itself.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Literal

from pydantic import Field, model_validator

from chiasm import registry
from chiasm.config import part
from chiasm.data.base import Example, Source, SourceConfig, id_of, with_answer
from chiasm.errors import ConfigError
from chiasm.types import Message


class ShotsConfig(SourceConfig):
    """``count``: shots before each example, or the least and the most (then drawn for each). ``of``: where they come
    from (None: the same source); ``learn``: which answers are trained on, all or the example's own.
    """

    type: str = "shots"
    source: part("source")  # type: ignore[valid-type]
    of: part("source") | None = None  # type: ignore[valid-type]
    count: int | tuple[int, int] = Field(default=4)
    learn: Literal["all", "last"] = "all"
    seed: int = 0

    @model_validator(mode="after")
    def _rises(self) -> ShotsConfig:
        low, high = self.span
        if not 0 <= low <= high:
            raise ConfigError(f"shots: count {self.count} must be a number from 0, or two in rising order")
        return self

    @property
    def span(self) -> tuple[int, int]:
        """The least and the most shots."""
        return (self.count, self.count) if isinstance(self.count, int) else self.count


@registry.register("source", "shots")
class Shots(Source):
    """Example ``i`` of the source, after shots that depend on the seed and on ``i`` alone."""

    Config = ShotsConfig
    name = "shots"

    def __init__(self, config: ShotsConfig):
        super().__init__(config)
        self.source: Source = registry.get("source", config.source.type)(config.source)
        self.of: Source = self.source if config.of is None else registry.get("source", config.of.type)(config.of)
        self.quick = self.source.quick and self.of.quick
        spare = len(self.of) - (config.of is None)
        if spare < config.span[1]:
            raise ConfigError(
                f"shots: {config.span[1]} shots are asked for, but there are {spare} other examples to take them from"
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """The example with its shots before it. A system turn stays in front. Raises DataError."""
        example = self.source[index]
        rng = Random(f"shots {self.config.seed} {index}")
        shots: list[Message] = []
        for number in self._numbers(index, rng):
            shot = with_answer(self.of[number])
            learned = None if self.config.learn == "all" else False
            shots += [
                replace(m, train=learned) if m.role == "assistant" else m for m in shot.messages if m.role != "system"
            ]
        first = int(bool(example.messages) and example.messages[0].role == "system")
        return replace(example, messages=(*example.messages[:first], *shots, *example.messages[first:]))

    def id_of(self, index: int) -> str:
        """The id of the example itself."""
        return id_of(self.source, index)

    def _numbers(self, index: int, rng: Random) -> list[int]:
        """The shots' numbers, each once, never the example itself."""
        wanted, own = rng.randint(*self.config.span), self.of is self.source
        found: list[int] = []
        while len(found) < wanted:
            number = rng.randrange(len(self.of))
            if number not in found and not (own and number == index):
                found.append(number)
        return found
