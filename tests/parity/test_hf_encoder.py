"""The hf encoder gives what the model of transformers gives, and knows its tokens beforehand."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import pytest
import torch

from chiasm.encoders.hf import HFEncoder, hf_encoder_config
from chiasm.errors import ConfigError, DataError
from parity.weights import randomise

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES = {"image_size": 32, "patch_size": 8}

MODELS = {
    "vit": ("ViT", {}, 1),
    "clip": ("CLIPVision", {}, 1),
    "siglip": ("SiglipVision", {}, 0),
    "dinov2": ("Dinov2", {}, 1),
    "registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}, 4),
}


def pair(name: str, **options: Any) -> tuple[torch.nn.Module, HFEncoder, int]:
    family, changes, prefix = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SMALL, **SIZES, **changes)
    theirs = randomise(getattr(transformers, f"{family}Model")(config))
    ours = HFEncoder(hf_encoder_config(config.to_dict(), **options)).eval()
    ours.model.load_state_dict(theirs.state_dict())
    return theirs, ours, prefix


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [None, -1, -2, 0])
def test_equal(name: str, layer: int | None):
    theirs, ours, prefix = pair(name, layer=layer)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    output = theirs(x, output_hidden_states=True)
    expected = output.last_hidden_state if layer is None else output.hidden_states[layer]
    tokens = ours(x)
    assert expected.shape[1] == 16 + prefix and expected.std() > 0.05
    torch.testing.assert_close(tokens.x, expected[:, prefix:], atol=1e-6, rtol=0)
    assert tokens.grid == (4, 4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "clip", "dinov2", "registers"])
def test_select(name: str):
    theirs, ours, prefix = pair(name, select="cls_patch")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = theirs(x).last_hidden_state
    found = ours(x).x
    torch.testing.assert_close(found[:, 0], expected[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 1:], expected[:, prefix:], atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(32, 32), (48, 24), (41, 70)])
def test_count(name: str, size: tuple[int, int]):
    _, ours, _ = pair(name)
    tokens = ours(torch.randn(1, 3, *size))
    count = pickle.loads(pickle.dumps(ours.config)).count((3, *size))
    assert (tokens.x.shape[1], tokens.grid) == (count.tokens, count.grid)


def test_vision_part_of_a_larger_configuration():
    whole = transformers.CLIPConfig(vision_config={**SMALL, **SIZES})
    assert hf_encoder_config(whole.to_dict()).config["model_type"] == "clip_vision_model"


def test_hierarchical_models_take_their_own_size_only():
    config = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=32, patch_size=4, window_size=4
    )
    mine = hf_encoder_config(config.to_dict())
    assert mine.count((3, 32, 32)).tokens == HFEncoder(mine)(torch.randn(1, 3, 32, 32)).x.shape[1] == 16
    with pytest.raises(DataError, match=r"\(3, 32, 32\) only, got \(3, 48, 48\)"):
        mine.count((3, 48, 48))


def test_saved_configuration_counts_without_transformers(monkeypatch: pytest.MonkeyPatch):
    config = hf_encoder_config(transformers.ViTConfig(**SMALL, **SIZES).to_dict())
    saved = config.dump()
    monkeypatch.setitem(sys.modules, "transformers", None)
    again = HFEncoder.Config.parse(saved)
    assert again == config and again.count((3, 48, 24)).tokens == 18
    with pytest.raises(ConfigError, match=r"needs transformers: pip install 'chiasm\[hf\]'"):
        HFEncoder(again)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"model_type": "llama"}, {}, "'llama' does not read pictures"),
        ({"hidden_size": 3}, {}, "no 'model_type'"),
        ({"model_type": "vitt"}, {}, "refuses this configuration"),
        ({"model_type": "vit", "hidden_size": "wide"}, {}, "refuses this configuration"),
        ({"model_type": "vit", **SMALL, **SIZES}, {"layer": 4}, "layer 4 is not one of its 4 hidden states"),
        ({"model_type": "siglip_vision_model", **SMALL, **SIZES}, {"select": "cls"}, "needs a class vector"),
    ],
)
def test_refusals(config: dict[str, Any], options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        hf_encoder_config(config, **options)
