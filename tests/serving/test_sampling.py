"""Points 11 to 16 and 18: sampling, several answers, stops, log-probabilities, penalties, formats, other fields."""

from __future__ import annotations

import json
import math
import sys

import openai
import pytest
from serving_kit import Running, shows

QUESTION = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def client(running: Running):
    return running.client()


def create(client, **fields):
    return client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "max_tokens": 12, **fields})


def texts(client, **fields) -> list[str]:
    return [choice.message.content for choice in create(client, **fields).choices]


def test_temperature_zero_is_always_the_same(client):
    assert texts(client, temperature=0) == texts(client, temperature=0)


def test_seeds(client):
    first, again, other = (texts(client, temperature=1, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert texts(client, temperature=1) != texts(client, temperature=1)
    assert texts(client, temperature=1, seed=-5) == texts(client, temperature=1, seed=-5)


def test_top_p_zero_is_greedy(client):
    greedy = texts(client, temperature=0)
    assert texts(client, temperature=1, top_p=0) == greedy
    assert texts(client, temperature=1, top_p=1e-9) == greedy
    assert texts(client, temperature=1, extra_body={"top_k": 1}) == greedy
    assert texts(client, temperature=1, top_p=1, seed=3) == texts(client, temperature=1, seed=3)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": "1"},
        {"temperature": True},
        {"temperature": 1e308},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": 10**30},
        {"max_completion_tokens": 0},
        {"n": 0},
        {"n": -1},
        {"n": 9},
        {"n": 10**12},
        {"seed": 1.5},
        {"seed": 2**70},
        {"stop": ""},
        {"stop": [""]},
        {"stop": ["a"] * 5},
        {"stop": 3},
        {"stop": "x" * 1000},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"logit_bias": {"5": 101}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"99999": 1}},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"5": "x"}},
        {"logit_bias": [1]},
        {"logit_bias": {"²": 1}},
        {"logprobs": 5},
        {"logprobs": True, "top_logprobs": 21},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": -1},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"top_k": -2},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"min_tokens": -1},
        {"model": 5},
        {"model": None},
    ],
)
def test_numbers_out_of_bounds(running: Running, fields):
    reply = running.chat("x", **fields)
    assert reply.status == 400, reply.body
    assert reply.error["param"] in (*fields, None)


def test_the_newer_name_for_the_length_wins(client):
    answer = create(client, max_tokens=9, max_completion_tokens=3, temperature=0)
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"
    assert create(client, max_tokens=1).choices[0].finish_reason == "length"


