"""The answers of one request while they are written: pieces of several handles in the order of their coming."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from chiasm.errors import ChiasmError
from chiasm.infer.request import Stopped
from chiasm.serve.errors import ApiError, busy, internal, refused
from chiasm.serve.options import Served
from chiasm.serve.state import State

log = logging.getLogger("chiasm.serve")
TICK = 0.25  # seconds between looks at what could end an answer from outside


@dataclass
class Flow:
    """Iterates over ``(answer, piece)``; ``(-1, None)`` after each ``ping_seconds`` of silence.

    Leaving the loop for any reason cancels what still runs: the engine drops it at its next step. ``finishes`` are
    known when the loop has ended by itself. Raises ApiError where an answer cannot be completed.
    """

    state: State
    served: Served
    handles: Sequence[Any]
    began: float = field(default_factory=time.monotonic)
    finishes: list[Any] = field(default_factory=list)

    async def pieces(self) -> AsyncGenerator[tuple[int, Any], None]:
        """See above."""
        queue: asyncio.Queue[tuple[int, Any, bool]] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(i, handle, queue)) for i, handle in enumerate(self.handles)]
        found: dict[int, Any] = {}
        getting: asyncio.Future[tuple[int, Any, bool]] | None = None
        quiet = checked = time.monotonic()
        try:
            while len(found) < len(self.handles):
                if time.monotonic() - checked >= TICK:
                    checked = time.monotonic()
                    self._check()
                if getting is None and queue.qsize():
                    index, item, last = queue.get_nowait()
                else:
                    getting = getting or asyncio.ensure_future(queue.get())
                    # Not wait_for: until Python 3.12 it loses a cancellation that comes together with an item.
                    await asyncio.wait((getting,), timeout=TICK)
                    if not getting.done():
                        if time.monotonic() - quiet >= self.state.options.ping_seconds:
                            quiet = time.monotonic()
                            yield -1, None
                        continue
                    (index, item, last), getting = getting.result(), None
                quiet = time.monotonic()
                if not last:
                    yield index, item
                    continue
                found[index] = self._ended(item)
        finally:
            self.cancel()
            left: list[asyncio.Future[Any]] = [*tasks, *([getting] if getting else [])]
            for task in left:
                task.cancel()
            for task in left:
                with suppress(asyncio.CancelledError):
                    await task
        self.finishes = [found[i] for i in range(len(self.handles))]
        self._count()

    def cancel(self) -> None:
        """Stop the answers that are still written."""
        for handle in self.handles:
            handle.cancel()

    def _check(self) -> None:
        options = self.state.options
        if self.state.aborted.is_set():
            raise busy("the server is shutting down", "shutting_down", options.retry_seconds)
        if not self.served.healthy:
            raise internal()
        if time.monotonic() - self.began > options.limits.request_seconds:
            text = f"the answer took more than {options.limits.request_seconds:g} s"
            raise ApiError(503, text, code="timeout", headers={"x-should-retry": "false"})

    def _ended(self, finish: Any) -> Any:
        if isinstance(finish, Exception) or finish.reason == "error":
            error = finish if isinstance(finish, Exception) else finish.error
            if isinstance(error, Stopped):
                self._check()
            elif isinstance(error, ChiasmError):
                raise refused(error)
            log.error("an answer failed", exc_info=error)
            raise internal()
        if finish.reason == "cancelled":
            self._check()
            raise busy("the answer was cancelled", "cancelled", self.state.options.retry_seconds)
        return finish

    def _count(self) -> None:
        metrics, name = self.state.metrics, self.served.name
        passed = time.monotonic() - self.began
        for finish in self.finishes:
            metrics.success.add(finished_reason=finish.reason, model_name=name)
            metrics.prompt_tokens.add(finish.prompt_tokens, model_name=name)
            metrics.generation_tokens.add(finish.completion_tokens, model_name=name)
            metrics.first.see(finish.seconds_to_first or 0.0, model_name=name)
            metrics.whole.see(passed, model_name=name)
            metrics.lengths.see(finish.prompt_tokens, model_name=name)
            metrics.written.see(finish.completion_tokens, model_name=name)
            if finish.tokens_per_second:
                metrics.between.see(1 / finish.tokens_per_second, model_name=name)


async def _pump(index: int, handle: Any, queue: asyncio.Queue[tuple[int, Any, bool]]) -> None:
    """One handle's pieces, then how it ended."""
    try:
        async for piece in handle:
            queue.put_nowait((index, piece, False))
        queue.put_nowait((index, handle.finish, True))
    except Exception as error:
        queue.put_nowait((index, error, True))
