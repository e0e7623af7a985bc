"""Head and cross-entropy in chunks against torch's own over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.train.objectives import cross_entropy as module
from chiasm.train.objectives.cross_entropy import cross_entropy


class Head(nn.Module):
    """A linear head with a low-rank update beside it, and logits that saturate: no bare matrix."""

    def __init__(self, dim: int, vocab: int, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def values(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype))

        self.weight, self.down, self.up = values(vocab, dim), values(4, dim), values(vocab, 4)

    def forward(self, states: Tensor) -> Tensor:
        """``[n, D]`` → ``[n, V]``."""
        return 20 * torch.tanh((F.linear(states, self.weight) + F.linear(F.linear(states, self.down), self.up)) / 20)


def inputs(dtype: torch.dtype, n: int = 37) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 24, generator=generator).to(dtype), torch.randint(0, 151, (n,), generator=generator)


def plain(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    return F.cross_entropy(head(states).float(), targets, reduction="none")


@pytest.mark.parametrize("chunk", [1, 5, 37, 100, None])
def test_equals_the_plain_loss_and_its_gradients(chunk: int | None):
    values, targets = inputs(torch.float32)
    head = Head(24, 151, torch.float32)
    found = []
    for chunked in (False, True):
        base = values.clone().requires_grad_()
        states = base * 1.5  # so that the states have a graph behind them
        if chunked:
            total, losses = cross_entropy(states, targets, head, chunk)
            assert not losses.requires_grad
        else:
            losses = plain(states, targets, head)
            total = losses.sum()
        (total * 0.25).backward()
        found.append([total.detach(), losses.detach(), base.grad, *(p.grad for p in head.parameters())])
        head.zero_grad()
    for ours, reference in zip(found[1], found[0], strict=True):
        assert (ours - reference).abs().max() <= 1e-6 * max(1.0, float(reference.abs().max()))


def test_shared_weight_gets_the_sum_of_both_uses():
    """A tied head: the embedding's gradient and the head's meet in one tensor."""
    values, targets = inputs(torch.float32)
    weight = nn.Parameter(torch.randn(151, 24, generator=torch.Generator().manual_seed(2)))
    gradients = []
    for chunked in (False, True):
        states = F.embedding(targets.roll(1), weight) + values
        total = (
            cross_entropy(states, targets, lambda s: F.linear(s, weight), 7)[0]
            if chunked
            else plain(states, targets, lambda s: F.linear(s, weight)).sum()
        )
        total.backward()
        gradients.append(weight.grad)
        weight.grad = None
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-6 * gradients[0].abs().max()


def test_bfloat16_sums_weight_gradients_in_float32():
    """256 chunks of one row: each far below the spacing of their sum in bfloat16, which would swallow them."""
    values, targets = inputs(torch.bfloat16, 256)
    head = Head(24, 151, torch.bfloat16)
    total, _ = cross_entropy(values, targets, head, 1)
    total.backward()
    ours = head.weight.grad.float()
    exact = Head(24, 151, torch.bfloat16).float()
    plain(values.float(), targets, exact).sum().backward()
    reference = exact.weight.grad
    head.zero_grad()
    plain(values, targets, head).sum().backward()
    theirs = (head.weight.grad.float() - reference).norm() / reference.norm()
    assert (ours - reference).norm() / reference.norm() <= 1.5 * theirs
    naive = torch.zeros_like(head.weight)
    for state, target in zip(values, targets, strict=True):
        head.zero_grad()
        plain(state[None], target[None], head).sum().backward()
        naive += head.weight.grad
    assert (ours - reference).norm() < 0.5 * (naive.float() - reference).norm()


def test_frozen_head_and_frozen_states():
    values, targets = inputs(torch.float32)
    head = Head(24, 151, torch.float32).requires_grad_(False)
    states = values.clone().requires_grad_()
    cross_entropy(states, targets, head, 5)[0].backward()
    assert states.grad is not None and head.weight.grad is None
    total, losses = cross_entropy(values, targets, head, 5)
    assert not total.requires_grad and torch.allclose(losses, plain(values, targets, head), atol=1e-6)
    head.requires_grad_(True)
    cross_entropy(values, targets, head, 5)[0].backward()
    assert head.weight.grad is not None and head.up.grad is not None


def test_no_target_gives_zero_with_a_graph():
    states = torch.randn(0, 24).requires_grad_()
    total, losses = cross_entropy(states, torch.zeros(0, dtype=torch.long), Head(24, 151, torch.float32))
    total.backward()
    assert float(total.detach()) == 0.0 and losses.shape == (0,)


def test_only_a_chunk_of_logits_is_alive(monkeypatch: pytest.MonkeyPatch):
    """The head never sees more rows than the budget allows."""
    values, targets = inputs(torch.float32)
    monkeypatch.setattr(module, "BUDGET", 4 * 151 * 6)
    weight = torch.randn(151, 24)
    seen = []

    def head(states: Tensor) -> Tensor:
        seen.append(len(states))
        return F.linear(states, weight)

    cross_entropy(values.requires_grad_(), targets, head)[0].backward()
    assert max(seen) == 6 and sum(seen) == 37 + 1
