"""BLIP-2's first stage: three tasks that teach queries to look at what a text can tell.

Paper: BLIP-2 (arXiv:2301.12597), section 3.1. Reference: salesforce/LAVIS 506965b ``blip2_qformer.py``.

    contrast   s_ij = max_k <q_ik, t_j> / τ;  ½ [CE(s_i·) + CE(s_·i)] over all pairs of the step, smoothed by 0.1
    matching   each pair is right; its picture with another's text and its text with another's picture are wrong: the
               others drawn from softmax(s) over the step, on whatever rank they are
    writing    CE of each word after the first from the picture and the words before it, smoothed by 0.1
    loss       the sum of the three means, over pairs, over pairs right and wrong, and over words

No momentum encoder and no queue, unlike ALBEF and BLIP.

Differences by design: all micro-batches of all ranks are one step, so the loss of several ranks is that of one
(LAVIS's gathered vectors carry no gradient, so its gradient depends on the number of processes); a pair with an equal
text or an equal picture is not drawn as a negative (LAVIS draws it; ``negatives="all"``), and a step of one pair has
no negatives (LAVIS draws the pair itself and calls it wrong); what is drawn is a function of the step's samples, so
that it is the same however they are dealt to ranks and when a run is resumed; vectors and similarities are float32.

``targets="pictures"`` is LAVIS's fine-tuning for retrieval, where a picture has several texts: all of them are right.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chiasm.errors import ConfigError
from chiasm.fusion.query_text import COLDEST, QueryText
from chiasm.registry import register
from chiasm.train.distributed import ALONE, Alone
from chiasm.train.objectives.base import Loss, ObjectiveConfig, Rows, StepObjective
from chiasm.train.objectives.contrastive import alike, picture_keys, text_keys
from chiasm.train.objectives.exchange import gathered, met
from chiasm.types import Batch, Condition, Tokens


class Stage1Config(ObjectiveConfig):
    """``contrast``, ``match``, ``write``: weights of the tasks, 0 leaves one out. ``smoothing`` is that of labels.

    ``hardness`` multiplies the similarities that wrong pairs are drawn by: 1 as published, 0 draws them evenly.
    ``chunk``: pairs whose matching is computed together, and computed again in the backward pass; None: all at once.
    """

    type: str = "blip2_stage1"
    contrast: float = Field(default=1.0, ge=0)
    match: float = Field(default=1.0, ge=0)
    write: float = Field(default=1.0, ge=0)
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    negatives: Literal["distinct", "all"] = "distinct"
    hardness: float = Field(default=1.0, ge=0)
    targets: Literal["pairs", "pictures"] = "pairs"
    chunk: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _some(self) -> Stage1Config:
        if not self.contrast and not self.match and not self.write:
            raise ConfigError("blip2_stage1: contrast, match and write are all 0; give one of them a weight")
        return self


@register("objective", "blip2_stage1")
class Stage1(StepObjective):
    """Contrast, matching with hard negatives, and writing, over all samples of a step."""

    Config = Stage1Config

    def bounds(self, model: Any) -> dict[str, tuple[float, float]]:
        """The temperature stays above 0."""
        return {} if getattr(model, "temperature", None) is None else {"temperature": (COLDEST, float("inf"))}

    def embed(self, model: Any, batch: Batch) -> Rows:
        """Vectors of queries and texts, the pictures' features, the texts' ids, and each text's loss of writing."""
        if not isinstance(model, QueryText):
            raise ConfigError(
                "objective 'blip2_stage1' trains a model of type 'query_text', got "
                f"{type(model).__name__}: it needs the heads of the first stage"
            )
        if hasattr(model.bridge.queries, "full_tensor"):
            raise ConfigError(
                "objective 'blip2_stage1' runs its tasks apart, on the whole model, but this rank holds a piece of it: "
                "set parallel: replicate"
            )
        tokens, text = model.look(batch), model.text(batch)
        images, texts = model.apart(tokens, text)  # [n, K, d], [n, d]
        vectors = {"image": images.flatten(1), "text": texts}
        if self.config.match:
            room = model.bridge.body.text.positions.num_embeddings  # type: ignore[union-attr]
            ids = text.ids.masked_fill(~text.mask, -1).float()  # whole numbers below 2^24 are exact
            vectors["ids"] = F.pad(ids, (0, room - ids.shape[1]), value=-1.0)  # [n, positions], -1 is padding
            vectors["features"] = tokens.x.flatten(1)  # [n, N*D]
        if self.config.write:
            vectors["written"], vectors["words"] = self._written(model, tokens, text)  # [n, 1] each
        keys = {"image": picture_keys(batch), "text": text_keys(batch)}
        if not any(batch.ids):  # a stand-in for a rank without samples: its parts are run, its rows do not count
            vectors, keys = ({n: v[:0] for n, v in table.items()} for table in (vectors, keys))
        return Rows(vectors, keys)

    def compare(self, model: Any, rows: Rows | None, ranks: Alone = ALONE) -> Loss:
        """See the contract. The weight is the number of this rank's pairs."""
        rows, sizes = met(rows, ranks, model.device)
        if rows is None:
            return Loss(torch.zeros((), device=model.device), 0)
        step = Step(model, rows, sizes, ranks)
        n, total = len(rows), 0.0 * step.graph  # the sum keeps a rank without pairs in the graph
        parts: dict[str, tuple[float | Tensor, float | Tensor]] = {}
        if self.config.contrast:
            loss = self._contrast(step)
            total, parts["contrast"] = total + self.config.contrast * loss, (loss.detach(), n)
            parts["temperature"] = (model.heat().detach() * n, n)
        own = step.features is not None and self._negatives(step)
        told = (own[2].sum().item() if own else 0, rows.vectors["words"].sum().item() if self.config.write else 0)
        found = ranks.gather(told, "counting the pairs of a step")
        if own and step.features is not None:
            loss, right, count = self._match(step, *own)
            pairs = sum(sizes) + 2 * sum(f[0] for f in found)  # of all ranks
            total = total + self.config.match * loss * (sum(sizes) / max(1, pairs))
            parts |= {"matching": (loss.detach(), count), "matching_accuracy": (right, count)}
        if self.config.write:
            loss = rows.vectors["written"].sum()
            total = total + self.config.write * loss * (sum(sizes) / max(1, sum(f[1] for f in found)))
            parts["writing"] = (loss.detach(), told[1])
        return Loss(total, n, parts)

    # ------------------------------------------------------------------------------------------------ three tasks

    def _contrast(self, step: Step) -> Tensor:
        """The sum over this rank's pairs of ½ [picture → texts + text → pictures]."""
        right = step.own  # [n, N] bool
        if self.config.targets == "pictures":
            right = right | (step.keys[:, None, 0] == step.all_keys[None, :, 0])
        share = right / right.sum(1, keepdim=True)  # [n, N]
        wanted = (1 - self.config.smoothing) * share + self.config.smoothing / max(1, right.shape[1])
        each = [-(wanted * logits.log_softmax(dim=1)).sum() for logits in (step.to_texts, step.to_images)]
        return 0.5 * (each[0] + each[1])

    @torch.no_grad()
    def _negatives(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """For each pair another's text and another's picture ``[n]`` each, and whether there is one ``[n]`` bool."""
        allowed = ~step.own  # [n, N]
        if self.config.negatives == "distinct":
            allowed = allowed & ~alike(step.keys, step.all_keys)
        salt = step.all_keys.sum()  # of all samples, in whatever order
        hard = self.config.hardness
        texts = draw(hard * step.to_texts, allowed, step.keys[:, 0], step.all_keys[:, 1], salt)
        images = draw(hard * step.to_images, allowed, step.keys[:, 1], step.all_keys[:, 0], salt)
        return texts, images, allowed.any(dim=1)

    def _match(self, step: Step, texts: Tensor, images: Tensor, there: Tensor) -> tuple[Tensor, Tensor, int]:
        """Loss sum, hits and number of pairs: the right ones, text with another's picture, picture with another's."""
        assert step.features is not None and step.ids is not None
        own = torch.arange(step.first, step.first + len(texts), device=texts.device)  # [n]
        looked = torch.cat((own, images[there], own[there]))  # [n + 2m]
        read = torch.cat((own, own[there], texts[there]))
        labels = torch.zeros_like(looked)
        labels[: len(own)] = 1
        if len(looked) == 0:
            return step.graph * 0.0, step.graph.detach() * 0.0, 0
        size = self.config.chunk or len(looked)
        total, right = step.graph * 0.0, step.graph.detach() * 0.0
        for start in range(0, len(looked), size):
            span = slice(start, start + size)
            ids = step.ids[read[span]]  # [r, positions]
            ids = ids[:, : int((ids >= 0).any(dim=0).sum())]  # [r, L]
            given = step.features[looked[span]], Condition(ids.clamp(min=0), ids >= 0)
            logits = (  # [r, 2]
                step.match(*given) if self.config.chunk is None else checkpoint(step.match, *given, use_reentrant=False)
            )
            total = total + F.cross_entropy(logits.float(), labels[span], reduction="sum")
            right = right + (logits.detach().argmax(dim=1) == labels[span]).sum()
        return total, right, len(looked)

    def _written(self, model: QueryText, tokens: Tokens, text: Condition) -> tuple[Tensor, Tensor]:
        """The loss of each text and its number of words, ``[n, 1]`` each."""
        states = model.write(tokens, text)  # [n, L, D]
        rows, columns = text.mask[:, 1:].nonzero(as_tuple=True)  # [w] each
        logits = model.head(states[rows, columns]).float()  # [w, V]
        targets = text.ids[rows, columns + 1]
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.config.smoothing)  # [w]
        sums = losses.new_zeros(len(text.ids)).index_add(0, rows, losses)  # [n]
        return sums.unsqueeze(1), text.mask[:, 1:].sum(dim=1, keepdim=True).float()


