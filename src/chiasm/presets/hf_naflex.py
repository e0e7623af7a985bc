"""The parts of a folder of transformers that only SigLIP 2's NaFlex has: its picture tower and its front end.

Reference: ``Siglip2VisionConfig`` and ``Siglip2ImageProcessorPil`` of transformers 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from chiasm.encoders.naflex import NaFlex
from chiasm.errors import CheckpointError
from chiasm.presets.hf_processing import RESAMPLE
from chiasm.processing.naflex import NaFlexFrontEnd

VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_patches": 256,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
IMAGE: dict[str, Any] = {
    "patch_size": 16,
    "max_num_patches": 256,
    "resample": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}
PROCESSOR = "Siglip2ImageProcessor"
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def tower(values: Mapping[str, Any], where: str) -> NaFlex.Config:
    """The tower of a ``Siglip2VisionConfig``. Raises CheckpointError for what it does not express."""
    c = VISION | {key: value for key, value in values.items() if value is not None}
    side = math.isqrt(c["num_patches"])
    if side**2 != c["num_patches"] or not isinstance(c["patch_size"], int) or c["hidden_act"] not in _ACTIVATIONS:
        raise CheckpointError(
            f"{where}: a vision tower with num_patches={c['num_patches']}, patch_size={c['patch_size']} and "
            f"hidden_act={c['hidden_act']!r} is not supported: positions fill a square, patches are squares"
        )
    return NaFlex.Config(
        side=side,
        patch=c["patch_size"],
        dim=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp=c["intermediate_size"],
        channels=c["num_channels"],
        activation=_ACTIVATIONS[c["hidden_act"]],  # type: ignore[arg-type]
        norm_eps=c["layer_norm_eps"],
    )


def written_tower(config: NaFlex.Config) -> dict[str, Any]:
    """The tower as the class's configuration."""
    return VISION | {
        "model_type": "siglip2_vision_model",
        "hidden_size": config.dim,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_channels": config.channels,
        "num_patches": config.side**2,
        "patch_size": config.patch,
        "hidden_act": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation),
        "layer_norm_eps": config.norm_eps,
    }


def image(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The front end of a ``Siglip2ImageProcessor``. Raises CheckpointError for another class or other steps."""
    name = str(values.get("image_processor_type", PROCESSOR)).removesuffix("Fast").removesuffix("Pil")
    c = IMAGE | {key: value for key, value in values.items() if value is not None}
    off = [step for step in ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize") if not c[step]]
    if name != PROCESSOR or off or abs(c["rescale_factor"] * 255 - 1) > 1e-6:
        raise CheckpointError(
            f"{where}: pictures are prepared by {name!r} without {', '.join(off) or 'nothing'} and multiplied with "
            f"{c['rescale_factor']:g}; a NaFlex tower is read with {PROCESSOR}, all its steps and 1/255"
        )
    return {
        "type": "naflex",
        "patch": c["patch_size"],
        "patches": c["max_num_patches"],
        "resample": RESAMPLE[int(c["resample"])],
        "mean": tuple(c["image_mean"]),
        "std": tuple(c["image_std"]),
    }


def written_image(front: Any) -> dict[str, Any]:
    """The front end as the class's table. Raises CheckpointError where that cannot do it."""
    if not isinstance(front, NaFlexFrontEnd.Config) or front.alpha != "drop":
        raise CheckpointError(f"export: {PROCESSOR} makes lists of patches, this model has a front end {front.type!r}")
    return IMAGE | {
        "image_processor_type": PROCESSOR,
        "patch_size": front.patch,
        "max_num_patches": front.patches,
        "resample": RESAMPLE.index(front.resample),
        "image_mean": list(front.mean),
        "image_std": list(front.std),
    }
