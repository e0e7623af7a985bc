"""The configuration of a whole vision-language model: its network, its processing, and where it comes from.

This is what ``config.json`` of a model folder holds, what a preset returns and what ``chiasm.build`` builds.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from chiasm.config import Config, part
from chiasm.errors import ConfigError
from chiasm.processing.processor import ProcessingConfig
from chiasm.types import Layout

FORMAT = "chiasm/1"  # the marker by which a folder's config.json is known as ours; the number is the layout's version


class Provenance(Config):
    """Where a model comes from. It is carried along by every save, so that licences and history are never lost."""

    preset: str | None = None
    paper: str | None = None
    base: dict[str, str] = Field(default_factory=dict)  # part of the network → what its weights were read from
    licences: dict[str, str] = Field(default_factory=dict)  # part or data set → its licence
    history: tuple[str, ...] = ()  # what was done to the weights, oldest first
    ignored_fingerprint: tuple[str, ...] = ()  # what differed from it and was meant

    def add(self, *events: str, ignored: str | None = None, base: dict[str, str] | None = None) -> Provenance:
        """A copy with ``events`` at the end of the history, and with what was ignored or where weights came from."""
        return self.model_copy(
            update={
                "history": (*self.history, *events),
                "ignored_fingerprint": (*self.ignored_fingerprint, *([ignored] if ignored else [])),
                "base": self.base | (base or {}),
            }
        )


class MethodRecord(Config):
    """A training method that the network carries, unmerged: its options and the modules it changed."""

    method: part("method")  # type: ignore[valid-type]
    modules: tuple[str, ...]


class VLMConfig(Config):
    """A model to build.

    ``weights`` names, for parts of the network (``"lm"``, ``"encoders.image"``, ``"connectors.image"``), a folder or
    file that their weights are read from when the model is built; ``tokenizer`` a folder with a tokenizer. A saved
    folder has neither: it holds the weights and the tokenizer itself.
    """

    format: str = FORMAT
    model: part("fusion")  # type: ignore[valid-type]
    processing: ProcessingConfig
    weights: dict[str, str] = Field(default_factory=dict)
    tokenizer: str | None = None
    methods: tuple[MethodRecord, ...] = ()
    provenance: Provenance = Provenance()

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != FORMAT:
            raise ConfigError(f"config has format {value!r}, this version of chiasm reads {FORMAT!r}")
        return value

    def count(self, kind: str, layout: Layout) -> int:
        """Tokens that one medium takes in the sequence."""
        return self.model.count(kind, layout)

    def with_weights(self, **folders: Any) -> VLMConfig:
        """A copy whose ``weights`` also name ``folders`` (``with_weights(lm=...)``; dotted parts through a dict)."""
        return self.model_copy(update={"weights": self.weights | {k: str(v) for k, v in folders.items()}})


__all__ = ["FORMAT", "MethodRecord", "ProcessingConfig", "Provenance", "VLMConfig"]
