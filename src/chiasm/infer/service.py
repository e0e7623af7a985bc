"""The engine as a service: one thread steps the answers of many callers.

``submit`` prepares the prompt in the caller's thread and refuses at once what is wrong or too much; the engine's thread
does everything with the model. See ``docs/inference.md``.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import Any

import torch

from chiasm.errors import ConfigError, DataError
from chiasm.infer.answer import Writer
from chiasm.infer.engine import Engine
from chiasm.infer.kept import Kept
from chiasm.infer.prompt import Prompt, asked, prompts_of, state_of
from chiasm.infer.request import Finish, Handle, Piece, QueueFull, Request, Stopped, TokenLogprob
from chiasm.infer.sampling import Options, Sampling
from chiasm.infer.scheduler import Job, Scheduler
from chiasm.infer.slots import Slots
from chiasm.infer.words import Words
from chiasm.nn.quant import quantize_model

LONGEST = 8192
"""Positions of a slot where neither the caller nor the model says how many."""
FAULTS = 3
"""Steps in a row that may fail before the thread gives up."""


def writes(model: Any) -> bool:
    """Whether a model writes text: with a language model, or by itself (BLIP-2's first stage captions)."""
    return getattr(model, "lm", None) is not None or bool(getattr(model.config, "writes", False))


class Service:
    """Answers requests on a model (``vlm`` has ``model`` and ``processor``), ``slots`` of them side by side.

    ``max_length`` is the longest conversation in tokens (None: the model's limit, at most 8192); memory is taken as it
    is used. ``prefix_cache_bytes`` bounds the keys and values kept of beginnings, ``feature_cache_bytes`` the vectors
    of pictures; 0 turns them off. ``chunk`` is how many prompt tokens are computed in one step. ``dtype`` and
    ``quantize`` ("int8", "int4") change the model, in place. ``threads`` None: as many as torch uses.

    Raises ConfigError for a model that writes no text.
    """

    def __init__(
        self,
        vlm: Any,
        *,
        slots: int = 8,
        max_length: int | None = None,
        max_queue_requests: int = 64,
        max_queue_tokens: int = 65536,
        prefix_cache_bytes: int = 1 << 30,
        feature_cache_bytes: int = 1 << 28,
        chunk: int = 512,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        threads: int | None = None,
    ):
        if not writes(vlm.model):
            raise ConfigError(f"{type(vlm.model).__name__} writes no text: it cannot be served as a chat")
        if dtype is not None:
            vlm.model.to(dtype)
        if quantize is not None:
            quantize_model(vlm.model, quantize)
        self.vlm, self.most = vlm, slots
        self.max_queue_requests, self.max_queue_tokens = max_queue_requests, max_queue_tokens
        self.threads = threads or torch.get_num_threads()
        self.prefixes = Kept(prefix_cache_bytes) if prefix_cache_bytes else None
        self.features = Kept(feature_cache_bytes) if feature_cache_bytes else None
        self._engine, self._words = Engine(vlm.model, vlm.processor), Words(vlm.processor)
        own = getattr(getattr(vlm.model, "lm", None), "max_positions", None)
        self.max_length = min(n for n in (max_length, own, LONGEST if max_length is None else None) if n is not None)
        with torch.inference_mode():
            pool = Slots(vlm.model, slots, self.max_length) if Slots.fits(vlm.model) else None
        self.scheduler = Scheduler(
            vlm.model, pool, slots, self.prefixes, self.features, chunk, seed=lambda: state_of(vlm.model)
        )
        self._new: deque[Job] = deque()
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = self._dropping = False
        self._numbers = itertools.count()
        self._ended: dict[str, int] = {}

    # ------------------------------------------------------------------------------------------------ callers

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Put the model in evaluation mode and start the engine's thread. Raises ConfigError where it was started."""
        if self._thread is not None:
            raise ConfigError("this service was started before: make a new one")
        self.vlm.model.eval()
        self._thread = threading.Thread(target=self._run, name="chiasm-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        """Queue a request. Raises at once: QueueFull, Stopped, DataError (bad input, or no room for an answer)."""
        self._check_room(0)
        prompt, options, limit = self._prepare(request)
        handle = Handle(request)
        model = self.vlm.model
        vocab = int(model.config.vocab if getattr(model, "lm", None) is None else model.lm.vocab)
        kept = request.constraint, self._words, request.marks
        writer = Writer(self.vlm.processor, options, prompt.ids, limit, vocab, *kept)
        job = Job(prompt, writer, handle.put, handle.end, lambda: handle.cancelled or self._dropping, request.salt)
        job.end = lambda finish: self._end(handle, finish)
        if self.scheduler.slots is None or not model.lm.steady(1, len(prompt) + limit):
            chosen = Options.parse({"max_new_tokens": limit})
            job.alone = lambda: self._engine.steps(self._engine.start(prompt.batch, chosen))
        with self._news:
            self._check_room(len(prompt))
            self._new.append(job)
            self._news.notify_all()
        return handle

    def count(self, messages: Any) -> int:
        """Tokens of the prompt of a conversation, media included. Raises DataError."""
        return len(self._prepare(Request(messages))[0])

    def stop(self, drain: float = 0.0) -> None:
        """Take no more requests, give those accepted ``drain`` seconds to end, cancel the rest, end the thread."""
        with self._news:
            self._stopping = True
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join(drain)
            self._dropping = True
            self._thread.join()

    def stats(self) -> dict[str, Any]:
        """Numbers for whoever watches: running, waiting, totals, what the caches hold and how often they helped."""
        s, slots = self.scheduler, self.scheduler.slots
        running = [*s.writing, *s.filling]
        used = sum(job.filled + len(job.writer.ids) for job in running)
        kept = {"prefix": self.prefixes, "feature": self.features}
        return {
            "running": len(running),
            "waiting": len(self._new) + len(s.waiting),
            "waiting_tokens": self._waiting_tokens(),
            "slots": self.most,
            "kv_tokens": used,
            "kv_usage": used / (self.most * self.max_length),
            "compiled": slots is not None and slots.compiled is not None,
            **s.totals,
            **{f"{name}_cache_bytes": 0 if held is None else held.bytes for name, held in kept.items()},
            **{f"{name}_cache_entries": 0 if held is None else len(held) for name, held in kept.items()},
            "feature_queries": 0 if self.features is None else self.features.asked,
            "feature_hits": 0 if self.features is None else self.features.found,
            "finished": dict(self._ended),
            "healthy": self.healthy,
        }

    def _check_room(self, tokens: int) -> None:
        if self._stopping or not self.healthy:
            raise Stopped("the engine takes no requests: it was stopped, or its thread has died")
        waiting = len(self._new) + len(self.scheduler.waiting)
        free = max(0, self.most - len(self.scheduler.writing) - len(self.scheduler.filling))
        if waiting >= self.max_queue_requests + free:
            raise QueueFull(f"{waiting} requests are waiting; try again later", "requests")
        held = self._waiting_tokens()
        if tokens and held and held + tokens > self.max_queue_tokens:
            raise QueueFull(f"{held} prompt tokens are waiting; try again later", "tokens")

    def _waiting_tokens(self) -> int:
        return sum(len(job.prompt) for job in [*self._new, *self.scheduler.waiting])

    def _prepare(self, request: Request) -> tuple[Prompt, Sampling, int]:
        """The prompt, how its answer is chosen, and how many tokens the answer may have."""
        processor, name = self.vlm.processor, request.id or f"request-{next(self._numbers)}"
        batch = asked(processor, request, name)
        sampling = request.sampling
        run = self._engine.start(batch, Options.parse({"max_new_tokens": sampling.max_new_tokens}))
        prompt, limit = prompts_of(batch)[0], run.limits[0]
        if self.scheduler.slots is not None:
            if len(prompt) >= self.max_length:
                raise DataError(
                    f"sample {name!r}: the prompt takes {len(prompt)} tokens, a slot has {self.max_length}: shorten "
                    "the conversation, or serve with a larger max_length",
                    "too_long",
                )
            limit = min(limit, self.max_length - len(prompt))
        return prompt, sampling, limit

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        torch.set_num_threads(self.threads)  # a new thread begins with its own number
        faults = 0
        try:
            while self._wait():
                try:
                    self.scheduler.step()
                    faults = 0
                except Exception as error:
                    faults += 1
                    for job in [*self.scheduler.writing, *self.scheduler.filling]:
                        self.scheduler.drop(job, "error", error)
                    if faults >= FAULTS:
                        raise
        finally:
            with self._news:
                self._stopping = True
                self.scheduler.waiting.extend(self._new)
                self._new.clear()
            for job in self.scheduler.jobs:
                self.scheduler.drop(job, "error", Stopped("the engine's thread has ended"))

    def _wait(self) -> bool:
        """Take new jobs over; sleep while there is nothing to do. False: all is done and no more may come."""
        with self._news:
            while not self._new and self.scheduler.idle and not self._stopping:
                self._news.wait()
            self.scheduler.waiting.extend(self._new)
            self._new.clear()
            return not (self._stopping and self.scheduler.idle)

    def _end(self, handle: Handle, finish: Finish) -> None:
        self._ended[finish.reason] = self._ended.get(finish.reason, 0) + 1
        handle.end(finish)


__all__ = [
    "Finish",
    "Handle",
    "Piece",
    "QueueFull",
    "Request",
    "Sampling",
    "Service",
    "Stopped",
    "TokenLogprob",
    "writes",
]
