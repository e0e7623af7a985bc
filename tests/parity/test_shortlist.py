"""The shortlist of a large head: the best tokens exactly, whatever the weights, from half of the bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chiasm.lm.decoder import Decoder
from chiasm.nn import decode, kernels
from chiasm.nn.decode import Compiled

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler: torch computes everything")
VOCAB, DIM = 1003, 72
SIZES = {
    "vocab": VOCAB,
    "dim": DIM,
    "depth": 1,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "mlp": 96,
    "max_positions": 64,
}


@pytest.fixture(autouse=True)
def small_heads_too(monkeypatch):
    monkeypatch.setattr(decode, "LARGE_HEAD", 0)


def decoder(head: torch.Tensor | None = None, tied: bool = False) -> Decoder:
    lm = Decoder(Decoder.Config.parse({**SIZES, "tied": tied})).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2, generator=generator)
        if head is not None:
            lm.lm_head.weight.copy_(head)
    return lm


def stepped(lm: Decoder, dtype: torch.dtype, rows: int, prompt: bool, best: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits of the first ``rows`` positions, and those of a step that is asked for the ``best``."""
    c, lm = lm.config, lm.to(dtype)
    ids = torch.randint(0, VOCAB, (rows,), generator=torch.Generator().manual_seed(5))
    places = torch.arange(rows, dtype=torch.int32)

    def run(best: int | None) -> torch.Tensor:
        step = Compiled.of(lm, torch.zeros(c.depth, 2, 1, c.kv_heads, 64, c.width, dtype=dtype))
        assert step is not None
        return step.step(ids, torch.zeros_like(places), places, places, 2, None, prompt, best)

    with torch.inference_mode():
        return run(None), run(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "prompt"), [(1, False), (3, False), (20, False), (40, True)])
@pytest.mark.parametrize("best", [1, 4, 40])
def test_the_best_are_there_bit_by_bit(dtype, rows, prompt, best):
    whole, some = stepped(decoder(tied=rows == 3), dtype, rows, prompt, best)
    there = some > -torch.inf
    assert torch.equal(whole[there], some[there])
    assert there.gather(1, whole.topk(best).indices).all()
    assert torch.equal(whole.argmax(1), some.argmax(1))
    assert best > 4 or there.float().mean() < 0.25  # and of the others few were computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_that_rounding_would_exchange_are_told_apart(dtype):
    """Rows that differ by less than a step of eight bits, all of them near the best."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(1, DIM, generator=generator).repeat(VOCAB, 1)
    head = head + 2e-3 * torch.randn(VOCAB, DIM, generator=generator)
    head[:, 0] = 3.0  # one large weight makes the steps coarse
    whole, some = stepped(decoder(head), dtype, 8, False, 2)
    assert torch.equal(whole.topk(2).indices, some.topk(2).indices)
    coarse = (head / head.abs().amax(1, keepdim=True) * 127).round() * head.abs().amax(1, keepdim=True) / 127
    rounded, _ = stepped(decoder(coarse), dtype, 8, False, 2)
    assert not torch.equal(rounded.argmax(1), whole.argmax(1))  # the copy alone would have chosen others


def test_a_changed_head_is_rounded_again():
    lm = decoder().to(torch.bfloat16)
    c, place = lm.config, torch.zeros(1, dtype=torch.int32)
    step = Compiled.of(lm, torch.zeros(c.depth, 2, 1, c.kv_heads, 64, c.width, dtype=torch.bfloat16))
    assert step is not None
    first = step.step(torch.tensor([7]), place, place, place, 1, best=1).argmax()
    with torch.no_grad():
        lm.lm_head.weight[first] *= -1
    some = step.step(torch.tensor([7]), place, place, place, 1, best=1)
    whole = step.step(torch.tensor([7]), place, place, place, 1)
    assert some.argmax() == whole.argmax() != first
    assert some.max() == whole.max()


def test_a_model_that_is_cast_is_rounded_again():
    """The parameter and torch's count of its changes stay the same; its values are rounded."""
    lm = decoder()
    stepped(lm, torch.float32, 2, False, 1)
    before = decode._lists[lm.lm_head.weight]
    whole, some = stepped(lm, torch.bfloat16, 2, False, 1)
    assert decode._lists[lm.lm_head.weight] is not before
    assert torch.equal(whole.argmax(1), some.argmax(1))


def test_numbers_that_are_none_stay_so():
    head = torch.randn(VOCAB, DIM)
    head[500, 3] = float("nan")
    _, some = stepped(decoder(head), torch.bfloat16, 2, False, 1)
    assert some[:, 500].isnan().all()
