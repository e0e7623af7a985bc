"""Points 1 to 5 of the conformance list: routes, bodies, keys, request ids, origins. And who is told what in errors."""

from __future__ import annotations

import json
import socket
import time

import openai
import pytest
from serving_kit import Reply, Running, Served, encoded, ready, serving, shows

CHAT = "/v1/chat/completions"


def test_routes(running: Running):
    assert running.get("/health").json == {"status": "ok"}
    assert running.get("/v1/models").json["data"][0]["id"] == "tiny"
    assert running.get("/v1/models/tiny").json["object"] == "model"
    assert running.get("/version").json["version"]
    assert running.post(CHAT + "?api-version=2024-06-01", {"model": "tiny", "messages": []}).status == 400
    for reply, status in ((running.get("/v1/models/none"), 404), (running.get("/none"), 404), (running.get(CHAT), 405)):
        assert reply.status == status and reply.error["message"]


def test_metrics_are_prometheus_text(running: Running):
    running.chat("Hi")
    reply = running.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for line in reply.body.decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    assert found['chiasm:num_requests_running{model_name="tiny"}'] >= 0
    assert found['chiasm:num_requests_waiting{model_name="tiny"}'] == 0
    assert found['chiasm:request_success_total{finished_reason="length",model_name="tiny"}'] >= 1
    assert found['chiasm:generation_tokens_total{model_name="tiny"}'] >= 4
    bucket = [n for n in found if n.startswith("chiasm:time_to_first_token_seconds_bucket")]
    values = [found[n] for n in bucket]
    assert (
        values == sorted(values) and values[-1] == found['chiasm:time_to_first_token_seconds_count{model_name="tiny"}']
    )


def test_loading_models_are_listed_and_red(vlm):
    gate = __import__("threading").Event()
    slow = Served("slow", lambda: (gate.wait(20), vlm)[1:] and (None, vlm))
    with serving(slow) as running:
        assert running.get("/v1/models").json["data"][0]["id"] == "slow"
        assert running.get("/health").status == 503 and running.get("/health").json["status"] == "loading"
        reply = running.chat(model="slow")
        assert reply.status == 503 and reply.error["code"] == "model_loading" and int(reply.headers["retry-after"]) > 0
        gate.set()
        deadline = time.monotonic() + 10
        while running.get("/health").status != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_model_is_served_under_its_folders_name(tmp_path):
    from chiasm.cli.serve import _named

    for folder in ("demo/model", "mine"):
        (tmp_path / folder).mkdir(parents=True)
    for word, name in ((tmp_path / "demo/model", "demo"), (tmp_path / "mine", "mine"), ("owner/hub", "owner/hub")):
        assert _named(str(word)) == (name, str(word))
    assert _named(f"x={tmp_path}") == ("x", str(tmp_path))


def test_a_model_that_cannot_be_loaded_is_red(vlm):
    def fail():
        raise RuntimeError("secret place /home/someone")

    with serving(Served("bad", fail)) as running:
        time.sleep(0.2)
        assert running.get("/health").json == {"status": "failed"}
        reply = running.chat(model="bad")
        assert reply.status == 500 and "someone" not in reply.body.decode()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"x"', 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b'{"model": "tiny", "messages": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'{"model": "\\ud800"}', 400),
        (b'{"n":' + b"9" * 5000 + b"}", 400),
        (b'{"model": "tiny"}', 400),
        (b'{"messages": []}', 400),
    ],
)
def test_broken_bodies(running: Running, body: bytes, status: int):
    reply = running.post(CHAT, body)
    assert reply.status == status and reply.error["type"] == "invalid_request_error"


def test_other_content_types(running: Running):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert running.post(CHAT, {"model": "tiny"}, {"Content-Type": kind}).status == 415
    values = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert running.post(CHAT, values, {"Content-Type": "Application/JSON; charset=utf-8"}).status == 200


