"""Proof of the loss mask: what a batch learns from, read back from its tokens, is answers and their ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from chiasm.data.base import Example, with_answer
from chiasm.processing.messages import parse
from chiasm.train.proof import ProofError
from chiasm.types import Batch, Message, Piece, Text

REMEDY = (
    "the template or the mask is wrong: chiasm inspect shows the sample token by token; a template that is meant to "
    "learn more says so (loss: all)"
)


def check_masks(processor: Any, batch: Batch, examples: Mapping[str, Example], max_length: int | None = None) -> int:
    """Compare each sample's trained text with its answers; returns how many could be compared.

    Trained must be: every answer whole, its end behind it, and beyond that only what the template itself writes. Left
    out are templates that learn everything, and answers that hold boxes or media. Raises ProofError naming the sample.
    """
    if getattr(processor.template.config, "loss", "") == "all" or processor.template.beside:
        return 0
    limit = max_length if max_length is not None else processor.config.max_length
    done = 0
    for id, ids, learned in rows(batch):
        example = examples.get(id)
        if example is None:
            continue
        messages = parse((with_answer(example) if example.answers else example).messages, id)
        answers = [m for m in messages if m.role == "assistant" and m.train is not False]
        if any(not isinstance(p, Text) for m in answers for p in m.parts):
            continue
        cut = limit is not None and len(ids) >= limit
        _compare(processor, id, messages, answers, list(runs(processor, ids, learned)), cut, batch.target_ids is None)
        done += 1
    return done


def rows(batch: Batch) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Id, tokens and mask of each sample, padding left out, of a padded or a packed batch."""
    if batch.target_ids is not None and batch.target_mask is not None:
        for id, ids, mask in zip(batch.ids, batch.target_ids.tolist(), batch.target_mask.tolist(), strict=True):
            yield id, ids[1:], mask[1:]
        return
    number = 0
    for ids, mask, segments in zip(
        batch.input_ids.tolist(), batch.loss_mask.tolist(), batch.segment_ids.tolist(), strict=True
    ):
        for segment in sorted({s for s in segments if s}):
            places = [i for i, s in enumerate(segments) if s == segment]
            yield batch.ids[number], [ids[i] for i in places], [mask[i] for i in places]
            number += 1


def runs(processor: Any, ids: list[int], learned: list[bool]) -> Iterator[str]:
    """The text of each run of trained tokens."""
    run: list[int] = []
    for token, counts in zip([*ids, 0], [*learned, False], strict=True):
        if counts:
            run.append(token)
        elif run:
            yield processor.tokenizer.decode(run, skip_special=False)
            run = []


def _compare(
    processor: Any,
    id: str,
    messages: tuple[Message, ...],
    answers: list[Message],
    found: list[str],
    cut: bool,
    with_end: bool,
) -> None:
    pieces = processor.template.render(messages, False, f"sample {id!r}")
    own = "".join(_squash(_as_tokens(processor, p.text, True)) if p.literal else "\0" for p in pieces)
    end = _as_tokens(processor, processor.template.end, True)
    wanted = [_squash(_as_tokens(processor, m.text)) for m in answers]
    if not with_end:
        wanted = wanted[-1:]  # an encoder-decoder model learns the last answer
    here = 0
    for number, run in enumerate(found):
        rest = _squash(run)
        while here < len(wanted) and wanted[here] in rest:
            before, _, rest = rest.partition(wanted[here])
            _own(id, before, own)
            if not cut and not (_squash(end) and rest.startswith(_squash(end))) and not run.endswith(end):
                raise ProofError(
                    f"sample {id!r}: answer {here + 1} of {len(wanted)} is learned without its end, {end!r}: "
                    f"the model would not learn to stop; {REMEDY}"
                )
            here += 1
        if cut and number == len(found) - 1 and here < len(wanted) and rest and wanted[here].startswith(rest):
            return
        _own(id, rest, own)
    if here < len(wanted) and not cut:
        raise ProofError(
            f"sample {id!r}: answer {here + 1} of {len(wanted)}, {answers[here].text[:60]!r}, is not learned whole; "
            f"learned is {[r[:60] for r in found][:4]}; {REMEDY}"
        )


def _own(id: str, text: str, own: str) -> None:
    """What is learned beside answers must be the template's own words."""
    if text and text not in own:
        raise ProofError(
            f"sample {id!r}: {text[:80]!r} is learned, which is neither an answer nor written by the template; {REMEDY}"
        )


def _as_tokens(processor: Any, text: str, literal: bool = False) -> str:
    """The text as it comes back from its tokens: what the tokenizer normalises or does not know is so on both sides."""
    encoding = processor.tokenizer.encode_pieces([Piece(text, literal=literal)])
    return str(processor.tokenizer.decode(encoding.ids, skip_special=False))


def _squash(text: str) -> str:
    return "".join(text.split())
