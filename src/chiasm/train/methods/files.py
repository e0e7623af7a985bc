"""Adapter folders: what a stage trained, small, and what it belongs to.

``chiasm_adapter.json`` says everything about the adapter: its methods and the modules they changed, the base model (its
folder or configuration, and a mark of its weights) and how it was prompted. LoRA stands in ``peft``'s two files, which
``peft`` reads; what they cannot hold (prompts, adapters, tensors of ours without a counterpart) stands under our own
names in ``trained.safetensors``. A folder that ``peft`` wrote, without our file, is read onto a base that is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chiasm import compose
from chiasm.config import Config, diff
from chiasm.convert import peft
from chiasm.convert.io import open_weights, read_json, replaced_folder, write_json
from chiasm.errors import CheckpointError
from chiasm.model_config import MethodRecord, VLMConfig
from chiasm.registry import register
from chiasm.train.methods.base import own_parameters
from chiasm.train.methods.fingerprint import base_mark
from chiasm.train.methods.lora import LoRAConfig
from chiasm.train.methods.names import naming, ours, theirs

ABOUT, TRAINED = "chiasm_adapter.json", "trained.safetensors"
FORMAT = "chiasm-adapter/1"


class About(Config):
    """What an adapter folder says of itself."""

    format: str = FORMAT
    base: str | None  # the base model's folder or hub name; None: it is built from ``config``
    base_mark: str  # of its weights, without those in ``full``
    prompt: str  # hash of the processing that the adapter was trained with
    config: VLMConfig  # the base model's
    methods: tuple[MethodRecord, ...]
    full: tuple[str, ...] = ()  # parameters trained as they are


def save_adapter(
    vlm: Any,
    folder: str | Path,
    base: str | Path | None = None,
    full: Iterable[str] | None = None,
    layout: str = "auto",
) -> Path:
    """Write what ``vlm`` was trained to: the parameters of its methods, and those called in ``full`` (None: whatever
    else needs a gradient now). ``layout`` chooses the names in ``peft``'s files: those of transformers' LLaVA classes
    (``"llava"``), of its causal language models (``"lm"``), or the first that fit (``"auto"``).
    """
    own = set(own_parameters(vlm.model))
    parameters = dict(vlm.model.named_parameters())
    kept = sorted({n for n, p in parameters.items() if p.requires_grad} - own if full is None else set(full) - own)
    if not own and not kept:
        raise CheckpointError("the model carries no method and nothing of it is trained: there is no adapter to write")
    records = tuple(MethodRecord(method=m, modules=names) for m, names in compose.installed(vlm.model))
    about = About(
        base=None if base is None else str(base),
        base_mark=base_mark(vlm.model, own | set(kept)),
        prompt=vlm.config.processing.hash(),
        config=vlm.config.model_copy(update={"methods": ()}),
        methods=records,
        full=tuple(kept),
    )
    adapter, written = _for_peft(vlm, records, kept, layout, about.base)
    rest = {name: parameters[name] for name in [*sorted(own), *kept] if name not in written}
    with replaced_folder(folder, owned=(peft.CONFIG, ABOUT)) as aside:
        if adapter is not None:
            peft.write(aside, *adapter)
        if rest:
            peft.write_tensors(aside / TRAINED, rest)
        write_json(aside / ABOUT, about.dump())
    return Path(folder)


@register("adapter", "folder")
def load_adapter(
    folder: str | Path, base: Any = None, dtype: torch.dtype | str | None = None, device: Any = None, **options: Any
) -> Any:
    """The base model with an adapter on it, unmerged, in eval mode.

    ``base``: a folder, a hub name or a VLM; None: the one that the adapter names. Raises CheckpointError where the base
    is not the one that the adapter was trained on, or a tensor does not fit.
    """
    folder = Path(folder)
    about = _about(folder)
    vlm = base if hasattr(base, "model") else _base(folder, about, base, dtype, device, options)
    if about is None:
        return _theirs_onto(vlm, folder).eval()
    _belongs(vlm, about, folder)
    tensors = _tensors(folder, vlm, about)
    compose.install(vlm.model, about.methods)
    _fill(vlm.model, tensors, {*own_parameters(vlm.model), *about.full}, folder)
    vlm.config = vlm.config.model_copy(
        update={"methods": about.methods, "provenance": vlm.config.provenance.add(f"adapter {folder} on it")}
    )
    return vlm.eval()


def _for_peft(
    vlm: Any, records: Iterable[MethodRecord], kept: list[str], layout: str, base: str | None
) -> tuple[tuple[peft.PeftFile, tuple[str, ...]] | None, set[str]]:
    """LoRA layers and connectors as ``peft`` calls them, and which of our parameters they are."""
    changed = {n: record.method for record in records for n in record.modules if isinstance(record.method, LoRAConfig)}
    if not changed:
        return None, set()
    try:
        rules = naming(vlm.config.model, layout)
    except CheckpointError:
        if layout != "auto":
            raise
        return None, set()
    called = theirs([f"{name}.weight" for name in changed] + kept, rules)
    written: set[str] = set()
    file = peft.PeftFile({}, base=base, dropout=max(method.dropout for method in changed.values()))
    for name, method in changed.items():
        if f"{name}.weight" in called:
            layer: Any = vlm.model.get_submodule(name)
            module = called[f"{name}.weight"].removesuffix(".weight")
            file.layers[module] = peft.Matrices(layer.lora_a, layer.lora_b, method.alpha)
            written |= {f"{name}.lora_a", f"{name}.lora_b"}
    modules = set()
    for name in kept:  # peft keeps whole modules: those whose parameters are all trained
        part = ".".join(name.split(".")[:2])
        below = [own for own, _ in vlm.model.named_parameters() if own.startswith(part + ".")]
        if part.startswith("connectors.") and name in called and set(below) <= set(kept):
            file.full[called[name]] = vlm.model.get_parameter(name)
            modules.add(called[name].rpartition(".")[0].rpartition(".")[0])
            written.add(name)
    return (file, tuple(modules)) if file.layers else None, written if file.layers else set()


def _about(folder: Path) -> About | None:
    if not (folder / ABOUT).is_file():
        if not (folder / peft.CONFIG).is_file():
            raise CheckpointError(f"{folder} holds no adapter: neither {ABOUT} nor {peft.CONFIG} is there")
        return None
    values = read_json(folder / ABOUT)
    found = values.get("format") if isinstance(values, Mapping) else None
    if found != FORMAT:
        raise CheckpointError(f"{folder / ABOUT}: has format {found!r}, this version reads {FORMAT!r}")
    return About.parse(values, where=str(folder / ABOUT))


def _base(folder: Path, about: About | None, base: Any, dtype: Any, device: Any, options: dict[str, Any]) -> Any:
    """The base model: the folder named, the adapter's own, or the one its configuration builds."""
    from chiasm import vlm

    name = base or (about.base if about else read_json(folder / peft.CONFIG).get("base_model_name_or_path"))
    if name is not None:
        return vlm.load(name, dtype=dtype, device=device, **options)
    if about is None or about.config.tokenizer is None:
        raise CheckpointError(f"{folder} names no base model: give one, base=FOLDER")
    return vlm.build(about.config, device=device or "cpu", dtype=dtype or "float32")


