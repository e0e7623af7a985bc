"""Tools in prompts: the same text and ids as transformers writes, and nobody's string becomes a control token."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tool_kit import HERMES, OTHERS, SEEN, TEMPLATES, TIME, TOOLS, TURNS, WEATHER, model, tokenizer
from transformers import PreTrainedTokenizerFast

from chiasm.errors import DataError
from chiasm.processing.tagged import PythonForm, TagForm
from chiasm.processing.tools import CallForm
from chiasm.types import Call, Message, Text

FORMS = {
    "hermes": CallForm("<tool_call>\n", "\n</tool_call>"),
    "llama": CallForm("", "", arguments="parameters"),
    "mistral": CallForm("[TOOL_CALLS] ", "", many=True),
    "named": CallForm("[TOOL_CALLS]", "", named="[ARGS]"),
    "tags": TagForm(
        opening="<tool_call>\n<function=",
        named=">\n",
        before="<parameter=",
        between=">\n",
        after="\n</parameter>\n",
        closing="</function>\n</tool_call>",
    ),
    "pairs": TagForm(
        opening="<tool_call>",
        named="\n",
        before="<arg_key>",
        between="</arg_key>\n<arg_value>",
        after="</arg_value>\n",
        closing="</tool_call>",
    ),
    "trained": CallForm("", "", arguments="parameters", python=PythonForm("<|python_tag|>", ".call(")),
    "python": PythonForm("[", "(", "]"),
}


@pytest.fixture(scope="module", params=[*TEMPLATES, *OTHERS])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return request.param, model(tmp_path_factory.mktemp(request.param), {**TEMPLATES, **OTHERS}[request.param])


def call(arguments: dict[str, Any], id: str = "a1b2c3d4e") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}


def conversations(name: str) -> list[list[dict[str, Any]]]:
    ask = {"role": "user", "content": "Weather?\n"}
    one = {"role": "assistant", "content": "", "tool_calls": [call({"city": 'R"ome é', "n": [1, None, {"x": True}]})]}
    told = {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": '{"sky": "blue\\n"}'}
    done = {"role": "assistant", "content": "It is blue."}
    found = [[ask], [ask, one, told], [ask, one, told, done, ask]]
    if name not in ("llama", "trained"):
        other = call({}, "f1b2c3d4e")
        two = {**one, "tool_calls": [*one["tool_calls"], other]}
        found.append([ask, two, told, {**told, "tool_call_id": "f1b2c3d4e", "content": "7"}])
    return found


def theirs(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As transformers wants them: arguments are objects."""
    found = copy.deepcopy(messages)
    for message in found:
        for one in message.get("tool_calls", ()):
            one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    return found


def safe(tools: list[Any]) -> list[Any]:
    """The tools without strings that spell control tokens, which transformers would take for them."""
    text = json.dumps(tools)
    for token in (*TURNS, *TOOLS, *SEEN):
        text = text.replace(token, "zz")
    return json.loads(text)


def test_text_and_ids_equal_transformers(made, tmp_path: Path) -> None:
    name, vlm = made
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer(tmp_path, HERMES) / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    source = vlm.config.processing.template.source or vlm.tokenizer.chat_template
    tools = safe([WEATHER, TIME])
    for messages in conversations(name):
        for given in (tools, None):
            text = reference.apply_chat_template(
                theirs(messages), tools=given, chat_template=source, tokenize=False, add_generation_prompt=True
            )
            assert vlm.processor.prompt(messages, True, given) == text
            sample = vlm.processor(messages, "s", add_generation_prompt=True, tools=given)
            assert sample.input_ids.tolist() == reference(text, add_special_tokens=False)["input_ids"]


def test_the_form_of_calls_is_found(made) -> None:
    name, vlm = made
    assert vlm.processor.template.form == FORMS[name]


@pytest.mark.parametrize("opened", [False, True])
def test_thoughts_are_no_part_of_the_form(tmp_path: Path, opened: bool) -> None:
    """A template that writes an empty thought before the last answer (Qwen3), or opens one in the prompt."""
    call = "{%- elif message.tool_calls %}<|im_start|>assistant"
    thought = "{%- if loop.last %}\n<think>\n\n</think>\n{% endif %}"
    assert call in HERMES
    template = HERMES.replace(call, call + thought)
    if opened:
        template = template.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    assert model(tmp_path, template).processor.template.form == FORMS["hermes"]


