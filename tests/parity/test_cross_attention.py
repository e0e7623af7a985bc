"""Cross-attention between the layers of a language model: OpenFlamingo's formulas, and what must hold of any of it.

OpenFlamingo has no class in transformers. Its whole forward pass is written out here in float64, position by position,
from the published formulas: resampler, which picture a position sees, gated blocks, and an MPT around them. Gates are
open (0.7 and -0.4), since at their start, 0, a comparison would see nothing.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.compose import build_model, check_counts
from chiasm.errors import ConfigError, DataError
from chiasm.fusion.cross_attention import CrossAttention, Placement
from chiasm.processing.collate import collate, pack
from chiasm.types import Batch, Layout, MediaItem, Sample

SHAPE = (3, 8, 8)
VIT = {"type": "vit", "image_size": 8, "patch": 4, "dim": 12, "depth": 1, "heads": 2, "mlp": 16}
RESAMPLER = {"type": "resampler", "queries": 3, "depth": 2, "heads": 2, "head_dim": 4, "project": False}
MPT = {
    **{"type": "gpt", "vocab": 40, "dim": 16, "depth": 5, "heads": 2, "mlp": 24, "positions": "alibi"},
    **{"bias": False, "tied": True, "max_positions": 96},
}
LLAMA = {"type": "decoder", "vocab": 40, "dim": 16, "depth": 5, "heads": 2, "mlp": 24, "max_positions": 96}
BLOCKS = {"heads": 2, "head_dim": 5}
IDEFICS = {
    **{"heads": 2, "head_dim": None, "mlp": 20, "gated_mlp": True, "activation": "silu", "norm": "rms"},
    **{"head_norm": True, "gate": "vector"},
}


def config(**changes: Any) -> CrossAttention.Config:
    values = {
        "encoders": {"image": VIT},
        "connectors": {"image": RESAMPLER},
        "lm": MPT,
        "placement": {"every": 2},
        "blocks": BLOCKS,
    }
    return CrossAttention.Config.parse(values | changes)


@torch.no_grad()
def made(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> CrossAttention:
    torch.manual_seed(0)
    model = build_model(config(**changes), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.copy_(
            0.25 * torch.randn(p.shape, generator=generator, dtype=torch.float64) + (p.ndim == 1 and "weight" in name)
        )
        if name.endswith("attn_gate"):
            p.fill_(0.7)
        if name.endswith("mlp_gate"):
            p.fill_(-0.4)
    return model.eval()


def sample(name: str, parts: list[Any], dtype: torch.dtype = torch.float64, learned: int = 0) -> Sample:
    """Ids, and pictures as seeds in a set; a picture takes one id, 1."""
    ids, media = [], []
    for part in parts:
        if isinstance(part, set):
            picture = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(*part), dtype=torch.float64)
            media.append(
                MediaItem("image", picture.to(dtype), Layout(1, SHAPE, original=(8, 8)), torch.tensor([len(ids)]))
            )
        ids.append(1 if isinstance(part, set) else part)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[len(ids) - learned :] = learned > 0
    return Sample(name, torch.tensor(ids), mask, media)


TALKS: dict[str, list[Any]] = {
    "one": [{7}, 5, 9, 12],
    "late": [4, 8, 30, {3}, 6, 11],
    "shots": [{1}, 5, 6, 7, {2}, 8, 9, {3}, 10],
    "neighbours": [4, {5}, {6}, 13, 14],
    "none": [22, 23, 24],
}

# ------------------------------------------------------------------------------------------- OpenFlamingo, written out


def layer_norm(x: Tensor, module: Any) -> Tensor:
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * module.weight
    return y if module.bias is None else y + module.bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query ``[H, d]`` over keys and values ``[L, H, d]``."""
    out = []
    for head in range(len(q)):
        scores = torch.stack([q[head] @ k[i, head] for i in range(len(k))]) / math.sqrt(q.shape[-1])
        weights = scores.exp() / scores.exp().sum()
        out.append(sum(weights[i] * v[i, head] for i in range(len(k))))
    return torch.cat(out)