def test_bodies_are_limited_while_they_are_read(vlm):
    with serving(ready(vlm), limits={"body_bytes": 10_000}) as running:
        assert running.post(CHAT, b"x" * 20_000).status == 413
        with socket.create_connection(("127.0.0.1", running.port)) as raw:
            # no Content-Length: it must be counted
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            raw.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
            for _ in range(20):
                raw.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
            assert raw.recv(1000).split(b" ")[1] == b"413"
        assert running.chat("still there").status == 200
        running.idle()


def test_a_slow_body_is_given_up(vlm):
    with (
        serving(ready(vlm), limits={"body_seconds": 0.3}) as running,
        socket.create_connection(("127.0.0.1", running.port)) as raw,
    ):
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        )
        raw.sendall(head.encode() + b"{")
        assert raw.recv(1000).split(b" ")[1] == b"408"


def test_long_heads(running: Running):
    reply = running.get("/v1/models", {"X-Long": "x" * 40_000})
    assert reply.status == 431 and reply.error["message"]
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.settimeout(10)
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        answer = b""
        try:
            for _ in range(200):
                raw.sendall(b"X-A: " + b"a" * 1000 + b"\r\n")
        except OSError:
            pass
        try:
            answer = raw.recv(1000)
        except OSError:  # reset while we were still sending
            answer = b"HTTP/1.1 431"
        assert answer.split(b" ")[1] == b"431"
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")
        assert raw.recv(1000).split(b" ")[1] == b"400"
    assert running.get("/health").status == 200


def test_keys(vlm):
    with serving(ready(vlm), keys=["first-key", "second-key"]) as running:
        assert running.get("/health").status == 200
        for path in ("/v1/models", "/metrics", "/version", "/v1/models/tiny", "/none", "/docs"):
            reply = running.get(path)
            assert reply.status == 401 and reply.error["code"] == "invalid_api_key", path
            assert reply.headers["www-authenticate"] == "Bearer" and reply.headers["x-request-id"]
        for header in (
            "Bearer wrong",
            "first-key",
            "Basic first-key",
            "Bearer",
            "Bearer first-key second-key",
            "Bearer \xff",
        ):
            assert running.get("/v1/models", {"Authorization": header}).status == 401, header
        assert running.get("/v1/models", {"Authorization": "bearer second-key"}).status == 200
        with pytest.raises(openai.AuthenticationError) as told:
            running.client("wrong").models.list()
        assert told.value.code == "invalid_api_key"
        assert [model.id for model in running.client("first-key").models.list()] == ["tiny"]


def test_each_key_has_its_own_memory(vlm, monkeypatch):
    served = ready(vlm)
    salts = []
    submit = served.service.submit
    monkeypatch.setattr(served.service, "submit", lambda ask: (salts.append(ask.salt), submit(ask))[1])
    with serving(served, keys=["one", "two"]) as running:
        for key, salt in (("one", None), ("two", None), ("one", None), ("one", "more")):
            values = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
            headers = {"Authorization": f"Bearer {key}"}
            assert running.post(CHAT, values if salt is None else {**values, "cache_salt": salt}, headers).status == 200
    assert salts[0] and salts[0] == salts[2] and len(set(salts)) == 3
    assert "one" not in salts[0]


def test_request_ids(running: Running):
    assert running.get("/health", {"X-Request-Id": "my-id.7"}).headers["x-request-id"] == "my-id.7"
    first, second = (running.get("/none").headers["x-request-id"] for _ in range(2))
    assert first != second and len(first) == 32
    for odd in ("a b", "x" * 200, 'a"<script>', "é"):
        assert running.get("/health", {"X-Request-Id": odd.encode().decode("latin-1")}).headers["x-request-id"] != odd
    assert running.post(CHAT, b"{", {"X-Request-Id": "in-errors"}).headers["x-request-id"] == "in-errors"


