"""The next token, and beside it: the pooled picture of a sample is like its own answer and unlike the others'.

    loss = CE + share · mean_ij (cos(v_i, t_j) - [i = j])²

``v_i`` is the mean of a sample's projected picture tokens, ``t_j`` the mean of the input embeddings of a sample's
labelled tokens, both in the language model's space: for a new connector a shorter way to that space than through all
layers. An auxiliary term, off unless a stage asks for it::

    objective: {type: aligned, share: 0.1}

Samples are compared within a micro-batch; a sample without a picture or without a labelled token takes no part, and a
micro-batch with fewer than two such samples has the cross-entropy alone. The embeddings are targets: they get no
gradient from the term.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.fusion.base import Fusion
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.train.objectives.cross_entropy import cross_entropy
from chiasm.train.objectives.next_token import by_source, owners
from chiasm.types import Batch, Output


class AlignedConfig(ObjectiveConfig):
    """``share`` is the weight of the term beside the mean cross-entropy of a token; ``kind`` the medium it looks at."""

    type: str = "aligned"
    share: float = Field(default=0.1, gt=0)
    kind: str = "image"


@register("objective", "aligned")
class Aligned:
    """Next-token loss with the alignment term."""

    Config = AlignedConfig

    def __init__(self, config: AlignedConfig):
        self.config = config

    def __call__(self, model: Fusion, batch: Batch) -> Loss:
        """The sum over target tokens; the term counts once for each of them. Raises ConfigError for models that do not
        bring pictures into the language model's space.
        """
        output = model(batch, logits="states")
        assert output.states is not None and output.targets is not None and output.head is not None
        total, losses = cross_entropy(output.states, output.targets, output.head)  # [], [n]
        parts: dict[str, tuple[float | Tensor, float | Tensor]] = dict(by_source(batch, output, losses))
        pictures, texts = self._pooled(model, batch, output)  # [m, D] each
        if len(pictures) > 1:
            term = alignment(pictures, texts)
            total = total + self.config.share * losses.numel() * term
            parts["alignment"] = (term.detach() * len(pictures), len(pictures))
        return Loss(total, losses.numel(), parts)

    def _pooled(self, model: Fusion, batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
        """Pooled media and texts ``[m, D]`` of the samples that have both."""
        media, embed = batch.media.get(self.config.kind), getattr(getattr(model, "lm", None), "embed", None)
        if media is None:
            return torch.empty(0, 1), torch.empty(0, 1)
        runs = output.named.get(f"{self.config.kind}/merged")  # a run [M, D] for each medium
        if runs is None or embed is None:
            raise ConfigError(
                f"objective 'aligned' needs a model that puts {self.config.kind} tokens into a language model's row; "
                f"{type(model).__name__} does not: use next_token"
            )
        count, device = len(batch.ids), runs[0].device
        of_medium = torch.tensor(media.owners, device=device)  # [media]
        seen = torch.zeros(count, device=device).index_add(0, of_medium, _counts(runs, device))  # [B]
        sums = torch.stack([run.float().sum(0) for run in runs])  # [media, D]
        v = torch.zeros(count, sums.shape[1], device=device).index_add(0, of_medium, sums)  # [B, D]
        with torch.no_grad():
            of_target = owners(batch, output)  # [n]
            t = torch.zeros_like(v).index_add(0, of_target, embed(output.targets).float())  # [B, D]
            said = torch.bincount(of_target, minlength=count)
        both = (seen > 0) & (said > 0)
        return v[both] / seen[both][:, None], t[both] / said[both][:, None]


def _counts(runs: list[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([len(run) for run in runs], dtype=torch.float32, device=device)


def alignment(pictures: Tensor, texts: Tensor) -> Tensor:
    """``[m, D]`` twice → ``[]``: the mean square of the cosines' distance from the identity."""
    cosines = torch.nn.functional.normalize(pictures, dim=-1) @ torch.nn.functional.normalize(texts, dim=-1).T  # [m, m]
    return (cosines - torch.eye(len(cosines), device=cosines.device)).square().mean()
