"""The language models that published systems start from, at published size.

Widths are those of the models' own ``config.json``; ``tests/contracts/test_presets.py`` compares the number of
parameters with the class of transformers built from them.
"""

from __future__ import annotations

from typing import Any

from chiasm.lm.decoder import Decoder


def vicuna_7b(**changes: Any) -> Decoder.Config:
    """Vicuna-7B (and LLaMA-7B, Llama-2-7B): 32 blocks of width 4096."""
    return _llama(4096, 32, 32, 11008, changes)


def vicuna_13b(**changes: Any) -> Decoder.Config:
    """Vicuna-13B (and LLaMA-13B, Llama-2-13B): 40 blocks of width 5120."""
    return _llama(5120, 40, 40, 13824, changes)


def mistral_7b_v02(**changes: Any) -> Decoder.Config:
    """Mistral-7B-Instruct-v0.2: grouped keys, no sliding window, 32768 positions."""
    kind = {"kv_heads": 8, "rope_theta": 1e6, "max_positions": 32768}
    return _llama(4096, 32, 32, 14336, kind | changes)


def hermes_2_yi_34b(**changes: Any) -> Decoder.Config:
    """Nous-Hermes-2-Yi-34B: 60 blocks of width 7168, 56 heads over 8 groups of keys."""
    kind = {"kv_heads": 8, "rope_theta": 5e6, "vocab": 64000}
    return _llama(7168, 60, 56, 20480, kind | changes)


def llama3_8b(**changes: Any) -> Decoder.Config:
    """Meta-Llama-3-8B-Instruct: grouped keys, 128256 tokens, 8192 positions."""
    kind = {"kv_heads": 8, "rope_theta": 5e5, "vocab": 128256, "max_positions": 8192}
    return _llama(4096, 32, 32, 14336, kind | changes)


def qwen15_05b(**changes: Any) -> Decoder.Config:
    """Qwen1.5-0.5B-Chat: no grouped keys, tied head."""
    return _qwen(1024, 24, 16, 16, 2816, {"vocab": 151936, "tied": True} | changes)


def qwen15_7b(**changes: Any) -> Decoder.Config:
    """Qwen1.5-7B-Chat: no grouped keys, its own head."""
    return _qwen(4096, 32, 32, 32, 11008, {"vocab": 151936} | changes)


def qwen2_05b(**changes: Any) -> Decoder.Config:
    """Qwen2-0.5B-Instruct: 14 heads over 2 groups of keys, tied head."""
    return _qwen(896, 24, 14, 2, 4864, {"vocab": 151936, "tied": True} | changes)


def qwen2_7b(**changes: Any) -> Decoder.Config:
    """Qwen2-7B-Instruct: 28 heads over 4 groups of keys."""
    return _qwen(3584, 28, 28, 4, 18944, {"vocab": 152064} | changes)


def qwen2_72b(**changes: Any) -> Decoder.Config:
    """Qwen2-72B-Instruct: 64 heads over 8 groups of keys."""
    return _qwen(8192, 80, 64, 8, 29568, {"vocab": 152064} | changes)


def _llama(dim: int, depth: int, heads: int, mlp: int, changes: dict[str, Any]) -> Decoder.Config:
    kind = {"vocab": 32000, "norm_eps": 1e-5, "rope_theta": 1e4, "max_positions": 4096}
    return Decoder.Config(**({"dim": dim, "depth": depth, "heads": heads, "mlp": mlp} | kind | changes))


def _qwen(dim: int, depth: int, heads: int, kv_heads: int, mlp: int, changes: dict[str, Any]) -> Decoder.Config:
    """Qwen's block is Llama's with biases on queries, keys and values."""
    kind = {"norm_eps": 1e-6, "rope_theta": 1e6, "max_positions": 32768, "qkv_bias": True}
    sizes = {"dim": dim, "depth": depth, "heads": heads, "kv_heads": kv_heads, "mlp": mlp}
    return Decoder.Config(**(sizes | kind | changes))
