"""Contrastive objectives: every picture of a step against every text of it.

``"contrastive"`` is CLIP's (arXiv:2103.00020): the right text among all texts and the right picture among all
pictures, ½ [CE(i → t) + CE(t → i)], a mean over the N pairs. ``"sigmoid"`` is SigLIP's (arXiv:2303.15343): each of the
N² pairs is told right or wrong for itself, - Σ_ij log σ(z_ij (s·x_i·y_j + b)) / N.

References: open_clip's ``ClipLoss(local_loss=True, gather_with_grad=True)`` and ``SigLipLoss``; GradCache
(arXiv:2101.06983) for steps that memory does not hold.

Differences by design: all micro-batches of all ranks are one step with N pairs, so ``accumulate`` makes the step larger
and never the comparison smaller; the scale's gradient is taken once, over the whole step (open_clip's ``accum-freq``
multiplies it); ranks may have unequal shares, so a last batch is used as it is; what to do with equal texts or pictures
in a step is a choice. N² logits never stand in memory at once. How far the scale may grow is the model's own affair
(``max_scale``); the loop holds it there after each step.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chiasm.errors import ConfigError, DataError
from chiasm.registry import register
from chiasm.train.distributed import ALONE, Alone
from chiasm.train.objectives.base import Loss, ObjectiveConfig, Rows, StepObjective
from chiasm.train.objectives.exchange import gathered, met, ring
from chiasm.types import Batch

BUDGET = 64 * 2**20
"""Bytes of float32 logits that are computed together, unless ``chunk`` says how many rows."""

Duplicates = Literal["negatives", "positives", "left_out"]


class ContrastiveConfig(ObjectiveConfig):
    """``duplicates``: what other pairs with an equal text or an equal picture count as.

    ``negatives``: as any other (published CLIP and SigLIP; harmless where captions are rarely equal). ``positives``: as
    right answers too. ``left_out``: they are not compared. Two texts are equal if their tokens are, two pictures if
    their pixels are as the model sees them.

    In the softmax the probabilities of the right answers are added. (Shares of 1/k for each of k right answers, the
    usual way, would be no choice at all: equal texts have equal logits, so loss and gradient are those of
    ``negatives``.)
    """

    type: str = "contrastive"
    duplicates: Duplicates = "negatives"
    chunk: int | None = Field(default=None, gt=0)  # rows whose logits are computed together; None: as BUDGET says


class SigmoidConfig(ContrastiveConfig):
    """As for ``contrastive``."""

    type: str = "sigmoid"


class Compared(StepObjective):
    """What both losses share: the rows of a batch, and the scale's clamp."""

    Config = ContrastiveConfig

    def embed(self, model: Any, batch: Batch) -> Rows:
        """``image`` and ``text``, unit vectors ``[n, D]`` each. Raises DataError unless each sample has one picture."""
        check_pairs(batch)
        vectors = {"image": model.embed_images(batch), "text": model.embed_texts(batch)}  # [n, D] each
        if not any(batch.ids):  # a stand-in for a rank without samples: its parts are run, its rows do not count
            vectors = {name: v[:0] for name, v in vectors.items()}
        if self.config.duplicates == "negatives":
            return Rows(vectors)
        keys = {"image": picture_keys(batch), "text": text_keys(batch)}
        return Rows(vectors, {name: k[: len(vectors[name])] for name, k in keys.items()})

    def bounds(self, model: Any) -> dict[str, tuple[float, float]]:
        """The model's own bounds of its scale (100 in CLIP's paper)."""
        return model.scale_bounds()  # type: ignore[no-any-return]

    def compare(self, model: Any, rows: Rows | None, ranks: Alone = ALONE) -> Loss:
        """See the contract. The weight is the number of this rank's pairs."""
        rows, sizes = met(rows, ranks, model.device)
        if rows is None:
            return Loss(torch.zeros((), device=model.device), 0)
        images, texts = (wide(rows.vectors[name]) for name in ("image", "text"))  # [n, D] each
        keys = torch.stack([rows.keys[name] for name in sorted(rows.keys)], 1) if rows.keys else None  # [n, 2]
        scale = wide(model.scale())  # []
        total, right = self.loss(images, texts, scale, keys, model, sizes, ranks)  # [], []
        n = len(images)
        parts = {"in_batch_accuracy": (right, n), "scale": (scale.detach() * n, n)}
        return Loss(total, n, parts)

    def loss(
        self, images: Tensor, texts: Tensor, scale: Tensor, keys: Tensor | None, model: Any, sizes: Any, ranks: Alone
    ) -> tuple[Tensor, Tensor]:
        """The sum over this rank's pairs, and how many of its pictures are nearest to a right text."""
        raise NotImplementedError


