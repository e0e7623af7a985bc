"""Folders of transformers with a vision transformer that classifies (``ViTForImageClassification``), both ways.

Reference: transformers 5.23. The norms' epsilon is the folder's own: the authors' towers have 1e-6, the class's default
is 1e-12, and the two differ by 1e-4 in what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.convert import maps
from chiasm.convert.engine import export_tensors
from chiasm.convert.io import open_weights, write_json, write_weights
from chiasm.convert.rules import AnyRule, prefixed, rename
from chiasm.encoders.vit import ViT
from chiasm.errors import CheckpointError
from chiasm.fusion.classifier import Classifier
from chiasm.model_config import Provenance, VLMConfig
from chiasm.presets.checkpoint import Checkpoint, Options, Reader
from chiasm.presets.hf_parts import read_tower, write_tower
from chiasm.presets.hf_processing import processor_values, read_image, write_image
from chiasm.registry import register

CLASS = "ViTForImageClassification"
HEAD = {"type": "pooled", "pool": "first", "project": "linear_bias"}


@register("checkpoint", "hf_vit")
class HFViT(Reader):
    """``ViTForImageClassification``. A ``ViTModel``, which has no classes, is a part of other models."""

    name = "hf_vit"
    layout = "hf"
    of_towers = True

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """By ``model_type`` and ``architectures``."""
        return values.get("model_type") == "vit" and CLASS in (values.get("architectures") or ())

    def read(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """See the contract."""
        where, weights = str(folder), open_weights(folder, options.allow_pickle)
        tower = read_tower(values, select="cls").config
        if not isinstance(tower, ViT.Config):
            raise CheckpointError(f"{where}: a tower with hidden_act={values.get('hidden_act')!r} is not supported")
        classes = weights.info["classifier.bias"].shape[0] if "classifier.bias" in weights.info else 0
        if not classes:
            raise CheckpointError(f"{where}: has no classifier.bias, so it has no classes; read it as a part")
        names = {int(index): name for index, name in (values.get("id2label") or {}).items()}
        labels = [names.get(i, f"LABEL_{i}") for i in range(classes)]
        model = {
            "type": "classifier",
            "encoders": {"image": tower.edit(post_norm="applied")},
            "connectors": {"image": HEAD},
            "classes": classes,
        }
        front = read_image(processor_values(folder)["image"], None, "ViTImageProcessor", where)
        config = VLMConfig.parse(
            {
                "model": model,
                "processing": {
                    "template": options.template or {"type": "pair", "read": "none"},
                    "media": {"image": front},
                    "labels": labels,
                },
                "provenance": Provenance(base={"all": where}),
            },
            where=where,
        )
        return Checkpoint(config, weights, rules(), None)

    def writes(self, config: VLMConfig) -> bool:
        """Models that classify pictures."""
        return isinstance(config.model, Classifier.Config)

    def write(self, folder: Path, vlm: Any, max_shard: int) -> None:
        """See the contract."""
        model, labels = vlm.config.model, vlm.config.processing.labels
        tower, head = model.encoders["image"], model.connectors["image"]
        values, _ = write_tower(tower)
        if values["model_type"] != "vit" or head.dump() != HEAD or tower.select != "cls":
            raise CheckpointError(
                f"export: {CLASS} holds a plain vision transformer read at its class vector, this one is a tower of "
                f"kind {values['model_type']!r} read at {tower.select!r}"
            )
        names = dict(enumerate(labels)) if labels else {i: f"LABEL_{i}" for i in range(model.classes)}
        values |= {
            "architectures": [CLASS],
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            "dtype": str(vlm.dtype).removeprefix("torch."),
        }
        front = vlm.processor.config.media["image"]
        write_json(folder / "preprocessor_config.json", written_image(front))
        write_weights(folder, export_tensors(vlm.state_dict(), rules()), max_shard)
        write_json(folder / "config.json", values)


def written_image(front: Any) -> dict[str, Any]:
    """The picture front end as the class's table. Raises CheckpointError where that cannot do it."""
    table = write_image(front, "CLIPImageProcessor", "export")
    return table | {"image_processor_type": "ViTImageProcessor"} if front.fit == "squash" else table


def rules() -> list[AnyRule]:
    """The weight rules of a whole model."""
    return [
        rename("classifier.{leaf}", "connectors.image.proj.{leaf}"),
        *prefixed(maps.vit(), "vit.", "encoders.image."),
    ]
