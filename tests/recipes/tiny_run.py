"""A tiny model with a character tokenizer, tiny pictures, and recipes over them: what the training tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from chiasm.compose import build_model
from chiasm.data.loader import Renderer
from chiasm.infer.engine import generate
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import VLMConfig
from chiasm.processing.processor import Processor

COLORS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 60, 220), "yellow": (230, 210, 30)}
CHARACTERS = "\n !\"'(),-./0123456789:?ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"


def tokenizer_folder(folder: Path) -> Path:
    """A character tokenizer in the layout of the tokenizers library."""
    folder.mkdir(parents=True, exist_ok=True)
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *CHARACTERS])}
    added = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, t in enumerate(specials)
    ]
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
    content = {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None},
        **{"pre_tokenizer": split, "post_processor": None, "decoder": {"type": "Fuse"}, "model": model},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def model_config(dim: int = 32) -> dict[str, Any]:
    """The configuration of a tiny LLaVA."""
    return {
        "model": {
            "type": "splice",
            "encoders": {
                "image": dict(type="vit", image_size=16, patch=8, dim=32, depth=2, heads=2, mlp=64, cls=False),
            },
            "connectors": {"image": {"type": "mlp"}},
            "lm": dict(
                type="decoder",
                **{"vocab": 5 + len(CHARACTERS), "dim": dim, "depth": 2, "heads": 2, "kv_heads": 1, "mlp": 64},
                max_positions=256,
            ),
        },
        "processing": {
            "template": "simple",
            "media": {"image": dict(type="image", size=16, fit="squash", mean=(0.5,) * 3, std=(0.5,) * 3)},
        },
    }


class Tiny:
    """As much of a VLM as training and evaluation ask for."""

    def __init__(self, model: Any, processor: Processor, config: VLMConfig):
        self.model, self.processor, self.config = model, processor, config

    def generate(self, conversations: Any, **options: Any) -> Any:
        return generate(self.model, self.processor, conversations, **options)

    def save(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.model.state_dict(), Path(folder) / "model.safetensors")


def tiny_vlm(folder: Path, seed: int = 0) -> Any:
    """The tiny model and its processor, without saving or loading."""
    config = VLMConfig.parse(model_config())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(config.model)
        for p in model.parameters():
            if p.ndim == 1:  # biases and norms away from 0 and 1
                p.data += 0.1 * torch.randn_like(p)
    processor = Processor(
        config.processing, Tokenizer.from_folder(tokenizer_folder(folder / "tokenizer")), config.model.count
    )
    return Tiny(model.eval(), processor, config)


def renderer(vlm: Any, **settings: Any) -> Renderer:
    return Renderer(vlm.processor, **settings)


def write_pictures(folder: Path, count: int = 8) -> Path:
    """``count`` pictures, each of one colour on the left and of another on the right, and their LLaVA file."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    names = list(COLORS)
    pairs = [(a, b) for a in names for b in names if a != b]
    records = []
    for i in range(count):
        left, right = pairs[i % len(pairs)]
        picture = Image.new("RGB", (16, 16), COLORS[left])
        picture.paste(COLORS[right], (8, 0, 16, 16))
        picture.save(folder / "pictures" / f"{i}.png")
        turns = [("human", "<image>\nColors?"), ("gpt", f"{left} {right}"[: None if i % 2 else 40])]
        if i % 4 == 3:  # another length, and a second turn
            turns += [("human", "The left one?"), ("gpt", left)]
        conversations = [{"from": role, "value": value} for role, value in turns]
        records.append({"id": f"p{i}", "image": f"{i}.png", "conversations": conversations})
    file = folder / "train.json"
    file.write_text(json.dumps(records))
    return file


def source(folder: Path) -> dict[str, Any]:
    return {
        "type": "llava_json",
        "file": str(folder / "train.json"),
        "images": str(folder / "pictures"),
        "task": "colors",
    }
