"""Masked data modelling: hidden words and hidden patches are both read off the rest, patches as words of a visual code.

Paper: BEiT-3 (arXiv:2208.10442): text 15 % (50 % beside a picture), pictures 40 % in blocks, one cross-entropy. Its
pre-training code is not released; blocks are drawn as BEiT draws them (arXiv:2106.08254).

The visual tokenizer is an interface: anything that gives a number for each patch. BEiT-3's own (VQ-KD of BEiT v2) is a
trained network whose numbers can be stored and given. Built in is one that needs no training: a fixed random projection
of each patch and the nearest of fixed random vectors, BEST-RQ's quantiser (arXiv:2202.01855) on patches.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from chiasm import registry
from chiasm.config import Config
from chiasm.errors import ConfigError
from chiasm.fusion.multiway import Multiway
from chiasm.fusion.pair import Pictures, pictures_of
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.train.objectives.cross_entropy import cross_entropy
from chiasm.train.objectives.masked_words import at_hidden, hidden_words
from chiasm.types import Batch


class VisualTokenizer(Protocol):
    """Pictures to words of a visual vocabulary. Made from a table of options, called without gradients."""

    codes: int  # size of the vocabulary

    def __call__(self, pixels: Tensor) -> Tensor:
        """``pixels [B, 3, height, width]`` → ``[B, rows·columns]`` long, row by row, below ``codes``."""
        ...


class ProjectionConfig(Config):
    """``seed`` draws the projection and the vectors; the same seed gives the same code everywhere."""

    type: str = "random_projection"
    patch: PositiveInt = 16
    codes: PositiveInt = 8192
    dim: PositiveInt = 16
    seed: int = 0


class RandomProjection:
    """A patch, normed, projected to ``dim`` numbers, and the nearest of ``codes`` directions."""

    Config = ProjectionConfig

    def __init__(self, config: ProjectionConfig):
        self.config, self.codes = config, config.codes
        generator = torch.Generator().manual_seed(config.seed)
        inputs = 3 * config.patch**2
        bound = math.sqrt(6 / (inputs + config.dim))
        self.projection = (torch.rand(inputs, config.dim, generator=generator) * 2 - 1) * bound
        self.vectors = F.normalize(torch.randn(config.codes, config.dim, generator=generator), dim=-1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """See ``VisualTokenizer``."""
        patches = F.unfold(pixels.float(), self.config.patch, stride=self.config.patch).transpose(1, 2)  # [B, N, 3 p p]
        patches = F.layer_norm(patches, patches.shape[-1:])
        found = F.normalize(patches @ self.projection.to(pixels.device), dim=-1)  # [B, N, dim]
        return (found @ self.vectors.to(pixels.device).T).argmax(-1)  # [B, N]


def visual_tokenizer(options: dict[str, Any]) -> VisualTokenizer:
    """The built-in one, or the class at ``"package.module:Class"``, from its options. Raises ConfigError."""
    kind = options.get("type", "random_projection")
    if kind == "random_projection":
        return RandomProjection(ProjectionConfig.parse(options, where="visual_tokenizer"))
    if ":" not in kind:
        raise ConfigError(f"visual_tokenizer {kind!r} is unknown; 'random_projection', or 'package.module:Class'")
    made = registry.get("objective", kind)
    return made(made.Config.parse(options, where=f"visual_tokenizer {kind!r}"))  # type: ignore[no-any-return]


class MaskedDataConfig(ObjectiveConfig):
    """``covered``: the share of a picture's patches that is hidden. ``smallest``: patches of a block, at least."""

    type: str = "masked_data"
    covered: float = Field(default=0.4, gt=0, lt=1)
    smallest: PositiveInt = 16
    visual_tokenizer: dict[str, Any] = Field(default_factory=lambda: {"type": "random_projection"})


@register("objective", "masked_data")
class MaskedData:
    """One cross-entropy over hidden words and hidden patches, of pairs, of texts alone and of pictures alone."""

    Config = MaskedDataConfig

    def __init__(self, config: MaskedDataConfig):
        self.config = config
        self.tokenizer = visual_tokenizer(config.visual_tokenizer)

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """Summed over hidden words and patches; the weight is how many those are. Raises ConfigError."""
        if not isinstance(model, Multiway):
            raise ConfigError(f"objective 'masked_data' trains a multiway model, got {model.config.type}")
        pictures = pictures_of(batch, 1)[0] if batch.media else None
        covered = None if pictures is None else self._cover(model, pictures)
        words = hidden_words(batch) if batch.input_ids.shape[1] else None
        text: Tensor | None = None  # states [B, T, D]
        image: Tensor | None = None  # states [B, N, D]
        if words is not None and pictures is not None:
            joint = model.joint(words, pictures, covered=covered)
            text, image = joint.hidden[:, joint.words], joint.hidden[:, joint.picture]
        elif pictures is not None:
            image = model.image_states(pictures, covered)
        else:
            text = model.text_states(hidden_words(batch))
        found: dict[str, tuple[Tensor, int]] = {}
        if text is not None:
            found["words"] = at_hidden(model, text, batch)
        if image is not None and pictures is not None and covered is not None:
            with torch.no_grad():
                codes = self.tokenizer(pictures.pixels)  # [B, N - 1]
            self._fits(model, codes, covered)
            total, each = cross_entropy(image[:, 1:][covered], codes[covered], model.code_head)
            found["patches"] = (total, each.numel())
        weight = sum(count for _, count in found.values())
        parts = {name: (total.detach(), count) for name, (total, count) in found.items()}
        return Loss(torch.stack([total for total, _ in found.values()]).sum(), weight, parts)

    def _cover(self, model: Multiway, pictures: Pictures) -> Tensor:
        """Blocks of patches that are hidden ``[B, N - 1]``."""
        rows, columns = (n // model.config.patch for n in pictures.pixels.shape[-2:])
        found = [blocks(rows, columns, self.config.covered, self.config.smallest) for _ in pictures.sizes]
        return torch.stack(found).flatten(1).to(pictures.pixels.device)

    def _fits(self, model: Multiway, codes: Tensor, covered: Tensor) -> None:
        if codes.shape != covered.shape or self.tokenizer.codes != model.config.codes:
            raise ConfigError(
                f"the visual tokenizer gives {codes.shape[1]} words of {self.tokenizer.codes} for a picture, the model "
                f"has {covered.shape[1]} patches and a head of {model.config.codes}: set its patch and codes to the "
                "model's"
            )


def blocks(rows: int, columns: int, share: float, smallest: int) -> Tensor:
    """Rectangles drawn until ``share`` of the grid is hidden ``[rows, columns]`` bool, with sides from 3:10 to 10:3.

    The last ones are cut short, so that exactly ``round(share · rows · columns)`` patches are hidden, at least one.
    """
    wanted = max(1, round(share * rows * columns))
    hidden = torch.zeros(rows, columns, dtype=torch.bool)
    while (left := wanted - int(hidden.sum())) > 0:
        area, stretch, top, side = torch.rand(4).tolist()
        size = min(smallest, left) + area * max(0, left - smallest)
        ratio = math.exp((2 * stretch - 1) * math.log(10 / 3))
        high = min(rows, max(1, round(math.sqrt(size * ratio))))
        wide = min(columns, max(1, round(math.sqrt(size / ratio))))
        y, x = int(top * (rows - high + 1)), int(side * (columns - wide + 1))
        block = torch.zeros_like(hidden)
        block[y : y + high, x : x + wide] = True
        fresh = (block & ~hidden).nonzero()[:left]
        hidden[fresh[:, 0], fresh[:, 1]] = True
    return hidden
