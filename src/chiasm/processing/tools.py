"""Tools in a prompt: what a chat template is told of them, and how it writes an answer's calls.

Names, descriptions and arguments come from whoever asks, so they are texts like a user's: each string stands in the
template's output as a character of its own (``Marks``) and is filled in as text. The words of JSON Schema itself are
left as they are, since templates ask for them.

How calls are written is found by letting the template write one (``CallForm``), never by a name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chiasm.errors import DataError
from chiasm.processing.messages import read_arguments
from chiasm.processing.tagged import NAME, PythonForm, TagForm, thought
from chiasm.types import Call, Message, Piece, Text

if TYPE_CHECKING:
    from chiasm.processing.template import Template

# fmt: off
WORDS = frozenset(
    [
        "type",
        "function",
        "name",
        "description",
        "parameters",
        "properties",
        "required",
        "items",
        "enum",
        "const",
        "default",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "additionalProperties",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "uniqueItems",
        "pattern",
        "format",
        "title",
        "examples",
        "nullable",
        "strict",
        "return",
        "arguments",
        "$ref",
        "$defs",
        "definitions",
    ]
)
# fmt: on
TYPE = {str: "string", int: "integer"}
TYPES = frozenset(["string", "number", "integer", "boolean", "object", "array", "null", "function"])
DEEPEST = 32

Values = Any  # what JSON holds


class Marks:
    """The strings of tools and calls, each as one character. Equal strings have one; their order is kept."""

    def __init__(self, values: Sequence[Values]):
        found: set[str] = set()
        for value in values:
            _collect(value, found, 0)
        self.texts = sorted(found)
        self.names: dict[str, str] = {}

    def place(self, first: int) -> None:
        """The characters from code ``first`` on are free."""
        self.names = {text: chr(first + i) for i, text in enumerate(self.texts)}

    def __call__(self, value: Values) -> Values:
        """``value`` with characters for strings."""
        if isinstance(value, str):
            return self.names[value] if value else value
        if isinstance(value, Mapping):
            keys = {key: key if key in WORDS or not key else self.names[key] for key in value}
            return {keys[key]: inner if _fixed(key, inner) else self(inner) for key, inner in value.items()}
        return [self(inner) for inner in value] if isinstance(value, list | tuple) else value


def _fixed(key: str, value: Values) -> bool:
    """Whether a value is a word of JSON Schema, which templates compare with."""
    return key == "type" and isinstance(value, str) and value in TYPES


def _collect(value: Values, found: set[str], depth: int) -> None:
    if depth > DEEPEST:
        raise DataError(f"tools and arguments may be nested {DEEPEST} deep", "tools")
    if isinstance(value, str):
        found.update([value] if value else [])
    elif isinstance(value, Mapping):
        found.update(key for key in value if key and key not in WORDS)
        for key, inner in value.items():
            if not _fixed(key, inner):
                _collect(inner, found, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _collect(inner, found, depth + 1)


def told(call: Call, where: str) -> dict[str, Any]:
    """A call as chat templates read it: the arguments are an object. Raises DataError."""
    return {"name": call.name, "arguments": read_arguments(call.arguments, where)}


def fields(message: Message, messages: Sequence[Message], calls: Mapping[Call, Any]) -> dict[str, Any]:
    """What a message of calls, or of a result, says beside its text; ``calls`` are told or marked."""
    if message.calls:
        written = [{"id": short_id(c.id), "type": "function", "function": calls[c]} for c in message.calls]
        return {"tool_calls": written}
    if message.role != "tool":
        return {}
    asked = [call for other in messages for call in other.calls if call.id == message.answers]
    name = {"name": calls[asked[-1]]["name"]} if asked else {}
    return {"tool_call_id": short_id(message.answers), **name}


def short_id(name: str) -> str:
    """A call's id as nine letters and digits, which the templates of Mistral insist on; equal ids stay equal."""
    if re.fullmatch(r"[A-Za-z0-9]{9}", name):
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def involved(messages: Sequence[Message]) -> bool:
    """Whether a conversation holds calls or their results."""
    return any(message.calls or message.role == "tool" for message in messages)


def refuse(messages: Sequence[Message], where: str, tools: Any = None) -> None:
    """Raises DataError for tools, calls and results: the template has no place for them."""
    if tools:
        raise DataError(f"{where}: this model's chat template renders no tools: leave them out", "tools")
    if involved(messages):
        told = "this model's chat template has no place for calls of tools and their results: leave them out"
        raise DataError(f"{where}: {told}", "tools")


