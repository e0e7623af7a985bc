"""A request's tools: checked, told to the model by its template, and the rule for answers that must be calls."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from chiasm.errors import ConfigError, DataError
from chiasm.infer import constraints
from chiasm.infer.request import MARKS, mark_of
from chiasm.processing.tagged import TagForm, literals, rewritten
from chiasm.processing.tools import DEEPEST, CallForm, Form
from chiasm.serve.calls import Calls
from chiasm.serve.calls_python import PythonCalls
from chiasm.serve.calls_tags import TagCalls, tag_grammar
from chiasm.serve.errors import ApiError, clean, shown
from chiasm.serve.options import Limits, Served
from chiasm.serve.sampling import held_to
from chiasm.serve.schema import ChatRequest
from chiasm.types import Piece

MOST = 16  # calls of one answer that must be a list of them


@dataclass
class Tooling:
    """What a request's tools become. ``lead`` opens an answer that must be a call, ``constraint`` holds it to one."""

    tools: list[dict[str, Any]] | None = None
    form: Form | None = None
    marks: tuple[int, ...] = ()
    spelled: dict[str, str] = field(default_factory=dict)  # mark's character → control token
    names: dict[str, Any] = field(default_factory=dict)  # of the tools, with the schemas of their arguments
    lead: tuple[Piece, ...] = ()
    constraint: Any = None
    begun: bool = False
    name: str = ""
    single: bool = False

    @classmethod
    def of(cls, served: Served, wanted: ChatRequest, limits: Limits) -> Tooling:
        """Raises ApiError (400): tools that are none, or that this model's template cannot write."""
        tools = [_tool(value, f"tools[{i}]", limits) for i, value in enumerate(wanted.tools or [])]
        names = [tool["function"]["name"] for tool in tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ApiError(400, f"two tools are named {shown(twice)}", "tools")
        chosen = _choice(wanted.tool_choice, names)
        if not tools or chosen is None:
            return cls()
        form = served.vlm.processor.template.form
        if form is None:
            text = "this model's chat template renders no tools, or writes calls in a form that cannot be read back"
            raise ApiError(400, f"{text}; leave tools out, or use response_format", "tools", "unsupported_parameter")
        if held := held_to(wanted):
            text = f"an answer may call tools or follow {held[0]}, not both; give one, or tool_choice none"
            raise ApiError(400, text, held[0], "unsupported_parameter")
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        made = cls(tools, form, names=schemas, single=wanted.parallel_tool_calls is False)
        made._marked(served.vlm.tokenizer)
        if chosen:
            made._must([tool for tool in tools if tool["function"]["name"] in chosen], wanted)
        return made

    def parser(self) -> Calls:
        """Reads one answer."""
        if self.form is None:
            return Calls()
        table = {token: character for character, token in self.spelled.items()}
        form = rewritten(self.form, lambda text: _written(text, table))
        kind = Calls if isinstance(form, CallForm) and form.python is None else PythonCalls
        kind = TagCalls if isinstance(form, TagForm) else kind
        return kind(form, self.names, self.spelled, self.begun, self.name, self.single)

    def _marked(self, tokenizer: Any) -> None:
        """Which control tokens the form is written with."""
        assert self.form is not None
        text = literals(self.form)
        controls = sorted((token for token in tokenizer.specials if token in text), key=len, reverse=True)[:MARKS]
        self.marks = tuple(tokenizer.specials[token] for token in controls)
        self.spelled = {mark_of(place): token for place, token in enumerate(controls)}

    def _must(self, tools: list[dict[str, Any]], wanted: ChatRequest) -> None:
        """The answer is a call of one of ``tools``, or a list of calls."""
        if wanted.continue_final_message:
            raise ApiError(400, "an answer that is continued cannot be made a call", "tool_choice")
        form, self.begun = self.form, True
        try:
            if isinstance(form, CallForm):
                self.constraint = constraints.JsonSchema(self._schema(tools, form))
            else:
                self.constraint = constraints.Grammar(self._grammar(tools, form))
        except ConfigError:  # the library is not there
            text = "tool_choice that demands a call is not supported by this server"
            raise ApiError(400, text, "tool_choice", "unsupported_parameter") from None
        except DataError as error:
            raise ApiError(400, f"tools: {clean(str(error))}", "tools", "unsupported_constraint") from None

    def _schema(self, tools: list[dict[str, Any]], form: CallForm) -> dict[str, Any]:
        """Of the answer behind ``lead``, which is set."""
        self.lead = (Piece(form.ahead + form.opening.rstrip(" "), literal=True),)
        if form.named is not None:
            if len(tools) > 1:
                text = "this model's template writes a call's name before its arguments: name one tool"
                raise ApiError(400, text, "tool_choice", "unsupported_parameter")
            self.name = tools[0]["function"]["name"]
            opening = Piece(form.ahead + form.opening, literal=True)
            self.lead = (opening, Piece(self.name), Piece(form.named.rstrip(" "), literal=True))
            return {"type": "object", **tools[0]["function"]["parameters"]}
        calls = [_call(tool["function"], form) for tool in tools]
        schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if form.many:
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1 if self.single else MOST}
        return schema

    def _grammar(self, tools: list[dict[str, Any]], form: Any) -> str:
        """Of the answer behind ``lead``, which is set: a call with a tag for each argument."""
        text = form.named + form.before + form.between + form.after if isinstance(form, TagForm) else None
        if text is None or any(token in text for token in self.spelled.values()):
            text = "this model's template writes calls in a form that no answer can be held to; leave tool_choice auto"
            raise ApiError(400, text, "tool_choice", "unsupported_parameter")
        self.lead = (Piece(form.ahead + form.opening, literal=True),)
        closing = re.split("|".join(map(re.escape, self.spelled.values())) or "$^", form.closing)[0].rstrip()
        return tag_grammar(form, closing, [tool["function"] for tool in tools])


