"""What a model sees, token by token: for ``chiasm inspect``, and as a coloured picture of it in notebooks."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image as Pillow
from torch import Tensor

from chiasm.types import Batch, Layout, Sample

if TYPE_CHECKING:
    from chiasm.processing.processor import Processor

CONVERSATIONS, TOKENS, UNITS, SIDE = 8, 1500, 6, 96  # shown of a batch, of a conversation, of a medium; pixels
LEARNED, SLOT, PAD = "background:#b7e4c7;color:#081c15", "background:#a9d6f5;color:#03263f", "color:#999"


@dataclass(frozen=True)
class TokenRow:
    """One token of a sample, for inspection."""

    position: int
    id: int
    text: str
    trained: bool
    medium: str | None  # "image 1" where the token is a slot of a medium


def rows(processor: Processor, sample: Sample) -> list[TokenRow]:
    """Every token of a sample with its text, whether it is learned, and the medium whose slot it is."""
    slots = [[] if item.slots is None else item.slots.tolist() for item in sample.media]
    return [*_rows(processor, sample.input_ids.tolist(), sample.loss_mask.tolist(), _owners(names(sample), slots))]


def names(sample: Sample) -> list[str]:
    """ "image 1", "image 2", "video 1": the media of a sample in order, each kind counted by itself."""
    return _numbered(item.kind for item in sample.media)


def token_text(processor: Processor, index: int) -> str:
    """A token as readable text: what it decodes to, or its name where that is no whole character."""
    text = processor.tokenizer.decode([index], skip_special=False)
    return text if text and "\ufffd" not in text else processor.tokenizer.token_of(index) or ""


def pictures(config: Any, layout: Layout, inputs: Tensor) -> list[Pillow.Image]:
    """Each unit of a medium with three channels as a picture, the normalisation undone; none for other media.

    ``config`` is the front end's, ``inputs [U, 3, height, width]``.
    """
    config = getattr(config, "image", config)
    if len(layout.shape) != 3 or layout.shape[0] != 3 or not hasattr(config, "mean"):
        return []
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    pixels = ((inputs.detach().cpu().float() * std + mean) * 255).round().clamp(0, 255).byte()  # [U, 3, S, S]
    return [Pillow.fromarray(unit.permute(1, 2, 0).numpy()) for unit in pixels]


# ------------------------------------------------------------------------------------------------------- in a notebook


class Shows:
    """Shows samples and batches of a processor. It stays in its process: in a pickled sample it is None."""

    def __init__(self, processor: Processor):
        self.processor = processor

    def __call__(self, seen: Sample | Batch) -> str:
        """The HTML."""
        return html(self.processor, seen)

    def __reduce__(self) -> Any:
        return type(None), ()


def html(processor: Processor, seen: Sample | Batch) -> str:
    """A sample or batch as HTML: text as tokens, learned ones green, slots blue, media as the encoder gets them."""
    body = _sample(processor, seen) if isinstance(seen, Sample) else "".join(_batch(processor, seen))
    key = f"<span style='{LEARNED}'>learned from</span> <span style='{SLOT}'>slots of a medium</span>"
    return f"<div style='font-family:monospace;line-height:1.6'><b>{escape(repr(seen))}</b><br>{key}{body}</div>"


def _sample(processor: Processor, sample: Sample) -> str:
    media = [_medium(processor, item.kind, item.layout, item.inputs) for item in sample.media]
    return _block(sample.id, rows(processor, sample), media)


def _batch(processor: Processor, batch: Batch) -> Iterator[str]:
    """The conversations of a batch one by one: a row, or a segment of a packed row."""
    width = batch.input_ids.shape[1]
    slots = [(kind, part) for kind, m in batch.media.items() for part in _parts(m.slots.tolist(), m.counts)]
    owners = _owners(_numbered(kind for kind, _ in slots), [part for _, part in slots])
    shown = 0
    for row, segments in enumerate(batch.segment_ids.tolist()):
        for segment, run in groupby(range(width), key=segments.__getitem__):
            places = list(run)
            if not segment:
                yield f"<div style='{PAD}'>{len(places)} positions of padding</div>"
                continue
            if shown == CONVERSATIONS:
                yield f"<div style='{PAD}'>… {len(batch.ids) - shown} more conversations</div>"
                return
            ids, learned = batch.input_ids[row, places].tolist(), batch.loss_mask[row, places].tolist()
            mine = {i: owners[row * width + p] for i, p in enumerate(places) if row * width + p in owners}
            yield _block(f"row {row}, segment {segment}", _rows(processor, ids, learned, mine), [])
            shown += 1
    for kind, m in batch.media.items():
        units = [layout.units for layout in m.layouts]
        whole = sum(units) == m.inputs.shape[0]  # else some are stored features
        for owner, layout, part in zip(m.owners, m.layouts, _parts(m.inputs, units) if whole else m.layouts):
            picture = _medium(processor, kind, layout, part if isinstance(part, Tensor) else m.inputs[:0])
            yield f"<div>{escape(repr(batch.ids[owner]))}: {picture}</div>"


def _block(name: str, tokens: Sequence[TokenRow] | Iterator[TokenRow], media: Sequence[str]) -> str:
    """One conversation: its name, its tokens in runs, its media."""
    found = list(tokens)
    spans = []
    for medium, run in groupby(found[:TOKENS], key=lambda token: token.medium):
        if medium is not None:
            spans.append(f"<span style='{SLOT}'>⟨{escape(medium)} × {len(list(run))}⟩</span>")
            continue
        for token in run:
            text, style = escape(token.text).replace("\n", "⏎<br>"), LEARNED if token.trained else ""
            spans.append(f"<span title='{token.position}: id {token.id}' style='{style}'>{text}</span>")
    more = f"<span style='{PAD}'> … {len(found) - TOKENS} more tokens</span>" if len(found) > TOKENS else ""
    return f"<div style='margin-top:.6em'><b>{escape(name)}</b> {''.join(spans)}{more}</div>{''.join(media)}"


def _medium(processor: Processor, kind: str, layout: Layout, inputs: Tensor) -> str:
    """The first units of a medium, small."""
    height, width = layout.original
    said = f"{kind} of {width} x {height} pixels, {layout.units} units" if width else f"{kind}, {layout.units} units"
    found = pictures(processor.config.media.get(kind), layout, inputs[:UNITS])
    return f"<div>{escape(said)}<br>{''.join(map(_picture, found))}</div>"


def _picture(picture: Pillow.Image) -> str:
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"<img style='margin:2px' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _rows(
    processor: Processor, ids: Sequence[int], learned: Sequence[bool], owners: dict[int, str]
) -> Iterator[TokenRow]:
    for place, (index, trained) in enumerate(zip(ids, learned, strict=True)):
        yield TokenRow(place, index, token_text(processor, index), trained, owners.get(place))


def _numbered(kinds: Iterable[str]) -> list[str]:
    seen: Counter[str] = Counter()
    found = []
    for kind in kinds:
        seen[kind] += 1
        found.append(f"{kind} {seen[kind]}")
    return found


def _owners(named: Sequence[str], slots: Sequence[Sequence[int]]) -> dict[int, str]:
    """Position → the name of the medium whose slot it is."""
    return {place: name for name, places in zip(named, slots, strict=True) for place in places}


def _parts(values: Any, sizes: Sequence[int]) -> Iterator[Any]:
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size
