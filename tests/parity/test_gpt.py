"""Language models with layer norms against those of transformers, and against themselves: padded, packed, cached.

MosaicGPT (MPT-1B) has no class in transformers: its norms over queries and keys are checked against the formula.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from chiasm.convert.engine import export_tensors, load_weights
from chiasm.convert.io import Loaded
from chiasm.errors import ConfigError
from chiasm.lm.gpt import GPT, slopes
from chiasm.presets.hf_parts import read_lm, write_lm

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
NEOX = {
    **{"model_type": "gpt_neox", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "intermediate_size": 72, "max_position_embeddings": 64},
}
MPT = {"model_type": "mpt", "vocab_size": 61, "d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}
KINDS: dict[str, dict[str, Any]] = {
    "neox": NEOX | {"rotary_pct": 0.5, "use_parallel_residual": True},
    "redpajama": NEOX | {"rotary_pct": 1.0, "use_parallel_residual": False},
    "neox_tied": NEOX | {"rotary_pct": 0.25, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    "mpt": MPT,
    "mpt_odd": MPT | {"n_heads": 6, "attn_config": {"alibi": True, "clip_qkv": 0.3}},
}


@torch.no_grad()
def randomise(model: Any, seed: int) -> Any:
    """Parameters only: rotary frequencies are buffers of transformers' models, and stay."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.copy_(0.15 * torch.randn(p.shape, generator=generator) + (p.ndim == 1))
    return model.eval()


def pair(kind: str) -> tuple[Any, GPT]:
    """A random model of transformers, and ours with its weights read by our rules."""
    values = dict(KINDS[kind])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    theirs = randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"), 1)
    part = read_lm(KINDS[kind])
    ours = GPT(part.config).eval()
    load_weights(ours, Loaded("memory", {k: v.clone() for k, v in theirs.state_dict().items()}), part.rules)
    return theirs, ours


