"""A prompt as the engine holds it: ids, media with the hashes of their contents, and hashes of its beginnings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import DataError
from chiasm.infer.request import Request
from chiasm.nn.kernels import state
from chiasm.types import Batch, Condition, MediaBatch, Piece, Sample


@dataclass
class Medium:
    """One medium of a prompt. ``key`` is the SHA-256 of all that its vectors depend on but the model."""

    kind: str
    batch: MediaBatch  # this one item
    slots: Tensor  # [N] positions in the prompt
    key: bytes


@dataclass
class Prompt:
    """One conversation, ready to be computed."""

    name: str
    ids: Tensor  # [T]
    media: list[Medium]
    batch: Batch  # the one row, as the processor made it

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def media_tokens(self) -> int:
        """Positions that media take."""
        return sum(len(medium.slots) for medium in self.media)


def prompts_of(batch: Batch) -> list[Prompt]:
    """The prompts of a batch padded on the left, in its order."""
    rows, columns = batch.input_ids.shape
    lengths = (batch.segment_ids != 0).sum(dim=1).tolist()
    names = batch.ids or [str(row) for row in range(rows)]
    prompts = [
        Prompt(name, batch.input_ids[row, columns - lengths[row] :], [], batch) for row, name in enumerate(names)
    ]
    for kind, media in batch.media.items():
        unit = slot = 0
        for index, layout in enumerate(media.layouts):
            row, count = media.owners[index], media.counts[index]
            start = row * columns + columns - lengths[row]
            slots = media.slots[slot : slot + count] - start
            prompts[row].media.append(_medium(kind, media, index, unit, slots))
            unit, slot = unit + layout.units, slot + count
    return prompts


def asked(processor: Any, request: Request, name: str) -> Batch:
    """The batch of a request's one conversation. Raises DataError."""
    messages, begun = list(request.messages), request.lead
    if request.continue_final:
        last = messages.pop() if messages else None
        if last is None or last.role != "assistant" or last.media or last.calls or request.lead:
            raise DataError(f"sample {name!r}: to be continued, the last message must be an assistant's, and text only")
        begun = (Piece(last.text),)
    sample = processor(
        messages, name, add_generation_prompt=True, **({"tools": request.tools} if request.tools else {})
    )
    return processor.collate([_opened(processor, sample, begun)], "left")  # type: ignore[no-any-return]


def _opened(processor: Any, sample: Sample, begun: tuple[Piece, ...]) -> Sample:
    """A sample followed by the beginning of its answer."""
    if not any(piece.text for piece in begun):
        return sample
    ids = torch.tensor(processor.tokenizer.encode_pieces(begun).ids, dtype=torch.long)
    sample.input_ids = torch.cat((sample.input_ids, ids))
    sample.loss_mask = torch.cat((sample.loss_mask, torch.zeros(len(ids), dtype=torch.bool)))
    return sample


def _medium(kind: str, media: MediaBatch, index: int, unit: int, slots: Tensor) -> Medium:
    """Item ``index`` of the media of a kind, alone, with the hash of its pixels, layout and instruction."""
    layout, count = media.layouts[index], media.counts[index]
    inputs = media.inputs[unit : unit + layout.units]
    if inputs.shape[1:] != layout.shape and len(inputs.shape) == len(layout.shape) + 1:
        whole = (slice(None), *(slice(size) for size in layout.shape))
        inputs = inputs[whole]  # ragged: without the others' padding
    cond = None
    if media.cond is not None:
        cond = Condition(media.cond.ids[index : index + 1], media.cond.mask[index : index + 1])
    alone = replace(
        media,
        **{"inputs": inputs, "layouts": [layout], "slots": torch.arange(count), "counts": [count], "owners": [0]},  # type: ignore[arg-type]
        **{"keys": [], "given": [], "features": None, "cond": cond},  # type: ignore[arg-type]
    )
    digest = hashlib.sha256(repr((kind, layout, count, tuple(inputs.shape), str(inputs.dtype))).encode())
    for tensor in (inputs, *(() if cond is None else (cond.ids, cond.mask))):
        digest.update(_bytes(tensor))
    return Medium(kind, alone, slots, digest.digest())


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy() if tensor.numel() else b""


def chain(prompt: Prompt, block: int, seed: bytes, ids: Tensor | None = None) -> list[bytes]:
    """The hash of each beginning of ``block``, ``2 * block`` ... positions: of its ids, its media's contents, ``seed``.

    ``ids`` are those of the prompt with its answer, where that is remembered too.
    """
    ids = prompt.ids if ids is None else ids
    keys: dict[int, list[bytes]] = {}
    for medium in prompt.media:
        for number in torch.div(medium.slots, block, rounding_mode="floor").unique().tolist():
            inside = medium.slots[medium.slots // block == number]
            keys.setdefault(number, []).append(medium.key + repr((medium.kind, inside.tolist())).encode())
    found, digest = [], seed
    for number in range(len(ids) // block):
        part = ids[number * block : (number + 1) * block].contiguous()
        digest = hashlib.sha256(b"\0".join([digest, part.numpy().tobytes(), *keys.get(number, [])])).digest()
        found.append(digest)
    return found


def marks(prompt: Prompt, ids: Tensor | None = None) -> Tensor:
    """What stands at each position: bytes ``[T, 40]``, of an id, or of a place within a medium and its key."""
    ids = prompt.ids if ids is None else ids
    found = torch.zeros(len(ids), 40, dtype=torch.uint8)
    found[:, :8] = ids.contiguous().view(torch.uint8).view(-1, 8)
    for medium in prompt.media:
        places = torch.arange(len(medium.slots)).view(torch.uint8).view(-1, 8)
        key = torch.frombuffer(bytearray(medium.key), dtype=torch.uint8).expand(len(places), -1)
        found[medium.slots] = torch.cat((places, key), dim=1)
    return found


def state_of(model: Any) -> bytes:
    """A mark that changes when a parameter is replaced, moved or changed in place: what is remembered is then stale.

    It is taken at every request, so modules are walked without spelling their names; it means nothing elsewhere.
    """
    found, left = [], [model]
    while left:
        module = left.pop()
        left.extend(child for child in module._modules.values() if child is not None)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.append(state(tensor))
    return hash(tuple(found)).to_bytes(8, "little", signed=True)


__all__ = ["Medium", "Prompt", "asked", "chain", "marks", "prompts_of", "state_of"]
