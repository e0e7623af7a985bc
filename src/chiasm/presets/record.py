"""What is known about a published system: its paper, its recipe, its size, and where this package departs from it.

A preset is a plain function that returns a ``VLMConfig``, usually by editing another preset. ``published`` enters it in
the registry together with this record; nothing here changes what a model computes, everything is printed on its page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from chiasm.model_config import Provenance, VLMConfig
from chiasm.registry import register

_DATA = "CC BY 4.0 on its card, and the terms of OpenAI, whose GPT-4 wrote it (LLaVA-Instruct)"
CLIP_LICENCE = {"code": "Apache-2.0", "data": _DATA, "image encoder": "MIT (CLIP)"}
SIGLIP_LICENCE = {"code": "Apache-2.0", "data": _DATA, "image encoder": "Apache-2.0 (SigLIP)"}


@dataclass(frozen=True)
class Stage:
    """One stage of training, as published.

    ``data`` names data sets with their sizes. ``trains`` holds patterns over the names of the parameters that learn
    (``connectors.*``, ``lm.*``, ``encoders.*``, ``newline``); ``rates`` gives patterns a learning rate of their own.
    ``batch`` counts conversations over all devices. ``source`` says where the numbers stand; None among them means that
    the authors published none.
    """

    name: str
    data: tuple[str, ...]
    trains: tuple[str, ...]
    lr: float | None
    batch: int | None
    epochs: float | None
    max_length: int | None
    template: str
    source: str
    rates: Mapping[str, float] = field(default_factory=dict)
    schedule: str = "cosine"
    warmup: float | None = 0.03  # a share of all steps; from 1 on: a number of steps; None: not published
    last_lr: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class System:
    """What the presets of one publication share."""

    family: str
    paper: str  # title, with the arXiv number where there is one
    released: str  # year and month
    reference: str  # the authors' code, with the commit that was read
    stages: tuple[Stage, ...]
    arxiv: str | None = None
    link: str | None = None
    differences: tuple[str, ...] = ()  # by design
    choices: tuple[str, ...] = ()  # what the publication leaves open, and how it is settled here
    verified: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """One published model. ``parameters`` is its published size, of which ``counted`` says how it was found.

    ``transformers`` is the same number for the checkpoint in the transformers layout, whose vocabulary has more rows;
    ``base`` names the published parts that training starts from.
    """

    name: str
    function: Callable[[], VLMConfig]
    system: System
    base: Mapping[str, str]
    parameters: int
    counted: str
    licences: Mapping[str, str]
    transformers: tuple[int, int] | None = None  # parameters, rows of the vocabulary
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """The family the system belongs to."""
        return self.system.family

    @property
    def paper(self) -> str:
        """Title and arXiv number."""
        return self.system.paper

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The published recipe, first stage first."""
        return self.system.stages

    @property
    def differences(self) -> tuple[str, ...]:
        """How this package departs from the authors' code by design."""
        return self.system.differences

    @property
    def verified(self) -> tuple[str, ...]:
        """What was compared, with what, by which test."""
        return self.system.verified

    def config(self) -> VLMConfig:
        """The configuration at published size, with the provenance that every save carries along."""
        provenance = Provenance(preset=self.name, paper=self.paper, base=dict(self.base), licences=dict(self.licences))
        return self.function().model_copy(update={"provenance": provenance})


Function = Callable[[], VLMConfig]


def published(
    name: str,
    system: System,
    *,
    base: Mapping[str, str],
    parameters: int,
    licences: Mapping[str, str],
    counted: str = "",
    transformers: tuple[int, int] | None = None,
    notes: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """Decorator that enters a preset function and its record under ``name``. Raises RegistryError where it is taken."""

    def enter(function: Function) -> Function:
        counted_by = (
            counted or "transformers' class of this system, built on the meta device with the authors' vocabulary"
        )
        register("preset", name)(
            Preset(name, function, system, base, parameters, counted_by, licences, transformers, notes)
        )
        return function

    return enter
