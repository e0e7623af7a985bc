"""VLMo against its formulas, written out in float64 over tensors with the authors' names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.convert import maps_vlmo
from chiasm.convert.engine import export_tensors, load_weights
from chiasm.convert.io import Loaded
from chiasm.errors import CheckpointError, ConfigError, DataError
from chiasm.fusion.modality_experts import ModalityExperts
from chiasm.fusion.pair import Pictures, Words
from parity.formulas import Formulas, close, drawn, open_to

DIM, HEADS, DEPTH, MLP, VOCAB, SIDE, PATCH, FAR = 24, 3, 3, 40, 31, 3, 4, 9
N = SIDE * SIDE + 1
SIZES: dict[str, Any] = {
    "text_vocab": VOCAB,
    "text_positions": 8,
    "text_distance": FAR,
    "image_size": SIDE * PATCH,
    "patch": PATCH,
    "dim": DIM,
    "depth": DEPTH,
    "heads": HEADS,
    "mlp": MLP,
    "both_from": 2,
}
VECTORS = {"places": "vectors", "layer_scale": None}


class Theirs(Formulas):
    def row(self, i: int, j: int, texts: int) -> int:
        """The table's row for query ``i`` and key ``j``; words come first."""
        d = (2 * SIDE - 1) ** 2 + 3
        total = d + 2 * FAR + 2
        if i < texts and j < texts:
            if i == 0 or j == 0:
                return total - 1 if i == j else total - 2 if j == 0 else total - 3
            return (j - 1) - (i - 1) - (2 - FAR) + d + 2
        if i < texts or j < texts:
            return d if i < texts else d + 1
        p, q = i - texts, j - texts
        if p == 0 or q == 0:
            return d - 1 if p == q else d - 2 if q == 0 else d - 3
        (y, x), (v, u) = divmod(p - 1, SIDE), divmod(q - 1, SIDE)
        return (y - v + SIDE - 1) * (2 * SIDE - 1) + x - u + SIDE - 1

    def bias(self, layer: int, size: int, texts: int) -> Tensor | None:
        if "relative_position_bias_table" not in self.t:
            return None
        table = self.t["relative_position_bias_table"][:, layer * HEADS : (layer + 1) * HEADS]
        rows = [[table[self.row(i, j, texts)] for j in range(size)] for i in range(size)]
        return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)

    def text(self, ids: Tensor) -> Tensor:
        e = "text_embeddings."
        x = self.t[e + "word_embeddings.weight"][ids] + self.t[e + "token_type_embeddings.weight"][0]
        if "relative_position_bias_table" not in self.t:
            x = x + self.t[e + "position_embeddings.weight"][: ids.shape[1]]
        return self.norm(e + "LayerNorm", x, 1e-12) + self.t["token_type_embeddings.weight"][0]

    def image(self, pixels: Tensor, kind: int = 1) -> Tensor:
        x = self.patches("transformer.patch_embed.proj", pixels, PATCH)
        x = torch.cat((self.t["transformer.cls_token"].expand(len(x), -1, -1), x), 1)
        x = x + self.t["transformer.pos_embed"] if "transformer.pos_embed" in self.t else x
        return x + self.t["token_type_embeddings.weight"][kind]

    def block(self, i: int, x: Tensor, mask: Tensor, texts: int, route: str) -> Tensor:
        b = f"transformer.blocks.{i}."
        y = self.norm(b + "norm1", x, 1e-6)
        q, k, v = (y @ w.T for w in self.t[b + "attn.qkv.weight"].chunk(3))
        q, v = q + self.t[b + "attn.q_bias"], v + self.t[b + "attn.v_bias"]
        y = self.attend(q, k, v, HEADS, open_to(mask), self.bias(i, x.shape[1], texts))
        x = x + self.t.get(b + "gamma_1", torch.ones(DIM)) * self.linear(b + "attn.proj", y)

        def expert(kind: str, x: Tensor) -> Tensor:
            y = self.gelu(self.linear(f"{b}mlp_{kind}.fc1", self.norm(f"{b}norm2_{kind}", x, 1e-6)))
            return self.t.get(b + "gamma_2", torch.ones(DIM)) * self.linear(f"{b}mlp_{kind}.fc2", y)

        if route == "vl" and i < 2:
            return x + torch.cat((expert("text", x[:, :texts]), expert("imag", x[:, texts:])), 1)
        return x + expert(route, x)

    def run(self, x: Tensor, mask: Tensor, texts: int, route: str, upper: str = "") -> Tensor:
        """All blocks by a route; ``upper``: the route of the blocks from the third on."""
        for i in range(DEPTH):
            x = self.block(i, x, mask, texts, upper if upper and i >= 2 else route)
        return self.norm("transformer.norm", x, 1e-6)