@pytest.mark.parametrize("name", ["hermes", "tags"])
def test_a_thought_that_the_prompt_begins_is_ended_ahead_of_a_call(tmp_path: Path, name: str) -> None:
    """Qwen3.5: the prompt opens a thought, and every answer in a conversation has one, if only an empty one."""
    template = {**TEMPLATES, **OTHERS}[name]
    call = "{%- elif message.tool_calls %}<|im_start|>assistant"
    assert call in template
    template = template.replace(call, call + "\n<think>\n\n</think>\n")
    template = template.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    form = model(tmp_path, template).processor.template.form
    assert form.ahead.strip() == "</think>" and replace(form, ahead="") == FORMS[name]


def test_no_string_of_a_tool_or_a_call_becomes_a_control_token(made) -> None:
    """Names, descriptions, keys, values, arguments, results: as many control tokens as with harmless words."""
    _, vlm = made
    controls = set(vlm.tokenizer.specials.values())

    def count(word: str) -> list[int]:
        text = json.dumps(WEATHER).replace("<tool_call>", word).replace("[TOOL_CALLS]", word).replace("[INST]", word)
        tool = json.loads(text.replace("<|im_end|>", word))
        messages = [
            {"role": "user", "content": word},
            {"role": "assistant", "content": "", "tool_calls": [call({word: word, "n": [word]})]},
            {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": word},
        ]
        ids = vlm.processor(messages, "s", add_generation_prompt=True, tools=[tool]).input_ids.tolist()
        return [i for i in ids if i in controls]

    expected = count("zzz")
    assert expected
    for token in vlm.tokenizer.specials:
        assert count(token) == expected, token


def test_templates_without_tools_refuse_them(vlm) -> None:
    ask = {"role": "user", "content": "x"}
    with pytest.raises(DataError, match="renders no tools"):
        vlm.processor([ask], "s", tools=[TIME])
    with pytest.raises(DataError, match="no place for calls"):
        vlm.processor([ask, {"role": "assistant", "content": None, "tool_calls": [call({})]}], "s")
    with pytest.raises(DataError, match="no place for calls"):
        vlm.processor([ask, {"role": "tool", "content": "x"}], "s")


def test_a_template_that_leaves_results_out_is_found_out(tmp_path: Path) -> None:
    vlm = model(tmp_path, HERMES.replace("{{ message.content }}\n</tool_response>", "</tool_response>"))
    with pytest.raises(DataError, match="leaves out"):
        vlm.processor(conversations("hermes")[1], "s", tools=[TIME])


def test_a_form_that_cannot_be_read_back_is_none(tmp_path: Path) -> None:
    """Tags for arguments that nothing closes."""
    written = '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    tags = "<f={{ call.function.name }}>{% for k, v in call.function.arguments.items() %}<p={{ k }}>{{ v }}{% endfor %}"
    assert written in HERMES
    vlm = model(tmp_path, HERMES.replace(written, tags))
    assert vlm.processor.template.form is None


def test_calls_are_learned_only_within_generation_blocks(made, tmp_path: Path) -> None:
    name, vlm = made
    with pytest.raises(DataError, match="generation"):
        vlm.processor(conversations(name)[2], "s", train=True)
    if name == "hermes":
        begin, end = "{% generation %}", "{% endgeneration %}"
        blocks = HERMES.replace("{%- for call in", begin + "{%- for call in")
        blocks = blocks.replace("{%- endfor %}<|im_end|>\n{% elif", "{%- endfor %}<|im_end|>" + end + "\n{% elif")
        said = "{{ message.content }}<|im_end|>\n{% endif %}\n{%- endfor"
        asked = "{% if message.role == 'assistant' %}" + begin + "{{ message.content }}" + end + "{% else %}"
        blocks = blocks.replace(
            said, asked + "{{ message.content }}{% endif %}" + said.removeprefix("{{ message.content }}")
        )
        learned = model(tmp_path, blocks).processor
        sample = learned(conversations(name)[1], "s", train=True)
        text = learned.tokenizer.decode(sample.input_ids[sample.loss_mask].tolist(), skip_special=False)
        assert text.startswith("\n<tool_call>") and text.endswith("</tool_call><|im_end|>") and '"R\\"ome é"' in text


def test_messages_say_what_is_wrong() -> None:
    from chiasm.processing.messages import parse

    good = parse([{"role": "assistant", "content": None, "tool_calls": [call({"a": 1})]}])[0]
    assert good == Message("assistant", (), calls=(Call("weather", '{"a": 1}', "a1b2c3d4e"),))
    assert parse([{"role": "tool", "content": "x", "tool_call_id": "c"}])[0] == Message(
        "tool", (Text("x"),), answers="c"
    )
    for wrong, told in (
        ({"role": "user", "content": "x", "tool_calls": [call({})]}, "of the assistant"),
        ({"role": "assistant", "content": None}, "missing key 'content'"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "JSON object"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "name and arguments"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "tool_call_id"),
    ):
        with pytest.raises(DataError, match=told):
            parse([wrong])
