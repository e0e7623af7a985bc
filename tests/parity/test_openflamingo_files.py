"""OpenFlamingo's released layout: what was trained in one file, the language model and CLIP in theirs.

The file is made here from modules written to the shapes and names of the reference (fused keys and values, its own
numbering of layers), not from our rules; what it should compute is OpenFlamingo's attention over those tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import chiasm
from chiasm.compose import build_model
from chiasm.errors import CheckpointError
from chiasm.presets import preset
from chiasm.vlm import VLM

VOCAB, DIM, MEDIA = 70, 64, 32


class Attention(nn.Module):
    """The reference's shapes: one matrix for keys and values."""

    def __init__(self, dim: int, media: int, inner: int, names: tuple[str, ...]):
        super().__init__()
        for name in names:
            setattr(self, name, nn.LayerNorm(media if name == "norm_media" else dim))
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(media, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)


def perceptron(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(DIM, MEDIA, 4 * 8, ("norm",))
        self.attn_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.ff = perceptron(DIM)


class Perceiver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(8, MEDIA))
        names = ("norm_media", "norm_latents")
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(MEDIA, MEDIA, 2 * 8, names), perceptron(MEDIA)]) for _ in range(2)
        )
        self.norm = nn.LayerNorm(MEDIA)


def released(layers: str, places: tuple[int, ...], embedding: str) -> dict[str, Tensor]:
    """The tensors of a released file, each random."""
    state = {f"perceiver.{k}": v for k, v in Perceiver().state_dict().items()}
    for place in places:
        prefix = f"lang_encoder.{layers}.{place}.gated_cross_attn_layer."
        state |= {prefix + k: v for k, v in Block().state_dict().items()}
    state[embedding] = torch.zeros(VOCAB, DIM)
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in state.items()}


def language(kind: str, folder: Path) -> None:
    if kind == "mpt":
        config = transformers.MptConfig(d_model=DIM, n_layers=2, n_heads=4, vocab_size=80, max_seq_len=2048)
        config.expansion_ratio = 4
    else:
        config = transformers.GPTNeoXConfig(
            hidden_size=DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            vocab_size=80,
            rotary_pct=1.0,
            use_parallel_residual=False,
        )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


KINDS = {
    "mpt": ("openflamingo-9b", "transformer.blocks", (1,), "lang_encoder.transformer.wte.weight"),
    "neox": ("openflamingo-4b", "gpt_neox.layers", (1,), "lang_encoder.gpt_neox.embed_in.weight"),
}


@pytest.fixture(params=KINDS)
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    name, layers, places, embedding = KINDS[request.param]
    state = released(layers, places, embedding)
    torch.save(state, tmp_path / "checkpoint.pt")
    language(request.param, tmp_path / "lm")
    config = preset(name, tiny=True, vocab=VOCAB).edit(**{"model.lm.mlp": 256})
    return config, state, places, layers, tmp_path


def test_released_file_is_read(parts: Any):
    config, state, places, layers, folder = parts
    vlm = VLM(config, build_model(config.model)).load_part("lm", folder / "lm")
    base = vlm.model.lm.embedding.weight.detach().clone()
    assert base.shape == (VOCAB, DIM), "the rows that no token has are cut off, as the reference's resize does"
    vlm.load_part("openflamingo", folder / "checkpoint.pt", allow_pickle=True)
    model = vlm.model
    name = next(n for n in state if n.endswith(("wte.weight", "embed_in.weight")))
    assert torch.equal(model.lm.embedding.weight, state[name]) and not torch.equal(base, state[name])
    assert "openflamingo" in vlm.config.provenance.base
    # the resampler's first layer and a gated block, computed from the file's own tensors
    x, latents = torch.randn(5, MEDIA), state["perceiver.latents"]
    at = "perceiver.layers.0.0."
    media = nn.functional.layer_norm(x, (MEDIA,), state[at + "norm_media.weight"], state[at + "norm_media.bias"])
    own = nn.functional.layer_norm(
        latents, (MEDIA,), state[at + "norm_latents.weight"], state[at + "norm_latents.bias"]
    )
    found = seen(own, torch.cat([media, own]), state, at, heads=2)
    layer = model.connectors["image"].layers[0]
    ours = layer.attn(
        layer.latents_norm(latents[None]), torch.cat([layer.context_norm(x), layer.latents_norm(latents)])[None]
    )
    torch.testing.assert_close(ours[0], found, atol=1e-5, rtol=1e-5)
    at = f"lang_encoder.{layers}.{places[0]}.gated_cross_attn_layer."
    hidden = torch.randn(3, DIM)
    normed = nn.functional.layer_norm(hidden, (DIM,), state[at + "attn.norm.weight"], state[at + "attn.norm.bias"])
    expected = hidden + state[at + "attn_gate"].tanh() * seen(normed, x, state, at + "attn.", heads=4)
    inner = nn.functional.layer_norm(expected, (DIM,), state[at + "ff.0.weight"], state[at + "ff.0.bias"])
    inner = nn.functional.gelu(inner @ state[at + "ff.1.weight"].T) @ state[at + "ff.3.weight"].T
    expected = expected + state[at + "ff_gate"].tanh() * inner
    from chiasm.fusion.gated import Sight

    assert model.places == places
    ours = model.cross[0](hidden[None], x[None], Sight.of(torch.ones(1, 3, 5, dtype=torch.bool)))
    torch.testing.assert_close(ours[0], expected, atol=1e-5, rtol=1e-5)


def seen(x: Tensor, source: Tensor, state: dict[str, Tensor], at: str, heads: int) -> Tensor:
    q = (x @ state[at + "to_q.weight"].T).unflatten(-1, (heads, -1))
    k, v = ((source @ m.T).unflatten(-1, (heads, -1)) for m in state[at + "to_kv.weight"].chunk(2))
    weights = (torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1) @ state[at + "to_out.weight"].T


def test_what_is_refused(parts: Any, tmp_path: Path):
    config, state, _, _, _ = parts
    vlm = VLM(config, build_model(config.model))
    path = tmp_path / "other.pt"
    for change, message in (
        ({"perceiver.extra": torch.zeros(2)}, r"'perceiver\.extra' \[2\]"),
        ({"perceiver.latents": torch.zeros(9, MEDIA)}, r"\[9, 32\] in the file, \[8, 32\] in the model"),
    ):
        torch.save(state | change, path)
        with pytest.raises(CheckpointError, match=message):
            vlm.load_part("openflamingo", path, allow_pickle=True)
    torch.save({k: v for k, v in state.items() if "ff_gate" not in k}, path)
    with pytest.raises(CheckpointError, match="ff_gate"):
        vlm.load_part("openflamingo", path, allow_pickle=True)
    with pytest.raises(CheckpointError, match="pickle"):
        vlm.load_part("openflamingo", path)
    llava = preset("llava-1.5-7b", tiny=True)
    with pytest.raises(CheckpointError, match="fills a fusion 'cross_attention'"):
        chiasm.build(llava).load_part("openflamingo", path, allow_pickle=True)
    # duplicates that training states hold under the decoder's own names are left out, and said so
    doubled = state | {
        k.replace("lang_encoder.", "lang_encoder.old_decoder_blocks.", 1): v for k, v in state.items() if "gated" in k
    }
    torch.save({"module." + k: v for k, v in doubled.items()}, path)
    vlm.load_part("openflamingo", path, allow_pickle=True)
    assert any("a second time" in line for line in vlm.config.provenance.history)
