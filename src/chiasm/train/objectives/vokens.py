"""MiniGPT-5's sum: the text's loss, and how far its mapped tokens are from the features of what the picture shows.

Paper: MiniGPT-5 (arXiv:2310.02239). Reference: eric-ai-lab/MiniGPT-5 ``model.py`` 21308c1, ``mini_gpt5.py`` 26e3043.

    loss = 0.01 · CE + 0.1 · mean (mapper(states that predict the eight tokens) - reader(words))²

The words are those of the sample itself: what its answer says before the tokens, or, where it says nothing, all that
was said before them. A frozen text tower reads them, in the published system that of Stable Diffusion 2.1: its features
are what the diffusion model paints from. Of one picture in ten the states are set to 0 and the words to none, so that
the diffusion model may be guided at use.

Differences by design: the published sum has a third term, the diffusion model's own error, which is not part of this
package. A step's mean is over samples, and in each over its targets and its pictures: so it does not depend on how the
step is cut, and is the published one where samples are alike, as captions are. The reference learns of the eight tokens
the first and the last, and the end behind them, but no word of a caption (``learn: pictures``), and writes the six
between by code; ``learn: answer`` learns all that the template marks, so that the model writes the eight itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from chiasm import registry
from chiasm.checkpoints.parts import load_part
from chiasm.config import Config, part
from chiasm.errors import ConfigError
from chiasm.fusion.splice import labelled
from chiasm.fusion.vokens import Vokens
from chiasm.lm.tokenizer import Tokenizer
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.train.objectives.cross_entropy import cross_entropy
from chiasm.train.objectives.next_token import by_source, samples_of
from chiasm.types import Batch, Output

STABLE_DIFFUSION_2 = {  # OpenCLIP's text tower of ViT-H/14 without its last block
    "type": "text",
    "dim": 1024,
    "depth": 23,
    "heads": 16,
    "mlp": 4096,
    "activation": "gelu",
}


class ReaderConfig(Config):
    """A frozen text tower: its sizes, the folders of its weights (None: drawn from ``seed``) and of its tokenizer.

    ``pad`` fills a text up to as many tokens as the mapper has features; the tower sees it, as the diffusion model's
    does.
    """

    tower: part("encoder") = Field(default=STABLE_DIFFUSION_2, validate_default=True)  # type: ignore[valid-type]
    weights: str | None = None
    tokenizer: str
    pad: int = 0
    seed: int = 0


class Reader:
    """Texts to the features that the mapper learns to give. Never trained, and no part of the model."""

    def __init__(self, config: ReaderConfig, length: int):
        self.config, self.length = config, length
        self.tokenizer = Tokenizer.from_folder(config.tokenizer)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.tower = registry.get("encoder", config.tower.type)(config.tower)
        if config.weights is not None:
            alone: Any = _Alone(self.tower, config.tower)
            load_part(alone, "encoders.text", Path(config.weights))
        self.tower.requires_grad_(False).eval()

    def ids(self, text: str) -> list[int]:
        """``length`` ids: what opens and ends a text stays, its middle is cut, padding follows."""
        opening, ending = self.tokenizer.prefix, self.tokenizer.suffix
        body = self.tokenizer.encode(text)[: self.length - len(opening) - len(ending)]
        found = [*opening, *body, *ending]
        return found + [self.config.pad] * (self.length - len(found))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], device: Any) -> Tensor:
        """Features ``[n, F, D]`` in float32 of ``n`` texts."""
        self.tower.to(device)
        return self.tower(torch.tensor([self.ids(text) for text in texts], device=device)).x.float()  # [n, F, D]


class _Alone(nn.Module):
    """A model of a text tower only, for the loader of parts."""

    def __init__(self, tower: nn.Module, config: Any):
        super().__init__()
        self.encoders = nn.ModuleDict({"text": tower})
        self.config = _AloneConfig(config)


class _AloneConfig:
    def __init__(self, tower: Any):
        self.encoders = {"text": tower}


class VokensConfig(ObjectiveConfig):
    """``text`` and ``features`` weigh the two terms, ``dropped`` is the share of pictures without words; see above."""

    type: str = "vokens"
    reader: ReaderConfig
    text: float = Field(default=0.01, ge=0)
    features: float = Field(default=0.1, gt=0)
    dropped: float = Field(default=0.1, ge=0, lt=1)
    learn: Literal["answer", "pictures"] = "answer"


@register("objective", "vokens")
class VokenObjective:
    """The weighted sum of both terms, for a model of type ``vokens``."""

    Config = VokensConfig

    def __init__(self, config: VokensConfig):
        self.config = config
        self.reader: Reader | None = None
        self.tokenizer: Any = None  # the language model's

    def meet(self, processor: Any) -> None:
        """Take the tokenizer that the words of a sample are read back with."""
        self.tokenizer = processor.tokenizer

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """Summed over samples; the weight is how many have a target. Raises ConfigError for another kind of model."""
        reader = self._reader(model)
        output = model(batch, logits="states")
        rows, columns = model.places(batch)  # [n] where pictures begin
        target_rows, before = labelled(batch)
        learned = torch.ones_like(before, dtype=torch.bool)
        if self.config.learn == "pictures":
            learned = of_pictures(batch, rows, columns, model.config.vokens.number)[target_rows, before + 1]
        owners = samples_of(batch, target_rows, before)
        text, losses = by_sample(output, owners, learned)  # [], [targets]
        squares = self._squares(model, reader, batch, output, rows, columns)  # [n]
        of_picture = samples_of(batch, rows, columns)
        each = torch.bincount(of_picture, minlength=len(batch.ids))[of_picture]  # [n] pictures of the same sample
        total = self.config.text * text + self.config.features * (squares / each).sum()
        parts: dict[str, tuple[float | Tensor, float | Tensor]] = dict(by_source(batch, output, losses))
        parts["text"] = (losses[learned].sum(), int(learned.sum()))
        parts["features"] = (squares.detach().sum(), len(squares))
        return Loss(total, len(owners.unique()), parts)

    def _squares(
        self, model: Vokens, reader: Reader, batch: Batch, output: Output, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """For each picture the mean square of the distance between mapped and read features ``[n]``."""
        steps = torch.arange(model.config.vokens.number, device=columns.device)
        states = output.hidden[rows[:, None], columns[:, None] - 1 + steps]  # [n, V, D_lm]
        texts = [self.words(batch, row, column) for row, column in zip(rows.tolist(), columns.tolist(), strict=True)]
        if model.training and self.config.dropped:
            without = torch.rand(len(texts)) < self.config.dropped
            texts = ["" if gone else text for text, gone in zip(texts, without.tolist(), strict=True)]
            states = states.masked_fill(without.to(states.device)[:, None, None], 0)
        if not texts:
            return states.new_zeros(0, dtype=torch.float32)
        mapped = model.mapper(states)  # [n, F, D]
        wanted = reader(texts, states.device)  # [n, F, D]
        return F.mse_loss(mapped.float(), wanted, reduction="none").mean((1, 2))

    def words(self, batch: Batch, row: int, column: int) -> str:
        """What the picture that begins there shows: the learned words before it, or else all words before it."""
        start = row * batch.input_ids.shape[1]
        slots = {slot for media in batch.media.values() for slot in media.slots.tolist()}
        own = int(batch.segment_ids[row, column - 1])
        tables = (batch.input_ids, batch.segment_ids, batch.loss_mask)
        before = list(zip(*(table[row, :column].tolist() for table in tables), strict=True))
        said = [(t, mask) for i, (t, seg, mask) in enumerate(before) if seg == own and start + i not in slots]
        text = str(self.tokenizer.decode([t for t, mask in said if mask])).strip()
        return text or str(self.tokenizer.decode([t for t, _ in said])).strip()

    def _reader(self, model: Any) -> Reader:
        """The reader, opened at the first batch. Raises ConfigError where it, the model and the tokenizer differ."""
        if not isinstance(model, Vokens):
            raise ConfigError(f"objective 'vokens' trains a model of type 'vokens', got {model.config.type!r}")
        if self.reader is not None:
            return self.reader
        c, tower = model.config.vokens, self.config.reader.tower
        if getattr(tower, "dim", None) != c.dim or getattr(tower, "positions", 0) < c.features:
            raise ConfigError(
                f"objective 'vokens': the reader gives up to {getattr(tower, 'positions', 0)} features of width "
                f"{getattr(tower, 'dim', None)}, the mapper {c.features} of width {c.dim}: set reader.tower, or "
                "model.vokens.features and dim"
            )
        if self.tokenizer is None:
            raise ConfigError("objective 'vokens' needs the model's tokenizer: objective(spec, processor)")
        controls = set(self.tokenizer.specials.values())
        lacking = [i for i in range(c.first, c.first + c.number) if i not in controls]
        if lacking:
            raise ConfigError(
                f"objective 'vokens': ids {c.first} to {c.first + c.number - 1} are the picture's tokens, but "
                f"{lacking[0]} is no control token of this tokenizer: add them (model.controls in a recipe) and set "
                "model.vokens.first to the id of the first"
            )
        self.reader = Reader(self.config.reader, c.features)
        return self.reader


def by_sample(output: Output, owners: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over samples of the mean loss of their learned targets ``[]``, and the loss of every target ``[n]``."""
    assert output.states is not None and output.targets is not None and output.head is not None
    counts = torch.bincount(owners[learned], minlength=int(owners.max()) + 1 if len(owners) else 1)[owners]  # [n]
    total, losses = output.states.float().sum() * 0.0, output.states.new_zeros(len(owners), dtype=torch.float32)
    for count in counts[learned].unique().tolist():  # samples of as many targets share a call
        chosen = learned & (counts == count)
        summed, each = cross_entropy(output.states[chosen], output.targets[chosen], output.head)
        total, losses[chosen] = total + summed / count, each
    return total, losses


def of_pictures(batch: Batch, rows: Tensor, columns: Tensor, number: int) -> Tensor:
    """Where a target has to do with pictures ``[B, T]``: not before a sample's first one, and of each its first and
    last token. Samples without a picture count whole.
    """
    counts = torch.ones_like(batch.loss_mask)
    places = torch.arange(batch.input_ids.shape[1], device=columns.device)
    seen: set[tuple[int, int]] = set()
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):  # from left to right
        segment = int(batch.segment_ids[row, column])
        if (row, segment) not in seen:
            counts[row, (batch.segment_ids[row] == segment) & (places < column)] = False
        seen.add((row, segment))
        counts[row, column + 1 : column + number - 1] = False
    return counts
