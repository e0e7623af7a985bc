"""Requests and files that nobody would write: the server answers each with what it is, and lives."""

from __future__ import annotations

import copy
import json
import random
import resource
import time
from typing import Any

import pytest
from serving_kit import Running, data_url, encoded, picture, ready, serving, shows
from tool_kit import HERMES, TIME, WEATHER, model

SEED: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": shows(None)},
        {"role": "assistant", "content": "a", "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "t"}]},
    ],
    "max_tokens": 1,
    "n": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["x"],
    "logit_bias": {"5": 1},
    "logprobs": True,
    "top_logprobs": 2,
    "presence_penalty": 0.1,
    "response_format": {"type": "text"},
    "stream": False,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": "none",
}
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    10**9,
    10**30,
    -(10**30),
    0.5,
    -0.5,
    1e308,
    -1e308,
    5e-324,
    "",
    " ",
    "x",
    "\0",
    "null",
    "0",
    "é🐈",
    "\ufffd",
    "\u2028",
    "<image>",
    "</s>",
    "{{ messages }}",
    "{% for i in range(10**9) %}",
    "../../etc/passwd",
    "%s%n",
    "x" * 5000,
    [],
    [[]],
    [None],
    {},
    {"": None},
    {"type": "text"},
    {"type": "image_url"},
    {"url": "http://127.0.0.1"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ["x"] * 50,
    list(range(50)),
    {"a": {"b": {"c": {}}}},
    {"role": "user", "content": "x"},
    [{"role": "user", "content": "x"}],
    "data:image/png;base64,",
    "json_object",
    "\U000ff001",
    {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    "user",
    "tool",
    "\U00100000\U000ff002",
]


def spots(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place within a value."""
    found = [path] if path else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += spots(inner, (*path, key))
    return found


def mutated(rng: random.Random, seed: dict[str, Any]) -> bytes:
    """A request that differs from a good one in one to three places, or in some bytes."""
    value = copy.deepcopy(seed)
    for _ in range(rng.randint(1, 3)):
        *way, last = rng.choice(spots(value))
        inner = value
        for step in way:
            inner = inner[step]
        choice = rng.random()
        if choice < 0.6:
            inner[last] = copy.deepcopy(rng.choice(ODD))
        elif choice < 0.75:
            del inner[last]
        elif choice < 0.9 and isinstance(inner, dict):
            inner[rng.choice(["type", "role", "url", "image", "guided_regex", "min_p", "top_k", "x"])] = rng.choice(ODD)
        elif isinstance(inner, list):
            inner += [copy.deepcopy(rng.choice(ODD))] * rng.randint(1, 3)
    body = json.dumps(value).encode()
    if rng.random() < 0.15:
        spoilt = bytearray(body)
        for _ in range(rng.randint(1, 4)):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        body = bytes(spoilt)
    return body


def attack(running: Running, bodies) -> dict[int, int]:
    """Send each; how often each status came."""
    seen: dict[int, int] = {}
    for body in bodies:
        reply = running.post("/v1/chat/completions", body)
        seen[reply.status] = seen.get(reply.status, 0) + 1
        assert reply.status in (200, 400, 404, 413), (reply.status, reply.body[:300], body[:2000])
        if reply.status != 200:
            assert len(reply.body) < 2000 and reply.error["message"] and "/home" not in reply.error["message"]
    return seen


def fuzz(running: Running, count: int, seed: int, good: dict[str, Any] = SEED) -> None:
    rng = random.Random(seed)
    seen = attack(running, (mutated(rng, good) for _ in range(count)))
    assert seen[200] > count // 20 and seen[400] > count // 4, seen
    running.idle()
    assert running.chat("Still there?").status == 200


def test_some_odd_requests(running: Running):
    fuzz(running, 200, 0)


@pytest.mark.slow
def test_ten_thousand_odd_requests(vlm):
    with serving(ready(vlm)) as running:
        fuzz(running, 1000, 1)
        before = resident()
        fuzz(running, 9000, 2)
        assert resident() < before * 1.05


CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": ["Oslo", 1, null]}'}}
TOOLED: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "t"},
    ],
    "max_tokens": 2,
    "tools": [WEATHER, TIME],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "parallel_tool_calls": False,
}


@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_odd_requests_with_tools(tmp_path, count: int):
    with serving(ready(model(tmp_path, HERMES))) as running:
        for number, choice in enumerate((TOOLED["tool_choice"], "auto", "required")):
            fuzz(running, count // 3, number, {**TOOLED, "tool_choice": choice})


def files() -> list[bytes]:
    return [encoded(picture((48, 32), seed=1), form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]


def spoiled(rng: random.Random, count: int):
    """Requests with files of which some bytes are others."""
    seeds = files()
    for number in range(count):
        data = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            # headers are where decoders go wrong
            place = rng.randrange(min(len(data), 64)) if rng.random() < 0.5 else rng.randrange(len(data))
            data[place] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        values = {"model": "tiny", "messages": [{"role": "user", "content": shows(data_url(bytes(data) or b"x"))}]}
        yield json.dumps({**values, "max_tokens": 1}).encode()


def test_some_spoiled_files(running: Running):
    seen = attack(running, spoiled(random.Random(0), 100))
    assert seen[200] > 10 and seen[400] > 10, seen


@pytest.mark.slow
def test_two_thousand_spoiled_files(vlm):
    with serving(ready(vlm)) as running:
        attack(running, spoiled(random.Random(1), 300))
        before = resident()
        start = time.monotonic()
        attack(running, spoiled(random.Random(2), 2000))
        assert resident() < before * 1.05 and time.monotonic() - start < 300
        running.idle()
        assert running.chat("Still there?").status == 200


def resident() -> float:
    """Memory of this process in megabytes, as it is now."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow
def test_two_thousand_pictures_leave_no_memory_behind(vlm):
    with serving(ready(vlm, prefix_cache_bytes=1 << 22)) as running:
        marks = []
        for number in range(2000):
            reply = running.chat(shows({"url": data_url(encoded(picture((200, 150), seed=number)))}), max_tokens=2)
            assert reply.status == 200
            if number >= 400 and number % 200 == 0:
                marks.append(resident())
        running.idle()
        assert max(marks) < min(marks[:2]) * 1.05, marks
