"""ALBEF against its formulas, written out in float64 over tensors with the authors' names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.convert import maps_albef
from chiasm.convert.engine import export_tensors, load_weights
from chiasm.convert.io import Loaded
from chiasm.encoders.vit import ViT
from chiasm.errors import ConfigError
from chiasm.fusion.albef import ALBEF
from chiasm.fusion.pair import Pictures, Words
from parity.formulas import Formulas, close, drawn, open_to

DIM, WIDE, HEADS, MLP, VOCAB, SIDE, PATCH, EMBED = 24, 16, 3, 40, 31, 2, 8, 10
VISION = ViT.Config(
    image_size=SIDE * PATCH, patch=PATCH, dim=WIDE, depth=2, heads=2, mlp=24, norm_eps=1e-6, select="cls_patch"
)
SIZES: dict[str, Any] = {
    "vision": VISION,
    "text_vocab": VOCAB,
    "text_positions": 12,
    "dim": DIM,
    "text_depth": 2,
    "fusion_depth": 2,
    "heads": HEADS,
    "mlp": MLP,
    "contrast": EMBED,
}
EPS = 1e-12


class Theirs(Formulas):
    def image(self, pixels: Tensor, mark: str = "") -> Tensor:
        p = f"visual_encoder{mark}."
        x = self.patches(p + "patch_embed.proj", pixels, PATCH)
        x = torch.cat((self.t[p + "cls_token"].expand(len(x), -1, -1), x), 1) + self.t[p + "pos_embed"]
        for i in range(2):
            b = f"{p}blocks.{i}."
            q, k, v = self.linear(b + "attn.qkv", self.norm(b + "norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(b + "attn.proj", self.attend(q, k, v, 2, None))
            y = self.gelu(self.linear(b + "mlp.fc1", self.norm(b + "norm2", x, 1e-6)))
            x = x + self.linear(b + "mlp.fc2", y)
        return self.norm(p + "norm", x, 1e-6)

    def words(self, prefix: str, ids: Tensor) -> Tensor:
        e = prefix + "embeddings."
        x = self.t[e + "word_embeddings.weight"][ids] + self.t[e + "position_embeddings.weight"][: ids.shape[1]]
        return self.norm(e + "LayerNorm", x + self.t[e + "token_type_embeddings.weight"][0], EPS)

    def layer(
        self, name: str, x: Tensor, allowed: Tensor, source: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        def look(kind: str, x: Tensor, other: Tensor, allowed: Tensor | None) -> Tensor:
            a = f"{name}.{kind}.self."
            q, k, v = self.linear(a + "query", x), self.linear(a + "key", other), self.linear(a + "value", other)
            y = self.linear(f"{name}.{kind}.output.dense", self.attend(q, k, v, HEADS, allowed))
            return self.norm(f"{name}.{kind}.output.LayerNorm", x + y, EPS)

        x = look("attention", x, x, allowed)
        if source is not None:
            x = look("crossattention", x, source, seen)
        y = self.linear(name + ".output.dense", self.gelu(self.linear(name + ".intermediate.dense", x)))
        return self.norm(name + ".output.LayerNorm", x + y, EPS)

    def text(self, words: Words, bert: str = "text_encoder.bert.") -> Tensor:
        x = self.words(bert, words.ids)
        for i in range(2):
            x = self.layer(f"{bert}encoder.layer.{i}", x, open_to(words.mask))
        return x

    def fuse(self, x: Tensor, mask: Tensor, images: list[Tensor], bert: str = "text_encoder.bert.") -> Tensor:
        for i in range(2 * len(images)):
            x = self.layer(f"{bert}encoder.layer.{2 + i}", x, open_to(mask), images[i % len(images)])
        return x

    def scores(self, head: str, table: str, x: Tensor) -> Tensor:
        y = self.norm(head + "transform.LayerNorm", self.gelu(self.linear(head + "transform.dense", x)), EPS)
        return y @ self.t[table].T + self.t[head + "bias"]

    def answer(self, ids: Tensor, question: Tensor, seen: Tensor) -> Tensor:
        bert = "text_decoder.bert."
        x = self.words(bert, ids)
        before = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().expand(len(ids), -1, -1)
        for i in range(2):
            x = self.layer(f"{bert}encoder.layer.{i}", x, before, question, open_to(seen, ids.shape[1]))
        return self.scores("text_decoder.cls.predictions.", bert + "embeddings.word_embeddings.weight", x)


def made(copies: bool = False, **options: Any) -> tuple[ALBEF, Theirs]:
    model = ALBEF(ALBEF.Config.parse(SIZES | options))
    rules = maps_albef.albef(WIDE, 2, 2 * options.get("images", 1), options.get("answer_depth", 0), copies)
    shapes = export_tensors(model.state_dict(), rules)
    shapes.pop("queue_ptr", None)
    tensors = drawn(shapes)
    if options.get("images") == 2:
        for name in [n for n in tensors if "crossattention.self.key" in n or "crossattention.self.value" in n]:
            layer = int(name.split(".")[4 if ".bert." in name else 3])
            if layer % 2 == 0:
                tensors[name] = tensors[name.replace(f"layer.{layer}.", f"layer.{layer + 1}.")]
    if "temp" in tensors:
        tensors["temp"] = torch.tensor(0.2)
    if "image_queue" in tensors:
        tensors["queue_ptr"] = torch.zeros(1, dtype=torch.long)
    for mark in ("text_encoder", "text_encoder_m", "text_decoder", "text_decoder_m"):
        if f"{mark}.cls.predictions.bias" in tensors:
            tensors[f"{mark}.cls.predictions.decoder.bias"] = tensors[f"{mark}.cls.predictions.bias"]
            tensors[f"{mark}.cls.predictions.decoder.weight"] = tensors[
                f"{mark}.bert.embeddings.word_embeddings.weight"
            ]
    load_weights(model, Loaded("authors", tensors), rules)
    return model.eval(), Theirs(tensors)


def inputs() -> tuple[Words, Pictures]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(6) < torch.tensor([6, 4, 5]).unsqueeze(1)
    ids = torch.randint(4, VOCAB, (3, 6), generator=generator).masked_fill(~mask, 0)
    size = SIDE * PATCH
    return Words(ids, mask), Pictures(torch.randn(3, 3, size, size, generator=generator), [(size, size)] * 3)


def test_towers_and_fusion() -> None:
    model, theirs = made(tasks={"words": True, "match": True})
    words, pictures = inputs()
    image, text = theirs.image(pictures.pixels), theirs.text(words)
    close(model.body.image_states(pictures), image)
    close(model.body.text_states(words), text, words.mask)
    close(
        model.body.image_vectors(model.body.image_states(pictures)),
        F.normalize(theirs.linear("vision_proj", image[:, 0])),
    )
    close(model.body.text_vectors(model.body.text_states(words)), F.normalize(theirs.linear("text_proj", text[:, 0])))
    fused = theirs.fuse(text, words.mask, [image])
    joint = model.joint(words, pictures)
    close(joint.hidden, fused, words.mask)
    close(model.match_logits(joint), theirs.linear("itm_head", fused[:, 0]))
    table = "text_encoder.bert.embeddings.word_embeddings.weight"
    close(model.word_head(joint.hidden), theirs.scores("text_encoder.cls.predictions.", table, fused), words.mask)
    assert torch.allclose(model.scale(), torch.tensor(5.0))


def test_pairs_of_pictures() -> None:
    model, theirs = made(images=2, contrast=None, tasks={"classes": 2})
    words, first = inputs()
    second = Pictures(first.pixels.flip(0, 3), first.sizes)
    images = [theirs.image(p.pixels) for p in (first, second)]
    fused = theirs.fuse(theirs.text(words), words.mask, images)
    wanted = theirs.linear("cls_head.2", theirs.linear("cls_head.0", fused[:, 0]).clamp(min=0))
    close(model.class_logits(words, [first, second]), wanted)
    layers: Any = model.body.fusion
    assert layers[0].cross.k is layers[1].cross.k and layers[0].cross.q is not layers[1].cross.q


def test_answers() -> None:
    model, theirs = made(contrast=None, answer_depth=2)
    words, pictures = inputs()
    question = theirs.fuse(theirs.text(words), words.mask, [theirs.image(pictures.pixels)])
    given = Words(torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2], [1, 5, 9, 2], [1, 8, 2, 0]]), torch.ones(4, 4).bool())
    given.mask[[0, 3], 3] = False
    close(model.answer_logits(words, [pictures], Words(given.ids[:3], given.mask[:3])),
          theirs.answer(given.ids[:3], question, words.mask), given.mask[:3])  # fmt: skip
    chosen, shares = model.rank_answers(words, [pictures], given, most=3)
    for b in range(3):
        start = theirs.answer(given.ids[:1, :1], question[b : b + 1], words.mask[b : b + 1])[0, 0].softmax(-1)
        firsts = start[given.ids[:, 1]]
        best = firsts.topk(3).indices.tolist()
        totals = {}
        for a in best:
            logits = theirs.answer(given.ids[a : a + 1], question[b : b + 1], words.mask[b : b + 1])[0].log_softmax(-1)
            tokens = given.ids[a, 1 : int(given.mask[a].sum())]
            totals[a] = float(firsts[a].log()) + sum(float(logits[i, t]) for i, t in enumerate(tokens.tolist()))
        order = sorted(totals, key=lambda a: -totals[a])
        assert chosen[b].tolist() == order
        wanted = torch.tensor([totals[a] for a in order], dtype=torch.float64).softmax(0)
        assert torch.allclose(shares[b].double(), wanted, atol=1e-5)


def test_the_follower_and_the_queues() -> None:
    model, theirs = made(copies=True, momentum={"rate": 0.9, "queue": 5}, tasks={"words": True, "match": True})
    words, pictures = inputs()
    assert model.follower is not None and not list(model.follower.parameters())
    close(model.follower.image_states(pictures), theirs.image(pictures.pixels, "_m"))
    text = theirs.text(words, "text_encoder_m.bert.")
    fused = theirs.fuse(text, words.mask, [theirs.image(pictures.pixels, "_m")], "text_encoder_m.bert.")
    states = model.follower.text_states(words)
    found = model.follower.fuse(states, words.mask, [model.follower.image_states(pictures)])
    close(found, fused, words.mask)
    table = "text_encoder_m.bert.embeddings.word_embeddings.weight"
    close(
        model.word_head(found, model.follower),
        theirs.scores("text_encoder_m.cls.predictions.", table, fused),
        words.mask,
    )
    close(model.image_queue, theirs.t["image_queue"].T)
    before = {name: buffer.clone() for name, buffer in model.follower.named_buffers()}
    model.follow()
    own = dict(model.body.named_parameters())
    for name, buffer in model.follower.named_buffers():
        assert torch.allclose(buffer, 0.9 * before[name] + 0.1 * own[name], atol=1e-6), name
    rows = torch.randn(3, EMBED), torch.randn(3, EMBED)
    old = model.text_queue.clone()
    model.enqueue(*rows)
    model.enqueue(*rows)  # 6 rows into 5 places: goes round
    assert int(model.queue_place) == 1
    assert torch.equal(model.image_queue, torch.stack([rows[0][i] for i in (2, 1, 2, 0, 1)]))
    assert not torch.equal(old, model.text_queue)
    assert {name.partition(".")[0] for name in model.moving()} == {
        "follower",
        "followed",
        "image_queue",
        "text_queue",
        "queue_place",
    }


def test_published_size() -> None:
    """The paper: 85.8 M for the tower, 123.7 M for the text model, which there has a pooling layer."""
    vision = ViT.Config(image_size=256, patch=16, select="cls_patch")
    with torch.device("meta"):
        model = ALBEF(ALBEF.Config(vision=vision))
    count = sum(p.numel() for p in model.body.vision.parameters())
    assert count == 85_844_736 and round(count / 1e6, 1) == 85.8
    text = sum(p.numel() for name in ("words", "text", "fusion") for p in getattr(model.body, name).parameters())
    assert round((text + 768 * 769) / 1e6, 1) == 123.7


def test_bad_configurations() -> None:
    for options, message in (
        ({"momentum": {}, "contrast": None}, "queues hold the vectors"),
        ({"tasks": {"rank": True}}, "ranks with its matching head"),
        ({"vision": VISION.edit(select="patch")}, "needs 'cls_patch'"),
        ({"images": 3}, "fusion layers for 3 pictures"),
    ):
        with pytest.raises(ConfigError, match=message):
            ALBEF.Config.parse(SIZES | options)
