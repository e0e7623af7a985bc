"""Many at once, too many at once, and the end: queues, signals, dead engines."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from serving_kit import Running, data_url, encoded, picture, ready, serving, shows, tiny
from test_streaming import raw

from chiasm.infer.scheduler import Scheduler


def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def paused(monkeypatch):
    """No engine does a step with work to do until it is told to."""
    go = threading.Event()
    inner = Scheduler.step

    def step(self) -> None:
        if self.filling or self.writing:
            go.wait(120)
        inner(self)

    monkeypatch.setattr(Scheduler, "step", step)
    yield go
    go.set()


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A model whose answers may be long."""
    return tiny(tmp_path_factory.mktemp("long") / "tokenizer", **{"model.lm.max_positions": 4096})


def test_a_full_queue_says_so_at_once_and_a_retry_succeeds(vlm, paused):
    served = ready(vlm, slots=1, max_queue_requests=2)
    with serving(served, retry_seconds=1) as running:
        held = [raw(running, max_tokens=9)]
        until(lambda: served.service.stats()["running"] == 1)
        held += [raw(running, max_tokens=9) for _ in range(2)]
        until(lambda: served.service.stats()["waiting"] == 2)
        for content in ("x", shows(None)):  # at once: the engine, which stands still, is not waited for
            reply = running.chat(content)
            assert reply.status == 503 and reply.error["code"] == "queue_full" and reply.headers["retry-after"] == "1"
        assert running.chat("x", stream=True).status == 503 == running.chat("x", n=2).status
        assert not paused.is_set() and served.service.stats()["waiting"] == 2
        assert b'chiasm:admission_rejections_total{reason="requests"} 4' in running.get("/metrics").body
        assert running.get("/health").status == 200
        threading.Timer(0.3, paused.set).start()
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="x", max_retries=5)
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=2)
        assert answer.usage.completion_tokens == 2
        for connection in held:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            connection.close()


def test_too_many_requests_at_the_door(vlm, paused):
    with serving(ready(vlm), limits={"requests": 3}) as running:
        held = [raw(running) for _ in range(3)]
        until(lambda: running.state.answering == 3)
        reply = running.chat("x")
        assert reply.status == 503 and reply.error["code"] == "queue_full" and "retry-after" in reply.headers
        assert running.get("/v1/models").status == 200
        for connection in held:
            connection.close()
        paused.set()
        running.idle()
        assert running.chat("x").status == 200


def test_too_many_bytes_at_the_door(vlm):
    with serving(ready(vlm), limits={"held_bytes": 50_000}) as running:
        big = b'{"model": "tiny", "messages": "' + b"x" * 40_000
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", running.port)) as slow:
            slow.sendall(head.encode() + b"Content-Length: 50000\r\n\r\n" + big)
            until(lambda: running.state.held > 30_000)
            reply = running.chat("x" * 20_000)
            assert reply.status == 503 and "retry-after" in reply.headers
        running.idle()
        assert running.chat("x").status == 200


def test_many_unequal_requests_are_answered_as_alone(vlm):
    rng = random.Random(0)
    asks = []
    for i in range(24):
        content = shows({"url": data_url(encoded(picture(seed=i % 4)))}) if i % 2 else "w" * rng.randint(1, 60)
        asks.append({"content": content, "max_tokens": rng.randint(1, 20), "temperature": 0, "stream": i % 3 == 0})
    with serving(ready(vlm)) as running, ThreadPoolExecutor(12) as pool:
        together = [reply.text for reply in pool.map(lambda ask: running.chat(**ask), asks)]
        assert together == [running.chat(**ask).text for ask in asks]


def test_clients_that_leave_at_random_leave_nothing_behind(vlm):
    rng = random.Random(1)
    with serving(ready(vlm)) as running:
        running.chat("warm")
        threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))

        def leave(seed: int) -> None:
            connection = raw(running, stream=seed % 2 == 0, n=1 + seed % 3, max_tokens=60)
            time.sleep(rng.random() * 0.3)
            connection.close()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(leave, range(24)))
        running.idle(30)
        until(lambda: len(os.listdir("/proc/self/fd")) <= files + 2)
        assert threading.active_count() <= threads + 6  # the loop's pool of threads may have grown
        assert running.chat("still there").status == 200


