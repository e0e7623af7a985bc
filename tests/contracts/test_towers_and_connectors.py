"""What every registered encoder and connector owes: shapes, counts, gradients, files, types.

A new part adds one line to ``ENCODERS`` or ``CONNECTORS``; a registered part without a line fails.
"""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from chiasm import registry
from chiasm.errors import ChiasmError, ConfigError, DataError
from chiasm.types import Count, Tokens

TINY_VIT = {"image_size": 24, "patch": 8, "dim": 16, "depth": 3, "heads": 2, "mlp": 20}
TINY_HF = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_BODY = {"dim": 16, "depth": 3, "heads": 2, "mlp": 20}
PICTURES = [(3, 24, 24), (3, 32, 16), (3, 45, 27)]
TEXTS: list[tuple[int, ...]] = [(7,), (12,), (1,)]  # ids below WORDS
WORDS = 30
TINY_TEXT = {"vocab": WORDS, "dim": 16, "depth": 2, "heads": 2, "mlp": 20, "positions": 12}
TINY_STAGES = [{"channels": 16, "expand": 1}, {"channels": 24, "stride": 2, "repeats": 2, "expand": 2}]

# name → (configuration, shapes of a unit it takes, parameters that stand for a published model's file but do not run)
ENCODERS: dict[str, tuple[dict[str, Any], list[tuple[int, ...]], tuple[str, ...]]] = {
    "vit": ({"type": "vit", **TINY_VIT}, PICTURES, ()),
    "vit/clip": (
        {
            "type": "vit",
            **TINY_VIT,
            "activation": "quick_gelu",
            "norm_eps": 1e-5,
            "patch_bias": False,
            "pre_norm": True,
            "post_norm": "unused",
            "layer": -2,
            "select": "cls_patch",
        },
        PICTURES,
        ("blocks.2.", "post_norm."),
    ),
    "vit/siglip": ({"type": "vit", **TINY_VIT, "cls": False, "activation": "gelu_tanh"}, PICTURES, ()),
    "vit/sincos": ({"type": "vit", **TINY_VIT, "positions": "sincos", "post_norm": "none"}, PICTURES, ()),
    "vit/eva": ({"type": "vit", **TINY_VIT, "select": "cls_patch"}, PICTURES, ()),
    "vit/cls": ({"type": "vit", **TINY_VIT, "select": "cls"}, PICTURES, ()),
    "text": ({"type": "text", **TINY_TEXT}, TEXTS, ()),
    "text/siglip": ({"type": "text", **TINY_TEXT, "causal": False, "activation": "gelu_tanh"}, TEXTS, ()),
    "bert": ({"type": "bert", **TINY_TEXT, "pooler": "unused"}, TEXTS, ("pooler.",)),
    "naflex": (  # pictures come as rows of patches
        {"type": "naflex", "side": 4, "patch": 4, "dim": 16, "depth": 2, "heads": 2, "mlp": 20},
        [(6, 48), (9, 48), (1, 48)],
        (),
    ),
    "imagebind_audio": (
        {"type": "imagebind_audio", "bins": 24, "frames": 44, **TINY_BODY, "out": 12},
        [(1, 24, 44)],  # its positions fit one size
        (),
    ),
    "resnet": ({"type": "resnet", "blocks": [1, 1, 2, 1], "width": 8}, [(3, 64, 64), (3, 64, 96)], ()),
    "efficientnet": (
        {"type": "efficientnet", "width": 0.5, "depth": 1.0, "stages": TINY_STAGES, "square_padding": [1]},
        [(3, 24, 24), (3, 32, 16), (3, 45, 27)],
        (),
    ),
    "hf": (
        {"type": "hf", "config": {"model_type": "vit", **TINY_HF, "image_size": 24, "patch_size": 8}},
        PICTURES,
        ("model.pooler.",),
    ),
}

