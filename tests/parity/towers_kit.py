"""Tiny two-tower models of transformers, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AlignConfig,
    AlignModel,
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from chiasm.convert.engine import load_weights
from chiasm.convert.io import Info, Weights
from chiasm.convert.rules import AnyRule
from chiasm.fusion.base import Fusion
from chiasm.types import Batch, Layout, MediaBatch

SIZE = 32


def hf_clip() -> Any:
    """Two layers; every special id named, so that pooling finds the end of a text."""
    text = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 20,
        "eos_token_id": 99,
        "bos_token_id": 98,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(projection_dim=32, text_config=text, vision_config=vision))


def hf_siglip() -> Any:
    text = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
    }
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def hf_siglip2() -> Any:
    """Positions of 3 × 3, so that every grid is stretched from them."""
    text = hf_siglip().config.text_config.to_dict() | {
        "model_type": "siglip2_text_model",
        "max_position_embeddings": 32,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "num_patches": 9,
    }
    return Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))


def hf_align() -> Any:
    text = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    vision = {
        "image_size": SIZE,
        "width_coefficient": 0.5,
        "depth_coefficient": 1.2,
        "kernel_sizes": [3, 5, 3],
        "in_channels": [32, 16, 24],
        "out_channels": [16, 24, 32],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 2, 1],
        "expand_ratios": [1, 6, 4],
        "depthwise_padding": [4],
        "hidden_dim": 16,
    }
    return AlignModel(AlignConfig(projection_dim=16, text_config=text, vision_config=vision))


def filled(model: Fusion, state: dict[str, Tensor], rules: list[AnyRule]) -> Fusion:
    """``model`` with the tensors of a state dict, by the strict loader."""
    load_weights(model, Held(state), rules)
    return model.eval()


class Held(Weights):
    """A state dict as the loader wants it."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = {name: tensor.detach().clone() for name, tensor in state.items()}
        super().__init__("memory", {name: Info(tuple(t.shape), t.dtype) for name, t in self.state.items()})

    def read(self, name: str) -> Tensor:
        return self.state[name]


def batch(pixels: Tensor, texts: list[list[int]], pad: int = 0) -> Batch:
    """Pictures ``[I, 3, S, S]`` beside texts, padded on the right."""
    width = max(map(len, texts))
    ids = torch.tensor([t + [pad] * (width - len(t)) for t in texts])
    segments = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts])
    count = len(pixels)
    media = MediaBatch(
        pixels,
        [Layout(1, tuple(pixels.shape[1:]))] * count,
        torch.zeros(0, dtype=torch.long),
        [0] * count,
        list(range(count)),
    )
    positions = torch.arange(width).expand(len(texts), -1) * segments
    return Batch(ids, positions, segments, segments < 0, {"image": media}, [str(i) for i in range(len(texts))])
