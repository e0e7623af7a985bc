"""What happens to a sample that is longer than ``max_length``, or that has nothing to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from chiasm.errors import DataError
from chiasm.types import Message, Sample


def cut(sample: Sample, limit: int | None, train: bool, prompt: bool) -> Sample:
    """Take off the end of a sample that is too long. DataError where that would touch a medium, every target, or the
    end of a prompt: what is left of it would not ask for an answer any more.
    """
    if limit is not None and len(sample) > limit:
        for number, item in enumerate(sample.media):
            assert item.slots is not None
            if len(item.slots) and int(item.slots[-1]) >= limit:
                first, last = int(item.slots[0]), int(item.slots[-1])
                raise DataError(
                    f"sample {sample.id!r}: {item.kind} {number + 1} of {len(sample.media)} takes positions "
                    f"{first} to {last} of {len(sample)} but max_length is {limit}; a medium is never cut: raise "
                    f"max_length to at least {last + 1}, or use fewer or smaller media",
                    "too_long",
                )
        if prompt:
            raise DataError(
                f"sample {sample.id!r}: the prompt has {len(sample)} tokens but max_length is {limit}; a prompt is "
                f"never cut: raise max_length to at least {len(sample)}, or shorten the conversation",
                "too_long",
            )
        had = int(sample.loss_mask.sum())
        lost = sample.lost + len(sample) - limit
        sample = replace(sample, input_ids=sample.input_ids[:limit], loss_mask=sample.loss_mask[:limit], lost=lost)
        if train and had and not sample.loss_mask.any():
            raise DataError(
                f"sample {sample.id!r}: max_length {limit} cuts off all of its {had} trained tokens; raise "
                "max_length or shorten the question",
                "too_long",
            )
    if train and sample.target_ids is None and not sample.loss_mask.any():
        raise DataError(
            f"sample {sample.id!r}: none of its {len(sample)} tokens is trained; add an assistant turn that has "
            "not 'train': false",
            "no_target",
        )
    return sample


def check_answers(messages: Sequence[Message], id: str) -> None:
    """Raises DataError for an answer that is learned from but empty."""
    for number, message in enumerate(messages):
        learned = message.role == "assistant" and message.train is not False
        if learned and not message.media and not message.calls and not message.text.strip():
            raise DataError(
                f"sample {id!r}, message {number + 1}: the answer is empty ({len(message.text)} characters); give it "
                "a text, or leave it out of training with 'train': false",
                "empty_answer",
            )
