"""The official client through every verb that applies, and requests as langchain-openai and open-webui write them."""

from __future__ import annotations

import asyncio
import base64
import struct
import threading
import time

import openai
import pytest
import torch
from serving_kit import Running, Served, data_url, encoded, picture, serving, shows

LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def test_the_official_client(running: Running):
    client = running.client()
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": shows(None)}],
        max_completion_tokens=5,
        temperature=0,
        seed=1,
    )
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer._request_id and answer.system_fingerprint
    raw = client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=1,
        temperature=0,
        extra_headers={"X-Request-Id": "mine"},
    )
    assert raw.headers["x-request-id"] == "mine" and raw.parse().choices[0].finish_reason == "length"


def test_the_clients_own_stream_helper(running: Running):
    client = running.client()
    with client.chat.completions.stream(
        model="tiny",
        messages=[{"role": "user", "content": shows(None)}],
        extra_body={"guided_choice": ["a cat 🐈"]},  # the helper takes an answer that was cut for an error
        stream_options={"include_usage": True},
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and "content.done" in kinds
    assert final.choices[0].message.content == "a cat 🐈" and final.usage.completion_tokens == 10


def test_many_asynchronous_clients(running: Running):
    async def ask(client, number: int) -> int:
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x" * number}], max_tokens=3, temperature=0, stream=True
        )
        return len([chunk async for chunk in stream])

    async def everyone() -> list[int]:
        async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, n) for n in range(1, 13)))

    assert all(count >= 2 for count in asyncio.run(everyone()))


@pytest.mark.parametrize("read", [1, 3])
def test_stopping_a_stream_early(running: Running, monkeypatch, read):
    """The engine stands still until the server has seen the client leave; the answer has no end of its own."""
    running.idle()
    service, go, steps = running.state.models["tiny"].service, threading.Event(), []
    step, before = service.scheduler.step, service.stats()["finished"].get("cancelled", 0)

    def held() -> None:
        steps.append(1)
        if len(steps) == 5:
            go.wait(120)
        step()

    monkeypatch.setattr(service.scheduler, "step", held)
    stream = running.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=300,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    for _ in range(read):
        next(chunks)
    stream.close()
    deadline = time.monotonic() + 60
    while running.state.answering:
        assert time.monotonic() < deadline, "the server has not seen the client leave"
        time.sleep(0.005)
    go.set()
    running.idle()
    assert len(steps) <= 5 and service.stats()["finished"]["cancelled"] == before + 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (404, openai.NotFoundError),
        (403, openai.PermissionDeniedError),
        (413, openai.APIStatusError),
    ],
)
def test_errors_become_the_clients_classes(running: Running, status, error):
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    headers = {}
    if status == 400:
        fields["temperature"] = 5
    elif status == 404:
        fields["model"] = "none"
    elif status == 403:
        headers = {"Origin": "https://evil.example"}
    else:
        fields["messages"] = [{"role": "user", "content": "x" * 34_000_000}]
    with pytest.raises(error) as told:
        running.client().chat.completions.create(**fields, extra_headers=headers)
    assert told.value.status_code == status and told.value.request_id
    assert set(told.value.body) == {"message", "type", "param", "code"}


# -------------------------------------------------------------------------------------------- other clients' shapes


def langchain_reads(reply) -> None:
    """What ``BaseChatOpenAI`` insists on, of an answer and of chunks."""
    objects = [reply.json] if "json" in reply.headers["content-type"] else [e for e in reply.events if e != "[DONE]"]
    for value in objects:
        assert not value.get("error") and isinstance(value["choices"], list) and value["model"] and value["id"]
        for choice in value["choices"]:
            assert choice.get("delta", choice.get("message")) is not None and "finish_reason" in choice