# name → (configuration, widths of its sources)
CONNECTORS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "linear": ({"type": "linear"}, {"image": 6}),
    "mlp": ({"type": "mlp", "depth": 3, "hidden": 9}, {"image": 6}),
    "pixel_shuffle": ({"type": "pixel_shuffle", "factor": 2, "depth": 2, "bias": True}, {"image": 6}),
    "neighbours": ({"type": "neighbours", "factor": 4}, {"image": 6}),
    "dynamic": ({"type": "dynamic", "keep": 5, "then": {"type": "mlp", "hidden": 9}}, {"image": 8}),
    "gate": ({"type": "gate", "then": {"type": "linear"}}, {"image": 6, "detail": 4}),
    "gate/tanh": ({"type": "gate", "mode": "residual_tanh"}, {"image": 6, "detail": 4}),
    "hierarchical": (
        {"type": "hierarchical", "frame": TINY_BODY, "clip": TINY_BODY, "frame_queries": 4, "frames": 1, "queries": 3},
        {"image": 6},
    ),
    "timeline": (
        {"type": "timeline", "units": 1, "queries": 3, "dim": 16, "depth": 2, "heads": 2, "mlp": 20},
        {"image": 6},
    ),
    "mqt": ({"type": "mqt", "queries": 9, "use": 4, "heads": 2}, {"image": 8}),
    "multiscale": ({"type": "multiscale", "queries": 3, "strides": [2, 1], "body": TINY_BODY}, {"image": 6}),
    "resampler": ({"type": "resampler", "queries": 3, "depth": 2, "heads": 2, "head_dim": 4}, {"image": 8}),
    "resampler/times": ({"type": "resampler", "queries": 3, "depth": 1, "frames": 1, "head_norm": True}, {"image": 8}),
    "pooled": ({"type": "pooled", "pool": "mean"}, {"image": 6}),
    "pooled/bias": ({"type": "pooled", "pool": "mean", "project": "linear_bias"}, {"image": 6}),
    "map_head": ({"type": "map_head", "heads": 2, "mlp": 12}, {"image": 10}),
    "clip_pool": ({"type": "clip_pool", "grid": [4, 4], "heads": 2}, {"image": 8}),
    "qformer": ({"type": "qformer", "queries": 3, "dim": 16, "depth": 3, "heads": 2, "mlp": 20}, {"image": 6}),
    "qformer/states": (
        {"type": "qformer", "queries": 3, "dim": 10, "depth": 3, "heads": 2, "mlp": 20, "project": False},
        {"image": 6},
    ),
}