@register("objective", "contrastive")
class Contrastive(Compared):
    """CLIP's loss. Each rank computes the logits of its own rows against all, n × N, and gradients reach all rows."""

    Config = ContrastiveConfig

    def loss(
        self, images: Tensor, texts: Tensor, scale: Tensor, keys: Tensor | None, model: Any, sizes: Any, ranks: Alone
    ) -> tuple[Tensor, Tensor]:
        """See ``Compared``."""
        width = images.shape[1]
        both = gathered(torch.cat([images, texts], 1), sizes, ranks)  # [N, 2D]
        every_key = None if keys is None else gathered(keys, sizes, ranks)  # [N, 2]
        every_image, every_text = both.split(width, 1)  # [N, D] each
        first = sum(sizes[: ranks.rank])
        rows = self.config.chunk or max(1, BUDGET // (4 * max(1, len(both))))
        total, right = 0.0 * both.sum(), images.new_zeros(())  # the sum keeps a rank without pairs in the graph
        for start in range(0, len(images), rows):
            span = slice(start, start + rows)
            own = torch.arange(first + start, first + start + len(images[span]), device=images.device)  # [r]
            same = None if keys is None or every_key is None else alike(keys[span], every_key)  # [r, N]
            left_out = self.config.duplicates == "left_out"
            for near, far in ((images, every_text), (texts, every_image)):
                loss, hits = checkpoint(  # logits are computed again in backward, not kept
                    choose, near[span], far, scale, own, same, left_out, use_reentrant=False
                )
                total = total + 0.5 * loss
                right = right + (hits if near is images else 0)
        return total, right


def choose(
    near: Tensor, far: Tensor, scale: Tensor, own: Tensor, same: Tensor | None = None, left_out: bool = False
) -> tuple[Tensor, Tensor]:
    """How surely each of ``near [r, D]`` finds one of its right ones among ``far [N, D]``: cross-entropies, summed, and
    the hits.

    ``own [r]`` is the place of each row's partner, ``same [r, N]`` where others are equal to it.
    """
    logits = scale * near @ far.T  # [r, N]
    own = own.unsqueeze(1)  # [r, 1]
    right = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, own, True)  # [r, N]
    if same is not None and left_out:
        logits = logits.masked_fill(same & ~right, -math.inf)
    elif same is not None:
        right = right | same
    wanted = logits.masked_fill(~right, -math.inf).logsumexp(1)  # [r], of the right ones together
    hits = right.gather(1, logits.detach().argmax(1, keepdim=True)).sum()
    return (logits.logsumexp(1) - wanted).sum(), hits


@register("objective", "sigmoid")
class Sigmoid(Compared):
    """SigLIP's loss. Texts go round the ranks in a ring; a rank never holds more than two blocks of them."""

    Config = SigmoidConfig

    def loss(
        self, images: Tensor, texts: Tensor, scale: Tensor, keys: Tensor | None, model: Any, sizes: Any, ranks: Alone
    ) -> tuple[Tensor, Tensor]:
        """See ``Compared``. Raises ConfigError for a model without the bias of this loss."""
        if model.bias is None:
            raise ConfigError(
                "objective 'sigmoid' needs the logits' bias, which this model does not have; set model.bias (SigLIP "
                "starts at -10) or use objective 'contrastive'"
            )
        settings = Settings(sizes, ranks, self.config.chunk, self.config.duplicates == "left_out")
        return _Sigmoid.apply(images, texts, scale, wide(model.bias), keys, settings)  # type: ignore[no-any-return]

    def compare(self, model: Any, rows: Rows | None, ranks: Alone = ALONE) -> Loss:
        """See ``Compared``."""
        loss = super().compare(model, rows, ranks)
        if loss.weight and model.bias is not None:
            bias = float(loss.weight) * wide(model.bias.detach())
            loss.parts = {**loss.parts, "bias": (bias, loss.weight)}
        return loss


class Settings:
    """What the ring needs beside tensors."""

    def __init__(self, sizes: list[int], ranks: Alone, chunk: int | None, left_out: bool):
        self.sizes, self.ranks, self.chunk, self.left_out = sizes, ranks, chunk, left_out


