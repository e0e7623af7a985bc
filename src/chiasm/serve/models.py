"""``GET /v1/models``, ``/health``, ``/version``, ``/metrics``, which answer while models load; ``POST /tokenize``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response

from chiasm import __version__
from chiasm.errors import ChiasmError
from chiasm.serve import content
from chiasm.serve.body import reading
from chiasm.serve.errors import ApiError, dumps, refused, shown
from chiasm.serve.metrics import Labels, gauge
from chiasm.serve.options import Served
from chiasm.serve.state import State, find, state_of


def json(value: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(dumps(value), status, media_type="application/json")


async def listing(request: Request) -> Response:
    """All models."""
    return json({"object": "list", "data": [_model(served) for served in state_of(request).models.values()]})


async def single(request: Request) -> Response:
    """One model by its name."""
    name = request.path_params["name"]
    served = state_of(request).models.get(name)
    if served is None:
        raise ApiError(404, f"there is no model {shown(name)}; GET /v1/models lists them", "model", "model_not_found")
    return json(_model(served))


def _model(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "chiasm"}


async def health(request: Request) -> Response:
    """200 where every model can answer, else 503 with what is wrong."""
    state = state_of(request)
    states = {name: served.state if served.state != "ready" else "dead" for name, served in state.models.items()}
    wrong = [states[name] for name, served in state.models.items() if not served.healthy]
    status = "draining" if state.draining else next(iter(sorted(wrong)), "ok")
    return json({"status": status}, 200 if status == "ok" else 503)


async def version(request: Request) -> Response:
    """This package's version."""
    return json({"version": __version__})


async def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    return Response(state_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def tokenize(request: Request) -> Response:
    """``{"model", "messages"}`` or ``{"model", "prompt"}`` → how many tokens that is; for a prompt also which."""
    state = state_of(request)
    async with reading(request) as values:
        name = values.get("model")
        served = find(request, name if isinstance(name, str) else "")
        prompt = values.get("prompt")
        if isinstance(prompt, str):
            if len(prompt) > state.options.limits.text_characters:
                raise ApiError(400, "the prompt is too long", "prompt", "context_length_exceeded")
            ids = await anyio.to_thread.run_sync(served.vlm.tokenizer.encode, prompt)
            return json({"count": len(ids), "tokens": ids})
        if not served.can_chat:
            raise ApiError(400, "this model writes no answers: give it a prompt", "messages")
        messages = await content.open_messages(request, values.get("messages"))
        try:
            return json({"count": await anyio.to_thread.run_sync(served.service.count, messages)})
        except ChiasmError as error:
            raise refused(error) from None


GAUGES = (  # our name, a service's, what it says, kind
    ("num_requests_running", "running", "Requests that are being answered.", "gauge"),
    ("num_requests_waiting", "waiting", "Requests in the queue.", "gauge"),
    ("kv_cache_usage_perc", "kv_usage", "Share of the key-value cache in use, 0 to 1.", "gauge"),
    ("prefix_cache_queries_total", "prompt_tokens", "Prompt tokens looked up in the prefix cache.", "counter"),
    ("prefix_cache_hits_total", "cached_tokens", "Prompt tokens found in the prefix cache.", "counter"),
    ("mm_cache_queries_total", "feature_queries", "Pictures looked up in the cache of features.", "counter"),
    ("mm_cache_hits_total", "feature_hits", "Pictures found in the cache of features.", "counter"),
)


def live(state: State) -> Iterable[str]:
    """What is true now: the engines' numbers, refused media, models."""
    stats = {
        served.name: served.service.stats() for served in state.models.values() if served.healthy and served.service
    }
    for name, key, told, kind in GAUGES:
        values: dict[Labels, float] = {
            (("model_name", model),): found[key] for model, found in stats.items() if found.get(key) is not None
        }
        if values:
            yield from gauge(f"chiasm:{name}", told, values, kind)
    rejected: dict[Labels, float] = {(("reason", r),): count for r, count in list(state.gate.rejected.items())}
    yield from gauge("chiasm:media_rejections_total", "Pictures that were refused.", rejected, "counter")
    ready: dict[Labels, float] = {(("model_name", s.name),): float(s.healthy) for s in state.models.values()}
    yield from gauge("chiasm:model_healthy", "1 where a model can answer.", ready)
