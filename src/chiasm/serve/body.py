"""Bodies of requests: counted while they are read, in time, and JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from chiasm.serve.errors import ApiError
from chiasm.serve.state import State, state_of


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises ApiError: 400, 408, 413, 415, or 503 where too much is being read."""
    async with reading(request) as values:
        return values


@asynccontextmanager
async def reading(request: Request) -> AsyncIterator[dict[str, Any]]:
    """``read_json``, counted as memory in use until the end of the block."""
    state = state_of(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    before = state.held
    counted = 0

    def count(size: int) -> None:
        nonlocal counted
        counted += size
        state.held += size

    try:
        data = await _read(request, state, count)
        yield _parse(data)
    finally:
        state.held -= counted
        assert state.held >= 0, (before, counted)


async def _read(request: Request, state: State, count: Any) -> bytes:
    limits = state.options.limits
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or len(declared) > 18:
        raise ApiError(400, "Content-Length is not a number")
    if int(declared) > limits.body_bytes:
        raise _too_large(limits.body_bytes)
    body = bytearray()
    try:
        with anyio.fail_after(limits.body_seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limits.body_bytes:
                    raise _too_large(limits.body_bytes)
                if state.held + len(chunk) > limits.held_bytes:
                    raise state.full("bytes", "too many bytes are being read")
                count(len(chunk))
                body += chunk
    except TimeoutError:
        raise ApiError(408, f"the body took more than {limits.body_seconds:g} s") from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None
    return bytes(body)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        values = from_json(data, allow_inf_nan=False)
    except ValueError:
        raise ApiError(400, "the body is not JSON in UTF-8", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return values


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is above the limit of {limit} bytes", code="body_too_large")
