"""Point 17: tools, with the official client over a socket, in the four forms of JSON in which templates write calls."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from serving_kit import Running, data_url, ready, serving, shows
from tool_kit import ARGUMENTS, TEMPLATES, TIME, WEATHER, model, script, tokens

from chiasm.processing.tools import CallForm
from chiasm.serve.calls import Calls, joined

ANSWERS = {
    "hermes": f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "llama": f'{{"name": "weather", "parameters": {ARGUMENTS}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}, "id": "x"}}]',
    "named": f"Let me see.[TOOL_CALLS]weather[ARGS]{ARGUMENTS}",
}
TWO = {
    "hermes": ANSWERS["hermes"] + '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    "llama": ANSWERS["llama"] + '; {"name": "time", "parameters": {}}',
    "mistral": ANSWERS["mistral"][:-1] + ', {"name": "time", "arguments": {}}]',
    "named": ANSWERS["named"] + "[TOOL_CALLS]time[ARGS]{}",
}


@pytest.fixture(scope="module", params=list(TEMPLATES))
def tooled(request: Any, tmp_path_factory: pytest.TempPathFactory):
    """A server for a model with each of the templates."""
    vlm = model(tmp_path_factory.mktemp(request.param), TEMPLATES[request.param])
    with serving(ready(vlm)) as running:
        yield request.param, vlm, running


def ask(running: Running, **fields: Any) -> Any:
    values = {"messages": [{"role": "user", "content": "Weather?"}], "tools": [WEATHER, TIME], "max_tokens": 400}
    return running.client().chat.completions.create(**{"model": "tiny", "temperature": 0, **values, **fields})


def streamed(chunks: Any) -> tuple[str, list[dict[str, Any]], str]:
    """Text, calls and finish of a stream, put together as clients do."""
    text, calls, reason = "", [], ""
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            calls += [call.model_dump(exclude_none=True) for call in choice.delta.tool_calls or ()]
            reason = choice.finish_reason or reason
    return text, joined(calls), reason


def test_calls_of_the_models_own_choice(tooled, monkeypatch) -> None:
    name, vlm, running = tooled
    script(monkeypatch, vlm, ANSWERS[name])
    for fields in ({}, {"tool_choice": "auto"}, {"messages": [{"role": "user", "content": shows(None)}]}):
        choice = ask(running, **fields).choices[0]
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", ARGUMENTS)
        assert choice.message.content == ("Let me see." if name in ("hermes", "named") else None)
        text, calls, reason = streamed(ask(running, stream=True, **fields))
        assert (text or None, reason) == (choice.message.content, "tool_calls")
        assert [c["function"] for c in calls] == [{"name": "weather", "arguments": ARGUMENTS}] and calls[0]["id"]


def test_several_calls_or_only_one(tooled, monkeypatch) -> None:
    name, vlm, running = tooled
    script(monkeypatch, vlm, TWO[name])
    calls = ask(running).choices[0].message.tool_calls
    assert [(c.function.name, c.function.arguments) for c in calls] == [("weather", ARGUMENTS), ("time", "{}")]
    assert len({c.id for c in calls}) == 2
    assert [c["function"]["name"] for c in streamed(ask(running, stream=True))[1]] == ["weather", "time"]
    one = ask(running, parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls"


def test_arguments_are_streamed_while_they_are_written(tooled, monkeypatch) -> None:
    name, vlm, running = tooled
    script(monkeypatch, vlm, ANSWERS[name])
    events = [c for chunk in ask(running, stream=True) for c in chunk.choices if c.delta.tool_calls]
    assert len(events) > 10
    first = events[0].delta.tool_calls[0]
    assert first.id and first.function.name == "weather" and first.function.arguments == "" and first.index == 0
    assert all(e.delta.tool_calls[0].id is None for e in events[1:])


def test_text_that_spells_a_call_is_text_where_a_token_opens_calls(tooled, monkeypatch) -> None:
    """A model that repeats what a user typed calls nothing; a call of no offered tool is text in every form."""
    name, vlm, running = tooled
    if name != "llama":  # there nothing but JSON says that an answer is a call
        script(monkeypatch, vlm, ANSWERS[name], literal=False)
        for stream in (False, True):
            got = ask(running, stream=stream)
            found = streamed(got) if stream else (got.choices[0].message.content, [], got.choices[0].finish_reason)
            assert found == (ANSWERS[name], [], "stop")
    unknown = ANSWERS[name].replace("weather", "rm")
    script(monkeypatch, vlm, unknown)
    got = ask(running).choices[0]
    assert (got.message.content, got.message.tool_calls, got.finish_reason) == (unknown, None, "stop")


def test_an_answer_without_calls_is_text(tooled, monkeypatch) -> None:
    _, vlm, running = tooled
    for text in ("It is 7 <b>", "  spaced \n out \n", "{no call}", "[1, 2]", "\U0010ff00 é"):
        script(monkeypatch, vlm, text)
        got = ask(running).choices[0]
        told = text.replace("\U0010ff00", "\ufffd") if vlm.processor.template.form.opening else text
        assert got.message.content == told and got.finish_reason == "stop" and got.message.tool_calls is None
        assert streamed(ask(running, stream=True)) == (told, [], "stop")


def test_a_call_that_is_cut_short(tooled, monkeypatch) -> None:
    name, vlm, running = tooled
    script(monkeypatch, vlm, ANSWERS[name])
    before, _, _ = ANSWERS[name].partition(ARGUMENTS)
    length = len(tokens(vlm, before)) + len('{"city": "Os')
    got = ask(running, max_tokens=length).choices[0]
    assert got.finish_reason == "length" and got.message.tool_calls[0].function.arguments == '{"city": "Os'


def test_a_call_is_demanded(tooled) -> None:
    """Random weights, so that only the constraint can make a call of it."""
    pytest.importorskip("llguidance")
    name, _, running = tooled
    named = {"type": "function", "function": {"name": "weather"}}
    for stream in (False, True):
        got = ask(running, tool_choice=named, stream=stream, temperature=1, seed=3, parallel_tool_calls=False)
        calls = streamed(got)[1] if stream else [c.model_dump() for c in got.choices[0].message.tool_calls]
        assert len(calls) == 1 and calls[0]["function"]["name"] == "weather"
        arguments = json.loads(calls[0]["function"]["arguments"])
        assert set(arguments) == {"city", "<tool_call>"} and arguments["city"] in ("Rome", "Oslo")
    if name == "named":
        with pytest.raises(openai.BadRequestError, match="name one tool"):
            ask(running, tool_choice="required")
        return
    seen = set()
    for seed in range(8):
        choice = ask(running, tool_choice="required", temperature=1, seed=seed, parallel_tool_calls=False).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        seen.add(choice.message.tool_calls[0].function.name)
    assert seen == {"weather", "time"}


def test_the_opening_of_a_demanded_call_is_the_control_token(tooled) -> None:
    name, vlm, running = tooled
    plain = ask(running, max_tokens=1).usage.prompt_tokens
    demanded = ask(running, max_tokens=1, tool_choice={"type": "function", "function": {"name": "time"}})
    form = vlm.processor.template.form
    lead = form.opening.rstrip(" ") + ("time" + form.named if form.named else "")
    assert demanded.usage.prompt_tokens - plain == len(vlm.tokenizer.encode(lead, literal=True))
    assert demanded.usage.prompt_tokens - plain == {"hermes": 2, "llama": 0, "mistral": 1, "named": 6}[name]


def test_results_go_back_and_tools_may_be_left_out(tooled, monkeypatch) -> None:
    _, vlm, running = tooled
    script(monkeypatch, vlm, "It is dry.")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "dry"}]},
    ]
    for fields in ({}, {"tools": openai.omit}, {"tool_choice": "none"}):
        got = ask(running, messages=messages, **fields)
        assert got.choices[0].message.content == "It is dry." and got.choices[0].finish_reason == "stop"
    without = ask(running, messages=messages, tool_choice="none").usage.prompt_tokens
    assert ask(running, messages=messages).usage.prompt_tokens > without


def test_what_is_wrong_is_told(tooled) -> None:
    _, _, running = tooled
    base = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [WEATHER]}
    deep: Any = {"type": "object"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"x": deep}}

    def function(**values: Any) -> dict[str, Any]:
        return {"tools": [{"type": "function", "function": {"name": "f", **values}}]}

    arguments = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}]
    for fields, param in (
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        ({"tools": [None]}, "tools[0]"),
        (function(name="a b"), "tools[0].function.name"),
        (function(description=5), "tools[0].function.description"),
        (function(parameters=[1]), "tools[0].function.parameters"),
        (function(parameters=deep), "tools[0].function.parameters"),
        (function(description="x" * 70_000), "tools[0]"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"tool_choice": "required", **function(parameters={"type": "object", "$ref": "#/x"})}, "tools"),
        ({"messages": [*base["messages"], {"role": "assistant", "content": "", "tool_calls": arguments}]}, None),
    ):
        reply = running.post("/v1/chat/completions", {**base, **fields})
        assert reply.status == 400 and reply.error["param"] == param, (
            fields if len(str(fields)) < 900 else param,
            reply.body,
        )


def test_a_template_without_tools_says_so(running: Running) -> None:
    for fields in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}):
        reply = running.chat("x", tools=[WEATHER], **fields)
        assert reply.status == 400 and reply.error["param"] == "tools", reply.body
        assert reply.error["code"] == "unsupported_parameter" and "template" in reply.error["message"]
    assert running.chat("x", tools=[WEATHER], tool_choice="none").status == 200
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for messages in (
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "c", "content": "x"}],
    ):
        reply = running.post("/v1/chat/completions", {"model": "tiny", "messages": messages})
        assert reply.status == 400 and reply.error["code"] == "tools", reply.body


def test_a_picture_in_a_result_is_refused(tooled) -> None:
    _, _, running = tooled
    part = {"type": "image_url", "image_url": {"url": data_url()}}
    values = {"model": "tiny", "messages": [{"role": "tool", "tool_call_id": "c", "content": [part]}]}
    assert running.post("/v1/chat/completions", values).status == 400


# ------------------------------------------------------------------------------------------------ other clients


def test_open_webui_calls_and_goes_on(tooled, monkeypatch) -> None:
    """As its middleware puts deltas together (names are appended!) and sends them back, ``index`` and all."""
    name, vlm, running = tooled
    script(monkeypatch, vlm, ANSWERS[name])
    values = {"model": "tiny", "stream": True, "tools": [WEATHER], "stream_options": {"include_usage": True}}
    messages = [{"role": "user", "content": "Weather?"}]
    reply = running.post("/v1/chat/completions", {**values, "messages": messages, "max_tokens": 400})
    calls: list[dict[str, Any]] = []
    for event in reply.events[:-1]:
        for choice in event["choices"][:1]:
            for delta in choice["delta"].get("tool_calls") or ():
                held = next((call for call in calls if call["index"] == delta["index"]), None)
                if held is None:
                    calls.append({**delta, "function": {"name": "", "arguments": "", **delta["function"]}})
                    continue
                for key in ("name", "arguments"):
                    held["function"][key] += delta["function"].get(key) or ""
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in calls] == [("weather", ARGUMENTS)]
    messages += [{"role": "assistant", "content": reply.text, "tool_calls": calls}]
    messages += [{"role": "tool", "tool_call_id": calls[0]["id"], "content": ""}]
    script(monkeypatch, vlm, "Dry.")
    assert running.post("/v1/chat/completions", {**values, "messages": messages}).text == "Dry."


@pytest.mark.slow  # importing it takes seconds
def test_langchain_calls_tools_and_shows_pictures(tooled, monkeypatch) -> None:
    """The program itself: bound tools, a result, a structured answer, streams, a picture in its own form."""
    chat = pytest.importorskip("langchain_openai").ChatOpenAI
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    name, vlm, running = tooled
    asking = chat(model="tiny", base_url=running.url + "/v1", api_key="x", temperature=0, max_retries=0, max_tokens=400)

    @tool
    def weather(city: Literal["Rome", "Oslo"]) -> str:
        """The weather of a city."""
        return f"{city} is dry"

    script(monkeypatch, vlm, ANSWERS[name].replace(ARGUMENTS, '{"city": "Oslo"}'))
    bound = asking.bind_tools([weather], parallel_tool_calls=False)
    asked: list[Any] = [HumanMessage("Weather?")]
    said = bound.invoke(asked)
    (call,) = said.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
    pieces = None
    for piece in bound.stream(asked):
        pieces = piece if pieces is None else pieces + piece
    assert [c["args"] for c in pieces.tool_calls] == [{"city": "Oslo"}]
    script(monkeypatch, vlm, "Dry.")
    asked += [said, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert bound.invoke(asked).content == "Dry."
    url = data_url()
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "source_type": "base64", "mime_type": "image/png", "data": url.partition(",")[2]},
        {"type": "image", "base64": url.partition(",")[2], "mime_type": "image/png"},
    ):
        seen = asking.invoke([HumanMessage([{"type": "text", "text": "What is it?"}, part])])
        assert seen.content == "Dry." and seen.usage_metadata["input_tokens"] > 4
    forced = asking.bind_tools([weather], tool_choice="weather", strict=True).invoke(asked[:1])
    assert set(forced.tool_calls[0]["args"]) == {"city"}
    schema = {"title": "Answer", "type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    assert asking.with_structured_output(schema, method="json_schema").invoke("How many?")["n"] in (1, 2)


# ------------------------------------------------------------------------------------------------ the reader alone

HERMES_FORM = CallForm("<tool_call>\n", "\n</tool_call>")
CASES = {
    "keys in another order": (HERMES_FORM, 'a <tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call> b', "a b"),
    "arguments as text": (HERMES_FORM, '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', ""),
    "no white space": (HERMES_FORM, '<tool_call>{"name":"f","arguments":{"x": 1}}</tool_call>', ""),
    "nothing closes it": (HERMES_FORM, '<tool_call>\n{"name": "f", "arguments": {"x": 1}}', ""),
    "an end that is no end": (HERMES_FORM, '<tool_call>{"name": "f", "arguments": {"x": 1}}</too', "</too"),
    "a list of one": (CallForm("[T]", "", many=True), 'hm [T] [{"name": "f", "arguments": {"x": 1}}]', "hm"),
    "a list unfinished": (CallForm("[T]", "", many=True), '[T][{"name": "f", "arguments": {"x": 1}}, ', ""),
    "bare": (CallForm("", ""), ' {"name": "f", "arguments": {"x": 1}}\n', ""),
    "tags": (CallForm("<f=", "</f>", named=">"), '<f=f>{"x": 1}</f>', ""),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_one_call_however_it_is_cut(case: str, size: int) -> None:
    form, text, rest = CASES[case]
    assert read(Calls(form, frozenset({"f"})), text, size) == (rest, [("f", {"x": 1})])


NONE = (
    "<tool_call>",
    "<tool_call>\n",
    "a <tool_call>b</tool_call>",
    '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": 5}',
    '<tool_call>{{{{"name": "f"}}}}',
    '<tool_call>{"name": "f", ',
    "x <tool_cal",
    " \n <",
)


@pytest.mark.parametrize("text", NONE)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_what_is_no_call_is_given_out_as_it_is(text: str, size: int) -> None:
    assert read(Calls(HERMES_FORM, frozenset({"f"})), text, size) == (text, [])


def read(calls: Calls, text: str, size: int) -> tuple[str, list[Any]]:
    texts, deltas = [], []
    for start in range(0, len(text), size):
        got, new = calls.push(text[start : start + size])
        texts.append(got)
        deltas += new
    got, new = calls.flush()
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in joined([*deltas, *new])]
    return "".join([*texts, got]), found


def test_a_long_text_is_read_in_a_moment() -> None:
    """No step looks at all of it again."""
    calls = Calls(HERMES_FORM, frozenset({"f"}))
    seen: list[int] = []
    feed = type(calls._scanner).feed

    def counted(self: Any, text: str) -> int:
        seen.append(len(text))
        return feed(self, text)

    type(calls._scanner).feed = counted  # type: ignore[method-assign]
    try:
        text = '<tool_call>{"arguments": {"x": "' + "y" * 20_000 + '"}, "name": "f"}'
        assert len(read(calls, text, 1)[1]) == 1
    finally:
        type(calls._scanner).feed = feed  # type: ignore[method-assign]
    assert sum(seen) < 2 * len(text)
