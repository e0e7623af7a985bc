"""BEiT-3 against its formulas, written out here in float64 over tensors with the authors' names.

No library has the model. What stands here shares nothing with the package but the names of a checkpoint: every
expert is applied to its own positions by loops, attention is a softmax written out, norms are written out.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.convert import maps_multiway
from chiasm.convert.engine import export_tensors, load_weights
from chiasm.convert.io import Loaded
from chiasm.errors import ConfigError, DataError
from chiasm.fusion.multiway import Multiway
from chiasm.fusion.multiway_write import caption
from chiasm.fusion.pair import Pictures, Words

DIM, HEADS, DEPTH, MLP, VOCAB, SIDE, PATCH = 24, 3, 2, 40, 31, 4, 4
SIZES: dict[str, Any] = {
    "text_vocab": VOCAB,
    "text_positions": 12,
    "image_size": SIDE * PATCH,
    "patch": PATCH,
    "dim": DIM,
    "depth": DEPTH,
    "heads": HEADS,
    "mlp": MLP,
}
IMAGE = SIDE * SIDE + 1


class Formulas:
    """The published computation over a checkpoint's tensors, in float64."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.t = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.t[name + ".weight"].T
        return y + self.t[name + ".bias"] if name + ".bias" in self.t else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return scaled * self.t[name + ".weight"] + self.t[name + ".bias"]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def each(self, apply: Any, pattern: str, x: Tensor, split: int) -> Tensor:
        """``apply`` position by position, with expert A before ``split`` and B from there on."""
        rows = [apply(pattern.format("A" if s < split else "B"), x[:, s]) for s in range(x.shape[1])]
        return torch.stack(rows, 1)

    def input(self, pixels: Tensor | None, ids: Tensor | None, covered: Tensor | None = None) -> tuple[Tensor, int]:
        parts = []
        if pixels is not None:
            weight, bias = self.t["beit3.vision_embed.proj.weight"], self.t["beit3.vision_embed.proj.bias"]
            cut = pixels.double().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [B, 3, rows, columns, p, p]
            x = torch.einsum("bcrspq,dcpq->brsd", cut, weight).flatten(1, 2) + bias
            if covered is not None:
                x = torch.where(covered[..., None], self.t["beit3.vision_embed.mask_token"][0], x)
            first = self.t["beit3.vision_embed.cls_token"].expand(len(x), -1, -1)
            table = self.t["beit3.encoder.embed_positions.A.weight"]
            parts.append(torch.cat((first, x), 1) + table[2 : 2 + IMAGE])
        if ids is not None:
            table = self.t["beit3.encoder.embed_positions.B.weight"]
            parts.append(self.t["beit3.text_embed.weight"][ids] + table[2 : 2 + ids.shape[1]])
        return torch.cat(parts, 1), parts[0].shape[1] if pixels is not None else 0

    def run(self, x: Tensor, split: int, allowed: Tensor, last: bool = True) -> Tensor:
        """``allowed [B, S, S]``: who may look at whom."""
        for i in range(DEPTH):
            layer = f"beit3.encoder.layers.{i}."
            y = self.each(self.norm, layer + "self_attn_layer_norm.{}", x, split)
            q, k, v = (
                self.each(self.linear, layer + f"self_attn.{n}_proj." + "{}", y, split).unflatten(-1, (HEADS, -1))
                for n in "qkv"
            )
            scores = torch.einsum("bshd,bthd->bhst", q * (DIM // HEADS) ** -0.5, k)
            shares = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1)
            mixed = torch.einsum("bhst,bthd->bshd", shares, v).flatten(2)
            mixed = self.each(self.norm, layer + "self_attn.inner_attn_ln.{}", mixed, split)
            x = x + self.each(self.linear, layer + "self_attn.out_proj.{}", mixed, split)
            y = self.each(self.norm, layer + "final_layer_norm.{}", x, split)
            y = self.gelu(self.each(self.linear, layer + "ffn.{}.fc1", y, split))
            y = self.each(self.norm, layer + "ffn.{}.ffn_layernorm", y, split)
            x = x + self.each(self.linear, layer + "ffn.{}.fc2", y, split)
        return self.each(self.norm, "beit3.encoder.layer_norm.{}", x, split) if last else x


def made(**options: Any) -> tuple[Multiway, Formulas]:
    """Our model, and the formulas over the same random tensors under the authors' names."""
    model = Multiway(Multiway.Config.parse(SIZES | options))
    generator = torch.Generator().manual_seed(1)
    rules = maps_multiway.beit3(pairs=options.get("images", 1) == 2)
    names = export_tensors(model.state_dict(), rules)
    tensors = {
        name: (1 + torch.randn(t.shape, generator=generator) * 0.2)
        if "norm" in name.lower() or "_ln" in name
        else torch.randn(t.shape, generator=generator) * 0.3
        for name, t in names.items()
    }
    load_weights(model, Loaded("authors", tensors), rules)
    return model.eval(), Formulas(tensors)


def inputs() -> tuple[Words, Pictures]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(6) < torch.tensor([6, 4, 5]).unsqueeze(1)
    ids = torch.randint(4, VOCAB, (3, 6), generator=generator).masked_fill(~mask, 1)
    size = SIDE * PATCH
    return Words(ids, mask), Pictures(torch.randn(3, 3, size, size, generator=generator), [(size, size)] * 3)


def open_to(mask: Tensor) -> Tensor:
    """All may look at what is there."""
    return mask[:, None, :].expand(-1, mask.shape[1], -1)


def whole(words: Words) -> Tensor:
    return torch.cat((torch.ones(3, IMAGE, dtype=torch.bool), words.mask), 1)


def close(found: Tensor, wanted: Tensor, mask: Tensor | None = None) -> None:
    found, wanted = (found[mask], wanted[mask]) if mask is not None else (found, wanted)
    assert wanted.abs().max() > 0.1
    assert torch.allclose(found.double(), wanted, atol=1e-5, rtol=1e-5), float((found - wanted).abs().max())


def test_three_ways() -> None:
    model, formulas = made()
    words, pictures = inputs()
    mask = whole(words)
    x, split = formulas.input(pictures.pixels, words.ids)
    joint = model.joint(words, pictures)
    close(joint.hidden, formulas.run(x, split, open_to(mask)), mask)
    assert (joint.picture, joint.words) == (slice(0, IMAGE), slice(IMAGE, None))
    x, split = formulas.input(pictures.pixels, None)
    close(model.image_states(pictures), formulas.run(x, split, open_to(torch.ones(3, IMAGE, dtype=torch.bool))))
    x, split = formulas.input(None, words.ids)
    close(model.text_states(words), formulas.run(x, split, open_to(words.mask)), words.mask)


def test_captions_see_the_picture_and_the_words_before() -> None:
    model, formulas = made(tasks={"words": True})
    words, pictures = inputs()
    mask = whole(words)
    size = mask.shape[1]
    allowed = torch.zeros(3, size, size, dtype=torch.bool)
    for s in range(size):
        for t in range(size):
            allowed[:, s, t] = t < IMAGE or (s >= IMAGE and t <= s)
    x, split = formulas.input(pictures.pixels, words.ids)
    wanted = formulas.run(x, split, allowed & mask[:, None])
    joint = model.joint(words, pictures, causal=True)
    close(joint.hidden, wanted, mask)
    close(model.word_head(joint.hidden[:, joint.words]), formulas.linear("mlm_head", wanted[:, IMAGE:]), words.mask)


def test_hidden_patches() -> None:
    model, formulas = made()
    words, pictures = inputs()
    covered = torch.rand(3, IMAGE - 1, generator=torch.Generator().manual_seed(4)) < 0.4
    x, split = formulas.input(pictures.pixels, words.ids, covered)
    wanted = formulas.run(x, split, open_to(whole(words)))
    close(model.joint(words, pictures, covered=covered).hidden, wanted, whole(words))


def test_answers() -> None:
    model, formulas = made(tasks={"classes": 5}, last_norm=False)
    words, pictures = inputs()
    x, split = formulas.input(pictures.pixels, words.ids)
    x = formulas.run(x, split, open_to(whole(words)), last=False)
    pooled = torch.tanh(formulas.linear("pooler.dense", formulas.norm("pooler.norm", x[:, 0])))
    inner = formulas.gelu(formulas.norm("head.1", formulas.linear("head.0", pooled)))
    close(model.class_logits(words, [pictures]), formulas.linear("head.3", inner))


def test_pairs_of_pictures() -> None:
    model, formulas = made(tasks={"classes": 2}, images=2)
    words, first = inputs()
    second = Pictures(first.pixels.flip(0, 3), first.sizes)
    read = []
    for pictures in (first, second):
        x, split = formulas.input(pictures.pixels, words.ids)
        x = formulas.run(x, split, open_to(whole(words)))
        read += [x[:, 0], x[:, IMAGE]]
    y = formulas.linear("head.dense1", formulas.norm("head.norm1", torch.cat(read, 1)))
    wanted = formulas.linear("head.dense2", formulas.gelu(formulas.norm("head.norm2", y)))
    close(model.class_logits(words, [first, second]), wanted)


def test_cosines_and_classes_of_pictures() -> None:
    model, formulas = made(contrast=True)
    words, pictures = inputs()
    image = formulas.run(*formulas.input(pictures.pixels, None), open_to(torch.ones(3, IMAGE, dtype=torch.bool)))
    text = formulas.run(*formulas.input(None, words.ids), open_to(words.mask))
    close(model.image_vectors(pictures), F.normalize(formulas.linear("vision_head", image[:, 0]), dim=-1))
    close(model.text_vectors(words), F.normalize(formulas.linear("language_head", text[:, 0]), dim=-1))
    assert torch.allclose(model.scale(), model.logit_scale.exp())
    model, formulas = made(picture_classes=7, last_norm=False)
    open_picture = open_to(torch.ones(3, IMAGE, dtype=torch.bool))
    image = formulas.run(*formulas.input(pictures.pixels, None), open_picture, last=False)
    wanted = formulas.linear("head", formulas.norm("fc_norm", image[:, 1:].mean(1)))
    close(model.picture_logits(pictures), wanted)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 220_987_392),
        ({"tasks": {"words": True}}, 270_211_082),
        ({"dim": 1024, "depth": 24, "heads": 16, "mlp": 4096}, None),
    ],
)
def test_published_sizes(options: dict[str, Any], count: int | None) -> None:
    with torch.device("meta"):
        model = Multiway(Multiway.Config.parse(options))
    c = model.config
    if count is None:
        each = 2 * (4 * c.dim * (c.dim + 1) + 2 * c.dim * c.mlp + c.dim + c.mlp + 6 * c.dim + 2 * c.mlp)
        tables = c.dim * (64010 + 1024 + 199 + 2 + 768 + 1)
        count = 24 * each + tables + 4 * c.dim
    assert sum(p.numel() for p in model.parameters()) == count


