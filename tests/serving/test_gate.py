"""The media gate against the network and the disk: what is not allowed is never touched, and nobody is told why."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from serving_kit import Listener, encoded, ready, serving, shows

from chiasm.serve import fetch
from chiasm.serve.fetch import Fetcher, Refused, allowed, parse, public
from chiasm.serve.files import read
from chiasm.serve.gate import Gate
from chiasm.serve.options import MediaOptions

PUBLIC = "93.184.216.34"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nConnection: close\r\n"


def said(options: MediaOptions, url: str, answers: Sequence[str] = (), seen: list | None = None) -> str:
    """What a fetch is refused with; names resolve to ``answers``."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        if seen is not None:
            seen.append((host, port))
        return answers

    with pytest.raises(Refused) as told:
        asyncio.run(Fetcher(options, resolve).fetch(url))
    return str(told.value)


VECTORS = [
    "http://127.0.0.1:{port}/",
    "http://0:{port}/",
    "http://127.1:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.1:{port}/",
    "http://017700000001:{port}/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[0:0:0:0:0:ffff:7f00:1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[::]:{port}/",
    "http://[fe80::1]:{port}/",
    "http://169.254.169.254/latest/meta-data",
    "http://metadata.google.internal/",
    "http://localhost:{port}/",
    "http://localhost.:{port}/",
    "http://LOCALHOST:{port}/",
    "http://allowed.example@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@allowed.example/",
    "http://allowed.example\\@127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}\\",
    "http://allowed.example#@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#.allowed.example/",
    "http://allowed.example:{port}/",
    "http://allowed.example.:{port}/",
    "http://ALLOWED.EXAMPLE:{port}/",
    "http://ⓛocalhost:{port}/",
    "http://127。0。0。1:{port}/",
    "http://xn--lcalhost-n1a:{port}/",
    "http://１２７.0.0.1:{port}/",
    "http://127.0.0.1:{port}%00.allowed.example/",
    "http://127.0.0.1%2f@allowed.example:{port}/",
    "http:/127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    " http://127.0.0.1:{port}/",
    "http://127.0.0.1 :{port}/",
    "http://127.0.0.1\t:{port}/",
    "ht\ntp://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\r\nX: y/",
    "HTTP://127.0.0.1:{port}/",
    "https://127.0.0.1:{port}/",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/_x",
    "file://127.0.0.1:{port}/",
    "dict://127.0.0.1:{port}/",
    "ws://127.0.0.1:{port}/",
    "unix:/tmp/x",
    "http://:{port}/",
    "http://allowed.example:0{port}/",
    "http://allowed.example:99999/",
    "http://127.0.0.1.nip.io:{port}/",
    "http://spoofed:{port}/",
    "url:http://127.0.0.1:{port}/",
    "jar:http://127.0.0.1:{port}!/",
    "http://user:pass@localhost:{port}/",
    "http://[127.0.0.1]:{port}/",
]


def lookup(host, port, *args, **kwargs):
    """Every name, and every odd number, means this machine."""
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


@pytest.mark.parametrize("hosts", [(), ("allowed.example",), ("*",)])
def test_no_vector_reaches_this_machine(vlm, monkeypatch, hosts):

    with Listener(HEAD + b"\r\n" + encoded()) as listener:
        media = {"hosts": hosts, "ports": [80, 443, listener.port]}
        with serving(ready(vlm), media=media) as running:
            monkeypatch.setattr(socket, "getaddrinfo", lookup)
            for number, vector in enumerate(VECTORS):
                url = vector.replace("{port}", str(listener.port))
                forms = shows(url), shows({"url": url}), [{"type": "input_image", "image_url": url}, "x"]
                reply = running.chat(forms[number % 3])
                assert reply.status == 400 and reply.error["code"] == "invalid_image", (url, reply.body)
                message = reply.error["message"]
                assert not re.search(r"\d+\.\d+\.\d+|::|localhost|refused by|errno|example", message, re.I), message
            monkeypatch.undo()
        assert listener.hits == 0


