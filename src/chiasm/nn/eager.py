"""Functions that stay out of compiled programs, told to the compiler when there is one.

``torch.compiler.disable`` says the same where a function is defined, and imports the compiler for it: 70 MiB and a
second or two of every process, most of which compile nothing. Whatever compiles modules of this package calls
``leave_out`` first.
"""

from __future__ import annotations

from typing import Any

_FOUND: list[tuple[Any, str]] = []  # where they are, and by what name


def eager(owner: Any, name: str) -> None:
    """Note that ``owner.name``, a function of a module or a method of a class, is never part of a program."""
    _FOUND.append((owner, name))


def leave_out() -> None:
    """Have the compiler call the noted functions as they are. What was told before is not told again."""
    import torch

    while _FOUND:
        owner, name = _FOUND.pop()
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))
