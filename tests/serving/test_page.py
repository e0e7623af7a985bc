"""The page's files and its two questions, over a socket; its Markdown in node."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from serving_kit import Running, ready, serving

from chiasm.infer.look import look
from chiasm.serve import page
from chiasm.types import Image as Picture
from chiasm.types import Message, Text

FOLDER = Path(page.FOLDER)


@pytest.fixture(scope="module")
def paged(vlm) -> Iterator[Running]:
    with serving(ready(vlm), page=True) as made:
        yield made


def data_url(size: tuple[int, int] = (24, 16), kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(url: str, text: str = "What?") -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_files_come_with_their_kind_and_the_policy(paged):
    for path in FOLDER.iterdir():
        reply = paged.get("/" if path.name == "index.html" else f"/page/{path.name}")
        assert reply.status == 200 and reply.body == path.read_bytes()
        assert reply.headers["content-type"] == page.KINDS[path.suffix]
        assert "script-src 'self'" in reply.headers["content-security-policy"]
        assert "unsafe" not in reply.headers["content-security-policy"]
        again = paged.get(
            "/" if path.name == "index.html" else f"/page/{path.name}", {"If-None-Match": reply.headers["etag"]}
        )
        assert (again.status, again.body) == (304, b"")
    assert paged.get("/favicon.ico").status == 200


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/../page.py", "/page/%2e%2e/page.py", "/page/..%2fpage.py", "/page//etc/passwd", "/page/app"],
)
def test_nothing_else_is_given_out(paged, path: str):
    assert paged.get(path).status == 404


def test_nothing_is_inline_and_nothing_comes_from_elsewhere():
    """What the policy forbids would silently not work."""
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        for address in re.findall(r"""(?:src|href|url|from|import)\W{1,3}["'](\w+:)?//[^"']*""", text):
            raise AssertionError(f"{path.name} loads {address}")
        assert not re.search(r"\.innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), path.name
        if path.suffix == ".html":
            assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)|javascript:", text)
    named = set(re.findall(r'"/page/([\w.]+)"', "".join(p.read_text() for p in FOLDER.iterdir())))
    assert named <= {path.name for path in FOLDER.iterdir()}


def test_the_page_can_be_left_out(vlm):
    with serving(ready(vlm), page=False) as made:
        assert made.get("/").status == 404
        assert made.post("/chiasm/look", {}).status == 404


def test_look_answers_what_the_function_gives(paged, vlm):
    url = data_url()
    reply = paged.post("/chiasm/look", {"model": "tiny", "messages": ask(url), "answer": "A red fox.", "word": 1})
    assert reply.status == 200, reply.body
    found = reply.json
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    expected = look(vlm.model, vlm.processor, [Message("user", (Picture(picture), Text("What?")))], "A red fox.", 1)
    assert found["object"] == "chiasm.look" and found["method"] == "attention"
    assert found["word"] == {"text": "red", "start": 2, "end": 5}
    assert [word["text"] for word in found["words"]] == ["A", "red", "fox."]
    (heat,) = found["pictures"]
    assert (heat["index"], heat["frame"], heat["width"], heat["height"]) == (0, None, 24, 16)
    assert heat["share"] == pytest.approx(expected.heats[0].share, abs=1e-5)
    drawn = Image.open(io.BytesIO(base64.b64decode(heat["heat"].partition(",")[2])))
    values = expected.heats[0].values
    assert drawn.mode == "L" and drawn.size == (values.shape[1], values.shape[0])
    grey = (values / values.max() * 255).round().int().flatten().tolist()
    assert max(abs(a - b) for a, b in zip(drawn.tobytes(), grey, strict=True)) <= 1
    slope = paged.post(
        "/chiasm/look", {"model": "tiny", "messages": ask(url), "answer": "A red fox.", "method": "gradient"}
    ).json
    assert slope["method"] == "gradient" and slope["word"]["text"] == "A red fox."


def test_inspect_tells_the_stages(paged):
    found = paged.post("/chiasm/inspect", {"model": "tiny", "messages": ask(data_url())}).json
    assert found["counts"]["media tokens"] == 4
    assert {"input_ids", "logits"} <= {stage["name"] for stage in found["stages"]}
    assert "".join(row["text"] for row in found["tokens"]).find("What?") >= 0
    assert sum(candidate["probability"] for candidate in found["candidates"]) <= 1
    assert len(found["units"]) == 1
    paged.idle()


GOOD = {"model": "tiny", "messages": ask(data_url()), "answer": "A fox."}


@pytest.mark.parametrize(
    ("path", "change", "status", "told"),
    [
        ("look", {"model": "other"}, 404, "no model"),
        ("look", {"answer": " "}, 400, "empty"),
        ("look", {"answer": None}, 400, "answer"),
        ("look", {"answer": "x" * 20_001}, 400, "answer"),
        ("look", {"answer": "word " * 2000}, 400, "positions"),
        ("look", {"word": 99}, 400, "words 0 to 1"),
        ("look", {"word": -1}, 400, "word"),
        ("look", {"method": "magic"}, 400, "method"),
        ("look", {"messages": [{"role": "user", "content": "no picture"}]}, 400, "no picture"),
        ("look", {"messages": ask("http://127.0.0.1:1/x.png")}, 400, ""),
        ("look", {"messages": ask("file:///etc/passwd")}, 400, ""),
        ("look", {"messages": ask("data:image/png;base64,AAAA")}, 400, "picture"),
        ("look", {"messages": "hello"}, 400, "messages"),
        ("inspect", {"messages": []}, 400, "messages"),
        ("inspect", {"messages": ask("/etc/passwd")}, 400, ""),
    ],
)
def test_bad_questions_are_refused_in_words(paged, path: str, change: dict, status: int, told: str):
    reply = paged.post(f"/chiasm/{path}", GOOD | change)
    assert reply.status == status, reply.body
    message = reply.json["error"]["message"]
    assert told in message and "passwd" not in message and "127.0.0.1" not in message
    paged.idle()


def test_questions_need_the_key_and_the_files_do_not(vlm):
    with serving(ready(vlm), page=True, keys=("secret",)) as made:
        assert made.get("/").status == 200 and made.get("/page/app.js").status == 200
        assert made.post("/chiasm/look", GOOD).status == 401
        assert made.post("/chiasm/inspect", GOOD).status == 401
        assert made.post("/chiasm/look", GOOD, {"Authorization": "Bearer secret"}).status == 200


# ------------------------------------------------------------------------------------------------------------- Markdown

node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def trees(tmp_path: Path, *texts: str) -> list[list]:
    """What ``markdown.js`` makes of some texts, and in how many milliseconds."""
    (tmp_path / "markdown.mjs").write_bytes((FOLDER / "markdown.js").read_bytes())
    code = (
        f"import {{ parse }} from {json.dumps((tmp_path / 'markdown.mjs').as_uri())};"
        "let text = ''; for await (const piece of process.stdin) text += piece;"
        "const timed = (one) => { const begun = performance.now(); const made = parse(one);"
        " return [made, performance.now() - begun]; };"
        "console.log(JSON.stringify(JSON.parse(text).map(timed)));"
    )
    command = ["node", "--input-type=module", "-e", code]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


SAMPLE = """# Title *x*

Some **bold**, _it_ and `co*de*` ~~no~~
next https://a.example/b). [link](https://a.example "t") [bad](javascript:alert(1)) snake_case_name 2 * 3 * 4

- one
- two
  1. inner
  2. more

> quoted
> - deep

| a | b |
|---|--:|
| 1 | `2` |

```py
<b> & *x*
```
---
"""


@node
def test_markdown_of_every_kind(tmp_path: Path):
    ((blocks, _),) = trees(tmp_path, SAMPLE)
    assert [block["type"] for block in blocks] == [
        "heading", "paragraph", "list", "quote", "table", "code", "rule",
    ]  # fmt: skip
    kinds = [span["type"] for span in blocks[1]["inline"]]
    assert {"strong", "emphasis", "code", "strike", "break", "link", "text"} == set(kinds)
    addresses = [span["address"] for span in blocks[1]["inline"] if span["type"] == "link"]
    assert addresses == ["https://a.example/b", "https://a.example"]
    plain = "".join(span.get("text", "") for span in blocks[1]["inline"] if span["type"] == "text")
    assert "snake_case_name 2 * 3 * 4" in plain and "javascript" not in plain
    inner = blocks[2]["items"][1]
    assert inner[1]["type"] == "list" and inner[1]["ordered"] and len(inner[1]["items"]) == 2
    assert blocks[3]["blocks"][1]["type"] == "list"
    assert blocks[4]["rows"] == [[[{"type": "text", "text": "1"}], [{"type": "code", "text": "2"}]]]
    assert blocks[5] == {"type": "code", "language": "py", "text": "<b> & *x*"}


ADDRESSES = ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,x", "vbscript:x", "//evil", "/v1/models",
             "\x01javascript:x", "java\tscript:x", "http:evil", "https://", "blob:x", "file:///x"]  # fmt: skip


@node
def test_only_web_addresses_become_links(tmp_path: Path):
    found = trees(tmp_path, *(f"[x]({address}) ![y]({address})" for address in ADDRESSES))
    assert [address for address, made in zip(ADDRESSES, found, strict=True) if "link" in json.dumps(made)] == []


HOSTILE = ["[" * 30_000, "*" * 20_000 + "a", "> " * 5_000 + "x", "- " * 5_000, "`" * 30_000, "_a" * 10_000,
           "|" * 20_000 + "\n|-|", "**a " * 8_000, "![](" * 8_000, "~~a" * 8_000, "1. " * 5_000,
           "\\" * 30_000]  # fmt: skip


@node
def test_hostile_markdown_takes_no_time(tmp_path: Path):
    slow = [(text[:4], time) for text, (_, time) in zip(HOSTILE, trees(tmp_path, *HOSTILE), strict=True) if time > 2000]
    assert not slow
