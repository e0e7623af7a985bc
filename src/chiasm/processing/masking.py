"""Masked words: which tokens of a text are hidden, and what stands in their places.

Papers: BERT (arXiv:1810.04805) for 80 % ``[MASK]``, 10 % another token, 10 % left alone. Reference: the collator for
whole words of transformers 4 that ViLT used (transformers 5 has no such collator: its successor draws each token by
itself and so hides more), ``ALBEF.mask`` of salesforce/ALBEF b9727e4, ``_masking_on_text_tokens`` of BEiT-3.

Choices are drawn from torch's default generator, which the loader sets by the sample's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from chiasm.config import Config
from chiasm.errors import ConfigError, nearest


class Masking(Config):
    """How much is hidden, and in what pieces.

    ``draw="count"`` hides ``share`` of the tokens, rounded, at least one (ViLT, BEiT-3); ``"each"`` decides for each
    piece by itself (ALBEF), so that a text may keep them all. ``whole_words``: the pieces are words, of which all
    tokens are hidden. The first token is never hidden, the last one only with ``last``.
    """

    share: float = Field(default=0.15, gt=0, lt=1)
    draw: Literal["count", "each"] = "count"
    whole_words: bool = True
    last: bool = False
    token: str = "[MASK]"
    replaced: float = Field(default=0.8, ge=0, le=1)  # by the mask token
    other: float = Field(default=0.1, ge=0, le=1)  # by any other token; the rest is left alone


class Masker:
    """Hides tokens of a tokenizer's texts. Raises ConfigError where it has no such mask token."""

    def __init__(self, config: Masking, tokenizer: Any):
        self.config = config
        if config.token not in tokenizer.specials:
            raise ConfigError(
                f"masking.token {config.token!r} is no control token of this tokenizer; "
                f"{nearest(config.token, tokenizer.specials)}"
            )
        self.token_id, self.vocab = tokenizer.specials[config.token], tokenizer.vocab_size
        self.tokenizer = tokenizer
        self._inside: dict[int, bool] = {}

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``ids [T]`` of a text with its first and last token → ids with hidden ones, and which, ``[T]``."""
        hidden = torch.zeros(len(ids), dtype=torch.bool)
        for piece in self._chosen(ids):
            hidden[piece] = True
        draw = torch.rand(len(ids))
        masked = ids.clone()
        masked[hidden & (draw < self.config.replaced)] = self.token_id
        swapped = hidden & (draw >= self.config.replaced) & (draw < self.config.replaced + self.config.other)
        masked[swapped] = torch.randint(self.vocab, (int(swapped.sum()),))
        return masked, hidden

    def pieces(self, ids: Tensor) -> list[list[int]]:
        """The positions that are hidden together: words, or single tokens."""
        stop = len(ids) if self.config.last else len(ids) - 1
        found: list[list[int]] = []
        for place in range(1, stop):
            if self.config.whole_words and found and self._continues(int(ids[place])):
                found[-1].append(place)
            else:
                found.append([place])
        return found

    def _chosen(self, ids: Tensor) -> Sequence[list[int]]:
        pieces = self.pieces(ids)
        if self.config.draw == "each":
            return [
                piece
                for piece, draw in zip(pieces, torch.rand(len(pieces)).tolist(), strict=True)
                if draw < self.config.share
            ]
        wanted, chosen, count = max(1, round(len(ids) * self.config.share)), [], 0
        for index in torch.randperm(len(pieces)).tolist():
            if count + len(pieces[index]) <= wanted:  # a word that is too long is passed over
                chosen.append(pieces[index])
                count += len(pieces[index])
        return chosen

    def _continues(self, index: int) -> bool:
        """Whether a token goes on with the word before it, as the vocabulary spells that."""
        if index not in self._inside:
            token = self.tokenizer.token_of(index) or ""
            marked = self._starts_marked()
            start = token.startswith(("\u2581", "\u0120")) if marked else not token.startswith("##")
            self._inside[index] = not start and index not in self.tokenizer.specials.values()
        return self._inside[index]

    def _starts_marked(self) -> bool:
        """Whether the vocabulary marks the beginnings of words (SentencePiece, GPT-2), not their rest (WordPiece)."""
        if not hasattr(self, "_marked"):
            tokens = (self.tokenizer.token_of(i) or "" for i in range(self.vocab))
            self._marked = any(token.startswith(("\u2581", "\u0120")) for token in tokens)
        return self._marked
