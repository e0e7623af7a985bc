"""What is read off the states of a model that sees words and a picture together: classes, matches, masked words.

Sources: ``vilt_module.py`` of dandelin/ViLT 762fd39, ``xbert.py`` of salesforce/ALBEF b9727e4, ``modeling_finetune.py``
of microsoft/unilm 768a3c8 (BEiT-3). A head that a checkpoint lacks is not built, so that loading stays strict.
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from chiasm.config import Config


class Heads(Config):
    """Which heads a model has. Each one belongs to tasks: a model is pre-trained with some and fine-tuned with others.

    ``classes``: answers, or classes (VQA: 3129; NLVR2: 2). ``words``: masked words. ``match``: two ways, the second
    says that the picture and the words belong together. ``rank``: one score for the same, as ViLT's retrieval has it.
    """

    classes: PositiveInt | None = None
    words: bool = False
    match: bool = False
    rank: bool = False


class Pooler(nn.Module):
    """``tanh(dense(x))`` of the first position; with ``norm`` a layer norm before it (BEiT-3)."""

    def __init__(self, dim: int, norm: bool = False, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps) if norm else None
        self.dense = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, N, D]`` → ``[B, D]``."""
        first = x[:, 0]  # [B, D]
        return self.dense(first if self.norm is None else self.norm(first)).tanh()


class WordHead(nn.Module):
    """BERT's head over the vocabulary: dense, GELU, norm, decoder. ``tied`` shares the decoder with the embedding."""

    def __init__(self, dim: int, vocab: int, eps: float = 1e-12, tied: nn.Parameter | None = None):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.decoder = nn.Linear(dim, vocab)
        if tied is not None:
            self.decoder.weight = tied
        nn.init.zeros_(self.decoder.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., D]`` → ``[..., V]``."""
        return self.decoder(self.norm(F.gelu(self.dense(x))))  # [..., V]


def two_layers(dim: int, hidden: int, classes: int, first_norm: bool = False) -> nn.Sequential:
    """Linear, norm, GELU, linear: ViLT's, VLMo's and BEiT-3's classifier; ``first_norm`` puts a norm before it."""
    layers = [nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, classes)]
    return nn.Sequential(nn.LayerNorm(dim), *layers) if first_norm else nn.Sequential(*layers)


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """Normal weights cut at two deviations, biases 0, norms 1 and 0: what all of these systems start from."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


__all__ = ["Heads", "Pooler", "WordHead", "initialise", "two_layers"]
