"""Conversations in, text out: prefill, then tokens until each row stops.

``generate`` is what ``VLM.generate`` calls. Below it ``Engine`` runs one prepared ``Batch``: ``Steps`` computes
logits, ``Sampler`` or ``Beams`` chooses, ``Answering`` turns a row's ids into text and says when it stops. Padding is
on the left, finished rows leave the batch at once, and nothing of one row reaches another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.fusion.base import Fusion
from chiasm.infer.beam import Beams
from chiasm.infer.sampling import Options, Sampler, penalise
from chiasm.infer.steps import Afresh, Cached, Steps, Written
from chiasm.infer.stream import StopStrings, TextStream
from chiasm.nn.modes import evaluating
from chiasm.types import Batch, Message


@dataclass
class Answer:
    """What one conversation was answered. ``ids`` leave out the stop id that ended them.

    ``reason`` is "stop" (a stop id), "stop_string", "length" (``max_new_tokens``) or "positions" (the language model
    has no more). ``score`` is the length-normalised log-probability of a beam, ``seed`` the seed of a sampled answer.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    reason: str = ""
    prompt_tokens: int = 0
    seed: int | None = None
    score: float | None = None


def generate(
    model: Fusion,
    processor: Any,
    conversations: Sequence[Any],
    *,
    stream: bool = False,
    return_details: bool = False,
    **options: Any,
) -> Any:
    """Answer one conversation (a list of messages → ``str``) or several (a list of those → ``list[str]``).

    ``options`` are those of ``Options``: ``max_new_tokens=128, temperature=0.0, top_k, top_p, num_beams=1,
    length_penalty=1.0, repetition_penalty=1.0, stop=(), seed, use_cache``. ``return_details`` gives ``Answer``
    instead of ``str``. ``stream=True`` gives an iterator over pieces of text, for several conversations over
    ``(index, piece)``; the pieces of a conversation, joined, are its text (with beams there is one piece, at the
    end).

    Raises ConfigError for options that make no sense, DataError for a prompt that the model has no room for.
    """
    if stream and return_details:
        raise ConfigError("stream=True gives pieces of text: details come without it")
    single = is_conversation(conversations)
    if not single and not conversations:
        return iter(()) if stream else []
    chosen = Options.parse({**options, "stop": tuple_of(options.get("stop", ()))}, where="generate")
    prompts = [conversations] if single else list(conversations)
    batch = processor.batch(prompts, add_generation_prompt=True, padding_side="left")
    engine = Engine(model, processor)
    run = engine.start(batch, chosen)
    if stream:
        return (piece for _, piece in run.pieces()) if single else run.pieces()
    answers = run.finish()
    results = answers if return_details else [answer.text for answer in answers]
    return results[0] if single else results


class Engine:
    """Runs batches on a model. ``processor`` gives ``decode(ids)``, ``stop_ids`` and perhaps ``stop_strings``."""

    def __init__(self, model: Fusion, processor: Any):
        self.model, self.processor = model, processor
        self.stop_ids = frozenset(processor.stop_ids)
        self.stop_strings = tuple(getattr(processor, "stop_strings", ()))

    def start(self, batch: Batch, options: Options) -> Run:
        """Check a left-padded batch of prompts and make it ready. Raises DataError where a prompt does not fit."""
        lengths = (batch.segment_ids != 0).sum(dim=1).tolist()
        names = batch.ids or [str(row) for row in range(len(lengths))]
        if not bool((batch.segment_ids[:, -1] != 0).all()):
            row = int((batch.segment_ids[:, -1] == 0).nonzero()[0])
            raise DataError(f"sample {names[row]!r}: its prompt is empty or padded on the right; pad on the left")
        lm = getattr(self.model, "lm", None)
        room = getattr(lm, "max_positions", None)
        written = getattr(lm, "encoder_decoder", False)
        limits = []
        for name, length in zip(names, lengths, strict=True):
            if room is not None and length >= room + written:
                raise DataError(
                    f"sample {name!r}: the prompt takes {length} positions, the language model has {room} and needs "
                    "one to answer: shorten the conversation, or give fewer or smaller media",
                    "too_long",
                )
            left = options.max_new_tokens if room is None else room - 1 if written else room - length
            limits.append(min(options.max_new_tokens, left))
        return Run(self, batch, options, lengths, limits)

    def steps(self, run: Run) -> Steps:
        """The prefilled model."""
        batch = run.batch.to(self.model.device, self.model.dtype)
        new, lm = max(run.limits), getattr(self.model, "lm", None)
        if lm is not None and lm.encoder_decoder:
            return Written(self.model, batch, new, run.options.use_cache)
        steady = lm is None or all(lm.steady(n, n + limit) for n, limit in zip(run.lengths, run.limits, strict=True))
        return (Cached if run.options.use_cache and steady else Afresh)(self.model, batch, new)


