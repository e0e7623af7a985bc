"""Folders of transformers with ``Blip2ForImageTextRetrieval``: BLIP-2 after its first stage, without a head for words.

Reference: that class in transformers 5.23. Of a pair it gives two numbers of matching, or the cosine of the best query;
it has neither the temperature nor the head for words, so the model that is read compares and matches and writes
nothing. Differences by design: a text is matched with or without padding (the class needs a mask), and no first ids of
a text are taken for a picture's (the class cuts them off where ``image_token_index`` is set).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chiasm.convert import maps_blip
from chiasm.convert.io import Weights
from chiasm.convert.rules import AnyRule, prefixed, rename, squeeze
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import Provenance, VLMConfig
from chiasm.presets.checkpoint import Checkpoint, Options
from chiasm.presets.hf_llava import check_sizes
from chiasm.presets.hf_processing import processor_values, read_image


def read(
    folder: Path, weights: Weights, encoder: dict[str, Any], bridge: dict[str, Any], dim: int, options: Options
) -> Checkpoint:
    """The folder as a ``query_text`` model; ``encoder`` and ``bridge`` are its tower and Q-Former as ours."""
    where = str(folder)
    tokenizer = Tokenizer.from_folder(folder)
    model = {
        "type": "query_text",
        "encoders": {"image": encoder},
        "connectors": {"image": {**bridge, "project": False, "instruction": False}},
        "dim": dim,
        "writes": False,
        "temperature": 1.0,
    }
    processing = {
        "template": options.template or "blip2_caption",
        "media": {"image": read_image(processor_values(folder)["image"], None, "BlipImageProcessor", where)},
    }
    config = VLMConfig.parse(
        {"model": model, "processing": processing, "provenance": Provenance(base={"all": where})}, where=where
    )
    check_sizes(config, tokenizer, where)
    return Checkpoint(config, weights, rules(encoder["dim"]), folder)


def rules(width: int) -> list[AnyRule]:
    """The weight rules; ``width`` is the tower's."""
    return [
        *prefixed(maps_blip.eva_vit(width), "vision_model.", "encoders.image."),
        squeeze("query_tokens", "connectors.image.queries"),
        *prefixed(maps_blip.qformer_blip2(), "qformer.", "connectors.image."),
        *prefixed(maps_blip.text_embeddings("embeddings."), "", "connectors.image."),
        *heads("vision_projection", "text_projection"),
    ]


def heads(image: str, text: str) -> list[AnyRule]:
    """The projections into the shared space and the head of matching, which LAVIS and transformers name alike."""
    return [
        rename(image + ".{leaf}", "image_proj.{leaf}"),
        rename(text + ".{leaf}", "text_proj.{leaf}"),
        rename("itm_head.{leaf}", "matcher.{leaf}"),
    ]
