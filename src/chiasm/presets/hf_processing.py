"""The processor files of transformers ↔ our front ends: ``preprocessor_config.json``, ``processor_config.json``, video.

Transformers 4 writes the image processor alone into ``preprocessor_config.json``; transformers 5 nests it in
``processor_config.json`` as ``image_processor`` (and ``video_processor``). Keys left out have the default of the class
that ``image_processor_type`` names. Reference: the PIL image processors of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.convert.io import read_json
from chiasm.errors import CheckpointError
from chiasm.processing.image import CLIP_MEAN, CLIP_STD, ImageFrontEnd
from chiasm.processing.tiling import Tiling
from chiasm.processing.video import VideoFrontEnd

RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's number
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_PINPOINTS = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
_CLIP = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "resample": 3,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": {**_CLIP, "do_pad": False},
    "LlavaNextImageProcessor": {**_CLIP, "image_grid_pinpoints": NEXT_PINPOINTS},
    "SiglipImageProcessor": {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
    },
    "LlavaOnevisionImageProcessor": {
        "size": {"height": 384, "width": 384},
        "do_center_crop": False,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
        "image_grid_pinpoints": ONEVISION_PINPOINTS,
    },
    "BlipImageProcessor": {
        "size": {"height": 384, "width": 384},
        "do_center_crop": False,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
    },
    "IdeficsImageProcessor": {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
    },
    "ViTImageProcessor": {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
    },
    "InstructBlipVideoVideoProcessor": {
        "size": {"height": 384, "width": 384},
        "do_center_crop": False,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
    },
    "LlavaNextVideoVideoProcessor": _CLIP,
    "LlavaOnevisionVideoProcessor": {
        "size": {"height": 384, "width": 384},
        "do_center_crop": False,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
    },
}
_OLD_VIDEO = {
    "InstructBlipVideoImageProcessor": "InstructBlipVideoVideoProcessor",
    "LlavaNextVideoImageProcessor": "LlavaNextVideoVideoProcessor",
    "LlavaOnevisionVideoProcessor": "LlavaOnevisionVideoProcessor",
}


def processor_values(folder: Path) -> dict[str, Any]:
    """``processor``, ``image`` and ``video``: the tables of a folder's processor files, empty where it has none."""
    tables: dict[str, Any] = {"processor": {}, "image": {}, "video": {}}
    for key, name in (
        ("processor", "processor_config.json"),
        ("image", "preprocessor_config.json"),
        ("video", "video_preprocessor_config.json"),
    ):
        if (folder / name).is_file():
            tables[key] = read_json(folder / name)
    for key in ("image", "video"):
        nested = tables["processor"].get(f"{key}_processor")
        if nested:
            tables[key] = nested
    return tables


def read_image(values: Mapping[str, Any], placeholder: str | None, kind: str, where: str) -> ImageFrontEnd.Config:
    """An image (or frame) processor's table → our front end. ``kind`` names the class where the table does not.

    Raises CheckpointError for what the front end does not do.
    """
    name = str(values.get("image_processor_type") or values.get("video_processor_type") or kind)
    for ending in ("Fast", "Pil"):
        name = name.removesuffix(ending)
    name = _OLD_VIDEO.get(name, name)
    if name not in DEFAULTS:
        raise CheckpointError(
            f"{where}: image processor {name!r} is not supported; supported: {', '.join(sorted(DEFAULTS))}"
        )
    c = DEFAULTS[name] | {key: value for key, value in values.items() if value is not None}
    for key, wanted in (("do_resize", True), ("do_rescale", True)):
        if c.get(key, wanted) is not wanted:
            raise CheckpointError(f"{where}: image processor with {key}={c[key]} is not supported")
    if abs(float(c.get("rescale_factor", 1 / 255)) - 1 / 255) > 1e-9:
        raise CheckpointError(f"{where}: rescale_factor is {c['rescale_factor']}, only 1/255 is supported")
    normalise = c.get("do_normalize", True)
    crop = _square(c["crop_size"], where) if c.get("do_center_crop") else None
    fit, size, edge = _fit(c, crop, where)
    tiling, several = None, "tile"
    if "image_grid_pinpoints" in c:
        tiling = Tiling(pinpoints=tuple(tuple(pair) for pair in c["image_grid_pinpoints"]), axes="hw")
        several = "pad" if name == "LlavaOnevisionImageProcessor" else "tile"
    return ImageFrontEnd.Config.parse(
        {
            "placeholder": placeholder,
            "size": size,
            "fit": fit,
            "shortest_edge": edge if edge != size else None,
            "resample": RESAMPLE[int(c["resample"])],
            "mean": tuple(c["image_mean"]) if normalise else (0.0, 0.0, 0.0),
            "std": tuple(c["image_std"]) if normalise else (1.0, 1.0, 1.0),
            "tiling": tiling,
            "several": several,
        },
        where=f"{where}: image processor {name!r}",
    )


