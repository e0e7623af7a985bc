"""A tiny model of two towers, and folders of small pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from chiasm.config import load_yaml
from chiasm.vlm import VLM, build

ROOT = Path(__file__).parents[2]


def towers(seed: int = 0, dim: int = 32, **changes: Any) -> VLM:
    """The towers of the playground's recipe, narrow, with random weights everywhere."""
    config = load_yaml(ROOT / "recipes" / "clip-playground.yaml")["model"]["config"]
    small = {"dim": dim, "depth": 1, "heads": 2, "mlp": 2 * dim}
    for tower in config["model"]["encoders"].values():
        tower.update(small)
    config["model"]["encoders"]["image"]["image_size"] = config["processing"]["media"]["image"]["size"] = 16
    config["model"]["dim"] = 24
    config["processing"]["media"]["image"].update(changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vlm = build(config, tokenizer=ROOT / "src" / "chiasm" / "weights" / "tiny-lm")
        for p in vlm.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return vlm.eval()


def picture(path: Path, seed: int) -> Path:
    """A small picture, another one for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    return path
