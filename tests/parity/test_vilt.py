"""ViLT against transformers: states, pooled vectors, and logits and losses of each class with a head; gradients.

transformers permutes the patches of a picture (``torch.multinomial`` without replacement) and fills up smaller pictures
with masked patches: the tests draw the same permutation again and compare patch by patch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.convert import maps_vilt
from chiasm.convert.engine import load_weights
from chiasm.convert.io import Loaded
from chiasm.errors import ConfigError, DataError
from chiasm.fusion.pair import Pictures, Words, pictures_of, words_of
from chiasm.fusion.single_stream import SingleStream
from chiasm.types import Batch, Layout, MediaBatch
from parity.weights import randomise

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
THEIRS = SIZES | {"vocab_size": 50, "image_size": 64, "patch_size": 16, "max_position_embeddings": 12}
OURS = {"text_vocab": 50, "text_positions": 12, "dim": 32, "depth": 2, "heads": 2, "mlp": 64, "image_size": 64}
EPS = {"norm_eps": 1e-6, "text_eps": 1e-6}
SHAPES = [(64, 64), (48, 96), (96, 32)]  # (height, width) in pixels; patches of 16


def theirs(kind: str, **options: Any) -> Any:
    config = transformers.ViltConfig(**THEIRS, layer_norm_eps=1e-6, **options)
    return randomise(getattr(transformers, kind)(config))


def ours(model: Any, prefix: str = "vilt.", **options: Any) -> SingleStream:
    made = SingleStream(SingleStream.Config.parse(OURS | EPS | {"patch": 16} | options))
    state = dict(model.state_dict())
    load_weights(made, Loaded("theirs", state), [*maps_vilt.word_bias(state), *maps_vilt.hf(prefix)])
    return made.eval()


def texts(count: int = 3) -> Words:
    ids = torch.randint(1, 50, (count, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(7) < torch.tensor([7, 5, 6, 4][:count]).unsqueeze(1)
    return Words(ids.masked_fill(~mask, 0), mask)


def pictures(shapes: list[tuple[int, int]] = SHAPES, seed: int = 4) -> Pictures:
    generator = torch.Generator().manual_seed(seed)
    height, width = max(h for h, _ in shapes), max(w for _, w in shapes)
    pixels = torch.zeros(len(shapes), 3, height, width)
    for row, (h, w) in enumerate(shapes):
        pixels[row, :, :h, :w] = torch.randn(3, h, w, generator=generator)
    return Pictures(pixels, shapes)


def given(words: Words, images: Pictures) -> dict[str, Tensor]:
    mask = torch.zeros(len(images.pixels), *images.pixels.shape[-2:], dtype=torch.long)
    for row, (h, w) in enumerate(images.sizes):
        mask[row, :h, :w] = 1
    return {
        "input_ids": words.ids,
        "attention_mask": words.mask.long(),
        "pixel_values": images.pixels,
        "pixel_mask": mask,
    }


def order(images: Pictures, seed: int) -> list[Tensor]:
    """Which of a picture's patches stands in each place of transformers' sequence, drawn as its code draws."""
    torch.manual_seed(seed)
    counts = [(h // 16) * (w // 16) for h, w in images.sizes]
    rows, columns = images.pixels.shape[-2] // 16, images.pixels.shape[-1] // 16
    found = []
    for count in counts:
        missing = max(counts) - count
        if missing <= 0:
            found.append(torch.multinomial(torch.ones(count), max(counts)))
        else:
            torch.multinomial(torch.ones(rows * columns - count), missing, replacement=True)
            found.append(torch.arange(count))
    return found


def test_states_and_pooled() -> None:
    reference = theirs("ViltModel")
    model = ours(reference, "")
    words, images = texts(), pictures()
    torch.manual_seed(11)
    with torch.no_grad():
        wanted = reference(**given(words, images))
        found = model.joint(words, images)
    assert torch.allclose(found.pooled, wanted.pooler_output, atol=1e-5)
    length = words.ids.shape[1]
    for row, places in enumerate(order(images, 11)):
        text = words.mask[row]
        assert torch.allclose(found.hidden[row, :length][text], wanted.last_hidden_state[row, :length][text], atol=1e-5)
        image, other = found.hidden[row, length:], wanted.last_hidden_state[row, length:]
        assert torch.allclose(image[0], other[0], atol=1e-5)  # class vector of the picture
        assert torch.allclose(image[1:][places], other[1 : 1 + len(places)], atol=1e-5)
        assert int(found.mask[row, length:].sum()) == 1 + len(places)


def test_masked_words() -> None:
    reference = theirs("ViltForMaskedLM")
    model = ours(reference, tasks={"words": True}, tied=True)
    words, images = texts(), pictures()
    labels = torch.where((torch.rand(words.ids.shape) < 0.4) & words.mask, words.ids, -100)
    labels[0, 1] = words.ids[0, 1]
    wanted = reference(**given(words, images), labels=labels)
    joint = model.joint(words, images)
    logits = model.word_head(joint.hidden[:, joint.words])
    assert torch.allclose(logits[words.mask], wanted.logits[words.mask], atol=1e-5)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert torch.allclose(loss, wanted.loss, atol=1e-5)
    wanted.loss.backward()
    loss.backward()
    assert torch.allclose(model.text.words.weight.grad, reference.mlm_score.decoder.weight.grad, atol=1e-4)
    assert torch.allclose(model.positions.grad, reference.vilt.embeddings.position_embeddings.grad[0], atol=1e-4)
    patches = reference.vilt.embeddings.patch_embeddings.projection.weight.grad
    assert torch.allclose(model.patch.weight.grad, patches, atol=1e-4)


def test_answers() -> None:
    reference = theirs("ViltForQuestionAnswering", num_labels=7)
    model = ours(reference, tasks={"classes": 7})
    words, images = texts(), pictures()
    scores = torch.rand(3, 7, generator=torch.Generator().manual_seed(5))
    wanted = reference(**given(words, images), labels=scores)
    logits = model.class_logits(words, [images])
    assert torch.allclose(logits, wanted.logits, atol=1e-5)
    loss = F.binary_cross_entropy_with_logits(logits, scores) * 7
    assert torch.allclose(loss, wanted.loss, atol=1e-5)


def test_retrieval() -> None:
    reference = theirs("ViltForImageAndTextRetrieval")
    model = ours(reference, tasks={"rank": True})
    words, images = texts(), pictures()
    wanted = reference(**given(words, images)).logits[:, 0]
    assert torch.allclose(model.rank(model.joint(words, images)), wanted, atol=1e-5)


def test_pairs_of_pictures() -> None:
    reference = theirs("ViltForImagesAndTextClassification", num_labels=2, num_images=2, modality_type_vocab_size=3)
    model = ours(reference, tasks={"classes": 2}, images=2, kinds=3)
    words, first, second = texts(), pictures([(64, 64)] * 3, 6), pictures([(64, 64)] * 3, 7)
    both = given(words, first)
    both["pixel_values"] = torch.stack((first.pixels, second.pixels), dim=1)
    both["pixel_mask"] = torch.stack((both["pixel_mask"],) * 2, dim=1)
    labels = torch.tensor([0, 1, 1])
    wanted = reference(**both, labels=labels)
    logits = model.class_logits(words, [first, second])
    assert torch.allclose(logits, wanted.logits, atol=1e-5)
    assert torch.allclose(F.cross_entropy(logits, labels), wanted.loss, atol=1e-5)
    assert not torch.allclose(model.class_logits(words, [second, first]), logits, atol=1e-3)


def test_padding_changes_nothing() -> None:
    model = ours(theirs("ViltModel"), "")
    words, images = texts(), pictures()
    together = model.joint(words, images).pooled
    for row, (h, w) in enumerate(images.sizes):
        count = int(words.mask[row].sum())
        alone = model.joint(
            Words(words.ids[row : row + 1, :count], words.mask[row : row + 1, :count]),
            Pictures(images.pixels[row : row + 1, :, :h, :w], [(h, w)]),
        )
        assert torch.allclose(alone.pooled[0], together[row], atol=1e-5)


def test_sampling_is_for_training_only() -> None:
    model = ours(theirs("ViltModel"), "", sampled_patches=5)
    words, images = texts(), pictures()
    assert torch.equal(model.joint(words, images).hidden, model.joint(words, images).hidden)
    model.train()
    torch.manual_seed(0)
    patches, seen = model.patches(images)
    assert seen.sum(1).tolist() == [6, 6, 6]
    whole, _ = model.eval().patches(images)
    assert all(any(torch.equal(p, w) for w in whole[0]) for p in patches[0])  # patches with their own positions
    assert len({tuple(p.tolist()) for p in patches[0]}) == 6  # each once


@pytest.mark.parametrize("head", [{}, {"match": True, "words": True}, {"classes": 3129}])
def test_published_size(head: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = SingleStream(SingleStream.Config(tasks=head))
    body = 111_595_008
    extra = {0: 0, 2: 768 * 2 + 2 + 768 * 768 + 3 * 768 + 30522 * 769, 1: 1536 * 769 + 2 * 1536 + 3129 * 1537}
    assert sum(p.numel() for p in model.parameters()) == body + extra[len(head)]


def batch(owners: list[int], count: int = 2) -> Batch:
    ids = torch.randint(1, 50, (count, 4))
    ones = torch.ones_like(ids)
    layouts = [Layout(1, (3, 64, 64))] * len(owners)
    media = MediaBatch(
        torch.randn(len(owners), 3, 64, 64),
        layouts,
        torch.zeros(0, dtype=torch.long),
        [0] * len(owners),
        owners,
    )
    return Batch(ids, ones.cumsum(1) - 1, ones, ones.bool() & False, {"image": media}, ["a", "b"][:count])


def test_bad_input() -> None:
    model = SingleStream(SingleStream.Config.parse(OURS | {"patch": 16}))
    with pytest.raises(DataError, match="sample 'b': has 0 pictures, this model takes 1"):
        pictures_of(batch([0]), 1)
    with pytest.raises(DataError, match="sample 'a': has 2 pictures, this model takes 1"):
        model.match(batch([0, 0]))
    with pytest.raises(ConfigError, match=r"no head for matches; set model\.tasks\.match"):
        model.match(batch([0, 1]))
    left = batch([0, 1])
    left.segment_ids[1, 0] = 0
    with pytest.raises(DataError, match="sample 'b': has no text at position 0"):
        words_of(left)
    long = Words(torch.ones(1, 13, dtype=torch.long), torch.ones(1, 13, dtype=torch.bool))
    with pytest.raises(DataError, match="13 tokens does not fit the 12 positions"):
        model.joint(long, pictures([(64, 64)]))
    with pytest.raises(ConfigError, match="2 pictures and the text need 3"):
        SingleStream.Config.parse(OURS | {"images": 2})
    with pytest.raises(ConfigError, match="writes no text"):
        model.new_cache(1, 1)


def test_pictures_stand_by_their_owner() -> None:
    mixed = batch([1, 0, 1, 0])
    first, second = pictures_of(mixed, 2)
    pixels = mixed.media["image"].inputs
    assert torch.equal(first.pixels, pixels[[1, 0]]) and torch.equal(second.pixels, pixels[[3, 2]])
