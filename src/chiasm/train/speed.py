"""What a stage asks of a model's blocks: activation checkpointing and compiling, which change nothing that is computed,
and stochastic depth, which does.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from chiasm.nn.depth import set_depth
from chiasm.train.recipe import Stage


def prepare(model: nn.Module, stage: Stage) -> None:
    """Give the model's parts the stage's ``recompute``, its blocks ``drop_path``, and compile them where asked.

    A block is an element of a list of like modules (``layers``, ``blocks``): one program serves all of a list.
    """
    for part in parts(model):
        part.recompute = stage.recompute
        inner: Any = getattr(part, "model", None)  # a model of transformers has its own way
        if hasattr(inner, "gradient_checkpointing_enable"):
            if stage.recompute:
                inner.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                inner.gradient_checkpointing_disable()
    set_depth(model, stage.drop_path)
    if stage.compile:
        for block in blocks(model):
            block.compile(dynamic=True)


def settle(model: nn.Module) -> None:
    """The model as it was before ``prepare``."""
    set_depth(model, 0.0)
    for part in parts(model):
        part.recompute = False
        inner: Any = getattr(part, "model", None)
        if hasattr(inner, "gradient_checkpointing_disable"):
            inner.gradient_checkpointing_disable()
    for block in blocks(model):
        block._compiled_call_impl = None  # what Module.compile sets


def parts(model: nn.Module) -> list[Any]:
    """The modules with blocks that can be computed again: language models, encoders, fusions with own layers."""
    return [module for module in model.modules() if isinstance(getattr(module, "recompute", None), bool)]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the language model, the encoders, and of what stands between the layers of the first."""
    between = [model.cross] if isinstance(getattr(model, "cross", None), nn.ModuleList) else []
    lists = (
        child for part in [*parts(model), *between] for child in part.modules() if isinstance(child, nn.ModuleList)
    )
    return [block for found in lists if len({type(block) for block in found}) == 1 for block in found]