def test_the_vectors_would_arrive_were_it_not_for_the_check(monkeypatch):
    """Without it the same vectors reach the listener: the test above can fail."""
    import ipaddress

    monkeypatch.setattr(fetch, "public", lambda answer: ipaddress.ip_address(answer))
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with Listener(HEAD + b"Content-Length: 1\r\n\r\nx") as listener:
        fetcher = Fetcher(MediaOptions(hosts=("*",), ports=(listener.port,), fetch_seconds=1))

        async def each():
            for vector in VECTORS:
                with contextlib.suppress(Refused):
                    await fetcher.fetch(vector.replace("{port}", str(listener.port)))

        asyncio.run(each())
        assert listener.hits >= 10


def test_addresses_in_texts_are_only_text(vlm):
    with Listener() as listener, serving(ready(vlm), media={"hosts": ["*"], "ports": [listener.port]}) as running:
        address = f"http://127.0.0.1:{listener.port}/x.png"
        assert running.chat(f"![]({address}) <img src={address}> {address} <image>").status == 200
        assert listener.hits == 0


@pytest.mark.parametrize(
    "answer",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.5.5",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "::1",
        "::",
        "fc00::1",
        "fe80::1",
        "fe80::1%eth0",
        "ff02::1",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "2002:7f00:1::1",
        "2002:c0a8:101::1",
        "2001:0:4136:e378:8000:63bf:f5ff:fffe",
        "2001:db8::1",
        "::127.0.0.1",
        "not an address",
        "",
        "127.1",
    ],
)
def test_addresses_that_are_not_public(answer: str):
    assert public(answer) is None


@pytest.mark.parametrize("answer", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "2002:808:808::1"])
def test_addresses_that_are_public(answer: str):
    assert public(answer) is not None


def test_one_private_answer_among_public_ones():
    options = MediaOptions(hosts=("*",))
    assert said(options, "http://a.example/", [PUBLIC, "10.0.0.1"]) == "a picture could not be fetched"
    assert said(options, "http://a.example/", ["10.0.0.1"]) == said(options, "http://a.example/", [])


def test_a_name_is_looked_up_once_and_what_was_checked_is_connected_to():
    looked, connected = [], []

    async def resolve(host, port):
        looked.append(host)
        return [PUBLIC] if len(looked) == 1 else ["127.0.0.1"]

    async def connect(ip, port, context, name):
        connected.append((ip, port, name))
        return await asyncio.open_connection("127.0.0.1", listener.port)

    with Listener(HEAD + b"Content-Length: 3\r\n\r\nabc") as listener:
        fetcher = Fetcher(MediaOptions(hosts=("a.example",)), resolve, connect)
        assert asyncio.run(fetcher.fetch("http://A.Example./x?y=1#z")) == b"abc"
        assert looked == ["a.example"] and connected == [(PUBLIC, 80, "a.example")] and listener.hits == 1
        request = listener.requests[0]
        assert request.startswith(b"GET /x?y=1 HTTP/1.1\r\n") and b"\r\nHost: a.example\r\n" in request
        assert b"cookie" not in request.lower() and b"authorization" not in request.lower()


@pytest.mark.parametrize(
    ("rules", "host", "good"),
    [
        ((), "a.example", False),
        (("a.example",), "a.example", True),
        (("a.example",), "b.a.example", False),
        (("*.a.example",), "b.a.example", True),
        (("*.a.example",), "a.example", False),
        (("A.Example.",), "a.example", True),
        (("*.a.example",), "evila.example", False),
        (("a.example",), "a.example.evil", False),
        (("*",), "x", True),
    ],
)
def test_the_list_of_hosts(rules, host, good):
    assert allowed(parse(f"http://{host}/"), MediaOptions(hosts=rules)) == good


def test_ports():
    options = MediaOptions(hosts=("*",))
    assert allowed(parse("http://a.example/"), options) and allowed(parse("https://a.example:443/"), options)
    for port in (22, 8080, 6379):
        assert not allowed(parse(f"http://a.example:{port}/"), options)


