"""Held-out examples of models that compare pictures with texts: classification by labels, and retrieval.

A held-out source with ``labels`` is classified without training: the nearest label, through ``templates``, must be the
example's answer. Any other is searched: for each picture its text among all texts of the source, for each text its
picture. Both are also run with the pictures of other examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chiasm.data.base import Example
from chiasm.data.mixture import HeldOut
from chiasm.data.shuffle import media_of
from chiasm.data.shuffle import shuffled as shuffle
from chiasm.errors import DataError
from chiasm.eval.retrieval import KS, Pairs, evaluate
from chiasm.eval.runner import Answer, Comparison, Result
from chiasm.types import Media

Advance = Callable[[int, int], None]


def compare_pairs(
    vlm: Any,
    examples: Sequence[Example],
    entries: Mapping[str, HeldOut],
    shuffled: bool = True,
    batch_size: int = 64,
    seed: int = 0,
    advance: Advance | None = None,
) -> Comparison:
    """The same examples with their own pictures and, where asked, with those of others. Raises DataError."""
    check_pairs(examples, entries)
    true = _result(vlm, examples, entries, batch_size, {"shuffled_images": False, "seed": seed})
    if advance:
        advance(len(examples), len(examples))
    other = None
    if shuffled:
        mixed = shuffle(examples, seed)
        other = _result(vlm, mixed, entries, batch_size, {"shuffled_images": True, "seed": seed})
        if advance:
            advance(2 * len(examples), len(examples))
    return Comparison(true, other)


def compares(vlm: Any) -> bool:
    """Whether a model is evaluated in this way: it reads pairs, and makes vectors of both sides."""
    return bool(vlm.processor.template.beside) and hasattr(vlm.model, "embed_images")


def check_pairs(examples: Sequence[Example], entries: Mapping[str, HeldOut]) -> None:
    """Raises DataError for an example without exactly one picture, or whose answer is none of the labels."""
    for example in examples:
        if len(media_of(example)) != 1:
            raise DataError(
                f"sample {example.id!r}: has {len(media_of(example))} media; comparing pictures and texts needs 1"
            )
        labels = entries[example.source].labels
        if labels and not set(example.answers) & set(labels):
            raise DataError(
                f"sample {example.id!r}: its answers {list(example.answers)} are none of the {len(labels)} labels of "
                f"held_out.{example.source}.labels"
            )


def _result(
    vlm: Any, examples: Sequence[Example], entries: Mapping[str, HeldOut], batch: int, receipt: dict[str, Any]
) -> Result:
    answers: list[Answer] = []
    for source, entry in entries.items():
        mine = [e for e in examples if e.source == source]
        if mine:
            answers += _classified(vlm, mine, entry, batch) if entry.labels else _searched(vlm, mine, batch)
    told = {name: {"labels": len(e.labels), "templates": list(e.templates)} for name, e in entries.items()}
    return Result(answers, receipt | {"examples": len(examples), "sources": told})


def _classified(vlm: Any, examples: Sequence[Example], entry: HeldOut, batch: int) -> list[Answer]:
    pictures = [medium_of(e) for e in examples]
    chances = vlm.classify(pictures, entry.labels, list(entry.templates), batch=batch)  # [n, labels]
    found = []
    for example, best in zip(examples, chances.argmax(1).tolist(), strict=True):
        label, asked = entry.labels[best], f"which of {len(entry.labels)} labels?"
        task = f"{example.source}: {len(entry.labels)} labels"
        score = float(label in example.answers)
        found.append(Answer(example.id, example.source, task, asked, label, example.answers, score))
    return found


def _searched(vlm: Any, examples: Sequence[Example], batch: int) -> list[Answer]:
    pairs = Pairs.of([(medium_of(e), text_of(e)) for e in examples])
    found = evaluate(vlm, pairs, batch=batch)
    answers = []
    for way, queries in (("text", "picture → text"), ("image", "text → picture")):
        for k in KS:
            task = f"{examples[0].source}: {queries}, R@{k}"
            for number, rank in enumerate(found.ranks[way]):
                text = text_of(examples[number]) if way == "text" else pairs.texts[number]
                example = examples[number if way == "text" else pairs.owners[number][0]]
                told = f"found at {rank} of {len(pairs.texts if way == 'text' else pairs.images)}"
                answers.append(Answer(example.id, example.source, task, queries, told, (text,), float(rank <= k)))
    return answers


def medium_of(example: Example) -> Media:
    """The example's only medium."""
    return media_of(example)[0]


def text_of(example: Example) -> str:
    """What a pair says: the last turn that has a text."""
    text = next((m.text.strip() for m in reversed(example.messages) if m.text.strip()), "")
    if not text:
        raise DataError(f"sample {example.id!r}: has a picture but no text to compare it with")
    return text
