"""Vectors of pictures and texts, in batches: on a CPU each core decodes and computes by itself, else pictures are
decoded beside the model's work.

    for rows, vectors in stream(model, processor, ["a.jpg", "b.jpg", ...], "image"): ...   # bounded memory
    vectors = embed(model, processor, images=["a.jpg", picture])                             # [2, D]

A picture that cannot be read stops ``embed``; ``stream`` hands it to ``broken`` and goes on.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from chiasm.errors import ConfigError, DataError, NumberError
from chiasm.infer import apart
from chiasm.nn.modes import evaluating
from chiasm.nn.packed import Packed
from chiasm.types import Batch, Image, Media, Message, Sample, Text

Kind = Literal["image", "text"]
Broken = Callable[[int, DataError], None]
Shortened = Callable[[int, int, int], None]
AHEAD = 2  # batches that are worked on before they are asked for
MANY = 64  # items of a first batch for which weights are laid out anew
PART = 32  # items that a core takes at once: the weights are read once for all of them


@dataclass(frozen=True)
class Reader:
    """Pictures or texts by their numbers, as samples; what cannot be read as the error that says so."""

    processor: Any
    kind: Kind
    truncate: bool | Shortened = False

    def __call__(self, number: int, item: Any) -> Sample | DataError:
        """One item; also from several threads at once."""
        if self.kind == "text" and not isinstance(item, str):
            return DataError(f"text {number + 1} is {type(item).__name__}; give a string")
        named = isinstance(item, str) and self.kind == "image" and len(item) < 500
        name = str(item) if named else f"{self.kind} {number + 1}"
        try:
            sample: Sample = self.processor(conversation(item, self.kind, self.processor.template), id=name)
        except DataError as error:
            alone = f"sample {name!r}, medium 1 of 1: "  # there is no sample here, and the error names the picture
            return DataError(str(error).removeprefix(alone), error.fault) if named else error
        if sample.lost and not self.truncate:
            start = item if len(item) <= 40 else item[:37] + "..."
            return DataError(
                f"text {number + 1}, {start!r}: has {len(sample) + sample.lost} tokens, this model reads {len(sample)} "
                "(first and last token included); shorten it, or leave its end out with truncate=True",
                "too_long",
            )
        if sample.lost and callable(self.truncate):
            self.truncate(number, len(sample) + sample.lost, len(sample))
        return sample


def embed(
    model: Any,
    processor: Any,
    images: Sequence[Any] | None = None,
    texts: Sequence[str] | None = None,
    batch: int = 64,
    workers: int | None = None,
    truncate: bool = False,
) -> Tensor:
    """Vectors of unit length ``[n, D]`` of pictures or of texts, in their order, float32 on the CPU.

    A picture is a path, a PIL image, bytes, an array or a data URL. ``workers``: see ``stream``.
    ``truncate``: a text longer than the model reads loses its end; without it such a text is refused. Raises DataError
    that names the picture or the text by its number; ConfigError for a model that has no ``embed``.
    """
    if (images is None) == (texts is None):
        raise ConfigError("embed takes images=[...] or texts=[...], one of the two")
    kind: Kind = "text" if images is None else "image"
    items: Any = texts if images is None else images
    if isinstance(items, str | bytes) or not isinstance(items, Sequence):
        raise DataError(f"embed takes a list of {kind}s, got {type(items).__name__}; put it in a list")
    order: Sequence[int] = range(len(items))
    if kind == "text" and _texts(items):  # batches of near-equal lengths
        order = sorted(order, key=lambda i: len(items[i]))
    run, read = _task(model, kind, batch, True), Reader(processor, kind, truncate)
    parts = list(_run(model, read, ((i, items[i]) for i in order), batch, workers, None, run))
    if not parts:
        return torch.empty(0, model.config.dim)
    found = torch.cat([vectors for _, vectors in parts])  # [n, D]
    result = torch.empty_like(found)
    result[torch.tensor([number for numbers, _ in parts for number in numbers])] = found
    return result


def classes(model: Any, processor: Any, images: Sequence[Any], batch: int = 64, workers: int | None = None) -> Tensor:
    """Probabilities ``[n, C]`` of a model's own classes, ``processor.config.labels``, float32 on the CPU.

    Raises ConfigError for a model that has none; DataError.
    """
    if hasattr(model, "embed_images") or not hasattr(model, "classify"):
        raise ConfigError(f"a model of type {model.config.type!r} has no classes of its own; give labels")
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise DataError(f"classify takes a list of images, got {type(images).__name__}; put it in a list")

    def run(given: Batch) -> Tensor:
        return model.classify(given).float().softmax(-1)  # type: ignore[no-any-return]  # [n, C]

    found = [
        chances for _, chances in _run(model, Reader(processor, "image"), enumerate(images), batch, workers, None, run)
    ]
    return torch.cat(found).clone() if found else torch.empty(0, model.config.classes)


def stream(
    model: Any,
    processor: Any,
    items: Iterable[Any],
    kind: Kind = "image",
    batch: int = 64,
    workers: int | None = None,
    broken: Broken | None = None,
    unit: bool = True,
    truncate: bool | Shortened = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """``(rows, vectors [len(rows), D])`` one batch after the other; ``rows`` are the numbers of the items.

    At most a few batches are in memory, however many items there are. ``broken(number, error)`` is told of what cannot
    be read, which then has no vector; without it the error is raised. ``unit=False``: pictures' vectors as they are
    before they are made unit length. ``truncate``: texts that are longer than the model reads lose their end; a
    function is told of each by its number, with its tokens and those that are read.

    On a CPU each core works by itself, so that decoding and computing never wait for each other; ``workers=0``: all
    cores share each product, and nothing is decoded meanwhile. On other devices ``workers`` threads decode pictures.
    """
    run, read = _task(model, kind, batch, unit), Reader(processor, kind, truncate)
    yield from _run(model, read, enumerate(items), batch, workers, broken, run)


def _task(model: Any, kind: Kind, batch: int, unit: bool) -> Callable[[Batch], Tensor]:
    """What makes vectors of a batch. Raises ConfigError for a model that has none, or a batch of nothing."""
    if not hasattr(model, "embed_images"):
        raise ConfigError(
            f"a model of type {model.config.type!r} gives no vectors to compare; load one of two towers, for instance "
            "a CLIP"
        )
    if batch < 1:
        raise ConfigError(f"batch is {batch}; give at least 1")
    if kind == "text":
        return model.embed_texts  # type: ignore[no-any-return]
    return model.embed_images if unit else model.encode_images  # type: ignore[no-any-return]


def _run(
    model: Any,
    read: Reader,
    items: Iterable[tuple[int, Any]],
    size: int,
    workers: int | None,
    broken: Broken | None,
    run: Callable[[Batch], Tensor],
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of each batch's ``items`` and what ``run`` makes of them ``[n, ...]``, float32 on the CPU."""

    def work(samples: list[tuple[int, Sample]]) -> Tensor:
        given: Batch = read.processor.collate([sample for _, sample in samples])
        with torch.inference_mode():
            found = run(given.to(model.device, model.dtype)).to("cpu", torch.float32).clone()
        sound = found.isfinite().flatten(1).all(1)  # [n]
        if not bool(sound.all()):
            number = samples[int((~sound).nonzero()[0])][0]
            raise NumberError(
                f"{read.kind} {number + 1}: what the model makes of it is NaN or infinite: in float16 its numbers may "
                "be too large (load it with dtype bfloat16 or float32), or a weight of it is broken"
            )
        return found

    threads = apart.cores(model) if workers != 0 else 1
    groups = _grouped(items, size)
    first = next(groups, [])
    if threads > 1 and len(first) > 1:
        yield from _apart(read, itertools.chain([first], groups), threads, len(first) >= MANY, broken, work)
        return
    beside = min(8, os.cpu_count() or 1) if workers is None and model.device.type != "cpu" else workers or 0
    for samples in _prepared(read, itertools.chain([first] if first else [], groups), beside, broken):
        with evaluating(model):
            vectors = work(samples)
        yield [number for number, _ in samples], vectors


