"""From the fields of a request to the engine's sampling and constraint."""

from __future__ import annotations

import json
import re
from typing import Any

from chiasm.errors import ConfigError, DataError
from chiasm.infer import constraints
from chiasm.infer.sampling import Sampling
from chiasm.serve.errors import ApiError, clean, shown
from chiasm.serve.options import Limits, ServeOptions
from chiasm.serve.schema import ChatRequest


def sampling(wanted: ChatRequest, options: ServeOptions, vlm: Any, index: int) -> Sampling:
    """How answer number ``index`` of a request is chosen. Raises ApiError or ConfigError."""
    temperature = options.temperature if wanted.temperature is None else wanted.temperature
    if wanted.top_p == 0:  # of no probability at all the likeliest token is left
        temperature = 0.0
    drawn = temperature > 0
    most = min(wanted.limit or options.limits.new_tokens, options.limits.new_tokens)
    return Sampling.parse(
        {
            "max_new_tokens": most,
            "temperature": temperature,
            "top_p": wanted.top_p if drawn and wanted.top_p != 1 else None,
            "top_k": wanted.top_k if drawn and wanted.top_k and wanted.top_k > 0 else None,
            "min_p": wanted.min_p or None if drawn else None,
            "repetition_penalty": wanted.repetition_penalty or 1.0,
            "presence_penalty": wanted.presence_penalty or 0.0,
            "frequency_penalty": wanted.frequency_penalty or 0.0,
            "logit_bias": _bias(wanted.logit_bias or {}, vlm),
            "logprobs": (wanted.top_logprobs or 0) if wanted.logprobs else None,
            "stop": wanted.stops,
            "seed": None if wanted.seed is None else (wanted.seed + index) % 2**63,
            "ignore_eos": bool(wanted.ignore_eos),
            "min_tokens": min(wanted.min_tokens or 0, most),
        },
        where="sampling",
    )


def _bias(values: dict[str, float], vlm: Any) -> dict[int, float]:
    found, vocab = {}, len(vlm.tokenizer)
    media = {vlm.tokenizer.id_of(front.config.placeholder or "") for front in vlm.processor.front_ends.values()}
    for key, value in values.items():
        if not re.fullmatch(r"\d{1,9}", key, re.ASCII) or int(key) >= vocab:
            text = f"logit_bias: {shown(key)} is no token of this model, whose ids are 0 to {vocab - 1}"
            raise ApiError(400, text, "logit_bias")
        if int(key) in media:
            raise ApiError(400, f"logit_bias: {shown(key)} stands for a medium and is no word", "logit_bias")
        found[int(key)] = value
    return found


def constraint(wanted: ChatRequest, limits: Limits) -> Any:
    """What an answer may be: by ``response_format``, or by one of the ``guided_*`` fields. Raises ApiError."""
    given = held_to(wanted)
    form = wanted.response_format or {}
    kind = form.get("type")
    if len(given) > 1:
        raise ApiError(400, f"{' and '.join(given)} both say what an answer may be; give one", given[1])
    if not given:
        return None
    name = given[0]
    if name == "guided_choice":
        return constraints.Choices(wanted.guided_choice or [])
    if name == "guided_regex":
        return _made("Regex", wanted.guided_regex, name)
    if name == "guided_grammar":
        return _made("Grammar", wanted.guided_grammar, name)
    if name == "guided_json":
        return _made("JsonSchema", _schema(wanted.guided_json, limits, name), name)
    if kind == "json_object":
        return _made("JsonSchema", {"type": "object"}, "response_format.type")
    if kind != "json_schema":
        text = f"response_format.type is {shown(kind)}; text, json_object and json_schema are supported"
        raise ApiError(400, text, "response_format.type", "unsupported_parameter")
    inner = form.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    return _made("JsonSchema", _schema(schema, limits, "response_format.json_schema.schema"), "response_format")


def held_to(wanted: ChatRequest) -> list[str]:
    """The fields of a request that say what an answer may be."""
    names = ("guided_json", "guided_choice", "guided_regex", "guided_grammar")
    form = wanted.response_format or {"type": "text"}
    free = form.get("type") == "text"
    return [name for name in names if getattr(wanted, name) is not None] + ["response_format"] * (not free)


def _schema(schema: Any, limits: Limits, place: str) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise ApiError(400, f"{place} must be a JSON schema, an object", place)
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except ValueError:
        raise ApiError(400, f"{place} holds a number that is not finite", place) from None
    if size > limits.schema_bytes:
        raise ApiError(400, f"{place} has {size} bytes; at most {limits.schema_bytes} are taken", place)
    return schema


def _made(kind: str, value: Any, place: str) -> Any:
    try:
        return getattr(constraints, kind)(value)
    except ConfigError:  # the library is not there
        raise ApiError(400, f"{place} is not supported by this server", place, "unsupported_parameter") from None
    except DataError as error:
        raise ApiError(400, f"{place}: {clean(str(error))}", place, "unsupported_constraint") from None
