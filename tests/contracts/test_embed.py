"""Vectors and zero-shot classification: order, batches, threads, bad input, and the published arithmetic."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from towers import two_towers

import chiasm
from chiasm.errors import ConfigError, DataError
from chiasm.infer import apart, embed, zero_shot
from chiasm.infer.embed import stream
from chiasm.vlm import VLM


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return two_towers(tmp_path_factory.mktemp("clip"))


def pictures(count: int) -> list[Image.Image]:
    values = np.random.default_rng(3)
    return [Image.fromarray(values.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)) for i in range(count)]


def test_batches_and_threads_change_nothing(clip: VLM):
    shown = pictures(7)
    alone = torch.cat([clip.embed(images=[p]) for p in shown])
    assert alone.shape == (7, 12) and torch.allclose(alone.norm(dim=-1), torch.ones(7), atol=1e-6)
    torch.testing.assert_close(clip.embed(images=shown, batch=3), alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(clip.embed(images=shown, batch=2, workers=2), alone, atol=1e-6, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


@pytest.fixture
def two_cores() -> Iterator[None]:
    """torch with two threads, where tests otherwise run with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_each_core_by_itself(clip: VLM, two_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The vectors, their order, and what is told of broken pictures do not depend on how cores share the work."""
    if not apart.possible():
        pytest.skip("threads cannot be told apart here")
    asked: list[int] = []
    real = apart.pool
    monkeypatch.setattr(apart, "pool", lambda threads: asked.append(threads) or real(threads))
    shown = pictures(45)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    given = [*shown[:20], str(tmp_path / "broken.jpg"), *shown[20:], str(tmp_path / "none.png")]
    told: dict[bool, list[tuple[int, str]]] = {}
    found = {}
    for shared in (True, False):
        told[shared] = []
        stream = embed.stream(
            clip.model, clip.processor, given, "image", batch=40, workers=0 if shared else None,
            broken=lambda n, e, shared=shared: told[shared].append((n, str(e))),
        )  # fmt: skip
        found[shared] = list(stream)
    assert asked == [2] and told[True] == told[False] and [n for n, _ in told[True]] == [20, 46]
    assert [rows for rows, _ in found[True]] == [rows for rows, _ in found[False]]
    for (_, a), (_, b) in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert torch.get_num_threads() == 2, "the threads of others are as they were"
    with pytest.raises(DataError, match=r"broken\.jpg"):
        clip.embed(images=given)
    texts = [f"text {'more ' * (i % 4)}{i}" for i in range(70)]
    torch.testing.assert_close(clip.embed(texts=texts), clip.embed(texts=texts, workers=0), atol=1e-6, rtol=1e-5)
    asked.clear()
    clip.embed(images=shown[:1])
    assert not asked, "one picture is shared by all cores"
    clip.train()
    clip.embed(images=shown[:4])
    clip.eval()
    assert not asked, "threads that enter and leave evaluation would meet"


def test_texts_keep_their_order_whatever_their_length(clip: VLM):
    texts = ["a long text about a cat", "b", "a text", "another long text, about a dog"]
    alone = torch.cat([clip.embed(texts=[t]) for t in texts])
    torch.testing.assert_close(clip.embed(texts=texts, batch=2), alone, atol=1e-6, rtol=1e-5)
    assert clip.embed(texts=[]).shape == (0, 12)


def test_texts_longer_than_the_tower(clip: VLM):
    """Refused with both lengths; on request they lose their end, and who asks is told of each."""
    limit = clip.processor.config.template.length
    long = ("a red car beside a blue house " * limit).strip()
    tokens = len(clip.tokenizer.encode(long)) + len(clip.tokenizer.prefix) + len(clip.tokenizer.suffix)
    told = rf"text 2, 'a red car .*\.\.\.': has {tokens} tokens, this model reads {limit} .* truncate=True"
    with pytest.raises(DataError, match=told):
        clip.embed(texts=["short", long])
    with pytest.raises(DataError, match=f"text 1, .*{tokens} tokens"):
        clip.embed(texts=[long, "short"], workers=0)  # its number in the list, not by length
    with pytest.raises(DataError, match=r"text 1, 'see a red car .* tokens, this model reads"):
        clip.classify(images=pictures(1), labels=[long], templates=["see {}"])
    heard: list[tuple[int, int, int]] = []
    parts = embed.stream(
        clip.model, clip.processor, ["short", long], "text", 1, 0, truncate=lambda *numbers: heard.append(numbers)
    )
    found = [vectors for _, vectors in parts]
    assert heard == [(1, tokens, limit)] and torch.allclose(found[0], clip.embed(texts=["short"]), atol=1e-6)
    tokenizer = clip.tokenizer
    ids = clip.processor(embed.conversation(long, "text")).input_ids.tolist()
    whole = [*tokenizer.prefix, *tokenizer.encode(long)]
    assert ids == [*whole[: limit - len(tokenizer.suffix)], *tokenizer.suffix]
    assert torch.allclose(clip.embed(texts=[long], truncate=True), found[1], atol=1e-6)


def test_the_model_stays_in_its_mode(clip: VLM):
    clip.train()
    clip.embed(texts=["a"])
    assert clip.model.training
    clip.eval()


def test_classify_is_the_published_formula(clip: VLM):
    shown, labels, forms = pictures(3), ["cat", "dog", "red car"], ["a photo of a {}.", "art of the {}"]
    got = clip.classify(images=shown, labels=labels, templates=forms)
    classes = []
    for label in labels:
        prompts = clip.embed(texts=[form.format(label) for form in forms])
        mean = prompts.mean(0)
        classes.append(mean / mean.norm())
    cosine = clip.embed(images=shown) @ torch.stack(classes).T
    expected = F.softmax(clip.model.logit_scale.detach().exp() * cosine, dim=-1)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert got.std() > 1e-4


def test_the_scale_is_bounded_in_evaluation_only(clip: VLM):
    before = clip.model.logit_scale.detach().clone()
    with torch.no_grad():
        clip.model.logit_scale.fill_(math.log(250))
    try:
        with torch.no_grad():
            assert float(clip.model.eval().scale()) == pytest.approx(100)
            assert float(clip.model.train().scale()) == pytest.approx(250)
        (_, highest) = clip.model.scale_bounds()["logit_scale"]
        assert math.exp(highest) == pytest.approx(100)
    finally:
        with torch.no_grad():
            clip.model.logit_scale.copy_(before)
        clip.eval()


def test_independent_probabilities(clip: VLM, tmp_path: Path):
    with pytest.raises(ConfigError, match="sigmoid"):
        clip.classify(images=pictures(1), labels=["a"], independent=True)
    sigmoid = two_towers(tmp_path, **{"model.bias_init": -3.0, "model.scale_init": 10.0})
    got = sigmoid.classify(images=pictures(2), labels=["cat", "dog"], independent=True)
    cosine = sigmoid.embed(images=pictures(2)) @ sigmoid.embed(texts=["cat", "dog"]).T
    torch.testing.assert_close(got, torch.sigmoid(10 * cosine - 3), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "templates", "words"),
    [
        ([], None, "0 labels"),
        (["cat", " "], None, "label 2 of 2 is empty"),
        (["cat", "dog", " cat "], None, "label 3 of 3, 'cat', is label 1 too"),
        ("cat", None, "give a list"),
        (["cat"], ["a photo"], "no '{}'"),
        (["cat"], [], "0 templates"),
        (["cat"], "imagnet", "did you mean 'imagenet"),
    ],
)
def test_bad_labels_and_templates(clip: VLM, labels: Any, templates: Any, words: str):
    with pytest.raises(DataError) as told:
        clip.classify(images=pictures(1), labels=labels, templates=templates)
    assert words in str(told.value)
    assert len(zero_shot.check_labels(zero_shot.class_names("imagenet"))) == 1000, "with two names twice, as published"


def test_bad_pictures(clip: VLM, tmp_path: Path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    shown = [pictures(1)[0], str(broken), pictures(2)[1]]
    with pytest.raises(DataError, match=r"broken\.jpg"):
        clip.embed(images=shown)
    for workers in (0, 2):
        told: list[int] = []
        found = list(
            stream(clip.model, clip.processor, shown, batch=2, workers=workers, broken=lambda i, e, t=told: t.append(i))
        )
        assert told == [1] and [rows for rows, _ in found] == [[0], [2]]
    with pytest.raises(DataError, match="text 2 is int"):
        clip.embed(texts=["a", 5])  # type: ignore[list-item]
    with pytest.raises(DataError, match="empty"):
        clip.embed(texts=["  "])
    with pytest.raises(ConfigError, match="one of the two"):
        clip.embed()


def test_writing_is_refused(clip: VLM):
    with pytest.raises(ConfigError, match="embed or classify"):
        clip.generate([{"role": "user", "content": "hello"}])


def test_saved_and_loaded(clip: VLM, tmp_path: Path):
    clip.save(tmp_path / "saved")
    again = chiasm.load(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), clip.parameters(), strict=True))
    texts, shown = ["a cat", "two dogs"], pictures(2)
    # With several threads a product sums in another order where its weights begin at another byte of memory.
    torch.testing.assert_close(again.embed(texts=texts), clip.embed(texts=texts), atol=1e-6, rtol=0)
    torch.testing.assert_close(again.embed(images=shown), clip.embed(images=shown), atol=1e-6, rtol=0)


def test_published_prompts():
    sets = zero_shot.template_sets()
    assert len(sets["imagenet"]) == 80 and len(sets) == 29
    names = zero_shot.class_names("imagenet")
    assert len(names) == 1000 and len(set(names)) == 998
    # openai/CLIP's notebook, hashed there
    assert hashlib.sha256("\n".join(sets["imagenet"]).encode()).hexdigest().startswith("4f976686")
    assert hashlib.sha256("\n".join(names).encode()).hexdigest().startswith("571ae1c5")
    assert set(sets["imagenet-7"]) <= set(sets["imagenet"])