def made(**options: Any) -> tuple[ModalityExperts, Theirs]:
    model = ModalityExperts(ModalityExperts.Config.parse(SIZES | options))
    head = "nlvr2_classifier" if options.get("images") == 2 else "vqa_classifier"
    rules = maps_vlmo.vlmo(DIM, "places" not in options, head)
    tensors = drawn(export_tensors(model.state_dict(), rules))
    if "places" not in options:
        tensors["text_embeddings.position_embeddings.weight"] = torch.randn(8, DIM)  # theirs has it and does not use it
    load_weights(model, Loaded("authors", tensors), rules)
    return model.eval(), Theirs(tensors)


def inputs() -> tuple[Words, Pictures]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(6) < torch.tensor([6, 4, 5]).unsqueeze(1)
    ids = torch.randint(4, VOCAB, (3, 6), generator=generator).masked_fill(~mask, 0)
    size = SIDE * PATCH
    return Words(ids, mask), Pictures(torch.randn(3, 3, size, size, generator=generator), [(size, size)] * 3)


def whole(words: Words) -> Tensor:
    return torch.cat((words.mask, torch.ones(3, N, dtype=torch.bool)), 1)


@pytest.mark.parametrize("options", [{}, VECTORS])
def test_three_routes(options: dict[str, Any]) -> None:
    model, theirs = made(**options, contrast=True, contrast_both=True)
    words, pictures = inputs()
    text, image, all_seen = theirs.text(words.ids), theirs.image(pictures.pixels), torch.ones(3, N, dtype=torch.bool)
    joint = model.joint(words, pictures)
    close(joint.hidden, theirs.run(torch.cat((text, image), 1), whole(words), 6, "vl"), whole(words))
    found, shared = model.text_states(words, both=True)
    close(found, theirs.run(text, words.mask, 6, "text"), words.mask)
    close(shared, theirs.run(text, words.mask, 6, "text", "vl"), words.mask)
    wanted = F.normalize(
        theirs.linear("itc_vl_text_proj.fc", theirs.run(text, words.mask, 6, "text", "vl")[:, 0]), dim=-1
    )
    close(model.vectors(shared, "text_both"), wanted)
    found, shared = model.image_states(pictures, both=True)
    close(found, theirs.run(image, all_seen, 0, "imag"))
    close(shared, theirs.run(image, all_seen, 0, "imag", "vl"))
    close(model.vectors(found, "image"), F.normalize(theirs.linear("itc_image_proj.fc", found[:, 0].double()), dim=-1))


def test_heads() -> None:
    model, theirs = made(tasks={"words": True, "match": True, "classes": 5})
    words, pictures = inputs()
    x = theirs.run(torch.cat((theirs.text(words.ids), theirs.image(pictures.pixels)), 1), whole(words), 6, "vl")
    pooled = torch.tanh(theirs.linear("pooler.dense", x[:, 0]))
    joint = model.joint(words, pictures)
    close(joint.pooled, pooled)
    close(model.match_logits(joint), theirs.linear("itm_score.fc", pooled))
    y = theirs.gelu(theirs.norm("vqa_classifier.1", theirs.linear("vqa_classifier.0", pooled), 1e-5))
    close(model.class_logits(words, [pictures]), theirs.linear("vqa_classifier.3", y))
    y = theirs.gelu(theirs.linear("mlm_score.transform.dense", x[:, :6]))
    y = theirs.linear("mlm_score.decoder", theirs.norm("mlm_score.transform.LayerNorm", y, 1e-12))
    close(model.word_head(joint.hidden[:, joint.words]), y + theirs.t["mlm_score.bias"], words.mask)


