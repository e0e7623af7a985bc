"""Where a number that is none comes from: the micro-batch again, with an eye on every module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def first_bad(model: nn.Module, compute: Callable[[], Tensor]) -> str:
    """The first module whose result is not finite when ``compute`` (a loss ``[]``) runs again, in words.

    Modules report in the order they finish, inner ones first, so the first report is the narrowest place. Where the
    whole forward pass is finite, the backward pass is watched. The model's gradients are left as they were.
    """
    kept = {p: p.grad for p in model.parameters()}
    forward: list[str] = []
    backward: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(_watch(name or "the model", forward, backward)))
    try:
        with torch.enable_grad():
            loss = compute()
        if not forward and loss.requires_grad:
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for p, grad in kept.items():
            p.grad = grad
    if forward:
        return "first bad module: " + forward[0]
    if not torch.isfinite(loss.detach()).all():
        return "every module's output is finite, the loss itself is not: look at the objective"
    return "the forward pass is finite; first bad gradient: " + backward[0] if backward else "it did not happen again"


def _watch(name: str, forward: list[str], backward: list[str]) -> Callable[..., None]:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if forward:
            return
        outputs = list(tensors(output))
        if all(finite(x) for x in outputs):
            for x in outputs:
                if x.requires_grad:
                    x.register_hook(lambda g: backward.append(f"at the output of {name}") if not finite(g) else None)
            return
        given = "finite" if all(finite(x) for x in tensors(inputs)) else "not finite"
        told = f"{name} ({type(module).__name__}): its inputs are {given}, its output is not"
        own = [f"{n} holds {bad(p)} of {p.numel()}" for n, p in module.named_parameters() if not finite(p)]
        forward.append(told + (f"; its {', '.join(own[:3])} values that are not" if own else ""))

    return look


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating tensors in a result, whatever it is wrapped in."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "x"):  # Tokens
        yield from tensors(value.x)
    elif hasattr(value, "hidden"):  # Output
        yield from tensors([value.hidden, value.logits, value.states])


def finite(x: Tensor) -> bool:
    """Whether every value is a number."""
    return bool(torch.isfinite(x.detach()).all())


def bad(x: Tensor) -> int:
    """How many values are none."""
    return int((~torch.isfinite(x.detach())).sum())
