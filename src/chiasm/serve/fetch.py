"""Fetching a picture from the network, when the operator allowed it, without becoming anyone's way into this network.

An address is parsed once, by one strict parser. Its host must be allowed by name, is resolved once, and *every* answer
must be a public address; the connection goes to the address that was checked, with the name in ``Host`` and in the
certificate. Redirects are followed by hand and each hop begins anew. Bytes and the whole time are capped, no proxy of
the environment is used, and what a client is told is the same whatever the other side said.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import h11

from chiasm.serve.options import MediaOptions

IP = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Connect = Callable[[str, int, "ssl.SSLContext | None", str], Awaitable[tuple[asyncio.StreamReader, Any]]]

REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = 32 * 1024  # bytes of a response's head
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Refused(Exception):
    """Why a picture is not fetched; the text is for the client and says nothing about this network."""


@dataclass(frozen=True)
class Address:
    """Where a picture is: what the one parser understood."""

    secure: bool
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """What ``Host`` says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse(url: str) -> Address:
    """An http(s) address by a strict grammar. Raises Refused."""
    shape = re.fullmatch(r"(?i)(https?)://(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::(\d{1,5}))?([/?][^#]*)?(?:#.*)?", url)
    if len(url) > 2048 or not all("!" <= c <= "~" and c != "\\" for c in url) or shape is None:
        raise Refused("an address of a picture must be http(s)://host/path in plain ASCII, without a user name")
    scheme, host, port, target = shape.groups()
    secure = scheme.lower() == "https"
    name = host.lower().removesuffix(".").strip("[]")
    if not _literal(name):
        labels = name.split(".")
        # What ends in a number is an IPv4 address to some parsers, whatever its form: 127.1, 0x7f000001, 2130706433.
        odd = re.fullmatch(r"\d+|0x[0-9a-f]*", labels[-1]) or host.startswith("[")
        if odd or len(name) > 253 or not all(re.fullmatch(r"(?!-)[a-z0-9-]{1,63}(?<!-)", label) for label in labels):
            raise Refused("the host of a picture's address is not a name")
    target = target or "/"
    return Address(secure, name, int(port or (443 if secure else 80)), target if target[0] == "/" else "/" + target)


def allowed(address: Address, options: MediaOptions) -> bool:
    """Whether the operator allowed this host and port. An empty list allows none."""
    host = address.host
    named = any(
        rule == "*" or host == rule or (rule.startswith("*.") and host.endswith(rule[1:]))
        for rule in (rule.lower().removesuffix(".") for rule in options.hosts)
    )
    return named and address.port in options.ports


def public(answer: str) -> IP | None:
    """The address as it may be connected to; None where it is not public, in any of the ways IPv6 wraps IPv4."""
    try:
        ip: IP = ipaddress.ip_address(answer)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return ip if public(str(inner)) else None
    good = ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_link_local)
    return ip if good else None


class Fetcher:
    """Fetches pictures. ``resolve`` and ``connect`` are the only ways out, so that tests can watch them."""

    def __init__(self, options: MediaOptions, resolve: Resolve | None = None, connect: Connect | None = None):
        self.options = options
        self.resolve, self.connect = resolve or _resolve, connect or _connect
        self._slots: anyio.Semaphore | None = None
        self._ssl: ssl.SSLContext | None = None

    async def fetch(self, url: str) -> bytes:
        """The bytes at an address. Raises Refused."""
        if not self.options.hosts:
            raise Refused("pictures are not fetched from addresses here; send them as data URLs")
        address = parse(url)
        self._check(address)
        if self._slots is None:
            self._slots = anyio.Semaphore(self.options.fetches)
        try:
            with anyio.fail_after(self.options.fetch_seconds):
                async with self._slots:
                    return await self._follow(address)
        except TimeoutError:
            raise Refused("a picture could not be fetched in time") from None
        except Refused:
            raise
        except (OSError, EOFError, ValueError, h11.ProtocolError, ssl.SSLError):
            raise _failed() from None

    def _check(self, address: Address) -> None:
        if not allowed(address, self.options):
            raise Refused("pictures are not fetched from this host or port")

    async def _follow(self, address: Address) -> bytes:
        for _ in range(self.options.redirects + 1):
            found = await self._get(address)
            if isinstance(found, bytes):
                return found
            following = parse(_joined(address, found))
            if address.secure and not following.secure:
                raise _failed()
            self._check(following)
            address = following
        raise Refused("the address of a picture redirects too often")

    async def _get(self, address: Address) -> bytes | str:
        """The body at an address, or where it redirects to."""
        ips = [str(ip) for ip in (_literal(address.host),) if ip] or await self.resolve(address.host, address.port)
        checked = [public(ip) for ip in ips]
        if not checked or None in checked:  # one private answer among public ones is an attack, not a choice
            raise _failed()
        reader, writer = await self.connect(str(checked[0]), address.port, self._context(address), address.host)
        try:
            return await self._exchange(reader, writer, address)
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: Any, address: Address) -> bytes | str:
        wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEADERS)
        headers = [("Host", address.authority), ("User-Agent", "chiasm"), ("Accept", "image/*")]
        headers += [("Accept-Encoding", "identity"), ("Connection", "close")]
        request = h11.Request(method="GET", target=address.target, headers=headers)
        writer.write((wire.send(request) or b"") + (wire.send(h11.EndOfMessage()) or b""))
        body, read, most = bytearray(), 0, self.options.picture_bytes
        while True:
            event = wire.next_event()
            if event is h11.NEED_DATA:
                chunk = await reader.read(65536)
                read += len(chunk)
                if read > 2 * most + HEADERS:  # chunks of one byte: mostly frames
                    raise _failed()
                wire.receive_data(chunk)
            elif isinstance(event, h11.Response):
                fields = {key.lower(): value for key, value in event.headers}
                if event.status_code in REDIRECTS and b"location" in fields:
                    return fields[b"location"].decode("ascii", "replace")
                if event.status_code != 200 or fields.get(b"content-encoding", b"identity") != b"identity":
                    raise _failed()
                if int(fields.get(b"content-length", b"0")) > most:
                    raise Refused(f"a picture's file is above the limit of {most} bytes")
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > most:
                    raise Refused(f"a picture's file is above the limit of {most} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)
            elif not isinstance(event, h11.InformationalResponse):
                raise _failed()

    def _context(self, address: Address) -> ssl.SSLContext | None:
        if not address.secure:
            return None
        if self._ssl is None:
            self._ssl = ssl.create_default_context()
        return self._ssl


def _failed() -> Refused:
    return Refused("a picture could not be fetched")


def _literal(host: str) -> IP | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _joined(base: Address, location: str) -> str:
    """A redirect's target as a whole address, for the one parser."""
    scheme = "https" if base.secure else "http"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", location):
        return location
    if location.startswith("//"):
        return f"{scheme}:{location}"
    if location.startswith("/"):
        return f"{scheme}://{base.authority}{location}"
    folder = base.target.partition("?")[0].rpartition("/")[0]
    return f"{scheme}://{base.authority}{folder}/{location}"


async def _resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


async def _connect(
    ip: str, port: int, context: ssl.SSLContext | None, name: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    # asyncio looks an IP address up nowhere, and knows no proxies.
    return await asyncio.open_connection(ip, port, ssl=context, server_hostname=name if context else None)
