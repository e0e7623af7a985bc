"""Where a model looks when it writes a word: heat over the pictures of a conversation, for a word of its answer.

Two ways to ask. ``attention``: how the positions that write the word share their attention, mean of the heads of the
upper layers (``LM.shares``), or of the gated blocks; through queries, their own attention over the patches goes on from
there (the product of the two, as in attention rollout, arXiv:2005.00928). ``gradient``: gradient × input
(arXiv:1605.01713) of the word's log-probability at the encoder's features, without its sign. The first shows what was
read, the second what it changed. Neither proves that the model needed it; to know that, take the picture away
(``chiasm eval`` shuffles them).

Differences by design: heat is mapped back by the gradient of the very steps that put tokens together (see ``heat``); a
model that does not tell its attention is asked for its gradient, and the result says which it was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.fusion.cross_attention import CrossAttention as Gated
from chiasm.fusion.splice import Splice
from chiasm.infer.heat import canvases, on_grid, through_gates, to_units
from chiasm.infer.stream import TextStream
from chiasm.nn.modes import evaluating
from chiasm.processing.base import Place
from chiasm.processing.messages import parse
from chiasm.types import Batch, MediaItem, Message, Sample, Text, Tokens

Method = Literal["attention", "gradient"]
METHODS: tuple[Method, ...] = ("attention", "gradient")


@dataclass(frozen=True)
class Word:
    """A word of an answer: its characters ``start:end``, and the positions of its tokens in the sequence."""

    text: str
    start: int
    end: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Heat:
    """The map ``values [rows, columns]`` over a picture of ``size`` (height, width) pixels; they sum to at most 1.

    ``index`` counts the media of its ``kind`` in the conversation; ``frame`` is the number of the frame of a clip.
    ``share``: for attention, the part of all attention that lies on this medium; for gradients, the part of all heat.
    """

    kind: str
    index: int
    frame: int | None
    size: tuple[int, int]
    values: Tensor
    share: float


@dataclass(frozen=True)
class Look:
    """Where the model looked. ``words`` are all words of the answer, so that another can be asked for by its number."""

    word: Word
    method: Method
    heats: list[Heat]
    words: list[Word]


@dataclass(frozen=True)
class Read:
    """A conversation with its answer, as tokens. ``decoder``: the answer's positions count on the decoder's side."""

    sample: Sample
    words: list[Word]
    decoder: bool


def look(
    model: Any,
    processor: Any,
    messages: Sequence[Any],
    answer: str,
    word: int | str | None = None,
    method: Method | None = None,
    last: int | None = None,
) -> Look:
    """Where ``model`` looks when it writes ``word`` of ``answer`` to ``messages``.

    ``word`` is the number of a word or the word itself (the first that equals it, without regard to case and
    punctuation); None: all of them together. ``method`` None: attention where the model tells it, else the gradient.
    ``last``: how many of the last layers count for attention (None: the upper half).

    Raises DataError for an answer or word that is not there, ConfigError for a model or method that cannot tell.
    """
    if method is not None and method not in METHODS:
        raise ConfigError(f"method {method!r}: give 'attention' or 'gradient', or leave it out")
    read = read_answer(processor, messages, answer)
    chosen = choose(read.words, word)
    if not read.sample.media:
        raise DataError("this conversation holds no picture to look at; add one, or ask about another turn")
    room = getattr(getattr(model, "lm", None), "max_positions", None)
    if room is not None and len(read.sample) > room:
        told = f"with its answer the conversation takes {len(read.sample)} positions, the language model has {room}"
        raise DataError(f"{told}: shorten it", "too_long")
    batch = processor.collate([read.sample]).to(model.device, model.dtype)
    with evaluating(model) if model.training else torch.no_grad():
        units = None if method == "gradient" else attended(model, batch, read, chosen, last)
        if units is None and method == "attention":
            raise ConfigError("this model does not tell its attention; use method='gradient'")
        used: Method = "gradient" if units is None else "attention"
        units = units or sloped(model, batch, read, chosen)
    return Look(chosen, used, heats(processor, read.sample, units), read.words)


@dataclass(frozen=True)
class Found:
    """What a medium got: ``units``, one ``[U, rows, columns]`` for each encoder, and its ``share`` of all there was."""

    units: list[Tensor]
    share: float


# ---------------------------------------------------------------------------------------------------------------- words


def read_answer(processor: Any, messages: Sequence[Any], answer: str) -> Read:
    """Render the conversation with its answer and find the answer's words. Raises DataError where it has none."""
    if not answer.strip():
        raise DataError("the answer is empty: there is no word to look at")
    before = [replace(m, train=False) if m.role == "assistant" else m for m in parse(messages, "look")]
    said = Message("assistant", (Text(answer),), True)
    sample = processor([*before, said], id="look", train=True)
    if sample.target_ids is not None:
        ids, first = sample.target_ids.tolist(), 1
        return Read(sample, _words(processor, ids[1:], first, answer), True)
    learned = sample.loss_mask.nonzero().flatten().tolist()
    first = learned[-1]
    while sample.loss_mask[first - 1]:
        first -= 1
    ids = sample.input_ids[first : learned[-1] + 1].tolist()
    return Read(sample, _words(processor, ids, first, answer), False)


