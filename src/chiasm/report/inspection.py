"""One conversation walked through a model: every stage, its name and shape, from text and pixels to the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from chiasm.processing.shown import TokenRow, names
from chiasm.report.looking import Looked, by_queries, looked, unit_pictures
from chiasm.types import Batch, MediaItem, Sample, Tokens

if TYPE_CHECKING:
    from chiasm.vlm import VLM


@dataclass(frozen=True)
class Unit:
    """A tile or frame as a picture, after resizing: what the encoder really gets."""

    medium: int
    index: int
    picture: Image.Image


@dataclass(frozen=True)
class Stage:
    """One step of the flow. ``shape`` with its letters, ``what`` in a sentence, ``numbers`` for the curious.

    A ``wide`` picture has a line of its own.
    """

    name: str
    shape: str
    what: str
    numbers: str = ""
    picture: Image.Image | None = None
    wide: bool = False


@dataclass
class Walk:
    """All that ``chiasm inspect`` shows."""

    title: str
    tokens: list[TokenRow]
    media: list[str]  # one line for each medium: kind, original size, units, tokens
    units: list[Unit]
    stages: list[Stage]
    candidates: list[tuple[str, float]]  # the likeliest next tokens with their probabilities
    answer: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    looks: list[Looked] = field(default_factory=list)  # where it looked when it wrote the answer


def walk(
    vlm: VLM,
    messages: Sequence[Any],
    *,
    train: bool = False,
    max_new_tokens: int = 32,
    name: str = "sample",
    looks: Sequence[str | int | None] = (),
) -> Walk:
    """Render ``messages``, run the model once and keep every stage.

    ``train`` renders the conversation as training sees it (answers included, targets marked); otherwise the prompt for
    the next answer, which is then generated (``max_new_tokens`` 0: not). ``looks``: words of that answer (None: all of
    it) for which it is told where the model looked. Raises what rendering and looking raise.
    """
    sample = vlm.processor(messages, id=name, add_generation_prompt=not train, train=train)
    batch = _begun(vlm.processor.collate([sample]), getattr(vlm.model, "lm", None))
    model = vlm.model
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            batch = batch.to(model.device, model.dtype)
            output = model(batch, logits="last")
    finally:
        model.train(was_training)
    tokens = vlm.processor.table(sample)
    units = [unit for i, item in enumerate(sample.media) for unit in _units(vlm, i, item)]
    answer = "" if train or not max_new_tokens else vlm.generate(list(messages), max_new_tokens=max_new_tokens)
    return Walk(
        title=name,
        tokens=tokens,
        media=[_medium_line(name, item) for name, item in zip(names(sample), sample.media, strict=True)],
        units=units,
        stages=_stages(vlm, sample, output, by_queries(vlm, batch, output.named, _first(sample, units))),
        candidates=_candidates(vlm, output.logits[0]),
        answer=answer,
        looks=looked(vlm, messages, answer, looks) if looks and answer.strip() else [],
        counts={
            "tokens": len(sample),
            "text tokens": sum(row.medium is None for row in tokens),
            "media tokens": sum(row.medium is not None for row in tokens),
            "trained tokens": sum(row.trained for row in tokens),
        },
    )


def _begun(batch: Batch, lm: Any) -> Batch:
    """A prompt of an encoder-decoder model, with the decoder's side at its beginning."""
    if not getattr(lm, "encoder_decoder", False) or batch.target_ids is not None:
        return batch
    start = batch.input_ids.new_full((len(batch.input_ids), 1), lm.start_id)  # [B, 1]
    return replace(batch, target_ids=start, target_mask=torch.ones_like(start, dtype=torch.bool))


def _medium_line(name: str, item: MediaItem) -> str:
    height, width = item.layout.original
    assert item.slots is not None
    tiles = f", base + {item.layout.grid[0]}×{item.layout.grid[1]} tiles" if item.layout.grid != (0, 0) else ""
    size = f" {width}×{height} px" if width else ""
    units = f"{item.layout.units} unit{'s' if item.layout.units > 1 else ''} of {'×'.join(map(str, item.layout.shape))}"
    return f"{name}:{size} → {units}{tiles} → {len(item.slots)} tokens"


def _units(vlm: VLM, medium: int, item: MediaItem) -> list[Unit]:
    """Each unit with three channels as a picture, the normalisation undone."""
    return [Unit(medium, i, picture) for i, picture in enumerate(unit_pictures(vlm, item))]


