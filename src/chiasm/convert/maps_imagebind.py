"""ImageBind's tower for sounds: names of its released file ↔ names of our part.

Source: ``imagebind_model.py`` and ``multimodal_preprocessors.py`` of facebookresearch/ImageBind 53680b0, whose
``imagebind_huge.pth`` holds the towers of all six modalities.
"""

from __future__ import annotations

from chiasm.convert.maps_towers import attention_in
from chiasm.convert.rules import AnyRule, Drop, rename, squeeze

SCALE = "is the fixed scale of the last vector, which the configuration holds"
OTHER = "belongs to the tower of another modality, which this model does not have"


def audio() -> list[AnyRule]:
    """``modality_….audio`` ↔ ``imagebind_audio``; towers of other modalities are left out."""
    before, trunk, head = "modality_preprocessors.audio.", "modality_trunks.audio.blocks.{i}.", "modality_heads.audio."
    block = "blocks.{i}."
    return [
        squeeze(before + "cls_token", "cls", leading=2),
        squeeze(before + "pos_embedding_helper.pos_embed", "positions"),
        rename(before + "rgbt_stem.proj.weight", "patch.weight"),
        rename(before + "rgbt_stem.norm_layer.{leaf}", "patch_norm.{leaf}"),
        attention_in(trunk + "attn.", block + "attn."),
        rename(trunk + "attn.out_proj.{leaf}", block + "attn.out.{leaf}"),
        squeeze(trunk + "attn.bias_k", block + "attn.extra_key", leading=2),
        squeeze(trunk + "attn.bias_v", block + "attn.extra_value", leading=2),
        *(rename(trunk + f"norm_{n}." + "{leaf}", block + f"norm{n}." + "{leaf}") for n in (1, 2)),
        *(rename(trunk + f"mlp.fc{n}." + "{leaf}", block + f"mlp.fc{n}." + "{leaf}") for n in (1, 2)),
        rename(head + "0.{leaf}", "norm.{leaf}"),
        rename(head + "2.weight", "proj.weight"),
        Drop("modality_postprocessors.audio.1.log_logit_scale", SCALE),
        *(
            Drop(f"modality_{kind}." + "{rest}", OTHER)
            for kind in ("preprocessors", "trunks", "heads", "postprocessors")
        ),
    ]
