"""Tools: written into the prompt by templates that can, read back from the answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chiasm.serve.errors import ApiError
from chiasm.serve.options import Served
from chiasm.serve.schema import ChatRequest


@dataclass
class Calls:
    """Finds tool calls in the text of one answer while it comes."""

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """The text that is none, and the calls that are now complete."""
        return text, []

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back at the end."""
        return "", []


@dataclass
class Tooling:
    """What a request's tools become."""

    tools: list[dict[str, Any]] | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, served: Served, wanted: ChatRequest) -> Tooling:
        """Raises ApiError (400) where calls are asked for that the model's template cannot write."""
        if not wanted.tools or wanted.tool_choice == "none":
            return cls()
        if wanted.tool_choice not in (None, "auto"):
            text = "tool_choice asks for a call, but this model's template has no tools; use response_format instead"
            raise ApiError(400, text, "tool_choice", "unsupported_parameter")
        return cls(headers={"x-chiasm-warning": "tools ignored: this model's template has none"})

    def parser(self) -> Calls:
        """Reads one answer."""
        return Calls()