def test_another_size_of_picture() -> None:
    """The table's rows from the fourth on are carried to the new grid, the class vector's row stays."""
    model, _ = made()
    size = 6 * PATCH
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))
    plane = model.image_positions[3:].T.reshape(1, DIM, SIDE, SIDE)
    moved = F.interpolate(plane, size=(6, 6), mode="bicubic", align_corners=False)[0].flatten(1).T
    x, _ = model.patch(pixels)
    wanted = torch.cat(((model.cls + model.image_positions[2])[None], x[0] + moved))
    assert torch.allclose(model.image_input(Pictures(pixels, [(size, size)]))[0], wanted, atol=1e-6)


def test_every_tensor_that_runs_has_a_gradient() -> None:
    model, _ = made(tasks={"words": True})
    words, pictures = inputs()
    covered = torch.zeros(3, IMAGE - 1, dtype=torch.bool)
    covered[:, 3] = True
    joint = model.joint(words, pictures, covered=covered)
    (model.word_head(joint.hidden[:, joint.words]).square().sum() + joint.hidden.square().sum()).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_bad_input() -> None:
    model, _ = made()
    _, pictures = inputs()
    long = Words(torch.ones(3, 11, dtype=torch.long), torch.ones(3, 11, dtype=torch.bool))
    with pytest.raises(DataError, match="11 tokens does not fit the 10 positions"):
        model.joint(long, pictures)
    with pytest.raises(ConfigError, match=r"no head for cosines; set model\.contrast"):
        model.image_vectors(pictures)
    with pytest.raises(ConfigError, match="matches by cosines"):
        Multiway.Config.parse(SIZES | {"tasks": {"match": True}})
    with pytest.raises(ConfigError, match="cannot be split into 5 heads"):
        Multiway.Config.parse(SIZES | {"heads": 5})


