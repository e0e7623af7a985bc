"""A short mark of a base model's weights, so that an adapter is never put on another one.

A tensor's mark is made of its shape and of 64 of its values, rounded to bfloat16: a base read in float16, bfloat16 or
float32 has one mark. What is trained in full is left out, for its values change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

SAMPLED = 64


def mark(tensor: Tensor) -> Tensor:
    """Eight bytes ``[8]`` (uint8, on the tensor's device)."""
    if tensor.is_meta:
        return torch.empty(8, dtype=torch.uint8, device=tensor.device)
    flat = tensor.detach().flatten()
    places = torch.linspace(0, flat.numel() - 1, SAMPLED, device=flat.device, dtype=torch.float64).long()
    values = flat[places].to(torch.bfloat16).view(torch.int16).cpu().numpy()
    found = hashlib.sha256(repr(tuple(tensor.shape)).encode() + values.tobytes()).digest()[:8]
    return torch.tensor(list(found), dtype=torch.uint8, device=tensor.device)


def base_mark(model: nn.Module, trained: Iterable[str]) -> str:
    """The mark of all parameters but those called in ``trained``: 16 hexadecimal digits.

    Of weights that are kept in 4 bits it is the mark from before.
    """
    left_out = set(trained)
    marks = {n: mark(p) for n, p in model.named_parameters(remove_duplicate=False) if n not in left_out}
    marks |= {
        f"{n}.weight": m.origin for n, m in model.named_modules() if isinstance(getattr(m, "origin", None), Tensor)
    }
    text = "\n".join(f"{name} {bytes(marks[name].tolist()).hex()}" for name in sorted(marks))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