def _belongs(vlm: Any, about: About, folder: Path) -> None:
    """Raises CheckpointError where ``vlm`` is not the adapter's base."""
    carried = compose.installed(vlm.model)
    if carried:
        raise CheckpointError(f"{folder}: the base model carries {carried[0][0].type} already: merge that first")
    known = dict(vlm.model.named_parameters())
    missing = [name for name in about.full if name not in known]
    here = base_mark(vlm.model, about.full) if not missing else "another structure"
    if here != about.base_mark:
        raise CheckpointError(
            f"{folder}: this adapter was trained on a base whose weights have the mark {about.base_mark} "
            f"({about.base or 'built from its configuration'}), those here have {here}: load it onto its own base"
        )
    for key, (was, found) in diff(about.config.model, vlm.config.model).items():
        raise CheckpointError(
            f"{folder}: the adapter was trained on a base whose model.{key} was {was!r}, here it is {found!r}: load it "
            "onto its own base"
        )
    if vlm.config.processing.hash() != about.prompt:
        raise CheckpointError(
            f"{folder}: the adapter was trained with processing {about.prompt}, the base here has "
            f"{vlm.config.processing.hash()}: template or picture settings differ; load the base it was trained on"
        )


def _tensors(folder: Path, vlm: Any, about: About) -> dict[str, Tensor]:
    """All tensors of an adapter folder under our names."""
    found: dict[str, Tensor] = {}
    if (folder / TRAINED).is_file():
        weights = open_weights(folder / TRAINED)
        found = {name: weights.read(name) for name in weights.info}
    if (folder / peft.CONFIG).is_file():
        file = peft.read(folder)
        scales = {
            method.alpha for method in (record.method for record in about.methods) if isinstance(method, LoRAConfig)
        }
        for name, pair in file.layers.items():
            if pair.alpha not in scales:
                raise CheckpointError(
                    f"{folder}: alpha of {name!r} is {pair.alpha} in {peft.CONFIG}, but {ABOUT} says "
                    f"{', '.join(map(str, sorted(scales)))}: one of them was edited after it was saved; restore it"
                )
        found |= _our_tensors(vlm, file)
    return found


