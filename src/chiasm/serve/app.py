"""The ASGI application: routes, and what every request passes on its way to them."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chiasm.serve import chat, embeddings, errors, models
from chiasm.serve.errors import ApiError
from chiasm.serve.gate import Gate
from chiasm.serve.middleware import Guard, Identify
from chiasm.serve.options import Models, ServeOptions
from chiasm.serve.state import State


def create_app(served: Models, options: ServeOptions | None = None, gate: Gate | None = None) -> Starlette:
    """The application for some models. Those that are not loaded yet are loaded when it starts, beside the requests.

    ``app.state.serve`` is its ``State``.
    """
    options = options or ServeOptions()
    state = State(served, options, gate)
    state.metrics.gauges.append(partial(models.live, state))
    app = Starlette(
        routes=[*_routes(), *_page(served, options)],
        middleware=_middleware(state, options),
        exception_handlers={ApiError: errors.handle, HTTPException: _unrouted},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.serve = state
    return app


def _routes() -> list[BaseRoute]:
    get: list[tuple[str, Callable[..., Any]]] = [
        ("/health", models.health),
        ("/version", models.version),
        ("/metrics", models.metrics),
        ("/v1/models", models.listing),
        ("/v1/models/{name:path}", models.single),
    ]
    post: list[tuple[str, Callable[..., Any]]] = [
        ("/v1/chat/completions", chat.completions),
        ("/v1/embeddings", embeddings.embeddings),
        ("/tokenize", models.tokenize),
    ]
    return [
        *(Route(path, route, methods=["GET"]) for path, route in get),
        *(Route(path, route, methods=["POST"]) for path, route in post),
    ]


def _page(served: Models, options: ServeOptions) -> Sequence[BaseRoute]:
    """The routes of the chat page, where it is there and wanted."""
    if not options.page or find_spec("chiasm.serve.page") is None:
        return []
    from chiasm.serve import page

    return page.routes(served, options)


def _middleware(state: State, options: ServeOptions) -> list[Middleware]:
    """From the outside in. Other origins are answered to before keys are asked for, since a preflight has none."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(options.origins),
        allow_credentials=False,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )
    return [Middleware(Identify, state), *([cors] if options.origins else []), Middleware(Guard, state)]


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    state: State = app.state.serve
    waiting = [served for served in state.models.values() if served.state == "loading"]

    def load() -> None:
        for served in waiting:
            served.load()

    if waiting:
        threading.Thread(target=load, name="chiasm-load", daemon=True).start()
    yield
    for served in state.models.values():
        if served.service is not None:
            served.service.stop(drain=0)


async def _unrouted(request: Request, error: Exception) -> Response:
    """404 and 405 in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    text = {404: "there is nothing here; see docs/serving.md for the routes", 405: "this route wants another method"}
    return ApiError(
        error.status_code, text.get(error.status_code, "refused"), headers=dict(error.headers or {})
    ).response()
