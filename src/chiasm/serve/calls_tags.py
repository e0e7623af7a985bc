"""Calls with a tag for each argument, read while they are written (``TagForm``).

A string stands between its tags as it is, so it is given out as it comes; another value is given when its tag closes,
read by the tool's schema: JSON, or as Python writes it. A value ends at its closing tag, or, since models forget it, at
the next argument or the call's end on a line of its own.
"""

from __future__ import annotations

import json
import re
from typing import Any

from chiasm.infer.stream import overlap
from chiasm.serve.calls import LONGEST, Calls
from chiasm.serve.values import kinds_of, read_value

WORD = re.compile(r"\s*([A-Za-z0-9_.-]*)")


class TagCalls(Calls):
    """Reads answers whose calls are written so. See ``Calls``."""

    def _prepare(self) -> None:
        f = self.form
        self._ends, self._heads = _lines(f.closing), _lines(f.opening)
        self._opening, self._left = self._heads.pop(0), list(self._ends)
        self._again = self._heads[-1:]  # opens a second call within one opening
        self._opened = self.begun  # whether all of the opening has come
        self._between = re.compile(r"\s*".join(re.escape(part.strip()) for part in f.between.strip().split("\n")))
        after = f.after.strip()
        self._after = ["\n" + after, after] if f.after.startswith("\n") else [after]
        spare = ["\n" + f.before.strip(), *("\n" + end for end in self._ends[:1])]
        self._enders = [*self._after, *([] if self.begun else spare), *self.marks]
        self._longest, self._looked = max(map(len, self._enders)), 0
        self._string = self._fresh = False
        self._kinds: frozenset[str] = frozenset()
        self._some = False  # arguments of this call

    def _finish(self, cut: bool) -> None:
        if self._opened and self._buffer.strip() in self.names and not self.form.named.strip():
            self._buffer += "\n"  # a demanded call without arguments is nothing but its name
            self._open()
        if self._state == self._arguments and not cut and not self._buffer.strip():  # the closing tags were left out
            self._end_call()
        self.unfinished = self._state in (self._arguments, self._key, self._value)

    def _open(self) -> bool:
        """Behind the opening's first line: its rest, a name, and what follows names."""
        ahead, named = self._buffer, self.form.named.strip()
        for head in [] if self._opened else self._heads:
            ahead = ahead.lstrip()
            if head.startswith(ahead) and head != ahead:
                return False
            if not ahead.startswith(head):
                return self._none()
            ahead = ahead[len(head) :]
        match = WORD.match(ahead)
        assert match is not None
        behind = ahead[match.end() :]
        if (
            not behind
            or (named and not behind.strip())
            or (named != behind.strip() and named.startswith(behind.strip()))
        ):
            return self._none() if len(self._buffer) > LONGEST else False
        if match[1] not in self.names or not behind.lstrip().startswith(named):
            return self._none()
        self._buffer = behind.lstrip()[len(named) :] if named else behind
        self._call(match[1])
        self._state, self._opened = self._arguments, False
        return True

    def _call(self, name: str) -> None:
        super()._call(name)
        self._some, self._schema = False, self.names.get(name) or {}

    def _arguments(self) -> bool:
        """Ahead of an argument, or of the call's end."""
        ahead, before = self._buffer.lstrip(), self.form.before.strip()
        if ahead.startswith(before):
            self._buffer, self._state = ahead[len(before) :], self._key
            return True
        if not ahead or any(mark != ahead and mark.startswith(ahead) for mark in (before, *self._ends)):
            return False
        self._end_call()  # what it does not know is text behind the call
        return True

    def _key(self) -> bool:
        """An argument's name."""
        match = self._between.search(self._buffer)
        if match is None:
            if len(self._buffer) > LONGEST:
                self._end_call()
            return len(self._buffer) > LONGEST
        key, self._buffer = self._buffer[: match.start()].strip(), self._buffer[match.end() :]
        self._kinds = kinds_of(self._schema, key)
        self._string, self._fresh = self._kinds <= {"string"}, self.form.between.endswith("\n")
        self._give(("{" if not self._some else ", ") + _json(self._spelled(key)) + ": " + '"' * self._string)
        self._some, self._looked, self._state = True, 0, self._value
        return True

    def _value(self) -> bool:
        """Within a value, to what ends it."""
        if self._fresh and self._buffer:  # the line end that belongs to the tag
            self._buffer, self._fresh = self._buffer.removeprefix("\n"), False
        ahead = max(0, self._looked - self._longest)  # what was looked through before holds none
        found = [(place, -len(end), end) for end in self._enders if (place := self._buffer.find(end, ahead)) >= 0]
        self._looked = len(self._buffer)
        if not found:
            if self._string:
                held = max(overlap(self._buffer, end) for end in self._enders)
                sure = len(self._buffer) - held
                self._give(_json(self._spelled(self._buffer[:sure]))[1:-1])
                self._buffer, self._looked = self._buffer[sure:], held
            return False
        place, _, end = min(found)
        value, rest = self._spelled(self._buffer[:place]), self._buffer[place:]
        self._give(_json(value)[1:-1] + '"' if self._string else read_value(value, self._kinds))
        self._buffer = rest.removeprefix(end) if end in self._after else rest
        self._state = self._arguments
        return True

    def _end_call(self) -> None:
        self._give("}" if self._some else "{}")
        self._left = list(self._ends)
        self._state = self._close
        self._ended()

    def _close(self) -> bool:
        """Behind the arguments: the closing tags, as many as there are."""
        while self._left:
            ahead = self._buffer.lstrip()
            if not ahead or any(mark != ahead and mark.startswith(ahead) for mark in (*self._left, *self._again)):
                return False
            place = next((i for i, mark in enumerate(self._left) if ahead.startswith(mark)), None)
            if place is None:  # it left the others out
                again = next((mark for mark in self._again if ahead.startswith(mark)), "")
                if again:
                    self._raw, self._buffer, self._opened = again, ahead.removeprefix(again), True
                self._state = self._open if again else self._text
                return True
            self._buffer = ahead.removeprefix(self._left[place])
            del self._left[: place + 1]
        self._state = self._text
        return bool(self._buffer)


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if line]


