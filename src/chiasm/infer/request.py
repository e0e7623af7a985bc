"""What is asked of the engine and what comes back, without a model: requests, pieces of text, handles."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from chiasm.errors import ChiasmError
from chiasm.infer.constraints import Constraint
from chiasm.infer.sampling import Sampling
from chiasm.types import Message


class QueueFull(ChiasmError):
    """The engine has as much waiting as it may. ``reason`` is "requests" or "tokens"; ``retry_after`` is in seconds."""

    def __init__(self, message: str, reason: str, retry_after: float = 1.0):
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


class Stopped(ChiasmError):
    """The engine takes no more requests: it was stopped, or its thread died."""


@dataclass(frozen=True)
class Request:
    """One answer wanted. Media in ``messages`` are already opened and checked by whoever accepted them.

    ``salt`` separates what is remembered for different users. ``continue_final``: the last message is the beginning
    of the answer. ``tools`` are rendered by templates that can; ``lead`` are pieces of a rendered conversation that
    follow the prompt. ``marks`` are control tokens that the answer's text shows, each as ``mark_of`` it: no typed or
    written text does.
    """

    messages: Sequence[Message]
    sampling: Sampling = field(default_factory=lambda: Sampling.parse({}))
    constraint: Constraint | None = None
    tools: list[dict[str, Any]] | None = None
    salt: str = ""
    continue_final: bool = False
    id: str = ""
    lead: tuple[Any, ...] = ()
    marks: tuple[int, ...] = ()


def mark_of(place: int) -> str:
    """The character that the ``place``-th of a request's marks is shown as."""
    return chr(MARK + place)


MARK = 0x10FF00  # in a private-use plane; a text that spells one shows U+FFFD there
MARKS = 8


@dataclass(frozen=True)
class TokenLogprob:
    """The logarithm of a chosen token's probability, before temperature and cuts, and the best others'.

    ``text`` is what the token adds (an incomplete character shows as U+FFFD), ``bytes`` what it stands for; ``top`` are
    ``(id, logprob, text, bytes)`` of the best, the likeliest first.
    """

    id: int
    logprob: float
    text: str
    bytes: bytes
    top: tuple[tuple[int, float, str, bytes], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Some text of an answer: it never ends within a character, nor shows a part of a stop string."""

    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finish:
    """How an answer ended. ``cached_tokens`` of the prompt were not computed again; times are in seconds."""

    reason: Literal["stop", "length", "cancelled", "error"]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: Exception | None = None
    seconds_to_first: float = 0.0
    tokens_per_second: float = 0.0
    image_tokens: int = 0  # of the prompt's tokens, those of media
    seed: int | None = None


class Handle:
    """One answer as it comes: iterate (also with ``async for``) over its pieces, then read ``finish``.

    Any thread or event loop may read it, one at a time. Nothing is lost when nobody reads: pieces wait.
    """

    def __init__(self, request: Request):
        self.request = request
        self.finish: Finish | None = None
        self._pieces: deque[Piece] = deque()
        self._news = threading.Condition()
        self._cancelled = False
        self._listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def cancel(self) -> None:
        """Stop: the engine drops the answer before its next step. Harmless when it has ended."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled

    def put(self, piece: Piece) -> None:
        """The engine's side: one more piece."""
        with self._news:
            self._pieces.append(piece)
            self._wake()

    def end(self, finish: Finish) -> None:
        """The engine's side: nothing follows. Only the first end counts."""
        with self._news:
            if self.finish is None:
                self.finish = finish
            self._wake()

    def _wake(self) -> None:
        self._news.notify_all()
        for loop, event in self._listeners:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with self._news:
                while not self._pieces and self.finish is None:
                    self._news.wait()
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
            yield piece

    async def __aiter__(self) -> AsyncIterator[Piece]:
        event = asyncio.Event()
        listener = (asyncio.get_running_loop(), event)
        with self._news:
            self._listeners.append(listener)
        try:
            while True:
                event.clear()
                with self._news:
                    pieces = list(self._pieces)
                    self._pieces.clear()
                    ended = self.finish is not None
                for piece in pieces:
                    yield piece
                if ended:
                    return
                await event.wait()
        finally:
            with self._news:
                self._listeners.remove(listener)

    def result(self, timeout: float | None = None) -> tuple[str, Finish]:
        """Wait for the end: the text that was not read yet, joined, and how it ended. Raises TimeoutError."""
        with self._news:
            if not self._news.wait_for(lambda: self.finish is not None, timeout):
                raise TimeoutError(f"request {self.request.id!r} has not ended after {timeout} s")
            text = "".join(piece.text for piece in self._pieces)
            self._pieces.clear()
            assert self.finish is not None
            return text, self.finish


__all__ = ["Finish", "Handle", "Piece", "QueueFull", "Request", "Stopped", "TokenLogprob"]
