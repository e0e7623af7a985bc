"""Component maps of the Flamingo family: Idefics of transformers and OpenFlamingo's files ↔ names of our parts.

Sources: ``modeling_idefics.py`` and ``perceiver.py`` of transformers 5.23; ``flamingo_lm.py``, ``helpers.py`` and
``train_utils.py`` of mlfoundations/open_flamingo 655f693, whose released files hold what was trained: the resampler,
the gated blocks and the table of input embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

from chiasm.convert.maps import COMPUTED
from chiasm.convert.rules import Alias, AnyRule, Drop, merge, prefixed, rename, split, squeeze

TWICE = "stands in the file a second time, under the decoder's own layers"


def idefics_lm(vocab: int, extra: int, tied: bool) -> list[AnyRule]:
    """The ends of ``IdeficsForVisionText2Text``'s language model, whose added tokens have tables of their own."""
    embedding, head = "model.embed_tokens.", "lm_head."
    if not extra:
        tables: list[AnyRule] = [rename(embedding + "weight", "embedding.weight")]
        heads: list[AnyRule] = [rename(head + "weight", "lm_head.weight")]
    else:
        added = embedding + "additional_embedding.weight"
        tables = [merge((embedding + "weight", added), "embedding.weight", (vocab, extra))]
        heads = [merge((head + "weight", head + "additional_fc.weight"), "lm_head.weight", (vocab, extra))]
    drops: list[AnyRule] = [
        Drop("model.layers.{i}.self_attn.rotary_emb.{rest}", COMPUTED),
        Drop("model.gated_cross_attn_layers.{i}.cross_attn.rotary_emb.{rest}", COMPUTED),
    ]
    return [*tables, *([] if tied else heads), *drops]


def idefics_resampler() -> list[AnyRule]:
    """``IdeficsPerceiverResampler`` ↔ ``resampler``."""
    attention = {
        "context_layer_norm": "context_norm",
        "latents_layer_norm": "latents_norm",
        "q_proj": "attn.q",
        "k_proj": "attn.k",
        "v_proj": "attn.v",
        "output_proj": "attn.out",
        "q_layer_norm": "attn.q_norm",
        "k_layer_norm": "attn.k_norm",
    }
    perceptron = {"ln": "mlp_norm", "fc": "fc1", "c_proj": "fc2"}
    return [
        rename("latents", "latents"),
        *(rename("blocks.{i}.0." + a + ".{leaf}", "layers.{i}." + b + ".{leaf}") for a, b in attention.items()),
        *(rename("blocks.{i}.1." + a + ".{leaf}", "layers.{i}." + b + ".{leaf}") for a, b in perceptron.items()),
        rename("layer_norm.{leaf}", "norm.{leaf}"),
    ]


def idefics_blocks(vector: bool) -> list[AnyRule]:
    """``IdeficsGatedCrossAttentionLayer`` ↔ gated blocks; ``vector``: gates with a number for each channel."""
    names = {
        "input_layernorm": "attn_norm",
        "cross_attn.q_proj": "q",
        "cross_attn.k_proj": "k",
        "cross_attn.v_proj": "v",
        "cross_attn.o_proj": "out",
        "cross_attn.q_layer_norm": "q_norm",
        "cross_attn.k_layer_norm": "k_norm",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
    }
    gates = {"alpha_cross_attn": "attn_gate", "alpha_dense": "mlp_gate"}
    gate = (lambda a, b: squeeze(a, b, leading=2)) if vector else rename
    return [
        *(rename("{i}." + a + ".{leaf}", "{i}." + b + ".{leaf}") for a, b in names.items()),
        *(gate("{i}." + a, "{i}." + b) for a, b in gates.items()),
    ]


def openflamingo(places: Sequence[int], resampler: int, block: int) -> list[AnyRule]:
    """OpenFlamingo's released file → resampler, gated blocks and input embeddings of a whole model.

    ``places`` are the layers of the language model that blocks stand before; ``resampler`` and ``block`` the inner
    widths of attention, since keys and values are one matrix in the file.
    """
    rules: list[AnyRule] = [
        Alias("module.{rest}", "{rest}"),
        Drop("vision_encoder.{rest}", "is the tower, which has its own file"),
        Drop("lang_encoder.old_decoder_blocks.{rest}", TWICE),
        Drop("lang_encoder.gated_cross_attn_layers.{rest}", TWICE),
        *prefixed(_flamingo_resampler(resampler), "perceiver.", "connectors.image."),
        rename("lang_encoder.transformer.wte.weight", "lm.embedding.weight"),  # MPT, MosaicGPT
        rename("lang_encoder.gpt_neox.embed_in.weight", "lm.embedding.weight"),  # GPT-NeoX
        rename("lang_encoder.model.embed_tokens.weight", "lm.embedding.weight"),  # LLaMA
    ]
    for number, place in enumerate(places):
        for layers in ("transformer.blocks", "gpt_neox.layers", "model.layers"):
            theirs = f"lang_encoder.{layers}.{place}.gated_cross_attn_layer."
            rules += prefixed(_flamingo_block(block), theirs, f"cross.{number}.")
    return rules


def _flamingo_resampler(inner: int) -> list[AnyRule]:
    layer, ours = "layers.{i}.", "layers.{i}."
    return [
        rename("latents", "latents"),
        rename(layer + "0.norm_media.{leaf}", ours + "context_norm.{leaf}"),
        rename(layer + "0.norm_latents.{leaf}", ours + "latents_norm.{leaf}"),
        rename(layer + "0.to_q.weight", ours + "attn.q.weight"),
        split(layer + "0.to_kv.weight", [ours + "attn.k.weight", ours + "attn.v.weight"], (inner, inner)),
        rename(layer + "0.to_out.weight", ours + "attn.out.weight"),
        rename(layer + "1.0.{leaf}", ours + "mlp_norm.{leaf}"),
        rename(layer + "1.1.weight", ours + "fc1.weight"),
        rename(layer + "1.3.weight", ours + "fc2.weight"),
        rename("norm.{leaf}", "norm.{leaf}"),
        rename("frame_embs", "times"),
    ]


def _flamingo_block(inner: int) -> list[AnyRule]:
    return [
        rename("attn_gate", "attn_gate"),
        rename("ff_gate", "mlp_gate"),
        rename("attn.norm.{leaf}", "attn_norm.{leaf}"),
        rename("attn.to_q.weight", "q.weight"),
        split("attn.to_kv.weight", ["k.weight", "v.weight"], (inner, inner)),
        rename("attn.to_out.weight", "out.weight"),
        rename("ff.0.{leaf}", "mlp_norm.{leaf}"),
        rename("ff.1.weight", "mlp.fc1.weight"),
        rename("ff.3.weight", "mlp.fc2.weight"),
    ]