def tag_grammar(form: Any, closing: str, functions: list[dict[str, Any]]) -> str:
    """The grammar, in llguidance's form of Lark, of one call behind ``form.opening``.

    Arguments come in the order of the schema. A string is any text up to its closing tag; other values are JSON.
    """
    rules, calls = [], []
    for number, function in enumerate(functions):
        schema = function["parameters"]
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        parts = [_json(function["name"] + form.named)]
        for place, (key, inner) in enumerate((schema.get("properties") or {}).items()):
            rule, name = _value(form, schema, key, inner, shared), f"v{number}_{place}"
            rules.append(f"{name}{rule}")
            part = f"{_json(form.before + key + form.between)} {name}"
            parts.append(part if key in (schema.get("required") or ()) else f"({part})?")
        calls.append(" ".join([*parts, *([_json(closing)] if closing else [])]))
    return "\n".join(["start: " + " | ".join(calls), *rules])


def _value(form: Any, schema: Any, key: str, inner: Any, shared: Any) -> str:
    """The rule of a value and the tag that closes it."""
    values = inner.get("enum") if isinstance(inner, dict) else None
    if isinstance(values, list) and values:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        return f": ({' | '.join(map(_json, texts))}) {_json(form.after)}"
    kinds = kinds_of(schema, key)
    if not kinds or "string" in kinds:
        return f"[lazy]: /(?s:.*){re.escape(form.after).replace('/', chr(92) + '/')}/"
    return f": %json {json.dumps({**shared, **inner})} {_json(form.after)}"


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


__all__ = ["TagCalls", "tag_grammar"]
