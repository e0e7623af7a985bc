"""Folders of transformers with a ViLT, both ways: any of its classes, with the processor's files.

Reference: the configuration, processing and model classes of transformers 5.23. Which heads a folder has is read from
its tensors. Files of before transformers 5 spell the bias of the word head ``mlm_score.bias``; a head without a matrix
of its own shares it with the embedding, one with its own keeps it (transformers 5 would tie the two).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.convert import maps_vilt
from chiasm.convert.engine import export_tensors
from chiasm.convert.io import Weights, open_weights, write_json, write_weights
from chiasm.convert.rules import AnyRule
from chiasm.errors import CheckpointError
from chiasm.fusion.single_stream import SingleStream
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import Provenance, VLMConfig
from chiasm.presets.checkpoint import Checkpoint, Options, Reader, check_vocab
from chiasm.presets.hf_processing import RESAMPLE, processor_values
from chiasm.processing.proportional import ProportionalFrontEnd
from chiasm.registry import register

DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "type_vocab_size": 2,
    "modality_type_vocab_size": 2,
    "max_position_embeddings": 40,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 384,
    "patch_size": 32,
    "num_channels": 3,
    "qkv_bias": True,
    "max_image_length": -1,
    "num_images": -1,
}
SIZES = {  # theirs → ours
    "vocab_size": "text_vocab",
    "type_vocab_size": "text_kinds",
    "modality_type_vocab_size": "kinds",
    "max_position_embeddings": "text_positions",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
    "image_size": "image_size",
    "patch_size": "patch",
}
PROCESSOR = {
    "size": {"shortest_edge": 384},
    "size_divisor": 32,
    "resample": 3,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu"}
_CLASSES = {
    "words": "ViltForMaskedLM",
    "rank": "ViltForImageAndTextRetrieval",
    "pairs": "ViltForImagesAndTextClassification",
    "classes": "ViltForQuestionAnswering",
}


@register("checkpoint", "hf_vilt")
class HFVilt(Reader):
    """``ViltModel`` and its classes with heads."""

    name = "hf_vilt"

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """By ``model_type``."""
        return values.get("model_type") == "vilt"

    def read(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """See the contract."""
        where, c = str(folder), DEFAULTS | {k: v for k, v in values.items() if v is not None}
        weights = open_weights(folder, options.allow_pickle)
        model = network(c, weights, where)
        labels = _labels(c, weights)
        processing: dict[str, Any] = {
            "template": options.template or template(c["max_position_embeddings"], bool(labels)),
            "media": {"image": front_end(folder, where)},
            "labels": labels,
        }
        config = VLMConfig.parse(
            {"model": model, "processing": processing, "provenance": Provenance(base={"all": where})}, where=where
        )
        check_vocab(config, Tokenizer.from_folder(folder), where)
        return Checkpoint(config, weights, rules(weights), folder)

    def write(self, folder: Path, vlm: Any, max_shard: int) -> None:
        """See the contract."""
        config, kind = exported(vlm)
        state = vlm.state_dict()
        if config["tied"]:
            state.pop("word_scores.decoder.weight")
        del config["tied"]
        tensors = export_tensors(state, maps_vilt.hf("" if kind == "ViltModel" else "vilt."))
        write_json(folder / "config.json", config)
        write_weights(folder, tensors, max_shard)
        vlm.tokenizer.save(folder)
        write_json(folder / "preprocessor_config.json", processor(vlm.processor.config.media["image"]))


def rules(weights: Weights) -> list[AnyRule]:
    """The rules for the names in a file: those of the class without heads have no prefix."""
    prefix = "vilt." if any(name.startswith("vilt.") for name in weights.info) else ""
    return [*maps_vilt.word_bias(weights.info), *maps_vilt.hf(prefix)]


def network(c: Mapping[str, Any], weights: Weights, where: str) -> dict[str, Any]:
    """The fusion configuration of a completed configuration and of the heads in the file."""
    if not c["qkv_bias"] or c["hidden_act"] not in _ACTIVATIONS or c["num_channels"] != 3:
        raise CheckpointError(
            f"{where}: a ViLT with qkv_bias={c['qkv_bias']}, hidden_act={c['hidden_act']!r} and "
            f"{c['num_channels']} channels is not supported"
        )
    images = max(1, c["num_images"])
    words = any(name.startswith("mlm_score.") for name in weights.info)
    last = weights.info.get("classifier.3.bias")
    tasks = {
        "words": words,
        "rank": "rank_output.weight" in weights.info,
        "classes": last.shape[0] if last is not None else None,
    }
    return {
        "type": "single_stream",
        **{ours: c[theirs] for theirs, ours in SIZES.items()},
        "images": images,
        "activation": _ACTIVATIONS[c["hidden_act"]],
        "norm_eps": c["layer_norm_eps"],
        "text_eps": c["layer_norm_eps"],
        "sampled_patches": c["max_image_length"] if c["max_image_length"] > 0 else None,
        "tasks": tasks,
        "tied": words and "mlm_score.decoder.weight" not in weights.info,
    }


def template(length: int, question: bool) -> dict[str, Any]:
    """A caption of at most ``length`` tokens, or the user's question where the answer is a class."""
    return {"type": "pair", "length": length, "read": "user" if question else "last"}


