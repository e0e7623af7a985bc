"""What an answer may be: rules that leave out, before each token, those that could not go on to a valid answer.

A ``Constraint`` is what a request carries; ``start`` makes the ``State`` of one answer from it. The engine calls
``mask`` on the logits before each choice and ``advance`` after it, and ends the answer when the state is ``done``.
Where the text so far is already a whole valid answer, a state leaves the stop ids in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from chiasm.errors import DataError
from chiasm.infer.grammars import Grammar, JsonSchema, Regex
from chiasm.types import Piece


class State(Protocol):
    """One answer in the making."""

    @property
    def done(self) -> bool:
        """Nothing can follow: the answer ends without a stop id."""
        ...

    def mask(self, logits: Tensor) -> Tensor:
        """``logits [V]`` float32 → the same (or the same tensor changed) with minus infinity at impossible tokens."""
        ...

    def advance(self, token: int) -> None:
        """``token`` was chosen. It is never a stop id: that ends the answer."""
        ...


class Constraint(Protocol):
    """A rule for a whole answer. It holds no state of any answer: one object serves many requests at once."""

    def start(self, tokenizer: Any) -> State:
        """The state of a new answer. ``tokenizer`` has ``stop_ids`` and what a ``Tokenizer`` has. Raises DataError."""
        ...


class Choices:
    """The answer is one of some texts, as the tokenizer writes each of them."""

    def __init__(self, texts: Sequence[str]):
        if not texts or "" in texts:
            raise DataError(f"{len(texts)} choices were given; give one or more texts, none of them empty")
        self.texts = tuple(dict.fromkeys(texts))

    def start(self, tokenizer: Any) -> ChoicesState:
        """The state of a new answer."""
        runs = [tuple(tokenizer.encode_pieces([Piece(text)]).ids) for text in self.texts]
        return ChoicesState(runs, tuple(tokenizer.stop_ids))


class ChoicesState:
    """The choices that begin with the tokens so far."""

    def __init__(self, runs: Sequence[tuple[int, ...]], stop_ids: tuple[int, ...]):
        self.left, self.stop_ids, self.length = list(runs), stop_ids, 0

    @property
    def done(self) -> bool:
        """Whether the only choice left is complete."""
        return all(len(run) == self.length for run in self.left)

    def mask(self, logits: Tensor) -> Tensor:
        """``logits [V]`` → minus infinity everywhere but at the next tokens of the choices left."""
        open_ids = {run[self.length] for run in self.left if len(run) > self.length}
        if any(len(run) == self.length for run in self.left):
            open_ids.update(self.stop_ids)
        kept = torch.tensor(sorted(open_ids), device=logits.device)
        return torch.full_like(logits, -torch.inf).index_copy(0, kept, logits[kept])

    def advance(self, token: int) -> None:
        """Keep the choices that go on with ``token``."""
        place = self.length
        self.left = [run for run in self.left if len(run) > place and run[place] == token]
        self.length += 1


__all__ = ["Choices", "Constraint", "Grammar", "JsonSchema", "Regex", "State"]
