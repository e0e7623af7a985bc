"""Small weight maps from transformers' tiny models to our parts: the tests' own, so that no importer checks itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------- decoder family

LLAMA_NAMES = {
    "embed_tokens": "embedding",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attn",
}


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Every parameter non-zero and random, norms around one, so that nothing is degenerate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if (parameter.ndim == 1 and parameter.mean() == 1) else scale * noise)
    return model.eval()


def llama_state(model: nn.Module, tied: bool) -> dict[str, Tensor]:
    """The state dict of a Llama-like model of transformers under the decoder's names; fused matrices are split."""
    c = model.config
    heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
    return rename_llama(model.state_dict(), tied, [n * (c.hidden_size // c.num_attention_heads) for n in heads])


def rename_llama(theirs: dict[str, Tensor], tied: bool, qkv: list[int] | None = None) -> dict[str, Tensor]:
    """Renamed tensors; ``qkv`` gives the rows of query, key and value in a fused matrix."""
    state: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name == "lm_head.weight":
            if not tied:
                state[name] = tensor
            continue
        path = [LLAMA_NAMES.get(step, step) for step in name.removeprefix("model.").split(".")]
        if "qkv_proj" in path:
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.split(qkv), strict=True):
                state[".".join(part if step == "qkv_proj" else step for step in path)] = piece
        elif "gate_up_proj" in path:
            for part, piece in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                state[".".join(part if step == "gate_up_proj" else step for step in path)] = piece
        else:
            state[".".join(path)] = tensor
    return state