class Run:
    """One batch being answered. ``pieces`` streams, ``finish`` waits for the whole."""

    def __init__(self, engine: Engine, batch: Batch, options: Options, lengths: list[int], limits: list[int]):
        self.engine, self.batch, self.options = engine, batch, options
        self.lengths, self.limits = lengths, limits
        self.rows = [Answering(engine, options, length, limit) for length, limit in zip(lengths, limits, strict=True)]

    def finish(self) -> list[Answer]:
        """All answers, in the order of the batch."""
        for _ in self.pieces():
            pass
        return [row.answer for row in self.rows]

    def pieces(self) -> Iterator[tuple[int, str]]:
        """``(row, piece of text)`` as they come."""
        with evaluating(self.engine.model):
            yield from self._search() if self.options.num_beams > 1 else self._write()

    def _write(self) -> Iterator[tuple[int, str]]:
        # Inference mode is entered for each step: held over a yield it would change the caller's own computations.
        with torch.inference_mode():
            steps = self.engine.steps(self)
            seen = self._seen(steps)
            sampler = Sampler(self.options, len(self.rows))
        for row, seed in zip(self.rows, sampler.seeds, strict=True):
            row.answer.seed = seed if self.options.temperature > 0 else None
        live = list(range(len(self.rows)))
        while True:
            with torch.inference_mode():
                ids = sampler(steps.logits, seen)  # [R]
            going = []
            for place, (index, token) in enumerate(zip(live, ids.tolist(), strict=True)):
                piece = self.rows[index].push(token)
                if piece:
                    yield index, piece
                if not self.rows[index].answer.reason:
                    going.append(place)
            if not going:
                return
            with torch.inference_mode():
                if len(going) < len(live):
                    kept = torch.tensor(going, device=ids.device)
                    steps.reorder(kept)
                    sampler.keep(going)
                    ids, seen = ids[kept], None if seen is None else seen[kept]
                    live = [live[place] for place in going]
                if seen is not None:
                    seen.scatter_(1, ids.unsqueeze(1), True)
                steps.advance(ids)

    def _search(self) -> Iterator[tuple[int, str]]:
        """Beam search of all rows side by side, each with its own beams; one piece of text a row, at the end."""
        for index, (row, beams) in enumerate(zip(self.rows, self._beams(), strict=True)):
            row.answer.score, ids = beams.best()
            yield index, "".join(row.push(token) for token in ids)

    @torch.inference_mode()
    def _beams(self) -> list[Beams]:
        n, steps = self.options.num_beams, self.engine.steps(self)
        seen = self._seen(steps)
        spare = max(2, 1 + len(self.engine.stop_ids)) * n
        found = [Beams(n, self.options.length_penalty, spare, row.ends) for row in self.rows]
        live = list(range(len(found)))
        rows = torch.arange(len(live), device=steps.logits.device).repeat_interleave(n)  # [R*n]
        steps.reorder(rows)
        seen = None if seen is None else seen[rows]
        while True:
            scores = steps.logits.log_softmax(dim=-1)  # [R*n, V]
            if seen is not None:
                scores = penalise(scores, seen, self.options.repetition_penalty)
            parents, tokens, going = [], [], []
            for place, row in enumerate(live):
                chosen, ids = found[row].advance(scores[place * n : (place + 1) * n])
                if not found[row].done:
                    going.append(row)
                    parents += [place * n + parent for parent in chosen]
                    tokens += ids
            if not going:
                return found
            live = going
            rows = torch.tensor(parents, device=scores.device)
            fresh = torch.tensor(tokens, device=scores.device)
            steps.reorder(rows)
            if seen is not None:
                seen = seen[rows].scatter(1, fresh.unsqueeze(1), True)
            steps.advance(fresh)

    def _seen(self, steps: Steps) -> Tensor | None:
        """Ids ``[B, V]`` that the repetition penalty lowers: the prompt's (without padding), and later the answer's."""
        if self.options.repetition_penalty == 1.0:
            return None
        seen = torch.zeros_like(steps.logits, dtype=torch.bool)  # [B, V]
        if isinstance(steps, Written):
            return seen.scatter(1, steps.ids, True)
        rows, columns = torch.nonzero(self.batch.segment_ids, as_tuple=True)
        seen[rows.to(seen.device), self.batch.input_ids[rows, columns].to(seen.device)] = True
        return seen


class Answering:
    """One conversation's answer in the making: ids in, sure text out, and the reason it stops."""

    def __init__(self, engine: Engine, options: Options, prompt_tokens: int, limit: int):
        self.answer = Answer(prompt_tokens=prompt_tokens)
        self.limit, self.cut = limit, limit < options.max_new_tokens
        self.stop_ids, self.decode = engine.stop_ids, engine.processor.decode
        self.stops = StopStrings([*engine.stop_strings, *options.stop])
        self.stream = TextStream(self.decode)

    def push(self, token: int) -> str:
        """The piece of text that is sure after one more id; sets ``answer.reason`` when it was the last."""
        answer = self.answer
        if token in self.stop_ids:
            answer.reason = "stop"
            piece = self.stops.push(self.stream.flush())
        else:
            answer.ids.append(token)
            piece = self.stops.push(self.stream.push(token))
            if self.stops.found is None and len(answer.ids) >= self.limit:
                answer.reason = "positions" if self.cut else "length"
                piece += self.stops.push(self.stream.flush())
        if self.stops.found is not None:
            answer.reason = "stop_string"
        elif answer.reason:
            piece += self.stops.flush()
        answer.text += piece
        return piece

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether an answer of these ids is complete (beam search asks it of every candidate)."""
        if ids[-1] in self.stop_ids or len(ids) >= self.limit:
            return True
        if not self.stops.stops:
            return False
        text = self.decode(list(ids))
        return any(stop in text for stop in self.stops.stops)


def is_conversation(value: Sequence[Any]) -> bool:
    """Whether ``value`` is one list of messages, not a list of such lists."""
    return bool(value) and isinstance(value[0], (Message, Mapping))


def tuple_of(value: str | Sequence[str]) -> tuple[str, ...]:
    """A string, or several, as a tuple of strings."""
    return (value,) if isinstance(value, str) else tuple(value)


__all__ = ["Answer", "Engine", "Options", "Run", "generate"]
