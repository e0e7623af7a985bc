"""Calls with a tag for each argument and calls as Python writes them: the reader alone, then behind the server."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_kit import ready, serving
from test_tool_templates import FORMS
from test_tools import ask, read, streamed
from tool_kit import OTHERS, TIME, model, script, tokens

from chiasm.processing.tagged import TagForm
from chiasm.serve.calls import joined
from chiasm.serve.calls_python import PythonCalls
from chiasm.serve.calls_tags import TagCalls
from chiasm.serve.values import kinds_of, read_keywords, read_value

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "wind": {"type": ["boolean", "null"]},
        "at": {"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}]},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "number"}}}},
}
NAMES = {"weather": SCHEMA, "time": {}}
SENT = {"city": 'Os"lo <b>\n é \\n', "days": 3, "wind": False, "at": {"x": [1.5, "y"]}, "unit": "F"}
TAGGED = """<tool_call>
<function=weather>
<parameter=city>
Os"lo <b>
 é \\n
</parameter>
<parameter=days>
3
</parameter>
<parameter=wind>
False
</parameter>
<parameter=at>
{"x": [1.5, "y"]}
</parameter>
<parameter=unit>
F
</parameter>
</function>
</tool_call>"""
PAIRED = """<tool_call>weather
<arg_key>city</arg_key>
<arg_value>Os"lo <b>
 é \\n</arg_value>
<arg_key>days</arg_key>
<arg_value>3</arg_value>
<arg_key>wind</arg_key>
<arg_value>false</arg_value>
<arg_key>at</arg_key>
<arg_value>{'x': [1.5, 'y']}</arg_value>
<arg_key>unit</arg_key>
<arg_value>F</arg_value>
</tool_call>"""
AS_PYTHON = """weather(city='Os"lo <b>\\n é \\\\n', days=3, wind=False, at={"x": [1.5, "y"]}, unit="F")"""
TRAINED = "<|python_tag|>" + AS_PYTHON.replace("(", ".call(", 1)
WRITTEN = {"tags": TAGGED, "pairs": PAIRED, "trained": TRAINED, "python": f"[{AS_PYTHON}]"}
TIMES = {
    "tags": "\n<tool_call>\n<function=time>\n</function>\n</tool_call>",
    "pairs": "\n<tool_call>time\n</tool_call>",
    "trained": '; {"name": "time", "parameters": {}}',
    "python": "time()",
}
INVOKES = TagForm('<calls>\n<invoke name="', '">\n', '<parameter name="', '">', "</parameter>\n", "</invoke>\n</calls>")


INVOKED = '<invoke name="weather">\n<parameter name="city">Oslo</parameter>\n</invoke>\n'
INVOKED = f"<calls>\n{INVOKED}{INVOKED}</calls>"


def reader(name: str) -> Any:
    form = FORMS.get(name, INVOKES)
    return (TagCalls if isinstance(form, TagForm) else PythonCalls)(form, NAMES)


def two(name: str) -> str:
    if name == "python":
        return WRITTEN[name][:-1] + ",\n" + TIMES[name] + "]"
    return WRITTEN[name] + TIMES[name]


@pytest.mark.parametrize("name", list(OTHERS))
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_calls_however_they_are_cut(name: str, size: int) -> None:
    assert read(reader(name), WRITTEN[name], size) == ("", [("weather", SENT)])
    assert read(reader(name), two(name) + "\n", size) == ("", [("weather", SENT), ("time", {})])
    if name in ("tags", "pairs"):
        told = read(reader(name), f"Let me see.\n\n{WRITTEN[name]}\nSo.", size)
        assert told == ("Let me see.\nSo.", [("weather", SENT)])


ONE = [("weather", {"city": "Oslo"})]
CITY = "<parameter=city>\nOslo\n</parameter>\n"
HEAD = "<tool_call>\n<function=weather>\n"
LENIENT = {
    "no line ends": (
        "tags",
        "<tool_call><function=weather><parameter=city>Oslo</parameter></function></tool_call>",
        "",
    ),
    "no end of the argument": ("tags", f"{HEAD}<parameter=city>\nOslo\n</function>\n</tool_call>", ""),
    "no end of the function": ("tags", f"{HEAD}{CITY}</tool_call>", ""),
    "no end at all": ("tags", HEAD + CITY, ""),
    "space around the value": ("tags", f"{HEAD}<parameter=city>\n\n  Oslo\n\n</parameter>\n</function>", ""),
    "text behind it": ("tags", f"{HEAD}{CITY}</function>\n</tool_call> so", " so"),
    "text in it": ("tags", f"{HEAD}{CITY}hm </function>", "\nhm </function>"),
}


@pytest.mark.parametrize("case", list(LENIENT))
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_tags_that_models_forget(case: str, size: int) -> None:
    name, text, rest = LENIENT[case]
    expected = [("weather", {"city": "\n  Oslo\n"})] if case == "space around the value" else ONE
    assert read(reader(name), text, size) == (rest, expected)


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_several_calls_in_one_opening(size: int) -> None:
    assert read(reader("invokes"), INVOKED, size) == ("", ONE * 2)


NONE = {
    "tags": ["<tool_call>", "a <tool_call>b", "<tool_call>\n<function=rm>\n</function>", '<tool_call>{"name": "time"}'],
    "pairs": ["<tool_call>", "<tool_call>rm\n</tool_call>", "<tool_call>weather"],
    "trained": ["<|python_tag|>", "<|python_tag|>print(1)", "<|python_tag|>rm.call()", "weather.call()", "<|python"],
    "python": [
        "[",
        "[1, 2]",
        "[rm()]",
        "see [weather()]",
        "[weather(",
        "[weather(f())]",
        "[weather(1)]",
        "[weather(**x)]",
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in NONE.items() for text in texts])
@pytest.mark.parametrize("size", [1, 4, 10_000])
def test_what_is_no_call_is_given_out_as_it_is(name: str, text: str, size: int) -> None:
    assert read(reader(name), text, size) == (text, [])


PARTS = {
    name: [*re.split(r"(\s|<[^>]*>|[\[\](),=\"'])", WRITTEN.get(name) or INVOKED), "x", "\n", "<", "weather", "}", '"']
    for name in (*WRITTEN, "invokes")
}


@pytest.mark.parametrize("name", list(PARTS))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_written_reads_alike_however_it_is_cut(name: str, data: st.DataObject) -> None:
    """Texts of a call's parts in any order, and calls with some parts left out."""
    parts = PARTS[name]
    if data.draw(st.booleans()):
        lost = data.draw(st.sets(st.integers(0, len(parts) - 1), max_size=4))
        text = "".join(part for place, part in enumerate(parts) if place not in lost)
    else:
        text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=25)))
    whole, cut = raw(reader(name), text, len(text) + 1), raw(reader(name), text, data.draw(st.integers(1, 5)))
    assert cut == whole


