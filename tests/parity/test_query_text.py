"""BLIP-2's first stage: contrast and matching against transformers, the three losses against formulas in float64.

The states that the formulas start from are those of transformers' Q-Former, queries and texts apart as LAVIS runs them,
so one masked pass is compared with two.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_folders import photo
from query_kit import CONFIG, START, WORDS, K, batch, folder_of_transformers, parts_of, unit
from torch import Tensor

import chiasm
from chiasm.compose import build_model
from chiasm.connectors.qformer import QFormer, multimodal_causal
from chiasm.errors import ConfigError, DataError
from chiasm.eval.matcher import matcher
from chiasm.eval.retrieval import Pairs, evaluate
from chiasm.fusion.query_text import QueryText
from chiasm.train.objectives import blip2
from chiasm.train.objectives.base import objective
from chiasm.types import Batch
from parity.weights import randomise


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return folder_of_transformers(tmp_path_factory.mktemp("retrieval") / "folder")


def ours(seed: int = 7, **changes: Any) -> QueryText:
    model: Any = randomise(build_model(QueryText.Config.parse(CONFIG | changes)), seed)
    model.temperature.data.fill_(0.09)
    return model  # type: ignore[no-any-return]


def like(theirs: Any, **changes: Any) -> QueryText:
    """A model with all heads that has the weights of transformers'."""
    model = ours(3, **changes)
    state = model.state_dict() | theirs.vlm.model.state_dict()
    model.load_state_dict(state)
    return model


