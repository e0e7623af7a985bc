"""Our own folder: ``config.json``, ``model.safetensors`` or shards, tokenizer files, ``fingerprint.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from chiasm.checkpoints.seal import KEY, OLDER, RESTORE, WORDS, edited, log, reworded, seal, words_of
from chiasm.compose import build_model, install, installed
from chiasm.convert.engine import load_weights
from chiasm.convert.io import Weights, open_weights, read_json, replaced_folder, write_json, write_weights
from chiasm.convert.rules import AnyRule, Plan, rename
from chiasm.errors import CheckpointError, FingerprintError
from chiasm.fusion.base import Fusion
from chiasm.lm.silent import Silent
from chiasm.lm.tokenizer import Tokenizer
from chiasm.lm.tokenizer_files import NAMES
from chiasm.model_config import FORMAT, MethodRecord, VLMConfig
from chiasm.processing.fingerprint import REMEDY, compare, fingerprint
from chiasm.processing.pair import reads_nothing
from chiasm.processing.processor import Processor, TokenizerLike

FINGERPRINT = "fingerprint.json"
SAME_NAMES: list[AnyRule] = [rename("{rest}", "{rest}")]


def is_own(values: Any) -> bool:
    """Whether a ``config.json`` with these values is of this layout, of any version."""
    return isinstance(values, Mapping) and str(values.get("format", "")).startswith("chiasm/")


def parsed(values: Mapping[str, Any], folder: Path) -> VLMConfig:
    """The configuration of a folder. Raises CheckpointError for the layout of another version, ConfigError."""
    if values["format"] != FORMAT:
        raise CheckpointError(
            f"{folder / 'config.json'} has format {values['format']!r}, this version of chiasm reads {FORMAT!r}; "
            "install the version of chiasm that wrote it, or save the model again with this one"
        )
    return VLMConfig.parse(values, where=str(folder / "config.json"))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter (ours, or one of ``peft``) and no whole model."""
    names = ("chiasm_adapter.json", "adapter_config.json")
    return not (folder / "config.json").is_file() and any((folder / name).is_file() for name in names)


def save(
    config: VLMConfig,
    model: Fusion,
    processor: Processor | None,
    folder: Path,
    max_shard: int,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write everything aside, then move it into ``folder``. Raises CheckpointError for a model without memory.

    ``tensors`` are written in place of the model's own of the same names.
    """
    state = model.state_dict()
    state.update({name: tensor for name, tensor in (tensors or {}).items() if name in state})
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{len(empty)} tensors have no memory ({empty[0]!r}, ...): a model on 'meta' cannot be saved"
        )
    bad = [n for n, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise CheckpointError(
            f"{len(bad)} tensors hold NaN or infinity ({', '.join(bad[:3])}); such a model is not saved"
        )
    with replaced_folder(folder, owned=(*NAMES, FINGERPRINT)) as aside:
        write_weights(aside, state, max_shard)
        if processor is not None:
            processor.tokenizer.save(aside)  # type: ignore[attr-defined]
        carried = tuple(MethodRecord(method=method, modules=modules) for method, modules in installed(model))
        saved = config.model_copy(update={"weights": {}, "tokenizer": None, "methods": carried})
        printed = {} if processor is None else fingerprint(processor)
        write_json(aside / FINGERPRINT, printed | {KEY: seal(saved), WORDS: words_of(aside)}, indent=None)
        write_json(aside / "config.json", saved.dump())
    return folder


def load(
    folder: Path,
    values: Mapping[str, Any],
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    ignore_fingerprint: bool = False,
    allow_pickle: bool = False,
) -> tuple[VLMConfig, Fusion, Processor | None]:
    """Configuration, filled network and processor. Raises FingerprintError where prompt or pixels changed."""
    config = parsed(values, folder)
    stored, processor = _stored(folder), None
    if "probes" in stored or any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = Silent() if reads_nothing(config.processing) else Tokenizer.from_folder(folder)
        processor = Processor(config.processing, cast(TokenizerLike, tokenizer), config.model.count)
    config = _verified(config, processor, folder, stored, ignore_fingerprint)
    model, _ = filled(config, open_weights(folder, allow_pickle), SAME_NAMES, dtype, device)
    return config, model, processor


def filled(
    config: VLMConfig,
    weights: Weights,
    rules: Sequence[AnyRule],
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[Fusion, list[str]]:
    """The network of a configuration with the tensors of ``weights``, read one by one into their type and place.

    The second value says, for the provenance, which tensors were left out and why.
    """
    dtype = dtype or weights.dtype()
    model = build_model(config.model, "meta", dtype)
    install(model, config.methods)
    plan = load_weights(model, weights, rules, dtype, device)
    lost = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if lost:  # a part computes buffers when it is built: build it where it will live
        model = build_model(config.model, device or "cpu", dtype)
        install(model, config.methods)
        load_weights(model, weights, rules, dtype, device)
    return model, dropped(plan)


def dropped(plan: Plan) -> list[str]:
    """One line for each reason for which tensors of a file were left out."""
    reasons: dict[str, list[str]] = {}
    for name, why in plan.dropped.items():
        reasons.setdefault(why, []).append(name)
    return [
        f"{len(names)} tensors left out ({names[0]}{', ...' if len(names) > 1 else ''}): {why}"
        for why, names in reasons.items()
    ]


def _stored(folder: Path) -> Mapping[str, Any]:
    """The folder's fingerprint, empty where it has none. Raises CheckpointError."""
    stored = read_json(folder / FINGERPRINT) if (folder / FINGERPRINT).is_file() else {}
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{folder / FINGERPRINT} holds {type(stored).__name__}, a table was expected")
    return stored


def _verified(
    config: VLMConfig, processor: Processor | None, folder: Path, stored: Mapping[str, Any], ignore: bool
) -> VLMConfig:
    """Compare prompts, pixels and configuration with those stored. Raises FingerprintError; with ``ignore`` a
    difference is written into the provenance instead.
    """
    seen = None
    if processor is not None:
        seen = (compare(processor, stored) or reworded(folder, stored)) if stored else f"{FINGERPRINT} is missing"
    built = edited(config, stored) if KEY in stored else None
    differences = [found for found in (seen, built) if found]
    if KEY not in stored and (stored or processor is None):
        log.warning("%s: %s", folder, OLDER)
        config = config.model_copy(update={"provenance": config.provenance.add(OLDER)})
    if differences and not ignore:
        raise FingerprintError(f"{folder}: {'; '.join(differences)}. {REMEDY if seen else RESTORE}")
    for found in differences:
        provenance = config.provenance.add("loaded although its fingerprint differed", ignored=found)
        config = config.model_copy(update={"provenance": provenance})
    return config
