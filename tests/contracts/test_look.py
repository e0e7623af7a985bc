"""Where a model looks: a model whose attention is built by hand is seen to look where it must."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import chiasm
from chiasm import registry
from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.errors import ConfigError, DataError
from chiasm.fusion.merge import Frames, Spatial, SpatialUnpad
from chiasm.infer.heat import on_grid, paint, to_units, watched
from chiasm.infer.look import choose, look, read_answer, sloped
from chiasm.nn.cross_attention import CrossAttention
from chiasm.nn.masks import causal
from chiasm.nn.quant import Quantized
from chiasm.nn.watch import shares
from chiasm.presets.tiny import tiny
from chiasm.processing.view import View
from chiasm.report.inspection import walk
from chiasm.report.inspection_page import write_page
from chiasm.report.looking import ACROSS, CELL, GAP, LABEL, overlay, queries_of, sheet
from chiasm.types import Count, Layout, Tokens

SIZE, PATCH, DIM = 32, 4, 32
TOKENIZER = "src/chiasm/weights/tiny-lm"
WHOLE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "size": SIZE, "pad_color": (0, 0, 0)}


@registry.register("encoder", "test_redness")
class Redness(Encoder):
    """How red each patch is, and nothing else: so what is looked at can be known."""

    class Config(EncoderConfig):
        type: str = "test_redness"

        def count(self, shape: tuple[int, ...]) -> Count:
            side = shape[-1] // PATCH
            return Count(side * side, (side, side))

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.dim = config, 1
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tokens:
        """``[U, 3, S, S]`` → ``[U, N, 1]``."""
        red = F.avg_pool2d(inputs[:, :1] * (1 - inputs[:, 1:2]), PATCH)  # [U, 1, rows, columns]
        return Tokens(red.flatten(1).unsqueeze(-1), grid=tuple(red.shape[-2:]))


def seer(front: dict[str, Any], merge: dict[str, Any], connector: dict[str, Any] | None = None, **stream: Any):
    """A model that attends to what is red: its queries are constant, its keys are the redness that arrives."""
    lm = {"type": "decoder", "vocab": 1024, "dim": DIM, "depth": 2, "heads": 1, "mlp": 32, "max_positions": 2048}
    lm |= {"qkv_bias": True, "rope_theta": 1e30}
    fusion, gates = stream.pop("fusion", "splice"), stream.pop("gates", {})
    config = {
        "model": {
            "type": fusion,
            **gates,
            "encoders": {"image": {"type": "test_redness"}},
            "connectors": {"image": connector or {"type": "linear"}},
            "lm": lm,
            "media": {"image": {"merge": merge, **stream}},
        },
        "processing": {
            "template": {
                "type": "turns",
                "user_turn": {"prefix": "<|user|>"},
                "answer": {"prompt": "<|assistant|>", "end": "<|end|>"},
                "media_suffix": "",
            },
            "media": {"image": {"type": "image", "placeholder": "<image>", **WHOLE, **front}},
        },
    }
    torch.manual_seed(0)
    vlm = chiasm.build(config, tokenizer=TOKENIZER)
    model: Any = vlm.model
    with torch.no_grad():
        model.lm.embedding.weight[:, 0] = 0
        if model.newline is not None:
            model.newline[0] = 0
        linear = [m for m in model.connectors["image"].modules() if isinstance(m, nn.Linear)][-1]
        linear.weight.zero_()
        linear.bias.zero_()
        if fusion == "splice":
            linear.weight[0] = 4.0  # redness → channel 0
            linear.bias[1] = 1.0
        for layer in model.lm.layers:
            layer.attn.q_proj.weight.zero_()
            layer.attn.k_proj.weight.zero_()
            layer.attn.q_proj.bias.zero_()
            layer.attn.q_proj.bias[-1] = 20.0  # the slowest pair, which positions hardly turn
            layer.attn.k_proj.weight[-1, 0] = 20.0
            layer.attn.o_proj.weight[0].zero_()
            layer.mlp.down_proj.weight[0].zero_()
    return vlm.eval()


def picture(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Black, with a red box."""
    image = Image.new("RGB", size)
    image.paste((255, 0, 0), box)
    return image