def test_several_answers(client):
    answer = create(client, n=3, temperature=1, seed=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 36
    alone = [texts(client, temperature=1, seed=4 + i)[0] for i in range(3)]
    assert [choice.message.content for choice in answer.choices] == alone
    assert answer.usage.prompt_tokens == create(client).usage.prompt_tokens


def said(client, text: str, stop, **fields):
    """An answer that would be ``text``, byte by byte, and its reason."""
    answer = create(client, stop=stop, max_tokens=60, extra_body={"guided_choice": [text]}, **fields)
    return answer.choices[0].message.content, answer.choices[0].finish_reason


def test_stops(client):
    text = "one, two, three 🐈 four"
    assert said(client, text, None) == (text, "stop")
    assert said(client, text, "two") == ("one, ", "stop")
    assert said(client, text, ["four", "three", "x", "y"]) == ("one, two, ", "stop")
    assert said(client, text, "🐈") == ("one, two, three ", "stop")
    assert said(client, text, " 🐈 f") == ("one, two, three", "stop")
    assert said(client, text, "twos") == (text, "stop")
    assert said(client, text, text) == ("", "stop")
    assert said(client, text, []) == (text, "stop")


def streamed(client, **fields):
    pieces = create(client, stream=True, **fields)
    return [piece for piece in pieces if piece.choices]


def test_stops_in_streams(client):
    text = "one, two, three 🐈 four"
    for stop, left in (("two, t", "one, "), ("🐈", "one, two, three "), ("never", text)):
        pieces = streamed(client, stop=stop, max_tokens=60, extra_body={"guided_choice": [text]})
        shown = [piece.choices[0].delta.content or "" for piece in pieces]
        assert "".join(shown) == left and pieces[-1].choices[0].finish_reason == "stop"
        for count in range(len(shown)):  # what was shown once is never taken back
            assert left.startswith("".join(shown[:count]))


def test_logprobs(client):
    answer = create(client, logprobs=True, top_logprobs=5, temperature=0, extra_body={"guided_choice": ["a 🐈!"]})
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == "a 🐈!" == answer.choices[0].message.content
    for token in tokens:
        assert len(token.top_logprobs) == 5
        best = [other.logprob for other in token.top_logprobs]
        assert best == sorted(best, reverse=True) and sum(map(math.exp, best)) <= 1 + 1e-6 and token.logprob <= best[0]


def test_logprobs_of_streams_are_the_same(client):
    fields = {"logprobs": True, "top_logprobs": 2, "temperature": 0}
    whole = create(client, **fields).choices[0].logprobs.content
    parts = [
        token
        for piece in streamed(client, **fields)
        if piece.choices[0].logprobs
        for token in piece.choices[0].logprobs.content
    ]
    assert [(t.token, t.bytes) for t in whole] == [(t.token, t.bytes) for t in parts] and len(whole) == 12
    assert [t.logprob for t in whole] == pytest.approx([t.logprob for t in parts], abs=1e-5)
    none = create(client, logprobs=True, temperature=0).choices[0].logprobs.content
    assert len(none) == 12 and none[0].top_logprobs == []
    assert create(client).choices[0].logprobs is None


def test_logprobs_are_those_of_the_model(client, vlm):
    import torch

    answer = create(client, logprobs=True, top_logprobs=20, temperature=0, max_tokens=1)
    batch = vlm.processor.batch([QUESTION], add_generation_prompt=True, padding_side="left")
    with torch.no_grad():
        expected = vlm.model(batch, logits="last").logits[0].log_softmax(-1)
    best = answer.choices[0].logprobs.content[0].top_logprobs
    values, _ = expected.topk(20)
    assert [token.logprob for token in best] == pytest.approx(values.tolist(), abs=1e-4)


def test_logit_bias(client, vlm):
    index = vlm.tokenizer.encode("Q")[0]
    assert texts(client, temperature=0, logit_bias={str(index): 100}) == ["Q" * 12]
    greedy = texts(client, temperature=0)[0]
    first = vlm.generate(QUESTION, max_new_tokens=1, return_details=True).ids[0]
    assert texts(client, temperature=0, logit_bias={str(first): -100})[0] != greedy


def test_a_placeholder_cannot_be_asked_for(client, vlm):
    index = vlm.tokenizer.id_of("<image>")
    with pytest.raises(openai.BadRequestError) as told:
        create(client, logit_bias={str(index): 100})
    assert told.value.param == "logit_bias"


def test_penalties(client, vlm):
    index = vlm.tokenizer.encode("Q")[0]
    other = vlm.tokenizer.encode("R")[0]
    both = {str(index): 100, str(other): 99}
    assert texts(client, temperature=0, logit_bias=both)[0] == "Q" * 12
    assert "R" in texts(client, temperature=0, logit_bias=both, presence_penalty=2)[0]
    assert "R" in texts(client, temperature=0, logit_bias=both, frequency_penalty=2)[0]
    many = texts(client, temperature=0, extra_body={"repetition_penalty": 2.0})[0]
    assert many != texts(client, temperature=0)[0]


def test_json_objects(client):
    answer = create(client, response_format={"type": "json_object"}, max_tokens=80, temperature=1, seed=1).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    else:
        assert answer.finish_reason == "length" and answer.message.content.lstrip().startswith("{")


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


def test_json_schemas(client):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        answer = create(client, response_format=form, max_tokens=200, temperature=1, seed=seed).choices[0]
        value = json.loads(answer.message.content)
        assert answer.finish_reason == "stop" and value["colour"] in ("red", "blue") and isinstance(value["sure"], bool)
    parts = streamed(client, response_format=form, max_tokens=200, temperature=1, seed=1)
    assert set(json.loads("".join(p.choices[0].delta.content or "" for p in parts))) == {"colour", "sure"}


@pytest.mark.parametrize(
    "form",
    [
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {}},
        {"type": ["text"]},
        {"x": 1},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": "string"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "((("}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1/x"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["x" * 100_000]}}},
    ],
)
def test_formats_that_are_refused(running: Running, form):
    reply = running.chat("x", response_format=form)
    assert reply.status == 400 and (reply.error["param"] or "response_format").startswith("response_format"), reply.body


