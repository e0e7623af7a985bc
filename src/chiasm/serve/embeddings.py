"""``POST /v1/embeddings``: vectors of texts and pictures, from models with two towers."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from chiasm.errors import ChiasmError
from chiasm.serve import content
from chiasm.serve.body import reading
from chiasm.serve.errors import ApiError, dumps, refused
from chiasm.serve.gate import Wanted
from chiasm.serve.options import Limits, Served
from chiasm.serve.schema import explained
from chiasm.serve.state import State, find, state_of


class EmbeddingRequest(BaseModel):
    """OpenAI's request. An item of ``input`` may also be a part of a chat message, so that pictures have a place."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: str = Field(max_length=512)
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


async def embeddings(request: Request) -> Response:
    """See above."""
    state = state_of(request)
    with state.admitted():
        async with reading(request) as values:
            try:
                asked = EmbeddingRequest.model_validate(values)
            except ValidationError as error:
                raise explained(error) from None
            served = find(request, asked.model)
            if not served.can_embed:
                raise ApiError(
                    400, "this model writes answers and makes no vectors; use /v1/chat/completions", "model", "no_embed"
                )
            items, wanted = _items(asked.input, state.options.limits)
            found = await state.gate.bring(wanted)
            with state.hold(sum(map(len, found))):
                async with state.opening:
                    vectors, tokens = await anyio.to_thread.run_sync(_embed, state, served, items, wanted, found)
    if asked.dimensions not in (None, len(vectors[0])):
        text = f"dimensions is {asked.dimensions}; the vectors of this model have {len(vectors[0])}"
        raise ApiError(400, text, "dimensions")
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, asked.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    told = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "data": data, "model": served.name, "usage": told}
    return Response(dumps(answer), media_type="application/json")


def _items(values: Any, limits: Limits) -> tuple[list[str | int], list[Wanted]]:
    """Texts, and numbers of pictures, in the order given. Raises ApiError."""
    values = values if isinstance(values, list) else [values]
    if not values or len(values) > limits.inputs:
        raise ApiError(400, f"input has {len(values)} items; 1 to {limits.inputs} are taken", "input")
    if any(isinstance(value, int | list) for value in values):
        raise ApiError(400, "input must be texts; tokens are not taken", "input")
    wanted: list[Wanted] = []
    items = [content.part(value, "user", f"input[{i}]", wanted) for i, value in enumerate(values)]
    if sum(len(item) for item in items if isinstance(item, str)) > limits.text_characters:
        raise ApiError(400, f"input has more than {limits.text_characters} characters", "input")
    return items, wanted


def _embed(
    state: State, served: Served, items: list[str | int], wanted: list[Wanted], found: list[bytes]
) -> tuple[list[list[float]], int]:
    """One vector an item, and the tokens of the texts. Blocks."""
    pictures = state.gate.decode(wanted, found)
    texts = [item for item in items if isinstance(item, str)]
    try:
        with served.embedding:
            of_texts = iter(served.vlm.embed(texts=texts).tolist() if texts else [])
            of_pictures = iter(served.vlm.embed(images=pictures).tolist() if pictures else [])
    except ChiasmError as error:
        raise refused(error) from None
    tokens = sum(len(served.vlm.tokenizer.encode(text)) for text in texts)
    return [next(of_texts) if isinstance(item, str) else next(of_pictures) for item in items], tokens


def _written(vector: list[float], form: str) -> Any:
    if form == "float":
        return vector
    import numpy as np

    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode("ascii")
