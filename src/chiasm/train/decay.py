"""Layer-wise decay of the learning rate: a block learns more slowly the lower it stands.

Paper: ELECTRA (arXiv:2003.10555), BEiT (arXiv:2106.08254). Reference: ``LayerDecayValueAssigner`` of BEiT-3
(microsoft/unilm 768a3c8): with ``n`` blocks, block ``i`` has ``decay^(n - i)`` of the rate, what stands below them
``decay^(n + 1)``, what stands on top all of it.
"""

from __future__ import annotations

from torch import nn

from chiasm.errors import ConfigError


def decays(model: nn.Module, decay: float) -> dict[str, float]:
    """The share of the learning rate of every parameter that has less than all of it, by name.

    A stack is a module's one list of blocks. Below it stand the module's own vectors and what is built before the list
    (patches, words, positions); scalars stand on top. Raises ConfigError for a model without a stack, or where one
    module has two.
    """
    found: dict[str, float] = {}
    stacks: list[str] = []
    for name, module in model.named_modules():
        lists = [key for key, child in module.named_children() if isinstance(child, nn.ModuleList) and len(child)]
        if not lists or isinstance(module, nn.ModuleList) or any(name.startswith(stack) for stack in stacks):
            continue
        if len(lists) > 1:
            raise ConfigError(
                f"layer_decay {decay}: {name or 'the model'} has several stacks ({', '.join(lists)}), and which stands "
                "on which is not said; give rates by name in the plan"
            )
        prefix = f"{name}." if name else ""
        stacks.append(f"{prefix}{lists[0]}.")
        found |= _of_stack(module, prefix, lists[0], decay)
    if not stacks:
        raise ConfigError(f"layer_decay {decay}: this model has no stack of blocks; take layer_decay out of the stage")
    return found


def _of_stack(module: nn.Module, prefix: str, key: str, decay: float) -> dict[str, float]:
    blocks = module.get_submodule(key)
    depth = len(blocks)  # type: ignore[arg-type]
    found = {
        f"{prefix}{name}": decay ** (depth + 1)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim
    }
    for child_name, child in module.named_children():
        if child_name == key:
            break
        found |= {f"{prefix}{child_name}.{name}": decay ** (depth + 1) for name, _ in child.named_parameters()}
    for i, block in enumerate(blocks.children()):
        found |= {f"{prefix}{key}.{i}.{name}": decay ** (depth - i) for name, _ in block.named_parameters()}
    return found


__all__ = ["decays"]
