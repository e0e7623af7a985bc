"""The vision transformer: plain, CLIP, SigLIP and EVA-CLIP towers as configurations of one class.

Papers: ViT (arXiv:2010.11929), CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343). Reference: ``ViTModel``,
``CLIPVisionModel``, ``SiglipVisionModel`` and ``Blip2VisionModel`` of transformers 5.23, equal to 1e-5 in float32 on
every hidden state (the last one of ``Blip2VisionModel``).

Differences by design: blocks after the layer that is read are built, so that parameters are those of the published
model, but never run; a picture of another size than ``image_size`` gets interpolated positions without being asked;
there is no dropout; SigLIP's pooling head is not part of the tower. Initialisation: normal of deviation 0.02 cut at two
deviations for every weight, the class vector and the positions; biases 0; norms 1 and 0. A tower with CLIP's norm
before its blocks starts as OpenAI's: class vector and positions of deviation ``D^-0.5``, everything else as torch's
``MultiheadAttention``, ``Linear`` and ``Conv2d`` start (the port in transformers starts otherwise).

Letters: ``U`` pictures, ``N`` patches (and the class vector where it is kept), ``D`` width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.errors import ConfigError
from chiasm.nn.again import call
from chiasm.nn.attention import Attention
from chiasm.nn.depth import dropped
from chiasm.nn.mlp import MLP
from chiasm.nn.norm import LayerNorm
from chiasm.nn.patch import Patches, patch_grid
from chiasm.nn.positions import interpolate, sincos
from chiasm.registry import register
from chiasm.types import Count, Tokens


class Block(nn.Module):
    """``x += attention(norm(x))``, then ``x += mlp(norm(x))``."""

    drop_path = 0.0  # chance that training leaves a branch out (``chiasm.nn.depth``)

    def __init__(self, dim: int, heads: int, mlp: int, activation: str, eps: float):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, mlp, activation)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, asked: int | None = None) -> Tensor:
        """``x [U, N, D]``, ``mask [U, N]`` (True: may be attended to) → ``[U, N, D]``; of ``asked`` first positions
        alone ``[U, asked, D]``, for less work.
        """
        rate, training = self.drop_path, self.training
        x = x[:, :asked] + dropped(self.attn(self.norm1(x), mask, causal, asked), rate, training)
        return x + dropped(self.mlp(self.norm2(x)), rate, training)


@register("encoder", "vit")
class ViT(Encoder):
    """Patches, positions, blocks; gives the hidden states of one layer."""

    class Config(EncoderConfig):
        """Sizes are in pixels and numbers; the functions below this class give those of published towers.

        ``layer`` counts hidden states: 0 is the input of the first block, -1 the output of the last, -2 of the one
        before. ``select`` keeps the patches, the patches with the class vector first, or the class vector alone.
        ``pre_norm`` is CLIP's norm before the blocks. ``post_norm`` is the norm after them: absent, there for its
        parameters only, or applied to the layer that is read.
        """

        type: str = "vit"
        image_size: PositiveInt = 224
        patch: PositiveInt = 16
        dim: PositiveInt = 768
        depth: PositiveInt = 12
        heads: PositiveInt = 12
        mlp: PositiveInt = 3072
        channels: PositiveInt = 3
        activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
        norm_eps: float = 1e-6
        positions: Literal["learnable", "sincos"] = "learnable"
        cls: bool = True
        patch_bias: bool = True
        pre_norm: bool = False
        post_norm: Literal["none", "unused", "applied"] = "applied"
        layer: int = -1
        select: Literal["patch", "cls_patch", "cls"] = "patch"

        @model_validator(mode="after")
        def _fits(self) -> ViT.Config:
            if self.dim % self.heads:
                raise ConfigError(f"vit: width {self.dim} cannot be split into {self.heads} heads")
            if self.image_size < self.patch:
                raise ConfigError(f"vit: image_size {self.image_size} is smaller than the patch, {self.patch}")
            if not -self.depth - 1 <= self.layer <= self.depth:
                raise ConfigError(
                    f"vit: layer {self.layer} is not one of its {self.depth + 1} hidden states; "
                    f"choose one of {-self.depth - 1}..{self.depth}"
                )
            if self.select != "patch" and not self.cls:
                raise ConfigError(
                    f"vit: select={self.select!r} needs a class vector, but cls is false; use select='patch'"
                )
            if self.positions == "sincos" and self.dim % 4:
                raise ConfigError(f"vit: sincos positions need a width divisible by 4, got {self.dim}")
            return self

        @property
        def blocks_run(self) -> int:
            """How many blocks stand before the layer that is read."""
            return self.layer if self.layer >= 0 else self.depth + 1 + self.layer

        @property
        def home(self) -> tuple[int, int]:
            """The grid (rows, columns) of a picture of ``image_size``."""
            return (self.image_size // self.patch,) * 2

        def count(self, shape: tuple[int, ...]) -> Count:
            """Tokens of a picture of ``shape (channels, height, width)``. Raises DataError where it is none."""
            rows, columns = patch_grid(shape, self.channels, self.patch)
            if self.select == "cls":
                return Count(1)
            if self.select == "cls_patch":
                return Count(rows * columns + 1)
            return Count(rows * columns, (rows, columns))

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dim = config.dim
        places = config.home[0] * config.home[1] + int(config.cls)
        self.patch = Patches(config.channels, config.dim, config.patch, bias=config.patch_bias)
        self.cls = nn.Parameter(torch.empty(config.dim)) if config.cls else None
        self.positions = nn.Parameter(torch.empty(places, config.dim)) if config.positions == "learnable" else None
        self.pre_norm = LayerNorm(config.dim, eps=config.norm_eps) if config.pre_norm else None
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.mlp, config.activation, config.norm_eps) for _ in range(config.depth)
        )
        self.post_norm = LayerNorm(config.dim, eps=config.norm_eps) if config.post_norm != "none" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, as the head of this file says."""
        if self.config.pre_norm:
            return self._as_openai()
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 or name == "cls":
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def _as_openai(self) -> None:
        """What ``nn.MultiheadAttention`` does to its one matrix of queries, keys and values, and torch's own starts."""
        for vectors in (self.cls, self.positions):
            if vectors is not None:
                nn.init.normal_(vectors, std=self.dim**-0.5)
        bound = (6 / (3 * self.dim + self.dim)) ** 0.5
        for block in self.blocks:
            attn: Any = block.attn
            for layer in (attn.q, attn.k, attn.v):
                nn.init.uniform_(layer.weight, -bound, bound)
                nn.init.zeros_(layer.bias)
            nn.init.zeros_(attn.out.bias)

    def forward(self, inputs: Tensor) -> Tokens:
        """``inputs [U, channels, height, width]`` → ``Tokens(x [U, N, D])``. Raises DataError at another shape."""
        x, grid = self.patch(inputs)  # [U, rows*columns, D]
        x = self._place(x, grid)  # [U, cls + rows*columns, D]
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        for i, block in enumerate(self.blocks[: self.config.blocks_run], 1):
            last = i == self.config.blocks_run and self.config.select == "cls" and not block._forward_hooks
            x = call(block, self.recompute, x, None, False, 1 if last else None)  # nobody reads the last patches
        if self.config.select == "cls":
            x = x[:, :1]  # [U, 1, D]
        elif self.config.select == "patch" and self.cls is not None:
            x = x[:, 1:]  # [U, rows*columns, D]
        if self.post_norm is not None and self.config.post_norm == "applied":
            x = self.post_norm(x)
        return Tokens(x, grid=grid if self.config.select == "patch" else None)

    def unused(self) -> list[str]:
        """Names of the parameters that never run: blocks after the layer that is read, an unused last norm."""
        idle = tuple(f"blocks.{i}." for i in range(self.config.blocks_run, self.config.depth))
        idle += ("post_norm.",) if self.config.post_norm == "unused" else ()
        return [name for name, _ in self.named_parameters() if name.startswith(idle)]

    def _place(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches ``[U, rows·columns, D]`` → with class vector and positions ``[U, cls + rows·columns, D]``."""
        prefix = 0
        if self.cls is not None:
            x = torch.cat((self.cls.expand(len(x), 1, -1), x), dim=1)  # [U, 1 + rows*columns, D]
            prefix = 1
        if self.positions is not None:
            return x + interpolate(self.positions, self.config.home, grid, prefix)
        fixed = sincos(self.dim, grid, x.device).to(x.dtype)  # [rows*columns, D]; the class vector's place is zero
        return x + nn.functional.pad(fixed, (0, 0, prefix, 0))


# ------------------------------------------------------------------------------------------------------ published sizes

_WIDTHS = {  # width, blocks, heads, width of the perceptron
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "so400m": (1152, 27, 16, 4304),
}


def _config(size: str, patch: int, image_size: int, changes: dict[str, Any], **kind: Any) -> ViT.Config:
    dim, depth, heads, mlp = _WIDTHS[size]
    sizes = {"image_size": image_size, "patch": patch, "dim": dim, "depth": depth, "heads": heads, "mlp": mlp}
    return ViT.Config(**(sizes | kind | changes))


def _clip(size: str, patch: int, image_size: int, changes: dict[str, Any]) -> ViT.Config:
    """OpenAI's CLIP towers, read as VLMs do: the patches after the last block but one, without the last norm."""
    kind = {"activation": "quick_gelu", "norm_eps": 1e-5, "patch_bias": False, "pre_norm": True}
    return _config(size, patch, image_size, changes, **kind, post_norm="unused", layer=-2)


def _siglip(size: str, patch: int, image_size: int, changes: dict[str, Any]) -> ViT.Config:
    """SigLIP towers without their pooling head, read after the last block and its norm."""
    return _config(size, patch, image_size, changes, activation="gelu_tanh", norm_eps=1e-6, cls=False)


def vit_b16(image_size: int = 224, **changes: Any) -> ViT.Config:
    """ViT-B/16, patches after the last norm."""
    return _config("base", 16, image_size, changes)


def vit_l16(image_size: int = 224, **changes: Any) -> ViT.Config:
    """ViT-L/16."""
    return _config("large", 16, image_size, changes)


def vit_l14(image_size: int = 224, **changes: Any) -> ViT.Config:
    """ViT-L/14."""
    return _config("large", 14, image_size, changes)


def vit_h14(image_size: int = 224, **changes: Any) -> ViT.Config:
    """ViT-H/14."""
    return _config("huge", 14, image_size, changes)


def clip_vit_b32(image_size: int = 224, **changes: Any) -> ViT.Config:
    """CLIP ViT-B/32, read as VLMs do (``layer=-2``, patches, last norm unused); change what you need."""
    return _clip("base", 32, image_size, changes)


def clip_vit_b16(image_size: int = 224, **changes: Any) -> ViT.Config:
    """CLIP ViT-B/16, read as VLMs do."""
    return _clip("base", 16, image_size, changes)


def clip_vit_l14(image_size: int = 224, **changes: Any) -> ViT.Config:
    """CLIP ViT-L/14 at 224 pixels: the tower of LLaVA-1.0."""
    return _clip("large", 14, image_size, changes)


def clip_vit_l14_336(image_size: int = 336, **changes: Any) -> ViT.Config:
    """CLIP ViT-L/14 at 336 pixels: the tower of LLaVA-1.5 and LLaVA-NeXT."""
    return _clip("large", 14, image_size, changes)


def siglip_b16(image_size: int = 224, **changes: Any) -> ViT.Config:
    """SigLIP base, patch 16; published at 224, 256, 384 and 512 pixels."""
    return _siglip("base", 16, image_size, changes)


def siglip_l16(image_size: int = 256, **changes: Any) -> ViT.Config:
    """SigLIP large, patch 16; published at 256 and 384 pixels."""
    return _siglip("large", 16, image_size, changes)


def siglip_so400m_14_384(image_size: int = 384, **changes: Any) -> ViT.Config:
    """SigLIP so400m, patch 14, 384 pixels, 27 blocks. The last 6 pixels of each side are not read: 27 x 27 patches."""
    return _siglip("so400m", 14, image_size, changes)


def siglip_so400m_14_384_26(image_size: int = 384, **changes: Any) -> ViT.Config:
    """SigLIP so400m without its last block and read before the last norm: the tower of LLaVA-OneVision."""
    return _siglip("so400m", 14, image_size, {"depth": 26, "post_norm": "unused"} | changes)


def eva_clip_vit_g14(image_size: int = 224, **changes: Any) -> ViT.Config:
    """EVA-CLIP ViT-g/14 as BLIP-2, InstructBLIP and MiniGPT-4 read it: 39 of its 40 blocks, class vector kept.

    The norm at its end is LAVIS's ``ln_vision``, which trains while the tower is frozen (BLIP-2, arXiv:2301.12597).
    """
    sizes: dict[str, Any] = {"image_size": image_size, "patch": 14, "dim": 1408, "depth": 39, "heads": 16, "mlp": 6144}
    return ViT.Config(**(sizes | {"select": "cls_patch", "norm_eps": 1e-6} | changes))
