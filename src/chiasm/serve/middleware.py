"""What every request passes before its route: a name for it, safe headers, and the questions who and from where."""

from __future__ import annotations

import hmac
import logging
import re
import uuid
from hashlib import sha256

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiasm.serve.errors import ApiError, busy, internal
from chiasm.serve.headers import SAFE
from chiasm.serve.state import State

log = logging.getLogger("chiasm.serve")


class Identify:
    """Gives each request an id and each response its safe headers; nothing that goes wrong inside leaves as text."""

    def __init__(self, app: ASGIApp, state: State):
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        name = asked if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name
        started = False

        async def reply(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                for key, value in SAFE.items():
                    headers.setdefault(key, value)
                self.state.metrics.responses.add(code=str(message["status"]))
            await send(message)

        try:
            await self.app(scope, receive, reply)
        except Exception:
            log.exception("request %s failed", name)
            if not started:
                await internal().response()(scope, receive, reply)


class Guard:
    """Refuses what no route should see: heads that are too long, strange hosts and origins, strangers."""

    def __init__(self, app: ASGIApp, state: State):
        self.app, self.state = app, state
        self.keys = [sha256(key.encode()).digest() for key in state.options.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        options, headers, path = self.state.options, Headers(scope=scope), scope["path"]
        size = sum(len(key) + len(value) for key, value in scope["headers"]) + len(scope.get("query_string", b""))
        if size + len(scope.get("raw_path") or b"") > options.limits.header_bytes:
            raise ApiError(431, f"the request's head is above the limit of {options.limits.header_bytes} bytes")
        host = headers.get("host", "").lower()
        # A page that makes its own name point to this machine (DNS rebinding) still says its own name here.
        if options.names and re.sub(r":\d+$", "", host) not in options.names:
            raise ApiError(403, "this server does not answer to the name in Host", code="host_not_allowed")
        origin = headers.get("origin")
        if origin and scope["method"] not in ("GET", "HEAD", "OPTIONS") and not self._known(origin.lower(), host):
            raise ApiError(403, "pages of this origin may not ask here", code="origin_not_allowed")
        if not public(path):
            scope["state"]["salt"] = self._key(headers.get("authorization", ""))
            if self.state.draining and path != "/metrics":
                raise busy("the server is shutting down", "shutting_down", options.retry_seconds)

    def _known(self, origin: str, host: str) -> bool:
        origins = [known.lower() for known in self.state.options.origins]
        return origin in origins or "*" in origins or origin.partition("://")[2] == host

    def _key(self, header: str) -> str:
        """What keeps this key's prefixes apart from those of others. Raises ApiError (401)."""
        if not self.keys:
            return ""
        scheme, _, key = header.partition(" ")
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, each in constant time.
        known = [hmac.compare_digest(digest, known) for known in self.keys]
        if scheme.lower() != "bearer" or not any(known):
            text = "no API key was given" if not key else "this API key is not known"
            raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return sha256(b"salt" + digest).hexdigest()


def public(path: str) -> bool:
    """What needs no key: health, and the files of the page, which hold no secret."""
    return path in ("/health", "/", "/favicon.ico") or path.startswith("/page/")