# ------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("pads", [0, 3])
def test_matching_and_contrast_are_those_of_transformers(theirs: Any, rows: int, pads: int):
    given, model = batch(rows, pads), theirs.vlm.model
    inputs = {"pixel_values": given.media["image"].inputs, "input_ids": given.input_ids}
    inputs["attention_mask"] = given.segment_ids
    with torch.no_grad():
        match = theirs.model(**inputs, use_image_text_matching_head=True).logits_per_image  # [B, 2]
        contrast = theirs.model(**inputs, use_image_text_matching_head=False).logits_per_image  # [B, B]
        found, cosines = model.pairs(given)
        images, texts = model.embed_images(given), model.embed_texts(given)
    torch.testing.assert_close(found, match, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cosines, contrast.diagonal(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.score(images, texts), contrast, atol=1e-5, rtol=1e-5)
    if rows > 1:
        assert (match[0] - match[1]).abs().max() > 1e-4 and contrast.std() > 1e-3, "pictures must matter"


@pytest.mark.parametrize("head", ["matching", "contrast"])
def test_gradients_are_those_of_transformers(theirs: Any, head: str):
    given, model = batch(3), theirs.vlm.model
    inputs = {"pixel_values": given.media["image"].inputs, "input_ids": given.input_ids}
    inputs["attention_mask"] = given.segment_ids
    expected = theirs.model(**inputs, use_image_text_matching_head=head == "matching").logits_per_image
    images, texts = model.embed_images(given), model.embed_texts(given)
    found = model.pairs(given)[0] if head == "matching" else model.score(images, texts)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    for loss, net in ((found * weight, model), (expected * weight, theirs.model)):
        net.zero_grad()
        loss.sum().backward()
    named, layers = dict(model.named_parameters()), theirs.model.qformer.encoder.layer
    pairs = [
        (named["connectors.image.queries"], theirs.model.query_tokens),
        (named["connectors.image.body.text.words.weight"], theirs.model.embeddings.word_embeddings.weight),
        (named["connectors.image.body.layers.2.cross.k.weight"], layers[2].crossattention.attention.key.weight),
        (named["connectors.image.body.layers.0.text_mlp.fc1.weight"], layers[0].intermediate.dense.weight),
        (named["encoders.image.post_norm.weight"], theirs.model.vision_model.post_layernorm.weight),
    ]
    for mine, other in pairs:
        assert other.grad.abs().max() > 1e-6
        torch.testing.assert_close(mine.grad, other.grad.view_as(mine.grad), atol=1e-4, rtol=1e-4)


def test_a_conversation_gives_the_inputs_of_transformers(theirs: Any):
    """Ids and pixels of the processor, and a text without padding of its own."""
    picture, words = photo(40, 30), "what is the image"
    talk = [{"role": "user", "content": [{"type": "image", "image": picture}]}, {"role": "assistant", "content": words}]
    given = theirs.vlm.processor.batch([talk])
    assert given.input_ids.tolist() == theirs.tokenizer([words]).input_ids
    pixels = theirs.images(picture, return_tensors="pt").pixel_values
    torch.testing.assert_close(given.media["image"].inputs, pixels, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="has no head for words"):
        theirs.vlm.model(given)


def test_exported_folder_is_that_of_transformers(theirs: Any, tmp_path: Path):
    theirs.vlm.export(tmp_path / "out")
    made = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out")
    before, after = theirs.model.state_dict(), made.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert chiasm.load(tmp_path / "out").config.model.hash() == theirs.vlm.config.model.hash()


def test_saved_and_loaded_again(theirs: Any, tmp_path: Path):
    again = chiasm.load(theirs.vlm.save(tmp_path / "own"))
    given = batch()
    with torch.no_grad():
        assert torch.equal(again.model.pairs(given)[0], theirs.vlm.model.pairs(given)[0])


# ------------------------------------------------------------------------------------------- formulas in float64


def test_it_finds_and_judges(theirs: Any):
    """The published retrieval: found by the best query's cosine, ranked again by the matching logit and the cosine."""
    vlm = theirs.vlm
    pictures, words = [photo(30, 40, s) for s in range(3)], ["a b c", "c b", "d e a b"]
    pairs = Pairs.of(list(zip(pictures, words, strict=True)))
    judge = matcher(vlm, pairs, batch=4)
    image, text = [i for i in range(3) for _ in range(3)], list(range(3)) * 3
    talks = [
        [
            {"role": "user", "content": [{"type": "image", "image": pictures[i]}]},
            {"role": "assistant", "content": words[t]},
        ]
        for i, t in zip(image, text, strict=True)
    ]
    with torch.no_grad():
        logits, cosines = vlm.model.pairs(vlm.processor.batch(talks))
    wanted = (logits[:, 1] + cosines).view(3, 3)
    found = judge(image, text).view(3, 3)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert wanted.flatten().unique().numel() == 9
    result = evaluate(vlm, pairs, judge, candidates=3, batch=2)
    best = {"text": [int((row > row[i]).sum()) + 1 for i, row in enumerate(cosines.view(3, 3))]}
    assert result.ranks["text"] == best["text"] and result.reranked is not None
    assert result.reranked.text[1] == pytest.approx(float((wanted.argmax(1) == torch.arange(3)).float().mean()))


def states_in_two_passes(net: Any, given: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """States of queries and of texts apart, and of texts after queries, from transformers' Q-Former in float64."""
    look = net.vision_model(pixel_values=given.media["image"].inputs.double())[0]
    queries = net.query_tokens.expand(len(look), -1, -1)
    q = net.qformer(query_embeds=queries, encoder_hidden_states=look).last_hidden_state
    embedded, mask = net.embeddings(input_ids=given.input_ids), given.segment_ids
    t = net.qformer(query_embeds=embedded, query_length=0, attention_mask=mask).last_hidden_state
    opened = given.input_ids.clone()
    opened[:, 0] = START
    seen = multimodal_causal(K, mask.bool())
    barred = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e9)
    both = net.qformer(
        query_embeds=net.embeddings(input_ids=opened, query_embeds=queries),
        query_length=K,
        attention_mask=barred,
        encoder_hidden_states=look,
    ).last_hidden_state
    return q, t, both[:, K:]


def wide(theirs: Any) -> Any:
    return copy.deepcopy(theirs.model).double()


def smoothed(logits: Tensor, target: Tensor, share: float = 0.1) -> Tensor:
    """Cross-entropy with the target's weight 0.9, and 0.1 spread over all."""
    each = -logits.log_softmax(-1)
    return (1 - share) * each.gather(-1, target[:, None])[:, 0] + share * each.mean(-1)


def formulas(net: Any, model: QueryText, given: Batch) -> dict[str, Tensor]:
    """Contrast and writing by the paper, from the states of transformers' model ``net`` in float64."""
    q, t, w = states_in_two_passes(net, given)
    ours = {name: p.detach().double() for name, p in model.named_parameters()}
    n = len(q)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ ours[f"{name}.weight"].T + ours[f"{name}.bias"]

    images, texts = unit(linear(q, "image_proj")), unit(linear(t[:, 0], "text_proj"))
    i2t = torch.stack([torch.stack([(images[i] @ texts[j]).max() for j in range(n)]) for i in range(n)])
    i2t = i2t / ours["temperature"]
    y = torch.arange(n)
    contrast = 0.5 * (smoothed(i2t, y).mean() + smoothed(i2t.T, y).mean())
    hidden = linear(w, "words.dense")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    mean, var = hidden.mean(-1, keepdim=True), hidden.var(-1, correction=0, keepdim=True)
    hidden = (hidden - mean) / (var + 1e-12).sqrt() * ours["words.norm.weight"] + ours["words.norm.bias"]
    table = ours["connectors.image.body.text.words.weight"]
    logits = hidden @ table.T + ours["words.bias"]
    real = given.segment_ids[:, 1:].bool()
    writing = smoothed(logits[:, :-1][real], given.input_ids[:, 1:][real]).mean()
    return {"contrast": contrast, "writing": writing, "i2t": i2t}


def matching(theirs: Any, given: Batch, texts: Tensor, pictures: Tensor) -> Tensor:
    """Mean cross-entropy over the pairs, each by transformers' own head of matching."""
    rows = torch.arange(len(given.ids))
    look = torch.cat((rows, pictures, rows))
    read = torch.cat((rows, rows, texts))
    with torch.no_grad():
        logits = theirs.model(
            pixel_values=given.media["image"].inputs[look],
            input_ids=given.input_ids[read],
            attention_mask=given.segment_ids[read],
            use_image_text_matching_head=True,
        ).logits_per_image.double()
    labels = torch.cat((torch.ones(len(rows)), torch.zeros(2 * len(rows)))).long()
    return -logits.log_softmax(-1).gather(1, labels[:, None]).mean()


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_first_stage_is_the_published_sum(theirs: Any, side: str):
    model, given = like(theirs), batch(5)
    step = objective("blip2_stage1")
    rows = step.embed(model, given)
    drawn = step._negatives(blip2.Step(model, rows, [5], blip2.ALONE))
    assert (drawn[0] != torch.arange(5)).all() and drawn[2].all()
    found = step(model, batch(5, side=side))
    expected = formulas(wide(theirs), model, given) | {"matching": matching(theirs, given, drawn[0], drawn[1])}
    total = expected["contrast"] + expected["matching"] + expected["writing"]
    assert found.weight == 5
    torch.testing.assert_close(found.total.double() / 5, total, atol=1e-5, rtol=1e-5)
    for name in ("contrast", "matching", "writing"):
        value, weight = found.parts[name]
        torch.testing.assert_close(float(value) / float(weight), float(expected[name]), atol=1e-5, rtol=1e-5)


def test_gradients_of_contrast_and_writing_are_those_of_the_formulas(theirs: Any):
    model, given = like(theirs), batch(4)
    loss = objective({"type": "blip2_stage1", "match": 0})(model, given)
    (loss.total / loss.weight).backward()
    net = wide(theirs)
    expected = formulas(net, model, given)
    (expected["contrast"] + expected["writing"]).backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    named, layer = dict(model.named_parameters()), "qformer.encoder.layer.1."
    for mine, other in (
        ("connectors.image.queries", "query_tokens"),
        ("connectors.image.body.layers.1.query_mlp.fc1.weight", layer + "intermediate_query.dense.weight"),
        ("connectors.image.body.layers.1.text_mlp.fc2.bias", layer + "output.dense.bias"),
        ("encoders.image.post_norm.weight", "vision_model.post_layernorm.weight"),
    ):
        torch.testing.assert_close(
            named[mine].grad, grads[other].float().view_as(named[mine].grad), atol=1e-4, rtol=1e-4
        )
        assert grads[other].abs().max() > 1e-4


def test_every_parameter_has_a_gradient():
    model = ours()
    objective("blip2_stage1")(model, batch()).total.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.slow
def test_all_three_tasks_are_learned_by_heart():
    """Six pairs: contrast and writing fall to what smoothing leaves, and hard negatives are told apart at last."""
    torch.manual_seed(0)
    model, given, step = (
        build_model(QueryText.Config.parse(CONFIG)).train(),
        batch(6, pads=0),
        objective("blip2_stage1"),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(220):
        loss = step(model, given)
        optimizer.zero_grad()
        (loss.total / loss.weight).backward()
        optimizer.step()
    means = {name: float(value) / float(weight) for name, (value, weight) in loss.parts.items()}
    assert means["contrast"] < 0.6 and means["writing"] < 1.0
    assert means["matching"] < 0.05 and means["matching_accuracy"] == 1


# ----------------------------------------------------------------------------------------------- hard negatives


def test_a_step_of_one_pair_has_no_negatives():
    """LAVIS draws the pair itself and calls it wrong, and loses the batch axis (fusion.md B1, B2)."""
    model, given = ours(), batch(1, pads=0)
    loss = objective("blip2_stage1")(model, given)
    assert loss.weight == 1 and loss.parts["matching"][1] == 1 and loss.total.isfinite()
    right = -model.pairs(given)[0].log_softmax(1)[0, 1]
    torch.testing.assert_close(loss.parts["matching"][0], right.detach(), atol=1e-6, rtol=1e-5)


def test_equal_texts_and_pictures_are_no_negatives():
    """Samples 0 and 1 have one text, 2 and 3 one picture: drawn for each other only where that is asked for."""
    model, wrong = ours(), {0: 1, 1: 0, 2: 3, 3: 2}
    for setting in ("distinct", "all"):
        step, met = objective({"type": "blip2_stage1", "negatives": setting}), 0
        for seed in range(12):
            given = batch(4, pads=0, seed=seed, twice=True)
            given.media["image"].inputs[3] = given.media["image"].inputs[2]
            texts, pictures, there = step._negatives(blip2.Step(model, step.embed(model, given), [4], blip2.ALONE))
            drawn = list(enumerate(texts.tolist())) + list(enumerate(pictures.tolist()))
            assert there.all() and all(row != other for row, other in drawn)
            met += sum(wrong[row] == other for row, other in drawn)
        assert (met > 0) == (setting == "all")
    loss = objective("blip2_stage1")(model, parts_of(given, [0, 1]))
    assert loss.parts["matching"][1] == 2, "one text only: nothing is left to draw"


def test_draws_follow_the_softmax():
    """20 000 draws of one row against its distribution; the own column never comes."""
    g = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 9.0, -1.0, 1.5, 0.0])
    allowed = torch.tensor([True, False, True, True, True])
    rows, columns = (
        torch.randint(-(2**62), 2**62, (20000,), generator=g),
        torch.randint(-(2**62), 2**62, (5,), generator=g),
    )
    found = blip2.draw(logits.expand(20000, -1), allowed.expand(20000, -1), rows, columns, columns.sum())
    shares = torch.bincount(found, minlength=5) / 20000
    expected = logits.masked_fill(~allowed, -torch.inf).softmax(0)
    assert shares[1] == 0 and (shares - expected).abs().max() < 0.012
    noise = blip2.gumbel(rows, columns, columns.sum())
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - 1.6449) < 0.05


