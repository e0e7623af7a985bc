"""Conversations in, text out: prefill, then tokens until each row stops.

``generate`` is what ``VLM.generate`` calls. Below it ``Engine`` runs one prepared ``Batch``. Models that fit go through
slots and the scheduler of a service. For the others, and for beams, ``Steps`` computes logits of a batch padded on the
left, and finished rows leave it at once. Either way ``Writer`` chooses, turns ids into text and says when an answer
stops, and nothing of one row reaches another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.fusion.base import Fusion
from chiasm.infer.answer import Writer
from chiasm.infer.beam import Beams
from chiasm.infer.constraints import Constraint
from chiasm.infer.kept import Memory
from chiasm.infer.prompt import Prompt, prompts_of, state_of
from chiasm.infer.request import Finish
from chiasm.infer.sampling import Options, penalise
from chiasm.infer.scheduler import Job, Scheduler
from chiasm.infer.slots import Slots
from chiasm.infer.steps import Afresh, Cached, Steps, Written
from chiasm.infer.words import Words
from chiasm.nn.modes import evaluating
from chiasm.types import Batch, Message

SLOTS = 16
PREFIXES = 1 << 30
FEATURES = 1 << 28
"""How many conversations of one call are answered side by side; bytes kept of their common beginnings and pictures."""


@dataclass
class Answer:
    """What one conversation was answered. ``ids`` leave out the stop id that ended them.

    ``reason`` is "stop" (a stop id), "stop_string", "constraint" (nothing may follow), "length" (``max_new_tokens``) or
    "positions" (the language model has no more). ``score`` is the length-normalised log-probability of a beam, ``seed``
    the seed of a sampled answer.
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
    constraint: Constraint | None = None,
    memory: Memory | None = None,
    **options: Any,
) -> Any:
    """Answer one conversation (a list of messages → ``str``) or several (a list of those → ``list[str]``).

    ``options`` are those of ``Options``: ``max_new_tokens=128, temperature=0.0, top_k, top_p, num_beams=1,
    length_penalty=1.0, repetition_penalty=1.0, stop=(), seed, use_cache``, and the others of ``Sampling``.
    ``constraint`` says what an answer may be (``chiasm.infer.constraints``: ``JsonSchema``, ``Choices``, ``Regex``,
    ``Grammar``), ``memory`` holds what calls remember for each other. ``return_details`` gives ``Answer`` instead of
    ``str``. ``stream=True`` gives an iterator over pieces of text, for several conversations over ``(index, piece)``;
    the pieces of a conversation, joined, are its text (with beams there is one piece, at the end).

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
    run = engine.start(batch, chosen, constraint)
    run.memory = memory
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

    def start(self, batch: Batch, options: Options, constraint: Constraint | None = None) -> Run:
        """Check a left-padded batch of prompts and make it ready. Raises DataError where a prompt does not fit."""
        if constraint is not None and options.num_beams > 1:
            raise ConfigError(f"beam search (num_beams={options.num_beams}) follows no constraint: leave one out")
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
        return Run(self, batch, options, lengths, limits, constraint)

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

    def __init__(
        self,
        engine: Engine,
        batch: Batch,
        options: Options,
        lengths: list[int],
        limits: list[int],
        constraint: Constraint | None = None,
    ):
        self.engine, self.batch, self.options, self.constraint = engine, batch, options, constraint
        self.lengths, self.limits = lengths, limits
        self.answers = [Answer(prompt_tokens=length) for length in lengths]
        self.memory: Memory | None = None
        self._words = Words(engine.processor)

    def finish(self) -> list[Answer]:
        """All answers, in the order of the batch."""
        for _ in self.pieces():
            pass
        return self.answers

    def pieces(self) -> Iterator[tuple[int, str]]:
        """``(row, piece of text)`` as they come."""
        way = self._search if self.options.num_beams > 1 else self._in_slots if self.in_slots else self._in_rows
        with evaluating(self.engine.model):
            yield from way()

    @property
    def in_slots(self) -> bool:
        """Whether the rows go through slots, as in a service, and not through a padded batch."""
        model, ends = self.engine.model, zip(self.lengths, self.limits, strict=True)
        fits = self.options.use_cache and Slots.fits(model)
        return fits and all(model.lm.steady(1, length + limit) for length, limit in ends)  # type: ignore[union-attr,operator]

    def writer(self, row: int, prompt: Tensor) -> Writer:
        """The writer of a row. ``prompt [T]``: the ids that the repetition penalty counts beside the answer's."""
        lm = getattr(self.engine.model, "lm", None)  # a model may write without one (BLIP-2's first stage)
        vocab: Any = self.engine.model.config.vocab if lm is None else lm.vocab
        return Writer(
            self.engine.processor,
            self.options,
            prompt,
            self.limits[row],
            int(vocab),
            self.constraint,
            self._words,  # type: ignore[arg-type]
        )

    def _in_slots(self) -> Iterator[tuple[int, str]]:
        """Through the scheduler of a service, in this thread."""
        prompts = prompts_of(self.batch)
        count = min(len(prompts), SLOTS)
        events: deque[tuple[int, str]] = deque()
        failed: list[Exception] = []

        def job(row: int, prompt: Prompt) -> Job:
            writer = self.writer(row, prompt.ids)

            def end(finish: Finish) -> None:
                self._note(row, writer)
                failed.extend([finish.error] if finish.error else [])

            return Job(prompt, writer, lambda piece: events.append((row, piece.text)), end)

        with torch.inference_mode():
            length = max(a + b for a, b in zip(self.lengths, self.limits, strict=True))
            slots = Slots(self.engine.model, count, length)  # type: ignore[arg-type]
        model, kept = self.engine.model, self.memory
        if kept is None and count > 1:
            kept = Memory(PREFIXES, FEATURES)
        prefixes, features = (None, None) if kept is None else (kept.prefixes, kept.features)
        # Weights may change between calls, not within one.
        state = state_of(model) if self.memory is not None else b""
        scheduler = Scheduler(model, slots, count, prefixes, features, seed=lambda: state)
        scheduler.waiting.extend(job(row, prompt) for row, prompt in enumerate(prompts))
        while not scheduler.idle:
            scheduler.step()
            if failed:
                raise failed[0]
            while events:
                yield events.popleft()

    def _in_rows(self) -> Iterator[tuple[int, str]]:
        """As a padded batch, for models that have no slots."""
        # Inference mode is entered for each step: held over a yield it would change the caller's own computations.
        with torch.inference_mode():
            steps = self.engine.steps(self)
            writers = [self.writer(row, ids) for row, ids in enumerate(self._prompts(steps))]
        live = list(range(len(writers)))
        while True:
            with torch.inference_mode():
                chosen = [writers[row].choose(steps.logits[place]) for place, row in enumerate(live)]
            going = []
            for place, (row, token) in enumerate(zip(live, chosen, strict=True)):
                piece = writers[row].push(token)
                if piece is not None and piece.text:
                    yield row, piece.text
                if writers[row].reason:
                    self._note(row, writers[row])
                else:
                    going.append(place)
            if not going:
                return
            with torch.inference_mode():
                device = steps.logits.device
                if len(going) < len(live):
                    steps.reorder(torch.tensor(going, device=device))
                    live = [live[place] for place in going]
                steps.advance(torch.tensor([writers[row].ids[-1] for row in live], device=device))

    def _note(self, row: int, writer: Writer) -> None:
        answer = self.answers[row]
        answer.ids, answer.text, answer.reason = writer.ids, writer.text, writer.reason
        answer.seed = writer.sampler.seeds[0] if self.options.temperature > 0 else None

    def _search(self) -> Iterator[tuple[int, str]]:
        """Beam search of all rows side by side, each with its own beams; one piece of text a row, at the end."""
        for row, (writer, beams) in enumerate(self._beams()):
            self.answers[row].score, ids = beams.best()
            for token in ids:
                writer.push(token)
            self._note(row, writer)
            yield row, writer.text

    @torch.inference_mode()
    def _beams(self) -> list[tuple[Writer, Beams]]:
        n, steps = self.options.num_beams, self.engine.steps(self)
        seen = self._seen(steps)
        spare = max(2, 1 + len(self.engine.stop_ids)) * n
        writers = [self.writer(row, ids) for row, ids in enumerate(self._prompts(steps))]
        found = [Beams(n, self.options.length_penalty, spare, writer.ends) for writer in writers]
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
                return list(zip(writers, found, strict=True))
            live = going
            rows = torch.tensor(parents, device=scores.device)
            fresh = torch.tensor(tokens, device=scores.device)
            steps.reorder(rows)
            if seen is not None:
                seen = seen[rows].scatter(1, fresh.unsqueeze(1), True)
            steps.advance(fresh)

    def _prompts(self, steps: Steps) -> list[Tensor]:
        """The ids of each row that the repetition penalty lowers from the beginning: the prompt's, without padding."""
        if isinstance(steps, Written):
            return list(steps.ids.cpu())
        return [ids[kept != 0] for ids, kept in zip(self.batch.input_ids, self.batch.segment_ids, strict=True)]

    def _seen(self, steps: Steps) -> Tensor | None:
        """Those ids as a table ``[B, V]``, where there is a penalty."""
        if self.options.repetition_penalty == 1.0:
            return None
        seen = torch.zeros_like(steps.logits, dtype=torch.bool)  # [B, V]
        for row, ids in enumerate(self._prompts(steps)):
            seen[row, ids.to(seen.device)] = True
        return seen


def is_conversation(value: Sequence[Any]) -> bool:
    """Whether ``value`` is one list of messages, not a list of such lists. Raises DataError where it is neither."""
    if isinstance(value, str | Mapping | Message) or not isinstance(value, Sequence):
        raise DataError(
            f"a conversation is a list of messages, got {type(value).__name__}; write "
            '[{"role": "user", "content": "..."}]'
        )
    return bool(value) and isinstance(value[0], (Message, Mapping))


def tuple_of(value: str | Sequence[str]) -> tuple[str, ...]:
    """A string, or several, as a tuple of strings."""
    return (value,) if isinstance(value, str) else tuple(value)


__all__ = ["Answer", "Engine", "Options", "Run", "generate"]
