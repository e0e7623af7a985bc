"""A conversation with a model: what was said is remembered and sent again with every turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chiasm.vlm import VLM


class Chat:
    """A conversation with a model. ``say`` adds a turn and gives the answer; ``messages`` is what was said so far."""

    def __init__(self, vlm: VLM, system: str | None = None, options: Mapping[str, Any] | None = None):
        self.vlm, self.options = vlm, dict(options or {})
        self.messages: list[dict[str, Any]] = []
        self._system = system
        self.clear()

    def say(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), **options: Any) -> str:
        """One turn with pictures and clips before its text; the answer. A turn that fails is not remembered."""
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in _several(images)]
        content += [{"type": "video", "video": video} for video in _several(videos)]
        content.append({"type": "text", "text": text})
        turn = {"role": "user", "content": content}
        answer = self.vlm.generate([*self.messages, turn], **{**self.options, **options})
        self.messages += [turn, {"role": "assistant", "content": answer}]
        return answer

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def __repr__(self) -> str:
        turns = sum(message["role"] == "user" for message in self.messages)
        return f"Chat({self.vlm!r}, {turns} turn{'' if turns == 1 else 's'})"


def _several(media: Any) -> Sequence[Any]:
    """Media as a list: one alone (a path, bytes, a picture) is a list of one."""
    return media if isinstance(media, list | tuple) else [media]
