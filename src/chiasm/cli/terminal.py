"""What a conversation in a terminal needs: pictures named in a line, small previews, text without control codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from chiasm.cli.options import PICTURES, SOUNDS, VIDEOS

# A dragged file arrives as its path: in quotes, with escaped blanks, or as a file:// address. Texts hold apostrophes,
# so quotes count only where a word begins.
_WORD = re.compile(r"""(?<!\S)(?:'(?P<single>[^'\n]+)'|"(?P<double>[^"\n]+)"|(?P<bare>(?:\\.|[^\s\\])+))""")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
BLOCK = "▀"  # its colour is the upper pixel, the colour behind it the lower one


def files_in(line: str) -> tuple[list[str], str]:
    """The pictures and clips that a line names, and the rest of it: ``cat.png what is this?``.

    Only a file that is there counts; everything else stays text, to the letter.
    """
    whole = _file(line.strip())
    if whole:
        return [whole], ""
    found: list[str] = []
    kept: list[str] = []
    end = 0
    for match in _WORD.finditer(line):
        name = match["single"] or match["double"] or _unescaped(match["bare"])
        path = _file(name)
        if path is None and match["bare"]:
            path = _file(match["bare"])
        if path:
            found.append(path)
            kept.append(line[end : match.start()].rstrip())
            end = match.end()
    kept.append(line[end:])
    return found, "".join(kept).strip() if found else line.strip()


def missing(line: str) -> list[str]:
    """The words of a line that look like pictures or clips and are none that is there."""
    words = (match["single"] or match["double"] or _unescaped(match["bare"]) for match in _WORD.finditer(line))
    names = [word.rstrip("?!.,;:") for word in words]
    return [name for name in names if Path(name).suffix.lower() in PICTURES | VIDEOS | SOUNDS and _file(name) is None]


def _unescaped(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word)


def _file(name: str) -> str | None:
    """The path of a picture or clip that exists, from a name as a terminal or a user writes it."""
    if name[:7].lower() == "file://":
        parts = urlsplit(name)
        if parts.netloc not in ("", "localhost"):
            return None
        name = unquote(parts.path)
        if re.match(r"/[A-Za-z]:", name):  # file:///C:/cat.png
            name = name[1:]
    if not name or len(name) > 4096 or "\0" in name:
        return None
    path = Path(name)
    if path.suffix.lower() not in PICTURES | VIDEOS | SOUNDS:
        return None
    try:
        path = path.expanduser()
        return str(path) if path.is_file() else None
    except (OSError, RuntimeError, ValueError):
        return None


def clean(text: str) -> str:
    """Text that can be written to a terminal: no control codes, with which an answer could move the cursor or worse."""
    return _CONTROLS.sub("", text)


def preview(picture: Any, width: int = 40, height: int = 12) -> Any:
    """A picture as rich text of half blocks, at most ``width`` columns and ``height`` lines."""
    from rich.text import Text

    scale = min(width / picture.width, 2 * height / picture.height, 1.0)
    columns, rows = max(1, round(picture.width * scale)), max(2, round(picture.height * scale))
    small = picture.convert("RGB").resize((columns, rows + rows % 2))
    lines = []
    for top in range(0, small.height, 2):
        line = Text()
        for x in range(columns):
            upper, lower = small.getpixel((x, top)), small.getpixel((x, top + 1))
            line.append(BLOCK, style=f"rgb({_comma(upper)}) on rgb({_comma(lower)})")
        lines.append(line)
    return Text("\n").join(lines)


def _comma(colour: tuple[int, ...]) -> str:
    return ",".join(map(str, colour))


def overlay(picture: Any, values: Any) -> Any:
    """A picture with heat over it: dark where ``values [rows, columns]`` are 0, in its own colours where they peak."""
    from PIL import Image

    peak = float(values.max())
    mask = Image.fromarray(((values / peak if peak > 0 else values) * 215 + 40).round().byte().numpy())
    base = picture.convert("RGB")
    return Image.composite(base, Image.new("RGB", base.size), mask.resize(base.size))


def lines_of(prompt: str) -> Iterator[str]:
    """Lines as they are typed; one that ends in a backslash goes on. Ends with the input, or at Ctrl-C."""
    with suppress(ImportError):  # not on every system
        import_module("readline")  # gives input() its history and its keys
    while True:
        line = ""
        try:
            line = input(prompt)
            while line.endswith("\\") and not line.endswith("\\\\"):
                line = line[:-1] + "\n" + input("… ")
        except (EOFError, KeyboardInterrupt):
            return
        yield line
