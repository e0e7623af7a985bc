"""What a proof does not ask for: parameters that never run, and those that run but cancel out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_proof import stage_run
from tiny_run import model_config, tiny_vlm, tokenizer_folder, write_pictures

from chiasm.train.proof import ProofError, cancelling


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


@pytest.mark.parametrize("parts", ["attention", "cross", "cross with normed heads", "gpt"])
def test_what_cancels_out_is_known_by_its_gradient(parts):
    """In float64 the declared ones have a gradient of rounding size, and of the others each has a real one."""
    from chiasm.lm.gpt import GPT
    from chiasm.nn.attention import Attention
    from chiasm.nn.cross_attention import CrossAttention

    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    if parts == "attention":
        model = Attention(16, 2).double()
        result = model(x, mask=torch.arange(5) < torch.tensor([[5], [3]]))
    elif parts in ("cross", "cross with normed heads"):
        model = CrossAttention(16, 2, head_norm=parts != "cross").double()
        result = model(x, y)
    else:
        sizes = {"vocab": 9, "dim": 16, "depth": 1, "heads": 2, "mlp": 32, "bias": True, "positions": "alibi"}
        model = GPT(GPT.Config.parse(sizes)).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        ones = torch.ones(2, 5, dtype=torch.long)
        result = model(x, ones.cumsum(1) - 1, ones)
    result.square().sum().backward()
    slopes = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    declared = cancelling(model)
    assert len(declared) == 1 and all(slopes.pop(name) < 1e-12 for name in declared)
    assert min(slopes.values()) > 1e-6


@pytest.mark.parametrize("norm", [True, False])
def test_a_key_bias_that_acts_is_not_excused(norm):
    """Behind a norm or turned by its position it does have an effect; the norm's own bias has none."""
    from chiasm.lm.decoder import Decoder
    from chiasm.nn.cross_attention import CrossAttention

    if norm:
        assert cancelling(CrossAttention(16, 2, head_norm=True)) == ["k_norm.bias"]
    else:
        sizes = {"vocab": 9, "dim": 16, "depth": 1, "heads": 2, "mlp": 32, "qkv_bias": True, "max_positions": 8}
        assert cancelling(Decoder(Decoder.Config.parse(sizes))) == []


def test_a_key_bias_without_a_gradient_is_no_fault(data, tmp_path):
    """Rounding may leave exactly 0: the proof holds, and says how many tensors cancel out."""
    vlm = tiny_vlm(tmp_path)
    for block in vlm.model.encoders["image"].blocks:
        block.attn.k.bias.register_hook(torch.zeros_like)
    stage_run(vlm, data, tmp_path / "run", plan="end_to_end", steps=6).fit()
    told = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert told["verdict"] == "proved"
    assert told["without_effect"] == [f"encoders.image.blocks.{i}.attn.k.bias" for i in (0, 1)]
    vlm = tiny_vlm(tmp_path)
    vlm.model.encoders["image"].blocks[0].attn.q.bias.register_hook(torch.zeros_like)  # that of a query does act
    with pytest.raises(ProofError, match=r"1 of .*blocks.0.attn.q.bias.*each value of their gradient is 0"):
        stage_run(vlm, data, tmp_path / "wrong", plan="end_to_end", steps=6).fit()


HF_TOWER = {
    **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
}
HF_LMS = {
    "opt": {
        **{"model_type": "opt", "vocab_size": 96, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256, "dropout": 0.0},
    },
    "qwen2": {
        **{"model_type": "qwen2", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256},
    },
}


@pytest.mark.parametrize("lm, layer, select", [("opt", -2, "patch"), ("qwen2", None, "cls_patch")])
def test_models_of_transformers_train_whole_and_are_proved(data, tmp_path, lm, layer, select):
    from chiasm.vlm import build

    config = model_config()
    config["model"]["encoders"]["image"] = {"type": "hf", "config": HF_TOWER, "layer": layer, "select": select}
    config["model"]["lm"] = {"type": "hf", "config": HF_LMS[lm]}
    torch.manual_seed(0)
    vlm = build(config, tokenizer=tokenizer_folder(tmp_path / "tokenizer"))
    stage_run(vlm, data, tmp_path / "run", plan="end_to_end", steps=4).fit()
    told = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert told["verdict"] == "proved"
    tower = {n.removeprefix("encoders.image.model.") for n in told["unused"] if n.startswith("encoders")}
    last = {n for n in tower if ".layers.2." in n}
    assert bool(last) == (layer == -2) and len(last) in (0, 16)
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in tower - last} == {"post_layernorm"}
    assert not any(n.startswith("lm.") for n in told["unused"])
    cancelled = [n for n in told["without_effect"] if n.startswith("lm.")]
    assert len(cancelled) == {"opt": 2, "qwen2": 0}[lm]  # rotary positions turn a key's bias: there it acts


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "vit", "beit")


@pytest.mark.parametrize("layer", [None, -2])
@pytest.mark.parametrize("kind", TOWERS)
def test_towers_of_transformers_against_their_own_gradients(kind, layer):
    """What ``unused`` tells from shapes is what a real backward pass in float64 leaves without a gradient."""
    from chiasm.encoders.hf import HFEncoder

    torch.manual_seed(0)
    values = {"config": {"model_type": kind, **SIZES, "intermediate_size": 64, "mlp_ratio": 2}, "layer": layer}
    encoder = HFEncoder(HFEncoder.Config.parse(values)).double().train()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    encoder(torch.randn(2, 3, 16, 16).double()).x.square().mean().backward()
    without = {name for name, p in encoder.named_parameters() if p.grad is None}
    assert set(encoder.unused()) == without
    assert bool(without) or kind in ("dinov2", "beit")
    slopes = {name: float(p.grad.norm()) for name, p in encoder.named_parameters() if p.grad is not None}
    tell = set(encoder.without_effect())
    assert bool(tell) == (kind != "beit")  # BEiT's keys have no bias
    assert all(slopes[name] < 1e-12 for name in tell & slopes.keys())
    assert min(slope for name, slope in slopes.items() if name not in tell) > 1e-9


def test_an_encoder_decoder_of_transformers_uses_all_it_has():
    from chiasm.lm.hf import HFLM

    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = {"model_type": "t5", **sizes, "is_encoder_decoder": True, "decoder_start_token_id": 0}
    lm = HFLM(HFLM.Config.parse({"config": config}))
    assert lm.unused() == [] and lm.without_effect() == []
