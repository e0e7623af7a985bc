"""Files of requests in OpenAI's batch format, answered by the server's own application without a socket.

Each line of the input is ``{"custom_id", "method": "POST", "url", "body"}``; each line of the output is
``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``, in the order of their ends. Schema,
limits and media gate are those of ``chiasm serve``, because every body goes through the same application.

The output is also the memory of a run that was cut: what it answers is not asked again. Reference:
https://platform.openai.com/docs/guides/batch.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from chiasm.errors import ChiasmError, ConfigError
from chiasm.serve.app import create_app
from chiasm.serve.errors import dumps, shown
from chiasm.serve.options import Served, ServeOptions

URLS = ("/v1/chat/completions", "/v1/embeddings")
BUSY = (0.05, 0.2, 1.0)
"""Seconds before a request is made again that found the queue full; the last is for all further ones."""

Line = tuple[int, str, str]  # its number in the file, its text, and what the file says against it
Answered = Callable[[dict[str, Any]], None]


def run(served: Served, options: ServeOptions, lines: Iterable[Line], done: Answered, flying: int = 16) -> None:
    """Answer lines, ``flying`` at a time; ``done`` gets the line of each as it ends.

    Raises ChiasmError where the model cannot answer any more; what is wrong with a line is in its answer.
    """
    asyncio.run(_run(served, options, lines, done, flying))


async def _run(served: Served, options: ServeOptions, lines: Iterable[Line], done: Answered, flying: int) -> None:
    app, source = create_app({served.name: served}, options), iter(lines)

    async def work() -> None:
        for line in source:
            answer = await _answer(app, served.name, *line)
            if not served.healthy:  # its errors are not those of the lines
                raise ChiasmError("the model has stopped answering; run again to go on with the lines that are left")
            done(answer)

    tasks = [asyncio.ensure_future(work()) for _ in range(flying)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(app: Any, model: str, number: int, text: str, problem: str) -> dict[str, Any]:
    try:
        if problem:
            raise ValueError(problem)
        name, url, body = parse(text, model)
    except ValueError as error:
        return _line(custom_id(text), None, {"code": "invalid_line", "message": f"line {number}: {error}"})
    request = uuid.uuid4().hex
    for tried in range(1 << 30):
        status, reply = await _post(app, url, body, request)
        if status != 503 or reply.get("error", {}).get("code") != "queue_full":
            break
        await asyncio.sleep(BUSY[min(tried, len(BUSY) - 1)])
    return _line(name, {"status_code": status, "request_id": request, "body": reply}, None)


def _line(name: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": name, "response": response, "error": error}


def custom_id(text: str) -> str | None:
    """The ``custom_id`` of a line, where it has one."""
    try:
        name = json.loads(text)["custom_id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return name if isinstance(name, str) and name else None


def parse(text: str, model: str) -> tuple[str, str, dict[str, Any]]:
    """``(custom_id, url, body)`` of a line. Raises ValueError that says what is wrong with it."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    name, url, body = values.get("custom_id"), values.get("url"), values.get("body")
    if not isinstance(name, str) or not name:
        raise ValueError("custom_id must be a string that names the request")
    if values.get("method", "POST") != "POST":
        raise ValueError(f"method is {shown(values['method'])}; it must be POST")
    if url not in URLS:
        raise ValueError(f"url is {shown(url)}; known: {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise ValueError("body must be the JSON object of a request")
    if body.get("stream"):
        raise ValueError("body.stream must be false: there is nobody to read a stream")
    return name, str(url), {"model": model, **body}


async def _post(app: Any, url: str, body: Mapping[str, Any], request: str) -> tuple[int, dict[str, Any]]:
    """One request to an ASGI application."""
    try:
        data = dumps(body)
    except ValueError:  # a number that is not finite
        return 400, {"error": {"message": "the body is not JSON", "type": "invalid_request_error", "code": None}}
    headers = {"host": "localhost", "content-type": "application/json", "content-length": str(len(data))}
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": url, "raw_path": url.encode(), "query_string": b"", "root_path": "", "state": {}},
        **{"client": None, "server": ("localhost", 80)},
        "headers": [(k.encode(), v.encode()) for k, v in {**headers, "x-request-id": request}.items()],
    }
    given, status, reply = False, 500, bytearray()

    async def receive() -> dict[str, Any]:
        nonlocal given
        if given:
            await asyncio.Event().wait()  # the client stays until it is answered
        given = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Mapping[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = int(message["status"])
        else:
            reply.extend(message.get("body", b""))

    await app(scope, receive, send)
    return status, json.loads(bytes(reply))


# --------------------------------------------------------------------------------------------------------- files


class Output:
    """The file of answers: whole lines, each on the disk's way before the next request of its kind is made."""

    def __init__(self, path: Path, fingerprint: str = ""):
        self.path = path
        self.known: set[str] = set()
        self.answered = self.failed = 0  # of all its lines
        self.first = ""  # what the first that failed says
        if path.exists():
            for row in _repair(path, fingerprint):
                self.known.add(row["custom_id"])
                self._count(row)
        self._file = path.open("ab")

    def _count(self, answer: dict[str, Any]) -> None:
        self.answered += 1
        response, error = answer["response"], answer["error"]
        if response is not None:
            if response["status_code"] < 400:
                return
            body = response["body"]
            error = body.get("error") if isinstance(body, dict) else None
        self.failed += 1
        told = error.get("message") if isinstance(error, dict) else None
        self.first = self.first or f"{shown(answer['custom_id'])}: {told or 'no message'}"

    def add(self, answer: dict[str, Any]) -> None:
        """One more line."""
        self._count(answer)
        self._file.write(dumps(answer) + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing follows."""
        self._file.close()


def _repair(path: Path, fingerprint: str) -> list[dict[str, Any]]:
    """Leave only whole answers that stand: not a cut last line, not faults that may pass. Those left, in short."""
    known: dict[str, dict[str, Any]] = {}
    fresh = path.with_name(path.name + ".part")
    with path.open("rb") as old, fresh.open("wb") as new:
        for number, raw in enumerate(old, 1):
            try:
                row = json.loads(raw)
                name, response = row["custom_id"], row["response"]
                final = response is not None and response["status_code"] < 500
                made = (response or {}).get("body", {}).get("system_fingerprint")
            except (ValueError, TypeError, KeyError, AttributeError):
                if not raw.endswith(b"\n"):
                    break
                fresh.unlink()
                raise ConfigError(f"{path}, line {number}: no answer of a batch; give another --out") from None
            if made and fingerprint and made != fingerprint:
                fresh.unlink()
                raise ConfigError(
                    f"{path} was written by another model or version ({made}, this is {fingerprint}): give another "
                    "--out, or delete it"
                )
            if final and name not in known and raw.endswith(b"\n"):
                body = response["body"] if response["status_code"] >= 400 else {}
                told = {"status_code": response["status_code"], "body": body}
                known[name] = {"custom_id": name, "response": told, "error": None}
                new.write(raw)
    os.replace(fresh, path)
    return list(known.values())


def pending(path: Path, answered: set[str]) -> Iterator[Line]:
    """The lines of the input that have no answer."""
    seen: set[str] = set()
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, text in enumerate(file, 1):
            name = custom_id(text)
            if name is not None and name in seen:
                yield number, text, f"the custom_id {shown(name)} stands in a line before"
            elif text.strip() and name not in answered:
                yield number, text, ""
            if name is not None:
                seen.add(name)


__all__ = ["Output", "pending", "run"]