def _our_tensors(vlm: Any, file: peft.PeftFile) -> dict[str, Tensor]:
    rules = _fitting(vlm, [f"{name}.weight" for name in file.layers] + list(file.full))
    names = ours([f"{name}.weight" for name in file.layers] + list(file.full), rules)
    found = {names[name]: tensor for name, tensor in file.full.items()}
    for name, pair in file.layers.items():
        module = names[f"{name}.weight"].removesuffix(".weight")
        found |= {f"{module}.lora_a": pair.a, f"{module}.lora_b": pair.b}
    return found


def _fitting(vlm: Any, names: list[str]) -> list[Any]:
    """The naming under which all of these names have a counterpart in the model."""
    try:
        rules = naming(vlm.config.model, "llava")
        inside = dict(vlm.model.named_parameters())
        if all(name in inside for name in ours(names, rules).values()):
            return rules
    except CheckpointError:
        pass
    return naming(vlm.config.model, "lm")


def _theirs_onto(vlm: Any, folder: Path) -> Any:
    """An adapter of ``peft`` alone: its layers become LoRA of ours, of one rank and alpha or of several."""
    file = peft.read(folder)
    tensors = _our_tensors(vlm, file)
    rules = _fitting(vlm, [f"{name}.weight" for name in file.layers] + list(file.full))
    names = ours([f"{name}.weight" for name in file.layers], rules)
    groups: dict[LoRAConfig, list[str]] = {}
    for name, pair in file.layers.items():
        config = LoRAConfig(r=pair.r, alpha=pair.alpha, dropout=file.dropout)
        groups.setdefault(config, []).append(names[f"{name}.weight"].removesuffix(".weight"))
    records = tuple(MethodRecord(method=config, modules=tuple(modules)) for config, modules in groups.items())
    for module in (module for record in records for module in record.modules):
        if not isinstance(_submodule(vlm.model, module), nn.Linear):
            raise CheckpointError(f"{folder}: the model has no linear layer {module!r} that this adapter changes")
    compose.install(vlm.model, records)
    _fill(vlm.model, tensors, set(tensors), folder)
    vlm.config = vlm.config.model_copy(
        update={"methods": records, "provenance": vlm.config.provenance.add(f"adapter {folder} (peft) on it")}
    )
    return vlm


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor], wanted: set[str], folder: Path) -> None:
    """Copy the tensors into the parameters of these names: all of them, and none else. Raises CheckpointError."""
    parameters = dict(model.named_parameters())
    missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    problems = [f"{len(missing)} tensors are missing ({missing[0]!r}, ...)"] if missing else []
    problems += [f"{len(extra)} tensors have no place ({extra[0]!r}, ...)"] if extra else []
    for name, tensor in tensors.items():
        if name in parameters and parameters[name].shape != tensor.shape:
            problems.append(
                f"{name!r} is {list(tensor.shape)} in the file, {list(parameters[name].shape)} in the model"
            )
        if not torch.isfinite(tensor).all():
            problems.append(f"{name!r} holds NaN or infinity")
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems[:6])}. The adapter belongs to another model")
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
