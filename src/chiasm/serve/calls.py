"""Tool calls read out of an answer while it is written, by the form in which the model's template writes them.

Where the template opens a call with a control token, only that token opens one: text that spells it stays text. Names
must be of tools that were offered. What begins like a call and is none is given out as the text it is.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from chiasm.infer.stream import overlap

LONGEST = 1024  # characters in which a call's name must have come to be given out before its end

Delta = dict[str, Any]


@dataclass
class Scanner:
    """Finds the end of a JSON object that is read piece by piece. ``marks`` never stand in JSON and end it too."""

    marks: Collection[str] = ()
    depth: int = 0
    string: bool = False
    escape: bool = False

    def feed(self, text: str) -> int:
        """How many characters belong to it; as many as there are while it goes on."""
        for place, character in enumerate(text):
            if character in self.marks:
                return place
            if self.escape:
                self.escape = False
            elif self.string:
                self.escape, self.string = character == "\\", character != '"'
            elif character == '"':
                self.string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    return place + 1
        return len(text)


@dataclass
class Calls:
    """Reads one answer. ``push`` and ``flush`` give text that is no call, and deltas of calls as OpenAI streams them.

    ``form`` holds the marks' characters for control tokens, ``marks`` what each of them spells. ``begun``: the prompt
    holds the opening already, and with ``name`` the name too. ``single``: what follows the first call is left out.
    """

    form: Any = None  # a CallForm here, other forms in subclasses
    names: Mapping[str, Any] = field(default_factory=dict)  # of the tools, with the schemas of their arguments
    marks: dict[str, str] = field(default_factory=dict)
    begun: bool = False
    name: str = ""
    single: bool = False
    count: int = 0
    unfinished: bool = False  # whether the answer ended within the arguments of a call

    def __post_init__(self) -> None:
        self._buffer = self._raw = ""
        self._out: list[str] = []
        self._deltas: list[Delta] = []
        self._scanner = Scanner(self.marks)
        self._state = self._plain
        if self.form is not None:
            self._opening, self._closing = self.form.opening.strip(), self.form.closing.strip()
            self._state = self._open if self.begun else self._text if self._opening else self._first
            self._prepare()
            if self.begun and self.name:
                self._call(self.name)
                self._state = self._arguments

    def _prepare(self) -> None:
        """What is made of the form once."""
        f = self.form
        keys = rf'\{{\s*"{re.escape(f.name)}"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{re.escape(f.arguments)}"\s*:\s*'
        self._head_of = re.compile(keys + r"(?=\{)")

    def push(self, text: str) -> tuple[str, list[Delta]]:
        """The text that is none, and what is known of calls now."""
        self._buffer += text
        while self._state():
            pass
        return self._taken()

    def flush(self, cut: bool = False) -> tuple[str, list[Delta]]:
        """What was held back at the end; ``cut``: the answer has no end of its own."""
        self._finish(cut)
        if not self.unfinished and self._state != self._nothing:
            held = self._raw + self._buffer
            between = self._state in (self._close, self._open)
            blank = self.count and not held.strip("[], \t\r\n" if between else None)  # behind a call it says nothing
            self._out.append("" if blank else held)
        self._buffer = self._raw = ""
        return self._taken()

    def _finish(self, cut: bool) -> None:
        """Nothing follows."""
        self.unfinished = self._state == self._arguments

    def _taken(self) -> tuple[str, list[Delta]]:
        text, deltas = self._spelled("".join(self._out)), self._deltas
        self._out, self._deltas = [], []
        return text, deltas

    def _spelled(self, text: str) -> str:
        return text.translate({ord(mark): token for mark, token in self.marks.items()}) if self.marks else text

    # ------------------------------------------------------------------------------------------------ states
    # Each reads what it can of the buffer and says whether another state has work to do.

    def _plain(self) -> bool:
        """No call can come."""
        self._out.append(self._buffer)
        self._buffer = ""
        return False

    def _nothing(self) -> bool:
        """What follows is left out."""
        self._buffer = ""
        return False

    def _text(self) -> bool:
        """Between calls: pass text on until one opens."""
        place = self._buffer.find(self._opening)
        if place < 0:
            held = overlap(self._buffer, self._opening)
            sure = len(self._buffer[: len(self._buffer) - held].rstrip())  # white space before a call is none's
            self._out.append(self._buffer[:sure])
            self._buffer = self._buffer[sure:]
            return False
        end, sure = place + len(self._opening), len(self._buffer[:place].rstrip())
        self._out.append(self._buffer[:sure])
        self._raw, self._buffer = self._buffer[sure:end], self._buffer[end:]
        self._state = self._open
        return True

    def _first(self) -> bool:
        """At the beginning of an answer whose calls nothing opens."""
        ahead = self._buffer.lstrip()
        if ahead:
            self._state = self._open if ahead[0] in "{[" else self._plain
        return bool(ahead)

    def _open(self) -> bool:
        """Before a call's JSON, or its name."""
        if self.form.named is not None:
            return self._named(self.form.named)
        between = "[, \t\r\n" if self.form.many else " \t\r\n"
        self._keep(len(self._buffer) - len(self._buffer.lstrip(between)))
        if not self._buffer:
            return False
        if self._buffer[0] == "{":
            self._scanner = Scanner(self.marks)
            self._scanned = 0
            self._state = self._head
            return True
        if self.form.many and self._buffer[0] == "]" and self.count:
            self._buffer, self._raw = self._buffer[1:], ""
            self._state = self._close
            return True
        return self._none()

    def _named(self, between: str) -> bool:
        """A name that stands before its arguments."""
        mark = between.strip() or "{"
        place = self._buffer.find(mark)
        if place < 0:
            return self._none() if len(self._buffer) > LONGEST else False
        name, end = self._buffer[:place].strip(), place + (len(mark) if mark != "{" else 0)
        if not self._buffer[end:].strip():
            return False
        if name not in self.names or self._buffer[end:].lstrip()[0] != "{":
            return self._none()
        self._buffer = self._buffer[end:].lstrip()
        self._call(name)
        self._state = self._arguments
        return True

    def _head(self) -> bool:
        """In an object: its name, then its arguments; else all of it at its end."""
        match = self._head_of.match(self._buffer) if len(self._buffer) < LONGEST else None
        name = _string(match.group(1)) if match else None
        if match and name in self.names:
            self._buffer = self._buffer[match.end() :]
            self._call(name or "")
            self._state = self._arguments
            return True
        self._scanned += self._scanner.feed(self._buffer[self._scanned :])
        if self._scanner.depth > 0 and self._scanned == len(self._buffer):
            return False
        return self._whole(self._buffer[: self._scanned]) or self._none()

    def _whole(self, text: str) -> bool:
        """A call of which all has come."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return False
        name, arguments = found.get(self.form.name), found.get(self.form.arguments)
        if not isinstance(name, str) or name not in self.names or not isinstance(arguments, dict | str):
            return False
        self._call(name)
        self._give(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
        self._buffer = self._buffer[len(text) :]
        self._state = self._close if not self.form.many else self._open
        return self._ended()

    def _arguments(self) -> bool:
        """In the arguments, which are given out as they come."""
        before = self._scanner.depth
        if not before:
            self._buffer = self._buffer.lstrip()
        end = self._scanner.feed(self._buffer)
        done = self._scanner.depth <= 0 < max(before, end)
        cut = end < len(self._buffer) and not done
        self._give(self._buffer[:end])
        self._buffer = self._buffer[end:]
        if not done and not cut:
            return False
        bare = self.form.named is not None or (self.begun and bool(self.name))
        self._scanner = Scanner(self.marks, depth=1)
        self._state = self._close if bare or cut else self._tail
        return self._ended() if bare or cut else True

    def _tail(self) -> bool:
        """Behind the arguments, to the end of their object."""
        end = self._scanner.feed(self._buffer)
        done = self._scanner.depth <= 0 or end < len(self._buffer)
        self._buffer = self._buffer[end:]
        if done:
            self._state = self._open if self.form.many else self._close
        return done and self._ended()

    def _close(self) -> bool:
        """Behind a call: what closes it, and what may follow."""
        ahead = self._buffer.lstrip() if self._opening else self._buffer.lstrip("; \t\r\n")
        if not ahead or (self._closing != ahead and self._closing.startswith(ahead)):
            return False
        self._buffer = ahead.removeprefix(self._closing) if self._closing else ahead
        self._state = self._text if self._opening else self._first
        return bool(self._buffer)

    # ------------------------------------------------------------------------------------------------ steps

    def _keep(self, count: int) -> None:
        """White space and brackets, which are text again where no call follows."""
        self._raw += self._buffer[:count]
        self._buffer = self._buffer[count:]

    def _none(self) -> bool:
        """It was no call."""
        self._out.append(self._raw)
        self._raw = ""
        if not self._opening or self.begun:
            self._state = self._plain
        else:  # another may open behind the first character
            self._out.append(self._buffer[:1])
            self._buffer = self._buffer[1:]
            self._state = self._text
        return bool(self._buffer)

    def _call(self, name: str) -> None:
        self._raw = ""
        self._scanner = Scanner(self.marks)
        head = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        self._deltas.append({"index": self.count, **head, "function": {"name": name, "arguments": ""}})
        self.count += 1

    def _give(self, arguments: str) -> None:
        if arguments:
            self._deltas.append({"index": self.count - 1, "function": {"arguments": self._spelled(arguments)}})

    def _ended(self) -> bool:
        """A call has ended."""
        if self.single:
            self._state = self._nothing
        return True


def joined(deltas: list[Delta]) -> list[dict[str, Any]]:
    """The whole calls of an answer."""
    found: list[dict[str, Any]] = []
    for delta in deltas:
        if delta["index"] == len(found):
            call = {key: value for key, value in delta.items() if key != "index"}
            found.append({**call, "function": dict(call["function"])})
        else:
            found[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return found


def _string(text: str) -> str | None:
    try:
        return str(json.loads(text))
    except ValueError:
        return None
