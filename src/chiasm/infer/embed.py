"""Vectors of pictures and texts, in batches, with pictures decoded beside the model's work.

    for rows, vectors in stream(model, processor, ["a.jpg", "b.jpg", ...], "image"): ...   # bounded memory
    vectors = embed(model, processor, images=["a.jpg", picture])                             # [2, D]

A picture that cannot be read stops ``embed``; ``stream`` hands it to ``broken`` and goes on.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.nn.modes import evaluating
from chiasm.types import Batch, Image, Media, Message, Sample, Text

Kind = Literal["image", "text"]
Broken = Callable[[int, DataError], None]
AHEAD = 2  # batches that are prepared before the model asks for them


def embed(
    model: Any,
    processor: Any,
    images: Sequence[Any] | None = None,
    texts: Sequence[str] | None = None,
    batch: int = 64,
    workers: int = 0,
) -> Tensor:
    """Vectors of unit length ``[n, D]`` of pictures or of texts, in their order, float32 on the CPU.

    A picture is a path, a PIL image, bytes, an array or a data URL. ``workers`` threads decode pictures meanwhile.
    Raises DataError that names the picture or the text by its number; ConfigError for a model that has no ``embed``.
    """
    if (images is None) == (texts is None):
        raise ConfigError("embed takes images=[...] or texts=[...], one of the two")
    items, kind = (images, "image") if images is not None else (texts, "text")
    assert items is not None
    if isinstance(items, str | bytes) or not isinstance(items, Sequence):
        raise DataError(f"embed takes a list of {kind}s, got {type(items).__name__}; put it in a list")
    order = sorted(range(len(items)), key=lambda i: len(items[i])) if kind == "text" and _texts(items) else None
    placed = [items[i] for i in order] if order else items
    parts = list(stream(model, processor, placed, "image" if images is not None else "text", batch, workers))
    if not parts:
        return torch.empty(0, model.config.dim)
    found = torch.cat([vectors for _, vectors in parts])  # [n, D]
    if order is None:
        return found
    result = torch.empty_like(found)
    result[torch.tensor(order)] = found
    return result


def classes(model: Any, processor: Any, images: Sequence[Any], batch: int = 64, workers: int = 0) -> Tensor:
    """Probabilities ``[n, C]`` of a model's own classes, ``processor.config.labels``, float32 on the CPU.

    Raises ConfigError for a model that has none; DataError.
    """
    if hasattr(model, "embed_images") or not hasattr(model, "classify"):
        raise ConfigError(f"a model of type {model.config.type!r} has no classes of its own; give labels")
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise DataError(f"classify takes a list of images, got {type(images).__name__}; put it in a list")
    found = []
    for samples in _prepared(processor, images, "image", batch, workers, None):
        given: Batch = processor.collate([sample for _, sample in samples])
        with evaluating(model), torch.inference_mode():
            found.append(model.classify(given.to(model.device, model.dtype)).float().softmax(-1).cpu())  # [n, C]
    return torch.cat(found).clone() if found else torch.empty(0, model.config.classes)


def stream(
    model: Any,
    processor: Any,
    items: Iterable[Any],
    kind: Kind = "image",
    batch: int = 64,
    workers: int = 0,
    broken: Broken | None = None,
    unit: bool = True,
) -> Iterator[tuple[list[int], Tensor]]:
    """``(rows, vectors [len(rows), D])`` one batch after the other; ``rows`` are the numbers of the items.

    At most a few batches are in memory, however many items there are. ``broken(number, error)`` is told of what cannot
    be read, which then has no vector; without it the error is raised. ``unit=False``: pictures' vectors as they are
    before they are made unit length.
    """
    if not hasattr(model, "embed_images"):
        raise ConfigError(
            f"a model of type {model.config.type!r} gives no vectors to compare; load one of two towers, for instance "
            "a CLIP"
        )
    if batch < 1:
        raise ConfigError(f"batch is {batch}; give at least 1")
    of_pictures = model.embed_images if unit else model.encode_images
    run = of_pictures if kind == "image" else model.embed_texts
    for samples in _prepared(processor, items, kind, batch, workers, broken):
        given: Batch = processor.collate([sample for _, sample in samples])
        with evaluating(model), torch.inference_mode():
            vectors = run(given.to(model.device, model.dtype))  # [n, D]
        yield [number for number, _ in samples], vectors.to("cpu", torch.float32).clone()


def conversation(item: Any, kind: Kind) -> list[Message]:
    """A picture or a text as the one user turn that the processor reads."""
    part = (item if isinstance(item, Media) else Image(item)) if kind == "image" else Text(item)
    return [Message("user", (part,))]


def _prepared(
    processor: Any, items: Iterable[Any], kind: Kind, size: int, workers: int, broken: Broken | None
) -> Iterator[list[tuple[int, Sample]]]:
    """Batches of numbered samples, read ahead by threads (decoding leaves Python's lock)."""

    def read(numbered: tuple[int, Any]) -> Sample | DataError:
        number, item = numbered
        if kind == "text" and not isinstance(item, str):
            return DataError(f"text {number + 1} is {type(item).__name__}; give a string")
        name = str(item) if isinstance(item, str) and kind == "image" and len(item) < 500 else f"{kind} {number + 1}"
        try:
            return processor(conversation(item, kind), id=name)  # type: ignore[no-any-return]
        except DataError as error:
            return error

    def kept(numbers: list[int], found: Iterable[Sample | DataError]) -> list[tuple[int, Sample]]:
        good = []
        for number, sample in zip(numbers, found, strict=True):
            if isinstance(sample, Sample):
                good.append((number, sample))
            elif broken is None:
                raise sample
            else:
                broken(number, sample)
        return good

    groups = _grouped(enumerate(items), size)
    if not workers:
        for group in groups:
            if good := kept([n for n, _ in group], map(read, group)):
                yield good
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[list[int], list[Future[Any]]]] = deque()
        try:
            for group in itertools.chain(groups, itertools.repeat([], AHEAD)):
                if group:
                    waiting.append(([n for n, _ in group], [pool.submit(read, one) for one in group]))
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
