"""A tiny model behind the real server, on a real socket of 127.0.0.1, and small helpers for requests to it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import chiasm
from chiasm.infer.service import Service
from chiasm.model_config import VLMConfig
from chiasm.serve.app import create_app
from chiasm.serve.gate import Gate
from chiasm.serve.options import Served, ServeOptions
from chiasm.serve.run import Server, server
from chiasm.serve.state import State

SPECIALS = ["<s>", "</s>", "<pad>", "<image>"]
CONFIG: dict[str, Any] = {
    "model": {
        "type": "splice",
        "encoders": {
            "image": {"type": "vit", "image_size": 16, "patch": 8, "dim": 16, "depth": 2, "heads": 2, "mlp": 24}
        },
        "connectors": {"image": {"type": "mlp"}},
        "lm": {
            **{"type": "decoder", "vocab": 260, "dim": 32, "depth": 2, "heads": 2, "mlp": 48},
            **{"max_positions": 512, "tied": False},
        },
        "media": {"image": {"merge": {"type": "flat"}}},
    },
    "processing": {"template": "vicuna_v1", "media": {"image": {"type": "image", "size": 16}}},
}


def tokenizer(folder: Path) -> Path:
    """Every byte, and four control tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def tiny(folder: Path, **changes: Any) -> chiasm.VLM:
    """A random model that writes bytes; no parameter is constant."""
    config = VLMConfig.parse(CONFIG).edit(**changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vlm = chiasm.build(config, tokenizer=tokenizer(folder))
    for parameter in vlm.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    # The end token is never the likeliest, so that greedy answers have the length that was asked for.
    vlm.state_dict()["lm.lm_head.weight"][1] = 0
    for name, weight in vlm.state_dict().items():
        if name.startswith("connectors."):
            weight *= 4  # a picture is heard among a hundred words
    return vlm.eval()


def ready(vlm: Any, name: str = "tiny", **options: Any) -> Served:
    """A model with its engine started."""
    service = Service(vlm, **options)
    service.start()
    return Served.ready(name, service)


@dataclass
class Running:
    """A server that runs in a thread."""

    url: str
    port: int
    state: State
    server: Server
    thread: threading.Thread

    def client(self, key: str = "none", **options: Any) -> Any:
        """The official client, without its retries: they would hide errors."""
        import openai

        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60, **options)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        """A raw request; ``body`` is bytes or becomes JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, {"Content-Type": "application/json", **(headers or {})})

    def get(self, path: str, headers: dict[str, str] | None = None) -> Reply:
        """A raw request."""
        return self.send("GET", path, None, headers or {})

    def chat(self, content: Any = "Hi", **fields: Any) -> Reply:
        """One user message."""
        values = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}
        return self.post("/v1/chat/completions", values)

    def send(self, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> Reply:
        """A raw request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def idle(self, seconds: float = 30.0) -> None:
        """Wait until nothing is going on: no request, no byte held, no answer in an engine."""
        deadline = time.monotonic() + seconds
        while True:
            stats = [served.service.stats() for served in self.state.models.values() if served.service is not None]
            busy = [stat["running"] + stat["waiting"] for stat in stats]
            found = self.state.answering, self.state.held, sum(busy)
            if found == (0, 0, 0):
                return
            assert time.monotonic() < deadline, f"requests, bytes, answers left: {found}"
            time.sleep(0.01)

    def close(self) -> None:
        """Stop, as after a signal."""
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@dataclass
class Reply:
    """A raw response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, whose keys must be OpenAI's."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
        return error

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events; the last must be ``[DONE]`` unless an error came."""
        blocks = [block for block in self.body.decode().split("\n\n") if block.startswith("data: ")]
        return [b[6:] if b[6:] == "[DONE]" else json.loads(b[6:]) for b in blocks]

    @property
    def text(self) -> str:
        """The answer of a completion, or of a stream."""
        if self.headers["content-type"].startswith("text/event-stream"):
            chunks = [e for e in self.events if e != "[DONE]"]
            return "".join(c["delta"].get("content") or "" for e in chunks for c in e["choices"])
        return self.json["choices"][0]["message"]["content"]


@contextmanager
def serving(*served: Served, gate: Gate | None = None, **options: Any) -> Iterator[Running]:
    """The server for some models."""
    chosen = ServeOptions.parse({"port": 0, "drain_seconds": 5, "page": False, **options})
    app = create_app({one.name: one for one in served}, chosen, gate)
    running = server(app, chosen, "error")
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not running.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    made = Running(f"http://127.0.0.1:{port}", port, app.state.serve, running, thread)
    try:
        yield made
    finally:
        made.close()


def picture(size: tuple[int, int] = (20, 30), seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Random pixels."""
    values = torch.randint(
        0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(values.numpy()).convert(mode)


def encoded(image: Image.Image | None = None, form: str = "PNG", **options: Any) -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    (image or picture()).save(stream, form, **options)
    return stream.getvalue()


def data_url(data: bytes | None = None, mime: str = "image/png") -> str:
    """A data URL."""
    return f"data:{mime};base64," + base64.b64encode(data or encoded()).decode()


def shows(url: Any, text: str = "What is it?", **extra: Any) -> list[dict[str, Any]]:
    """The content of a user message with one picture."""
    return [
        {
            "type": "image_url",
            "image_url": url if isinstance(url, str) else {"url": data_url(), **(url or {})},
            **extra,
        },
        {"type": "text", "text": text},
    ]


@dataclass
class Listener:
    """Counts connections to a port of this machine and answers each with ``answer``."""

    answer: bytes = b""
    hits: int = 0
    requests: list[bytes] = field(default_factory=list)
    pause: float = 0.0  # seconds between the bytes of an answer

    def __enter__(self) -> Listener:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.socket.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.hits += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                self.requests.append(connection.recv(65536))
                if not self.pause:
                    connection.sendall(self.answer)
                for byte in self.answer if self.pause else b"":
                    connection.sendall(bytes([byte]))
                    time.sleep(self.pause)
            except OSError:
                pass
