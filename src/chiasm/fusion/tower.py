"""What models share that make one vector of a medium, which stands beside the text: two towers, and a classifier."""

from __future__ import annotations

from typing import Any

from chiasm.config import part
from chiasm.errors import ConfigError, nearest
from chiasm.fusion.base import FusionConfig
from chiasm.types import Count, Layout


class TowerConfig(FusionConfig):
    """``encoders`` and ``connectors``: one of each for the one kind of media; subclasses say which it is."""

    encoders: dict[str, part("encoder")]  # type: ignore[valid-type]
    connectors: dict[str, part("connector")]  # type: ignore[valid-type]

    @property
    def kind(self) -> str:
        """The kind of media."""
        raise NotImplementedError

    @property
    def media(self) -> dict[str, Any]:
        """The kind of media that the model takes, and its parts' name."""
        return {self.kind: self.kind}

    def unit_count(self, kind: str, shape: tuple[int, ...]) -> Count:
        """Vectors of one unit after encoder and connector. Raises ConfigError for a kind it does not take."""
        if kind not in self.media:
            raise ConfigError(f"this model takes no {kind}; {nearest(kind, self.media)}")
        return self.connectors[kind].count(self.encoders[kind].count(shape))

    def count(self, kind: str, layout: Layout) -> int:
        """None: a medium stands beside the text, or there is no text."""
        self.unit_count(kind, layout.shape)
        return 0


__all__ = ["TowerConfig"]
