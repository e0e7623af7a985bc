"""The page in a real browser, against the real server. Answers are scripted, so that a stop hits in the middle."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from serving_kit import Running, picture, serving

from chiasm.infer.request import Finish, Handle, Piece
from chiasm.serve.options import Served

PROGRAM = browser.find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed: the page is not tested in a browser"),
]


class Scripted:
    """Stands in for the engine: answers what ``say`` holds, a word at a time."""

    def __init__(self, vlm: Any, pause: float = 0.02):
        self.vlm, self.pause = vlm, pause
        self.say = "A **red** fox, and a dog."
        self.requests: list[Any] = []
        self.handles: list[Handle] = []
        self.healthy, self.max_queue_requests = True, 8

    def stats(self) -> dict[str, int]:
        return defaultdict(int, slots=8)  # nothing runs, nothing waits

    def stop(self, drain: float = 0) -> None:
        pass

    def submit(self, request: Any) -> Handle:
        self.requests.append(request)
        handle = Handle(request)
        self.handles.append(handle)
        threading.Thread(target=self._write, args=(handle, self.say), daemon=True).start()
        return handle

    def _write(self, handle: Handle, text: str) -> None:
        written = 0
        for word in text.split(" "):
            time.sleep(self.pause)
            if handle.cancelled:
                handle.end(Finish("cancelled", 9, written))
                return
            written += 1
            handle.put(Piece(word if written == 1 else " " + word))
        handle.end(Finish("stop", 9, written))


@pytest.fixture(scope="module")
def engines(vlm) -> dict[str, Scripted]:
    return {"first": Scripted(vlm), "second": Scripted(vlm)}


@pytest.fixture(scope="module")
def server(vlm, engines) -> Iterator[Running]:
    with serving(*(Served.ready(name, engine, vlm) for name, engine in engines.items()), page=True) as made:
        yield made


@pytest.fixture(scope="module")
def program() -> Iterator[browser.Browser]:
    made = browser.Browser(str(PROGRAM))
    yield made
    made.close()


@pytest.fixture
def page(program: browser.Browser, server: Running, engines) -> Iterator[browser.Browser]:
    """The page as a new visitor sees it; afterwards nothing may have gone wrong in it."""
    for engine in engines.values():
        engine.say, engine.pause = "A **red** fox, and a dog.", 0.02
        engine.requests.clear()
        engine.handles.clear()
    program.size(1200, 860)
    program.errors.clear()
    program.go(server.url + "/")
    program.js("(localStorage.clear(), sessionStorage.clear(), 1)")
    program.go(server.url + "/?" + str(time.monotonic_ns()))
    program.wait("document.querySelector('#model-0').value === 'first'")
    yield program
    assert program.errors == []


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    picture((40, 24)).save(path)
    return path


DONE = "!document.querySelector('#send').hidden && document.querySelector('.turn:last-child .below .tools')"


def say(page: browser.Browser, text: str, wait: bool = True) -> None:
    page.js("document.querySelector('#question').focus()")
    page.write(text)
    page.key("Enter", 13, "\r")
    page.wait("document.querySelector('#question').value === ''")
    if wait:
        page.wait(DONE)


def answers(page: browser.Browser) -> list[str]:
    return page.js("[...document.querySelectorAll('.answer .text')].map((e) => e.innerText.trim())")


def test_a_picture_is_sent_and_an_answer_streams(page, engines, red: Path):
    engines["first"].say = "One **two** three four five six seven eight nine ten."
    engines["first"].pause = 0.1
    page.files("#file", red)
    page.wait("document.querySelectorAll('#pictures li img').length === 1")
    say(page, "What is it?", wait=False)
    page.wait("document.querySelector('.answer .text').innerText.includes('One')")
    assert "ten" not in answers(page)[0] and page.js("document.querySelector('#send').hidden")
    page.wait(DONE)
    assert answers(page) == ["One two three four five six seven eight nine ten."]
    assert page.js("document.querySelector('.answer strong').textContent") == "two"
    told = page.js("document.querySelector('.speed').textContent")
    assert "first token" in told and "tokens/s" in told and "10 tokens" in told
    (request,) = engines["first"].requests
    assert [part.kind for part in request.messages[0].media] == ["image"]
    assert request.messages[0].media[0].data.size == (40, 24)  # the file as it was, not drawn again
    assert request.sampling.temperature == 0 and request.sampling.max_new_tokens == 512


def test_stop_keeps_what_was_said_and_ends_the_work(page, engines):
    engines["first"].say, engines["first"].pause = " ".join(map(str, range(400))), 0.05
    say(page, "Count", wait=False)
    page.wait("document.querySelector('.answer .text').innerText.includes('4')")
    page.key("Escape", 27)
    page.wait(DONE)
    assert "stopped" in answers(page)[0] and "300" not in answers(page)[0]
    deadline = time.monotonic() + 5
    while engines["first"].handles[0].finish is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engines["first"].handles[0].finish.reason == "cancelled"


def test_retry_and_edit(page, engines, red: Path):
    page.files("#file", red)
    page.wait("document.querySelectorAll('#pictures li img').length === 1")
    say(page, "First")
    engines["first"].say = "Another answer."
    page.click("button[title='Try again']")
    page.wait("document.querySelector('.answer .text').innerText.includes('Another')")
    page.wait(DONE)
    assert len(answers(page)) == 1
    say(page, "Second")
    sent = engines["first"].requests[-1].messages
    assert [(m.role, m.text) for m in sent] == [("user", "First"), ("assistant", "Another answer."), ("user", "Second")]
    page.click(".turn:nth-child(1) button[title='Edit']")
    page.wait(
        "document.querySelector('#question').value === 'First' && document.querySelectorAll('#pictures li').length"
    )
    page.write(" edited")
    page.key("Enter", 13, "\r")
    page.wait("document.querySelectorAll('.turn').length === 1")
    page.wait(DONE)
    sent = engines["first"].requests[-1].messages
    assert len(sent) == 1 and "edited" in sent[0].text and len(sent[0].media) == 1


def test_two_models_side_by_side(page, engines):
    engines["second"].say = "A blue whale."
    page.click("#two")
    say(page, "Who?")
    assert answers(page) == ["A red fox, and a dog.", "A blue whale."]
    boxes = page.js("[...document.querySelectorAll('.answer')].map((e) => e.getBoundingClientRect().x)")
    assert boxes[1] > boxes[0] + 100
    say(page, "And?")
    assert [m.text for m in engines["second"].requests[-1].messages] == ["Who?", "A blue whale.", "And?"]


def test_a_conversation_is_there_again_after_a_reload(page, server, red: Path):
    page.files("#file", red)
    page.wait("document.querySelectorAll('#pictures li img').length === 1")
    say(page, "Remember me")
    page.go(server.url + "/?again")
    page.wait("document.querySelector('#list .open')")
    page.click("#list .open")
    page.wait("document.querySelector('.strip img')?.naturalWidth === 40")
    assert answers(page) == ["A red fox, and a dog."]
    page.click("#list .icon")
    page.wait("!document.querySelector('#list .open') && !document.querySelector('.turn')")


def test_where_it_looked(page, engines, red: Path):
    page.files("#file", red)
    page.wait("document.querySelectorAll('#pictures li img').length === 1")
    engines["first"].say = "A red fox."
    say(page, "What?")
    page.click("button[title='Where it looked']")
    page.wait("document.querySelector('.look figure canvas')")
    page.click(".look .word:nth-child(2)")
    page.wait("document.querySelector('.look .told').textContent.includes('“red”')")
    shown = page.js(
        "(() => { const c = document.querySelector('.look canvas'); const i = document.querySelector('.look img');"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " return [c.width, c.height, new Set(d).size, Math.abs(c.clientWidth - i.clientWidth)]; })()"
    )
    assert shown[:2] == [40, 24] and shown[2] > 4 and shown[3] <= 1
    assert drawn(page)
    page.click(".look .choice button:nth-child(2)")
    page.wait("document.querySelector('.look .told').textContent.startsWith('Gradient')")
    page.click("button[title='Inside the model']")
    page.wait("document.querySelectorAll('#stages tbody tr').length > 4")
    page.key("Escape", 27)
    page.wait("!document.querySelector('#stages-box').open")


def drawn(page: browser.Browser) -> bool:
    """Whether each map lies exactly on its picture, which has its own shape."""
    return page.js(
        "[...document.querySelectorAll('.look figure')].every((f) => { const i = f.querySelector('img'),"
        " a = i.getBoundingClientRect(), b = f.querySelector('canvas').getBoundingClientRect();"
        " return ['x', 'y', 'width', 'height'].every((k) => Math.abs(a[k] - b[k]) < 1)"
        " && Math.abs(a.width / a.height - i.naturalWidth / i.naturalHeight) < 0.02; })"
    )


@pytest.mark.parametrize("size", [(600, 400), (300, 900), (1600, 200)])
def test_the_map_lies_on_the_picture_whatever_its_shape(page, engines, tmp_path: Path, size):
    picture(size).save(tmp_path / "any.png")
    page.files("#file", tmp_path / "any.png")
    page.wait("document.querySelectorAll('#pictures li img').length === 1")
    engines["first"].say = "A fox."
    say(page, "What?")
    page.click("button[title='Where it looked']")
    page.wait("document.querySelector('.look figure canvas')")
    page.wait("document.querySelector('.look figure img').complete")
    assert drawn(page)
    page.size(360, 700, phone=True)
    page.wait("innerWidth === 360")
    assert drawn(page) and page.js("document.documentElement.scrollWidth") <= 360


def test_themes_and_a_phones_width(page):
    say(page, "A question that is long enough to need more than one line on the screen of a phone, surely")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.js(colour)
    page.click("#theme")
    assert page.js("document.documentElement.dataset.theme") == "dark" and page.js(colour) != light
    page.size(360, 700, phone=True)
    page.wait("innerWidth === 360")
    assert page.js("document.documentElement.scrollWidth") <= 360
    box = page.js("document.querySelector('#composer').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0 and box["right"] <= 360 and box["bottom"] <= 700
    page.wait("document.querySelector('aside').getBoundingClientRect().right <= 0")
    page.js("document.querySelector('#menu').click()")
    page.wait("document.querySelector('aside').getBoundingClientRect().left >= 0")
    page.key("Escape", 27)
    page.wait("document.querySelector('aside').getBoundingClientRect().right <= 0")


def test_drop_paste_and_camera(page):
    page.js(
        """(async () => {
        const canvas = document.createElement('canvas'); canvas.width = 30; canvas.height = 20;
        const blob = await new Promise((done) => canvas.toBlob(done, 'image/png'));
        const file = new File([blob], 'drawn.png', {type: 'image/png'});
        const transfer = () => { const made = new DataTransfer(); made.items.add(file); return made; };
        dispatchEvent(new DragEvent('dragenter', {dataTransfer: transfer(), bubbles: true}));
        window.dropping = !document.querySelector('#drop').hidden;
        document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer(), bubbles: true, cancelable: true}));
        document.querySelector('#question').dispatchEvent(
          new ClipboardEvent('paste', {clipboardData: transfer(), bubbles: true, cancelable: true}));
    })()"""
    )
    page.wait("document.querySelectorAll('#pictures li').length === 2")
    assert page.js("window.dropping") and page.js("document.querySelector('#drop').hidden")
    page.click("#camera")
    page.wait("document.querySelector('#video').videoWidth > 0")
    page.click("#shoot")
    page.wait("document.querySelectorAll('#pictures li').length === 3 && !document.querySelector('#camera-box').open")
    page.wait("document.querySelector('#video').srcObject === null")
    page.click("#pictures .away")
    page.wait("document.querySelectorAll('#pictures li').length === 2")


PAYLOADS = [
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "[a](javascript:window.hit=1)",
    "![a](x\" onerror=\"window.hit=1)",
    "[a](https://x\" onclick=\"window.hit=1)",
    "`</code><svg onload=window.hit=1>`",
    "```js\" onload=window.hit=1\n</pre><script>window.hit=1</script>\n```",
    "| <img src=x onerror=window.hit=1> | b |\n|---|---|\n| <iframe srcdoc='<script>parent.hit=1</script>'> | c |",
    "> <a href='javascript:window.hit=1'>x</a>",
    "&lt;script&gt;window.hit=1&lt;/script&gt; &#x3C;script>",
    "<style>*{display:none}</style><form action=//evil><input name=a></form><base href=//evil>",
]  # fmt: skip


ALLOWED = {
    *("p", "br", "strong", "em", "del", "code", "pre", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr"),
    *("table", "thead", "tbody", "tr", "th", "td", "div", "a", "button", "svg", "use"),
}


def test_no_answer_runs_as_a_program(page, engines):
    engines["first"].pause = 0
    for payload in PAYLOADS:
        engines["first"].say = payload
        say(page, payload)
    found = page.js(
        "[...document.querySelectorAll('.text *')]"
        ".flatMap((e) => [e.localName, ...[...e.attributes].map((a) => '@' + a.name)])"
    )
    assert {name for name in found if not name.startswith("@")} <= ALLOWED
    assert {name for name in found if name.startswith("@")} <= {
        "@href", "@rel", "@target", "@class", "@type", "@title", "@aria-label", "@aria-hidden", "@data-language",
    }  # fmt: skip
    assert page.js("window.hit") is None
    links = page.js("[...document.querySelectorAll('.text a')].map((e) => e.protocol)")
    assert set(links) <= {"https:"}
    said = page.js("document.querySelector('.turn .bubble').textContent")
    assert said == PAYLOADS[0]


def test_an_error_is_told_and_a_key_is_asked_for(page, engines, program):
    engines["first"].healthy = False
    say(page, "Hello?")
    engines["first"].healthy = True
    assert "failed" in page.js("document.querySelector('.error').textContent")
    page.errors.clear()  # the browser notes every 500
    page.click("#settings")
    page.js("document.querySelector('#s-key').focus()")
    page.write("my key")
    page.js("document.querySelector('#s-system').focus()")
    page.write("Be brief.")
    page.js("document.querySelector('#s-seed').focus()")
    page.write("7")
    page.key("Escape", 27)
    page.wait("!document.querySelector('#settings-box').open")
    say(page, "Again")
    request = engines["first"].requests[-1]
    assert [m.role for m in request.messages] == ["system", "user"] and request.sampling.seed == 7
    kept = json.loads(page.js("JSON.stringify({...localStorage})"))
    assert "my key" not in json.dumps(kept)
