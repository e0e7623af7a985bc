"""MiniGPT-5's mapper against torch's own transformer in float64, and which states it reads."""

from __future__ import annotations

import pytest
import torch

import chiasm
from chiasm.compose import build_model
from chiasm.errors import DataError
from chiasm.fusion.vokens import VokenConfig, VokenMapper, voken_loss
from chiasm.types import Batch

RNG = torch.Generator().manual_seed(8)
SIZES = {"features": 5, "dim": 16, "depth": 2, "heads": 4, "mlp": 24}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


def theirs_of(ours: VokenMapper, c: VokenConfig) -> torch.nn.Transformer:
    """The class that the reference uses, with the weights of ours."""
    made = torch.nn.Transformer(c.dim, c.heads, c.depth, c.depth, c.mlp, 0.0, norm_first=True)
    made = made.double()
    filled = {}
    for side in ("encoder", "decoder"):
        for i, block in enumerate(getattr(ours, side)):
            at = f"{side}.layers.{i}."
            kinds = {"self_attn": block.attn} | ({"multihead_attn": block.cross} if side == "decoder" else {})
            for name, attn in kinds.items():
                for leaf in ("weight", "bias"):
                    filled[f"{at}{name}.in_proj_{leaf}"] = torch.cat([getattr(getattr(attn, x), leaf) for x in "qkv"])
                    filled[f"{at}{name}.out_proj.{leaf}"] = getattr(attn.out, leaf)
            norms = [block.norm1, block.cross_norm, block.norm2] if side == "decoder" else [block.norm1, block.norm2]
            parts = {f"norm{n + 1}": norm for n, norm in enumerate(norms)}
            parts |= {"linear1": block.mlp.fc1, "linear2": block.mlp.fc2}
            for name, module in parts.items():
                filled |= {f"{at}{name}.{leaf}": getattr(module, leaf) for leaf in ("weight", "bias")}
        norm = getattr(ours, f"{side}_norm")
        filled |= {f"{side}.norm.{leaf}": getattr(norm, leaf) for leaf in ("weight", "bias")}
    made.load_state_dict({name: tensor.detach().clone() for name, tensor in filled.items()})
    return made


def test_mapper_is_torchs_transformer():
    config = VokenConfig(**SIZES)
    ours = VokenMapper(config, 12).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(noise(*parameter.shape) * 0.4)
    theirs = theirs_of(ours, config)
    states = noise(3, 8, 12)
    mine, other = states.clone().requires_grad_(), states.clone().requires_grad_()
    found = ours(mine)
    inner = torch.nn.functional.gelu(other @ ours.fc1.weight.T + ours.fc1.bias) @ ours.fc2.weight.T + ours.fc2.bias
    # sequence first, as that class reads it unless told otherwise
    expected = theirs(inner.transpose(0, 1), ours.queries[:, None].expand(-1, 3, -1)).transpose(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    weight = noise(*found.shape)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert mine.grad.abs().max() > 1e-3
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-10, rtol=1e-10)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    made = build_model(chiasm.preset("minigpt-5", tiny=True).model).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2 if parameter.ndim > 1 else 0.8)
    return made


def row(*ids: int) -> torch.Tensor:
    return torch.tensor(ids)


def batch_of(rows: list[torch.Tensor], left: bool) -> Batch:
    width = max(map(len, rows))
    ids, segments, positions = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, values in enumerate(rows):
        place = slice(width - len(values), width) if left else slice(0, len(values))
        ids[i, place], segments[i, place], positions[i, place] = values, 1, torch.arange(len(values))
    return Batch(ids, positions, segments, segments.bool(), {}, [f"s{i}" for i in range(len(rows))])


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_states_that_predict_the_vokens_are_read(model, left):
    """One position before each; a text after them changes nothing, and texts without a picture give none."""
    first = model.config.vokens.first
    run = torch.arange(first, first + 8)
    rows = [torch.cat((row(5, 6, 7), run, row(9))), row(5, 6), torch.cat((row(8), run))]
    found, owners = model.pictured(batch_of(rows, left))
    assert owners.tolist() == [0, 2] and found.shape == (2, 5, 32)
    for which, start in ((0, 3), (2, 1)):
        values = rows[which][: start + 7]  # the last voken is predicted, never read
        alone = batch_of([values], False)
        states = model(alone, logits=None).hidden[:, start - 1 : start + 7]
        torch.testing.assert_close(found[[0, 2].index(which)][None], model.mapper(states), atol=1e-5, rtol=1e-5)
        own = model(batch_of([rows[which][: start + 8]], False), logits=None).hidden
        late = own[:, start : start + 8]  # the states of the vokens themselves
        assert (model.mapper(late) - model.mapper(states)).abs().max() > 1e-3, "a shift by one must be seen"


def test_broken_runs_are_refused(model):
    first = model.config.vokens.first
    run = torch.arange(first, first + 8)
    for values in (torch.cat((row(5), run[:5])), run, torch.cat((row(5), run[:3], row(1), run[3:]))):
        with pytest.raises(DataError, match=r"sample 's0': a picture is 8 tokens, 504 to 511 in this order"):
            model.pictured(batch_of([values], False))


def test_loss_by_its_formula():
    mapped, wanted, text, painted = noise(2, 5, 4), noise(2, 5, 4), noise(1)[0], noise(1)[0]
    square = sum(float((m - w) ** 2) for m, w in zip(mapped.flatten(), wanted.flatten(), strict=True)) / 40
    expected = 0.01 * float(text) + float(painted) + 0.1 * square
    assert float(voken_loss(text, mapped, wanted, painted)) == pytest.approx(expected, abs=1e-12)
