"""``"pair"``: the text of a picture and text that stand beside each other, as models of two towers and of one stream
read them. Nothing is generated and no medium takes a place in the text.

Papers: CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343). Reference: ``clip.tokenize`` of openai/CLIP d05afc4,
``SiglipTokenizer`` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from chiasm.errors import DataError
from chiasm.processing.clean import Cleaning, cleaner
from chiasm.processing.template import Template, TemplateConfig
from chiasm.registry import register
from chiasm.types import Message, Piece, Text


class PairConfig(TemplateConfig):
    """``length``: tokens at most, those that open and end a text included; a longer text loses its end, never its last
    token, and its sample says how much (``lost``). ``fill``: every text is made ``length`` tokens long with the padding
    token, which the tower reads as text (SigLIP). ``read``: the last turn that has text (a caption after "describe
    this"), or the last of the user (a question), or no text at all (a model that classifies pictures, whose answer turn
    is a label).
    """

    type: str = "pair"
    length: int = Field(default=77, ge=1)
    fill: bool = False
    fill_side: Literal["right", "left"] = "right"
    clean: Cleaning = "none"
    read: Literal["last", "user", "none"] = "last"


@register("template", "pair")
class PairTemplate(Template):
    """One piece of text, cleaned; no piece at all where no turn has text."""

    Config: type[PairConfig] = PairConfig
    config: PairConfig
    beside = True

    def __init__(self, config: PairConfig, tokens: Mapping[str, str], placeholders: Mapping[str, str]):
        super().__init__(config, tokens, placeholders)
        self._clean = cleaner(config.clean)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, where: str) -> list[Piece]:
        """See the contract. Raises DataError for a text of nothing but white space."""
        for message in reversed(messages if self.config.read != "none" else ()):
            if self.config.read == "user" and message.role != "user":
                continue
            if any(isinstance(part, Text) for part in message.parts):
                text = self._clean(message.text)
                if not text.strip():
                    raise DataError(f"{where}: the text is empty ({len(message.text)} characters); write one", "empty")
                return [Piece(text)]
        return []

    def close(self, ids: list[int], suffix: Sequence[int], pad: int) -> list[int]:
        """Cut, ended with ``suffix``, and filled where that is wanted."""
        ids = [*ids[: self.config.length - len(suffix)], *suffix]
        padding = [pad] * (self.config.length - len(ids)) if self.config.fill else []
        return padding + ids if self.config.fill_side == "left" else ids + padding


def reads_nothing(processing: Any) -> bool:
    """Whether a model with this ``ProcessingConfig`` reads no text at all, so that it needs no tokenizer."""
    return getattr(processing.template, "read", "") == "none"