def test_draws_do_not_depend_on_the_order_of_the_step():
    model, given, order = ours(), batch(5, pads=0), [3, 0, 4, 1, 2]
    turned, step = parts_of(given, order), objective("blip2_stage1")
    drawn = [step._negatives(blip2.Step(model, step.embed(model, b), [5], blip2.ALONE)) for b in (given, turned)]
    names = [[[b.ids[int(j)] for j in d] for d in found[:2]] for b, found in zip((given, turned), drawn, strict=True)]
    for first, second in zip(*names, strict=True):
        assert [first[r] for r in order] == second
    a, b = (step(model, x).total for x in (given, turned))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_nothing_is_changed_after_the_loss():
    """LAVIS fills the similarities in place after it has used them (fusion.md B3)."""
    model, given = ours(), batch()
    step = objective("blip2_stage1")
    seen = blip2.Step(model, step.embed(model, given), [4], blip2.ALONE)
    before = seen.to_texts.clone(), seen.to_images.clone()
    step._negatives(seen)
    assert torch.equal(seen.to_texts, before[0]) and torch.equal(seen.to_images, before[1])


def test_targets_of_retrieval_share_a_picture(theirs: Any):
    """LAVIS's fine-tuning: 0.9 spread over the texts of one picture, and 0.1 over all."""
    model, given = like(theirs), batch(4)
    given.media["image"].inputs[2] = given.media["image"].inputs[0]
    loss = objective({"type": "blip2_stage1", "match": 0, "write": 0, "targets": "pictures"})(model, given)
    i2t = formulas(wide(theirs), model, given)["i2t"]
    same = torch.eye(4, dtype=torch.float64)
    same[0, 2] = same[2, 0] = 1
    wanted = 0.9 * same / same.sum(1, keepdim=True) + 0.1 / 4
    expected = 0.5 * sum(-(wanted * s.log_softmax(1)).sum() for s in (i2t, i2t.T))
    torch.testing.assert_close(loss.total.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_cold_temperature_is_held():
    model = ours()
    with torch.no_grad():
        model.temperature.fill_(-0.2)  # LAVIS's may pass 0 (fusion.md B4)
    loss = objective("blip2_stage1")
    assert loss(model, batch()).total.isfinite() and float(model.heat()) > 0
    assert loss.bounds(model)["temperature"][0] > 0


def test_matching_in_chunks_is_matching_at_once():
    model, given = ours(), batch(5)
    found = []
    for chunk in (None, 2):
        model.zero_grad()
        loss = objective({"type": "blip2_stage1", "chunk": chunk})(model, given)
        loss.total.backward()
        found.append((loss.total.detach(), model.connectors["image"].queries.grad.clone()))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- writing


@torch.no_grad()
def test_writing_word_by_word_is_writing_at_once():
    """From prompts of unequal length padded on the left; a row leaves on the way, as finished ones do."""
    model, given = ours(), batch(3, pads=3, side="left")
    cache = model.new_cache(3, 12)
    logits, one = model(given, logits="last", cache=cache).logits, torch.zeros(3, 1).long()
    for step in range(4):
        chosen = logits.argmax(1, keepdim=True)
        given = followed(given, chosen)
        logits = model.step(chosen, one, one, cache)
        if step == 1:
            cache.reorder(torch.tensor([2, 0]))
            logits, given = logits[[2, 0]], parts_of(given, [2, 0])
    torch.testing.assert_close(model(given, logits="last").logits, logits, atol=1e-5, rtol=1e-5)


def followed(given: Batch, ids: Tensor) -> Batch:
    """The batch with a word more in every row."""
    segments = torch.cat((given.segment_ids, torch.ones_like(ids)), 1)
    more = torch.cat((given.input_ids, ids), 1), (segments.cumsum(1) - 1) * segments, segments, segments.bool()
    return Batch(*more, given.media, given.ids)


@torch.no_grad()
def test_a_picture_decides_what_is_written():
    model, given = ours(), batch(2, pads=0)
    given.input_ids[1] = given.input_ids[0]
    logits = model(given, logits="all").logits
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    alone = model(parts_of(given, [1]), logits="all").logits
    torch.testing.assert_close(logits[1:], alone, atol=1e-5, rtol=1e-5)


def test_padding_of_either_side_changes_nothing():
    model = ours()
    left, right = batch(4, side="left"), batch(4)
    with torch.no_grad():
        for a, b in zip(model.pairs(left), model.pairs(right), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert torch.equal(model(left).targets, model(right).targets)
        torch.testing.assert_close(model(left).logits, model(right).logits, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- refusals


def test_what_is_refused():
    model, given = ours(), batch(3)
    given.media["image"].owners = [0, 0, 2]
    with pytest.raises(DataError, match="sample 's0-0' has 2 media of kind 'image' with 2 units"):
        model(given)
    given.media.clear()
    with pytest.raises(DataError, match="sample 's0-0' has 0 media"):
        objective("blip2_stage1")(model, given)
    long = batch(1, pads=0)
    long.input_ids, long.segment_ids = torch.full((1, 21), 5), torch.ones(1, 21).long()
    with pytest.raises(DataError, match="a text of 21 tokens does not fit the 20 positions"):
        model.embed_texts(long)
    for changes, told in (
        ({"start": WORDS}, f"start is id {WORDS}, the text half has {WORDS} words"),
        ({"connectors": {"image": CONFIG["connectors"]["image"] | {"project": True}}}, "project=false"),
        ({"connectors": {"image": {"type": "linear"}}}, "connector of type 'qformer' with its text half"),
    ):
        with pytest.raises(ConfigError, match=told):
            QueryText.Config.parse(CONFIG | changes)
    with pytest.raises(ConfigError, match="contrast, match and write are all 0"):
        objective({"type": "blip2_stage1", "contrast": 0, "match": 0, "write": 0})
    with pytest.raises(ConfigError, match="hands on vectors of width 24, 10 are wanted"):
        bridge = QueryText.Config.parse(CONFIG).connectors["image"]
        QFormer(bridge, {"image": 32}, 10)
