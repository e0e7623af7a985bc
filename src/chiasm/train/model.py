"""The model a recipe starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chiasm.errors import ConfigError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import VLMConfig
from chiasm.train.plan import Plan, part_of
from chiasm.train.recipe import ModelSpec
from chiasm.train.start import begin


def open_model(spec: ModelSpec, seed: int, device: str) -> Any:
    """Load or build the model in float32. What is not loaded is drawn from ``seed``, not from the global generator.

    Raises ConfigError where the specification names no model or two, or a built one has no tokenizer.
    """
    from chiasm import vlm

    given = [name for name in ("preset", "folder", "config") if getattr(spec, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"model: give exactly one of preset, folder and config, got {', '.join(given) or 'none'}")
    if spec.folder is not None:
        whole = ("overrides", "weights", "tokenizer", "instruction_tokenizer", "controls", "start", "labels")
        if any(getattr(spec, name) for name in whole):
            raise ConfigError(
                "model.folder holds configuration, weights and tokenizer; overrides, weights, tokenizer, controls, "
                "labels and start belong to a model that is built: give preset or config"
            )
        return vlm.load(spec.folder, dtype=torch.float32, device=device)
    config = built_config(spec)
    if config.tokenizer is None:
        raise ConfigError("model.tokenizer is missing; name a folder that holds tokenizer.json or tokenizer.model")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = vlm.build(config, device=device, dtype=torch.float32, tokenizer=_tokenizer(spec, config.tokenizer))
    if spec.start is not None:
        begin(made.model, spec.start)
    return made


def _tokenizer(spec: ModelSpec, folder: str) -> Tokenizer | None:
    """The tokenizer with further control tokens, or with a second one for instructions. None: as its folder has it."""
    if spec.instruction_tokenizer is None and not spec.controls:
        return None
    made = Tokenizer.from_folder(folder).with_controls(spec.controls)
    if spec.instruction_tokenizer is None:
        return made
    return made.with_instruction(Tokenizer.from_folder(spec.instruction_tokenizer))


def built_config(spec: ModelSpec) -> VLMConfig:
    """The configuration of a model that is to be built. Raises ConfigError."""
    from chiasm.presets import preset

    if spec.preset is not None:
        config = preset(spec.preset, tiny=spec.tiny)
    else:
        config = VLMConfig.parse(spec.config or {}, where="model.config")
    changes: dict[str, Any] = dict(spec.overrides)
    if spec.tokenizer is not None:
        changes["tokenizer"] = spec.tokenizer
    if spec.labels is not None:
        changes["processing.labels"] = _labels(Path(spec.labels))
    config = config.edit(**changes)
    return config.model_copy(update={"weights": config.weights | spec.weights})


def _labels(file: Path) -> list[str]:
    """The texts of a JSON list. Raises ConfigError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.labels: {file} is no JSON file ({error}); write a list of texts") from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found) or len(set(found)) < len(found):
        raise ConfigError(f"model.labels: {file} must hold a list of texts, each of them once")
    return found


def random_parts(spec: ModelSpec, model: nn.Module) -> set[str]:
    """The parts that ``open_model`` drew at random: those that neither a folder nor a row of ``weights`` gave."""
    if spec.folder is not None:
        return set()
    given = {name.removesuffix(".query_half") for name in built_config(spec).weights}  # the other half is text's
    drawn = spec.start.is_fresh if spec.start is not None else lambda name: True
    parts = {part_of(name) for name, _ in model.named_parameters() if drawn(name)}
    return {p for p in parts if not any(p == g or p.startswith(g + ".") for g in given)}


def trained_parts(plan: Plan) -> set[str]:
    """The parts of which a plan trains something."""
    return {row.part for row in plan.rows if row.trainable}


def best_device(name: str) -> str:
    """``auto`` as the first of cuda and cpu that is there; any other name as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