def test_pairs_of_pictures() -> None:
    model, theirs = made(images=2, kinds=3, tasks={"classes": 2})
    words, first = inputs()
    second = Pictures(first.pixels.flip(0, 3), first.sizes)
    pooled = []
    for kind, pictures in enumerate((first, second), 1):
        x = torch.cat((theirs.text(words.ids), theirs.image(pictures.pixels, kind)), 1)
        pooled.append(torch.tanh(theirs.linear("pooler.dense", theirs.run(x, whole(words), 6, "vl")[:, 0])))
    y = theirs.linear("nlvr2_classifier.0", torch.cat(pooled, 1))
    y = theirs.gelu(theirs.norm("nlvr2_classifier.1", y, 1e-5))
    close(model.class_logits(words, [first, second]), theirs.linear("nlvr2_classifier.3", y))


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({}, 175),
        ({"dim": 544, "depth": 24, "heads": 16, "mlp": 2176, "both_from": 21, **VECTORS}, 167),
        ({"dim": 1024, "depth": 24, "heads": 16, "mlp": 4096, "both_from": 21}, 562),
    ],
)
def test_published_sizes(options: dict[str, Any], millions: int) -> None:
    """The README counts without the pooling layer."""
    with torch.device("meta"):
        model = ModalityExperts(ModalityExperts.Config.parse(options))
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("pooler"))
    assert round(count / 1e6) == millions
    if model.config.places != "vectors":
        assert model.config.distances[1] == (2 * 14 - 1) ** 2 + 3 + 2 * 196 + 2


def test_a_table_carried_to_larger_pictures() -> None:
    """A plane that is a cubic in the spread distances is carried exactly; the last rows stay."""
    old, new = 5, 8
    at = maps_vlmo._spread(2 * old - 1, 2 * new - 1)
    assert np.allclose(at, -at[::-1]) and abs(at[-1] - (new - 1)) < 1e-3  # both ends meet
    plane = 0.01 * at[:, None] ** 3 - 0.2 * at[None, :] ** 2 + 0.3 * at[:, None] * at[None, :]
    table = torch.cat((torch.from_numpy(plane).reshape(-1, 1).float(), torch.arange(5.0)[:, None]))
    grid = np.arange(-(new - 1), new)
    wanted = 0.01 * grid[:, None] ** 3 - 0.2 * grid[None, :] ** 2 + 0.3 * grid[:, None] * grid[None, :]
    found = maps_vlmo.carried(table, old, new)
    assert torch.allclose(found[:-5, 0], torch.from_numpy(wanted).reshape(-1).float(), atol=1e-2)
    assert torch.equal(found[-5:], table[-5:])
    with pytest.raises(CheckpointError, match="holds no plane"):
        maps_vlmo.carried(table[:20], old, new)


def test_bad_input() -> None:
    model, _ = made()
    words, pictures = inputs()
    with pytest.raises(DataError, match=r"pictures of 16x16 pixels, the model's places are for 12 squared"):
        model.joint(words, Pictures(torch.zeros(3, 3, 16, 16), [(16, 16)] * 3))
    long = Words(torch.ones(3, FAR, dtype=torch.long), torch.ones(3, FAR, dtype=torch.bool))
    with pytest.raises(DataError, match="beyond the distances of 8 words"):
        model.joint(long, pictures)
    for options, message in (
        ({"both_from": 4}, "lies behind the 3 blocks"),
        ({"images": 2}, "need 3 modality vectors"),
        ({"contrast_both": True}, "contrast_both needs contrast"),
    ):
        with pytest.raises(ConfigError, match=message):
            ModalityExperts.Config.parse(SIZES | options)
