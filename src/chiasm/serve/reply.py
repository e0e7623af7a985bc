"""The objects of OpenAI's answers: completions, chunks, log-probabilities, usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

UNLIKELY = -9999.0  # what OpenAI writes for minus infinity


@dataclass
class Head:
    """What all objects of one request say alike."""

    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """A whole answer."""
        return {**self._common("chat.completion"), "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, with_usage: bool) -> dict[str, Any]:
        """A piece of a stream. ``with_usage``: the key is there, null but in the last."""
        return {
            **self._common("chat.completion.chunk"),
            "choices": choices,
            **({"usage": usage} if with_usage else {}),
        }

    def _common(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def choice(index: int, text: str, logprobs: Any, reason: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One of the answers of a completion."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message.update(content=text or None, tool_calls=list(calls))
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": reason,
    }


def delta(index: int, change: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
    """One of the answers of a chunk."""
    return {"index": index, "delta": change, "logprobs": logprobs, "finish_reason": reason}


def logprob_content(tokens: Iterable[Any]) -> dict[str, Any]:
    """Log-probabilities as OpenAI lists them."""
    content = [
        {
            **_token(token.text, token.logprob, token.bytes),
            "top_logprobs": [_token(text, value, raw) for _, value, text, raw in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(text: str, value: float, raw: bytes) -> dict[str, Any]:
    return {"token": text, "logprob": max(value, UNLIKELY) if value == value else UNLIKELY, "bytes": list(raw)}


def usage(finishes: Sequence[Any]) -> dict[str, Any]:
    """Tokens of a request: the prompt once, every answer."""
    first = finishes[0]
    prompt, cached, pictures = first.prompt_tokens, first.cached_tokens, first.image_tokens
    written = sum(finish.completion_tokens for finish in finishes)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {
            "cached_tokens": cached,
            "image_tokens": pictures,
            "text_tokens": prompt - pictures,
            "audio_tokens": 0,
        },
    }