def read_video(
    values: Mapping[str, Any], image: Mapping[str, Any], placeholder: str, kind: str, where: str
) -> VideoFrontEnd.Config:
    """A video processor's table → our front end. Old folders keep the frames' sizes in the image processor's table."""
    table = dict(values)
    if not table:
        keep = ("size", "crop_size", "do_center_crop", "image_mean", "image_std", "resample")
        table = {key: image[key] for key in keep if key in image}
    frames = read_image({**table, "video_processor_type": table.get("video_processor_type") or kind}, None, kind, where)
    number = table.get("num_frames") or 32
    return VideoFrontEnd.Config.parse(
        {"placeholder": placeholder, "frames": number, "sampling": "all", "image": frames}
    )


def write_image(config: ImageFrontEnd.Config, kind: str, where: str) -> dict[str, Any]:
    """Our front end as the table of image processor ``kind``. Raises CheckpointError where the class cannot do it."""
    lost = []
    if config.crop_rounding != "floor":
        lost.append(f"crop_rounding={config.crop_rounding!r}")
    if config.alpha != "drop":
        lost.append(f"alpha={config.alpha!r}")
    values: dict[str, Any] = {
        "image_processor_type": kind,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "resample": RESAMPLE.index(config.resample),
    }
    if kind in ("LlavaOnevisionImageProcessor", "LlavaOnevisionVideoProcessor"):
        if config.fit != "squash":
            lost.append(f"fit={config.fit!r}")
        values |= {"size": {"height": config.size, "width": config.size}}
    elif config.fit == "squash":
        values |= {"size": {"height": config.size, "width": config.size}, "do_center_crop": False}
        if kind in ("CLIPImageProcessor", "LlavaImageProcessor"):
            values["image_processor_type"] = "SiglipImageProcessor"
        elif kind == "IdeficsImageProcessor":
            values["image_size"] = config.size
        elif kind == "BlipImageProcessor":
            pass  # a square is all that it knows
        else:
            lost.append("fit='squash'")
    else:
        values |= {
            "size": {"shortest_edge": config.edge},
            "crop_size": {"height": config.size, "width": config.size},
            "do_center_crop": True,
        }
        if config.fit == "pad":
            if kind not in ("CLIPImageProcessor", "LlavaImageProcessor") or config.pad_color != "mean":
                lost.append(f"fit='pad' with pad_color={config.pad_color!r}")
            values |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if config.tiling is not None:
        pairs = config.tiling.sizes()
        values |= {"image_grid_pinpoints": [list(pair) for pair in pairs], "do_pad": True}
    if lost:
        raise CheckpointError(f"{where}: {kind} has no counterpart of {', '.join(lost)}")
    return values


def _square(size: Any, where: str) -> int:
    if isinstance(size, int):
        return size
    if "shortest_edge" in size:
        return int(size["shortest_edge"])
    if size["height"] != size["width"]:
        raise CheckpointError(f"{where}: pictures of {size['width']}x{size['height']} are not square, which is needed")
    return int(size["height"])


def _fit(c: Mapping[str, Any], crop: int | None, where: str) -> tuple[str, int, int | None]:
    """``fit``, the unit's size and the shorter side before the crop."""
    size = c["size"]
    shortest = size if isinstance(size, int) else size.get("shortest_edge")
    if isinstance(size, Mapping) and "height" in size:
        side = _square(size, where)
        if crop is not None and crop != side:
            raise CheckpointError(f"{where}: a stretch to {side} followed by a crop to {crop} is not supported")
        if c.get("do_pad") and "image_grid_pinpoints" not in c:
            raise CheckpointError(f"{where}: padding followed by a stretch is not supported")
        return "squash", side, None
    if crop is None:
        raise CheckpointError(f"{where}: shortest_edge {shortest} without a crop gives pictures of many sizes")
    pad = bool(c.get("do_pad")) and "image_grid_pinpoints" not in c
    return ("pad" if pad else "crop"), crop, int(shortest)
