"""The web page and what only it asks for: where the model looks, and the stages that ``chiasm inspect`` shows.

The page is plain files of this folder's ``page/``, read once and served from memory: no build, nothing from elsewhere,
nothing inline, so that the content policy of ``headers`` holds without an exception. The two questions of its own go
through the same gate, limits and key check as a chat completion.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import anyio
from PIL import Image as Pillow
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chiasm.errors import ChiasmError
from chiasm.infer.look import Heat, Look, look
from chiasm.report.inspection import Walk, walk
from chiasm.serve.body import reading
from chiasm.serve.content import open_messages
from chiasm.serve.errors import ApiError, dumps, refused
from chiasm.serve.options import Models, Served, ServeOptions
from chiasm.serve.state import find, state_of

FOLDER = Path(__file__).with_suffix("")
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
LONGEST_ANSWER = 20_000  # characters that may be looked at
SHOWN_UNITS, SHOWN_TOKENS = 12, 600  # tiles and tokens of one inspection that are sent


def routes(models: Models, options: ServeOptions) -> list[Route]:
    """The page at ``/`` (where ``options.page``), its files, and its two questions."""
    if not options.page:
        return []
    one = anyio.Semaphore(1)  # a look takes the memory of a whole prompt: one at a time
    return [
        *files(),
        Route("/chiasm/look", partial(_answer, _Look, _looked, one), methods=["POST"]),
        Route("/chiasm/inspect", partial(_answer, _Inspect, _walked, one), methods=["POST"]),
    ]


def files() -> list[Route]:
    """A route for each file of the page; ``index.html`` is ``/``."""
    found = []
    for path in sorted(FOLDER.iterdir()):
        if path.suffix not in KINDS:
            continue
        data = path.read_bytes()
        headers = {"cache-control": "no-cache", "etag": f'"{hashlib.sha256(data).hexdigest()[:32]}"'}
        give = partial(_file, data, KINDS[path.suffix], headers)
        found.append(Route("/" if path.name == "index.html" else f"/page/{path.name}", give))
        if path.name == "icon.svg":
            found.append(Route("/favicon.ico", give))
    return found


async def _file(data: bytes, kind: str, headers: dict[str, str], request: Request) -> Response:
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type=kind)


# ------------------------------------------------------------------------------------------------------------ questions


class _Inspect(BaseModel):
    """A conversation, as in a chat completion."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str = Field(max_length=512)
    messages: list[Any]


class _Look(_Inspect):
    """``word`` None: the whole answer. ``method`` None: attention where the model tells it."""

    answer: str = Field(max_length=LONGEST_ANSWER)
    word: int | None = Field(None, ge=0)
    method: Literal["attention", "gradient"] | None = None


async def _answer(
    kind: type[_Inspect], ask: Callable[[Served, Any, Any], dict[str, Any]], one: anyio.Semaphore, request: Request
) -> Response:
    """Read, open the pictures, ask in a thread, answer in JSON. Raises ApiError."""
    state = state_of(request)
    with state.admitted():
        async with reading(request) as values:
            try:
                asked = kind.model_validate(values)
            except ValidationError as error:
                place = ".".join(map(str, error.errors()[0]["loc"])) or None
                raise ApiError(400, f"{place}: {error.errors()[0]['msg']}", place) from None
            served = find(request, asked.model)
            if not hasattr(served.vlm, "processor"):
                raise ApiError(400, "this model writes no answers, so there is nothing to look into", "model")
            messages = await open_messages(request, asked.messages)
            async with one:
                try:
                    found = await anyio.to_thread.run_sync(ask, served, messages, asked)
                except ChiasmError as error:
                    raise refused(error) from None
    return Response(dumps(found), media_type="application/json")


def _looked(served: Served, messages: Any, asked: _Look) -> dict[str, Any]:
    vlm = served.vlm
    found: Look = look(vlm.model, vlm.processor, messages, asked.answer, asked.word, asked.method)
    return {
        "object": "chiasm.look",
        "model": served.name,
        "method": found.method,
        "word": {"text": found.word.text, "start": found.word.start, "end": found.word.end},
        "words": [{"text": word.text, "start": word.start, "end": word.end} for word in found.words],
        "pictures": [_heat(heat) for heat in found.heats],
    }


def _heat(heat: Heat) -> dict[str, Any]:
    """A map as a grey picture: white is ``peak``, the largest value, as a part of the map's sum."""
    total, peak = float(heat.values.sum()), float(heat.values.max())
    grey = (heat.values / peak * 255).round().byte() if peak > 0 else heat.values.byte()
    return {
        "kind": heat.kind,
        "index": heat.index,
        "frame": heat.frame,
        "height": heat.size[0],
        "width": heat.size[1],
        "share": round(heat.share, 6),
        "peak": peak / total if total > 0 else 0.0,
        "heat": data_url(Pillow.fromarray(grey.numpy())),
    }


def _walked(served: Served, messages: Any, asked: _Inspect) -> dict[str, Any]:
    found: Walk = walk(served.vlm, messages, max_new_tokens=0, name=served.name)
    return {
        "object": "chiasm.inspection",
        "model": served.name,
        "counts": found.counts,
        "media": found.media,
        "tokens": [
            {"text": row.text, "id": row.id, "medium": row.medium} for row in found.tokens if row.medium is None
        ][:SHOWN_TOKENS],
        "units": [{"medium": u.medium, "index": u.index, "picture": data_url(u.picture)} for u in found.units][
            :SHOWN_UNITS
        ],
        "stages": [
            {
                "name": stage.name,
                "shape": stage.shape,
                "what": stage.what,
                "numbers": stage.numbers,
                "picture": stage.picture and data_url(stage.picture),
            }
            for stage in found.stages
        ],
        "candidates": [{"text": text, "probability": round(p, 6)} for text, p in found.candidates],
    }


def data_url(picture: Pillow.Image) -> str:
    """A picture as a PNG data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