class Step:
    """All pairs of a step as one rank sees them: its own ``n`` against all ``N``."""

    def __init__(self, model: QueryText, rows: Rows, sizes: list[int], ranks: Alone):
        v, queries = rows.vectors, model.bridge.config.queries
        self.model, self.first = model, sum(sizes[: ranks.rank])
        self.keys = torch.stack((rows.keys["image"], rows.keys["text"]), dim=1)  # [n, 2]
        self.all_keys = gathered(self.keys, sizes, ranks)  # [N, 2]
        self.own = torch.zeros(len(rows), sum(sizes), dtype=torch.bool, device=self.keys.device)  # [n, N]
        self.own.diagonal(self.first).fill_(True)
        # What carries gradients is exchanged at once: the ranks then meet once on the way back, in whatever order.
        names = [n for n in ("image", "text", "features") if n in v and v[n].requires_grad]
        widths = [v[n].shape[1] for n in names]
        both = gathered(torch.cat([v[n].float() for n in names], dim=1), sizes, ranks) if names else None  # [N, ...]
        self.graph = both.sum() if both is not None else v["image"].sum()  # []
        every = dict(zip(names, both.split(widths, dim=1), strict=True)) if both is not None else {}
        every |= {
            n: gathered(v[n], sizes, ranks) for n in ("image", "text", "features", "ids") if n in v.keys() - every
        }
        unfold = (queries, model.config.dim)
        images, texts = v["image"].unflatten(1, unfold), v["text"]  # [n, K, d], [n, d]
        all_images, all_texts = every["image"].unflatten(1, unfold), every["text"]  # [N, K, d], [N, d]
        heat = model.heat().to(images.dtype)
        self.to_texts = model.similarity(images, all_texts) / heat  # [n, N]
        self.to_images = model.similarity(all_images, texts).T / heat  # [n, N]
        self.ids = every["ids"].long() if "ids" in v else None  # [N, positions]
        width = next(iter(model.encoders.values())).dim
        self.features = every["features"].unflatten(1, (-1, width)) if "features" in v else None  # [N, tokens, D]

    def match(self, features: Tensor, text: Condition) -> Tensor:
        """``features [r, N, D]`` with texts ``[r, L]`` → logits ``[r, 2]``, in the type of the model."""
        return self.model.match(Tokens(features.to(self.model.dtype)), text)


def draw(logits: Tensor, allowed: Tensor, rows: Tensor, columns: Tensor, salt: Tensor) -> Tensor:
    """One column for each row, drawn from the softmax of ``logits [n, N]`` over the columns that are ``allowed``.

    By the Gumbel trick, with noise that is a hash of the keys ``rows [n]`` and ``columns [N]`` and of ``salt []``. A
    row without an allowed column gets any.
    """
    return (logits.double() + gumbel(rows, columns, salt)).masked_fill(~allowed, -torch.inf).argmax(dim=1)  # [n]


def gumbel(rows: Tensor, columns: Tensor, salt: Tensor) -> Tensor:
    """Standard Gumbel noise ``[n, N]`` out of whole numbers, mixed as splitmix64 does (Steele et al., 2014)."""
    x = _mix(_mix(rows + salt).unsqueeze(1) + columns.unsqueeze(0) * -7046029254386353131)  # [n, N], modulo 2^64
    uniform = (((x >> 11) & ((1 << 53) - 1)).double() + 0.5) / (1 << 53)  # between 0 and 1
    return -(-uniform.log()).log()


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in: torch's own keeps the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


__all__ = ["Stage1", "Stage1Config", "Step", "draw", "gumbel"]
