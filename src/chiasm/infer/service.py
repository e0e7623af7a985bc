"""One engine thread that answers requests of many callers."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from typing import Any

from chiasm.errors import DataError
from chiasm.infer.engine import Engine
from chiasm.infer.request import Finish, Handle, Piece, QueueFull, Request, Stopped, TokenLogprob
from chiasm.infer.sampling import Options

NAMES = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed")


class Service:
    """Answers requests on a model (``vlm`` has ``model`` and ``processor``)."""

    def __init__(
        self,
        vlm: Any,
        *,
        slots: int = 8,
        max_queue_requests: int = 64,
        max_queue_tokens: int = 65536,
        prefix_cache_bytes: int = 1 << 30,
        dtype: Any = None,
        quantize: str | None = None,
    ):
        self.vlm, self.slots = vlm, slots
        self.max_queue_requests, self.max_queue_tokens = max_queue_requests, max_queue_tokens
        self._waiting: deque[tuple[Handle, Any, int]] = deque()
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._running: Handle | None = None
        self._numbers = itertools.count()
        self._totals = {"prompt_tokens": 0, "generated_tokens": 0, "requests": 0}

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread = threading.Thread(target=self._run, name="chiasm-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        """Queue a request. Raises QueueFull, Stopped, DataError (bad input, or no room for an answer)."""
        batch, length = self._prepare(request)
        handle = Handle(request)
        with self._news:
            if self._stopping or not self.healthy:
                raise Stopped("the engine takes no requests")
            waiting = sum(tokens for _, _, tokens in self._waiting)
            if len(self._waiting) >= self.max_queue_requests:
                raise QueueFull(f"{len(self._waiting)} requests are waiting; try again later", "requests")
            if self._waiting and waiting + length > self.max_queue_tokens:
                raise QueueFull(f"{waiting} prompt tokens are waiting; try again later", "tokens")
            self._waiting.append((handle, batch, length))
            self._news.notify()
        return handle

    def count(self, messages: Any) -> int:
        """Tokens of the prompt of a conversation, media included."""
        return self._prepare(Request(messages))[1]

    def stop(self, drain: float = 0.0) -> None:
        """Take no more requests, give those accepted ``drain`` seconds to end, cancel the rest, end the thread."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join(drain)
            with self._news:
                for handle, _, _ in self._waiting:
                    handle.cancel()
                if self._running is not None:
                    self._running.cancel()
            self._thread.join()

    def stats(self) -> dict[str, Any]:
        """Running, waiting, totals."""
        with self._news:
            return {"running": int(self._running is not None), "waiting": len(self._waiting), **self._totals}

    def _prepare(self, request: Request) -> tuple[Any, int]:
        if request.continue_final:
            raise DataError("continue_final is not available")
        name = request.id or f"request-{next(self._numbers)}"
        batch = self.vlm.processor.batch(
            [list(request.messages)], ids=[name], add_generation_prompt=True, padding_side="left"
        )
        chosen = Options(max_new_tokens=request.sampling.max_new_tokens)
        Engine(self.vlm.model, self.vlm.processor).start(batch, chosen)
        return batch, int(batch.input_ids.shape[1])

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._waiting and not self._stopping:
                    self._news.wait()
                if not self._waiting:
                    return
                handle, batch, length = self._waiting.popleft()
                self._running = handle
            try:
                self._answer(handle, batch, length)
            except Exception as error:
                handle.end(Finish("error", length, error=error))
            finally:
                self._running = None

    def _answer(self, handle: Handle, batch: Any, length: int) -> None:
        values = {name: getattr(handle.request.sampling, name) for name in NAMES}
        if values["temperature"] == 0:
            values["top_k"] = values["top_p"] = None
        begin, first = time.monotonic(), 0.0
        run = Engine(self.vlm.model, self.vlm.processor).start(batch, Options(**values))
        told = 0
        for _, text in run.pieces() if not handle.cancelled else ():
            first = first or time.monotonic() - begin
            ids = run.rows[0].answer.ids
            handle.put(Piece(text, tuple(ids[told:])))
            told = len(ids)
            if handle.cancelled:
                break
        answer = run.rows[0].answer
        count, spent = len(answer.ids), max(time.monotonic() - begin, 1e-9)
        reasons = {"stop": "stop", "stop_string": "stop", "length": "length", "positions": "length"}
        reason = reasons.get(answer.reason, "cancelled")
        finish = Finish(reason, length, count, 0, None, first, count / spent, seed=answer.seed)  # type: ignore[arg-type]
        self._totals["prompt_tokens"] += length
        self._totals["generated_tokens"] += count
        self._totals["requests"] += 1
        handle.end(finish)


__all__ = ["Finish", "Handle", "Piece", "QueueFull", "Request", "Service", "Stopped", "TokenLogprob"]
