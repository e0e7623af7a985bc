"""Any vision model of transformers as an encoder, built from its configuration.

Reference: ``AutoModel`` of transformers (4.57 or later). Of a configuration with several towers (CLIP, SigLIP, LLaVA)
the ``vision_config`` is taken. Nothing is downloaded and no code of a checkpoint is run: weights come by the loader, as
for every other part. Unlike ``vit`` the model runs all of its layers, whichever is read.

Letters: ``U`` pictures, ``N`` vectors kept, ``D`` width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from chiasm.config import Config as BaseConfig
from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.errors import ConfigError, DataError
from chiasm.nn.patch import patch_grid
from chiasm.nn.reach import key_biases, unreached
from chiasm.registry import register
from chiasm.types import Count, Tokens


class Geometry(BaseConfig):
    """What the model makes of a picture, found by one run without memory when the configuration is first read.

    ``tokens`` counts everything it gives at ``image_size`` (height, width), the ``prefix`` (class vector, registers)
    included. ``patch`` is None for models whose vectors are not one a patch: they take pictures of ``image_size`` only.
    ``grid`` is (rows, columns) at ``image_size``, ``states`` the number of hidden states that can be read.
    """

    image_size: tuple[int, int]
    channels: int
    patch: int | None
    dim: int
    tokens: int
    prefix: int
    grid: tuple[int, int] | None
    states: int


@register("encoder", "hf")
class HFEncoder(Encoder):
    """``model`` is the vision model; its parameter names are those of transformers."""

    class Config(EncoderConfig):
        """``config`` is the configuration as transformers writes it, with its ``model_type``.

        ``layer`` counts hidden states as transformers does (0: embeddings); None takes ``last_hidden_state``, after the
        last norm where the model has it there. ``select`` keeps the patches (class vector and registers dropped), the
        patches with the class vector first, or the class vector. ``name`` is for the reader only. ``geometry`` fills
        itself in, and is saved, so that counting needs no model.
        """

        type: str = "hf"
        config: dict[str, Any]
        name: str = ""
        layer: int | None = None
        select: Literal["patch", "cls_patch", "cls"] = "patch"
        geometry: Geometry

        @model_validator(mode="before")
        @classmethod
        def _measured(cls, values: Any) -> Any:
            if isinstance(values, Mapping) and "config" in values and values.get("geometry") is None:
                config = vision_config(values["config"])
                return {**values, "config": config, "geometry": measure(config, values.get("layer"))}
            return values

        @model_validator(mode="after")
        def _fits(self) -> HFEncoder.Config:
            states = self.geometry.states
            if self.layer is not None and not -states <= self.layer < states:
                raise ConfigError(f"hf encoder: layer {self.layer} is not one of its {states} hidden states")
            if self.select != "patch" and self.geometry.prefix < 1:
                raise ConfigError(f"hf encoder: select={self.select!r} needs a class vector; this model has none")
            return self

        def count(self, shape: tuple[int, ...]) -> Count:
            """Tokens of a picture ``(channels, height, width)``. Raises DataError where the model cannot take it."""
            shown = self.geometry
            if shown.patch is not None:
                grid: tuple[int, int] | None = patch_grid(shape, shown.channels, shown.patch)
                patches = grid[0] * grid[1] if grid else 0
            elif tuple(shape) == (shown.channels, *shown.image_size):
                grid, patches = shown.grid, shown.tokens - shown.prefix
            else:
                raise DataError(
                    f"this model takes pictures of shape {(shown.channels, *shown.image_size)} only, got {tuple(shape)}"
                )
            if self.select == "patch":
                return Count(patches, grid)
            return Count(1 if self.select == "cls" else patches + 1)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dim = config.geometry.dim
        self.model = _model(config.config)
        self._unused: list[str] | None = None
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters

    def forward(self, inputs: Tensor) -> Tokens:
        """``inputs [U, channels, height, width]`` → ``Tokens(x [U, N, D])``. Raises DataError at another shape."""
        if inputs.ndim != 4:
            raise DataError(
                f"pictures of shape [units, channels, height, width] were expected, got {list(inputs.shape)}"
            )
        count = self.config.count(tuple(inputs.shape[1:]))
        other = tuple(inputs.shape[2:]) != self.config.geometry.image_size
        options = {"interpolate_pos_encoding": True} if other and self._interpolates else {}
        x = _states(self.model, inputs.to(next(self.model.parameters()).dtype), self.config.layer, options)[0]
        prefix = self.config.geometry.prefix
        if self.config.select == "cls":
            x = x[:, :1]  # [U, 1, D]
        elif self.config.select == "cls_patch":
            x = torch.cat((x[:, :1], x[:, prefix:]), dim=1)  # [U, 1 + rows*columns, D]
        else:
            x = x[:, prefix:]  # [U, rows*columns, D]
        return Tokens(x, grid=count.grid)

    def unused(self) -> list[str]:
        """Names of the parameters that the layer and the vectors that are kept do not depend on."""
        if self._unused is None:
            self._unused = _idle(self.config)
        return self._unused

    def without_effect(self) -> list[str]:
        """Biases of attention's keys, which softmax cancels."""
        return [f"model.{name}" for name in key_biases(self.model)]


