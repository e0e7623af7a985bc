"""One answer in the making: which token is chosen from the logits, what text is sure, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import DataError
from chiasm.infer.constraints import Constraint, State
from chiasm.infer.request import Piece, TokenLogprob, mark_of
from chiasm.infer.sampling import Sampler, Sampling, check_finite, penalise
from chiasm.infer.stream import Decode, StopStrings, TextStream, marking
from chiasm.infer.words import Words


class Writer:
    """Chooses and collects the tokens of one answer. ``limit`` is how many there may be. ``marks``: see ``Request``.

    ``reason`` is empty while it goes on, then "stop" (a stop id), "stop_string", "constraint", "length" or
    "positions" (the model has no more).
    """

    def __init__(
        self,
        processor: Any,
        sampling: Sampling,
        prompt: Tensor,
        limit: int,
        vocab: int,
        constraint: Constraint | None = None,
        words: Words | None = None,
        marks: Sequence[int] = (),
    ):
        self.sampling, self.limit, self.vocab = sampling, limit, vocab
        self.stop_ids = frozenset(processor.stop_ids)
        self.sampler = Sampler(sampling, 1)
        self.ids: list[int] = []
        self.text, self.reason = "", ""
        self.words = words if words is not None else Words(processor)
        # A constraint knows what a whole answer is: the template's ends are text like other text to it.
        free = sampling.ignore_eos or constraint is not None
        own = () if free else getattr(processor, "stop_strings", ())
        self._stops = StopStrings([*own, *sampling.stop])
        shown = [mark_of(place) for place in range(len(marks))]
        self._decode: Decode = marking(processor.decode, shown, marks) if marks else processor.decode
        self._stream = TextStream(self._decode)
        self._told = 0  # ids that were given out in pieces
        self._probabilities: list[TokenLogprob] = []
        self._bias = _bias(sampling.logit_bias, vocab)
        self._seen = self._counts = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(1, vocab, dtype=torch.bool)
            self._seen[0, prompt[prompt < vocab]] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros(vocab)
        self._state: State | None = None if constraint is None else constraint.start(_Facts(processor))

    @property
    def plain(self) -> bool:
        """Whether the answer takes the best token as it is, or the best but the stop ids."""
        s = self.sampling
        changed = s.logit_bias or s.logprobs is not None or self._state or self._counts is not None
        return s.temperature == 0 and self._seen is None and not changed

    @property
    def asks(self) -> int | None:
        """How many of the best tokens decide which comes next; None: all logits do."""
        return 1 + self._hides * len(self.stop_ids) if self.plain else None

    def takes(self, best: int) -> bool:
        """Whether the best token is the next one whatever the other logits are."""
        return self.plain and not (self._hides and best in self.stop_ids)

    @property
    def _hides(self) -> bool:
        """Whether stop ids are out of the question now."""
        return self.sampling.ignore_eos or len(self.ids) < self.sampling.min_tokens

    def choose(self, logits: Tensor) -> int:
        """The next token of ``logits [V]`` float32. Raises NumberError where they are NaN or infinite."""
        best = int(logits.argmax())
        check_finite(float(logits[best]))
        if self.takes(best):
            return best
        scores = logits.detach().cpu()
        check_finite(float(scores.max()))
        if self._seen is not None:
            scores = penalise(scores.unsqueeze(0), self._seen, self.sampling.repetition_penalty)[0]
        if self._counts is not None:
            once = self.sampling.presence_penalty * (self._counts > 0)
            scores = scores - once - self.sampling.frequency_penalty * self._counts
        if self._bias is not None:
            scores = scores.index_add(0, *self._bias)
        if self._hides:
            scores = scores.index_fill(0, torch.tensor(sorted(self.stop_ids)), -torch.inf)
        if self._state is not None:
            scores = self._state.mask(scores)
            if not bool((scores > -torch.inf).any()):
                raise DataError("the constraint leaves no token that could follow: the tokenizer cannot write it")
        token = int(self.sampler(scores.unsqueeze(0), None))
        if self.sampling.logprobs is not None:
            self._probabilities.append(self._told_of(logits, token, self.sampling.logprobs))
        if self._seen is not None:
            self._seen[0, token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def push(self, token: int) -> Piece | None:
        """One more token; the piece of text that is sure now. Sets ``reason`` when it was the last."""
        ended = token in self.stop_ids and not self.sampling.ignore_eos
        if ended:
            self.reason = "stop"
            if self._probabilities:
                self._probabilities.pop()
            text = self._stops.push(self._stream.flush())
        else:
            self.ids.append(token)
            text = self._stops.push(self._stream.push(token))
            if self._state is not None:
                self._state.advance(token)
                if self._state.done:
                    self.reason = "constraint"
            if self._stops.found is None and not self.reason and len(self.ids) >= self.limit:
                self.reason = "positions" if self.limit < self.sampling.max_new_tokens else "length"
            if self.reason:
                text += self._stops.push(self._stream.flush())
        if self._stops.found is not None:
            self.reason = "stop_string"
        elif self.reason:
            text += self._stops.flush()
        self.text += text
        return self._piece(text)

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether an answer of these ids is complete (beam search asks it of every candidate)."""
        if ids[-1] in self.stop_ids or len(ids) >= self.limit:
            return True
        if not self._stops.stops:
            return False
        text = self._decode(list(ids))
        return any(stop in text for stop in self._stops.stops)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.found

    def _piece(self, text: str) -> Piece | None:
        if not text and not self.reason:
            return None
        new = self.ids[self._told :]
        if self._stops.found is not None:  # ids that only wrote what is left out are not the answer's
            while new and len(self._decode(self.ids[: self._told] + new[:-1])) >= len(self.text):
                new = new[:-1]
        self._told = len(self.ids)
        told, self._probabilities = self._probabilities[: len(new)], []
        return Piece(text, tuple(new), tuple(told)) if text or new else None

    def _told_of(self, logits: Tensor, token: int, count: int) -> TokenLogprob:
        scores = logits.detach().cpu().log_softmax(dim=-1)
        best = scores.topk(min(count, len(scores)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        entries = tuple((i, value, *self.words(i)) for i, value in top)
        return TokenLogprob(token, float(scores[token]), *self.words(token), entries)


class _Facts:
    """What a constraint is told of the tokenizer."""

    def __init__(self, processor: Any):
        self.stop_ids = tuple(processor.stop_ids)
        self.tokenizer = getattr(processor, "tokenizer", processor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _bias(values: dict[int, float], vocab: int) -> tuple[Tensor, Tensor] | None:
    if not values:
        return None
    wrong = [i for i in values if not 0 <= i < vocab]
    if wrong:
        raise DataError(f"logit_bias names id {wrong[0]}; ids go from 0 to {vocab - 1}", "logit_bias")
    return torch.tensor(list(values)), torch.tensor(list(values.values()), dtype=torch.float32)


def guess(ids: Sequence[int], most: int, longest: int = 3) -> list[int]:
    """What may follow ``ids``: what followed the last earlier place where their end (3 to 1 ids) stands.

    Reference: prompt lookup decoding (Saxena, 2023).
    """
    for size in range(min(longest, len(ids) - 1), 0, -1):
        end = list(ids[-size:])
        for place in range(len(ids) - size - 1, -1, -1):
            if ids[place] == end[0] and list(ids[place : place + size]) == end:
                return list(ids[place + size : place + size + most])
    return []


__all__ = ["Writer", "guess"]
