"""A tiny model with a character tokenizer, tiny pictures, and recipes over them: what the training tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from chiasm.data.loader import Renderer
from chiasm.data.mixture import Entry, Mixture
from chiasm.vlm import VLM, build

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
                "image": {
                    "type": "vit",
                    "image_size": 16,
                    "patch": 8,
                    "dim": 32,
                    "depth": 2,
                    "heads": 2,
                    "mlp": 64,
                    "cls": False,
                },
            },
            "connectors": {"image": {"type": "mlp"}},
            "lm": {
                "type": "decoder",
                "max_positions": 256,
                "vocab": 5 + len(CHARACTERS),
                "dim": dim,
                "depth": 2,
                "heads": 2,
                "kv_heads": 1,
                "mlp": 64,
            },
        },
        "processing": {
            "template": "simple",
            "media": {"image": {"type": "image", "size": 16, "fit": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}},
        },
    }


def tiny_vlm(folder: Path, seed: int = 0, config: dict[str, Any] | None = None) -> VLM:
    """The tiny model, or another, with biases and norms away from 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vlm = build(config or model_config(), tokenizer=tokenizer_folder(folder / "tokenizer"))
        for p in vlm.parameters():
            if p.ndim == 1:
                p.data += 0.1 * torch.randn_like(p)
    return vlm.eval()


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


def write_mixed(folder: Path) -> Mixture:
    """Four samples as unlike as can be: one picture, none, two, and several turns."""
    write_pictures(folder)
    talks = [
        (["0.png"], ["<image>\nColors?", "red green"]),
        (None, ["What is the capital of Peru, and where does it lie?", "Lima, at the coast."]),
        (["1.png", "2.png"], ["<image> or <image>?", "b"]),
        ("3.png", ["<image>\nColors?", "green red", "The left one?", "green", "Sure?", "yes"]),
    ]
    records = []
    for i, (image, words) in enumerate(talks):
        turns = [{"from": ("human", "gpt")[j % 2], "value": word} for j, word in enumerate(words)]
        records.append({"id": f"m{i}", "conversations": turns} | ({"image": image} if image else {}))
    (folder / "mixed.json").write_text(json.dumps(records))
    return Mixture({"mixed": Entry(source=source(folder) | {"file": str(folder / "mixed.json")})})


def source(folder: Path) -> dict[str, Any]:
    return {
        "type": "llava_json",
        "file": str(folder / "train.json"),
        "images": str(folder / "pictures"),
        "task": "colors",
    }
