"""The decoder against the models of transformers that it stands for, and against itself: packed, padded, cached."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from weights import llama_state, randomise

from chiasm.errors import ConfigError, DataError
from chiasm.lm.decoder import Decoder

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OURS = {
    "vocab": 61,
    "dim": 48,
    "mlp": 80,
    "depth": 3,
    "heads": 6,
    "kv_heads": 2,
    "max_positions": 64,
}
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [1.5, 2.0, 2.7, 4.0]
ROPE = {
    "plain": (None, None, 64),
    "linear": ({"type": "linear", "factor": 2.5}, None, 64),
    "llama3": (
        {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        None,
        64,
    ),
    "yarn": ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, None, 64),
    "yarn_mscale": (
        {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.5,
            "mscale_all_dim": 0.7,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        None,
        64,
    ),
    "dynamic_short": ({"type": "dynamic", "factor": 3.0}, None, 64),
    "dynamic_long": ({"type": "dynamic", "factor": 3.0}, None, 16),
}


def family(name: str) -> tuple[torch.nn.Module, Decoder]:
    """A tiny random model of transformers, and the decoder with its weights."""
    kind, _, rest = name.partition("/")
    ours, theirs = dict(OURS), dict(SIZES)
    if kind == "llama":
        scaling, _, positions = ROPE[rest or "plain"]
        ours |= {"max_positions": positions, "norm_eps": 1e-6}
        theirs |= {"max_position_embeddings": positions, "rms_norm_eps": 1e-6}
        if scaling:
            ours["rope_scaling"] = scaling
            theirs["rope_scaling"] = {"rope_type" if k == "type" else k: v for k, v in scaling.items()}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**theirs))
    elif kind == "llama_biased":
        ours |= {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_eps": 1e-6, "head_dim": 10}
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(**theirs, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-6, head_dim=10)
        )
    elif kind == "smollm":
        ours |= {"tied": True, "kv_heads": 3, "rope_theta": 1e5}
        theirs |= {"num_key_value_heads": 3, "rms_norm_eps": 1e-5}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**theirs, tie_word_embeddings=True, rope_theta=1e5))
    elif kind == "mistral":
        ours |= {"sliding_window": 5, "norm_eps": 1e-6}
        model = hf.MistralForCausalLM(hf.MistralConfig(**theirs, sliding_window=5, rms_norm_eps=1e-6))
    elif kind == "qwen2":
        ours |= {"qkv_bias": True, "norm_eps": 1e-6, "rope_theta": 1e6, "tied": True}
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**theirs, rope_theta=1e6, tie_word_embeddings=True))
    elif kind == "qwen3":
        ours |= {"qk_norm": True, "norm_eps": 1e-6, "head_dim": 12}
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**theirs, head_dim=12))
    elif kind == "phi3":
        original = int(rest)
        scaling = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
        ours |= {"rope_scaling": scaling | {"original_max_position_embeddings": original}}
        theirs |= {"original_max_position_embeddings": original, "rope_scaling": scaling}
        model = hf.Phi3ForCausalLM(hf.Phi3Config(**theirs, sliding_window=7, rms_norm_eps=1e-5))
        ours |= {"sliding_window": 7}
    elif kind == "phi_partial":
        ours |= {"rotary_share": 0.5, "norm_eps": 1e-5}
        model = hf.Phi3ForCausalLM(hf.Phi3Config(**theirs, partial_rotary_factor=0.5, rms_norm_eps=1e-5))
    randomise(model)
    decoder = Decoder(Decoder.Config(**ours)).eval()
    decoder.load_state_dict(llama_state(model, tied=bool(ours.get("tied"))))
    return model, decoder


NAMES = [
    *(f"llama/{scaling}" for scaling in ROPE),
    *("llama_biased", "smollm", "mistral", "qwen2", "qwen3", "phi3/16", "phi3/48", "phi_partial"),
]
LENGTH = 24


def run(decoder: Decoder, ids: torch.Tensor, segments: torch.Tensor | None = None, cache=None) -> torch.Tensor:
    segments = torch.ones_like(ids) if segments is None else segments
    x = decoder.embed(ids).masked_fill((segments == 0).unsqueeze(-1), 0)
    return decoder.head(decoder(x, positions_of(segments), segments, cache=cache))


def positions_of(segments: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in segments.tolist():
        seen: dict[int, int] = {}
        rows.append([])
        for number in row:
            rows[-1].append(seen.get(number, 0) if number else 0)
            seen[number] = seen.get(number, 0) + 1
    return torch.tensor(rows)


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name):
    model, decoder = family(name)
    ids = tokens()
    expected = model(ids).logits
    assert expected.std() > 0.5  # a model whose logits are flat would prove nothing
    torch.testing.assert_close(run(decoder, ids), expected, **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_packed_padded_left_and_right_equal_separate(name):
    _, decoder = family(name)
    ids = tokens(3)
    lengths = (LENGTH, 9, 17)
    alone = [run(decoder, ids[i : i + 1, :n]) for i, n in enumerate(lengths)]
    columns = torch.arange(LENGTH)
    right = torch.stack([(columns < n).long() for n in lengths])
    left = torch.stack([(columns >= LENGTH - n).long() for n in lengths])
    for i, n in enumerate(lengths):
        rolled = ids.clone()
        rolled[i, LENGTH - n :] = ids[i, :n]
        torch.testing.assert_close(run(decoder, ids, right)[i, :n], alone[i][0], **TOLERANCE)
        torch.testing.assert_close(run(decoder, rolled, left)[i, LENGTH - n :], alone[i][0], **TOLERANCE)
    packed = torch.cat([ids[i, :n] for i, n in enumerate(lengths)] + [torch.zeros(3, dtype=torch.long)]).unsqueeze(0)
    segments = torch.tensor([[1] * lengths[0] + [2] * lengths[1] + [3] * lengths[2] + [0] * 3])
    logits = run(decoder, packed, segments)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0, :-3], torch.cat([a[0] for a in alone]), **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cached_equals_uncached(name, side):
    """Prefill of a padded batch, then tokens one at a time and in a run of three, with each row's own positions."""
    _, decoder = family(name)
    ids, lengths = tokens(3), (14, 5, 9)
    prompt, wide = torch.zeros(3, 14, dtype=torch.long), torch.arange(14)
    segments = torch.stack([(wide >= 14 - n if side == "left" else wide < n).long() for n in lengths])
    for i, n in enumerate(lengths):
        prompt[i, segments[i] == 1] = ids[i, :n]
    cache = decoder.new_cache(3, LENGTH, torch.device("cpu"), torch.float32)
    run(decoder, prompt, segments, cache)
    starts = torch.tensor(lengths)
    for step, width in ((0, 1), (1, 1), (2, 3), (5, 1), (6, 1), (7, 1), (8, 1), (9, 1)):
        positions = starts.unsqueeze(1) + step + torch.arange(width)
        fresh = ids.gather(1, positions)
        ones = torch.ones_like(fresh)
        logits = decoder.head(decoder(decoder.embed(fresh), positions, ones, cache=cache))
        for i, n in enumerate(lengths):
            whole = run(decoder, ids[i : i + 1, : n + step + width])
            torch.testing.assert_close(logits[i], whole[0, -width:], **TOLERANCE)
