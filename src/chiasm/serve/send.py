"""Sending answers: whole, or as server-sent events. A client that goes away stops the computation either way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chiasm.serve.errors import ApiError, dumps, internal
from chiasm.serve.metrics import Metrics

EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]
PING = b": ping\n\n"


class Answering(Response):
    """A response that is computed while the client listens. ``closed`` is called at its end, whatever the end is."""

    def __init__(self, metrics: Metrics, closed: Callable[[], None], send_seconds: float):
        super().__init__()
        self.metrics, self.closed, self.send_seconds = metrics, closed, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Races the answer against the client's going away."""
        answer = asyncio.ensure_future(self.answer(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.metrics.cancelled.add()
        finally:
            for task in (answer, gone):
                task.cancel()
            try:
                with suppress(asyncio.CancelledError, OSError):
                    await answer
            finally:
                self.closed()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The response itself."""
        raise NotImplementedError


class Whole(Answering):
    """JSON when it is complete; an error has its own status."""

    def __init__(self, made: Callable[[], Awaitable[dict[str, Any]]], *rest: Any):
        super().__init__(*rest)
        self.made = made

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            response = Response(dumps(await self.made()), media_type="application/json")
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)


class Stream(Answering):
    """Server-sent events. What goes wrong after the first byte is an event of its own."""

    def __init__(self, events: Callable[[], AsyncGenerator[bytes, None]], *rest: Any):
        super().__init__(*rest)
        self.events = events

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        try:
            async with aclosing(self.events()) as events:
                async for event in events:
                    await self._send(send, event)
            await self._send(send, b"data: [DONE]\n\n")
        except TimeoutError:  # the client takes nothing: it is as good as gone
            self.metrics.cancelled.add()
            return
        except ApiError as error:
            await self._send(send, sse(error.body()))
        except Exception:
            await self._send(send, sse(internal().body()))
            raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: bytes) -> None:
        with anyio.fail_after(self.send_seconds):
            await send({"type": "http.response.body", "body": event, "more_body": True})


def sse(value: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + dumps(value) + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
