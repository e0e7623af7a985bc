"""The querying transformer and EVA's tower against transformers: values and gradients, masks, and their traps.

transformers starts query tokens at zero and BLIP-2's tower almost there: a check with such weights sees nothing, so all
weights are drawn anew, and the tests say first that their input matters.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.connectors import qformer
from chiasm.connectors.qformer import QFormer, bidirectional, multimodal_causal, unimodal
from chiasm.convert import maps_blip
from chiasm.convert.engine import load_weights
from chiasm.convert.io import Loaded
from chiasm.convert.rules import plan_export
from chiasm.encoders.vit import ViT, eva_clip_vit_g14
from chiasm.errors import ConfigError, DataError
from chiasm.types import Condition, Tokens
from parity.weights import randomise

transformers = pytest.importorskip("transformers")

K, WIDE, SOURCE, OUT = 5, 32, 24, 20
SIZES = {"hidden_size": WIDE, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
OURS = {"queries": K, "dim": WIDE, "depth": 4, "heads": 4, "mlp": 48}
TEXT = {"vocab": 99, "positions": 16}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(ours: Any, theirs: torch.nn.Module, rules: list[Any], prefix: str) -> Any:
    load_weights(ours, Loaded("theirs", theirs.state_dict()), rules, part=prefix)
    return ours.eval()


def blip2(attention: str = "eager") -> tuple[Any, QFormer]:
    config = transformers.Blip2QFormerConfig(
        **SIZES, encoder_hidden_size=SOURCE, use_qformer_text_input=True, vocab_size=99, max_position_embeddings=16
    )
    config._attn_implementation = attention
    theirs = randomise(transformers.Blip2QFormerModel(config), 1)
    ours = randomise(QFormer(QFormer.Config.parse({**OURS, "text": TEXT}), {"image": SOURCE}, OUT), 2)
    load_body(ours, theirs, maps_blip.qformer_blip2())
    return theirs, ours.eval()


def instruct(attention: str = "eager") -> tuple[Any, QFormer]:
    config = transformers.InstructBlipQFormerConfig(
        **SIZES, encoder_hidden_size=SOURCE, vocab_size=99, max_position_embeddings=16
    )
    config._attn_implementation = attention
    theirs = randomise(transformers.InstructBlipQFormerModel(config), 1)
    ours = randomise(
        QFormer(QFormer.Config.parse({**OURS, "text": TEXT, "instruction": True}), {"image": SOURCE}, OUT), 2
    )
    load_body(ours, theirs, maps_blip.qformer_instruct())
    return theirs, ours.eval()


def load_body(ours: QFormer, theirs: Any, rules: list[Any]) -> None:
    """Strictly: every tensor of theirs has a place; ours lacks nothing but queries, projection and BLIP-2's words."""
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")}
    weights = Loaded("theirs", state)
    plan = plan_export([n for n in ours.state_dict() if n.startswith("body.")], rules)
    assert set(plan.unknown) <= {"body.text.words.weight", "body.text.positions.weight"}
    assert {name for step in plan.steps for name in step.targets} == set(state)
    for part in ("body.layers.", "body.norm."):
        load_weights(ours, weights, rules, part=part, others=True)
    if "embeddings.word_embeddings.weight" in state:
        load_weights(ours, weights, rules, part="body.text.", others=True)


def words(rows: int, length: int, pads: int = 0, seed: int = 0) -> Condition:
    ids = torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, length, dtype=torch.bool)
    if pads:
        mask[-1, -pads:] = False
    return Condition(ids, mask)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [1, 3])
