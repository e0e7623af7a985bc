"""One tower and a layer over classes: the plain vision transformer that knows a fixed list of names.

Paper: ViT (arXiv:2010.11929). Reference: ``ViTForImageClassification`` of transformers 5.23, equal to 1e-5 in float32.

Differences by design: the head is an ordinary connector whose width is the number of classes; there is no dropout.

Letters: ``B`` pictures, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from chiasm import registry
from chiasm.errors import ConfigError, DataError
from chiasm.fusion.assembly import check_pooled
from chiasm.fusion.base import Asked, Fusion
from chiasm.fusion.ragged import all_sizes
from chiasm.fusion.tower import TowerConfig
from chiasm.types import Batch, Output

SILENT = "a model that classifies pictures writes no text; use classify, or load a model that generates"


@registry.register("fusion", "classifier")
class Classifier(Fusion):
    """Encoder → connector: a score for each class."""

    class Config(TowerConfig):
        """``encoders`` and ``connectors`` hold one part each, of one kind of media; ``classes`` is how many there are.

        Their names are the processor's (``processing.labels``).
        """

        type: str = "classifier"
        classes: PositiveInt

        @model_validator(mode="after")
        def _fits(self) -> Classifier.Config:
            if len(self.encoders) != 1 or self.connectors.keys() != self.encoders.keys():
                raise ConfigError(
                    f"classifier: encoders are {', '.join(self.encoders)}, connectors {', '.join(self.connectors)}; "
                    "give one of each, of the same name"
                )
            return self

        @property
        def kind(self) -> str:
            """The kind of media that is classified."""
            return next(iter(self.encoders))

    config: Config
    silent = SILENT

    def __init__(self, config: Config, encoder: Any, connector: Any):
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleDict({config.kind: encoder})
        self.connectors = nn.ModuleDict({config.kind: connector})

    @classmethod
    def compose(cls, config: Config) -> Classifier:
        """The model of a configuration. Raises ConfigError where parts do not fit each other."""
        tower, head = config.encoders[config.kind], config.connectors[config.kind]
        encoder = registry.get("encoder", tower.type)(tower)
        widths = {config.kind: encoder.dim}
        return cls(config, encoder, registry.get("connector", head.type)(head, in_dims=widths, out_dim=config.classes))

    def check_counts(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare counted with produced vectors of a unit (meta device). Raises ConfigError with both numbers."""
        for kind, shape in shapes.items():
            check_pooled(self, kind, shape)

    def classify(self, batch: Batch) -> Tensor:
        """The batch's pictures → scores of the classes ``[B, C]``, before the softmax. Raises DataError."""
        kind = self.config.kind
        media = batch.media.get(kind)
        if media is None or media.owners != list(range(len(batch.ids))):
            found = 0 if media is None else len(media.owners)
            raise DataError(f"sample {batch.ids[0]!r}: {found} {kind}s for {len(batch.ids)} samples; give one to each")
        features = media.features[kind] if media.features else all_sizes(self.encoders[kind], media)  # [B, N, D]
        return self.connectors[kind](features).x[:, 0]  # type: ignore[no-any-return]  # [B, C]

    def forward(self, batch: Batch, logits: Asked | None = "labels", cache: Any = None) -> Output:
        """``batch [B, 0]`` → ``Output``: logits ``[B, C]``, also named ``classes``. ``logits`` is not looked at."""
        scores = self.classify(batch)  # [B, C]
        return Output(scores, logits=scores, named={"classes": scores})

    def step(self, ids: Tensor, positions: Tensor, segments: Tensor, cache: Any) -> Tensor:
        """No text ``[B, V]`` is written: raises ConfigError."""
        raise ConfigError(SILENT)

    def new_cache(self, batch: int, capacity: int) -> Any:
        """No text is written: raises ConfigError."""
        raise ConfigError(SILENT)