def test_no_other_origin(running: Running, vlm):
    evil = {"Origin": "https://evil.example"}
    reply = running.send("OPTIONS", CHAT, None, {**evil, "Access-Control-Request-Method": "POST"})
    assert not [key for key in reply.headers if key.startswith("access-control")]
    assert running.post(CHAT, {"model": "tiny"}, evil).status == 403
    assert running.post(CHAT, {"model": "tiny"}, {"Origin": f"http://127.0.0.1:{running.port}"}).status == 400
    assert "access-control-allow-origin" not in running.get("/v1/models", evil).headers
    with serving(ready(vlm), origins=["https://good.example"]) as other:
        good = {"Origin": "https://good.example"}
        headers = {**good, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        reply = other.send("OPTIONS", CHAT, None, headers)
        assert reply.headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-credentials" not in reply.headers
        assert "access-control-allow-origin" not in other.get("/v1/models", evil).headers
        assert other.post(CHAT, {"model": "tiny"}, evil).status == 403


def test_other_names_of_this_machine(running: Running, vlm):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        assert running.get("/v1/models", {"Host": host}).status in (400, 403), host
    for host in ("localhost", f"127.0.0.1:{running.port}", "LOCALHOST:1", "[::1]:8000"):
        assert running.get("/v1/models", {"Host": host}).status == 200, host
    with serving(ready(vlm), hosts=["vlm.example"]) as other:
        assert other.get("/health", {"Host": "vlm.example:443"}).status == 200
        assert other.get("/health").status == 403


def test_safe_headers_everywhere(running: Running):
    for reply in (running.get("/health"), running.get("/none"), running.post(CHAT, b"{"), running.chat(stream=True)):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "server" not in reply.headers


def test_unknown_model(running: Running):
    with pytest.raises(openai.NotFoundError) as told:
        running.client().chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "x"}])
    assert told.value.code == "model_not_found" and told.value.param == "model"
    assert len(running.chat(model="x" * 400).body) < 400


def test_what_fails_inside_says_nothing(running: Running, monkeypatch):
    def fail(*args):
        raise RuntimeError("0x7f0000001234 in /home/someone/secret.py")

    monkeypatch.setattr(running.state.models["tiny"].service, "submit", fail)
    reply = running.chat("x")
    assert reply.status == 500 and reply.error["code"] == "internal" and reply.headers["x-request-id"]
    assert b"someone" not in reply.body and b"0x7f" not in reply.body


def test_errors_do_not_repeat_what_was_sent(running: Running):
    long = "A" * 200_000
    bad = [
        {"model": long},
        {"model": "tiny", "messages": long},
        {"model": "tiny", "messages": [{"role": long}]},
        {"model": "tiny", "messages": [{"role": "user", "content": [{"type": long}]}]},
        {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": long},
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "x"}],
            "logit_bias": {str(i): 1e9 for i in range(900)},
        },
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "x"}],
            "logit_bias": dict.fromkeys(map(str, range(5000)), 1),
        },
        {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": long}},
        {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stop": [long]},
    ]
    for values in bad:
        reply: Reply = running.post(CHAT, values)
        assert reply.status in (400, 404) and len(reply.body) < 1500, json.dumps(values)[:60]
    picture = running.chat(shows("data:image/png;base64," + long))
    assert picture.status == 400 and len(picture.body) < 500 and b"AAAA" not in picture.body


def test_several_models_by_name(vlm):
    with serving(ready(vlm, "first"), ready(vlm, "org/second")) as running:
        assert {m["id"] for m in running.get("/v1/models").json["data"]} == {"first", "org/second"}
        assert running.get("/v1/models/org/second").json["id"] == "org/second"
        assert running.chat("x", model="org/second").json["model"] == "org/second"
        assert running.chat("x", model="tiny").status == 404


def test_tokenize(running: Running):
    count = running.post("/tokenize", {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}).json["count"]
    assert count == running.chat("Hi").json["usage"]["prompt_tokens"]
    reply = running.post("/tokenize", {"model": "tiny", "prompt": "Hi <s>"}).json
    assert reply["count"] == len(reply["tokens"]) == 6 and 0 not in reply["tokens"]
    assert running.post("/tokenize", {"model": 3}).status == 404


def test_embeddings_of_a_model_that_has_none(running: Running):
    with pytest.raises(openai.BadRequestError) as told:
        running.client().embeddings.create(model="tiny", input="a cat")
    assert "/v1/chat/completions" in told.value.message
    assert running.post("/v1/embeddings", {"model": "none", "input": "x"}).status == 404
    assert encoded()[:4] == b"\x89PNG"
