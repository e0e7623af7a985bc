"""Training samples with pictures changed at random: a stage's ``augment``. Held-out data never passes here."""

from __future__ import annotations

import copy
from typing import Any

from chiasm.data.base import Example
from chiasm.data.loader import Renderer
from chiasm.errors import ConfigError, DataError
from chiasm.processing.augment import REFUSED, Augment, AugmentedFrontEnd
from chiasm.types import Sample


class AugmentedRenderer(Renderer):
    """A renderer whose pictures are changed; ``processor`` stays the one that changes nothing.

    Raises ConfigError for a model without pictures.
    """

    def __init__(self, processor: Any, augment: Augment, max_length: int | None = None, pack: bool = False):
        super().__init__(processor, max_length, pack)
        if "image" not in processor.front_ends:
            raise ConfigError("this stage's augment changes pictures, and the model takes none; leave augment out")
        self.augment = augment
        self.changing = copy.copy(processor)
        front_end = AugmentedFrontEnd(processor.front_ends["image"], augment)
        self.changing.front_ends = {**processor.front_ends, "image": front_end}
        self.plain = Renderer(self.changing, max_length, pack)

    def __reduce__(self) -> Any:
        return AugmentedRenderer, (self.processor, self.augment, self.max_length, self.pack)

    def sample(self, example: Example) -> Sample:
        """One example with its targets. Raises DataError, also for places in a text where pictures are moved."""
        if self.augment.moves:
            for message in example.messages:
                if self.processor.config.box.found(message.text):
                    raise DataError(
                        f"sample {example.id!r}: a text of it gives places in the picture ({message.text[:60]!r}), "
                        f"{REFUSED}",
                        "box",
                    )
        return self.plain.sample(example)
