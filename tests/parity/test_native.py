"""The compiled kernels against torch: every kind of weights and every switch of the decoder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from chiasm.errors import ConfigError
from chiasm.lm.decoder import Decoder
from chiasm.nn import kernels
from chiasm.nn.decode import Compiled, readable
from chiasm.nn.quality import quality
from chiasm.nn.quant import Quantized, pack4, pack8, quantize, quantize_model, unpack4, unpack8

compiler = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler: torch computes everything")
SIZES = {"vocab": 97, "dim": 80, "depth": 2, "heads": 6, "kv_heads": 2, "head_dim": 20, "mlp": 144, "max_positions": 64}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


class Holder(nn.Module):
    def __init__(self, lm: Decoder):
        super().__init__()
        self.lm = lm


def decoder(seed: int = 0, **changes) -> Decoder:
    lm = Decoder(Decoder.Config.parse({**SIZES, "norm_eps": 1e-6, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lm.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.15, generator=generator)
    return lm


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def both(lm: Decoder, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two sequences by torch at once, and by the kernels: one by one in slot 2, by fives in slot 0."""
    lm, c = lm.to(dtype), lm.config
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(30).expand(2, -1)
    with torch.inference_mode():
        expected = lm.head(lm(lm.embed(ids), positions, torch.ones_like(ids))).float()
        step = Compiled.of(lm, torch.full((c.depth, 2, 3, c.kv_heads, 40, c.width), float("nan"), dtype=dtype))
        assert step is not None
        one = [step.step(ids[0, t : t + 1].clone(), int32(2), int32(t), int32(0), 1) for t in range(30)]
        five = [
            step.step(ids[1, t : t + 5].clone(), int32(*[0] * 5), int32(*range(t, t + 5)), int32(*range(5)), 2)
            for t in range(0, 30, 5)
        ]
        # A row of a batch is computed bit by bit as it is alone.
        mixed = step.step(torch.stack([ids[1, 29], ids[0, 29]]), int32(0, 2), int32(29, 29), int32(1), 2)
    assert torch.equal(mixed[0], one[-1][0])
    return expected, torch.stack([torch.cat(one), torch.cat(five)])


@compiler
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "activation": "gelu"},
        {"qkv_bias": True, "qk_norm": True, "out_bias": True, "mlp_bias": True},
        {"rotary_share": 0.5, "sliding_window": 7, "activation": "gelu_tanh"},
        {"activation": "relu", "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ],
)
def test_a_step_equals_the_decoder(changes):
    expected, found = both(decoder(**changes), torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@compiler
def test_a_step_in_bfloat16_is_nearer_to_float32_than_torch_is():
    exact, _ = both(decoder(), torch.float32)
    theirs, ours = both(decoder(), torch.bfloat16)
    assert (ours - exact).abs().mean() < 1.1 * (theirs - exact).abs().mean()


@compiler
@pytest.mark.parametrize(
    "changes",
    [
        {"tied": True},
        {"qkv_bias": True, "qk_norm": True, "out_bias": True, "mlp_bias": True, "activation": "gelu"},
        {"heads": 4, "kv_heads": 1, "head_dim": 36, "mlp": 130, "sliding_window": 70, "rotary_share": 0.5},
    ],
)
@pytest.mark.parametrize("how", [None, "int8"])
def test_a_prompt_is_the_same_bit_by_bit_in_any_chunks(changes, how):
    lm, count = decoder(**changes, max_positions=160), 150
    ids = torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(1))
    positions, c = torch.arange(count), lm.config

    def whole() -> torch.Tensor:
        return lm.head(lm(lm.embed(ids.unsqueeze(0)), positions.unsqueeze(0), torch.ones(1, count).long()))[0].float()

    def chunks(size: int, threads: int, beside: bool) -> torch.Tensor:
        """Logits of all positions in slot 1; ``beside``: another prompt's tokens before each chunk, in slot 2."""
        pool = torch.full((c.depth, 2, 3, c.kv_heads, 160, c.width), float("nan"), dtype=torch.bfloat16)
        step, found = Compiled.of(lm, pool), []
        assert step is not None
        for begin in range(0, count, size):
            own = list(range(begin, min(begin + size, count)))
            other = list(range(begin, min(begin + 5, count))) if beside else []
            slots, places = int32(*[2] * len(other), *[1] * len(own)), int32(*other, *own)
            rows = int32(*range(len(other), len(other) + len(own)))
            given = torch.cat((ids[other].flip(0), ids[own]))
            if beside:
                pool[:, :, 2] = 0.5  # what the other has not computed
            found.append(step.step(given, slots, places, rows, threads, prompt=True))
        return torch.cat(found)

    with torch.inference_mode():
        exact = whole()
        lm = lm.to(torch.bfloat16)
        theirs = (whole() - exact).abs().mean()
        if how is not None:
            quantize_model(Holder(lm), how)
            theirs = 8 * theirs
        found = chunks(count, 1, False)
        assert torch.equal(found, chunks(7, 2, False)) and torch.equal(found, chunks(67, 1, True))
    assert (found - exact).abs().mean() < theirs