class _Sigmoid(torch.autograd.Function):
    """The sum over all pairs of this rank's pictures with everyone's texts, its gradients made in the same pass."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, keys: Tensor | None, given: Settings
    ) -> Any:
        """``images``, ``texts [n, D]``, ``scale``, ``bias []``, ``keys [n, 2]`` → the sum and the hits, ``[]`` each."""
        n = len(images)
        slopes = {"images": torch.zeros_like(images), "scale": torch.zeros_like(scale), "bias": torch.zeros_like(bias)}
        total = images.new_zeros(())
        best = images.new_full((n,), -math.inf)  # the highest logit of each picture so far, and whether it is right
        hit = torch.zeros(n, dtype=torch.bool, device=images.device)

        def visit(held: Tensor, marks: Tensor, owner: int) -> Tensor:
            nonlocal total, best, hit
            found = []
            rows = given.chunk or max(1, BUDGET // (4 * max(1, n)))
            for start in range(0, len(held), rows):
                part, mark = held[start : start + rows], marks[start : start + rows]  # [c, D], [c, K]
                own = torch.zeros(n, len(part), dtype=torch.bool, device=images.device)  # [n, c]
                if owner == given.ranks.rank:
                    own.diagonal(-start).fill_(True)
                same = own if keys is None else own | alike(keys, mark)
                sign = torch.where(own if given.left_out else same, 1.0, -1.0).to(images.dtype)  # [n, c]
                cosines = images @ part.T  # [n, c]
                logits = scale * cosines + bias  # [n, c]
                losses = F.softplus(-sign * logits)  # [n, c]
                slope = -sign * torch.sigmoid(-sign * logits)  # [n, c]
                if given.left_out:
                    counted = own | ~same
                    losses, slope = losses * counted, slope * counted
                total = total + losses.sum()
                slopes["images"] += scale * slope @ part
                slopes["scale"] += (slope * cosines).sum()
                slopes["bias"] += slope.sum()
                found.append(scale * slope.T @ images)  # [c, D]
                if n:
                    top, place = logits.max(1)  # [n]
                    hit = torch.where(top > best, same.gather(1, place.unsqueeze(1)).squeeze(1), hit)
                    best = torch.maximum(best, top)
            return torch.cat(found) if found else torch.zeros_like(held)

        marks = keys if keys is not None else images.new_zeros(n, 0, dtype=torch.int64)
        slopes["texts"] = ring(texts, marks, given.sizes, given.ranks, visit)  # [n, D]
        ctx.slopes = slopes
        right = hit.sum()
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """The gradients that ``forward`` made, times the sum's own ``slopes[0] []``."""
        made = [ctx.slopes[name] * slopes[0] for name in ("images", "texts", "scale", "bias")]
        return *made, None, None


# ---------------------------------------------------------------------------------------------------------------- keys


def alike(rows: Tensor, columns: Tensor) -> Tensor:
    """Where any key of a row is that of a column: ``[r, K]``, ``[c, K]`` → ``[r, c]`` bool."""
    return (rows.unsqueeze(1) == columns.unsqueeze(0)).any(-1)


def text_keys(batch: Batch) -> Tensor:
    """A number ``[B]`` for each text, equal where its tokens are."""
    ids = torch.where(batch.segment_ids > 0, batch.input_ids + 1, 0)  # [B, T]; padding adds nothing
    return (ids * _factors(int(batch.positions.max()) + 1, ids.device)[batch.positions]).sum(1)  # [B], modulo 2^64


def picture_keys(batch: Batch) -> Tensor:
    """A number ``[B]`` for each picture, equal where its pixels are."""
    media = batch.media["image"]
    pixels = media.inputs  # [B, 3, height, width]
    if media.features is not None:  # stored under a hash of the picture's content; there may be no pixels
        marks = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in media.keys]
        return torch.tensor([int.from_bytes(m, "big", signed=True) for m in marks], device=pixels.device)  # [B]
    found = []
    for picture in pixels:  # one at a time: whole numbers take twice the room
        bits = picture.float().contiguous().view(torch.int32).flatten().to(torch.int64)  # [pixels]
        found.append((bits * _factors(len(bits), bits.device)).sum())
    return torch.stack(found)  # [B]


def _factors(count: int, device: torch.device) -> Tensor:
    """Odd whole numbers ``[count]``, always the same; sums of products with them hash a vector, modulo 2^64."""
    generator = torch.Generator().manual_seed(2103)
    drawn = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    return (2 * drawn + 1).to(device)


def check_pairs(batch: Batch) -> None:
    """Raises DataError unless each sample has exactly one picture of one unit."""
    media = batch.media.get("image")
    owners = media.owners if media is not None else []
    for row, id in enumerate(batch.ids):
        if owners.count(row) != 1:
            raise DataError(
                f"sample {id!r} has {owners.count(row)} pictures; a contrastive objective compares one picture with "
                "one text, so each sample must have exactly 1",
                "medium",
            )
    if media is not None and any(layout.units != 1 for layout in media.layouts):
        worst = next(i for i, layout in enumerate(media.layouts) if layout.units != 1)
        raise DataError(
            f"sample {batch.ids[owners[worst]]!r}: its picture is cut into {media.layouts[worst].units} units; two "
            "towers take whole pictures: leave tiling out of the front end",
            "medium",
        )


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