def test_health_turns_red_when_the_engine_dies(long, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the end of that thread is no news
    served = ready(long)
    with serving(served, watch_seconds=120) as running:
        assert running.get("/health").status == 200
        waiting = ThreadPoolExecutor(1).submit(running.chat, "x", max_tokens=3500, ignore_eos=True)
        until(lambda: served.service.stats()["running"] == 1)
        thread = next(
            t for t in threading.enumerate() if t.name.startswith("chiasm-engine") and t is served.service._thread
        )
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        until(lambda: not thread.is_alive())
        assert running.get("/health").status == 503 and running.get("/health").json["status"] == "dead"
        assert waiting.result(60).status in (500, 503)
        assert running.chat("x").status == 500
        assert b'chiasm:model_healthy{model_name="tiny"} 0' in running.get("/metrics").body
        assert running.get("/v1/models").status == 200


def test_a_dead_engine_ends_the_process(vlm):
    served = ready(vlm)
    with serving(served, watch_seconds=0.2) as running:
        served.service.stop(drain=0)
        until(lambda: not running.thread.is_alive())
        assert running.server.status == 1


# ------------------------------------------------------------------------------------------------ the end


def signalled(running: Running) -> None:
    running.server.handle_exit(signal.SIGTERM, None)
    until(lambda: running.state.draining)


def test_a_signal_lets_answers_finish(long):
    with serving(ready(long), drain_seconds=30) as running:
        connection = raw(running, stream=True, max_tokens=100)
        first = connection.recv(1000)
        assert b"200 OK" in first
        idle = socket.create_connection(("127.0.0.1", running.port))  # no request on it: nothing to wait for
        late = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        signalled(running)
        with pytest.raises(OSError):
            late.request("GET", "/health")
            assert late.getresponse().status != 503
            raise OSError("it was still open, and said so")
        body = first + read_all(connection)
        assert b"[DONE]" in body and b'"finish_reason":"length"' in body
        until(lambda: not running.thread.is_alive())
        assert running.server.status == 0
        idle.close()


def test_a_signal_ends_what_takes_too_long(long):
    with serving(ready(long), drain_seconds=0.3) as running:
        streaming = raw(running, stream=True, max_tokens=3500)
        whole = raw(running, stream=False, max_tokens=3500)
        first = streaming.recv(1000)
        until(lambda: running.state.answering == 2)
        signalled(running)
        _check_ended(first + read_all(streaming), read_all(whole))
        until(lambda: not running.thread.is_alive())
        assert running.server.status == 0


def _check_ended(streamed: bytes, whole: bytes) -> None:
    assert json.loads(streamed.split(b"data: ")[-1].split(b"\n")[0])["error"]["code"] == "shutting_down"
    assert b"503" in whole.split(b"\r\n")[0] and b"shutting_down" in whole and b"retry-after" in whole.lower()


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(30)
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


class Process:
    """``chiasm serve`` as a process of its own."""

    def __init__(self, folder: Path, *options: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        words = ["serve", f"tiny={folder}", "--port", str(self.port), "--no-page", "--device", "cpu", *options]
        code = "from chiasm.cli import main; main()"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CHIASM_API_KEY": "from-the-environment"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words], env=environment, stdout=subprocess.DEVNULL
        )
        self.running = Running(f"http://127.0.0.1:{self.port}", self.port, None, None, None)  # type: ignore[arg-type]
        self.statuses: list[int] = []
        until(self._ready, 60)

    def _ready(self) -> bool:
        assert self.process.poll() is None, "the process ended"
        try:
            self.statuses.append(self.running.get("/health").status)
        except OSError:
            return False
        return self.statuses[-1] == 200


@pytest.mark.slow
@pytest.mark.parametrize("drain", ["30", "0.5"])
def test_sigterm(long, tmp_path: Path, drain: str):
    made = Process(long.save(tmp_path / "tiny"), "--drain", drain)
    try:
        assert made.statuses[0] == 503  # it listened while the model was loading
        assert made.running.get("/v1/models").status == 401
        key = {"Authorization": "Bearer from-the-environment"}
        streaming = raw(made.running, key, stream=True, max_tokens=200 if drain == "30" else 3500)
        first = streaming.recv(1000)
        whole = raw(made.running, key, max_tokens=2 if drain == "30" else 3500)
        time.sleep(0.1)
        made.process.send_signal(signal.SIGTERM)
        body = first + read_all(streaming)
        if drain == "30":
            assert b"[DONE]" in body and b'"finish_reason":"length"' in body
        else:
            _check_ended(body, read_all(whole))
        assert made.process.wait(60) == 0
    finally:
        made.process.kill()
