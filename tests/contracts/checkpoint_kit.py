"""A tiny model with a tokenizer, saved: what the tests of checkpoints start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import chiasm
import chiasm.model_config

SPECIALS = ["<s>", "</s>", "<pad>", "<image>"]
CONFIG: dict[str, Any] = {
    "model": {
        "type": "splice",
        "encoders": {
            "image": {"type": "vit", "image_size": 16, "patch": 8, "dim": 16, "depth": 2, "heads": 2, "mlp": 24}
        },
        "connectors": {"image": {"type": "mlp"}},
        "lm": {
            "type": "decoder",
            "vocab": 300,
            "dim": 16,
            "depth": 2,
            "heads": 2,
            "mlp": 24,
            "max_positions": 512,
            "tied": False,
        },
        "media": {"image": {"merge": {"type": "flat"}}},
    },
    "processing": {"template": "vicuna_v1", "media": {"image": {"type": "image", "size": 16}}},
    "provenance": {"licences": {"data": "CC BY 4.0"}, "paper": "arXiv:2304.08485"},
}


def make_tokenizer(folder: Path) -> Path:
    """The bytes and a few control tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def build(tokenizer: Path, **changes: Any) -> chiasm.VLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = chiasm.model_config.VLMConfig.parse(CONFIG).edit(**changes)
        vlm = chiasm.build(config, tokenizer=tokenizer)
    for parameter in vlm.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return vlm.eval()


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)


def messages() -> list[dict[str, Any]]:
    picture = Image.linear_gradient("L").convert("RGB").resize((20, 30))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}]