def _words(processor: Any, ids: list[int], first: int, answer: str) -> list[Word]:
    """The words of the text of ``ids``; ``start`` and ``end`` count characters of ``answer`` where it is that text."""
    stream, pieces = TextStream(processor.decode), []
    wrote: list[int] = []  # for each character, the group of tokens that wrote it: one character may take several
    groups: list[list[int]] = [[]]
    for place, token in enumerate(ids):
        groups[-1].append(first + place)
        piece = stream.push(token)
        if piece:
            pieces.append(piece)
            wrote += [len(groups) - 1] * len(piece)
            groups.append([])
    text = "".join(pieces)
    place = text.find(answer.strip())
    shift = 0 if place < 0 else place - answer.index(answer.strip())
    end = len(text) if place < 0 else place + len(answer.strip())
    found = []
    for match in re.finditer(r"\S+", text[:end]):
        if match.start() < max(place, 0):
            continue
        touched = range(wrote[match.start()], wrote[match.end() - 1] + 1)
        positions = tuple(position for group in touched for position in groups[group])
        found.append(Word(match.group(), match.start() - shift, match.end() - shift, positions))
    if not found:
        raise DataError(f"no token writes a word of the answer {answer[:40]!r}")
    return found


def choose(words: Sequence[Word], word: int | str | None) -> Word:
    """A word by number or text, or all of them as one. Raises DataError where it is not there."""
    if word is None:
        whole = tuple(p for w in words for p in w.positions)
        return Word(" ".join(w.text for w in words), words[0].start, words[-1].end, tuple(dict.fromkeys(whole)))
    if isinstance(word, int):
        if not 0 <= word < len(words):
            raise DataError(f"word {word}: the answer has words 0 to {len(words) - 1}")
        return words[word]
    for candidate in words:
        if _bare(candidate.text) == _bare(word) or candidate.text == word:
            return candidate
    raise DataError(f"the answer has no word {word!r}; it has {', '.join(repr(w.text) for w in words[:12])}")


def _bare(text: str) -> str:
    return re.sub(r"\W", "", text).casefold()


# ------------------------------------------------------------------------------------------------------------ two ways


@torch.no_grad()
def attended(model: Any, batch: Batch, read: Read, word: Word, last: int | None) -> list[Found] | None:
    """The attention of the positions that write ``word``, on each medium. None where the model does not tell."""
    if not isinstance(model, Splice) or read.decoder:
        return None
    rows = torch.tensor([p - 1 for p in word.positions], device=batch.input_ids.device)  # written one position before
    items = [item for kind in batch.media for item in read.sample.media if item.kind == kind]
    told = (
        through_gates(model, batch, rows) if isinstance(model, Gated) else in_sequence(model, batch, items, rows, last)
    )
    if told is None:
        return None
    runs, named = told
    found: dict[int, Found] = {}
    for kind, media in batch.media.items():
        mine = [(item, run) for item, run in zip(items, runs, strict=True) if item.kind == kind]
        given = [run for _, run in mine]
        units = to_units(model, kind, replace(media, counts=[len(run) for run in given]), named, given)
        if units is None:
            return None
        shown = units.split([item.layout.units for item, _ in mine])
        found |= {id(item): Found([u], float(run.sum())) for (item, run), u in zip(mine, shown, strict=True)}
    return [found[id(item)] for item in read.sample.media]


