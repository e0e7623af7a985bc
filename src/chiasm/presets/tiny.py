"""The tiny form of a preset: the same structure, a thousandth of the size, for tests, tours and a first run.

Every option that says *how* the parts work is kept (layers read, fits, tilings, merges, pools, biases, grouped keys,
templates); every option that says *how large* they are is made small, widths and pictures alike.
"""

from __future__ import annotations

from typing import Any

from chiasm.errors import ConfigError
from chiasm.model_config import VLMConfig
from chiasm.presets.tiny_fused import TYPES, tiny_fused
from chiasm.presets.tiny_towers import tiny_classifier, tiny_towers

PATCH = 4  # pixels of a tiny patch's side
QUARTER = 4  # a tiny tower sees a quarter of the patches a side
TOWER = {"dim": 32, "depth": 3, "heads": 4, "mlp": 64, "patch": PATCH}
BODY = {"dim": 32, "heads": 4, "mlp": 64}
QFORMER = BODY | {"queries": 8, "depth": 3}
SOUND = {"dim": 32, "depth": 2, "heads": 4, "mlp": 64, "patch": 4, "stride": 3, "bins": 16, "frames": 25, "out": 24}
RESAMPLER = {"queries": 8, "depth": 2, "heads": 2, "head_dim": 8}
HF: dict[str, dict[str, Any]] = {  # by transformers' model_type
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 640,
    },
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
}
VOCAB = 512


def tiny(config: VLMConfig, vocab: int = VOCAB) -> VLMConfig:
    """A preset's configuration at tiny size, for a tokenizer of ``vocab`` tokens. Raises ConfigError."""
    if config.model.type == "dual_tower":
        return tiny_towers(config, vocab)
    if config.model.type == "classifier":
        return tiny_classifier(config)
    if config.model.type in TYPES:
        return tiny_fused(config, vocab)
    dump = config.dump()
    model, media = dump["model"], dump["processing"]["media"]
    sizes = {}
    for name, encoder in model["encoders"].items():
        if encoder["type"] == "imagebind_audio":
            encoder.update(SOUND)
            continue
        if encoder["type"] != "vit":
            raise ConfigError(
                f"encoder {name!r} is of type {encoder['type']!r}: only 'vit' and 'imagebind_audio' have a tiny form"
            )
        small = tiny_side(encoder["image_size"], encoder["patch"])
        sizes[encoder["image_size"]] = small
        encoder.update(TOWER, image_size=small)
    for connector in model["connectors"].values():
        _shrink_connector(connector, vocab)
    if model["type"] == "vokens":  # the last of the vocabulary
        model["vokens"].update(first=vocab - model["vokens"]["number"], features=5, dim=32, depth=2, heads=4, mlp=64)
    if model["type"] == "cross_attention":
        _shrink_blocks(model)
    if "lm" in model:
        _shrink_lm(model["lm"], vocab)
    if model.get("start") is not None:  # of texts that a first stage writes
        model["start"] = vocab - 1
    for front_end in media.values():
        if front_end["type"] == "audio":
            front_end.update(bins=SOUND["bins"], frames=SOUND["frames"], clips=2, seconds=0.25)
            continue
        _shrink(front_end.get("image", front_end), sizes)
        if "frames" in front_end:
            front_end["frames"] = min(front_end["frames"], 4)
    return VLMConfig.parse(dump)


def _shrink_connector(connector: dict[str, Any], vocab: int) -> None:
    """Sizes of a connector, in place, and of the one that a gate hands on to; linear layers follow their ends."""
    if connector["type"] == "qformer":
        connector.update(QFORMER)
        if connector["text"]:
            connector["text"].update(vocab=vocab)
    elif connector["type"] == "resampler":
        connector.update(RESAMPLER)
    elif connector["type"] == "hierarchical":
        connector.update(frame_queries=8, queries=8)
        for level in ("frame", "clip"):
            connector[level].update(BODY, depth=min(connector[level]["depth"], 3))
    elif connector["type"] == "timeline":
        connector.update(BODY, queries=4)
    elif connector["type"] == "gate":
        _shrink_connector(connector["then"], vocab)


def _shrink_lm(lm: dict[str, Any], vocab: int) -> None:
    """Sizes of a language model, in place. Raises ConfigError for one that has no tiny form."""
    if lm["type"] == "gpt":
        lm.update(vocab=vocab, dim=64, depth=2, heads=4, mlp=128)
    elif lm["type"] == "decoder":
        grouped = lm["kv_heads"] not in (None, lm["heads"])
        lm.update(vocab=vocab, dim=64, depth=2, heads=4, kv_heads=2 if grouped else None, head_dim=None, mlp=128)
    elif lm["type"] == "hf" and lm["config"]["model_type"] in HF:
        lm["config"].update(HF[lm["config"]["model_type"]], vocab_size=vocab)
    else:
        raise ConfigError(
            f"the language model is of type {lm['type']!r}: only 'decoder', 'gpt', OPT and T5 have a tiny form"
        )


def _shrink_blocks(model: dict[str, Any]) -> None:
    """Sizes of gated blocks, in place; they keep their places as far as two layers allow."""
    blocks, placement = model["blocks"], model["placement"]
    blocks["heads"] = 4
    blocks["head_dim"] = None if blocks["head_dim"] is None else 8
    blocks["mlp"] = None if blocks["mlp"] is None else 96
    placement["every"] = min(placement["every"], 2)


def tiny_side(side: int, patch: int) -> int:
    """Pixels of a tiny picture's side: a quarter of the patches, odd where they were odd, and a rest where one was."""
    patches = side // patch
    small = patches // QUARTER
    small += (patches - small) % 2
    return small * PATCH + (PATCH // 2 if side % patch else 0)


def _shrink(image: dict[str, Any], sizes: dict[int, int]) -> None:
    """Sizes of a picture front end, in place: its square, its shorter side, its tilings."""
    side = image["size"]
    if side not in sizes:
        raise ConfigError(f"pictures of {side} pixels meet no encoder of that size; encoders: {sorted(sizes)}")
    small = sizes[side]
    image["size"] = small
    if image.get("shortest_edge") is not None:
        image["shortest_edge"] = max(small, image["shortest_edge"] * small // side)
    if image.get("tiling"):
        image["tiling"]["pinpoints"] = [[n // side * small for n in pair] for pair in image["tiling"]["pinpoints"]]
