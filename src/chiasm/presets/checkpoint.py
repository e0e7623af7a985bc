"""The contract of checkpoint readers: other projects' folders as configurations and weight rules of ours.

A reader is registered as ``("checkpoint", name)`` and recognises a folder by what its ``config.json`` says, never by
the name of the folder or of a file in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from chiasm.convert.io import WRITING, Weights, open_weights, read_json, refuse_program
from chiasm.convert.rules import AnyRule
from chiasm.errors import CheckpointError, ConfigError
from chiasm.model_config import VLMConfig

OPEN_CLIP = "open_clip_config.json"
TENSORS = "tensors of a folder without a configuration"  # a key that no configuration file has


def table_of(folder: Path) -> Any:
    """What says what a folder is: ``config.json``, open_clip's table, or else the names of its tensors.

    Raises CheckpointError where there is none of them.
    """
    for name in ("config.json", OPEN_CLIP):
        if (folder / name).is_file():
            return read_json(folder / name)
    if any(folder.glob(WRITING + "*")):
        raise CheckpointError(
            f"{folder / 'config.json'} is missing and {WRITING}... is there: a save was cut off; save it again"
        )
    if any(folder.glob("*.safetensors")):
        return {TENSORS: tuple(open_weights(folder).info)}
    for archive in folder.glob("*.pt"):
        refuse_program(archive)
    raise CheckpointError(f"{folder / 'config.json'} is missing: this folder holds no model")


@dataclass(frozen=True)
class Options:
    """What a caller may add to a folder that does not say everything about itself."""

    template: Any = None  # the prompt template, where the folder has no chat template
    vision_tower: Path | None = None  # the tower's folder, where the checkpoint does not hold it
    allow_pickle: bool = False

    def for_none(self, folder: Path) -> None:
        """Raises ConfigError where something is added to a folder that says all of it about itself."""
        for name in ("template", "vision_tower"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{folder} holds its own {name.replace('_', ' ')}; leave {name}= out")


@dataclass
class Checkpoint:
    """A folder understood: what to build, which tensors to read, and how they are called."""

    config: VLMConfig
    weights: Weights
    rules: list[AnyRule]
    tokenizer: Path | None  # None: the model reads no text


def check_vocab(config: VLMConfig, tokenizer: Any, where: str) -> None:
    """Raises CheckpointError where the tokenizer has ids that the language model has no row for."""
    vocab = config.model.vocab
    if vocab is not None and len(tokenizer) > vocab:
        raise CheckpointError(
            f"{where}: the tokenizer has ids up to {len(tokenizer) - 1} but the model {vocab} rows; they belong to "
            "different checkpoints"
        )


class Reader:
    """Reads one project's layout, and writes it where the layout can hold the model."""

    name: ClassVar[str]
    layout: ClassVar[str] = ""  # the export format that this reader's layout is one of; its own name where empty
    of_towers: ClassVar[bool] = False  # a folder's picture tower is also read by itself, into other models
    takes_tower: ClassVar[bool] = False  # a folder may lack its tower, which a caller names then

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` with these values is of this layout."""
        raise NotImplementedError

    def start(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """``read``, where the options are for such a folder. Raises ConfigError where they are not."""
        if not self.takes_tower:
            replace(options, template=None).for_none(folder)
        return self.read(folder, values, options)

    def read(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """Everything but the tensors themselves. Raises CheckpointError or ConfigError."""
        raise NotImplementedError

    def writes(self, config: VLMConfig) -> bool:
        """Whether this is the layout, among those of one format, for a model of this configuration."""
        return True

    def write(self, folder: Path, vlm: Any, max_shard: int) -> None:
        """Export ``vlm`` into an empty folder. Raises CheckpointError where the layout cannot hold it."""
        raise CheckpointError(f"there is no export to the layout {self.name!r}")