def test_queries_alone_are_those_of_blip2(rows: int, attention: str):
    theirs, ours = blip2(attention)
    x = noise(rows, 7, SOURCE).requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected = theirs(query_embeds=ours.queries.expand(rows, -1, -1), encoder_hidden_states=x).last_hidden_state
    found = ours.states(Tokens(y))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected[:, 0] - expected[:, 1]).abs().max() > 0.1, "the queries must differ"
    weight = noise(*found.shape, seed=5)
    (found * weight).sum().backward()
    mine = [
        p.grad.clone()
        for p in (ours.queries, ours.body.layers[0].query_mlp.fc1.weight, ours.body.layers[2].cross.k.weight)
    ]
    ours.zero_grad()
    (expected * weight).sum().backward()
    layers = theirs.encoder.layer
    theirs_grad = [
        ours.queries.grad,
        layers[0].intermediate_query.dense.weight.grad,
        layers[2].crossattention.attention.key.weight.grad,
    ]
    torch.testing.assert_close(y.grad, x.grad, atol=1e-4, rtol=1e-4)
    for a, b in zip(mine, theirs_grad, strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_masked_source_is_not_seen():
    theirs, ours = blip2()
    x = noise(2, 7, SOURCE)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    with torch.no_grad():
        expected = theirs(
            query_embeds=ours.queries.expand(2, -1, -1), encoder_hidden_states=x, encoder_attention_mask=mask.long()
        ).last_hidden_state
        found = ours.states(Tokens(x, mask))
        cut = ours.states(Tokens(x[1:, :4]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1:], cut, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_queries_that_read_the_instruction_are_those_of_instructblip(attention: str):
    theirs, ours = instruct(attention)
    x, text = noise(3, 7, SOURCE), words(3, 6, pads=2)
    everything = torch.cat((torch.ones(3, K), text.mask), 1).long()
    expected = theirs(
        input_ids=text.ids,
        attention_mask=everything,
        query_embeds=ours.queries.expand(3, -1, -1),
        encoder_hidden_states=x,
    ).last_hidden_state
    found = ours.states(Tokens(x), text)
    real = torch.cat((torch.ones(3, K, dtype=torch.bool), text.mask), 1)
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        projected = ours(Tokens(x), text).x
        torch.testing.assert_close(projected, ours.proj(expected[:, :K]), atol=1e-5, rtol=1e-5)
        turned = ours(Tokens(x), Condition(text.ids.flip(1), text.mask.flip(1))).x
        other = ours(Tokens(x), words(3, 6, pads=2, seed=9)).x
    assert (turned - projected).abs().max() > 1e-3 and (other - projected).abs().max() > 1e-3
    weight = noise(3, K, WIDE, seed=5)
    (found[:, :K] * weight).sum().backward()
    mine = ours.body.text.words.weight.grad.clone(), ours.queries.grad.clone()
    ours.zero_grad()
    (expected[:, :K] * weight).sum().backward()
    torch.testing.assert_close(mine[0], theirs.embeddings.word_embeddings.weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine[1], ours.queries.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_of_the_instruction_changes_nothing():
    _, ours = instruct()
    x, text = noise(2, 7, SOURCE), words(2, 6, pads=2)
    both = ours(Tokens(x), text).x
    alone = ours(Tokens(x[1:]), Condition(text.ids[1:, :4], text.mask[1:, :4])).x
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ three masks


def test_masks_on_paper():
    text = torch.tensor([[True, True, False]])
    rows = {
        unimodal: ["11000", "11000", "00110", "00110", "00111"],
        bidirectional: ["11110"] * 5,
        multimodal_causal: ["11000", "11000", "11100", "11110", "11110"],
    }
    for mask, expected in rows.items():
        found = mask(2, text)
        assert found.shape == (1, 1, 5, 5)
        assert ["".join(str(int(v)) for v in row) for row in found[0, 0]] == expected


@torch.no_grad()
def test_unimodal_pass_is_two_passes():
    """Contrastive learning: transformers' retrieval model runs queries and text apart, one masked pass gives both."""
    theirs, ours = blip2()
    x, text = noise(3, 7, SOURCE), words(3, 6, pads=2)
    together = ours.states(Tokens(x), text, unimodal(K, text.mask))
    queries = theirs(query_embeds=ours.queries.expand(3, -1, -1), encoder_hidden_states=x).last_hidden_state
    embedded = ours.body.text(text.ids)
    alone = theirs(query_embeds=embedded, query_length=0, attention_mask=text.mask.long()).last_hidden_state
    torch.testing.assert_close(together[:, :K], queries, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[:, K:][text.mask], alone[text.mask], atol=1e-5, rtol=1e-5)
    empty = Condition(text.ids, torch.zeros_like(text.mask))
    assert ours.states(Tokens(x), empty, unimodal(K, empty.mask)).isfinite().all()


@torch.no_grad()
def test_causal_pass_is_the_published_two_passes():
    """Grounded generation: each prefix of the text gives the same last state, and the queries do not see the text."""
    _, ours = blip2()
    x, text = noise(2, 7, SOURCE), words(2, 6)
    whole = ours.states(Tokens(x), text, multimodal_causal(K, text.mask))
    torch.testing.assert_close(whole[:, :K], ours.states(Tokens(x)), atol=1e-5, rtol=1e-5)
    for length in (1, 3, 5):
        part = Condition(text.ids[:, :length], text.mask[:, :length])
        last = ours.states(Tokens(x), part, multimodal_causal(K, part.mask))[:, -1]
        torch.testing.assert_close(whole[:, K + length - 1], last, atol=1e-5, rtol=1e-5)
    theirs, _ = blip2()
    embedded = torch.cat((ours.queries.expand(2, -1, -1), ours.body.text(text.ids)), 1)
    seen = multimodal_causal(K, text.mask)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = theirs(
        query_embeds=embedded, query_length=K, attention_mask=mask, encoder_hidden_states=x
    ).last_hidden_state
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bidirectional_pass_is_that_of_matching():
    theirs, ours = blip2()
    x, text = noise(2, 7, SOURCE), words(2, 6, pads=3)
    embedded = torch.cat((ours.queries.expand(2, -1, -1), ours.body.text(text.ids)), 1)
    mask = torch.cat((torch.ones(2, K), text.mask), 1).long()
    expected = theirs(query_embeds=embedded, query_length=K, attention_mask=mask, encoder_hidden_states=x)
    found = ours.states(Tokens(x), text)
    torch.testing.assert_close(found[:, :K], expected.last_hidden_state[:, :K], atol=1e-5, rtol=1e-5)
    assert (found[:, :K] - ours.states(Tokens(x))).abs().max() > 1e-2, "queries must see the text"


# ---------------------------------------------------------------------------------------------------- how it starts


def test_first_gradient_of_the_queries_is_of_usual_size():
    """Queries at zero go straight into a norm of epsilon 1e-12: their gradient would be huge."""
    torch.manual_seed(0)
    made = QFormer(QFormer.Config.parse(OURS), {"image": SOURCE}, OUT)
    x = Tokens(noise(2, 7, SOURCE))
    assert 0.015 < made.queries.std() < 0.025
    made(x).x.square().mean().backward()
    assert 0 < made.queries.grad.norm() < 100
    with torch.no_grad():
        made.queries.zero_()
    made.zero_grad()
    made(x).x.square().mean().backward()
    assert made.queries.grad.norm() > 1e4


def test_parameters_are_those_of_the_published_size():
    """BLIP-2's Q-Former, without its text half and with it (InstructBLIP), on the meta device."""
    with torch.device("meta"):
        plain = QFormer(QFormer.Config(), {"image": 1408}, 2560)
        reads = QFormer(QFormer.Config(text=qformer.TextHalf(vocab=30523), instruction=True), {"image": 1408}, 4096)
        theirs = transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig())
        theirs_reads = transformers.InstructBlipQFormerModel(transformers.InstructBlipQFormerConfig(vocab_size=30523))

    def count(model: torch.nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert count(plain.body) == count(theirs) == 105_137_664
    assert count(reads.body) == count(theirs_reads) == 185_660_160
    assert count(plain) - count(plain.body) == 32 * 768 + (768 + 1) * 2560


def test_idle_parameters_are_named():
    for config in ({**OURS, "text": TEXT}, {**OURS, "text": TEXT, "instruction": True}, OURS):
        made = randomise(QFormer(QFormer.Config.parse(config), {"image": SOURCE}, OUT))
        (made(Tokens(noise(2, 7, SOURCE)), words(2, 6)).x ** 2).sum().backward()
        assert {n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()} == set(made.unused())


def test_dropout_runs_in_training_only():
    made = randomise(QFormer(QFormer.Config.parse({**OURS, "dropout": 0.5}), {"image": SOURCE}, OUT))
    x = Tokens(noise(2, 7, SOURCE))
    assert torch.equal(made.eval()(x).x, made(x).x)
    assert (made.train()(x).x - made(x).x).abs().max() > 1e-2


# -------------------------------------------------------------------------------------------------------- bad input


def test_what_is_refused():
    _, reads = instruct()
    x = Tokens(noise(1, 7, SOURCE))
    with pytest.raises(DataError, match="a text of 17 tokens does not fit the 16 positions"):
        reads(x, words(1, 17))
    with pytest.raises(DataError, match="reads the instruction and got none"):
        reads(x)
    with pytest.raises(ConfigError, match="needs a text half"):
        QFormer.Config.parse({**OURS, "instruction": True})
    with pytest.raises(ConfigError, match="width 33 cannot be split into 4 heads"):
        QFormer.Config.parse({**OURS, "dim": 33})
    plain = QFormer(QFormer.Config.parse(OURS), {"image": SOURCE}, OUT)
    with pytest.raises(ConfigError, match="no text half"):
        plain.states(x, words(1, 3))


# -------------------------------------------------------------------------------------------------------- the tower


def eva(attention: str = "eager") -> tuple[Any, ViT]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.Blip2VisionConfig(**sizes, image_size=28, patch_size=7, initializer_range=0.02)
    config._attn_implementation = attention
    theirs = randomise(transformers.Blip2VisionModel(config), 3)
    small = {"dim": 32, "mlp": 48, "depth": 3, "heads": 4, "patch": 7}
    ours = filled(ViT(eva_clip_vit_g14(28, **small)), theirs, maps_blip.eva_vit(32), "")
    return theirs, ours


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("size", [28, 42])
def test_tower_is_that_of_blip2(size: int, attention: str):
    theirs, ours = eva(attention)
    x = noise(2, 3, size, size).requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected = theirs(pixel_values=x, interpolate_pos_encoding=size != 28).last_hidden_state
    found = ours(y).x
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.shape[1] == (size // 7) ** 2 + 1 and (found[0] - found[1]).abs().max() > 0.1
    weight = noise(*found.shape, seed=5)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, atol=1e-4, rtol=1e-4)


def test_tower_of_published_size():
    with torch.device("meta"):
        ours = ViT(eva_clip_vit_g14())
        theirs = transformers.Blip2VisionModel(transformers.Blip2VisionConfig())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 985_952_256
    assert ours.config.count((3, 224, 224)).tokens == 257