def _call(function: dict[str, Any], form: CallForm) -> dict[str, Any]:
    """The schema of a call."""
    arguments = {"type": "object", **function["parameters"]}
    properties = {form.name: {"const": function["name"]}, form.arguments: arguments}
    return {
        "type": "object",
        "properties": properties,
        "required": [form.name, form.arguments],
        "additionalProperties": False,
    }


def _written(text: str, table: dict[str, str]) -> str:
    """A part of a form with the marks' characters for control tokens."""
    if not table:
        return text
    pattern = "|".join(map(re.escape, sorted(table, key=len, reverse=True)))
    return re.sub(pattern, lambda match: table[match.group()], text)


def _choice(value: Any, names: list[str]) -> list[str] | None:
    """The tools of which one must be called; empty: the model decides; None: none may be."""
    if value in (None, "auto"):
        return []
    if value == "none":
        return None
    if value == "required":
        if not names:
            raise ApiError(400, "tool_choice demands a call, but there are no tools", "tool_choice")
        return names
    function = value.get("function") if value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in names:
        text = f"tool_choice names {shown(name)}, which is none of the tools"
        raise ApiError(400, text, "tool_choice")
    return [name]


def _tool(value: Any, place: str, limits: Limits) -> dict[str, Any]:
    """One tool as OpenAI's clients describe it, without fields that nothing reads."""
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict):
        text = f'{place} must be {{"type": "function", "function": {{"name": ..., "parameters": {{...}}}}}}'
        raise ApiError(400, text, place)
    name, about, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        text = f"{place}.function.name is {shown(name)}; it has 1 to 64 letters, digits, _, . and -"
        raise ApiError(400, text, f"{place}.function.name")
    if about is not None and not isinstance(about, str):
        raise ApiError(400, f"{place}.function.description must be a string", f"{place}.function.description")
    if parameters is None or parameters == {}:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or _depth(parameters) > DEEPEST - 2:
        text = f"{place}.function.parameters must be a JSON schema, an object, nested at most {DEEPEST - 2} deep"
        raise ApiError(400, text, f"{place}.function.parameters")
    if len(json.dumps(function)) > limits.schema_bytes:
        raise ApiError(400, f"{place} has more than {limits.schema_bytes} bytes", place)
    told = {"name": name, **({} if about is None else {"description": about}), "parameters": parameters}
    return {"type": "function", "function": told}


def _depth(value: Any) -> int:
    """How deep a value is nested, without recursion."""
    deepest, left = 0, [(value, 1)]
    while left:
        inner, depth = left.pop()
        deepest = max(deepest, depth)
        if depth <= DEEPEST and isinstance(inner, dict | list):
            left += [(v, depth + 1) for v in (inner.values() if isinstance(inner, dict) else inner)]
    return deepest


__all__ = ["Tooling"]
