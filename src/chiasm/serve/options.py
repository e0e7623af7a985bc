"""What a server allows, and the models it answers with."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from chiasm import __version__
from chiasm.config import Config

MB = 1 << 20
log = logging.getLogger("chiasm.serve")


class Limits(Config):
    """The largest request that is looked at. What is above a limit is refused, before it costs memory or time."""

    body_bytes: int = Field(default=32 * MB, ge=1)
    held_bytes: int = Field(default=256 * MB, ge=1)  # of all bodies that are being read or opened
    header_bytes: int = Field(default=32 * 1024, ge=1024)
    body_seconds: float = Field(default=60.0, gt=0)  # to send a body
    messages: int = Field(default=1024, ge=1)
    parts: int = Field(default=4096, ge=1)  # of all messages
    text_characters: int = Field(default=1_000_000, ge=1)  # of all messages
    n: int = Field(default=8, ge=1)  # answers of one request
    new_tokens: int = Field(default=4096, ge=1)  # of an answer; a larger max_tokens is lowered to it
    tools: int = Field(default=128, ge=0)
    schema_bytes: int = Field(default=64 * 1024, ge=0)  # of a JSON schema
    requests: int = Field(default=256, ge=1)  # answered at a time, waiting ones included
    opened: int = Field(default=4, ge=1)  # requests whose pictures are opened and rendered at a time
    request_seconds: float = Field(default=600.0, gt=0)  # from the first byte to the last token
    send_seconds: float = Field(default=60.0, gt=0)  # for a client to take a piece of a stream
    inputs: int = Field(default=256, ge=1)  # texts or pictures of one request for embeddings


class MediaOptions(Config):
    """Where pictures may come from and how large they may be. Data URLs always may; the rest must be allowed here.

    ``hosts``: names (``example.com``, ``*.example.com``, or ``*``: any) that pictures are fetched from, never at an
    address that is not public. ``root``: the folder that ``file://`` addresses must lie in.
    """

    hosts: tuple[str, ...] = ()
    ports: tuple[int, ...] = (80, 443)
    root: str | None = None
    pictures: int = Field(default=16, ge=0)  # of one request
    picture_bytes: int = Field(default=20 * MB, ge=1)  # of one file
    picture_pixels: int = Field(default=50_000_000, ge=1)
    request_pixels: int = Field(default=100_000_000, ge=1)  # of all pictures of a request
    side: int = Field(default=16_384, ge=1)  # pixels
    aspect: float = Field(default=200.0, ge=1)  # the longer side in shorter ones
    fetch_seconds: float = Field(default=10.0, gt=0)  # for one picture, redirects included
    fetches: int = Field(default=8, ge=1)  # at a time
    redirects: int = Field(default=3, ge=0)


class ServeOptions(Config):
    """How a server behaves.

    ``keys``: who may ask; empty: anyone. ``hosts``: the names in ``Host`` that are answered to; empty: localhost when
    bound to a loopback address, else any. ``origins``: web pages of other origins that may ask (``*``: all; never with
    credentials).
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    page: bool = True
    temperature: float = Field(default=1.0, ge=0, le=2)  # where a request gives none; OpenAI's default
    ping_seconds: float = Field(default=15.0, gt=0)  # between signs of life of a silent stream
    retry_seconds: int = Field(default=2, ge=1)  # what Retry-After says when the queue is full
    drain_seconds: float = Field(default=30.0, ge=0)  # that running answers get after SIGTERM
    watch_seconds: float = Field(default=5.0, gt=0)  # a dead engine is seen for that long before the process ends
    limits: Limits = Limits()
    media: MediaOptions = MediaOptions()

    @model_validator(mode="after")
    def _agrees(self) -> ServeOptions:
        if any(not key or not key.isascii() or key != key.strip() for key in self.keys):
            raise ValueError("a key must be a word of ASCII characters")
        if "*" in self.origins and len(self.origins) > 1:
            raise ValueError("origins: '*' stands alone")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The names in ``Host`` that are answered to; empty: any."""
        if self.hosts:
            return tuple(name.lower() for name in self.hosts)
        return ("localhost", "127.0.0.1", "[::1]") if self.host in LOOPBACK else ()


LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Served:
    """A model under the name that requests give. It may still be loading.

    ``service`` writes answers (None while it loads, and for models that only embed), ``vlm`` is the model.
    """

    def __init__(self, name: str, load: Callable[[], tuple[Any, Any]]):
        self.name, self._load = name, load
        self.created = int(time.time())
        self.state: Literal["loading", "ready", "failed"] = "loading"
        self.service: Any = None
        self.vlm: Any = None
        self.error: Exception | None = None
        self.fingerprint = f"chiasm-{__version__}"  # changes with this package and the model's configuration
        self.embedding = threading.Lock()  # one batch of embeddings at a time

    @classmethod
    def ready(cls, name: str, service: Any = None, vlm: Any = None) -> Served:
        """A model that is loaded and whose service is started."""
        served = cls(name, lambda: (service, vlm))
        served.load()
        return served

    def load(self) -> None:
        """Load now, in this thread. An error is kept, not raised."""
        began = time.monotonic()
        try:
            self.service, vlm = self._load()
            self.vlm = getattr(self.service, "vlm", None) if vlm is None else vlm
            if hasattr(self.vlm, "config"):
                self.fingerprint = f"chiasm-{__version__}-{self.vlm.config.hash()}"
            self.state = "ready"
            log.info("model %s is ready after %.1f s", self.name, time.monotonic() - began)
        except Exception as error:  # whatever a loader raises, the other models go on
            self.error, self.state = error, "failed"
            log.exception("model %s cannot be loaded", self.name)

    @property
    def healthy(self) -> bool:
        """Whether it can answer now."""
        return self.state == "ready" and (self.service is None or bool(self.service.healthy))

    @property
    def can_chat(self) -> bool:
        """Whether it writes answers."""
        return self.service is not None

    @property
    def can_embed(self) -> bool:
        """Whether it makes vectors of texts and pictures."""
        return hasattr(self.vlm, "embed") and hasattr(self.vlm.model, "embed_images")


Models = Mapping[str, Served]
