"""A conversation in a terminal: what was said, the pictures that wait, the settings, and its file."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiasm.cli.options import user_message
from chiasm.errors import DataError, nearest

FORMAT = "chiasm-chat-1"
NUMBERS: dict[str, type] = {
    "temperature": float,
    "max_new_tokens": int,
    "top_p": float,
    "top_k": int,
    "seed": int,
    "repetition_penalty": float,
    "num_beams": int,
}


@dataclass
class Spoken:
    """How fast the last answer came: seconds to its first piece, its tokens, tokens a second after the first."""

    first: float = 0.0
    tokens: int = 0
    rate: float = 0.0


@dataclass
class Said:
    """An answer in the making: its pieces, its tokens where they were counted, seconds to the first piece."""

    pieces: list[str] = field(default_factory=list)
    tokens: int = 0
    first: float = 0.0


@dataclass
class Talk:
    """One conversation with one model. ``waiting`` are pictures of the next message, as paths or PIL images.

    ``service``, where there is one, writes the answers (``chiasm.infer.service``); else ``vlm.generate`` does.
    """

    vlm: Any
    settings: dict[str, Any]
    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[Any] = field(default_factory=list)
    spoken: Spoken = field(default_factory=Spoken)
    service: Any = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation with its system prompt."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*head, *self.turns]

    def say(self, text: str) -> Iterator[str]:
        """A turn with the pictures that wait: pieces of its answer. A turn that fails is as if it had not been."""
        turn = user_message(self.waiting, text)
        pictures, self.waiting = self.waiting, []
        self.turns.append(turn)
        try:
            yield from self._answer()
        except BaseException:
            if self.turns[-1] is turn:  # nothing was said to it
                self.turns.pop()
                self.waiting = pictures
            raise

    def retry(self) -> Iterator[str]:
        """Another answer to the last message. Raises DataError where there is none."""
        if not self.turns:
            raise DataError("there is nothing to try again: nothing was said yet")
        old = self.turns.pop() if self.turns[-1]["role"] == "assistant" else None
        try:
            yield from self._answer()
        except BaseException:
            if old is not None and self.turns[-1]["role"] == "user":
                self.turns.append(old)
            raise

    def _answer(self) -> Iterator[str]:
        """Pieces of the answer to the last turn. One that is broken off is kept as far as it came."""
        begun, said = time.perf_counter(), Said()
        pieces = self._written(said) if self.service is not None and self._plain else self._whole(said)
        try:
            for piece in pieces:
                said.first = said.first or time.perf_counter() - begun
                said.pieces.append(piece)
                yield piece
        finally:
            pieces.close()  # its computation ends now, not when the memory is looked through
            text, passed = "".join(said.pieces), time.perf_counter() - begun - said.first
            tokens = said.tokens or len(said.pieces)
            rate = (tokens - 1) / passed if tokens > 1 and passed > 0 else 0.0
            self.spoken = Spoken(said.first or passed, tokens, rate)
            if text.strip():
                self.turns.append({"role": "assistant", "content": text})
        if not text.strip():
            self.turns.append({"role": "assistant", "content": text})

    @property
    def _plain(self) -> bool:
        return self.settings.get("num_beams", 1) == 1

    def _written(self, said: Said) -> Generator[str, None, None]:
        """By the engine's service: pictures that it has seen in this conversation are not read again."""
        from chiasm.infer.request import Request
        from chiasm.infer.sampling import Sampling
        from chiasm.processing.messages import parse

        chosen = {name: value for name, value in self.settings.items() if name != "num_beams" and value is not None}
        wanted = Sampling.parse(chosen | {"stop": tuple(chosen.get("stop", ()))}, where="chat")
        handle = self.service.submit(Request(parse(self.messages, "chat"), wanted, id="chat"))
        try:
            for piece in handle:
                yield piece.text
        finally:
            handle.cancel()
        said.tokens = handle.finish.completion_tokens
        if handle.finish.reason == "error":
            raise handle.finish.error

    def _whole(self, said: Said) -> Generator[str, None, None]:
        """By the model itself; beams give their answer at once."""
        made = self.vlm.generate(self.messages, stream=self._plain, **self.settings)
        try:
            yield from made if self._plain else [made]
        finally:
            getattr(made, "close", lambda: None)()

    def clear(self) -> None:
        """Forget what was said, and the pictures that wait."""
        self.turns, self.waiting = [], []

    def set(self, name: str, value: str) -> None:
        """Change a setting; ``none`` takes it back. Raises DataError or ConfigError, and then nothing has changed."""
        if name == "system":
            self.system = None if value.lower() in ("", "none") else value
            return
        self.settings = _checked(self.settings | {name: None if value.lower() == "none" else value})

    # ------------------------------------------------------------------------------------------------ files

    def save(self, path: str | Path) -> Path:
        """Write the conversation as JSON, pictures inside, so that it can be read anywhere. Raises DataError."""
        values = {
            "format": FORMAT,
            "system": self.system,
            "settings": self.settings,
            "messages": [_kept(turn) for turn in self.turns],
        }
        path = Path(path).expanduser()
        try:
            path.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from None
        return path

    def load(self, path: str | Path) -> None:
        """Go on with a saved conversation. Raises DataError, and then nothing has changed."""
        from chiasm.processing.messages import parse

        path = Path(path).expanduser()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise DataError(f"{path} is no JSON in UTF-8") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise DataError(f"{path} is no saved conversation: its 'format' is not {FORMAT!r}")
        turns, system, settings = values.get("messages"), values.get("system"), values.get("settings")
        if not isinstance(turns, list) or not (system is None or isinstance(system, str)):
            raise DataError(f"{path}: 'messages' must be a list, and 'system' a text or null")
        if turns:
            parse(turns, str(path))
        if not isinstance(settings or {}, dict):
            raise DataError(f"{path}: 'settings' must be a table")
        self.settings = _checked(self.settings | (settings or {}))
        self.turns, self.system, self.waiting = turns, system, []


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose values are what generation takes; those of None are left out. Raises DataError, ConfigError."""
    from chiasm.infer.engine import Options

    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in NUMBERS and name != "stop":
            raise DataError(f"there is no setting {name!r}; {nearest(name, [*NUMBERS, 'stop', 'system'])}")
        if value is None:
            continue
        if name == "stop":
            found[name] = [value] if isinstance(value, str) else [str(stop) for stop in value]
            continue
        try:
            found[name] = NUMBERS[name](value)
        except (TypeError, ValueError):
            raise DataError(f"{name} is a number, {value!r} is none") from None
    Options.parse(found | {"stop": tuple(found.get("stop", ()))}, where="set")
    return found


def _kept(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with its pictures as data URLs; clips stay paths, since they are large."""
    if isinstance(turn["content"], str):
        return turn
    return turn | {"content": [_kept_part(part) for part in turn["content"]]}


def _kept_part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    data = part["image"]
    if isinstance(data, str) and data[:5].lower() == "data:":
        return part
    if isinstance(data, (str, Path)):
        try:
            raw = Path(data).read_bytes()
        except OSError as error:
            raise DataError(f"picture {str(data)!r} is no longer there: {error.strerror}") from None
    else:
        stream = io.BytesIO()
        data.save(stream, "PNG")
        raw = stream.getvalue()
    kind = "png" if raw[:4] == b"\x89PNG" else "jpeg" if raw[:2] == b"\xff\xd8" else "octet-stream"
    mime = f"image/{kind}" if kind != "octet-stream" else "application/octet-stream"
    return {"type": "image", "image": f"data:{mime};base64," + base64.b64encode(raw).decode()}
