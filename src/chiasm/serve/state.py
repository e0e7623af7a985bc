"""What the routes of a server share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio
from starlette.requests import Request

from chiasm.serve.errors import ApiError, busy, shown
from chiasm.serve.gate import Gate
from chiasm.serve.metrics import Metrics
from chiasm.serve.options import Models, Served, ServeOptions


class State:
    """Models, options, the gate, and what is going on right now."""

    def __init__(self, models: Models, options: ServeOptions, gate: Gate | None = None):
        self.models, self.options = models, options
        self.gate = gate or Gate(options.media)
        self.metrics = Metrics()
        self.draining = False
        self.aborted = anyio.Event()  # set when a drain has lasted long enough: what still runs is ended
        self.answering = 0  # requests between their head and their last byte
        self.held = 0  # bytes of bodies in memory
        self._opening: anyio.CapacityLimiter | None = None

    @property
    def opening(self) -> anyio.CapacityLimiter:
        """Bounds how many requests have decoded pictures in memory."""
        if self._opening is None:
            self._opening = anyio.CapacityLimiter(self.options.limits.opened)
        return self._opening

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a request in. Raises ApiError 503 where there are too many."""
        if self.answering >= self.options.limits.requests:
            raise self.full("requests", "too many requests are being answered")
        self.answering += 1
        try:
            yield
        finally:
            self.answering -= 1

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Counts bytes in. Raises ApiError 503 where there are too many."""
        if size and self.held + size > self.options.limits.held_bytes:
            raise self.full("bytes", "too many bytes are being read")
        self.held += size
        try:
            yield
        finally:
            self.held -= size

    def full(self, reason: str, message: str) -> ApiError:
        """503 with Retry-After, counted."""
        self.metrics.rejections.add(reason=reason)
        return busy(f"{message}; try again in {self.options.retry_seconds} s", "queue_full", self.options.retry_seconds)


def state_of(request: Request) -> State:
    """The state of the server that a request came to."""
    state: State = request.app.state.serve
    return state


def find(request: Request, name: str) -> Served:
    """A model by its name. Raises ApiError: 404 for an unknown one, 503 while it loads, 500 where it is broken."""
    state = state_of(request)
    served = state.models.get(name)
    if served is None:
        raise ApiError(404, f"there is no model {shown(name)}; GET /v1/models lists them", "model", "model_not_found")
    if served.state == "loading":
        raise busy(f"model {shown(name)} is still loading", "model_loading", state.options.retry_seconds)
    if not served.healthy:
        raise ApiError(500, f"model {shown(name)} cannot answer: it failed, and its server must be restarted")
    return served