GRIDS = [(4, 4), (2, 6)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def lively(module: nn.Module) -> nn.Module:
    """Biases and norms away from 0 and 1, so that a part that forgets one is seen."""
    g = generator(3)
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return module


def encoder(key: str) -> Any:
    pytest.importorskip("transformers") if key.startswith("hf") else None
    values = ENCODERS[key][0]
    entry = registry.get("encoder", values["type"])
    return lively(entry(entry.Config.parse(values)))


def connector(key: str, out_dim: int = 10) -> Any:
    values, widths = CONNECTORS[key]
    entry = registry.get("connector", values["type"])
    return lively(entry(entry.Config.parse(values), in_dims=widths, out_dim=out_dim))


def units_of(key: str, units: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Pictures, or ids of words."""
    if ENCODERS[key][1] is TEXTS:
        return torch.randint(1, WORDS, (units, *shape), generator=generator())
    return torch.randn(units, *shape, generator=generator())


def features(key: str, units: int, grid: tuple[int, int], seed: int = 0) -> Tokens | dict[str, Tokens]:
    g = generator(seed)
    made = {
        name: Tokens(torch.randn(units, grid[0] * grid[1], width, generator=g), grid=grid)
        for name, width in CONNECTORS[key][1].items()
    }
    return made if len(made) > 1 else next(iter(made.values()))


def leaf(x: Tokens | dict[str, Tokens]) -> list[torch.Tensor]:
    return [x.x] if isinstance(x, Tokens) else [t.x for t in x.values()]


def test_every_part_is_tested():
    for kind, table in (("encoder", ENCODERS), ("connector", CONNECTORS)):
        ours = [n for n in registry.names(kind) if registry.get(kind, n).__module__.startswith("chiasm.")]
        missing = set(ours) - {key.split("/")[0] for key in table}
        assert not missing, f"{kind}s without a line in this test: {missing}"


# ------------------------------------------------------------------------------------------------------------- encoders


@torch.no_grad()
@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("key", ENCODERS)
def test_encoder_shape_is_the_counted_one(key: str, units: int):
    model = encoder(key).eval()
    for shape in ENCODERS[key][1]:
        tokens = model(units_of(key, units, shape))
        count = pickle.loads(pickle.dumps(model.config)).count(shape)
        assert tokens.x.shape == (units, count.tokens, model.dim)
        assert tokens.grid == count.grid
        if count.grid:
            assert count.grid[0] * count.grid[1] == count.tokens


@torch.no_grad()
@pytest.mark.parametrize("key", ENCODERS)
def test_encoder_units_do_not_see_each_other(key: str):
    model = encoder(key).eval()
    x = units_of(key, 3, ENCODERS[key][1][0])
    together = model(x).x
    alone = torch.cat([model(unit[None]).x for unit in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2, "two pictures give the same features"


@pytest.mark.parametrize("key", ENCODERS)
def test_encoder_gradients(key: str):
    model = encoder(key)
    shape = ENCODERS[key][1][0]
    x = units_of(key, 2, shape)
    if x.is_floating_point():
        x.requires_grad_()
    out = model(x).x
    (out * torch.randn(out.shape, generator=generator(1))).sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    expected = (
        {name for name, _ in model.named_parameters() if name.startswith(ENCODERS[key][2])}
        if ENCODERS[key][2]
        else set()
    )
    assert idle == expected
    if hasattr(model, "unused"):
        assert set(model.unused()) == expected
    for name, p in model.named_parameters():
        # a bias of keys shifts all scores of a query alike: its gradient is zero but for rounding
        if p.grad is not None and not name.endswith(("attn.k.bias", "k_proj.bias", "key.bias")):
            assert p.grad.abs().max() > 1e-7, f"{name} gets no gradient"
    if x.is_floating_point():
        assert x.grad is not None and x.grad[..., :8, :8].abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("key", ENCODERS)
def test_encoder_saves_and_loads(key: str):
    model = encoder(key).eval()
    config = model.config
    again = type(model)(type(config).parse(config.dump())).eval()
    x = units_of(key, 2, ENCODERS[key][1][0])
    assert not torch.allclose(again(x).x, model(x).x)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x).x, model(x).x)


@torch.no_grad()
@pytest.mark.parametrize("key", ENCODERS)
def test_encoder_in_bfloat16(key: str):
    model = encoder(key).eval()
    x = units_of(key, 2, ENCODERS[key][1][-1])
    wide = model(x).x
    narrow = model.to(torch.bfloat16)(x).x
    assert narrow.dtype == torch.bfloat16
    error = (narrow.float() - wide).norm() / wide.norm()
    assert 0 < error < 0.03


@pytest.mark.parametrize("key", ENCODERS)
def test_encoder_on_meta(key: str):
    built = encoder(key)
    with torch.device("meta"):
        model = type(built)(built.config)
        assert all(p.is_meta for p in model.parameters())
        for shape in ENCODERS[key][1]:
            assert model(torch.empty(2, *shape)).x.shape[1] == model.config.count(shape).tokens


@pytest.mark.parametrize("key", ENCODERS)
def test_encoder_starts_alive(key: str):
    """Fresh weights: no matrix and no vector besides biases is constant."""
    values = ENCODERS[key][0]
    entry = registry.get("encoder", values["type"])
    for name, parameter in entry(entry.Config.parse(values)).named_parameters():
        if parameter.ndim > 1:
            assert parameter.std() > 1e-3, name


@pytest.mark.parametrize("key", [k for k in ENCODERS if ENCODERS[k][1] is PICTURES])
@pytest.mark.parametrize(("shape", "message"), [((1, 24, 24), "1, 24, 24"), ((3, 24), "3, 24"), ((3, 5, 24), "5x24")])
def test_encoder_refuses_what_is_no_picture(key: str, shape: tuple[int, ...], message: str):
    model = encoder(key)
    with pytest.raises(DataError, match=message):
        model.config.count(shape)
    with pytest.raises(DataError):
        model(torch.zeros(2, *shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 17}, "width 17 cannot be split into 2 heads"),
        ({"layer": 4}, "layer 4 is not one of its 4 hidden states"),
        ({"layer": -5}, r"choose one of -4\.\.3"),
        ({"cls": False, "select": "cls"}, "needs a class vector"),
        ({"image_size": 4}, "image_size 4 is smaller than the patch, 8"),
        ({"positions": "sincos", "dim": 18}, "divisible by 4, got 18"),
        ({"activation": "gelu_fast"}, "activation"),
        ({"deep": 2}, "unknown key 'deep'"),
    ],
)
def test_vit_refuses_bad_configurations(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        registry.get("encoder", "vit").Config.parse({"type": "vit", **TINY_VIT, **changes})


def test_vit_runs_only_the_blocks_it_reads():
    model = encoder("vit/clip")
    runs = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))
    model(torch.zeros(1, 3, 24, 24))
    assert runs == [0, 1]


# ----------------------------------------------------------------------------------------------------------- connectors


@torch.no_grad()
@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("key", CONNECTORS)
def test_connector_shape_is_the_counted_one(key: str, grid: tuple[int, int], units: int):
    model = connector(key).eval()
    source = Count(grid[0] * grid[1], grid)
    widths = CONNECTORS[key][1]
    count = pickle.loads(pickle.dumps(model.config)).count(dict.fromkeys(widths, source) if len(widths) > 1 else source)
    tokens = model(features(key, units, grid))
    assert tokens.x.shape == (units, count.tokens, 10)
    assert tokens.grid == count.grid


@torch.no_grad()
@pytest.mark.parametrize("key", CONNECTORS)
def test_connector_units_do_not_see_each_other(key: str):
    model = connector(key).eval()
    x = features(key, 3, (4, 4))
    together = model(x).x

    def row(t: Tokens, i: int) -> Tokens:
        return Tokens(t.x[i : i + 1], grid=t.grid)

    for i in range(3):
        alone = model(row(x, i) if isinstance(x, Tokens) else {n: row(t, i) for n, t in x.items()}).x
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("key", CONNECTORS)
def test_connector_gradients(key: str):
    model = connector(key)
    x = features(key, 2, (4, 4))
    for tensor in leaf(x):
        tensor.requires_grad_()
    out = model(x).x
    (out * torch.randn(out.shape, generator=generator(1))).sum().backward()
    for name, p in model.named_parameters():
        # what shifts all keys alike shifts all scores of a query alike
        zero_by_symmetry = name.endswith(("k.bias", "k_proj.bias", "key.bias", "key_norm.bias", "k_norm.bias"))
        assert p.grad is not None and (zero_by_symmetry or p.grad.abs().max() > 1e-7), f"{name} gets no gradient"
    for tensor in leaf(x):
        assert tensor.grad is not None and (tensor.grad.abs().amax(dim=(0, 1)) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("key", CONNECTORS)
def test_connector_saves_and_loads(key: str):
    model = connector(key).eval()
    again = type(model)(type(model.config).parse(model.config.dump()), CONNECTORS[key][1], 10).eval()
    x = features(key, 2, (4, 4))
    assert not torch.allclose(again(x).x, model(x).x)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x).x, model(x).x)


@torch.no_grad()
@pytest.mark.parametrize("key", CONNECTORS)
def test_connector_in_bfloat16(key: str):
    model = connector(key).eval()
    x = features(key, 2, (4, 4))
    wide = model(x).x

    def half(t: Tokens) -> Tokens:
        return Tokens(t.x.bfloat16(), grid=t.grid)

    narrow = model.to(torch.bfloat16)(half(x) if isinstance(x, Tokens) else {n: half(t) for n, t in x.items()}).x
    assert narrow.dtype == torch.bfloat16
    assert 0 < (narrow.float() - wide).norm() / wide.norm() < 0.03


@pytest.mark.parametrize("key", CONNECTORS)
def test_connector_on_meta(key: str):
    with torch.device("meta"):
        model = type(connector(key))(connector(key).config, CONNECTORS[key][1], 10)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("key", ["linear", "mlp", "pixel_shuffle"])
def test_connector_of_one_source_refuses_two(key: str):
    entry = registry.get("connector", key)
    config = entry.Config.parse(CONNECTORS[key][0])
    two = {"image": Count(16, (4, 4)), "depth": Count(16, (4, 4))}
    with pytest.raises(ConfigError, match="joins one encoder, got 2: image, depth"):
        entry(config, in_dims={"image": 4, "depth": 5}, out_dim=3)
    with pytest.raises(ConfigError, match="joins one encoder, got 2: image, depth"):
        config.count(two)


def test_mlp_is_the_perceptron_of_llava():
    """Names, shapes and the exact GELU of ``mlp2x_gelu``, with torch's own initialisation."""
    model = registry.get("connector", "mlp")(registry.get("connector", "mlp").Config(), {"image": 8}, 12)
    reference = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 12))
    assert {k: v.shape for k, v in model.layers.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    reference.load_state_dict(model.layers.state_dict())
    x = torch.randn(2, 3, 8, generator=generator())
    assert torch.equal(model(Tokens(x)).x, reference(x))
    bound = 1 / 8**0.5
    spread = model.layers[0].weight.abs().max()
    assert 0.8 * bound < spread <= bound
    big = registry.get("connector", "mlp")
    with torch.device("meta"):
        of_7b = big(big.Config(), {"image": 1024}, 4096)
    assert sum(p.numel() for p in of_7b.parameters()) == 20_979_712  # mm_projector of LLaVA-1.5-7B


@pytest.mark.parametrize("grid", [(3, 4), (4, 5)])
def test_pixel_shuffle_names_both_numbers(grid: tuple[int, int]):
    model = connector("pixel_shuffle")
    message = f"{grid[0]}x{grid[1]} tokens cannot be divided by factor 2"
    with pytest.raises(ConfigError, match=message):
        model.config.count(Count(grid[0] * grid[1], grid))
    with pytest.raises(ConfigError, match=message):
        model(features("pixel_shuffle", 1, grid))
    with pytest.raises(ChiasmError, match="these 7 do not"):
        model.config.count(Count(7))
