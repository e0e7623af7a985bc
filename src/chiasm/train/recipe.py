"""A training run as a strict configuration: model, data, stages. Written as YAML, changed by dotted overrides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from chiasm.config import Config, load_yaml, override
from chiasm.data.mixture import Entry, HeldOut, Mixing
from chiasm.data.quarantine import HELD_OUT, BadPolicy, BadSamples, Quarantine
from chiasm.errors import ConfigError, nearest
from chiasm.processing.augment import Augment
from chiasm.train.plan import PLANS, Action, check_action
from chiasm.train.sinks import LogSpec
from chiasm.train.start import Start


def flat(table: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A table without tables inside: their keys are joined by dots."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{before}{key}"
        found |= flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return found


class ModelSpec(Config):
    """Where the model of a run comes from: exactly one of ``preset``, ``folder`` and ``config``."""

    preset: str | None = None  # a preset's name
    tiny: bool = False  # the preset's tiny form
    folder: str | None = None  # a saved model: folder or hub name
    config: dict[str, Any] | None = None  # a VLMConfig written out
    overrides: dict[str, Any] = Field(default_factory=dict)  # dotted changes of the configuration, before it is built
    tokenizer: str | None = None  # a folder with tokenizer files; needed unless ``folder`` is given
    controls: tuple[str, ...] = ()  # control tokens that the tokenizer gets in addition, behind its last
    instruction_tokenizer: str | None = None  # one more, for a connector that reads the instruction
    weights: dict[str, str] = Field(
        default_factory=dict
    )  # part ("lm", "encoders.image") → folder its weights are loaded from
    start: Start | None = None  # a trained model whose tensors this one begins with, heads apart
    labels: str | None = None  # a JSON list of texts for processing.labels: the answers, in the order of the classes

    @field_validator("weights", mode="before")
    @classmethod
    def _by_part(cls, value: Any) -> Any:
        """``model.weights.encoders.image=FOLDER`` in a command nests what is one name here."""
        return flat(value) if isinstance(value, dict) else value


FREE = (
    *("workers", "recompute", "compile", "feature_cache", "log_every", "eval_every", "save_every", "keep_last"),
    *("check_samples", "proof", "keep_best"),
)
"""Settings of a stage that change no weight."""


TAKEN = ("model", "pictures", "recipe.yaml", "report.html", "results.json", "answers.jsonl", "live.html")
"""What a run writes into its folder beside its stages."""


class Stage(Config):
    """One stage: what is trained, on what, for how long. ``plan`` is a preset's name or a table pattern → action."""

    name: str
    plan: str | dict[str, Action] = "instruct"
    objective: str | dict[str, Any] = "next_token"  # its name, or a table with its type and options
    data: tuple[str, ...] | None = None  # names of the sources to use; None: all
    template: str | dict[str, Any] | None = None  # a template's name or data, for this stage only; None: the model's
    processing: dict[str, Any] = Field(default_factory=dict)  # dotted changes, as {media.image.tiling: null}, likewise
    steps: int | None = Field(default=None, gt=0)  # optimizer steps; or
    epochs: float | None = Field(default=None, gt=0)  # passes over the mixture
    batch_size: int = Field(default=8, gt=0)  # samples of a micro-batch
    accumulate: int = Field(default=1, gt=0)  # micro-batches of an optimizer step
    lr: float = Field(gt=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)  # the rate of a block as a share of that of the one above it
    drop_path: float = Field(default=0.0, ge=0, lt=1)  # stochastic depth: the chance in the last block, 0 in the first
    augment: Augment | None = None  # pictures changed at random, those that are trained on
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of linear layers, adamw for the rest
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    dtype: Literal["float32", "bf16"] = "float32"
    max_length: int | None = Field(default=None, gt=0)
    bucket: int = Field(default=0, ge=0)  # steps whose samples are sorted by length together; 0: none
    pack: bool = False  # samples of a micro-batch one after the other in one row, without padding
    recompute: bool = False  # activation checkpointing: less memory, about a third more arithmetic
    compile: bool = False  # torch.compile of every block: pays on long runs; needs a compiler on the machine
    workers: int = Field(default=0, ge=0)
    feature_cache: str | None = None  # a folder for the features of frozen encoders; None: encode each time
    log_every: int = Field(default=10, gt=0)
    eval_every: int | None = Field(default=None, gt=0)  # steps between held-out losses
    save_every: int | None = Field(default=None, gt=0)  # steps between checkpoints
    keep_last: int = Field(default=2, gt=0)  # checkpoints, and beside them the one with the lowest held-out loss
    keep_best: bool = True  # with eval_every: the model of the lowest held-out loss, in the stage's folder ``best``
    proof: Literal["stop", "tell"] = "stop"  # what a failed proof does: end the run, or say so and go on
    check_samples: int = Field(default=1000, ge=0)  # samples opened and rendered before the first step

    @field_validator("name")
    @classmethod
    def _folder(cls, name: str) -> str:
        """A stage's name is that of its folder in ``out``, where the run's own files lie too."""
        if not name or name.startswith(".") or name in TAKEN or any(c in name for c in '/\\:*?"<>|\0\n'):
            raise ValueError(
                f"a stage's name is that of its folder: it cannot be {name!r}, begin with a dot, or hold any of "
                f"/ \\ : * ? \" < > |, and {', '.join(TAKEN)} are the run's own"
            )
        return name

    @field_validator("plan")
    @classmethod
    def _plan(cls, value: Any) -> Any:
        if not isinstance(value, str):
            table = {pattern: _number(action) for pattern, action in value.items()}
            for action in table.values():
                check_action(action)
            return table
        if value not in PLANS:
            raise ValueError(f"unknown plan {value!r}; {nearest(value, PLANS)}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Stage:
        if self.augment is not None and self.feature_cache is not None:
            raise ConfigError(
                f"stage {self.name!r}: augment gives another picture each time, and feature_cache keeps the features "
                "of one; leave one of them out"
            )
        return self

    def table(self) -> dict[str, Action]:
        """The plan as pattern → action."""
        return dict(PLANS[self.plan]) if isinstance(self.plan, str) else dict(self.plan)

    def identity(self) -> str:
        """A hash of what two runs must share so that one may go on with the other's checkpoint."""
        return self.model_copy(update={name: Stage.model_fields[name].default for name in FREE}).hash()

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the stage. Raises ConfigError unless exactly one of steps and epochs is given."""
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                f"stage {self.name!r}: steps is {self.steps} and epochs is {self.epochs}; give exactly one of them"
            )
        return self.steps if self.steps is not None else max(1, round((self.epochs or 0) * steps_per_epoch))


class EvalSpec(Config):
    """The held-out evaluation at the end of a run."""

    limit: int | None = Field(default=None, gt=0)  # examples of each source; None: all
    batch_size: int = Field(default=16, gt=0)
    max_new_tokens: int = Field(default=32, gt=0)
    shuffled: bool = True  # also with the pictures of other examples: does the model look?
    candidates: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # task → answers to rank, instead of writing
    rank_by: Literal["sum", "mean"] = "sum"  # of a candidate's log-probabilities
    loss_samples: int = Field(default=64, gt=0)  # examples of the held-out loss during training
    examples: int = Field(default=24, ge=0)  # shown in the report


class Recipe(Config):
    """A run from a model to a report. Paths are relative to the working directory."""

    name: str = "run"
    model: ModelSpec
    data: dict[str, Entry]
    held_out: dict[str, HeldOut] = Field(default_factory=dict)
    mixing: Mixing = "proportional"  # how sources share an epoch: by their sizes, or by the square roots of them
    quarantine: str | None = None  # written data.quarantine: the file of samples left out, made by chiasm check
    bad: BadPolicy = BadSamples()  # written data.bad: what is done with a sample that cannot be used, stop or skip
    stages: tuple[Stage, ...] = Field(min_length=1)
    eval: EvalSpec = EvalSpec()
    seed: int = 0
    log: LogSpec = LogSpec()  # where the log goes beside log.jsonl
    parallel: Literal["replicate", "shard"] = "replicate"  # under torchrun: the model whole on each rank, or in pieces
    patience: float = Field(default=600.0, gt=0)  # seconds that a rank may wait for the others before the run is ended
    device: str = "auto"  # auto: the first of cuda, cpu that is there
    out: str = "runs/run"
    tiny: dict[str, Any] = Field(default_factory=dict)  # dotted overrides that make the recipe's tiny form

    @model_validator(mode="before")
    @classmethod
    def _data_keys(cls, values: Any) -> Any:
        """``data.quarantine`` and ``data.bad`` stand among the sources but are none."""
        data = values.get("data") if isinstance(values, Mapping) else None
        if not isinstance(data, Mapping):
            return values
        own = {key: data[key] for key in ("quarantine", "bad") if key in data and not _is_entry(data[key])}
        return {**values, "data": {k: v for k, v in data.items() if k not in own}, **own}

    def left_out(self) -> Quarantine | None:
        """The samples of the quarantine file. Raises DataError or ConfigError."""
        if self.quarantine is None:
            return None
        found = Quarantine.read(self.quarantine)
        found.known([*self.data, *(HELD_OUT + name for name in self.held_out)])
        return found

    @field_validator("stages")
    @classmethod
    def _names(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        names = [stage.name for stage in stages]
        if len(set(names)) != len(names):
            raise ValueError(f"the stages need different names, got {', '.join(names)}")
        return stages


def _number(action: Any) -> Any:
    """A learning rate that YAML read as text (``1e-3``) as a number."""
    try:
        return float(action) if isinstance(action, str) else action
    except ValueError:
        return action


def _is_entry(value: Any) -> bool:
    return isinstance(value, Entry) or (isinstance(value, Mapping) and "source" in value)


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None, tiny: bool = False) -> Recipe:
    """The recipe in a YAML file: first its tiny form where asked, then the dotted overrides. Raises ConfigError."""
    values = load_yaml(path)
    if tiny:
        if not values.get("tiny"):
            raise ConfigError(f"{path}: has no tiny form; add a table 'tiny' of dotted overrides")
        values = override(values, values["tiny"])
    return Recipe.parse(override(values, overrides or {}), where=str(path))