def raw(calls: Any, text: str, size: int) -> Any:
    """What is read, without reading the arguments."""
    texts, deltas = [], []
    for start in range(0, len(text), size):
        got, new = calls.push(text[start : start + size])
        texts.append(got)
        deltas += new
    got, new = calls.flush()
    found = [(c["function"]["name"], c["function"]["arguments"]) for c in joined([*deltas, *new])]
    return "".join([*texts, got]), found, calls.unfinished


def test_strings_are_given_out_while_they_are_written() -> None:
    calls = reader("tags")
    given = [calls.push(character)[1] for character in TAGGED]
    assert sum(bool(deltas) for deltas in given) > 15


def test_a_long_value_is_read_in_a_moment() -> None:
    for key in ("city", "at"):
        text = f"{HEAD}<parameter={key}>\n{'[' if key == 'at' else ''}{'<' * 60_000}\n</parameter>\n</function>"
        assert len(read(reader("tags"), text, 5)[1]) == 1


def test_values_by_their_schema() -> None:
    for text, kinds, value in (
        ("3", {"integer"}, 3),
        ("3", {"string"}, "3"),
        ("3", set(), "3"),
        ("3", {"number"}, 3),
        (" true ", {"boolean"}, True),
        ("TRUE", {"boolean"}, True),
        ("None", {"null", "string"}, None),
        ("none so", {"null", "string"}, "none so"),
        ('"3"', {"string", "integer"}, '"3"'),
        ("{'a': (1, -2)}", {"object"}, {"a": [1, -2]}),
        ("NaN", {"number"}, "NaN"),
        ("[" * 10_000, {"array"}, "[" * 10_000),
        ("__import__('os')", {"object"}, "__import__('os')"),
        ("1_000j", {"number"}, "1_000j"),
    ):
        assert json.loads(read_value(text, frozenset(kinds))) == value, (text, kinds)
    assert kinds_of(SCHEMA, "at") == {"object", "null"} and kinds_of(SCHEMA, "unit") == {"string"}
    loop = {"properties": {"a": {"$ref": "#/properties/a"}, "b": {"$ref": "#/nowhere"}, "c": 5}}
    assert [kinds_of(loop, key) for key in "abcd"] == [frozenset()] * 4
    assert read_keywords('a="x\ny", b=true') == {"a": "x\ny", "b": True}
    with pytest.raises(ValueError, match="literal"):
        read_keywords("a=open('x')")


