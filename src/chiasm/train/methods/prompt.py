"""Prompt tuning: learned vectors in front of every conversation, or beside the patches of every picture.

Papers: The Power of Scale for Parameter-Efficient Prompt Tuning (arXiv:2104.08691); Visual Prompt Tuning, its shallow
form (arXiv:2203.12119). Reference: ``peft``, ``PROMPT_TUNING``.

In the segment world: each segment gets its own copy in front of its first position, with positions 0 … P-1; its real
positions move up by P. Packed conversations therefore see what they would see alone, and padding, on either side, stays
padding. Hidden states come back at the real positions only: nothing outside of the language model knows of the prompt.
The cache holds it like any other columns (``LM.extra``), and ``max_positions`` is P less.

Differences by design: the reference pads in front of the whole batch; here the prompt stands next to the text.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from chiasm.encoders.vit import ViT
from chiasm.errors import ConfigError
from chiasm.lm.base import LM
from chiasm.registry import register
from chiasm.train.methods.base import Method, MethodConfig


class PromptConfig(MethodConfig):
    """``tokens``: how many vectors."""

    type: str = "prompt"
    tokens: int = Field(default=16, gt=0)


class SoftPrompt(nn.Module):
    """The learned vectors ``[P, D]``; stands below the part whose input it widens."""

    trained = ("tokens",)
    beside = True

    def __init__(self, method: PromptConfig, drawn: Tensor):
        super().__init__()
        self.method = method
        self.tokens = nn.Parameter(drawn)
        self._places: Tensor | None = None

    def before(self, lm: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The hook before a language model: ``x [B, T, D]``, ``positions``, ``segments`` ``[B, T]`` get the prompt."""
        x, positions, segments, *rest = inputs
        p = len(self.tokens)
        if x.is_meta:  # shapes only: one conversation a row
            self._places = torch.arange(p, p + x.shape[1], device=x.device).expand(positions.shape)
            x = torch.cat((self.tokens.expand(len(x), -1, -1), x), dim=1)  # [B, P + T, D]
            return (x, *(torch.empty(x.shape[:2], device=x.device, dtype=torch.long) for _ in range(2)), *rest), named
        starts = (segments != 0) & (positions == 0)  # [B, T]
        cached = named.get("cache") is not None or bool(rest and rest[0] is not None)
        if cached and x.shape[1] == 1 and not bool(starts.any()):  # a step of generation
            self._places = None
            return (x, positions + p, segments, *rest), named
        before = starts.cumsum(1)  # [B, T]: prompts that stand before each position
        places = torch.arange(x.shape[1], device=x.device) + p * before  # [B, T]
        wide = x.shape[1] + p * int(before[:, -1].max())
        rows, columns = torch.nonzero(starts, as_tuple=True)  # [S]
        firsts = rows * wide + places[rows, columns] - p  # [S]
        slots = (firsts.unsqueeze(1) + torch.arange(p, device=x.device)).flatten()  # [S * P]
        self._places = places

        def spread(values: Tensor, prompt: Tensor) -> Tensor:
            """``values [B, T, ...]`` at their places, ``prompt [S * P, ...]`` in the slots, zero elsewhere."""
            index = places.view(*places.shape, *[1] * (values.ndim - 2)).expand_as(values)
            empty = values.new_zeros(len(values), wide, *values.shape[2:])
            filled = empty.scatter(1, index, values).flatten(0, 1)  # [B * wide, ...]
            return filled.index_copy(0, slots, prompt.to(values.dtype)).view_as(empty)

        moved = positions + p * (segments != 0)
        counted = torch.arange(p, device=x.device).repeat(len(rows))  # [S * P]
        return (
            spread(x, self.tokens.repeat(len(rows), 1)),
            spread(moved, counted),
            spread(segments, segments[rows, columns].repeat_interleave(p)),
            *rest,
        ), named

    def after(self, lm: nn.Module, inputs: Any, hidden: Tensor) -> Tensor:
        """The hook after it: hidden states of the real positions, ``[B, T, D]``."""
        places, self._places = self._places, None
        if places is None:
            return hidden
        return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def enter(self, block: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """The hook before a tower's first block: ``[U, N, D]`` → ``[U, N + P, D]``."""
        x, *rest = inputs
        return (torch.cat((x, self.tokens.to(x.dtype).expand(len(x), -1, -1)), dim=1), *rest)

    def leave(self, block: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The hook after a tower's last block: ``[U, N + P, D]`` → ``[U, N, D]``."""
        return output[:, : -len(self.tokens)]


@register("method", "prompt")
class Prompt(Method):
    """Learned vectors in the input of a language model or of a vision transformer."""

    Config = PromptConfig

    def find(self, model: nn.Module, parameters: set[str]) -> list[str]:
        """See the contract."""
        parts = [name for name, module in model.named_modules() if isinstance(module, (LM, ViT))]
        found = [part for part in parts if any(name.startswith(part + ".") for name in parameters)]
        if not found:
            raise ConfigError(
                f"{self.config.label()} finds no language model and no 'vit' among {len(parameters)} parameters; a "
                "prompt goes in front of one of these"
            )
        return found

    def install(self, model: nn.Module, name: str) -> None:
        """See the contract."""
        part: Any = model.get_submodule(name)
        like = next(part.parameters())
        drawn = (0.02 * torch.randn(self.config.tokens, part.dim)).to(like.device, like.dtype)
        prompt = SoftPrompt(self.config, drawn)
        if isinstance(part, ViT):
            _in_tower(part, prompt, name)
        elif isinstance(part, LM) and not part.encoder_decoder:
            part.add_module("prompt", prompt)
            part.register_forward_pre_hook(prompt.before, with_kwargs=True)
            part.register_forward_hook(prompt.after)
            part.extra = self.config.tokens
            if part.max_positions is not None:
                part.max_positions -= self.config.tokens
        else:
            raise ConfigError(f"{self.config.label()}: {name} reads and writes with two stacks; use lora(...) there")


def _in_tower(tower: ViT, prompt: SoftPrompt, name: str) -> None:
    run = tower.config.blocks_run
    if run == 0:
        raise ConfigError(f"{prompt.method.label()}: {name} runs no block, so nothing would read the prompt")
    tower.add_module("prompt", prompt)
    tower.blocks[0].register_forward_pre_hook(prompt.enter)
    tower.blocks[run - 1].register_forward_hook(prompt.leave)