def _idle(config: HFEncoder.Config) -> list[str]:
    """What ``HFEncoder.unused`` tells, asked of the same model without memory."""
    with torch.device("meta"):
        shapes = HFEncoder(config)
        pictures = torch.empty(1, config.geometry.channels, *config.geometry.image_size)
    return unreached(shapes, lambda encoder: encoder(pictures).x)


def hf_encoder_config(source: str | Path | Mapping[str, Any], **options: Any) -> HFEncoder.Config:
    """The configuration for a folder or hub name (its ``config.json`` is read) or for a transformers configuration.

    ``options`` are ``layer`` and ``select``. Raises ConfigError.
    """
    if isinstance(source, Mapping):
        return HFEncoder.Config.parse({"config": dict(source), **options})
    try:
        config = _transformers().AutoConfig.from_pretrained(str(source)).to_dict()
    except (OSError, ValueError) as error:
        raise ConfigError(f"hf encoder: no configuration at {str(source)!r}: {error}") from None
    return HFEncoder.Config.parse({"config": config, "name": str(source), **options})


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The vision part of a transformers configuration (itself where it has no parts), as a plain dict."""
    if "model_type" not in config:
        raise ConfigError("hf encoder: the configuration has no 'model_type'; give it as transformers writes it")
    transformers = _transformers()
    values = {k: v for k, v in config.items() if k != "model_type"}
    try:
        whole = transformers.AutoConfig.for_model(config["model_type"], **values)
    except Exception as error:  # transformers raises errors of several unrelated classes here
        raise ConfigError(
            f"hf encoder: transformers {transformers.__version__} refuses this configuration: {error}"
        ) from None
    vision = getattr(whole, "vision_config", whole)
    # the type is the composer's to choose, and the version says nothing about the model
    dropped = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")
    plain = {k: v for k, v in vision.to_diff_dict().items() if k not in dropped}
    return {"model_type": vision.model_type, **plain}


def measure(config: Mapping[str, Any], layer: int | None = None) -> Geometry:
    """Build the model of a vision configuration on the meta device and run it once on a picture of its own size."""
    whole = _transformers().AutoConfig.for_model(
        config["model_type"], **{k: v for k, v in config.items() if k != "model_type"}
    )
    size, patch = getattr(whole, "image_size", 224), getattr(whole, "patch_size", None)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if isinstance(patch, (tuple, list)):
        patch = patch[0] if patch[0] == patch[-1] else None
    channels = getattr(whole, "num_channels", 3)
    with torch.device("meta"):
        model = _model(config).eval()
        x, grid, states = _states(model, torch.empty(1, channels, height, width), layer, {})
    prefix = 0
    if grid is None and patch is not None:
        rows, columns = height // patch, width // patch
        prefix = x.shape[1] - rows * columns
        grid = (rows, columns)
        if not 0 <= prefix < 64:  # the vectors are not one a patch: a hierarchy of windows, for instance
            prefix, grid, patch = 0, None, None
    else:
        patch = None
    return Geometry(
        image_size=(height, width),
        channels=channels,
        patch=patch,
        dim=x.shape[2],
        tokens=x.shape[1],
        prefix=prefix,
        grid=grid,
        states=states,
    )


def _states(
    model: nn.Module, inputs: Tensor, layer: int | None, options: dict[str, Any]
) -> tuple[Tensor, tuple[int, int] | None, int]:
    """The layer ``[U, N, D]``, its grid where the model gives maps ``[U, D, rows, columns]``, their number."""
    output = model(pixel_values=inputs, output_hidden_states=True, **options)
    states = output.hidden_states or ()
    if layer is not None and not -len(states) <= layer < len(states):
        raise ConfigError(f"hf encoder: layer {layer} is not one of its {len(states)} hidden states")
    x = output.last_hidden_state if layer is None else states[layer]
    if x.ndim == 4:
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]), len(states)  # [U, rows*columns, D]
    return x, None, len(states)


def _model(config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised vision model in the default type. Raises ConfigError where it does not read pictures."""
    transformers = _transformers()
    values = {k: v for k, v in config.items() if k != "model_type"}
    whole = transformers.AutoConfig.for_model(config["model_type"], **values)
    model = transformers.AutoModel.from_config(whole, dtype=torch.get_default_dtype())
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        raise ConfigError(f"hf encoder: a model of type {config['model_type']!r} does not read pictures")
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("the hf encoder needs transformers: pip install 'chiasm[hf]'") from error
    return transformers