@pytest.mark.parametrize("stream", [True, False])
def test_langchain(running: Running, stream):
    values = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "You see."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": data_url(encoded(picture(), "JPEG"), "image/jpeg")}},
                ],
            },
            {"role": "assistant", "content": "A thing."},
            {"role": "user", "content": "Sure?", "name": "someone"},
        ],
        "stream": stream,
        "temperature": 0.7,
        "max_completion_tokens": 5,
        "n": 1,
        "top_p": 0.9,
        "presence_penalty": 0.1,
        "logprobs": False,
        "parallel_tool_calls": False,
        "tools": [LOOK],
        "tool_choice": "none",
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }
    reply = running.post("/v1/chat/completions", values)
    assert reply.status == 200, reply.body
    langchain_reads(reply)


def test_langchain_structured_output(running: Running):
    schema = {"title": "Answer", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "Answer", "schema": schema, "strict": True}}
    reply = running.chat("How many?", response_format=form, max_tokens=100)
    assert reply.status == 200, reply.body
    langchain_reads(reply)


@pytest.mark.parametrize("stream", [True, False])
def test_open_webui(running: Running, stream):
    models = running.get("/v1/models", {"Authorization": "Bearer ", "X-OpenWebUI-User-Name": "me"})
    assert models.status == 200 and models.json["object"] == "list"
    values = {
        "stream": stream,
        "model": "tiny",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": data_url()}},
                ],
            }
        ],
        "max_tokens": 5,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }
    reply = running.post("/v1/chat/completions", values)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream" if stream else "application/json")
    usage = next(e["usage"] for e in reply.events[::-1] if e != "[DONE]") if stream else reply.json["usage"]
    assert usage["completion_tokens"] <= 5 < usage["prompt_tokens"]
    bare = [{"type": "image_url", "image_url": data_url()}, {"type": "text", "text": "x"}]
    title = {
        "model": "tiny",
        "messages": [{"role": "user", "content": bare}],
        "stream": False,
        "max_completion_tokens": 3,
    }
    assert running.post("/v1/chat/completions", {**title, "metadata": {"task": "title_generation"}}).status == 200


# ------------------------------------------------------------------------------------------------ embeddings


class Towers:
    """A model with two towers, as far as the server sees one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.model = type("Model", (), {"embed_images": None})()

    def embed(self, texts=None, images=None):
        rows = [[float(len(text)), 1.0] for text in texts or []]
        rows += [[float(image.width), -float(image.height)] for image in images or []]
        return torch.tensor(rows)


def test_embeddings(vlm):
    with serving(Served.ready("towers", vlm=Towers(vlm.tokenizer))) as running:
        client = running.client()
        one = client.embeddings.create(model="towers", input="a cat")  # the client asks for base64 by itself
        assert one.data[0].embedding == [5.0, 1.0] and one.usage.prompt_tokens == 5 and one.object == "list"
        both = client.embeddings.create(model="towers", input=["a", "abc"], encoding_format="float")
        assert [item.embedding for item in both.data] == [[1.0, 1.0], [3.0, 1.0]]
        part = {"type": "image_url", "image_url": {"url": data_url(encoded(picture((7, 9))))}}
        mixed = running.post(
            "/v1/embeddings", {"model": "towers", "input": ["x", part, {"type": "text", "text": "yy"}]}
        )
        assert [item["embedding"] for item in mixed.json["data"]] == [[1.0, 1.0], [7.0, -9.0], [2.0, 1.0]]
        packed = running.post("/v1/embeddings", {"model": "towers", "input": "x", "encoding_format": "base64"})
        assert struct.unpack("<2f", base64.b64decode(packed.json["data"][0]["embedding"])) == (1.0, 1.0)
        assert running.chat("x", model="towers").status == 400
        bad = [{"input": []}, {"input": [1, 2]}, {"input": [[1]]}, {"input": None}, {"input": ["x"] * 1000}, {}]
        bad += [{"input": "x", "dimensions": 5}, {"input": "x", "encoding_format": "int8"}, {"input": {"type": "x"}}]
        bad += [{"input": {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}}]
        for values in bad:
            reply = running.post("/v1/embeddings", {"model": "towers", **values})
            assert reply.status == 400 and reply.error["param"], values