def front_end(folder: Path, where: str) -> dict[str, Any]:
    """The picture processor of a folder. Raises CheckpointError for what our front end does not do."""
    c = PROCESSOR | {k: v for k, v in processor_values(folder)["image"].items() if v is not None}
    for key in ("do_resize", "do_rescale", "do_normalize", "do_pad"):
        if not c.get(key, True):
            raise CheckpointError(f"{where}: a ViLT processor with {key}=false is not supported")
    size = c["size"]["shortest_edge"] if isinstance(c["size"], Mapping) else c["size"]
    return {
        "type": "proportional",
        "shortest_edge": size,
        "multiple": c["size_divisor"],
        "resample": RESAMPLE[c["resample"]],
        "mean": tuple(c["image_mean"]),
        "std": tuple(c["image_std"]),
    }


def processor(config: Any) -> dict[str, Any]:
    """Our front end as ``preprocessor_config.json``. Raises CheckpointError for what their class does not do."""
    if not isinstance(config, ProportionalFrontEnd.Config) or abs(config.longest_ratio - 1333 / 800) > 1e-9:
        raise CheckpointError("export: ViLT's processor keeps proportions up to 1333 by 800; this model's does not")
    return {
        "image_processor_type": "ViltImageProcessor",
        "processor_class": "ViltProcessor",
        "size": {"shortest_edge": config.shortest_edge},
        "size_divisor": config.multiple,
        "resample": RESAMPLE.index(config.resample),
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
    }


def exported(vlm: Any) -> tuple[dict[str, Any], str]:
    """``config.json`` for a model, and its class. Raises CheckpointError for what no class can hold."""
    c = vlm.config.model
    if not isinstance(c, SingleStream.Config):
        raise CheckpointError(f"export: a fusion of type {c.type!r} is no ViLT")
    heads = [name for name in ("words", "rank", "classes") if getattr(c.tasks, name)]
    lost = ["the matching head (tasks.match)"] if c.tasks.match else []
    if len(heads) > 1:
        lost.append(f"{len(heads)} heads at once ({', '.join(heads)}): its classes have one")
    if c.norm_eps != c.text_eps:
        lost.append(f"norms with two epsilons ({c.norm_eps:g} and {c.text_eps:g}): set both to {c.norm_eps:g}")
    if lost:
        raise CheckpointError("export: no ViLT class of transformers has " + "; ".join(lost))
    head = "pairs" if heads == ["classes"] and c.images > 1 else heads[0] if heads else ""
    kind = _CLASSES.get(head, "ViltModel")
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == c.activation)
    labels = vlm.processor.config.labels or [str(i) for i in range(c.tasks.classes or 0)]
    config = {
        "architectures": [kind],
        "model_type": "vilt",
        **{theirs: getattr(c, ours) for theirs, ours in SIZES.items()},
        "hidden_act": activation,
        "layer_norm_eps": c.norm_eps,
        "max_image_length": c.sampled_patches or -1,
        "num_images": c.images if c.images > 1 else -1,
        "torch_dtype": str(vlm.dtype).removeprefix("torch."),
        "tied": c.tied,
    }
    if c.tasks.classes:
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    return config, kind


def _labels(c: Mapping[str, Any], weights: Weights) -> tuple[str, ...]:
    """The names of the classes in their order, where the file has a head for them."""
    if "classifier.3.bias" not in weights.info:
        return ()
    names = {int(index): str(label) for index, label in (c.get("id2label") or {}).items()}
    return tuple(names.get(index, f"LABEL_{index}") for index in range(weights.info["classifier.3.bias"].shape[0]))
