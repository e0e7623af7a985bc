"""What every family of pictures shares: words, splits that cannot overlap, seeded chance, and the family contract.

A family (scenes, digits, charts, words, comparisons, clips) invents a *thing*, says in words what it is, draws it and
asks about it. A thing's split follows from a hash of its words, so the same thing can never be in two splits, however
many examples are drawn and whatever the seeds are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

from chiasm.types import Media

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (250, 142, 20),
    "yellow": (238, 218, 24),
    "green": (36, 152, 52),
    "blue": (40, 76, 226),
    "purple": (138, 44, 168),
    "pink": (250, 138, 198),
    "black": (24, 24, 24),
}
NUMBERS = tuple(str(n) for n in range(19))

MAX_TRIES = 20_000


@dataclass(frozen=True)
class Question:
    """A question of a certain ``kind`` about a thing, with its only right answer."""

    kind: str
    text: str
    answer: str


class Family:
    """One family of pictures. ``kinds`` are its questions; ``balanced`` the answers a kind must give in turn."""

    name: str = ""
    kinds: tuple[str, ...] = ()
    balanced: ClassVar[dict[str, tuple[str, ...]]] = {}
    caption_question = "Describe the picture."

    def sample(self, rng: Random, split: Split) -> Any:
        """A thing; ``split`` matters only to families that draw from stored material (handwriting)."""
        raise NotImplementedError

    def describe(self, thing: Any) -> str:
        """The thing in words, complete: two things with the same words are the same thing."""
        raise NotImplementedError

    def draw(self, thing: Any, size: int, rng: Random) -> tuple[Media, ...]:
        """The thing as pictures of ``size`` × ``size`` pixels, or as a clip of such pictures."""
        raise NotImplementedError

    def ask(self, thing: Any, kind: str, rng: Random) -> Question | None:
        """A question of this kind about the thing; None where it can't be asked."""
        raise NotImplementedError

    def shorthand(self, thing: Any) -> str | None:
        """The thing as a row of code words, one for each place, where its family has them."""
        return None

    def caption(self, thing: Any) -> Question:
        """The question for the whole description."""
        words = self.describe(thing)
        return Question("caption", self.caption_question, words[0].upper() + words[1:] + ".")


def split_of(words: str) -> Split:
    """The split of the thing with this description: eight tenths train, one validation, one test."""
    bucket = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def chance(*key: object) -> Random:
    """A generator seeded by the key alone: the same on every machine and in every process."""
    return Random("/".join(str(k) for k in key))


def invent(family: Family, kind: str, want: int, split: Split, rng: Random) -> tuple[Any, Question]:
    """A thing of this split that can be asked a question of this kind.

    Where the kind is balanced, number ``want`` decides the answer, so that consecutive numbers give each answer equally
    often and the question alone tells nothing.
    """
    answers = family.balanced.get(kind)
    answer = answers[want % len(answers)] if answers else None
    for _ in range(MAX_TRIES):
        thing = family.sample(rng, split)
        question = family.caption(thing) if kind == "caption" else family.ask(thing, kind, rng)
        if question is None or (answer is not None and question.answer != answer):
            continue
        if split_of(family.describe(thing)) == split:
            return thing, question
    raise AssertionError(f"{family.name}: no thing for kind {kind!r} with answer {answer!r} in {MAX_TRIES} tries")


def further(family: Family, thing: Any, kind: str, rng: Random) -> Question | None:
    """One more question about a thing that is there already; a balanced kind draws its answer first, by rejection."""
    if kind == "caption":
        return family.caption(thing)
    answers = family.balanced.get(kind)
    if not answers:
        return family.ask(thing, kind, rng)
    answer = rng.choice(answers)
    for _ in range(8):
        question = family.ask(thing, kind, rng)
        if question is None or question.answer == answer:
            return question
    return None


def article(words: str) -> str:
    """``a red circle``, ``an orange star``."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def listed(items: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
