"""The control for image use: every example keeps its words and gets another example's pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from chiasm.data.base import Example
from chiasm.data.mixture import permutation
from chiasm.types import Media, Message


def shuffled(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """The examples that can be given another's media, with it. Examples without media, and those for which no other
    media of the same task and kinds exist, are left out.

    Media move inside a group (same task, same kinds of media in the same number), and never to an example that had the
    very same: the group is put in blocks of equal media and shifted by the longest block.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, example in enumerate(examples):
        kinds = tuple(m.kind for m in media_of(example))
        if kinds:
            groups.setdefault((example.task, kinds), []).append(i)
    donors: dict[int, int] = {}
    for number, members in enumerate(groups.values()):
        members = [members[i] for i in permutation(len(members), seed, "shuffled", number).tolist()]
        blocks: dict[Hashable, list[int]] = {}
        for i in members:
            blocks.setdefault(tuple(_key(m.data) for m in media_of(examples[i])), []).append(i)
        if len(blocks) > 1:
            donors |= _shift(list(blocks.values()))
    return [with_media(examples[i], media_of(examples[donors[i]])) for i in sorted(donors)]


def media_of(example: Example) -> tuple[Media, ...]:
    """All media of a conversation, in order."""
    return tuple(m for message in example.messages for m in message.media)


def with_media(example: Example, media: Sequence[Media]) -> Example:
    """The example with its media replaced one by one."""
    rest: Iterator[Media] = iter(media)

    def exchange(message: Message) -> Message:
        return replace(message, parts=tuple(next(rest) if isinstance(p, Media) else p for p in message.parts))

    return replace(example, messages=tuple(exchange(m) for m in example.messages))


def _shift(blocks: list[list[int]]) -> dict[int, int]:
    """Who gets whose: places shifted by the longest block, which leaves no block's member inside its own block.

    A block that is longer than all others together cannot be served; its surplus is left out.
    """
    blocks = sorted(blocks, key=len, reverse=True)
    blocks[0] = blocks[0][: sum(len(b) for b in blocks[1:])]
    line = [i for block in blocks for i in block]
    by = len(blocks[0])
    return {i: line[(place + by) % len(line)] for place, i in enumerate(line)}


def _key(data: Any) -> Hashable:
    """What tells two media apart: their content where it is in memory, their path where it is not."""
    if isinstance(data, (str, bytes)):
        return data
    if hasattr(data, "tobytes"):
        return hashlib.sha256(data.tobytes()).digest()
    if isinstance(data, Sequence):
        return tuple(_key(d) for d in data)
    return str(data)
