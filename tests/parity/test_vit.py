"""The vision transformer against transformers: every hidden state, the last norm, other sizes, published sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.convert import maps
from chiasm.convert.engine import load_weights
from chiasm.convert.io import Loaded
from chiasm.encoders import vit
from chiasm.encoders.vit import ViT
from chiasm.nn.positions import sincos
from parity.weights import randomise, rename

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
OURS = {"dim": 32, "mlp": 48, "depth": 3, "heads": 4}

_BLOCK = [
    ("layers.", "blocks."),
    ("encoder.", ""),
    ("encoder.layer.", "blocks."),
    ("self_attn.q_proj", "attn.q"),
    ("self_attn.k_proj", "attn.k"),
    ("self_attn.v_proj", "attn.v"),
    ("self_attn.out_proj", "attn.out"),
    ("attention.q_proj", "attn.q"),
    ("attention.k_proj", "attn.k"),
    ("attention.v_proj", "attn.v"),
    ("attention.o_proj", "attn.out"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("pre_layrnorm", "pre_norm"),
    ("post_layernorm", "post_norm"),
    ("layernorm", "post_norm"),
    ("embeddings.patch_embeddings.projection", "patch"),
    ("embeddings.patch_embedding", "patch"),
    ("embeddings.position_embeddings", "positions"),
    ("embeddings.position_embedding.weight", "positions"),
    ("embeddings.class_embedding", "cls"),
    ("embeddings.cls_token", "cls"),
    ("vision_model.", ""),
]


def theirs_as_ours(model: torch.nn.Module) -> dict[str, Tensor]:
    state = rename(model.state_dict(), _BLOCK)
    shaped = {"cls": lambda x: x.flatten(), "positions": lambda x: x.flatten(0, -2)}
    return {key: shaped.get(key, lambda x: x)(value) for key, value in state.items()}


@dataclass
class Case:
    theirs: Any
    ours: dict[str, Any]
    size: int


def _vit() -> Case:
    # HF's default epsilon of 1e-12 is not the published 1e-6
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    model = transformers.ViTModel(config, add_pooling_layer=False)
    return Case(model, {**OURS, "image_size": 32, "patch": 8}, 32)


def _clip() -> Case:
    config = transformers.CLIPVisionConfig(**SMALL, image_size=28, patch_size=7)
    ours = vit.clip_vit_l14(28, **OURS, patch=7).dump()
    return Case(transformers.CLIPVisionModel(config), ours, 28)


def _siglip() -> Case:
    config = transformers.SiglipVisionConfig(
        **SMALL, image_size=30, patch_size=7, vision_use_head=False
    )  # 2 pixels rest
    ours = vit.siglip_so400m_14_384(30, **OURS, patch=7).dump()
    return Case(transformers.SiglipVisionModel(config), ours, 30)


CASES = {"vit": _vit, "clip": _clip, "siglip": _siglip}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    made = CASES[request.param]()
    randomise(made.theirs)
    return made


def ours(case: Case, **changes: Any) -> ViT:
    config = {"type": "vit", **case.ours, **changes}
    if "select" not in changes:
        config["select"] = "cls_patch" if config.get("cls", True) else "patch"
    model = ViT(ViT.Config.parse(config)).eval()
    state = theirs_as_ours(case.theirs)
    if config.get("post_norm") == "none":
        state = {k: v for k, v in state.items() if not k.startswith("post_norm")}
    model.load_state_dict(state)
    return model


def pixels(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize("post_norm", ["none", "unused"])
def test_hidden_states(case: Case, layer: int, post_norm: str):
    x = pixels(2, 3, case.size, case.size)
    expected = case.theirs(x, output_hidden_states=True).hidden_states[layer]
    found = ours(case, layer=layer, post_norm=post_norm)(x).x
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_last_norm(case: Case):
    x = pixels(2, 3, case.size, case.size)
    theirs = case.theirs
    states = theirs(x, output_hidden_states=True)
    norm = dict(theirs.named_modules())
    norm = norm["layernorm"] if "layernorm" in norm else norm[next(n for n in norm if n.endswith("post_layernorm"))]
    expected = norm(states.hidden_states[-1])
    found = ours(case, layer=-1, post_norm="applied")(x).x
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if not hasattr(theirs, "pre_layrnorm") and not hasattr(getattr(theirs, "vision_model", None), "pre_layrnorm"):
        torch.testing.assert_close(found, states.last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 24), (21, 70), (64, 64)])
def test_other_sizes_interpolate(case: Case, size: tuple[int, int]):
    x = pixels(1, 3, *size)
    states = case.theirs(x, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    found = ours(case, layer=-2, post_norm="unused")(x).x
    torch.testing.assert_close(found, states[-2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_select(case: Case):
    x = pixels(2, 3, case.size, case.size)
    if not case.ours.get("cls", True):
        pytest.skip("no class vector")
    whole = ours(case, select="cls_patch")(x).x
    assert torch.equal(ours(case, select="patch")(x).x, whole[:, 1:])
    torch.testing.assert_close(ours(case, select="cls")(x).x, whole[:, :1], atol=2e-6, rtol=2e-6)


def test_the_class_vector_alone_is_the_same_in_less_work(case: Case):
    """The last block computes one position; value and every slope are those of the whole, in float64."""
    if not case.ours.get("cls", True):
        pytest.skip("no class vector")
    x, found = pixels(2, 3, case.size, case.size).double(), []
    for select in ("cls_patch", "cls"):
        model = ours(case, select=select).double()
        rows: list[int] = []
        model.blocks[model.config.blocks_run - 1].mlp.fc1.register_forward_hook(
            lambda *given, rows=rows: rows.append(given[2].shape[1])
        )
        out = model(x).x[:, :1]  # [2, 1, D]
        out.square().sum().backward()
        found.append((out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, rows[0]))
    (whole, slopes, every), (alone, own, one) = found
    assert (every, one) == (case.size**2 // case.ours["patch"] ** 2 + 1, 1)
    torch.testing.assert_close(alone, whole, atol=1e-12, rtol=1e-12)
    assert own.keys() == slopes.keys()
    for name, slope in own.items():
        torch.testing.assert_close(slope, slopes[name], atol=1e-10, rtol=1e-9, msg=name)


def test_sincos_positions():
    """MAE's formula written out for one place at a time: column first, sines before cosines."""
    found = sincos(16, (3, 5)).view(3, 5, 16)
    for row in range(3):
        for column in range(5):
            waves = [
                f(place / 10000 ** (i / 4)) for place in (column, row) for f in (math.sin, math.cos) for i in range(4)
            ]
            torch.testing.assert_close(found[row, column], torch.tensor(waves), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_maps_of_convert_name_the_same_tensors(name: str):
    """The package's own maps fill the tower exactly as the key map above does."""
    case = CASES[name]()
    randomise(case.theirs)
    model = ours(case)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    rules = {"vit": maps.vit, "clip": maps.clip_vit, "siglip": maps.siglip_vit}[name]()
    load_weights(model, Loaded("tiny", case.theirs.state_dict()), rules)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


PUBLISHED = {
    "vit_b16": (vit.vit_b16, "ViT", {}),
    "vit_l16": (
        vit.vit_l16,
        "ViT",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "vit_h14": (
        vit.vit_h14,
        "ViT",
        {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
            "patch_size": 14,
        },
    ),
    "clip_vit_b32": (vit.clip_vit_b32, "CLIPVision", {}),
    "clip_vit_l14_336": (
        vit.clip_vit_l14_336,
        "CLIPVision",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "patch_size": 14,
            "image_size": 336,
        },
    ),
    "siglip_b16": (vit.siglip_b16, "SiglipVision", {"vision_use_head": False}),
    "siglip_so400m_14_384": (
        vit.siglip_so400m_14_384,
        "SiglipVision",
        {
            "hidden_size": 1152,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "intermediate_size": 4304,
            "patch_size": 14,
            "image_size": 384,
            "vision_use_head": False,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_parameters(name: str):
    function, family, changes = PUBLISHED[name]
    config = getattr(transformers, f"{family}Config")(**changes)
    extra = {"add_pooling_layer": False} if family == "ViT" else {}
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}Model")(config, **extra)
        mine = ViT(function())
    expected = {k: v.shape for k, v in theirs_as_ours(theirs).items()}
    found = {k: v.shape for k, v in mine.state_dict().items()}
    assert found == expected
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())
    size = config.image_size
    assert mine(torch.empty(1, 3, size, size, device="meta")).x.shape[1] == function().count((3, size, size)).tokens
