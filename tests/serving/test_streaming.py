"""Points 19 to 24: streams, usage, errors within them, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import aclosing

import openai
import pytest
from serving_kit import Running, Served, ServeOptions, ready, serving, shows

from chiasm.infer.request import Handle, Piece, Request
from chiasm.serve.flow import TICK, Flow
from chiasm.serve.state import State


def raw(running: Running, more: dict[str, str] | None = None, **fields) -> socket.socket:
    """A connection on which a request was sent, and nothing read."""
    values = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 300,
        "temperature": 0,
        **fields,
    }
    body = json.dumps(values).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "".join(f"{key}: {value}\r\n" for key, value in (more or {}).items())
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=30)
    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_the_form_of_a_stream(running: Running):
    reply = running.chat(shows(None), stream=True, stream_options={"include_usage": True}, temperature=0, max_tokens=6)
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache" and reply.headers["x-accel-buffering"] == "no"
    *chunks, done = reply.events
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
    assert reasons[-1] == "length" and not any(reasons[:-1])
    assert chunks[-1]["choices"] == [] and all(c["usage"] is None for c in chunks[:-1])
    whole = running.chat(shows(None), temperature=0, max_tokens=6).json
    assert reply.text == whole["choices"][0]["message"]["content"]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert {k: chunks[-1]["usage"][k] for k in counts} == {k: whole["usage"][k] for k in counts}
    assert "usage" not in running.chat("x", stream=True).events[0]


def test_several_answers_in_one_stream(running: Running):
    reply = running.chat("x", stream=True, n=3, seed=1, temperature=1, max_tokens=5)
    texts = ["", "", ""]
    for event in reply.events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    whole = running.chat("x", n=3, seed=1, temperature=1, max_tokens=5).json
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


def test_characters_are_never_cut(running: Running):
    text = "Grüße 🐈‍⬛ 猫 und 👩‍👩‍👧 à la\u2028fin"
    fields = {"guided_choice": [text], "max_tokens": 100, "stream": True}
    reply = running.chat("x", **fields)
    pieces = [e["choices"][0]["delta"].get("content", "") for e in reply.events[:-1]]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and len(pieces) > 20
    assert reply.body.isascii()  # no client takes U+2028 for the end of a line


def test_usage(running: Running):
    first = running.chat(shows(None, "How many?"), temperature=0).json["usage"]
    again = running.chat(shows(None, "How many?"), temperature=0).json["usage"]
    details = first["prompt_tokens_details"]
    assert details["image_tokens"] == 4 and details["image_tokens"] + details["text_tokens"] == first["prompt_tokens"]
    assert first["total_tokens"] == first["prompt_tokens"] + first["completion_tokens"]
    assert again["prompt_tokens"] == first["prompt_tokens"] and again["prompt_tokens_details"]["cached_tokens"] > 0


def test_bad_requests_have_a_status_not_a_stream(running: Running):
    for fields in ({"temperature": 9}, {"model": "none"}, {"max_tokens": 0}):
        reply = running.chat("x", stream=True, **fields)
        assert reply.status in (400, 404) and reply.error["message"]
    assert running.chat("x" * 3000, stream=True).error["code"] == "context_length_exceeded"


def test_an_error_in_a_stream_is_an_event(running: Running, monkeypatch):
    from chiasm.infer.request import Finish, Handle, Piece

    def submit(request):
        handle = Handle(request)
        handle.put(Piece("so far"))
        handle.end(Finish("error", 3, 1, error=RuntimeError('a "secret" in /home/someone\n')))
        return handle

    monkeypatch.setattr(running.state.models["tiny"].service, "submit", submit)
    reply = running.chat("x", stream=True)
    assert reply.status == 200 and reply.events[-2]["choices"][0]["delta"]["content"] == "so far"
    assert reply.events[-1]["error"]["code"] == "internal" and b"secret" not in reply.body
    with pytest.raises(openai.APIError):
        list(
            running.client().chat.completions.create(
                model="tiny", stream=True, messages=[{"role": "user", "content": "x"}]
            )
        )
    assert running.chat("x").status == 500


class Slow:
    """A service whose answers wait for ``go``."""

    def __init__(self, service):
        import threading

        self.service, self.go = service, threading.Event()

    def __getattr__(self, name):
        return getattr(self.service, name)

    def submit(self, request):
        import threading

        from chiasm.infer.request import Handle

        handle = Handle(request)

        def pass_on():
            self.go.wait(20)
            inner = self.service.submit(request)
            for piece in inner:
                handle.put(piece)
            handle.end(inner.finish)

        threading.Thread(target=pass_on, daemon=True).start()
        return handle


def test_silence_is_filled(vlm):
    served = ready(vlm)
    slow = served.service = Slow(served.service)
    with serving(served, ping_seconds=0.3) as running:
        with raw(running, stream=True, max_tokens=2) as connection:
            connection.settimeout(10)
            read = b""
            while read.count(b": ping\n\n") < 2:
                read += connection.recv(4096)
            # who speaks is said before anything is computed
            assert read.index(b'"role":"assistant"') < read.index(b": ping")
            slow.go.set()
            while b"[DONE]" not in read:
                read += connection.recv(4096)
        stream = running.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], stream=True, max_tokens=2
        )
        assert len(list(stream)) >= 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_the_computation(vlm, monkeypatch, stream):
    """The engine stands still while the client leaves, so that it does not matter how soon the server sees it."""
    served = ready(vlm)
    steps, go = [], threading.Event()
    step = served.service.scheduler.step

    def counted() -> None:
        if served.service.stats()["running"]:
            steps.append(1)
            if len(steps) == 5:
                go.wait(60)
        step()

    monkeypatch.setattr(served.service.scheduler, "step", counted)
    with serving(served) as running:
        connection = raw(running, stream=stream)
        deadline = time.monotonic() + 30
        while len(steps) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        connection.close()
        while running.state.answering:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        go.set()
        running.idle()
        assert len(steps) <= 6
        assert running.get("/metrics").body.count(b"chiasm:request_cancelled_total 1") == 1


@pytest.mark.parametrize("late", range(8))
def test_no_cancellation_is_lost_to_a_piece_that_comes_with_it(late):
    """At whatever moment the reader is cancelled after a piece has come, it ends, and so does the answer."""
    handle = Handle(Request([]))
    flow = Flow(State({}, ServeOptions.parse({})), Served.ready("tiny"), [handle])
    read: list[str] = []

    async def reader() -> None:
        async with aclosing(flow.pieces()) as pieces:
            async for _, piece in pieces:
                read.append(piece.text)

    async def leave() -> None:
        task = asyncio.create_task(reader())
        for text in "ab":
            handle.put(Piece(text))
            while len(read) < len(text):
                await asyncio.sleep(0)
        await asyncio.sleep(0.01)  # it waits for more
        handle.put(Piece("c"))
        for _ in range(late):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,), timeout=2 * TICK)
        lost = not task.done()
        task.cancel()
        assert not lost and handle.cancelled

    asyncio.run(leave())


def test_a_client_that_goes_away_while_it_waits(vlm):
    served = ready(vlm)
    slow = served.service = Slow(served.service)
    with serving(served) as running:
        connections = [raw(running, stream=i % 2 == 0) for i in range(10)]
        deadline = time.monotonic() + 30
        while running.state.answering < 10:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for connection in connections:
            connection.close()
        while running.state.answering:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        slow.go.set()
        running.idle()


def test_a_slow_reader_does_not_stop_the_others(vlm):
    with serving(ready(vlm)) as running:
        readers = [raw(running, stream=True, n=4) for _ in range(2)]
        assert running.chat("x", max_tokens=2).status == 200  # its client would give up after a minute
        for reader in readers:
            reader.close()
        running.idle()


def test_a_reader_that_takes_nothing_is_given_up(vlm):
    with serving(ready(vlm), limits={"send_seconds": 0.5, "n": 8}) as running:
        connection = raw(running, stream=True, n=8, logprobs=True, top_logprobs=20, max_tokens=200)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        running.idle(30)
        connection.close()


def test_too_long_an_answer_is_ended(vlm):
    served = ready(vlm)
    served.service = Slow(served.service)
    with serving(served, limits={"request_seconds": 0.5}) as running:
        reply = running.chat("x")
        assert reply.status == 503 and reply.error["code"] == "timeout" and reply.headers["x-should-retry"] == "false"
        served.service.go.set()
