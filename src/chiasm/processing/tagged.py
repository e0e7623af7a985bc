"""Forms of calls beside JSON: a tag for each argument, and calls as Python writes them.

Both are found, as the JSON forms are, by letting a chat template write a call (``chiasm.processing.tools.form_of``).
Published forms that are found so, all described in the templates and model cards of their models:

* ``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``, with line ends between
  (Qwen3-Coder, Qwen3.5, Nemotron 3), and ``<invoke name="NAME"><parameter name="KEY">`` (MiniMax-M2);
* ``<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`` (GLM-4.5);
* ``<|python_tag|>NAME.call(KEY="VALUE")`` for tools that a model was trained with (Llama 3.1);
* ``[NAME(KEY=VALUE), NAME(KEY=VALUE)]`` (Llama 3.2's small models, Llama 4).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

KEYS = ("\U0010f005", "\U0010f006", "\U0010f007")  # arguments of a second call to read a form from
NAME, TEXT, NUMBER = "\U0010f001", "\U0010f008", 70917
ARGUMENTS: dict[str, Any] = {KEYS[0]: TEXT, KEYS[1]: NUMBER, KEYS[2]: TEXT}
ONE = {KEYS[0]: TEXT}


@dataclass(frozen=True)
class TagForm:
    """``opening``, the name, ``named``; for each argument ``before``, its key, ``between``, its value, ``after``; then
    ``closing``. A string stands as it is, other values as JSON or as Python writes them. ``ahead`` as in ``CallForm``.
    """

    opening: str
    named: str
    before: str
    between: str
    after: str
    closing: str
    ahead: str = ""


@dataclass(frozen=True)
class PythonForm:
    """``opening``, a name, ``called``, arguments as ``key=value``, a bracket. ``closing`` ends a list of such calls."""

    opening: str
    called: str = "("
    closing: str = ""


def tag_form(body: str, end: str) -> TagForm | None:
    """The form of a call of ``NAME`` with ``ARGUMENTS`` in ``body``; None where it has no tags."""
    parts = _cut(body)
    if parts is None:
        return None
    opening, first, between, middle, again, later, last, rest = parts
    before = first[max(first.rfind(mark) for mark in "<[") :] if re.search(r"[<\[]", first) else ""
    if not before.strip() or not between.strip() or between != again or again != last or middle != later:
        return None
    if not middle.endswith(before) or not opening.strip():
        return None
    after = middle.removesuffix(before)
    if not after.strip() or not rest.startswith(after):
        return None
    closing = rest.removeprefix(after).partition(end)[0] if end else rest.removeprefix(after).rstrip()
    ahead, opening = thought(opening)
    return TagForm(opening, first.removesuffix(before), before, between, after, closing, ahead)


def python_form(body: str, end: str) -> PythonForm | None:
    """The form of a call of ``NAME`` with the argument ``ONE``; None where it is another."""
    ahead, found, behind = body.partition(NAME)
    match = re.match(rf"((?:\.\w+)?\(){KEYS[0]}=([\"']){TEXT}\2\)(.*)", behind, re.DOTALL)
    if not found or not match or not ahead.strip():
        return None
    return PythonForm(ahead, match[1], (match[3].partition(end)[0] if end else match[3]).strip())


def _cut(body: str) -> tuple[str, ...] | None:
    """What stands ahead of, between and behind a call's name, keys and values; None where one of them is absent."""
    values = [str(ARGUMENTS[key]) for key in KEYS]
    marks = [NAME, *(mark for pair in zip(KEYS, values, strict=True) for mark in pair)]
    parts, place = [], 0
    for mark in marks:
        found = body.find(mark, place)
        if found < 0:
            return None
        parts.append(body[place:found])
        place = found + len(mark)
    return (*parts, body[place:])


def thought(opening: str) -> tuple[str, str]:
    """What ends a thought that the prompt began, and what opens a call: no call begins with a closing tag."""
    match = re.match(r".*</[^<>]*>\s*", opening, re.DOTALL)
    return (match.group(), opening[match.end() :]) if match else ("", opening)


def literals(form: Any) -> str:
    """All that a form writes by itself in a call."""
    values = [getattr(form, field.name) for field in fields(form) if field.name != "ahead"]
    return "".join(v if isinstance(v, str) else literals(v) for v in values if v and not isinstance(v, bool))


def rewritten(form: Any, write: Callable[[str], str]) -> Any:
    """The form with ``write`` done to all that it writes by itself."""
    changed = {}
    for field in fields(form):
        value = getattr(form, field.name)
        if isinstance(value, str):
            changed[field.name] = write(value)
        elif value is not None and not isinstance(value, bool):
            changed[field.name] = rewritten(value, write)
    return replace(form, **changed)


__all__ = [
    "ARGUMENTS",
    "NAME",
    "ONE",
    "PythonForm",
    "TagForm",
    "literals",
    "python_form",
    "rewritten",
    "tag_form",
    "thought",
]