def ask(*images: Image.Image) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]


def inside(heat, box: tuple[int, int, int, int], slack: float = 0) -> float:
    """The part of a map that lies in a box of pixels."""
    height, width = heat.size
    rows, columns = heat.values.shape
    x0, y0, x1, y1 = box
    y, x = (torch.arange(rows) + 0.5) * height / rows, (torch.arange(columns) + 0.5) * width / columns
    kept = ((y > y0 - slack) & (y < y1 + slack))[:, None] & ((x > x0 - slack) & (x < x1 + slack))
    return float(heat.values[kept].sum() / heat.values.sum())


TILING = {"pinpoints": ((64, 32), (32, 64), (64, 64)), "axes": "wh"}
WAYS = {
    "squashed": ({"fit": "squash"}, {"type": "flat"}, None, {}),
    "padded": ({"fit": "pad"}, {"type": "flat"}, None, {}),
    "cropped": ({"fit": "crop"}, {"type": "flat"}, None, {}),
    "tiles": ({"fit": "squash", "tiling": TILING}, {"type": "spatial"}, None, {}),
    "tiles, pooled": ({"fit": "squash", "tiling": TILING}, {"type": "spatial", "max_pool": 2}, None, {}),
    "tiles, unpad": ({"fit": "squash", "tiling": TILING}, {"type": "spatial_unpad"}, None, {}),
    "tiles, shrunk": ({"fit": "squash", "tiling": TILING}, {"type": "spatial_unpad", "max_tiles": 1}, None, {}),
    "pixel shuffle": ({"fit": "squash"}, {"type": "flat"}, {"type": "pixel_shuffle", "factor": 2, "bias": True}, {}),
    "tiles, pixel shuffle": (
        {"fit": "squash", "tiling": TILING},
        {"type": "spatial_unpad"},
        {"type": "pixel_shuffle", "factor": 2, "bias": True},
        {},
    ),
    "pool after": ({"fit": "squash"}, {"type": "flat"}, None, {"pool": {"mode": "average"}, "pool_at": "after"}),
    "pool before": ({"fit": "squash"}, {"type": "flat"}, None, {"pool": {"mode": "bilinear"}, "pool_at": "before"}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_it_looks_at_what_is_red(way: str, method: str):
    front, merge, connector, stream = WAYS[way]
    vlm = seer(front, merge, connector, **stream)
    box = (60, 10, 76, 26)
    found = vlm.look(ask(picture((120, 60), box)), "A red square.", word="square", method=method)
    (heat,) = found.heats
    assert found.method == method and heat.size == (60, 120) and heat.kind == "image"
    assert float(heat.values.sum()) > 0.9 * heat.share
    assert float(heat.values.sum()) <= heat.share + 1e-5
    if method == "attention":
        assert heat.share > 0.9  # nothing else is red
    cell = 120 / (SIZE / PATCH) * (2 if "p" in way.split()[0][:2] else 1)
    assert inside(heat, box, slack=2 * cell) > 0.95
    assert inside(heat, (0, 30, 120, 60)) < 0.35
    # the middle of the heat is the middle of the box
    rows, columns = heat.values.shape
    weights = heat.values / heat.values.sum()
    x = float((weights.sum(0) * (torch.arange(columns) + 0.5)).sum()) * 120 / columns
    y = float((weights.sum(1) * (torch.arange(rows) + 0.5)).sum()) * 60 / rows
    assert abs(x - 68) < 8 and abs(y - 18) < 8, (x, y)


def test_heat_moves_with_the_box_and_between_pictures():
    vlm = seer({"fit": "squash"}, {"type": "flat"})
    empty, red = picture((64, 64), (0, 0, 0, 0)), picture((64, 64), (40, 8, 56, 24))
    first, second = vlm.look(ask(empty, red), "A red square.").heats
    assert (first.index, second.index) == (0, 1)
    assert second.share > 0.9 > 0.1 > first.share
    assert inside(second, (40, 8, 56, 24)) > 0.99


def test_the_gradient_of_an_unused_tile_is_zero():
    """``base=False`` leaves the base tile out of the sequence: nothing can have looked at it."""
    vlm = seer({"fit": "squash", "tiling": TILING}, {"type": "spatial", "base": False})
    read = read_answer(vlm.processor, ask(picture((120, 60), (20, 10, 50, 40))), "A red square.")
    batch = vlm.processor.collate([read.sample])
    (units,) = sloped(vlm.model, batch, read, read.words[1])[0].units
    assert len(units) == 3 and float(units[0].abs().sum()) == 0
    assert float(units[1].sum()) > 0


def slots_of(merge, layout: Layout, unit: Count) -> Tensor:
    """Which vector (its number, 0: the newline) stands in each slot: the merge itself, run on numbers."""
    x = torch.arange(1, layout.units * unit.tokens + 1, dtype=torch.float32).view(layout.units, unit.tokens, 1)
    return merge(x, unit, layout, torch.zeros(1))[:, 0].long()


MERGES = [
    (SpatialUnpad(SpatialUnpad.Config()), Layout(5, (3, 32, 32), (2, 2), (60, 120))),
    (Spatial(Spatial.Config()), Layout(3, (3, 32, 32), (1, 2), (60, 120))),
    (Frames(Frames.Config(newline="grid")), Layout(2, (3, 32, 32), (0, 0), (32, 32))),
]


@pytest.mark.parametrize(("merge", "layout"), MERGES, ids=["unpad", "spatial", "frames"])
def test_every_slot_goes_back_to_the_vector_it_was_made_of(merge, layout: Layout):
    unit = Count(16, (4, 4))
    numbers = slots_of(merge, layout, unit)
    vlm = seer({"fit": "squash"}, {"type": "spatial_unpad"})  # any splice; its merge is replaced
    vlm.model.merges["image"] = merge
    heat = torch.rand(len(numbers), generator=torch.Generator().manual_seed(0))
    media = type("M", (), {"layouts": [layout], "counts": [len(numbers)], "owners": [0]})()
    named = {
        "image/projected": Tokens(torch.randn(layout.units, 16, 3), grid=(4, 4)),
        "image/features": Tokens(torch.randn(layout.units, 16, 2), grid=(4, 4)),
    }
    vlm.model.newline = nn.Parameter(torch.zeros(3))
    units = to_units(vlm.model, "image", media, named, [heat])
    expected = torch.zeros(layout.units * 16 + 1).index_add(0, numbers, heat)[1:]
    torch.testing.assert_close(units.flatten(), expected)


def test_shares_are_those_of_torch():
    """The weights that ``nn.MultiheadAttention`` reports, for the same matrices."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    ours = CrossAttention(24, 3)
    with torch.no_grad():
        for layer, weight, bias in zip(
            (ours.q, ours.k, ours.v), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True
        ):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias.normal_())
    x, source = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 4:] = False
    found: list[Tensor] = []
    with watched(ours, lambda asked, source, weights: found.append(weights)):
        ours(x, source, mask)
    ours(x, source, mask)  # afterwards nothing is watched
    expected = theirs(x, source, source, key_padding_mask=~mask[:, 0, 0], average_attn_weights=True)[1]
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("window", [None, 3])
def test_shares_of_a_decoder_are_what_it_attends_with(window: int | None):
    """With values that name the keys, attention's own output is the shares."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    segments, positions = torch.ones(1, 6, dtype=torch.long), torch.arange(6)[None]
    attend = causal(segments, positions, window=window)
    named = torch.eye(6).expand(1, 2, 6, 6)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    if window:
        visible &= torch.ones(6, 6, dtype=torch.bool).triu(1 - window)
    expected = F.scaled_dot_product_attention(
        q, k, named, attn_mask=attend.mask, is_causal=attend.causal, enable_gqa=True
    )
    torch.testing.assert_close(shares(q, k, visible), expected)


def test_a_decoder_tells_the_shares_that_transformers_tells():
    transformers = pytest.importorskip("transformers")
    from chiasm.lm.decoder import Decoder

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = Decoder(
        Decoder.Config(vocab=50, dim=32, depth=3, heads=4, kv_heads=2, mlp=48, max_positions=2048, norm_eps=1e-6)
    )
    state = theirs.state_dict()
    names = {
        "model.embed_tokens.weight": "embedding.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    renamed = {
        names.get(k)
        or k.removeprefix("model.")
        .replace("self_attn", "attn")
        .replace("input_layernorm", "attn_norm")
        .replace("post_attention_layernorm", "mlp_norm"): v * 5
        for k, v in state.items()
    }
    theirs.load_state_dict({k: v * 5 for k, v in state.items()})
    ours.load_state_dict(renamed)
    ids = torch.randint(0, 50, (1, 9))
    expected = theirs(ids, output_attentions=True).attentions
    rows = torch.tensor([4, 8])
    places, segments = torch.arange(9)[None], torch.ones(1, 9, dtype=torch.long)
    for last, layers in ((1, expected[2:]), (2, expected[1:]), (None, expected[2:])):
        found = ours.shares(ours.embed(ids), places, segments, rows, last)
        torch.testing.assert_close(found, torch.stack(layers).mean(0).mean(1)[:, rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_gated_blocks_look_at_the_last_picture(method: str):
    """Media beside the sequence: the positions that write a word look at them through cross-attention."""
    gates = {"placement": {"every": 1}, "blocks": {"heads": 1, "head_dim": 8, "gate_start": 1.0}}
    vlm = seer({"fit": "squash"}, {"type": "flat"}, {"type": "linear"}, fusion="cross_attention", gates=gates)
    with torch.no_grad():
        vlm.model.connectors["image"].proj.weight.fill_(4.0)
        vlm.model.connectors["image"].proj.bias.zero_()
        for block in vlm.model.cross:
            block.attn_norm.weight.zero_()
            block.attn_norm.bias.fill_(1.0)
            block.q.weight.fill_(0.3)
            block.k.weight.fill_(1.0)
    box = (48, 16, 64, 32)
    images = picture((64, 64), (0, 40, 16, 56)), picture((64, 64), box)
    first, second = vlm.look(ask(*images), "A red square.", word=1, method=method).heats
    assert inside(second, box) > 0.95
    if method == "attention":  # the blocks see the last picture only
        assert float(first.values.sum()) == 0 and second.share == pytest.approx(1.0)
    else:  # positions before it saw the first picture, and are attended to
        assert 0 < first.share < 0.01


@pytest.mark.parametrize("name", ["blip2-opt-2.7b", "blip2-flan-t5-xl"])
def test_language_models_of_transformers_tell_their_gradient(name: str):
    """A decoder, and an encoder-decoder whose answer stands on the decoder's side."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    vlm = chiasm.build(tiny(chiasm.preset(name), vocab=1024), tokenizer=TOKENIZER)
    first, second = (picture((64, 32), box) for box in ((0, 0, 20, 20), (40, 8, 60, 30)))
    found = [vlm.look(ask(image), "A red square.", word="red") for image in (first, second)]
    assert [look.method for look in found] == ["gradient", "gradient"] and found[0].word.text == "red"
    assert all(0.5 < float(look.heats[0].values.sum()) <= 1.0001 for look in found)  # the class vector has no place
    assert not torch.equal(found[0].heats[0].values, found[1].heats[0].values)
    with pytest.raises(ConfigError, match="gradient"):
        vlm.look(ask(first), "A red square.", method="attention")
    stages = {stage.name for stage in walk(vlm, ask(first), max_new_tokens=0).stages}
    assert {"image / queries", "logits"} <= stages


def test_query_attention_goes_on_to_the_patches():
    """Queries that look at one patch hand what they got to that patch."""
    connector = {"type": "qformer", "queries": 3, "dim": 16, "depth": 2, "heads": 2, "mlp": 16, "cross_every": 1}
    vlm = seer({"fit": "squash"}, {"type": "flat"}, connector)
    with torch.no_grad():
        for layer in vlm.model.connectors["image"].body.layers:
            layer.cross.q.weight.zero_()
            layer.cross.q.bias.fill_(3.0)
            layer.cross.k.weight.zero_()
            layer.cross.k.weight[:, 0] = 3.0  # keys are redness
    box = (48, 16, 64, 32)
    found = vlm.look(ask(picture((64, 64), box)), "A red square.", word=1)
    assert found.method == "attention"
    assert inside(found.heats[0], box) > 0.95


def test_inspect_shows_it(tmp_path: Path):
    connector = {"type": "qformer", "queries": 3, "dim": 16, "depth": 2, "heads": 2, "mlp": 16}
    vlm = seer({"fit": "squash"}, {"type": "flat"}, connector)
    vlm.generate = lambda *_, **__: "A red square."
    messages = ask(picture((64, 32), (48, 8, 64, 24)))
    found = walk(vlm, messages, looks=["red", None])
    assert [look.title for look in found.looks] == ["red", "the whole answer"]
    assert found.looks[0].picture.size == (64, 32) and "attention; picture 1: " in found.looks[0].note
    stage = next(stage for stage in found.stages if stage.name == "image / queries")
    assert stage.picture is not None and stage.picture.size == (5 * (CELL + GAP) - GAP, CELL + LABEL)
    page = write_page(found, tmp_path / "page.html").read_text()
    assert page.count("Where it looked") == 1 and "the whole answer" in page
    plain = seer({"fit": "squash"}, {"type": "flat"})
    assert not any(stage.name == "image / queries" for stage in walk(plain, messages, max_new_tokens=0).stages)


def test_each_query_has_its_own_map_of_a_sheet():
    """Picture, mean, and a cell for each query, whose brightest place is where it looks."""
    maps = torch.zeros(12, 3, 3)
    maps[torch.arange(12), torch.arange(12) % 3, torch.arange(12) // 4] = 1.0
    shown = sheet(Image.new("RGB", (30, 30), (0, 90, 0)), maps)
    across, down = 7, 2  # rows of one length, not 9 and 5
    assert across < ACROSS < 14
    assert shown.size == (across * (CELL + GAP) - GAP, down * (CELL + LABEL + GAP) - GAP)
    for number in range(12):
        row, column = divmod(number + 2, across)
        corner = column * (CELL + GAP), row * (CELL + LABEL + GAP) + LABEL
        bright = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if shown.getpixel((corner[0] + 28 * x + 14, corner[1] + 28 * y + 14))[0] > 150
        ]
        assert bright == [(number % 3, number // 4)]
    assert shown.getpixel((40, LABEL + 40)) == (0, 90, 0), "the picture itself comes first"


def test_a_conversation_shows_what_its_queries_look_at():
    """Two pictures, of which each kind's first is shown; a connector without queries shows nothing."""
    connector = {"type": "qformer", "queries": 3, "dim": 16, "depth": 2, "heads": 2, "mlp": 16}
    vlm = seer({"fit": "squash"}, {"type": "flat"}, connector)
    messages = ask(picture((64, 32), (48, 8, 64, 24)))
    found = queries_of(vlm, messages)
    assert list(found) == ["image"] and found["image"].size == (5 * (CELL + GAP) - GAP, CELL + LABEL)
    other = queries_of(vlm, ask(picture((64, 32), (0, 0, 16, 16))))
    assert found["image"].tobytes() != other["image"].tobytes()
    assert queries_of(seer({"fit": "squash"}, {"type": "flat"}), messages) == {}


def test_the_brightest_place_of_an_overlay_is_the_largest_value():
    values = torch.zeros(4, 4)
    values[1, 2] = 3.0
    shown = overlay(Image.new("RGB", (400, 200), (0, 120, 0)), values)
    assert shown.size == (320, 160)
    assert shown.getpixel((200, 60))[0] > 200 and shown.getpixel((10, 10))[0] < 40


def test_painting_keeps_the_sum_and_the_place():
    units = torch.zeros(1, 4, 4)
    units[0, 1, 3] = 1.0
    canvas = paint(units, [View(1 / 80, 1 / 40)], (40, 80))
    assert canvas.shape == (40, 80) or canvas.shape == (64, 128)
    torch.testing.assert_close(canvas.sum(), torch.tensor(1.0))
    rows, columns = canvas.nonzero(as_tuple=True)
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (10, 19, 60, 79)
    beyond = paint(units, [View(1 / 80, 1 / 40, left=-0.25)], (40, 80))  # that column now lies outside the picture
    assert float(beyond.sum()) == 0


def test_a_class_vector_has_no_place():
    heat = on_grid(torch.arange(10.0)[None], Tokens(torch.zeros(1, 10, 1)))
    assert heat.flatten().tolist() == [1.0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert on_grid(torch.zeros(1, 7), Tokens(torch.zeros(1, 7, 1))) is None


def test_words_have_their_own_characters_and_tokens():
    vlm = seer({"fit": "squash"}, {"type": "flat"})
    answer = "Ein  großes 🟥 Quadrat."
    read = read_answer(vlm.processor, ask(picture((32, 32), (0, 0, 9, 9))), answer)
    assert [answer[w.start : w.end] for w in read.words] == answer.split() == [w.text for w in read.words]
    ids = read.sample.input_ids
    for word in read.words:
        text = vlm.processor.decode(ids[list(word.positions)])
        assert word.text in text
    assert choose(read.words, "QUADRAT") == read.words[-1]
    assert choose(read.words, None).positions == tuple(p for w in read.words for p in w.positions)


def test_earlier_answers_are_not_taken_for_the_asked_one():
    vlm = seer({"fit": "squash"}, {"type": "flat"})
    turns = [
        *ask(picture((32, 32), (0, 0, 9, 9))),
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": "Sure?"},
    ]
    read = read_answer(vlm.processor, turns, "A circle.")
    assert len(read.words) == 2
    assert min(read.words[0].positions) > len(vlm.processor(turns, id="x", add_generation_prompt=True)) - 1


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_layers_give_gradients_and_run_in_several_threads(bits: int):
    """A server looks into a model whose engine is running it, with weights of few bits."""
    torch.manual_seed(0)
    layer = Quantized(torch.randn(96, 128), torch.randn(96), bits)
    x = torch.randn(5, 128, requires_grad=True)
    layer(x).square().sum().backward()
    wide = layer.widened()
    expected = torch.autograd.grad(F.linear(x, wide, layer.bias).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
    inputs = [torch.randn(n, 128) for n in (1, 40, 7, 200)]
    with torch.no_grad():
        alone = [layer(one) for one in inputs]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda i: torch.equal(layer(inputs[i % 4]), alone[i % 4]), range(200)))
    assert all(together)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"answer": "  "}, DataError, "empty"),
        ({"word": 9}, DataError, "words 0 to 2"),
        ({"word": "blue"}, DataError, "'blue'"),
        ({"method": "x"}, ConfigError, "'gradient'"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, DataError, "no picture"),
    ],
)
def test_bad_asking_is_one_clear_error(change: dict[str, Any], error: type[Exception], told: str):
    vlm = seer({"fit": "squash"}, {"type": "flat"})
    given = {"messages": ask(picture((32, 32), (0, 0, 9, 9))), "answer": "A red square."} | change
    with pytest.raises(error, match=told):
        look(vlm.model, vlm.processor, **given)
