"""Small weight maps from transformers' tiny random models to our parts: the tests' own, so that no importer checks itself."""

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


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Every parameter non-zero and random, norms around one, so that nothing is degenerate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if (parameter.ndim == 1 and parameter.mean() == 1) else scale * noise)
    return model.eval()


def llama_state(model: nn.Module, tied: bool) -> dict[str, Tensor]:
    """The state dict of a Llama-like causal model of transformers under the decoder's names; fused matrices are split."""
    state: dict[str, Tensor] = {}
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            if not tied:
                state[name] = tensor
            continue
        path = [LLAMA_NAMES.get(step, step) for step in name.removeprefix("model.").split(".")]
        if "qkv_proj" in path:
            width = config.hidden_size // config.num_attention_heads
            sizes = [n * width for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.split(sizes), strict=True):
                state[".".join(part if step == "qkv_proj" else step for step in path)] = piece
        elif "gate_up_proj" in path:
            for part, piece in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                state[".".join(part if step == "gate_up_proj" else step for step in path)] = piece
        else:
            state[".".join(path)] = tensor
    return state
