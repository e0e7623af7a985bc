"""ALIGN's picture tower and its pixels in folders of transformers, both ways: ``AlignVisionModel`` and
``EfficientNetImageProcessor`` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chiasm.encoders.efficientnet import EfficientNet
from chiasm.errors import CheckpointError
from chiasm.presets.hf_processing import RESAMPLE

VISION: dict[str, Any] = {
    "num_channels": 3,
    "image_size": 600,
    "width_coefficient": 2.0,
    "depth_coefficient": 3.1,
    "depth_divisor": 8,
    "kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "depthwise_padding": [],
    "strides": [1, 2, 2, 2, 1, 2, 1],
    "num_block_repeats": [1, 2, 2, 3, 3, 4, 1],
    "expand_ratios": [1, 6, 6, 6, 6, 6, 6],
    "squeeze_expansion_ratio": 0.25,
    "hidden_act": "swish",
    "hidden_dim": 2560,
    "pooling_type": "mean",
    "batch_norm_eps": 1e-3,
}
IMAGE: dict[str, Any] = {
    "size": {"height": 346, "width": 346},
    "crop_size": {"height": 289, "width": 289},
    "do_center_crop": False,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "include_top": True,
}
PROCESSOR = "EfficientNetImageProcessor"


def tower(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """ALIGN's picture tower. Raises CheckpointError."""
    c = VISION | dict(values)
    before = [32, *c["out_channels"][:-1]]
    if list(c["in_channels"]) != before or c["pooling_type"] != "mean" or c["hidden_act"] not in ("swish", "silu"):
        raise CheckpointError(
            f"{where}: an EfficientNet with in_channels={c['in_channels']} (expected {before}), pooling "
            f"{c['pooling_type']!r} and {c['hidden_act']!r} is not supported"
        )
    keys = ("out_channels", "kernel_sizes", "strides", "num_block_repeats", "expand_ratios")
    names = ("channels", "kernel", "stride", "repeats", "expand")
    return {
        "type": "efficientnet",
        "image_size": c["image_size"],
        "width": c["width_coefficient"],
        "depth": c["depth_coefficient"],
        "divisor": c["depth_divisor"],
        "stages": [dict(zip(names, row, strict=True)) for row in zip(*(c[key] for key in keys), strict=True)],
        "squeeze": c["squeeze_expansion_ratio"],
        "square_padding": c["depthwise_padding"],
        "norm_eps": c["batch_norm_eps"],
        "channels": c["num_channels"],
    }


def image(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The picture front end of a table. Raises CheckpointError for what the front end does not do."""
    c = IMAGE | dict(values)
    size, crop = (c[key] for key in ("size", "crop_size"))
    edge, side = size["height"], crop["height"] if c["do_center_crop"] else size["height"]
    # Pixels become value / 255, or value / 127.5 - 1; include_top divides by the deviation a second time.
    offset = bool(c["rescale_offset"])
    factor = 1 / 127.5 if offset else 1 / 255
    if abs(c["rescale_factor"] - factor) > 1e-9 or (offset and c["do_normalize"]) or size["width"] != edge:
        raise CheckpointError(
            f"{where}: EfficientNetImageProcessor with rescale_factor={c['rescale_factor']}, rescale_offset={offset}, "
            f"do_normalize={c['do_normalize']} and size={size} is not supported"
        )
    plain = [0.5] * 3 if offset else [0.0] * 3
    mean, std = (c["image_mean"], c["image_std"]) if c["do_normalize"] else (plain, [0.5] * 3 if offset else [1.0] * 3)
    if c["include_top"]:
        mean, std = _twice(mean, std, c["image_std"])
    return {
        "type": "image",
        "placeholder": None,
        "size": side,
        "shortest_edge": edge if edge != side else None,
        "fit": "squash",
        "resample": RESAMPLE[int(c["resample"])],
        "mean": mean,
        "std": std,
    }


def _twice(mean: Any, std: Any, again: Any) -> tuple[list[float], list[float]]:
    """``((x - mean) / std) / again`` as one step."""
    return list(mean), [a * b for a, b in zip(std, again, strict=True)]


def written_image(front: Any) -> dict[str, Any]:
    """The picture front end as the class's table. Raises CheckpointError where that cannot do it."""
    if front.fit != "squash" or front.crop_rounding != "floor" or front.alpha != "drop":
        raise CheckpointError(f"export: {PROCESSOR} stretches pictures, this model has fit={front.fit!r}")
    return IMAGE | {
        "image_processor_type": PROCESSOR,
        "size": {"height": front.edge, "width": front.edge},
        "crop_size": {"height": front.size, "width": front.size},
        "do_center_crop": front.edge != front.size,
        "image_mean": list(front.mean),
        "image_std": list(front.std),
        "include_top": False,
        "resample": RESAMPLE.index(front.resample),
    }


def written_tower(tower: EfficientNet.Config) -> dict[str, Any]:
    """The tower as the class's configuration."""
    stages = tower.stages
    return VISION | {
        "model_type": "align_vision_model",
        "image_size": tower.image_size,
        "num_channels": tower.channels,
        "width_coefficient": tower.width,
        "depth_coefficient": tower.depth,
        "depth_divisor": tower.divisor,
        "out_channels": [stage.channels for stage in stages],
        "in_channels": [tower.stem, *(stage.channels for stage in stages[:-1])],
        "kernel_sizes": [stage.kernel for stage in stages],
        "strides": [stage.stride for stage in stages],
        "num_block_repeats": [stage.repeats for stage in stages],
        "expand_ratios": [stage.expand for stage in stages],
        "squeeze_expansion_ratio": tower.squeeze,
        "depthwise_padding": list(tower.square_padding),
        "batch_norm_eps": tower.norm_eps,
        "hidden_dim": 4 * tower.dim,
    }
