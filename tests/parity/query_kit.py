"""A tiny model of BLIP-2's first stage, in transformers and here, with every weight drawn anew; and batches for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from test_blip2_hf import QFORMER, VISION, bert_tokenizer
from torch import Tensor

import chiasm
from chiasm.types import Batch, Layout, MediaBatch
from parity.weights import randomise

SIZE, K, WORDS, WIDE, START = 28, 5, 80, 24, 79
CONFIG: dict[str, Any] = {
    "type": "query_text",
    "encoders": {
        "image": {
            "type": "vit", "image_size": SIZE, "patch": 14, "dim": 32, "depth": 2, "heads": 4, "mlp": 48,
            "select": "cls_patch",
        }
    },
    "connectors": {
        "image": {
            "type": "qformer", "queries": K, "dim": WIDE, "depth": 3, "heads": 4, "mlp": 40, "project": False,
            "text": {"vocab": WORDS, "positions": 20},
        }
    },
    "dim": 16,
    "start": START,
}  # fmt: skip


def folder_of_transformers(folder: Path) -> Any:
    """``Blip2ForImageTextRetrieval`` with random weights, saved as transformers saves it."""
    reads = {"vocab_size": WORDS, "max_position_embeddings": 20, "use_qformer_text_input": True}
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=QFORMER | reads, num_query_tokens=K, image_text_hidden_size=16
    )
    model = randomise(transformers.Blip2ForImageTextRetrieval(config), 7)
    tokenizer, images = bert_tokenizer(), transformers.BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    for part in (model, tokenizer, images):
        part.save_pretrained(folder)
    return SimpleNamespace(model=model, tokenizer=tokenizer, images=images, vlm=chiasm.load(folder))


def batch(rows: int = 4, pads: int = 2, seed: int = 0, side: str = "right", twice: bool = False) -> Batch:
    """``rows`` pairs of a picture and a text of 7 words, the last one's ``pads`` fewer; ``twice``: two are equal."""
    g = torch.Generator().manual_seed(seed)
    ids, pixels = torch.randint(3, START, (rows, 7), generator=g), torch.randn(rows, 3, SIZE, SIZE, generator=g)
    ids[:, 0] = 2  # [CLS]
    segments = torch.ones_like(ids)
    if pads:
        segments[-1, -pads:] = 0
    if twice:
        ids[1] = ids[0]
    if side == "left":
        ids[-1], segments[-1] = ids[-1].roll(pads), segments[-1].roll(pads)
    positions = (segments.cumsum(1) - 1) * segments
    media = MediaBatch(pixels, [Layout(1, (3, SIZE, SIZE))] * rows, ids.new_zeros(0), [0] * rows, list(range(rows)))
    names = [f"s{seed}-{i}" for i in range(rows)]
    learned = (segments == 1) & (positions > 0)
    return Batch(ids, positions, segments, learned, {"image": media}, names, sources=[""] * rows)


def parts_of(given: Batch, rows: list[int]) -> Batch:
    """Some samples of a padded batch."""
    m = given.media["image"]
    media = MediaBatch(m.inputs[rows], [m.layouts[r] for r in rows], m.slots, [0] * len(rows), list(range(len(rows))))
    kept = [t[rows] for t in (given.input_ids, given.positions, given.segment_ids, given.loss_mask)]
    return Batch(*kept, {"image": media}, [given.ids[r] for r in rows], sources=[""] * len(rows))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
