"""Values of arguments that stand in an answer as text, by the schema of a tool's parameters."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from types import NoneType
from typing import Any

DEEP = 32
LONG = 1 << 16  # characters of what is read as Python
NAMES = {"true": True, "false": False, "null": None, "none": None}
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}


def kinds_of(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """The types that JSON Schema lets the argument ``key`` have; empty where it does not say."""
    properties = schema.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_kinds(found, schema, DEEP))


def _kinds(schema: Any, root: Mapping[str, Any], deep: int) -> set[str]:
    if not isinstance(schema, Mapping) or deep <= 0:
        return set()
    told = schema.get("type")
    found = {told} if isinstance(told, str) else {t for t in told if isinstance(t, str)} if told else set()
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return found or {_kind(value) for value in values} if isinstance(values, list) else found
    for name in ("anyOf", "oneOf", "allOf"):
        for inner in schema.get(name) or ():
            found |= _kinds(inner, root, deep - 1)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for part in reference[2:].split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        found |= _kinds(target, root, deep - 1)
    return found


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "object")


def read_value(text: str, kinds: frozenset[str]) -> str:
    """``text`` as JSON: a value of one of ``kinds`` where it is one, else a string."""
    plain = text.strip()
    for read in (_json, _constant, read_python):
        try:
            value = read(plain)
            kind = _kind(value)
            if kind != "string" and (kind in kinds or (kind == "integer" and "number" in kinds)):
                return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, LookupError, SyntaxError, RecursionError, MemoryError):
            continue
    return json.dumps(text, ensure_ascii=False)


def _json(text: str) -> Any:
    return json.loads(text)


def _constant(text: str) -> Any:
    return NAMES[text[:8].lower()]


def read_python(text: str) -> Any:
    """A literal of Python. Raises ValueError, SyntaxError, RecursionError or MemoryError for anything else."""
    return _literal(_parsed(text))


def read_keywords(text: str) -> dict[str, Any]:
    """``key=value, key=value`` as Python writes it. Raises as ``read_python`` does."""
    try:
        call = _parsed(f"f({text})")
    except SyntaxError:  # a string with line ends in it
        call = _parsed("f(" + text.replace("\r", "\\r").replace("\n", "\\n") + ")")
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("it is no list of named arguments")
    return {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}


def _parsed(text: str) -> Any:
    if len(text) > LONG:
        raise ValueError("it is too long")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes that Python does not know
        return ast.parse(text.strip(), mode="eval").body


def _literal(node: Any) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | NoneType):
        return node.value
    if isinstance(node, ast.Name) and node.id in NAMES:  # as JSON writes them; Python's own are constants
        return NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {str(_literal(key)): _literal(value) for key, value in pairs}
    return _refuse()


def _refuse() -> Any:
    raise ValueError("it is no literal")


__all__ = ["kinds_of", "read_keywords", "read_python", "read_value"]
