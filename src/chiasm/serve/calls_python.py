"""Calls as Python writes them: ``[weather(city="Oslo"), time()]``, and ``<|python_tag|>weather.call(city="Oslo")``.

A call is given out when its bracket closes and all its arguments are literals. Where the second form stands beside
calls in JSON (Llama 3.1), JSON behind its tag is read too: models write both.
"""

from __future__ import annotations

import json
import re

from chiasm.processing.tools import PythonForm
from chiasm.serve.calls import Calls
from chiasm.serve.values import LONG, read_keywords

NAME = re.compile(r"[A-Za-z0-9_.-]{0,70}")


class PythonCalls(Calls):
    """Reads answers whose calls are written so, alone or beside JSON. See ``Calls``."""

    def _prepare(self) -> None:
        self._both = not isinstance(self.form, PythonForm)
        python = self.form.python if self._both else self.form
        self._tag, self._called = python.opening.strip(), python.called
        self._list, self._end = not self._both and bool(self._closing), self._closing
        if self._both:
            super()._prepare()
        elif self._list:  # a bracket within a text opens nothing
            self._opening, self._closing, self._state = "", "", self._first

    def _finish(self, cut: bool) -> None:
        super()._finish(cut)
        if self._list and self.count and not (self._raw + self._buffer).strip(", \t\r\n"):
            self._raw = self._buffer = ""

    def _first(self) -> bool:
        """At the beginning of an answer: the tag, or the list's bracket, or what the JSON form has there."""
        ahead = self._buffer.lstrip()
        if ahead.startswith(self._tag):
            self._raw, self._buffer = self._tag, ahead.removeprefix(self._tag)
            self._state = self._behind_tag if self._both else self._named_call
            return True
        if ahead and self._tag.startswith(ahead):
            return False
        if self._both:
            return super()._first()
        if ahead:
            self._state = self._plain
        return bool(ahead)

    def _behind_tag(self) -> bool:
        ahead = self._buffer.lstrip()
        if ahead:
            self._state = self._open if ahead[0] in "{[" else self._named_call
        return bool(ahead)

    def _open(self) -> bool:
        return super()._open() if self._both else self._named_call()

    def _named_call(self) -> bool:
        """A name and its bracket; in a list, what separates calls or ends it."""
        if self._list and self.count:
            ahead = self._buffer.lstrip(", \t\r\n")
            if ahead.startswith(self._end):
                self._raw, self._buffer, self._state = "", ahead.removeprefix(self._end), self._close
                return True
            self._raw += self._buffer[: len(self._buffer) - len(ahead)]
            self._buffer = ahead
        ahead = self._buffer.lstrip()
        name, called, _ = ahead.partition(self._called)
        if not called:
            word = NAME.match(ahead)
            assert word is not None
            rest = ahead[word.end() :]
            return self._none() if rest and not self._called.startswith(rest) else False
        if name not in self.names:
            return self._none()
        self._raw += self._buffer[: len(self._buffer) - len(ahead)] + name + called
        self._buffer, self._name, self._place = ahead[len(name) + len(called) :], name, 0
        self._quote, self._depth, self._skip = "", 1, False
        self._state = self._keywords
        return True

    def _keywords(self) -> bool:
        """To the bracket that closes the call, outside strings."""
        for place in range(self._place, len(self._buffer)):
            character = self._buffer[place]
            if self._skip:
                self._skip = False
            elif self._quote:
                self._skip, self._quote = character == "\\", "" if character == self._quote else self._quote
            elif character in "\"'":
                self._quote = character
            elif character in "([{":
                self._depth += 1
            elif character in ")]}":
                self._depth -= 1
                if not self._depth:
                    return self._read(place)
        self._place = len(self._buffer)
        return self._none() if self._place > LONG else False

    def _read(self, place: int) -> bool:
        """The arguments are complete."""
        try:
            found = read_keywords(self._buffer[:place])
            arguments = json.dumps(found, ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return self._none()
        self._buffer = self._buffer[place + 1 :]
        self._call(self._name)
        self._give(arguments)
        self._state = self._named_call if self._list else self._close
        return self._ended()


__all__ = ["PythonCalls"]