def fetched(answers: dict[str, bytes], url: str, pause: float = 0.0, **options):
    """A fetch of ``url`` where each host of ``answers`` is a listener: the bytes or the refusal, and the hits."""
    listeners = {host: Listener(answer, pause=pause) for host, answer in answers.items()}

    async def resolve(host, port):
        return [PUBLIC] if host in listeners else ["127.0.0.1"]

    async def connect(ip, port, context, name):
        host = asked[-1]
        return await asyncio.open_connection("127.0.0.1", listeners[host].port)

    asked: list[str] = []

    async def watched(host, port):
        asked.append(host)
        return await resolve(host, port)

    for listener in listeners.values():
        listener.__enter__()
    try:
        fetcher = Fetcher(MediaOptions(**{"hosts": ("*",), "fetch_seconds": 2.0, **options}), watched, connect)
        try:
            found: bytes | str = asyncio.run(fetcher.fetch(url))
        except Refused as error:
            found = str(error)
        return found, {host: listener.hits for host, listener in listeners.items()}
    finally:
        for listener in listeners.values():
            listener.__exit__()


def redirect(to: str) -> bytes:
    return b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + to.encode() + b"\r\n\r\n"


FINE = HEAD + b"Content-Length: 4\r\n\r\nfine"


def test_redirects_are_followed_and_checked():
    for to in ("http://b.example/x", "//b.example/x", "http://b.example"):
        assert fetched({"a.example": redirect(to), "b.example": FINE}, "http://a.example/") == (
            b"fine",
            {"a.example": 1, "b.example": 1},
        )
    found, hits = fetched(
        {"a.example": redirect("http://b.example/"), "b.example": FINE}, "http://a.example/", hosts=("a.example",)
    )
    assert isinstance(found, str) and hits["b.example"] == 0
    for to in (
        "http://127.0.0.1/",
        "http://localhost/",
        "file:///etc/passwd",
        "http://[::1]/",
        "gopher://x/",
        "http://evil@127.0.0.1/",
        "\\\\x",
        "",
    ):
        found, hits = fetched({"a.example": redirect(to)}, "http://a.example/")
        assert isinstance(found, str) and "127" not in found and hits["a.example"] <= 4, to


def test_redirects_end():
    found, hits = fetched({"a.example": redirect("http://a.example/again")}, "http://a.example/")
    assert found == "the address of a picture redirects too often" and hits["a.example"] == 4
    found, hits = fetched({"a.example": redirect("/again")}, "http://a.example/", redirects=0)
    assert hits["a.example"] == 1


def test_no_step_down_from_https(monkeypatch):
    fetcher = Fetcher(MediaOptions(hosts=("*",)))
    replies = iter(["http://b.example/"])

    async def get(address):
        return next(replies)

    monkeypatch.setattr(fetcher, "_get", get)
    with pytest.raises(Refused):
        asyncio.run(fetcher.fetch("https://a.example/"))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\nsecret",
        b"HTTP/1.1 500 X\r\n\r\n",
        b"",
        b"garbage\r\n\r\n",
        b"\0" * 100,
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 100,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 3000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"400\r\n"
        + b"x" * 1024
        + b"\r\n400\r\n"
        + b"x" * 1024
        + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20_000,
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b"0" * 10**6),
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10**6,
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 2000,
    ],
)
def test_answers_that_are_not_believed(answer: bytes):
    found, _ = fetched({"a.example": answer}, "http://a.example/", picture_bytes=1000)
    assert isinstance(found, str) and "secret" not in found and "404" not in found


def test_a_slow_drip_has_an_end():
    start = time.monotonic()
    found, _ = fetched(
        {"a.example": HEAD + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000},
        "http://a.example/",
        0.05,
        fetch_seconds=0.4,
    )
    assert found == "a picture could not be fetched in time" and time.monotonic() - start < 20  # the whole takes 50


def test_no_proxy_of_the_environment(monkeypatch):
    with Listener() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert fetched({"a.example": FINE}, "http://a.example/")[0] == b"fine"
        assert proxy.hits == 0


