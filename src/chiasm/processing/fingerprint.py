"""The fingerprint of a processor: what it makes of built-in conversations, so that a change can never go unnoticed.

A saved model carries the token ids and the pixels (a hash, and a sample of the values) of a few probe conversations.
They are computed again at load; a difference means that the model would see another prompt or other pixels than it was
trained on, whatever changed: a template, a resampling filter, a mean, the tokenizer, a library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image as Pillow

from chiasm.errors import ChiasmError, FingerprintError
from chiasm.processing.processor import Processor
from chiasm.types import Image, Media, MediaItem, Message, Text, Video

VERSION = 1
SAMPLED = 512  # values kept of each medium's tensor, so that a difference can be named
SPELLED = 12  # the tokenizer's own control tokens that are spelled in a text

REMEDY = (
    "The prompt or the pixels are no longer those this model was saved with: restore what changed (config.json, the "
    "tokenizer files, the library that reads them), or load with ignore_fingerprint=True, which is recorded"
)


def picture(width: int, height: int, seed: int) -> Pillow.Image:
    """A picture made of integers only: gradients that differ by channel, and a pattern that resampling filters feel."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    red = (x * 255 // max(1, width - 1) + 31 * seed) % 256
    green = (y * 255 // max(1, height - 1) + 57 * seed) % 256
    blue = (x * x * 7 + y * y * 13 + x * y * 3 + 101 * seed) % 256
    return Pillow.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def probes(processor: Processor) -> dict[str, list[Message]]:
    """The conversations by name: those of the kinds of media that the processor takes."""
    tokens = [*getattr(processor.tokenizer, "specials", {})][:SPELLED]
    spelled = "A text that spells <image> </s> <|im_end|> [INST] ASSISTANT: " + " ".join(tokens) + " and goes on."
    found = {
        "text": [_user("What is the capital of France?")],
        "special tokens": [_user(spelled)],
        "two turns": [_user("Count to three."), _assistant("One, two, three."), _user("And on?")],
    }
    if "image" in processor.front_ends:
        one, two, three = (Image(picture(*size)) for size in ((61, 37, 1), (33, 90, 2), (127, 128, 3)))
        found["one picture"] = [_user("What is shown here?", one)]
        found["two turns, two pictures"] = [
            _user("What is this?", two),
            _assistant("A pattern."),
            _user("And how does this one differ?", three),
        ]
    if "video" in processor.front_ends:
        clip = Video([picture(53, 41, i) for i in range(4)], fps=1.0)
        found["one clip"] = [_user("What happens?", clip)]
    for kind, front_end in processor.front_ends.items():
        probe = getattr(front_end, "probe", None)  # other modalities bring their own medium
        if kind not in ("image", "video") and probe is not None:
            found[f"one {kind}"] = [_user("What is this?", probe())]
    return found


def fingerprint(processor: Processor) -> dict[str, Any]:
    """What the processor makes of the probes, as JSON values."""
    made = {name: _print(processor, messages) for name, messages in probes(processor).items()}
    return {"version": VERSION, "stop_ids": list(processor.stop_ids), "probes": made}


def check_fingerprint(processor: Processor, stored: Mapping[str, Any], where: str) -> None:
    """Raises FingerprintError that names the first difference between ``stored`` and what the processor makes now."""
    difference = compare(processor, stored)
    if difference:
        raise FingerprintError(f"{where}: {difference}. {REMEDY}")


def compare(processor: Processor, stored: Mapping[str, Any]) -> str | None:
    """The first difference in words, or None."""
    if stored.get("version") != VERSION or not isinstance(stored.get("probes"), Mapping):
        return f"its fingerprint has version {stored.get('version')!r}, this one is {VERSION}"
    current = fingerprint(processor)
    now = current["probes"]
    for name, before in stored["probes"].items():
        if name not in now:
            return f"probe {name!r} is in the fingerprint, but the processor takes no such conversation"
        difference = _tokens(processor, before, now[name]) or _pixels(before, now[name])
        if difference:
            return f"probe {name!r}: {difference}"
    new = [name for name in now if name not in stored["probes"]]
    if new:
        return f"probe {new[0]!r} is not in the fingerprint, but the processor takes such a conversation"
    if stored.get("stop_ids") != current["stop_ids"]:
        return f"generation stopped at ids {stored.get('stop_ids')}, stops at {current['stop_ids']} now"
    return None


def _user(text: str, *media: Media) -> Message:
    return Message("user", (*media, Text(text)))


def _assistant(text: str) -> Message:
    return Message("assistant", (Text(text),))


def _print(processor: Processor, messages: list[Message]) -> dict[str, Any]:
    try:
        sample = processor(messages, id="fingerprint", add_generation_prompt=True)
    except ChiasmError as error:  # a template may refuse a form of conversation: then it must go on refusing it
        return {"refused": str(error)[:200]}
    read = [index for item in sample.media if item.cond is not None for index in item.cond.tolist()]  # instructions
    runs = [[index, len(list(run))] for index, run in groupby(sample.input_ids.tolist() + read)]
    return {"ids": runs, "media": [_medium(item) for item in sample.media]}


def _medium(item: MediaItem) -> dict[str, Any]:
    values = item.inputs.detach().cpu().contiguous().float().numpy()
    flat = values.reshape(-1)
    step = max(1, len(flat) // SAMPLED)
    return {
        "shape": list(values.shape),
        "sha256": hashlib.sha256(values.astype("<f4").tobytes()).hexdigest(),
        "step": step,
        "values": [float(v) for v in flat[::step]],
    }


def _expand(runs: list[list[int]]) -> list[int]:
    return [index for index, count in runs for _ in range(count)]


def _tokens(processor: Processor, before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if "refused" in before or "refused" in now:
        if ("refused" in before) == ("refused" in now):
            return None
        side = "was refused when saved, is rendered now" if "refused" in before else f"is refused now: {now['refused']}"
        return f"it {side}"
    old, new = _expand(before["ids"]), _expand(now["ids"])
    for position, (a, b) in enumerate(zip(old, new)):
        if a != b:
            return f"token {position} was {_show(processor, a)}, is {_show(processor, b)} now"
    if len(old) != len(new):
        longer = (old if len(old) > len(new) else new)[min(len(old), len(new))]
        return (
            f"it had {len(old)} tokens, has {len(new)} now; the first that only one of them has is "
            f"{_show(processor, longer)} at {min(len(old), len(new))}"
        )
    return None


def _show(processor: Processor, index: int) -> str:
    return f"{index} {processor.tokenizer.token_of(index)!r}"


def _pixels(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    for number, (a, b) in enumerate(zip(before.get("media", []), now.get("media", []))):
        if a["shape"] != b["shape"]:
            return f"medium {number + 1} had shape {a['shape']}, has {b['shape']} now"
        if a["sha256"] == b["sha256"]:
            continue
        for i, (old, new) in enumerate(zip(a["values"], b["values"])):
            if old != new:
                place = [int(k) for k in np.unravel_index(i * a["step"], a["shape"])]
                return (
                    f"medium {number + 1}, pixel {place} (unit, channel, row, column) was {old:.6g}, is {new:.6g} now"
                )
        return (
            f"medium {number + 1}: hash {a['sha256'][:12]} became {b['sha256'][:12]}; the values kept of it are equal"
        )
    return None