def rows(*lengths: int, width: int, left: bool) -> tuple[Tensor, Tensor]:
    """Positions and segments ``[B, T]`` of padded rows."""
    segments = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        segments[row, width - length if left else 0 : width if left else length] = 1
    return (segments.cumsum(1) - 1).clamp(min=0) * segments, segments


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str):
    theirs, ours = pair(kind)
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    positions, segments = rows(9, 6, width=9, left=True)
    expected = theirs(input_ids=ids, attention_mask=segments).logits
    found = ours.head(ours(ours.embed(ids), positions, segments))
    torch.testing.assert_close(found[segments != 0], expected[segments != 0], **TOLERANCE)
    swapped = theirs(input_ids=ids.flip(1), attention_mask=segments.flip(1)).logits
    assert (swapped - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padded_packed_and_cached_are_alone(kind: str):
    _, ours = pair(kind)
    ids = torch.randint(3, 61, (11,), generator=torch.Generator().manual_seed(2))
    alone = [
        ours(ours.embed(part[None]), *rows(len(part), width=len(part), left=False))[0] for part in (ids[:4], ids[4:])
    ]
    segments = torch.tensor([[1] * 4 + [2] * 7])
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    packed = ours(ours.embed(ids[None]), positions, segments)[0]
    torch.testing.assert_close(packed, torch.cat(alone), **TOLERANCE)
    positions, segments = rows(4, 7, width=9, left=True)
    padded = torch.zeros(2, 9, dtype=torch.long)
    padded[0, 5:], padded[1, 2:] = ids[:4], ids[4:]
    both = ours(ours.embed(padded), positions, segments)
    torch.testing.assert_close(both[0, 5:], alone[0], **TOLERANCE)
    torch.testing.assert_close(both[1, 2:], alone[1], **TOLERANCE)
    cache = ours.new_cache(2, 9, torch.device("cpu"), torch.float32)
    steps = [slice(0, 6), slice(6, 8), slice(8, 9)]
    cached = [ours(ours.embed(padded[:, s]), positions[:, s], segments[:, s], cache=cache) for s in steps]
    torch.testing.assert_close(torch.cat(cached, 1)[segments != 0], both[segments != 0], **TOLERANCE)


@torch.no_grad()
def test_norms_over_queries_and_keys_are_the_formula():
    """MosaicGPT's block in float64, written out; the norm goes over all heads together, before they are parted."""
    config = GPT.Config(
        vocab=31, dim=12, depth=1, heads=3, mlp=20, positions="alibi", bias=False, qk_norm=True, tied=True
    )
    ours = randomise(GPT(config).double(), 4)
    ids = torch.tensor([[5, 9, 2, 17, 8]])
    x = ours.embedding.weight[ids[0]]
    layer = ours.layers[0]

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight

    y = norm(x, layer.attn_norm.weight)
    q = norm(y @ layer.attn.q_proj.weight.T, layer.attn.q_norm.weight).view(5, 3, 4)
    k = norm(y @ layer.attn.k_proj.weight.T, layer.attn.k_norm.weight).view(5, 3, 4)
    v = (y @ layer.attn.v_proj.weight.T).view(5, 3, 4)
    mixed = torch.zeros(5, 3, 4, dtype=torch.float64)
    steep = [1 / 2**4, 1 / 2**8, 1 / 2**2]  # three of four heads: the second and fourth of 2^-2k, then the first
    for head in range(3):
        for t in range(5):
            scores = torch.stack([q[t, head] @ k[s, head] / 2 - steep[head] * (t - s) for s in range(t + 1)])
            mixed[t, head] = scores.softmax(0) @ v[: t + 1, head]
    x = x + mixed.flatten(1) @ layer.attn.o_proj.weight.T
    inner = norm(x, layer.mlp_norm.weight) @ layer.mlp.up_proj.weight.T
    x = x + (0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))) @ layer.mlp.down_proj.weight.T
    expected = norm(x, ours.norm.weight) @ ours.embedding.weight.T
    positions, segments = rows(5, width=5, left=False)
    found = ours.head(ours(ours.embed(ids), positions, segments))[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # slopes are kept in float32


@pytest.mark.parametrize("kind", KINDS)
def test_written_back(kind: str):
    theirs, ours = pair(kind)
    values, rules = write_lm(ours.config)
    again = read_lm(values)
    assert again.config == ours.config
    tensors = export_tensors(ours.state_dict(), rules)
    expected = theirs.state_dict()
    expected["embed_out.weight"] = expected["lm_head.weight"]
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())
    assert expected.keys() - tensors.keys() <= {"lm_head.weight", "embed_out.weight"}


def test_cross_attention_stands_between_the_layers():
    _, ours = pair("mpt")
    ids = torch.tensor([[4, 5, 6]])
    positions, segments = rows(3, width=3, left=False)
    seen: list[tuple[int, Tensor]] = []
    cross = {i: lambda x, i=i: seen.append((i, x)) or x + i for i in (0, 2, 3)}
    changed = ours(ours.embed(ids), positions, segments, cross=cross)
    assert [i for i, _ in seen] == [0, 2, 3] and torch.equal(seen[0][1], ours.embed(ids))
    last = seen[2][1] + 3
    torch.testing.assert_close(changed, F.layer_norm(last, (48,), ours.norm.weight, None, 1e-5))


def test_slopes_and_what_is_refused():
    assert slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    with pytest.raises(ConfigError, match="width 10 cannot be split into 4 heads"):
        GPT.Config.parse({"vocab": 9, "dim": 10, "depth": 1, "heads": 4, "mlp": 8})
    with pytest.raises(ConfigError, match=r"rotary_share 0\.4 of 8 channels is 3"):
        GPT.Config.parse({"vocab": 9, "dim": 32, "depth": 1, "heads": 4, "mlp": 8, "rotary_share": 0.4})
    assert read_lm(NEOX | {"attention_bias": False}).config.type == "hf"