def in_sequence(
    model: Splice, batch: Batch, items: Sequence[MediaItem], rows: Tensor, last: int | None
) -> tuple[list[Tensor], dict[str, Any]] | None:
    """How ``rows`` attend to each medium's slots, ``[M]`` for each, and the intermediates. None: it is not told."""
    named: dict[str, Any] = {}
    x = model.splice(batch, named)  # [1, T, D]
    shares = model.lm.shares(x, batch.positions, batch.segment_ids, rows, last)  # [1, R, T]
    if shares is None:
        return None
    each = shares[0].mean(dim=0)  # [T]
    return [each[item.slots.to(each.device)] for item in items if item.slots is not None], named


def sloped(model: Any, batch: Batch, read: Read, word: Word) -> list[Found]:
    """Gradient × input, without its sign, of the word's log-probability, at the features of each medium."""
    if not hasattr(model, "encoders") or not hasattr(model.config, "stream"):
        raise ConfigError(
            f"{type(model).__name__} has no encoder's features to look at; looking needs a 'splice' model"
        )
    leaves: dict[str, dict[str, Tokens]] = {}
    with torch.no_grad():
        for kind, media in batch.media.items():
            names = model.config.stream(kind).encoders
            leaves[kind] = {name: model.encoders[name](media.inputs) for name in names}
    with torch.enable_grad():
        for of_kind in leaves.values():
            for name, tokens in of_kind.items():
                of_kind[name] = replace(tokens, x=tokens.x.detach().clone().requires_grad_())
        given = {kind: replace(m, features=leaves[kind]) for kind, m in batch.media.items()}
        states = model(replace(batch, media=given), logits=None).hidden[0]  # [T, D]
        ids = (batch.target_ids if read.decoder else batch.input_ids)[0]  # type: ignore[index]
        at = torch.tensor(word.positions, device=states.device)
        chances = model.lm.head(states[at - 1]).float().log_softmax(dim=-1)
        score = chances.gather(1, ids[at].unsqueeze(1)).sum()
        flat = [tokens.x for of_kind in leaves.values() for tokens in of_kind.values()]
        slopes = torch.autograd.grad(score, flat, allow_unused=True)
    slope = {id(x): torch.zeros_like(x) if g is None else g for x, g in zip(flat, slopes, strict=True)}
    return _of_items(read.sample, {k: [(t, slope[id(t.x)]) for t in of.values()] for k, of in leaves.items()})


def _of_items(sample: Sample, found: dict[str, list[tuple[Tokens, Tensor]]]) -> list[Found]:
    """Heat on the places of each medium's units, as parts of the heat of all media."""
    maps: dict[str, list[Tensor]] = {}
    for kind, sources in found.items():
        maps[kind] = []
        for tokens, slope in sources:
            heat = (tokens.x.detach().float() * slope.float()).sum(dim=-1).abs()  # [U, N]
            placed = on_grid(heat, tokens)
            if placed is None:
                raise ConfigError(f"the {heat.shape[1]} vectors of a unit form no grid, so they have no place in it")
            maps[kind].append(placed)
    total = float(sum(m.sum() for of_kind in maps.values() for m in of_kind)) or 1.0
    seen = dict.fromkeys(maps, 0)
    result = []
    for item in sample.media:
        start = seen[item.kind]
        seen[item.kind] = end = start + item.layout.units
        units = [m[start:end] / total for m in maps[item.kind]]
        result.append(Found(units, float(sum(u.sum() for u in units))))
    return result


def heats(processor: Any, sample: Sample, found: Sequence[Found]) -> list[Heat]:
    """The maps over each medium of a sample."""
    totals: dict[str, int] = {}
    for item in sample.media:
        totals[item.kind] = totals.get(item.kind, 0) + 1
    seen = dict.fromkeys(totals, 0)
    result = []
    for item, got in zip(sample.media, found, strict=True):
        place = Place(sample.id, seen[item.kind], totals[item.kind])
        seen[item.kind] += 1
        front_end = processor.front_ends[item.kind]
        each = [canvases(front_end, item, place, units) for units in got.units]
        size = item.layout.original
        for frame, maps in enumerate(zip(*each, strict=True)):
            values = torch.stack(list(maps)).sum(dim=0)
            number = frame if item.kind == "video" else None
            result.append(Heat(item.kind, place.index, number, size, values, got.share))
    return result


__all__ = ["METHODS", "Heat", "Look", "Method", "Word", "look"]
