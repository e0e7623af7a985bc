"""Running the application: one process, a listening socket at once, and an orderly end.

SIGTERM: nothing new is accepted, what runs may finish for ``drain_seconds``, then it is ended with an error event; the
exit status is 0. A second SIGINT ends at once. A dead engine ends the process with status 1, so that whoever started
it can start it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from chiasm.serve.errors import ApiError
from chiasm.serve.options import ServeOptions
from chiasm.serve.state import State

log = logging.getLogger("chiasm.serve")


class Protocol(H11Protocol):
    """As uvicorn's, but what is no HTTP, or has a head without end, is told so in JSON with its own status."""

    def send_400_response(self, msg: str) -> None:
        """Called where the request cannot be parsed; its connection is closed."""
        unread, _ = self.conn.trailing_data  # of a head without end all that came
        long = len(unread) > self.config.h11_max_incomplete_event_size  # type: ignore[operator]
        status, text = (431, "the request's head is too long") if long else (400, "this is not an HTTP request")
        body = ApiError(status, text).response().body
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        events = (h11.Response(status_code=status, headers=headers), h11.Data(data=bytes(body)), h11.EndOfMessage())
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server with the end described above."""

    def __init__(self, config: uvicorn.Config, state: State):
        super().__init__(config)
        self.state, self.status = state, 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles the signals, and does not raise them again afterwards: an orderly end has status 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    async def startup(self, sockets: Any = None) -> None:
        """Also starts the watch over the engines."""
        await super().startup(sockets)
        self._watch = asyncio.create_task(self._watching())

    async def shutdown(self, sockets: Any = None) -> None:
        """Drains, then ends what is left."""
        self.state.draining = True
        self._watch.cancel()
        ending = asyncio.get_running_loop().call_later(self.state.options.drain_seconds, self.state.aborted.set)
        late = asyncio.create_task(self._hanging_up())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            late.cancel()

    async def _hanging_up(self) -> None:
        """Closes connections without a request that were accepted while the listening sockets closed."""
        while True:
            await asyncio.sleep(0.2)
            for connection in list(self.server_state.connections):
                cycle = connection.cycle  # type: ignore[union-attr]
                if (cycle is None or cycle.response_complete) and not connection.transport.is_closing():
                    connection.shutdown()

    async def _watching(self) -> None:
        """Ends the process when an engine stays dead: health is red meanwhile."""
        dead: float | None = None
        while True:
            await asyncio.sleep(min(1.0, self.state.options.watch_seconds / 5))
            broken = any(served.state == "ready" and not served.healthy for served in self.state.models.values())
            dead = (dead or time.monotonic()) if broken else None
            if dead is not None and time.monotonic() - dead >= self.state.options.watch_seconds:
                log.critical("an engine has died: the server ends")
                self.status, self.should_exit = 1, True
                self.state.aborted.set()
                return


def server(app: Starlette, options: ServeOptions, log_level: str = "warning") -> Server:
    """The server of an application, not started."""
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        http=Protocol,
        ws="none",
        loop="asyncio",
        log_level=log_level,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(options.drain_seconds) + 3,
        h11_max_incomplete_event_size=max(65536, 2 * options.limits.header_bytes),
    )
    return Server(config, app.state.serve)


def run(app: Starlette, options: ServeOptions, log_level: str = "info") -> int:
    """Serve until a signal; the exit status."""
    running = server(app, options, log_level)
    running.run()
    return running.status if running.started else 1