def resampled(features: Tensor, connector: Any) -> Tensor:
    """Patches ``[N, D]`` of one picture → latents ``[K, D]``."""
    latents = connector.latents
    for layer in connector.layers:
        x, own = layer_norm(features, layer.context_norm), layer_norm(latents, layer.latents_norm)
        both = torch.cat([x, own])
        q, k, v = own @ layer.attn.q.weight.T, both @ layer.attn.k.weight.T, both @ layer.attn.v.weight.T
        q, k, v = (t.view(len(t), 2, 4) for t in (q, k, v))
        latents = latents + torch.stack([attend(row, k, v) for row in q]) @ layer.attn.out.weight.T
        inner = gelu(layer_norm(latents, layer.mlp_norm) @ layer.fc1.weight.T)
        latents = latents + inner @ layer.fc2.weight.T
    return layer_norm(latents, connector.norm)


def gated_block(x: Tensor, pictures: list[Tensor], seen: list[list[int]], block: Any) -> Tensor:
    """``x [T, D]``; ``seen[t]`` numbers the pictures that position ``t`` looks at."""
    rows = []
    for t, row in enumerate(x):
        found = torch.zeros_like(row)
        if seen[t]:
            media = torch.cat([pictures[i] for i in seen[t]])
            q = (layer_norm(row, block.attn_norm) @ block.q.weight.T).view(2, 5)
            k, v = ((media @ m.weight.T).view(len(media), 2, 5) for m in (block.k, block.v))
            found = attend(q, k, v) @ block.out.weight.T
        row = row + math.tanh(0.7) * found
        inner = gelu(layer_norm(row, block.mlp_norm) @ block.mlp.fc1.weight.T)
        rows.append(row + math.tanh(-0.4) * (inner @ block.mlp.fc2.weight.T))
    return torch.stack(rows)


def mpt_layer(x: Tensor, layer: Any) -> Tensor:
    y = layer_norm(x, layer.attn_norm)
    q, k, v = ((y @ m.weight.T).view(len(x), 2, 8) for m in (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj))
    mixed = torch.zeros(len(x), 2, 8, dtype=x.dtype)
    for head, slope in enumerate((2.0**-4, 2.0**-8)):
        for t in range(len(x)):
            scores = torch.stack([q[t, head] @ k[s, head] / math.sqrt(8) - slope * (t - s) for s in range(t + 1)])
            mixed[t, head] = scores.softmax(0) @ v[: t + 1, head]
    x = x + mixed.flatten(1) @ layer.attn.o_proj.weight.T
    return x + gelu(layer_norm(x, layer.mlp_norm) @ layer.mlp.up_proj.weight.T) @ layer.mlp.down_proj.weight.T


def openflamingo(model: Any, parts: list[Any], attend_to: str) -> Tensor:
    """Logits ``[T, V]`` of one conversation. Blocks stand before layers whose number plus one divides by 2."""
    pictures, seen, number = [], [], 0
    for part in parts:
        if isinstance(part, set):
            pixels = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(*part), dtype=torch.float64)
            pictures.append(resampled(model.encoders["image"](pixels).x[0], model.connectors["image"]))
            number += 1
        seen.append(list(range(number))[-1 if attend_to == "last" else 0 :] if number else [])
    x = model.lm.embedding.weight[torch.tensor([1 if isinstance(p, set) else p for p in parts])]
    block = 0
    for index, layer in enumerate(model.lm.layers):
        if (index + 1) % 2 == 0:
            x = gated_block(x, pictures, seen, model.cross[block])
            block += 1
        x = mpt_layer(x, layer)
    assert block == len(model.cross) == 2
    return layer_norm(x, model.lm.norm) @ model.lm.embedding.weight.T


@torch.no_grad()
@pytest.mark.parametrize("attend_to", ["last", "all"])
@pytest.mark.parametrize("talk", TALKS)
def test_openflamingo_is_the_published_formula(talk: str, attend_to: str):
    model = made(attend=attend_to)
    found = model(collate([sample(talk, TALKS[talk])], 0), logits="all").logits[0]
    torch.testing.assert_close(found, openflamingo(model, TALKS[talk], attend_to), atol=1e-7, rtol=1e-7)


