"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}``.

A message names what is wrong with the request and never a path, an address, a traceback or what a library said.
"""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from chiasm.errors import ChiasmError

KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 503: "overloaded_error"}
MESSAGE_LENGTH = 500


class ApiError(Exception):
    """What a client is told instead of an answer. ``param`` is the place in the request, ``code`` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        """The error's ``type``."""
        return KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole response."""
        return Response(dumps(self.body()), self.status, self.headers, media_type="application/json")


def dumps(value: Any) -> bytes:
    """JSON in ASCII: no client takes a character of a text for the end of a line. Surrogates cannot break it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def busy(message: str, code: str, retry: int) -> ApiError:
    """503 for a request that may well be answered ``retry`` seconds later."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry)})


def internal() -> ApiError:
    """500: our fault, of which a client is told nothing but the request id in the header."""
    return ApiError(
        500, "an error inside the server; its log has it under this request's x-request-id", code="internal"
    )


def refused(error: ChiasmError) -> ApiError:
    """What the package refuses to do with a request, said without the places of this machine."""
    fault = getattr(error, "fault", "")
    code = {"too_long": "context_length_exceeded"}.get(fault, fault or None)
    return ApiError(400, clean(re.sub(r"^sample '[^']*'(?:, |: )", "", str(error))), code=code)


PRIVATE = re.compile(
    r"(?:[A-Za-z]:)?(?:[\\/][\w.~+@%-]+){2,}[\\/]?"  # paths
    r"|0x[0-9a-fA-F]{6,}"  # addresses in memory
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b|\[?\b[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{0,4}){3,}\]?"  # addresses of machines
    r"|[A-Za-z0-9+/=_-]{80,}"  # base64
)


def clean(text: str) -> str:
    """A message without paths, addresses and encoded data, of at most 500 characters."""
    text = PRIVATE.sub("(...)", " ".join(text.split()))
    return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 3] + "..."


def shown(value: Any, length: int = 60) -> str:
    """A value of the request, as short as an error may repeat it."""
    text = _short.repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


_short = reprlib.Repr()  # looks at the beginning of a value only, however large it is
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel = 2


async def handle(request: Request, error: Exception) -> Response:
    """Starlette's handler of ``ApiError``."""
    assert isinstance(error, ApiError)
    return error.response()
