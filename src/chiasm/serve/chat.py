"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response

from chiasm.errors import ChiasmError
from chiasm.infer.request import QueueFull, Stopped
from chiasm.infer.request import Request as Ask
from chiasm.serve import content
from chiasm.serve.body import reading
from chiasm.serve.calls import Calls, joined
from chiasm.serve.content import Outline
from chiasm.serve.errors import ApiError, internal, refused
from chiasm.serve.flow import Flow
from chiasm.serve.options import Served
from chiasm.serve.reply import Head, choice, delta, logprob_content, usage
from chiasm.serve.sampling import constraint, sampling
from chiasm.serve.schema import ChatRequest
from chiasm.serve.send import PING, Stream, Whole, sse
from chiasm.serve.state import State, find, state_of
from chiasm.serve.tools import Tooling


async def completions(request: Request) -> Response:
    """One request, admitted, read, opened and handed to the engine; what is left is the answer."""
    state = state_of(request)
    with ExitStack() as stack:
        stack.enter_context(state.admitted())
        job = await _submitted(request, state)
        stack.callback(job.flow.cancel)  # also where the client is gone before the first step of the answer
        rest = state.metrics, stack.pop_all().close, state.options.limits.send_seconds
        return Stream(job.events, *rest) if job.wanted.stream else Whole(job.whole, *rest)


async def _submitted(request: Request, state: State) -> Job:
    async with reading(request) as values:
        wanted = ChatRequest.read(values, state.options.limits)
        served = find(request, wanted.model)
        if not served.can_chat:
            raise ApiError(400, "this model writes no answers; one with two towers is asked at /v1/embeddings", "model")
        tooling = Tooling.of(served, wanted, state.options.limits)
        outline = content.read(wanted.messages, state.options.limits)
        _roomy(state, served, wanted.answers)
        head = Head(served.name, served.fingerprint)
        salt = getattr(request.state, "salt", "") + (wanted.cache_salt or "")
        found = await state.gate.bring(outline.wanted)
        with state.hold(sum(map(len, found))):
            async with state.opening:
                make = partial(_submit, state, served, wanted, outline, found, tooling, head.id, salt)
                # Not abandoned when the client goes away: what was submitted must be known, to be cancelled.
                handles = await anyio.to_thread.run_sync(make)
    return Job(wanted, head, Flow(state, served, handles), tooling)


def _roomy(state: State, served: Served, answers: int) -> None:
    """Refuses at once, before pictures are opened, what the engine's queue would refuse afterwards."""
    stats = served.service.stats()
    free = max(0, stats["slots"] - stats["running"])
    if stats["waiting"] + answers > served.service.max_queue_requests + free:
        raise state.full("requests", "the queue is full")


def _submit(
    state: State,
    served: Served,
    wanted: ChatRequest,
    outline: Outline,
    found: list[bytes],
    tooling: Tooling,
    name: str,
    salt: str,
) -> list[Any]:
    """The handles of all answers. Blocks."""
    messages = content.opened(state, outline, found)
    handles: list[Any] = []
    try:
        limits = tooling.constraint or constraint(wanted, state.options.limits)
        for index in range(wanted.answers):
            chosen = sampling(wanted, state.options, served.vlm, index)
            ask = Ask(
                messages=messages,
                sampling=chosen,
                constraint=limits,
                tools=tooling.tools,
                lead=tooling.lead,
                marks=tooling.marks,
                salt=salt,
                continue_final=bool(wanted.continue_final_message),
                id=name,
            )
            handles.append(served.service.submit(ask))
    except BaseException as error:
        for handle in handles:
            handle.cancel()
        if isinstance(error, QueueFull):
            raise state.full(error.reason, "the queue is full") from None
        if isinstance(error, Stopped):
            raise internal() from None
        if isinstance(error, ChiasmError):
            raise refused(error) from None
        raise
    return handles


@dataclass
class Job:
    """A request that is being answered."""

    wanted: ChatRequest
    head: Head
    flow: Flow
    tooling: Tooling
    calls: list[Calls] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.calls = [self.tooling.parser() for _ in range(self.wanted.answers)]

    async def whole(self) -> dict[str, Any]:
        """The completion, when every answer is there."""
        texts: list[list[str]] = [[] for _ in self.calls]
        tokens: list[list[Any]] = [[] for _ in self.calls]
        made: list[list[dict[str, Any]]] = [[] for _ in self.calls]
        async with aclosing(self.flow.pieces()) as pieces:
            async for index, piece in pieces:
                if piece is not None:
                    text, calls = self.calls[index].push(piece.text)
                    texts[index].append(text)
                    made[index] += calls
                    tokens[index] += piece.logprobs
        for index, rest in enumerate(self.calls):
            text, calls = rest.flush(self._cut(index))
            texts[index].append(text)
            made[index] += calls
        choices = [
            choice(i, "".join(texts[i]), self._logprobs(tokens[i], True), self._reason(i), joined(made[i]))
            for i in range(self.wanted.answers)
        ]
        return self.head.completion(choices, usage(self.flow.finishes))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream. The first comes before anything is computed: clients time out on silence."""
        for index in range(self.wanted.answers):
            yield self._event([delta(index, {"role": "assistant", "content": ""})])
        async with aclosing(self.flow.pieces()) as pieces:
            async for index, piece in pieces:
                if piece is None:
                    yield PING
                    continue
                text, calls = self.calls[index].push(piece.text)
                logprobs = self._logprobs(piece.logprobs)
                if text or logprobs:
                    yield self._event([delta(index, {"content": text}, logprobs)])
                for call in calls:
                    yield self._event([delta(index, {"tool_calls": [call]})])
        for index in range(self.wanted.answers):
            text, calls = self.calls[index].flush(self._cut(index))
            if text:
                yield self._event([delta(index, {"content": text})])
            for call in calls:
                yield self._event([delta(index, {"tool_calls": [call]})])
            yield self._event([delta(index, {}, None, self._reason(index))])
        if self.wanted.usage_in_stream:
            told = usage(self.flow.finishes)
            yield sse(self.head.chunk([], told, True))

    def _cut(self, index: int) -> bool:
        return bool(self.flow.finishes[index].reason == "length")

    def _reason(self, index: int) -> str:
        """Why an answer ended: a call that was cut short is as any text cut short."""
        calls, finish = self.calls[index], self.flow.finishes[index]
        return "tool_calls" if calls.count and not calls.unfinished else str(finish.reason)

    def _event(self, choices: Sequence[dict[str, Any]]) -> bytes:
        return sse(self.head.chunk(list(choices), None, self.wanted.usage_in_stream))

    def _logprobs(self, tokens: Sequence[Any], whole: bool = False) -> dict[str, Any] | None:
        return logprob_content(tokens) if self.wanted.logprobs and (tokens or whole) else None