# ------------------------------------------------------------------------------------------------ behind the server

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


@pytest.fixture(scope="module", params=list(OTHERS))
def tagged(request: Any, tmp_path_factory: pytest.TempPathFactory):
    vlm = model(tmp_path_factory.mktemp(request.param), OTHERS[request.param])
    with serving(ready(vlm)) as running:
        yield request.param, vlm, running


def test_whole_and_streamed(tagged, monkeypatch) -> None:
    name, vlm, running = tagged
    script(monkeypatch, vlm, two(name))
    fields = {"tools": [WEATHER, TIME], "max_tokens": 600}
    choice = ask(running, **fields).choices[0]
    calls = choice.message.tool_calls
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [("weather", SENT), ("time", {})]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    text, found, reason = streamed(ask(running, stream=True, **fields))
    assert (text, reason) == ("", "tool_calls")
    assert [c["function"] for c in found] == [c.function.model_dump() for c in calls]
    single = ask(running, parallel_tool_calls=False, **fields).choices[0]
    assert len(single.message.tool_calls) == 1 and single.finish_reason == "tool_calls"


def test_typed_text_and_unknown_names_call_nothing(tagged, monkeypatch) -> None:
    name, vlm, running = tagged
    if name != "python":  # there no token says that an answer is a call
        script(monkeypatch, vlm, WRITTEN[name], literal=False)
        got = ask(running, tools=[WEATHER], max_tokens=600).choices[0]
        assert (got.message.content, got.message.tool_calls, got.finish_reason) == (WRITTEN[name], None, "stop")
    script(monkeypatch, vlm, WRITTEN[name])
    got = ask(running, tools=[TIME], max_tokens=600).choices[0]
    assert (got.message.content, got.message.tool_calls) == (WRITTEN[name], None)


def test_a_call_that_is_cut_short(tagged, monkeypatch) -> None:
    name, vlm, running = tagged
    script(monkeypatch, vlm, WRITTEN[name])
    got = ask(running, tools=[WEATHER], max_tokens=48).choices[0]
    assert got.finish_reason == "length"
    if name in ("tags", "pairs"):
        assert got.message.tool_calls[0].function.arguments.startswith('{"city": "Os')
        between = WRITTEN[name].index("days") - len("<parameter=" if name == "tags" else "<arg_key>")
        length = len(tokens(vlm, WRITTEN[name][:between]))
        got = ask(running, tools=[WEATHER], max_tokens=length).choices[0]
        assert (got.finish_reason, got.message.tool_calls[0].function.arguments[-1]) == ("length", '"')


def test_a_call_is_demanded(tagged) -> None:
    """Random weights: only the constraint can make a call of it."""
    pytest.importorskip("llguidance")
    name, _, running = tagged
    named = {"type": "function", "function": {"name": "time"}}
    if name == "python":
        with pytest.raises(openai.BadRequestError, match="no answer can be held to"):
            ask(running, tool_choice=named)
        return
    small = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "boolean"}}}
    small |= {"required": ["unit", "days"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": small}}, TIME]
    (call,) = ask(running, tools=tools, tool_choice=named, temperature=1).choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("time", {})
    seen = set()
    for seed in range(8):
        fields = {"tool_choice": "required", "temperature": 1, "seed": seed, "tools": tools}
        choice = ask(running, **fields).choices[0]
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        seen.add(call.function.name)
        if call.function.name == "weather":
            found = json.loads(call.function.arguments)
            assert found["unit"] in ("C", "F") and isinstance(found["days"], bool)
    assert seen == {"weather", "time"}