def _apart(
    read: Reader,
    groups: Iterable[list[tuple[int, Any]]],
    threads: int,
    many: bool,
    broken: Broken | None,
    work: Callable[[list[tuple[int, Sample]]], Tensor],
) -> Iterator[tuple[list[int], Tensor]]:
    """The same with batches cut into parts, of which each thread decodes and computes one after the other.

    Where the first batch is large, weights in bfloat16 are laid out once for all that follow (``chiasm.nn.packed``),
    which takes so much more memory while this runs.
    """
    packed = Packed()
    Part = tuple[list[int], Tensor | None, list[tuple[int, DataError]]]

    def whole(part: list[tuple[int, Any]]) -> Part:
        found = [(number, read(number, item)) for number, item in part]
        good = [(number, sample) for number, sample in found if isinstance(sample, Sample)]
        bad = [(number, sample) for number, sample in found if isinstance(sample, DataError)]
        if not good:
            return [], None, bad
        with packed.used() if many else nullcontext():
            return [number for number, _ in good], work(good), bad

    with apart.pool(threads) as pool:
        waiting: deque[list[Future[Part]]] = deque()
        try:
            for group in itertools.chain(groups, itertools.repeat([], AHEAD)):
                if group:
                    length = min(PART, -(-len(group) // threads))
                    parts = [group[i : i + length] for i in range(0, len(group), length)]
                    waiting.append([pool.submit(whole, part) for part in parts])
                if waiting and (len(waiting) > AHEAD or not group):
                    done = [future.result() for future in waiting.popleft()]
                    for number, error in (one for _, _, bad in done for one in bad):
                        _told(broken, number, error)
                    vectors = [found for _, found, _ in done if found is not None]
                    if vectors:
                        yield [number for numbers, _, _ in done for number in numbers], torch.cat(vectors)
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()


def conversation(item: Any, kind: Kind, template: Any = None) -> list[Message]:
    """A picture or a text as what a processor reads: one turn of the user, or, where its ``template`` leaves out what
    users say (captions of BLIP-2's first stage), the answer to one.
    """
    part = (item if isinstance(item, Media) else Image(item)) if kind == "image" else Text(item)
    if kind == "image" or getattr(getattr(template, "config", None), "user_text", True):
        return [Message("user", (part,))]
    return [Message("user", (Text("what is this?"),)), Message("assistant", (part,))]


def _told(broken: Broken | None, number: int, error: DataError) -> None:
    if broken is None:
        raise error
    broken(number, error)


def _prepared(
    read: Reader, groups: Iterable[list[tuple[int, Any]]], workers: int, broken: Broken | None
) -> Iterator[list[tuple[int, Sample]]]:
    """Batches of numbered samples, read ahead by threads (decoding leaves Python's lock)."""

    def kept(numbers: list[int], found: Iterable[Sample | DataError]) -> list[tuple[int, Sample]]:
        good = []
        for number, sample in zip(numbers, found, strict=True):
            if isinstance(sample, Sample):
                good.append((number, sample))
            else:
                _told(broken, number, sample)
        return good

    if not workers:
        for group in groups:
            if good := kept([n for n, _ in group], (read(*one) for one in group)):
                yield good
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[list[int], list[Future[Any]]]] = deque()
        try:
            for group in itertools.chain(groups, itertools.repeat([], AHEAD)):
                if group:
                    waiting.append(([n for n, _ in group], [pool.submit(read, *one) for one in group]))
                if waiting and (len(waiting) > AHEAD or not group):
                    numbers, futures = waiting.popleft()
                    if good := kept(numbers, [future.result() for future in futures]):
                        yield good
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()


def _grouped(items: Iterable[tuple[int, Any]], size: int) -> Iterator[list[tuple[int, Any]]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _texts(items: Sequence[Any]) -> bool:
    return all(isinstance(item, str) for item in items)
