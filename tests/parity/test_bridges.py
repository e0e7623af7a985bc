"""Resampler, gate, dynamic, hierarchical and elastic connectors: against transformers, and formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm import registry
from chiasm.compose import build_model, check_counts
from chiasm.connectors.dynamic import Dynamic
from chiasm.connectors.gate import Gate
from chiasm.connectors.hierarchical import Hierarchical
from chiasm.connectors.mqt import MQT
from chiasm.connectors.resampler import Resampler, idefics, openflamingo
from chiasm.errors import ConfigError, DataError
from chiasm.fusion.splice import Splice
from chiasm.types import Batch, Condition, Count, Layout, MediaBatch, Tokens
from parity.weights import randomise

BODY = {"dim": 16, "depth": 2, "heads": 2, "mlp": 20}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(kind: type, values: dict[str, Any], in_dims: dict[str, int], out: int = 10) -> Any:
    torch.manual_seed(0)
    return randomise(kind(kind.Config.parse(values), in_dims, out), 3)


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Written out, not torch's own function."""
    q, k, v = heads_of(q, heads), heads_of(k, heads), heads_of(v, heads)
    weights = ((q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------------------------------- resampler


@pytest.mark.parametrize("head_norm", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_resampler_is_that_of_idefics(rows: int, head_norm: bool):
    transformers = pytest.importorskip("transformers")
    perceiver = pytest.importorskip("transformers.models.idefics.perceiver")
    config = transformers.IdeficsConfig(
        vision_config={"embed_dim": 24}, perceiver_config={"qk_layer_norms_perceiver": head_norm}
    )
    theirs = randomise(perceiver.IdeficsPerceiverResampler(config, 24, 3, 2, 5, 4), 1)
    ours = Resampler(idefics(depth=3, heads=2, head_dim=5, queries=4, head_norm=head_norm), {"image": 24}, 24)
    names = {"blocks": "layers", "0.context_layer_norm": "context_norm", "0.latents_layer_norm": "latents_norm"}
    names |= {"0.q_layer_norm": "attn.q_norm", "0.k_layer_norm": "attn.k_norm", "0.output_proj": "attn.out"}
    names |= {f"0.{x}_proj": f"attn.{x}" for x in "qkv"}
    names |= {"1.ln": "mlp_norm", "1.fc": "fc1", "1.c_proj": "fc2", "layer_norm.": "norm."}
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in names.items():
            key = key.replace("." + old + ".", "." + new + ".") if old[0].isdigit() else key.replace(old, new)
        state[key.replace(".context_norm.", ".context_norm.")] = value
    ours.load_state_dict(state)
    x = noise(rows, 9, 24).requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected, found = theirs(x), ours(Tokens(y)).x
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = noise(*found.shape, seed=4)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.latents.grad, theirs.latents.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_resampler_is_the_published_formula_of_openflamingo():
    config = openflamingo(depth=2, heads=2, head_dim=3, queries=4)
    ours = randomise(Resampler(config, {"image": 8}, 8).double(), 2)
    x = noise(2, 5, 8, dtype=torch.float64)
    latents = ours.latents.expand(2, -1, -1)
    for layer in ours.layers:
        media = F.layer_norm(x, (8,), layer.context_norm.weight, layer.context_norm.bias)
        own = F.layer_norm(latents, (8,), layer.latents_norm.weight, layer.latents_norm.bias)
        both = torch.cat((media, own), 1)
        mixed = attend(own @ layer.attn.q.weight.T, both @ layer.attn.k.weight.T, both @ layer.attn.v.weight.T, 2)
        latents = latents + mixed @ layer.attn.out.weight.T
        inner = F.layer_norm(latents, (8,), layer.mlp_norm.weight, layer.mlp_norm.bias) @ layer.fc1.weight.T
        erf = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        latents = latents + erf @ layer.fc2.weight.T
    expected = F.layer_norm(latents, (8,), ours.norm.weight, ours.norm.bias)
    torch.testing.assert_close(ours(Tokens(x)).x, expected, atol=1e-12, rtol=1e-10)


def test_resampler_of_published_size():
    with torch.device("meta"):
        published = Resampler(openflamingo(), {"image": 1024}, 1024)
    assert sum(p.numel() for p in published.parameters()) == 63_019_008
    with pytest.raises(ConfigError, match=r"width 8, 10 are wanted"):
        Resampler(openflamingo(), {"image": 8}, 10)


@torch.no_grad()
@pytest.mark.parametrize("values", [{"type": "resampler", "queries": 3, "depth": 2, "heads": 2, "head_dim": 4}])
def test_resampler_does_not_see_what_is_masked(values: dict[str, Any]):
    ours = made(Resampler, values, {"image": 8})
    x = noise(1, 6, 8)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    torch.testing.assert_close(ours(Tokens(x, mask)).x, ours(Tokens(x[:, :4])).x, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_flamingo_squares_its_relu():
    ours = made(Resampler, {"type": "resampler", "depth": 1, "activation": "squared_relu"}, {"image": 8})
    plain = Resampler(ours.config.edit(activation="relu"), {"image": 8}, 10)
    plain.load_state_dict(ours.state_dict())
    plain.layers[0].fc2.register_forward_pre_hook(lambda _, inputs: (inputs[0] ** 2,))
    x = Tokens(noise(1, 6, 8))
    torch.testing.assert_close(plain(x).x, ours(x).x)


# ------------------------------------------------------------------------------------------------------------ gate


@torch.no_grad()
@pytest.mark.parametrize("mode", ["convex", "residual_tanh"])
def test_gate_is_its_formula(mode: str):
    ours = made(Gate, {"type": "gate", "mode": mode, "then": {"type": "linear"}}, {"clip": 6, "detail": 4}).double()
    a, b = noise(2, 4, 6, dtype=torch.float64), noise(2, 4, 4, seed=1, dtype=torch.float64)
    second = b @ ours.align.weight.T + ours.align.bias
    if mode == "convex":
        g = 1 / (1 + (-(torch.cat((a, second), -1) @ ours.gate.weight.T + ours.gate.bias)).exp())
        mixed = g * a + (1 - g) * second
    else:
        means = torch.cat((a.mean(1), second.mean(1)), -1)
        inner = means @ ours.gate[0].weight.T + ours.gate[0].bias
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        g = torch.tanh(inner @ ours.gate[2].weight.T + ours.gate[2].bias)
        mixed = a + g[:, :, None] * second
    expected = mixed @ ours.then.proj.weight.T + ours.then.proj.bias
    found = ours({"clip": Tokens(a, grid=(2, 2)), "detail": Tokens(b, grid=(2, 2))}).x
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_residual_gate_starts_closed_and_opens():
    torch.manual_seed(0)
    ours = Gate(Gate.Config(mode="residual_tanh"), {"clip": 6, "detail": 4}, 10)
    a, b = Tokens(noise(2, 4, 6), grid=(2, 2)), Tokens(noise(2, 4, 4, seed=1), grid=(2, 2))
    out = ours({"clip": a, "detail": b}).x
    assert torch.equal(out, ours.then(a).x)
    out.sum().backward()
    assert ours.gate[2].weight.grad.abs().max() > 0 and ours.align.weight.grad.abs().max() == 0


@torch.no_grad()
def test_gate_carries_a_finer_grid_to_the_first():
    ours = made(Gate, {"type": "gate", "then": {"type": "linear"}}, {"clip": 6, "detail": 4})
    a, fine = Tokens(noise(1, 4, 6), grid=(2, 2)), noise(1, 16, 4, seed=1)
    coarse = F.interpolate(fine.transpose(1, 2).unflatten(2, (4, 4)), size=(2, 2), mode="bilinear")
    alike = ours({"clip": a, "detail": Tokens(coarse.flatten(2).transpose(1, 2), grid=(2, 2))})
    torch.testing.assert_close(ours({"clip": a, "detail": Tokens(fine, grid=(4, 4))}).x, alike.x)
    assert alike.grid == (2, 2)
    with pytest.raises(ConfigError, match="4 and 9 tokens"):
        ours.config.count({"clip": Count(4, (2, 2)), "detail": Count(9)})
    with pytest.raises(ConfigError, match="joins two encoders, got 1"):
        Gate(Gate.Config(), {"clip": 6}, 10)


# --------------------------------------------------------------------------------------------------------- dynamic


@torch.no_grad()
def test_dynamic_keeps_the_best_in_picture_order():
    ours = made(Dynamic, {"type": "dynamic", "keep": 3, "then": {"type": "linear"}}, {"image": 8}).double()
    x = noise(2, 7, 8, dtype=torch.float64)
    scores = ours.scorer(x).squeeze(-1)
    for row in range(2):
        best = sorted(sorted(range(7), key=lambda i: -scores[row, i])[:3])
        kept = x[row, best] / (1 + (-scores[row, best]).exp())[:, None]
        expected = kept @ ours.then.proj.weight.T + ours.then.proj.bias
        torch.testing.assert_close(ours(Tokens(x)).x[row], expected, atol=1e-12, rtol=1e-10)


def test_scorer_of_dynamic_learns_what_matters():
    """A patch whose first channel is 1 carries the answer: after a few steps it is the one that is kept."""
    torch.manual_seed(0)
    ours = Dynamic(Dynamic.Config(keep=3, then={"type": "linear"}), {"image": 8}, 1)
    torch.nn.init.zeros_(ours.then.proj.weight)  # else its sign decides first whether the patch is let in at all
    steps = torch.optim.Adam(ours.parameters(), lr=0.03)
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        x = torch.randn(32, 6, 8, generator=g)
        x[..., 0] = 0
        rows, place, value = torch.arange(32), torch.randint(6, (32,), generator=g), torch.randn(32, generator=g)
        x[rows, place, 0], x[rows, place, 1] = 3.0, value
        loss = (ours(Tokens(x)).x.sum(dim=(1, 2)) - value).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
    assert (ours.scores(Tokens(x)).argmax(1) == place).float().mean() > 0.9


@torch.no_grad()
def test_dynamic_hands_on_masks_and_instructions():
    reads = {"type": "qformer", **BODY, "queries": 3, "text": {"vocab": 20, "positions": 8}, "instruction": True}
    ours = made(Dynamic, {"type": "dynamic", "keep": 3, "then": reads}, {"image": 8})
    assert ours.config.conditioned and ours.config.count(Count(7)).tokens == 3
    x = noise(1, 7, 8)

    def answer(*ids: int) -> Tensor:
        return ours(Tokens(x), Condition(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))).x

    assert (answer(1, 2) - answer(2, 1)).abs().max() > 1e-3
    plain = made(Dynamic, {"type": "dynamic", "keep": 3}, {"image": 8})
    mask = torch.tensor([[True] * 4 + [False] * 3])
    best = plain.scores(Tokens(x, mask)).topk(3).indices
    assert best.max() < 4
    with pytest.raises(ConfigError, match="keeps 3 patches of a unit, but its encoder gives 2"):
        plain.config.count(Count(2))


# ------------------------------------------------------------------------------------------------------------- mqt


def numpy_positions(width: int, side: int) -> Tensor:
    """The reference's table, derived anew: half for columns, half for rows, sines before cosines."""
    quarter = width // 4
    rows = []
    for row in range(side):
        for column in range(side):
            waves = []
            for place in (column, row):
                angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
                waves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(waves)
    return torch.tensor(rows, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("keys", ["content", "positions"])
@pytest.mark.parametrize("use", [1, 4, 9])
def test_mqt_is_its_formula(use: int, keys: str):
    values = {"type": "mqt", "queries": 9, "use": use, "heads": 2, "keys": keys}
    ours = made(MQT, values, {"image": 8}).double()
    x, table = noise(2, 9, 8, dtype=torch.float64), numpy_positions(8, 3)

    def norm(t: Tensor, by: Any) -> Tensor:
        return F.layer_norm(t, (8,), by.weight, by.bias, 1e-6)

    def linear(t: Tensor, by: Any) -> Tensor:
        return t @ by.weight.T + by.bias

    q = norm(ours.queries[:use] + table[:use], ours.query_norm).expand(2, -1, -1)
    k = norm(table.expand(2, -1, -1) if keys == "positions" else x + table, ours.key_norm)
    v = norm(x, ours.value_norm)
    mixed = attend(linear(q, ours.attn.q), linear(k, ours.attn.k), linear(v, ours.attn.v), 2)
    expected = linear(mixed, ours.attn.out) @ ours.proj
    torch.testing.assert_close(ours(Tokens(x, grid=(3, 3))).x, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_fewer_queries_are_the_first_of_all():
    whole = made(MQT, {"type": "mqt", "queries": 9, "heads": 2}, {"image": 8})
    x = Tokens(noise(2, 12, 8), grid=(3, 4))
    for use in (1, 2, 5):
        part = MQT(whole.config.edit(use=use), {"image": 8}, 10)
        part.load_state_dict(whole.state_dict())
        torch.testing.assert_close(part(x).x, whole(x).x[:, :use])
    resampled = MQT(whole.config.edit(positions="resampled"), {"image": 8}, 10)
    resampled.load_state_dict(whole.state_dict())
    square = Tokens(noise(2, 9, 8), grid=(3, 3))
    torch.testing.assert_close(resampled(square).x, whole(square).x)
    assert (resampled(x).x - whole(x).x).abs().max() > 1e-4


def test_mqt_refuses():
    for values, message in (
        ({"queries": 10}, "10 queries form no square; 9 would"),
        ({"queries": 9, "use": 10}, "use=10 is more than its 9 queries"),
    ):
        with pytest.raises(ConfigError, match=message):
            MQT.Config.parse({"type": "mqt", **values})
    with pytest.raises(ConfigError, match="divisible by 4, got 6"):
        MQT(MQT.Config(queries=9, heads=2), {"image": 6}, 10)


# ------------------------------------------------------------------------------------------------------------ levels


CLIPS = {"type": "hierarchical", "frame": BODY, "frame_queries": 3, "frames": 4, "clip": BODY, "queries": 2}


@torch.no_grad()
def test_clips_of_unequal_lengths_are_each_alone():
    ours = made(Hierarchical, CLIPS, {"image": 6})
    x = noise(6, 5, 6)
    together = ours(Tokens(x, runs=(1, 3, 2))).x
    assert together.shape == (3, 2, 10)
    for row, (start, stop) in enumerate([(0, 1), (1, 4), (4, 6)]):
        alone = ours(Tokens(x[start:stop], runs=(stop - start,))).x
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    turned = ours(Tokens(x[1:4].flip(0), runs=(3,))).x
    assert (turned[0] - together[1]).abs().max() > 1e-3, "the order of frames must matter"
    with pytest.raises(DataError, match="5 frames does not fit the 4 frame positions"):
        ours(Tokens(x, runs=(5, 1)))


def test_levels_are_two_query_transformers():
    """The published two levels, from transformers' Q-Formers: 12 layers crossing every second, 2 crossing each."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        ours = Hierarchical(Hierarchical.Config(), {"image": 1408}, 4096)
        kinds = [
            transformers.Blip2QFormerConfig(),
            transformers.Blip2QFormerConfig(num_hidden_layers=2, cross_attention_frequency=1, encoder_hidden_size=768),
        ]
        theirs = sum(p.numel() for c in kinds for p in transformers.Blip2QFormerModel(c).parameters())
    rest = 3 * 32 * 768 + 769 * 4096
    assert sum(p.numel() for p in ours.parameters()) == theirs + rest


def splice_of_clips() -> Any:
    vit = {"type": "vit", "image_size": 8, "patch": 4, "dim": 16, "depth": 1, "heads": 2, "mlp": 20}
    lm = {"type": "decoder", "vocab": 40, "dim": 16, "depth": 1, "heads": 2, "mlp": 20, "max_positions": 64}
    return Splice.Config.parse(
        {
            "encoders": {"image": vit},
            "connectors": {"video": CLIPS},
            "lm": lm,
            "media": {"video": {"encoders": ["image"], "connector": "video"}},
        }
    )


@torch.no_grad()
def test_a_clip_takes_its_queries_in_the_sequence():
    """However many frames: counted two, and a batch of unequal clips is each alone."""
    config = splice_of_clips()
    assert [config.count("video", Layout(n, (3, 8, 8))) for n in (1, 4)] == [2, 2]
    check_counts(config, {"video": (3, 8, 8)})
    model = randomise(build_model(config), 5)
    pixels = noise(4, 3, 8, 8)

    def batch(rows: list[tuple[int, int]]) -> Batch:
        ids = torch.tensor([[1, 0, 0, 2, 3]] * len(rows))
        media = MediaBatch(
            torch.cat([pixels[a:b] for a, b in rows]),
            [Layout(b - a, (3, 8, 8)) for a, b in rows],
            torch.cat([torch.tensor([1, 2]) + 5 * row for row in range(len(rows))]),
            [2] * len(rows),
            list(range(len(rows))),
        )
        places = torch.arange(5).expand(len(rows), -1)
        return Batch(
            ids, places, torch.ones_like(ids), torch.zeros_like(ids).bool(), {"video": media}, [str(r) for r in rows]
        )

    together = model(batch([(0, 1), (1, 4)]), logits="all").logits
    for row, clip in enumerate([(0, 1), (1, 4)]):
        alone = model(batch([clip]), logits="all").logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_multiscale_goes_from_coarse_to_fine():
    entry = registry.get("connector", "multiscale")
    ours = made(entry, {"type": "multiscale", "queries": 2, "strides": [2, 1], "body": BODY}, {"image": 6})
    x = noise(1, 16, 6)
    coarse = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (4, 4)), 2).flatten(2).transpose(1, 2)
    first = ours.levels[0](ours.queries[None], Tokens(coarse))
    expected = ours.proj(ours.levels[1](first, Tokens(x)))
    torch.testing.assert_close(ours(Tokens(x, grid=(4, 4))).x, expected)
    with pytest.raises(ConfigError, match="a map of 1x4 tokens is smaller than its stride 2"):
        ours.config.count(Count(4, (1, 4)))
    with pytest.raises(ConfigError, match="must fall from coarse to fine"):
        entry.Config.parse({"type": "multiscale", "strides": [1, 2]})