def _first(sample: Sample, units: Sequence[Unit]) -> dict[str, Image.Image]:
    """The first unit of each kind of media, as a picture."""
    found: dict[str, Image.Image] = {}
    for unit in units:
        found.setdefault(sample.media[unit.medium].kind, unit.picture)
    return found


def _stages(vlm: VLM, sample: Sample, output: Any, queries: dict[str, Image.Image]) -> list[Stage]:
    stages = [
        Stage("input_ids", f"[T={len(sample)}]", "the rendered conversation as token ids; media hold their slots")
    ]
    for i, item in enumerate(sample.media):
        stages.append(
            Stage(
                f"{item.kind} {i + 1} / inputs",
                _shape("U,C,S,S" if item.inputs.dim() == 4 else "U", item.inputs),
                "its units as tensors",
                _stats(item.inputs),
            )
        )
    for kind in dict.fromkeys(item.kind for item in sample.media):
        stages += _medium_stages(kind, output.named)
        if kind in queries:
            what = (
                "where each of the connector's queries looks in the first unit, and the mean of all; beside its number "
                "the share of its attention on the brightest place"
            )
            stages.append(Stage(f"{kind} / queries", "[K, rows, columns]", what, "", queries[kind], wide=True))
    hidden = output.hidden
    stages.append(
        Stage(
            "language model / input",
            f"[B=1, T={hidden.shape[1]}, D={hidden.shape[2]}]",
            "embedded text with the media's vectors in their slots",
        )
    )
    stages.append(
        Stage("language model / hidden", _shape("B,T,D", hidden), "hidden states after the last layer", _stats(hidden))
    )
    stages.append(
        Stage(
            "logits",
            _shape("B,V", output.logits),
            "scores of the next token, at the last position only",
            _stats(output.logits),
        )
    )
    return stages


def _medium_stages(kind: str, named: dict[str, Any]) -> list[Stage]:
    stages = []
    features = named.get(f"{kind}/features")
    for source, tokens in features.items() if isinstance(features, dict) else [("", features)]:
        if isinstance(tokens, Tokens):
            label = f"{kind} / features" + (f" of {source}" if source else "")
            stages.append(
                Stage(
                    label,
                    _shape("U,N,D", tokens.x),
                    "what the encoder sees; colours: three main directions",
                    _stats(tokens.x),
                    _colours(tokens),
                )
            )
    projected = named.get(f"{kind}/projected")
    if isinstance(projected, Tokens):
        what = "after the connector, in the language model's width"
        stages.append(
            Stage(f"{kind} / projected", _shape("U,N,D", projected.x), what, _stats(projected.x), _colours(projected))
        )
    for i, run in enumerate(named.get(f"{kind}/merged", [])):
        stages.append(
            Stage(
                f"{kind} / merged {i + 1}",
                _shape("M,D", run),
                "units put together, one vector for each slot",
                _stats(run),
            )
        )
    return stages


def _candidates(vlm: VLM, logits: Tensor, top: int = 8) -> list[tuple[str, float]]:
    values, ids = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    texts = [vlm.processor.tokenizer.decode([i], skip_special=False) for i in ids.tolist()]
    return list(zip(texts, values.tolist(), strict=True))


def _shape(letters: str, x: Tensor) -> str:
    names = letters.split(",")
    if len(names) != x.dim():
        return str(list(x.shape))
    return "[" + ", ".join(f"{n}={s}" for n, s in zip(names, x.shape, strict=True)) + "]"


def _stats(x: Tensor) -> str:
    x = x.float()
    return f"mean {x.mean():.3g}, std {x.std():.3g}, range {x.min():.3g} … {x.max():.3g}"


def _colours(tokens: Tokens, scale: int = 8) -> Image.Image | None:
    """The first unit's grid, each vector coloured by its first three principal components."""
    if tokens.grid is None or tokens.grid[0] * tokens.grid[1] != tokens.x.shape[1] or min(tokens.x.shape[1:]) < 3:
        return None  # no grid, or no three directions
    x = tokens.x[0].float()
    x = x - x.mean(0)
    _, _, v = torch.linalg.svd(x, full_matrices=False)
    low = x @ v[:3].T  # [N, 3]
    low = (low - low.amin(0)) / (low.amax(0) - low.amin(0)).clamp_min(1e-9)
    grid = (low.view(*tokens.grid, 3).numpy() * 255).astype(np.uint8)
    return Image.fromarray(grid).resize((tokens.grid[1] * scale, tokens.grid[0] * scale), Image.Resampling.NEAREST)
