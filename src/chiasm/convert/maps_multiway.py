"""Names of the authors' checkpoints of BEiT-3 ↔ names of ``multiway``.

Source: torchscale 0.3.0 and ``beit3/modeling_finetune.py`` of microsoft/unilm 768a3c8. Expert ``A`` is the picture's,
``B`` the text's. The tensors stand under ``model`` or ``module`` of the file.
"""

from __future__ import annotations

from chiasm.convert.rules import AnyRule, rename, squeeze

_EXPERTS = {"A": "image", "B": "text"}
_LAYER = {
    "self_attn.q_proj.{x}": "q.{y}",
    "self_attn.k_proj.{x}": "k.{y}",
    "self_attn.v_proj.{x}": "v.{y}",
    "self_attn.out_proj.{x}": "out.{y}",
    "self_attn.inner_attn_ln.{x}": "inner_norm.{y}",
    "self_attn_layer_norm.{x}": "attn_norm.{y}",
    "ffn.{x}.fc1": "mlp.{y}.fc1",
    "ffn.{x}.fc2": "mlp.{y}.fc2",
    "ffn.{x}.ffn_layernorm": "mlp.{y}.norm",
    "final_layer_norm.{x}": "mlp_norm.{y}",
}
_PAIRS = {"norm1": "0", "dense1": "1", "norm2": "2", "dense2": "4"}  # of the head over two pictures


def beit3(pairs: bool = False) -> list[AnyRule]:
    """A checkpoint with any of the heads; ``pairs``: its ``head`` is that over two pictures."""
    theirs, ours = "beit3.encoder.layers.{i}.", "layers.{i}."
    layers = [
        rename(theirs + _expert(a, x) + ".{leaf}", ours + _expert(b, y, "{y}") + ".{leaf}")
        for a, b in _LAYER.items()
        for x, y in _EXPERTS.items()
    ]
    head = [rename(f"head.{a}.{{leaf}}", f"classifier.{b}.{{leaf}}") for a, b in _PAIRS.items()]
    return [
        rename("beit3.text_embed.weight", "words.weight"),
        squeeze("beit3.vision_embed.mask_token", "covered", leading=2),
        squeeze("beit3.vision_embed.cls_token", "cls", leading=2),
        rename("beit3.vision_embed.proj.{leaf}", "patch.{leaf}"),
        rename("beit3.encoder.embed_positions.A.weight", "image_positions"),
        rename("beit3.encoder.embed_positions.B.weight", "text_positions"),
        *layers,
        *(rename(f"beit3.encoder.layer_norm.{x}.{{leaf}}", f"norm.{y}.{{leaf}}") for x, y in _EXPERTS.items()),
        rename("pooler.norm.{leaf}", "pooler.norm.{leaf}"),
        rename("pooler.dense.{leaf}", "pooler.dense.{leaf}"),
        *(head if pairs else [rename("head.{i}.{leaf}", "classifier.{i}.{leaf}")]),
        rename("head.{leaf}", "picture_classifier.{leaf}"),
        rename("fc_norm.{leaf}", "picture_norm.{leaf}"),
        rename("mlm_head.{leaf}", "word_scores.{leaf}"),
        rename("vision_head.weight", "image_head.weight"),
        rename("language_head.weight", "text_head.weight"),
        rename("logit_scale", "logit_scale"),
    ]


def _expert(pattern: str, name: str, mark: str = "{x}") -> str:
    return pattern.replace(mark, name)