def test_captions_are_written_by_filling() -> None:
    """With one beam, the likeliest word at the hidden place each time; with all beams, the best caption of all."""
    model, formulas = made(tasks={"words": True})
    _, pictures = inputs()
    start, hidden, end = 0, 3, 2

    def shares(words: list[int], row: int) -> Tensor:
        ids = torch.tensor([[*words, hidden]])
        size = IMAGE + ids.shape[1]
        place = torch.arange(size)
        allowed = (place[None] < IMAGE) | ((place[None] <= place[:, None]) & (place[:, None] >= IMAGE))
        x, split = formulas.input(pictures.pixels[row : row + 1], ids)
        return formulas.linear("mlm_head", formulas.run(x, split, allowed[None]))[0, -1].log_softmax(-1)

    found = caption(model, pictures, start, hidden, end, longest=4, beams=1)
    for row in range(3):
        words = [start]
        while len(words) < 5 and words[-1] != end:
            words.append(int(shares(words, row).argmax()))
        assert found[row] == [w for w in words[1:] if w != end]
    best = caption(model, pictures, start, hidden, end, longest=2, beams=VOCAB**2, length_penalty=0.0)
    first = shares([start], 0)
    ended = {(): float(first[end])}
    for word in range(VOCAB):
        if word != end:
            ended[(word,)] = float(first[word]) + float(shares([start, word], 0)[end])
    assert tuple(best[0]) == max(ended, key=lambda k: ended[k])