@compiler
@pytest.mark.parametrize("how", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_the_rounded_operands(how, rows, dtype, rng):
    """The kernel multiplies int8 activations with 8 or 4 bit weights exactly: rounded by formula, it is equal."""
    layer = Quantized(torch.randn(70, 200, generator=rng), torch.randn(70, generator=rng), 8 if how == "int8" else 4)
    x = torch.randn(rows, 200, generator=rng).to(dtype)
    group = 128 if how == "int8" else 64
    padded = nn.functional.pad(x.float(), (0, 56)).unflatten(1, (-1, group))  # 200 → 256
    most = padded.abs().amax(-1, keepdim=True)
    steps = torch.div(torch.full_like(most, 127.0), most).nan_to_num(posinf=0)  # 127 / most would multiply twice
    rounded = ((padded * steps).round() * (most / 127)).flatten(1)
    expected = rounded[:, :200].double() @ layer.widened().double().T + layer.bias.double()
    # bfloat16 keeps 8 bits: of the product before it is scaled and gets its bias, and of what is returned.
    tolerance = 2e-5 if dtype == torch.float32 else 2**-8 * 2
    whole = (expected - layer.bias.double()).abs() + expected.abs() + 1
    assert ((layer(x).double() - expected).abs() <= tolerance * whole).all()


def test_packing_rounds_to_the_nearest(rng):
    weight = torch.randn(10, 150, generator=rng)
    wide8, wide4 = unpack8(*pack8(weight)), unpack4(*pack4(weight))  # [16, 192]: whole panels and groups
    assert not wide8[10:].any() and not wide4[10:].any()
    wide8, wide4 = wide8[:10], wide4[:10]
    assert (wide8[:, :150] - weight).abs().max() <= weight.abs().max() / 254 + 1e-6
    assert not wide8[:, 150:].any() and not wide4[:, 150:].any()
    groups = nn.functional.pad(weight, (0, 42)).unflatten(1, (-1, 64))
    plain = groups.abs().amax(-1, keepdim=True) / 7
    naive = ((groups / plain).round() * plain).flatten(1)[:, :150]
    assert ((wide4[:, :150] - weight) ** 2).mean() < ((naive - weight) ** 2).mean()


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_without_a_compiler_torch_computes_the_same(how, rng, monkeypatch):
    layer = Quantized(torch.randn(70, 128, generator=rng), None, 8 if how == "int8" else 4)
    x = torch.randn(3, 128, generator=rng)
    monkeypatch.setattr("chiasm.nn.quant.library", lambda: None)
    torch.testing.assert_close(layer(x), x @ layer.widened().T, rtol=1e-5, atol=1e-4)


@compiler
@pytest.mark.parametrize("how", ["int8", "int4"])
def test_a_quantized_decoder_steps_as_it_computes_whole(how):
    model = Holder(decoder(tied=True))
    names = quantize_model(model, how)
    assert len(names) == 2 * 7 + 1 and readable(model.lm)
    expected, found = both(model.lm, torch.float32)
    # The last bit of an activation decides how it is rounded to 8 bits, so single steps of rounding may differ.
    off = (found - expected).abs()
    assert off.median() < 1e-6 and off.mean() < 0.01 * expected.std()


def test_the_gate_tells_kl_and_agreement():
    model = Holder(decoder())
    before, after = copy.deepcopy(model).lm, {}
    for how in ("int8", "int4"):
        changed = copy.deepcopy(model)
        quantize_model(changed, how)
        prompts = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 20)]
        after[how] = quality(logits_of(before, prompts), logits_of(changed.lm, prompts))
    assert 0 < after["int8"].kl < after["int4"].kl < 0.2
    assert after["int8"].agreement >= after["int4"].agreement and after["int8"].positions == 32
    same = quality(logits_of(before, prompts), logits_of(before, prompts))
    assert same.kl == pytest.approx(0, abs=1e-6) and same.agreement == 1


@torch.inference_mode()
def logits_of(lm: Decoder, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    found = []  # no generator: two of them at work would leave each other's mode behind
    for ids in prompts:
        positions = torch.arange(len(ids)).unsqueeze(0)
        found.append(lm.head(lm(lm.embed(ids.unsqueeze(0)), positions, torch.ones_like(positions)))[0])
    return found


def test_names_choose_what_is_quantized():
    model = Holder(decoder())
    assert quantize(model, "int8", r"mlp", keep=[r"layers\.0\."]) == [
        f"lm.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert type(model.lm.layers[0].mlp.up_proj) is nn.Linear
    with pytest.raises(ConfigError, match="int8"):
        quantize(model, "int7")
    with pytest.raises(ConfigError, match="matches"):
        quantize(model, "int8", "nothing")


def test_what_the_kernels_do_not_know_is_left_to_torch():
    lm = decoder()
    assert readable(lm)
    lm.layers[1].mlp.up_proj = nn.Sequential(lm.layers[1].mlp.up_proj)
    assert not readable(lm)
    assert not readable(decoder().half())
    assert not readable(decoder(rope_scaling={"type": "dynamic", "factor": 2.0}))
