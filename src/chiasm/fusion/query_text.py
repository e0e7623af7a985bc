"""A query transformer that has met no language model yet: pictures and texts compared, matched, and written.

Paper: BLIP-2 (arXiv:2301.12597), its first stage. Reference: salesforce/LAVIS 506965b ``blip2_qformer.py``; for
contrast and matching ``Blip2ForImageTextRetrieval`` of transformers 5.23, equal to 1e-5 (values) and 1e-4 (gradients).

    mask of [queries | text]   what is read off                                     task
    unimodal                   a vector of each query, one of the text's first id   contrast
    bidirectional              two numbers of each query, their mean                matching
    multimodal causal          the next word at each place of the text              grounded generation

A medium takes no place in the text: a text is what the tokenizer opens and the template ends (``[CLS] … [SEP]``); in
grounded generation ``start`` ([DEC]) stands in place of its first id. Generation is grounded generation: the model
captions.

Differences by design: queries and text go through one masked pass where LAVIS runs two, or keeps the first one's keys
(equal without dropout); padding may stand on either side; the temperature that divides is held above ``COLDEST`` (LAVIS
lets it pass 0); the text of a caption is computed anew for each word, which is short.

Letters: ``I`` pictures, ``B`` texts, ``K`` queries, ``L`` words, ``d`` the width of the shared space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from chiasm import registry
from chiasm.config import part
from chiasm.connectors.qformer import QFormer, deviation, multimodal_causal, unimodal
from chiasm.encoders.base import Encoder
from chiasm.errors import ConfigError, DataError, nearest
from chiasm.fusion.assembly import check_stream
from chiasm.fusion.base import Asked, Fusion, FusionConfig, check_asked
from chiasm.fusion.ragged import all_sizes
from chiasm.fusion.splice import Stream, labelled, last
from chiasm.types import Batch, Condition, Count, Layout, Output, Tokens

WARMTH = 0.07  # the temperature that training begins with
COLDEST = 1e-3  # the lowest that cosines are divided by


class WordHead(nn.Module):
    """BERT's: linear, GELU, norm, then the table of words itself, and a bias for each word."""

    def __init__(self, dim: int, vocab: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab))
        nn.init.normal_(self.dense.weight, std=deviation(dim))
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """``hidden [..., D]``, ``words [V, D]`` → logits ``[..., V]``."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), words, self.bias)  # [..., V]


@registry.register("fusion", "query_text")
class QueryText(Fusion):
    """Encoder → query transformer with its text half → heads for contrast, matching and writing."""

    class Config(FusionConfig):
        """One connector, a ``qformer`` with ``text`` and without ``project``.

        ``dim``: width of the space in which pictures and texts are compared. ``writes``: whether there is a head for
        words (transformers' retrieval model has none). ``temperature`` None: learned. ``start``: the id that opens a
        text that is written; None: its own first id does.
        """

        type: str = "query_text"
        encoders: dict[str, part("encoder")]  # type: ignore[valid-type]
        connectors: dict[str, part("connector")]  # type: ignore[valid-type]
        media: dict[str, Stream] = Field(default_factory=lambda: {"image": Stream()})
        dim: PositiveInt = 256
        writes: bool = True
        temperature: PositiveFloat | None = None
        start: int | None = Field(default=None, ge=0)

        @model_validator(mode="after")
        def _fits(self) -> QueryText.Config:
            if len(self.media) != 1 or len(self.connectors) != 1:
                raise ConfigError(
                    f"query_text takes one kind of media through one connector, got {len(self.media)} and "
                    f"{len(self.connectors)}"
                )
            body = self.connectors.get(self.stream(self.kind).connector)
            if not isinstance(body, QFormer.Config) or body.text is None or body.project or body.instruction:
                raise ConfigError(
                    "query_text needs a connector of type 'qformer' with its text half: give 'text' its sizes, "
                    "project=false and instruction=false"
                )
            if self.start is not None and self.start >= body.text.vocab:
                raise ConfigError(f"query_text: start is id {self.start}, the text half has {body.text.vocab} words")
            return self

        @property
        def kind(self) -> str:
            """The kind of media."""
            return next(iter(self.media))

        @property
        def vocab(self) -> int:
            """Rows of the text half's table of words."""
            return next(iter(self.connectors.values())).text.vocab  # type: ignore[no-any-return]

        def stream(self, kind: str) -> Stream:
            """The stream of a kind of media. Raises ConfigError where the model has none."""
            if kind not in self.media:
                raise ConfigError(f"this model takes no {kind}; {nearest(kind, self.media)}")
            return self.media[kind]

        def unit_count(self, kind: str, shape: tuple[int, ...]) -> Count:
            """Queries of one unit."""
            stream = self.stream(kind)
            counts = {name: self.encoders[name].count(shape) for name in stream.encoders}
            return self.connectors[stream.connector].count(counts)  # type: ignore[no-any-return]

        def count(self, kind: str, layout: Layout) -> int:
            """None: a medium stands beside the text."""
            self.unit_count(kind, layout.shape)
            return 0

    config: Config

    def __init__(self, config: Config, encoders: Mapping[str, Encoder], connectors: Mapping[str, QFormer]):
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleDict(encoders)
        self.connectors = nn.ModuleDict(connectors)
        body = self.bridge.config
        self.image_proj, self.text_proj = nn.Linear(body.dim, config.dim), nn.Linear(body.dim, config.dim)
        self.matcher = nn.Linear(body.dim, 2)
        self.temperature = nn.Parameter(torch.tensor(WARMTH)) if config.temperature is None else None
        self.words = WordHead(body.dim, config.vocab, body.norm_eps) if config.writes else None

    @classmethod
    def compose(cls, config: Config) -> QueryText:
        """The model of a configuration. Raises ConfigError where parts do not fit each other."""
        stream = config.stream(config.kind)
        for name in stream.encoders:
            if name not in config.encoders:
                raise ConfigError(f"the stream of {config.kind} reads {name!r}; {nearest(name, config.encoders)}")
        encoders = {name: registry.get("encoder", c.type)(c) for name, c in config.encoders.items()}
        in_dims = {name: encoders[name].dim for name in stream.encoders}
        connectors = {name: QFormer(c, in_dims, c.dim) for name, c in config.connectors.items()}
        return cls(config, encoders, connectors)

    def check_counts(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare counted with produced vectors of a unit (meta device). Raises ConfigError with both numbers."""
        for kind, shape in shapes.items():
            check_stream(self, kind, shape)

    @property
    def bridge(self) -> QFormer:
        """The query transformer."""
        return self.connectors[self.config.stream(self.config.kind).connector]  # type: ignore[return-value]

    # ------------------------------------------------------------------------------------------------ what is given

    def look(self, batch: Batch, named: dict[str, Any] | None = None) -> Tokens:
        """The features of the pictures, one of each sample: ``x [B, N, D_in]``. Raises DataError, naming the sample."""
        kind = self.config.kind
        media = batch.media.get(kind)
        owners = media.owners if media is not None else []
        for row, id in enumerate(batch.ids or [str(i) for i in range(len(batch.input_ids))]):
            units = [layout.units for layout, o in zip(media.layouts, owners, strict=True) if o == row] if media else []
            if units != [1]:
                raise DataError(
                    f"sample {id!r} has {len(units)} media of kind {kind!r} with {sum(units)} units; here one text "
                    "belongs to exactly one picture of one unit: split the sample, and leave tiling out of the front "
                    "end",
                    "medium",
                )
        assert media is not None
        names = self.config.stream(kind).encoders
        features = media.features or {name: all_sizes(self.encoders[name], media) for name in names}
        tokens: Tokens = features[names[0]]
        if named is not None:
            named[f"{kind}/features"] = tokens
        return tokens

    def text(self, batch: Batch) -> Condition:
        """The texts with their padding moved to the right: ids and mask ``[B, T]``. Raises DataError."""
        mask = batch.segment_ids != 0  # [B, T]
        if len(batch.ids) > len(mask):
            raise DataError(f"{len(batch.ids)} samples stand in {len(mask)} rows: texts cannot be packed; pad them")
        if mask.shape[1] == 0:
            raise DataError(f"sample {(batch.ids or ['0'])[0]!r} has no text; give it one")
        order = (~mask).long().argsort(dim=1, stable=True)  # [B, T], columns that hold text first
        return Condition(batch.input_ids.gather(1, order), mask.gather(1, order))

    # ------------------------------------------------------------------------------------------------ three tasks

    def apart(self, tokens: Tokens, text: Condition) -> tuple[Tensor, Tensor]:
        """One unimodal pass → unit vectors of the queries ``[B, K, d]`` and of the texts ``[B, d]``."""
        count = self.bridge.config.queries
        states = self.bridge.states(tokens, text, unimodal(count, text.mask))  # [B, K+L, D]
        return self._unit(self.image_proj(states[:, :count])), self._unit(self.text_proj(states[:, count]))

    def embed_images(self, batch: Batch) -> Tensor:
        """The batch's pictures: a unit vector of each query, ``[I, K, d]``."""
        return self._unit(self.image_proj(self.bridge.states(self.look(batch))))

    def embed_texts(self, batch: Batch) -> Tensor:
        """The batch's texts: a unit vector of each, ``[B, d]``, without any picture."""
        text, bridge = self.text(batch), self.bridge
        none = bridge.queries.new_zeros(len(text.ids), 0, bridge.config.dim)  # [B, 0, D]
        width: Any = self.encoders[self.config.stream(self.config.kind).encoders[0]].dim
        nothing = Tokens(none.new_zeros(len(text.ids), 1, width))  # no query looks at it
        states = bridge.body(none, nothing, text, unimodal(0, text.mask))  # [B, L, D]
        return self._unit(self.text_proj(states[:, 0]))

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """``images [I, K, d]``, ``texts [B, d]`` of unit length → the best query's cosines ``[I, B]``."""
        return torch.einsum("ikd,bd->ibk", images, texts).amax(dim=-1)  # [I, B]

    def score(self, images: Tensor, texts: Tensor) -> Tensor:
        """The best query's cosines divided by the temperature, ``[I, B]``."""
        return self.similarity(images, texts) / self.heat().to(images.dtype)

    def heat(self) -> Tensor:
        """The temperature ``[]`` that cosines are divided by."""
        if self.temperature is None:
            return torch.tensor(self.config.temperature, device=self.device)
        return self.temperature.clamp(min=COLDEST)

    def match(self, tokens: Tokens, text: Condition) -> Tensor:
        """Whether pictures and texts belong together: ``[B, 2]``, the second the higher where they do."""
        states = self.bridge.states(tokens, text)  # [B, K+L, D]
        return self.matcher(states[:, : self.bridge.config.queries]).mean(dim=1)  # [B, 2]

    def see(self, batch: Batch) -> Tensor:
        """The features of the batch's pictures ``[B, N, D_in]``, for ``judge``."""
        return self.look(batch).x

    def judge(self, seen: Tensor, batch: Batch) -> Tensor:
        """How well features of pictures ``[B, N, D_in]`` and the batch's texts match ``[B]``; more is better.

        As published, the logit of "matches" and the best query's cosine together (LAVIS ``compute_sim_matrix``).
        """
        tokens, text = Tokens(seen), self.text(batch)
        images, texts = self.apart(tokens, text)
        cosines = torch.einsum("bkd,bd->bk", images, texts).amax(dim=-1)  # [B]
        return self.match(tokens, text)[:, 1] + cosines

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of each sample's picture and text: the logits of matching ``[B, 2]`` and the best query's cosine ``[B]``."""
        tokens, text = self.look(batch), self.text(batch)
        images, texts = self.apart(tokens, text)
        cosines = torch.einsum("bkd,bd->bk", images, texts).amax(dim=-1)  # [B]
        return self.match(tokens, text), cosines

    def write(self, tokens: Tokens, text: Condition) -> Tensor:
        """Causal states of the text ``[B, L, D]``, of which ``head`` makes the word that follows each place."""
        ids = text.ids
        if self.config.start is not None:
            ids = torch.cat((torch.full_like(ids[:, :1], self.config.start), ids[:, 1:]), dim=1)  # [B, L]
        count = self.bridge.config.queries
        states = self.bridge.states(tokens, Condition(ids, text.mask), multimodal_causal(count, text.mask))
        return states[:, count:]  # [B, L, D]

    def head(self, hidden: Tensor) -> Tensor:
        """``hidden [..., D]`` → logits ``[..., V]``. Raises ConfigError for a model without this head."""
        if self.words is None:
            raise ConfigError("this model compares pictures and texts and has no head for words: set writes=true")
        words = self.bridge.body.text
        assert words is not None
        return self.words(hidden, words.words.weight)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------------------ writing

    def forward(self, batch: Batch, logits: Asked | None = "labels", cache: Any = None) -> Output:
        """``batch [B, T]`` → ``Output`` of grounded generation: hidden ``[B, T, D]`` and the logits asked for."""
        named: dict[str, Any] = {}
        tokens, text = self.look(batch, named), self.text(batch)
        if cache is not None:
            cache.begin(tokens, text)
        states = self.write(tokens, text)  # [B, L, D]
        mask = batch.segment_ids != 0  # [B, T]
        place = (mask.cumsum(dim=1) - 1).clamp(min=0).unsqueeze(-1).expand(-1, -1, states.shape[2])
        hidden = states.gather(1, place).masked_fill(~mask.unsqueeze(-1), 0)  # [B, T, D]
        output = Output(hidden, named=named)
        if logits == "all":
            output.logits = self.head(hidden)  # [B, T, V]
        elif logits == "last":
            output.logits = self.head(hidden[torch.arange(len(hidden), device=hidden.device), last(batch)])  # [B, V]
        elif logits is not None:
            check_asked(logits)
            rows, columns = labelled(batch)
            output.targets, output.target_rows = batch.input_ids[rows, columns + 1], rows
            if logits == "labels":
                output.logits = self.head(hidden[rows, columns])  # [n, V]
            else:
                output.states, output.head = hidden[rows, columns], self.head  # [n, D]
        return output

    def step(self, ids: Tensor, positions: Tensor, segments: Tensor, cache: Any) -> Tensor:
        """``ids [B, 1]`` → logits ``[B, V]`` of the next word."""
        text = cache.append(ids)
        states = self.write(cache.tokens, text)  # [B, L, D]
        rows = torch.arange(len(ids), device=ids.device)
        return self.head(states[rows, text.mask.sum(dim=1) - 1])  # [B, V]

    def new_cache(self, batch: int, capacity: int) -> Caption:
        """What is kept of ``batch`` captions in the making."""
        return Caption()

    @staticmethod
    def _unit(x: Tensor) -> Tensor:
        """Of unit length along the last dimension, in float32 where it was narrower."""
        return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


class Caption:
    """Captions in the making: the features of their pictures, and the words so far, padded on the right."""

    tokens: Tokens
    text: Condition

    def begin(self, tokens: Tokens, text: Condition) -> None:
        """Features ``[B, N, D_in]`` and prompts ``[B, L]``."""
        self.tokens, self.text = tokens, text

    def append(self, ids: Tensor) -> Condition:
        """``ids [B, 1]`` at the end of each text, which may be shorter than others."""
        text = self.text
        space = torch.zeros_like(ids)
        longer = torch.cat((text.ids, space), dim=1)  # [B, L+1]
        ends = text.mask.sum(dim=1, keepdim=True)  # [B, 1]
        mask = torch.cat((text.mask, space.bool()), dim=1).scatter(1, ends, True)
        self.text = Condition(longer.scatter(1, ends, ids), mask)
        return self.text

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what ``rows[i]`` was."""
        hidden = None if self.tokens.mask is None else self.tokens.mask[rows]
        self.tokens = Tokens(self.tokens.x[rows], hidden, self.tokens.grid)
        self.text = Condition(self.text.ids[rows], self.text.mask[rows])