# -------------------------------------------------------------------------------------------------- what must hold

WAYS: dict[str, dict[str, Any]] = {
    "openflamingo": {},
    "all": {"attend": "all"},
    "idefics": {"lm": LLAMA, "blocks": IDEFICS, "placement": {"every": 2, "rule": "before_first"}},
    "listed": {
        "lm": LLAMA,
        "placement": {"layers": (1, 4, 5)},
        "blocks": BLOCKS | {"silent": "block"},
        "attend": "all",
    },
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_padded_and_packed_are_alone(way: str):
    model = made(**WAYS[way])
    samples = [sample(name, parts) for name, parts in TALKS.items()]
    alone = [model(collate([s], 0), logits="all").logits[0] for s in samples]
    for batch in (collate(samples, 0), collate(samples, 0, "left")):
        found = model(batch, logits="all").logits
        for row, expected in enumerate(alone):
            torch.testing.assert_close(found[row][batch.segment_ids[row] != 0], expected, atol=1e-9, rtol=1e-9)
    packed = pack(samples, 40)
    assert len(packed.input_ids) == 1
    twice = pack(samples, 15)
    assert len(twice.input_ids) > 1
    for batch in (packed, twice):
        found = model(batch, logits="all").logits
        where = {tuple(s.input_ids.tolist()): e for s, e in zip(samples, alone, strict=True)}
        for row, segments in enumerate(batch.segment_ids):
            for segment in segments.unique()[segments.unique() != 0]:
                ids = batch.input_ids[row][segments == segment]
                expected = where[tuple(ids.tolist())]
                if sum(tuple(s.input_ids.tolist()) == tuple(ids.tolist()) for s in samples) == 1:
                    torch.testing.assert_close(found[row][segments == segment], expected, atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_text_before_a_picture_does_not_see_it(way: str):
    """Also in the mode in which OpenFlamingo leaks (its F1): all-masked rows there look at every later picture."""
    model = made(**WAYS[way])
    before = model(collate([sample("a", [4, 8, 30, {3}, 6])], 0), logits="all").logits[0]
    after = model(collate([sample("a", [4, 8, 30, {9}, 6])], 0), logits="all").logits[0]
    assert torch.equal(before[:3], after[:3]) and (before[3:] - after[3:]).abs().max() > 1e-3


@torch.no_grad()
def test_which_picture_is_seen():
    parts = [{1}, 5, {2}, 6]
    for attend_to, sees_first in (("last", False), ("all", True)):
        model = made(
            attend=attend_to, placement={"layers": (4,)}
        )  # one block, late: the layers before it carry nothing
        before = model(collate([sample("a", parts)], 0), logits="all").logits[0]
        after = model(collate([sample("a", [{8}, *parts[1:]])], 0), logits="all").logits[0]
        moved = (before - after).abs().amax(-1) > 1e-6
        assert moved.tolist()[:2] == [True, True]  # a placeholder sees its own picture
        # the layer after the block still carries the first picture from the first positions to the last ones
        blind = made(attend=attend_to, placement={"layers": (5,)})
        before, after = (blind(collate([sample("a", [p, *parts[1:]])], 0), logits="all").logits[0] for p in ({1}, {8}))
        assert ((before - after).abs().amax(-1) > 1e-6).tolist() == [True, True, sees_first, sees_first]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_without_media(way: str):
    """Attention gives exactly 0: what is left is the perceptron, and in mode 'block' the language model itself."""
    model = made(**WAYS[way])
    batch = collate([sample("none", TALKS["none"])], 0)
    found = model(batch, logits="all").logits
    bare = model.lm.head(model.lm(model.splice(batch, {}), batch.positions, batch.segment_ids))
    if model.config.blocks.silent == "block":
        assert torch.equal(found, bare)
    else:
        assert (found - bare).abs().max() > 1e-4
        for block in model.cross:
            block.attn_gate.fill_(9.0)
        assert torch.equal(model(batch, logits="all").logits, found)
    for block in model.cross:  # shut, as they start: the language model alone, pictures or not
        block.attn_gate.zero_()
        block.mlp_gate.zero_()
    batch = collate([sample("shots", TALKS["shots"])], 0)
    bare = model.lm.head(model.lm(model.splice(batch, {}), batch.positions, batch.segment_ids))
    assert torch.equal(model(batch, logits="all").logits, bare)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_cached_is_uncached(way: str):
    """Keys and values of media are computed once; rows may leave or be repeated; new media may come later."""
    model = made(**WAYS[way])
    samples = [sample(name, parts) for name, parts in TALKS.items()]
    whole = collate(samples, 0, "left")
    cache = model.new_cache(len(samples), 12)
    calls: list[int] = []
    hook = model.encoders["image"].register_forward_hook(lambda *_: calls.append(1))
    first = model(whole, logits="last", cache=cache).logits
    torch.testing.assert_close(first, model(whole, logits="last").logits, atol=1e-9, rtol=1e-9)
    rows = torch.tensor([2, 0, 2, 4])
    cache.reorder(rows)
    positions = (whole.segment_ids != 0).sum(1)[rows].unsqueeze(1)
    calls.clear()
    for step, token in enumerate((17, 18)):
        ids = torch.full((4, 1), token)
        found = model.step(ids, positions + step, torch.ones(4, 1, dtype=torch.long), cache)
    assert not calls, "media are encoded once"
    hook.remove()
    longer = [sample(n, [*TALKS[n], 17, 18]) for n in ("shots", "one", "shots", "none")]
    expected = torch.stack([model(collate([s], 0), logits="last").logits[0] for s in longer])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    # a conversation that goes on with a new picture, on the cache of what was said
    parts = TALKS["shots"]
    cache = model.new_cache(1, 12)
    model(collate([sample("a", parts[:4])], 0), logits="last", cache=cache)
    rest = collate([sample("b", parts[4:])], 0)
    rest.positions += 4
    found = model(rest, logits="all", cache=cache).logits[0]
    expected = model(collate([sample("a", parts)], 0), logits="all").logits[0, 4:]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


# -------------------------------------------------------------------------------------------------- training


def test_first_step_moves_gates_only():
    """Shut gates: the weights behind them have a gradient of exactly 0, and nothing but the gates can move."""
    torch.manual_seed(1)
    model = build_model(config())
    batch = collate([sample("one", TALKS["one"], torch.float32, learned=2)], 0)
    output = model(batch, logits="labels")
    torch.nn.functional.cross_entropy(output.logits, output.targets).backward()
    for name, p in model.cross.named_parameters():
        moves = p.grad.abs().max() > 0
        assert moves == name.endswith("gate"), name
    assert model.connectors["image"].latents.grad.abs().max() == 0
    assert model.cross[0].attn_gate.item() == 0


def test_gradients_reach_every_part_and_only_the_seen_pictures():
    model = made(dtype=torch.float32)
    batch = collate([sample("shots", TALKS["shots"], torch.float32, learned=1)], 0)
    batch.media["image"].inputs.requires_grad_()
    output = model(batch, logits="labels")
    torch.nn.functional.cross_entropy(output.logits, output.targets).backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == {f"encoders.image.{n}" for n in model.encoders["image"].unused()}
    for p in model.encoders.parameters():
        p.requires_grad_(False)
    for p in model.lm.parameters():
        p.requires_grad_(False)
    model.zero_grad()
    output = model(collate([sample("shots", TALKS["shots"], torch.float32, learned=1)], 0), logits="labels")
    torch.nn.functional.cross_entropy(output.logits, output.targets).backward()
    having = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert having == {"connectors", "cross"}


def test_recomputed_blocks_give_the_same_gradients():
    grads = []
    for again in (False, True):
        model = made(dtype=torch.float32)
        model.lm.recompute = again
        output = model(collate([sample("shots", TALKS["shots"], torch.float32, learned=3)], 0), logits="labels")
        torch.nn.functional.cross_entropy(output.logits, output.targets).backward()
        grads.append([p.grad for p in model.cross.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_a_medium_without_a_slot_runs_and_is_not_seen():
    """What sharded training gives a rank that has no picture while others do."""
    from chiasm.train.shard import forms, nowhere

    model = made()
    batch = collate([sample("none", TALKS["none"])], 0)
    expected = model(batch, logits="all").logits
    media = collate([sample("one", TALKS["one"])], 0).media["image"]
    batch.media = {"image": nowhere(forms(media)[SHAPE])}
    batch.media["image"].inputs = batch.media["image"].inputs.double()
    calls: list[int] = []
    model.encoders["image"].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model(batch, logits="all").logits, expected) and calls


@torch.no_grad()
def test_pictures_and_clips_in_one_row():
    """Media of two kinds are numbered by where they stand, whatever order a batch holds them in."""
    streams = {"image": {}, "video": {"merge": {"type": "frames"}}}
    model = made(media=streams, attend="last", placement={"layers": (5,)})
    assert model.config.vectors("video", Layout(2, SHAPE)) == 7 and model.config.count("video", Layout(2, SHAPE)) == 1
    picture, clip = torch.randn(1, *SHAPE).double(), torch.randn(2, *SHAPE).double()
    ids = torch.tensor([1, 5, 1, 6])

    def run(clip: Tensor, picture: Tensor) -> Tensor:
        video = MediaItem("video", clip, Layout(2, SHAPE), torch.tensor([0]))
        image = MediaItem("image", picture, Layout(1, SHAPE), torch.tensor([2]))
        return model(collate([Sample("a", ids, torch.zeros(4).bool(), [image, video])], 0), logits="all").logits[0]

    before = run(clip, picture)
    assert ((run(clip.flip(0) + 1, picture) - before).abs().amax(-1) > 1e-6).tolist() == [True, True, False, False]
    assert ((run(clip, picture + 1) - before).abs().amax(-1) > 1e-6).tolist() == [False, False, True, True]


# -------------------------------------------------------------------------------------------------- configuration


def test_placement():
    assert Placement(every=4).places(32) == (3, 7, 11, 15, 19, 23, 27, 31)  # OpenFlamingo-9B
    assert Placement(every=4, rule="before_first").places(32) == (0, 4, 8, 12, 16, 20, 24, 28)  # Idefics-9B
    assert Placement(every=4, rule="after").places(9) == (4, 8) and Placement(every=3, rule="after").places(6) == (3, 6)
    assert Placement(layers=(3, 8, 13)).places(40) == (3, 8, 13)
    for values, message in (
        ({"layers": (3, 3)}, "each once, in their order"),
        ({"layers": ()}, "must name layers"),
    ):
        with pytest.raises(ConfigError, match=message):
            Placement.parse(values)
    with pytest.raises(ConfigError, match="has layers 0 to 5"):
        made(placement={"layers": (2, 6)})
    with pytest.raises(ConfigError, match="every 6 layers is more than the 5"):
        made(placement={"every": 6})


def test_counts_and_sizes():
    check_counts(config(), {"image": SHAPE})
    c = config()
    assert c.count("image", Layout(1, SHAPE)) == 1 and c.vectors("image", Layout(1, SHAPE)) == 3
    wide = made(width=20, connectors={"image": RESAMPLER | {"project": True}})
    assert wide.cross[0].k.in_features == 20 and wide.connectors["image"].proj.out_features == 20
    with torch.device("meta"):
        block = CrossAttention.Config.parse(config().dump() | {"blocks": {}})
        from chiasm.fusion.gated import GatedBlock

        published = GatedBlock(block.blocks, 4096, 1024)
    assert sum(p.numel() for p in published.parameters()) == 139_476_994  # of OpenFlamingo-9B, each


def test_what_is_refused():
    lm = {"type": "hf", "config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40}}
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="lm 'hf' has no place for cross-attention"):
        made(lm=lm)
    with pytest.raises(ConfigError, match="width 16 cannot be split into 3 heads"):
        made(blocks={"heads": 3, "head_dim": None})
    model = made()
    batch: Batch = collate([sample("x1", TALKS["one"])], 0)
    batch.media["image"].slots = torch.tensor([0, 1, 2])
    with pytest.raises(DataError, match="sample 'x1': 1 media of kind image take 3 tokens, one each was expected"):
        model(batch)