def test_a_fetched_picture_is_answered_about(vlm):
    body = encoded()
    with Listener(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body) as listener:

        async def resolve(host, port):
            return [PUBLIC]

        async def connect(ip, port, context, name):
            return await asyncio.open_connection("127.0.0.1", listener.port)

        options = MediaOptions(hosts=("pictures.example",))
        gate = Gate(options, Fetcher(options, resolve, connect))
        with serving(ready(vlm), gate=gate, media={"hosts": ["pictures.example"]}) as running:
            far = running.chat(shows("http://pictures.example/cat.png"), temperature=0, max_tokens=8)
            assert far.status == 200 and far.text == running.chat(shows(None), temperature=0, max_tokens=8).text
            listener.answer = HEAD + b"Content-Length: 5\r\n\r\nno no"
            refused = running.chat(shows("http://pictures.example/cat.png"))
            assert refused.status == 400 and "is not PNG" in refused.error["message"]
            assert b'chiasm:media_rejections_total{reason="decode"} 1' in running.get("/metrics").body


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a picture in it, and a secret beside it."""
    root = (tmp_path / "open").resolve()
    (root / "inner").mkdir(parents=True)
    (root / "cat.png").write_bytes(encoded())
    (root / "inner" / "a b.png").write_bytes(encoded())
    for outside in (tmp_path / "secret.png", tmp_path / "open_too" / "secret.png"):
        outside.parent.mkdir(exist_ok=True)
        outside.write_bytes(encoded())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.png")
    (root / "large.png").write_bytes(b"x" * 5000)
    return root


def test_files_of_the_root(root: Path, vlm):
    options = MediaOptions(root=str(root))
    assert read(f"file://{root}/cat.png", options) == encoded() == read(f"FILE://{root}/inner/a%20b.png", options)
    with serving(ready(vlm), media={"root": str(root)}) as running:
        near = running.chat(shows(f"file://{root}/cat.png"), temperature=0, max_tokens=8)
        assert near.status == 200 and near.text == running.chat(shows(None), temperature=0, max_tokens=8).text
        refused = running.chat(shows(f"file://{root}/../secret.png"))
        assert refused.status == 400 and str(root) not in refused.error["message"]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://localhost{root}/cat.png",
        "file://{root}/../secret.png",
        "file://{root}/%2e%2e/secret.png",
        "file://{root}/inner/../../secret.png",
        "file://{root}/link.png",
        "file://{root}/linked/secret.png",
        "file://{root}_too/secret.png",
        "file:///proc/self/environ",
        "file://{root}/pipe.png",
        "file:///dev/zero",
        "file://{root}",
        "file://{root}/",
        "file://{root}/inner",
        "file://{root}/none.png",
        "file://{root}/cat.png%00.png",
        "file://{root}//cat.png",
        "file://{root}/./cat.png",
        "file:cat.png",
        "file://{root}/cat.png?x",
        "file:\\\\{root}\\cat.png",
        "file://{root}/large.png",
        "file://evil.example{root}/cat.png",
        "file://",
        "file://{root}/" + "x" * 5000,
        "file://{root}/cat.png/x",
    ],
)
def test_files_that_are_not_of_the_root(root: Path, url: str):
    start = time.monotonic()
    with pytest.raises(Refused) as told:
        read(url.replace("{root}", str(root)), MediaOptions(root=str(root), picture_bytes=4000))
    assert "/" not in str(told.value) and time.monotonic() - start < 20  # a pipe would be waited for without end
    with pytest.raises(Refused):
        read(url.replace("{root}", str(root)), MediaOptions())


def test_no_file_stays_open(root: Path):
    before = len(os.listdir("/proc/self/fd"))
    for name in ("cat.png", "link.png", "none.png", "pipe.png", "inner/a%20b.png", "linked/secret.png"):
        with contextlib.suppress(Refused):
            read(f"file://{root}/{name}", MediaOptions(root=str(root)))
    assert len(os.listdir("/proc/self/fd")) == before
