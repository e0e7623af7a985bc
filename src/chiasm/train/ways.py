"""How a recipe's stages render each source, without a model's weights: what ``chiasm check`` measures with."""

from __future__ import annotations

from typing import Any, cast

from chiasm.checkpoints.hub import local_folder
from chiasm.config import override
from chiasm.convert.io import read_json
from chiasm.data.check import Way
from chiasm.data.mixture import Mixture
from chiasm.data.quarantine import HELD_OUT
from chiasm.errors import ConfigError, nearest
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import VLMConfig
from chiasm.presets.checkpoint import Options
from chiasm.processing.processor import Processor, TokenizerLike
from chiasm.train.model import built_config
from chiasm.train.recipe import ModelSpec, Recipe, Stage


def open_processor(spec: ModelSpec) -> Processor:
    """The processor of a recipe's model; no weight is read or made. Raises ConfigError and CheckpointError."""
    if spec.folder is not None:
        return _of_folder(spec.folder)
    config = built_config(spec)
    if config.tokenizer is None:
        raise ConfigError("model.tokenizer is missing; name a folder that holds tokenizer.json or tokenizer.model")
    return _made(config, Tokenizer.from_folder(config.tokenizer))


def ways(recipe: Recipe, processor: Any = None) -> dict[str, Way]:
    """By source: its strictest rendering, that is the smallest ``max_length`` of the stages that use it.

    Held-out sources, which evaluation does not cut, are named as in a quarantine file.
    """
    processor = processor or open_processor(recipe.model)
    found: dict[str, Way] = {}
    for name in recipe.data:
        stages = [stage for stage in recipe.stages if stage.data is None or name in stage.data] or [recipe.stages[0]]
        stage = min(stages, key=lambda s: s.max_length or 10**9)
        found[name] = Way(staged(processor, stage), stage.max_length or processor.config.max_length)
    held_out = {HELD_OUT + name: Way(processor, processor.config.max_length) for name in recipe.held_out}
    return found | held_out


def everything(recipe: Recipe) -> Mixture:
    """The training and the held-out sources of a recipe, those in quarantine included."""
    held_out = {HELD_OUT + name: entry for name, entry in recipe.held_out.items()}
    return Mixture({**recipe.data, **held_out}, recipe.seed)


def staged(processor: Any, stage: Stage) -> Any:
    """The processor with a stage's own template and other changes, where it has any. Raises ConfigError."""
    changes = ({"template": stage.template} if stage.template is not None else {}) | stage.processing
    if not changes:
        return processor
    for dotted in stage.processing:
        steps = dotted.split(".")
        if steps[0] == "media" and len(steps) > 1 and steps[1] not in processor.config.media:
            raise ConfigError(
                f"stage {stage.name!r}: processing.{dotted}: the model has no medium {steps[1]!r}; "
                + nearest(steps[1], processor.config.media)
            )
    values = override(processor.config.dump(), changes)
    config = type(processor.config).parse(values, where=f"stage {stage.name!r}: processing")
    return type(processor)(config, processor.tokenizer, processor.counter)


def _of_folder(name: str) -> Processor:
    from chiasm.vlm import own, reader_of

    path = local_folder(name)
    values = read_json(path / "config.json")
    if own.is_own(values):
        return _made(own.parsed(values, path), Tokenizer.from_folder(path))
    found = reader_of(values, path).read(path, values, Options())
    return _made(found.config, Tokenizer.from_folder(found.tokenizer or path))


def _made(config: VLMConfig, tokenizer: Tokenizer) -> Processor:
    return Processor(config.processing, cast(TokenizerLike, tokenizer), config.model.count)