def render(
    template: Template, messages: Sequence[Message], prompt: bool, where: str, tools: Any = None, train: bool = False
) -> list[Piece]:
    """The pieces of a conversation that may hold tools, calls and results. Raises DataError."""
    if not tools and not involved(messages):
        return template.render(messages, prompt, where)
    if train and not template.learns_calls:
        raise DataError(
            f"{where}: calls of tools are learned only with a chat template that has {{% generation %}} blocks; this "
            "one has none: add them around what the assistant writes",
            "tools",
        )
    return template.render_tools(messages, prompt, where, tools)


# ----------------------------------------------------------------------------------------------- how calls are written


@dataclass(frozen=True)
class CallForm:
    """``opening``, JSON, ``closing``. The JSON is an object with a ``name`` and an object under the key ``arguments``,
    in a list where ``many``. Where ``named`` is not None the name stands before the JSON, ``named`` between the two,
    and the JSON is the arguments alone. ``python``: how tools are called that the model was trained with, if otherwise.
    ``ahead`` ends a thought that the prompt began, where an answer that only calls writes it.
    """

    opening: str
    closing: str = ""
    many: bool = False
    name: str = "name"
    arguments: str = "arguments"
    named: str | None = None
    python: PythonForm | None = None
    ahead: str = ""


Form = CallForm | TagForm | PythonForm
PROBE = (NAME, "\U0010f002", "\U0010f003")  # a name, an argument's, its value
SIMPLE = {PROBE[1]: PROBE[2]}
ASKED = "\U0010f004"


def probe(arguments: Mapping[str, Any]) -> tuple[list[Message], list[dict[str, Any]]]:
    """A question, answered by a call, its result, and the tool that is called."""
    name = NAME
    call = Call(name, json.dumps(arguments), "a1b2c3d4e")
    told = {key: {"type": TYPE[type(value)], "description": key} for key, value in arguments.items()}
    parameters = {"type": "object", "properties": told, "required": list(arguments)}
    function = {"name": name, "description": name, "parameters": parameters}
    asked, said = Message("user", (Text(ASKED),)), Message("assistant", (), calls=(call,))
    result = Message("tool", (Text(ASKED),), answers=call.id)
    return [asked, said, result], [{"type": "function", "function": function}]


def behind(prompt: str, whole: str) -> str:
    """The answer in ``whole``, a conversation with a call, where ``prompt`` is all before the answer."""
    if not whole.startswith(prompt):  # the prompt begins a thought, or ends in other white space
        same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
        prompt = prompt[: 1 + max(prompt.rfind(mark, 0, same) for mark in "\n>]")]
    return whole[len(prompt) :]


def json_form(body: str, end: str) -> CallForm | None:
    """The form of the call of ``SIMPLE`` in an answer, where ``end`` closes answers; None where it is none in JSON."""
    place = body.find(PROBE[0])
    if place < 0:
        return None
    return _inside(body, place, end) or _before(body, place, end)


def _inside(body: str, place: int, end: str) -> CallForm | None:
    """The name stands in the JSON."""
    start = body.rfind("{", 0, place)
    if start < 0:
        return None
    ahead = body[:start].rstrip()
    many = ahead.endswith("[")
    start = len(ahead) - 1 if many else start
    found, after = _decoded(body, start)
    call = found[0] if many and isinstance(found, list) and found else found
    if not isinstance(call, dict):
        return None
    name = next((key for key, value in call.items() if value == PROBE[0]), None)
    arguments = next((key for key, value in call.items() if value == SIMPLE), None)
    if name is None or arguments is None:
        return None
    ended, opening = thought(body[:start])
    return CallForm(opening, _closing(body[after:], end), many, name, arguments, ahead=ended)


def _before(body: str, place: int, end: str) -> CallForm | None:
    """The name stands before the JSON."""
    behind = place + len(PROBE[0])
    start = body.find("{", behind)
    found, after = _decoded(body, start) if start >= 0 else (None, 0)
    if found != SIMPLE or not body[:place].strip():
        return None
    ended, opening = thought(body[:place])
    return CallForm(opening, _closing(body[after:], end), named=body[behind:start], ahead=ended)


def _closing(rest: str, end: str) -> str:
    """What stands between a call and the end of its answer."""
    return rest.partition(end)[0] if end else rest.rstrip()


def _decoded(text: str, start: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return None, 0
