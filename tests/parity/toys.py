"""A tiny vision-language model and a processor over bytes, for tests of generation."""

from __future__ import annotations

from dataclasses import replace

import torch
from lm_weights import randomise

from chiasm import compose
from chiasm.fusion.splice import Splice
from chiasm.processing.collate import collate
from chiasm.types import Batch, Layout, MediaItem, Sample

IMAGE = (3, 8, 8)
TOKENS_OF_IMAGE = 4
DECODER = {
    **{"type": "decoder", "vocab": 64, "dim": 48, "mlp": 80, "depth": 2, "heads": 6, "kv_heads": 2},
    **{"max_positions": 96, "norm_eps": 1e-6},
}
VIT = {
    **{"type": "vit", "image_size": 8, "patch": 4, "dim": 24, "depth": 2, "heads": 2, "mlp": 32},
    **{"cls": True, "patch_bias": True, "pre_norm": False, "post_norm": "applied"},
}


def model(lm: dict | None = None, seed: int = 0) -> Splice:
    """A random Splice of a ViT and a language model."""
    config = {"encoders": {"image": VIT}, "connectors": {"image": {"type": "linear"}}, "lm": lm or DECODER}
    return randomise(compose.build_model(Splice.Config.parse(config)), seed)


class Bytes:
    """A processor whose conversations hold ids, and pictures as seeds in a set: ``[{"role": ..., "ids": [3, {1}]}]``.

    ``decode`` reads ids as bytes of UTF-8 after ``shift``, so that a character may take several tokens.
    """

    def __init__(self, stop_ids=(2,), stop_strings=(), pad_id: int = 0, shift: int = 0):
        self.stop_ids, self.stop_strings, self.pad_id, self.shift = stop_ids, stop_strings, pad_id, shift

    def batch(self, conversations, add_generation_prompt=True, padding_side="left") -> Batch:
        samples = [self.sample(str(i), c[0]["ids"]) for i, c in enumerate(conversations)]
        return collate(samples, self.pad_id, padding_side)

    def sample(self, name: str, parts) -> Sample:
        ids, media = [], []
        for part in parts:
            if isinstance(part, set):
                picture = torch.randn(1, *IMAGE, generator=torch.Generator().manual_seed(*part))
                slots = torch.arange(len(ids), len(ids) + TOKENS_OF_IMAGE)
                media.append(MediaItem("image", picture, Layout(1, IMAGE, original=(8, 8)), slots))
                ids += [1] * TOKENS_OF_IMAGE
            else:
                ids.append(part)
        tensor = torch.tensor(ids)
        return Sample(name, tensor, torch.zeros(len(tensor), dtype=torch.bool), media)

    def decode(self, ids) -> str:
        return bytes((i + self.shift) % 256 for i in ids).decode("utf-8", errors="replace")


def chat(*parts) -> list[dict]:
    """A conversation for ``Bytes``."""
    return [{"role": "user", "ids": list(parts)}]


def conversations(count: int, seed: int, pictures: bool = True, longest: int = 12) -> list[list[dict]]:
    """Random conversations of 1 to ``longest`` ids with 0 to 3 pictures between them."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    result = []
    for _ in range(count):
        parts: list = [number(3, 63) for _ in range(number(1, longest))]
        for _ in range(number(0, 4) if pictures else 0):
            parts.insert(number(0, len(parts)), {number(0, 1000)})
        result.append(chat(*parts))
    return result


__all__ = ["DECODER", "Bytes", "chat", "conversations", "model", "replace"]
