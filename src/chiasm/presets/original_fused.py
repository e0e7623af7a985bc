"""The authors' checkpoints of ViLT, ALBEF, VLMo and BEiT-3, read into a model that a preset built.

    vlm = chiasm.build(chiasm.preset("beit3-base-vqa"), tokenizer=folder)
    read_original(vlm, "beit3_base_indomain_patch16_480_vqa.pth", allow_pickle=True)

These files hold tensors alone, so the preset says what they are. They are pickles: allow them only from a place that
you trust.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chiasm.convert import maps_albef, maps_multiway, maps_vilt, maps_vlmo
from chiasm.convert.engine import load_weights
from chiasm.convert.io import Loaded, Weights, open_weights
from chiasm.convert.rules import AnyRule, Plan
from chiasm.errors import CheckpointError

WRAPPED = ("model", "module", "state_dict")  # keys under which the authors' trainers keep the tensors


def read_original(vlm: Any, path: str | Path, allow_pickle: bool = False) -> Plan:
    """Fill ``vlm`` from one of the authors' files; what was left out, and why, is in the plan and the provenance.

    Strict as every loader here: a tensor too many or too few is an error that names it. Raises CheckpointError.
    """
    weights = unwrapped(Path(path), allow_pickle)
    plan = load_weights(vlm.model, weights, rules_of(vlm.config.model, weights))
    note = f"read from {Path(path).name} (the authors' layout)"
    vlm.config = vlm.config.model_copy(update={"provenance": vlm.config.provenance.add(note, base={"all": str(path)})})
    return plan


def rules_of(c: Any, weights: Weights) -> list[AnyRule]:
    """The rules for a configuration. Raises CheckpointError for a fusion without a layout of its authors."""
    head = "nlvr2_classifier" if c.images == 2 else "vqa_classifier"
    if c.type == "single_stream":
        return [*maps_vilt.word_bias(weights.info), *maps_vilt.original(c.dim, head)]
    if c.type == "albef":
        deep = c.fusion_depth * c.images
        return maps_albef.albef(c.vision.dim, c.text_depth, deep, c.answer_depth, c.momentum is not None)
    if c.type == "modality_experts":
        return maps_vlmo.vlmo(c.dim, c.places == "bias", head)
    if c.type == "multiway":
        return maps_multiway.beit3(pairs=c.images == 2)
    raise CheckpointError(f"a fusion of type {c.type!r} has no layout of its authors here")


def unwrapped(path: Path, allow_pickle: bool) -> Weights:
    """The tensors of a file, also where they stand below ``model``, ``module`` or ``state_dict``."""
    if path.suffix == ".safetensors":
        return open_weights(path)
    if not allow_pickle:
        raise CheckpointError(
            f"{path}: is a pickle, which can run code when it is read; pass allow_pickle=True if you trust its source, "
            "or save its tensors as safetensors"
        )
    import torch

    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from None
    for key in WRAPPED:
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
            break
    tensors = {str(k).removeprefix("module."): v for k, v in values.items() if isinstance(v, torch.Tensor)}
    return Loaded(str(path), tensors)
