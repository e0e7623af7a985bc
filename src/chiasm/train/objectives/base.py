"""The objective contract: a sum and its weight, so that accumulation and several ranks give exactly the gradient of the
whole batch.

Most objectives look at one sample at a time: their sum over a step is the sum over its micro-batches. A
``StepObjective`` compares samples with each other, so that a step's loss is no such sum: the loop first makes the
vectors of all micro-batches on all ranks, and then asks for the loss of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from chiasm import registry
from chiasm.config import PartConfig
from chiasm.errors import ConfigError
from chiasm.fusion.base import Fusion
from chiasm.train.distributed import ALONE, Alone
from chiasm.types import Batch


@dataclass
class Loss:
    """``total`` is differentiable and summed over what counts (tokens, pairs), ``weight`` says how many those are.

    ``parts`` holds further pairs (sum, weight) for the log, by name. Those called ``source/…`` are losses of a data
    source, and are logged as ``loss/source/…`` where there are several; any other is logged under its own name.
    """

    total: Tensor  # [] float32
    weight: float
    parts: Mapping[str, tuple[float | Tensor, float | Tensor]] = field(default_factory=dict)


Objective = Callable[[Fusion, Batch], Loss]


@dataclass
class Rows:
    """What a step objective compares: one row for each sample of some micro-batches.

    ``keys`` are equal where two samples hold the same thing; they are made only where the objective reads them.
    """

    vectors: dict[str, Tensor]  # name → [n, D]
    keys: dict[str, Tensor] = field(default_factory=dict)  # name → [n] int64

    def __len__(self) -> int:
        return len(next(iter(self.vectors.values())))


class ObjectiveConfig(PartConfig):
    """The options of an objective."""


class StepObjective:
    """An objective over all samples of a step. Subclasses nest ``Config`` and take it as their only argument.

    Called with one batch it takes that for the whole step.
    """

    Config: type[ObjectiveConfig] = ObjectiveConfig

    def __init__(self, config: Any):
        self.config = config

    def embed(self, model: Fusion, batch: Batch) -> Rows:
        """The rows of one micro-batch, differentiable. Must give the same rows when it is run again."""
        raise NotImplementedError

    def compare(self, model: Fusion, rows: Rows | None, ranks: Alone = ALONE) -> Loss:
        """This rank's share of the loss of a step whose rows here are ``rows`` (None: this rank has no sample).

        The shares of all ranks add up to the loss of the step, and the gradient of each share reaches the rows of every
        rank. All ranks call this together.
        """
        raise NotImplementedError

    def bounds(self, model: Fusion) -> dict[str, tuple[float, float]]:
        """Parameters by name that are held between a lowest and a highest value after every optimizer step."""
        return {}

    def __call__(self, model: Fusion, batch: Batch) -> Loss:
        """``batch`` as a whole step."""
        return self.compare(model, self.embed(model, batch))


def objective(spec: str | Mapping[str, Any], processor: Any = None) -> Objective:
    """The objective of a name, or of a table with its ``type`` and options. Raises RegistryError or ConfigError.

    One that has ``meet`` is handed the model's processor before the first batch: what it does with texts needs words.
    """
    table = {"type": spec} if isinstance(spec, str) else dict(spec)
    if "type" not in table:
        raise ConfigError(f"an objective needs a 'type'; one of {', '.join(registry.names('objective'))}")
    entry = registry.get("objective", table["type"])
    if isinstance(entry, type):
        made: Objective = entry(entry.Config.parse(table, where=f"objective {table['type']!r}"))  # type: ignore[attr-defined]
        if processor is not None and hasattr(made, "meet"):
            made.meet(processor)
        return made
    if len(table) > 1:
        raise ConfigError(
            f"objective {table['type']!r} has no options, got {', '.join(k for k in table if k != 'type')}"
        )
    return entry  # type: ignore[no-any-return]