def test_text_is_a_format(client):
    assert texts(client, response_format={"type": "text"}, temperature=0) == texts(client, temperature=0)


def test_guided_choices(client):
    assert texts(client, extra_body={"guided_choice": ["yes", "no"]})[0] in ("yes", "no")
    assert texts(client, extra_body={"guided_choice": ["only"]}) == ["only"]


def test_without_the_library_what_cannot_be_promised_is_refused(running: Running, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    for fields in ({"response_format": form}, {"response_format": {"type": "json_object"}}, {"guided_regex": "[0-9]"}):
        reply = running.chat("x", **fields)
        assert reply.status == 400 and reply.error["code"] == "unsupported_parameter"
        assert reply.error["param"].startswith(next(iter(fields)))


def test_guided_answers(client):
    assert texts(client, extra_body={"guided_regex": "[0-9]{3}"})[0].isdigit()
    with pytest.raises(openai.BadRequestError):
        create(client, extra_body={"guided_choice": ["yes"], "guided_regex": "x"})


def test_fields_that_are_ignored(running: Running):
    fields = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "reasoning_effort": "low",
        "prediction": None,
        "verbosity": "low",
        "a_new_field": [1, {"x": None}],
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "functions": [],
        "best_of": 1,
        "chat_template_kwargs": {},
        "audio": None,
        "temperature": None,
        "stop": None,
        "n": None,
        "stream": None,
    }
    assert running.chat("x", **fields).status == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"audio": {"voice": "x"}},
        {"modalities": ["text", "audio"]},
        {"functions": [{"name": "look", "parameters": {"type": "object"}}]},
        {"best_of": 2},
        {"web_search_options": {}},
        {"chat_template": "{{ messages }}"},
        {"chat_template_kwargs": {"tokenize": True}},
        {"use_beam_search": True},
        {"prompt_logprobs": 1},
        {"echo": True},
        {"prompt_embeds": "x"},
        {"documents": [{}]},
        {"mm_processor_kwargs": {"num_crops": 10**6}},
        {"add_generation_prompt": False},
        {"logits_processors": ["os.system"]},
    ],
)
def test_fields_that_are_refused(running: Running, fields):
    reply = running.chat(shows(None), **fields)
    assert reply.status == 400 and (reply.error["param"] in (*fields, None)), reply.body
    assert next(iter(fields)) in reply.error["message"]


def test_continuing_a_final_message(running: Running):
    messages = [*QUESTION, {"role": "assistant", "content": "It is"}]
    values = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0, "continue_final_message": True}
    reply = running.post("/v1/chat/completions", {**values, "add_generation_prompt": False})
    assert reply.status == 200, reply.body
    longer = [*QUESTION, {"role": "assistant", "content": "It is" + reply.text[:0]}]
    assert running.post("/v1/chat/completions", {**values, "messages": longer}).text == reply.text
    assert reply.json["usage"]["prompt_tokens"] > running.chat("Say something.").json["usage"]["prompt_tokens"]
