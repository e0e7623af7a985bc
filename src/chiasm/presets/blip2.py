"""BLIP-2: a frozen EVA-CLIP tower, a Q-Former, a frozen language model that reads 32 vectors for a picture.

Paper: BLIP-2 (arXiv:2301.12597). Reference: salesforce/LAVIS 506965b; the port in transformers 5.23.

Differences by design and from the project's source documents stand in ``BLIP_2.differences``. The configurations are
those of the second stage, in which the Q-Former has lost its text half; ``stage_1`` is the model of the first.
"""

from __future__ import annotations

from typing import Any

from chiasm.encoders.vit import eva_clip_vit_g14
from chiasm.model_config import VLMConfig
from chiasm.presets.record import Stage, System, published

CODE = "salesforce/LAVIS, 506965b"
BRIDGE = ("connectors.*", "encoders.image.post_norm.*")
LICENCE = {
    "code": "Apache-2.0",
    "reference code and weights": "BSD-3-Clause (LAVIS)",
    "image encoder": "MIT (EVA-CLIP)",
    "data": "the licences of COCO, Visual Genome, CC3M, CC12M, SBU and LAION, whose pictures are their owners'",
}
OPT = LICENCE | {"language model": "OPT licence, non-commercial research (Meta)"}
FLAN = LICENCE | {"language model": "Apache-2.0 (Flan-T5)"}

ZERO = (
    "Queries start as a normal of deviation 0.02, as in LAVIS. The port in transformers starts them at zero: they stay "
    "alike and their first gradient is huge."
)
SCHEDULE = (
    "LAVIS's schedule steps once an epoch and warms up only in the first; here both count optimizer steps, as its YAML "
    "reads."
)
DTYPE = "The Q-Former runs in the type of the model; LAVIS and transformers keep it in float32."
TOWER = (
    "The tower: the last hidden state of a small random tower within 1e-5 of transformers' `Blip2VisionModel`, and its "
    "gradient within 1e-4. `tests/parity/test_qformer.py`"
)
QFORMER = (
    "The Q-Former: states within 1e-5 and gradients within 1e-4 of transformers' `Blip2QFormerModel` with queries that "
    "are not zero; the three masks against two passes and on paper. `tests/parity/test_qformer.py`"
)
WHOLE = (
    "The whole model: token ids and pixels equal to those of transformers' class, logits within 1e-5, gradients within "
    "1e-4, the same text greedily and by beams, with OPT and with Flan-T5, on small random models saved by "
    "transformers. `tests/parity/test_blip2_hf.py`"
)
TINY = (
    "The tiny form: a batch of one picture, none and two equals each alone, and an answer depends on its own picture "
    "only; every parameter that runs gets a gradient. `tests/contracts/test_presets.py`"
)
FIRST = (
    "The first stage: matching and contrast within 1e-5 and their gradients within 1e-4 of transformers' "
    "`Blip2ForImageTextRetrieval`, the three losses equal to the paper's formulas in float64, two ranks the step of "
    "one. `tests/parity/test_query_text.py`, `tests/recipes/test_blip2_stage1.py`"
)
LAVIS = (
    "LAVIS's files, in and out, by its names written down from its source: the logits of a random model of "
    "transformers given those names. `tests/parity/test_lavis.py`"
)
STAGE_1 = Stage(
    name="represent",
    data=("129M pictures: COCO, Visual Genome, CC3M, CC12M, SBU, LAION (the public recipe: COCO and Visual Genome)",),
    trains=BRIDGE,
    lr=1e-4,
    batch=None,
    epochs=10,
    max_length=32,
    template="captions alone: contrast, matching and grounded generation",
    source="lavis/projects/blip2/train/pretrain_stage1.yaml (100 pictures a GPU)",
    warmup=5000,
    last_lr=1e-5,
    weight_decay=0.05,
)
STAGE_2 = Stage(
    name="generate",
    data=("the same pictures",),
    trains=BRIDGE,
    lr=1e-4,
    batch=None,
    epochs=10,
    max_length=32,
    template="blip2_opt",
    source="lavis/projects/blip2/train/pretrain_stage2.yaml (64 pictures a GPU)",
    warmup=2000,
    last_lr=1e-5,
    weight_decay=0.05,
)
STAGE_2_T5 = Stage(**{**STAGE_2.__dict__, "template": "blip2_t5"})


def _system(second: Stage) -> System:
    return System(
        family="BLIP-2",
        paper="BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models "
        "(arXiv:2301.12597)",
        arxiv="2301.12597",
        released="2023-01",
        reference=CODE,
        stages=(STAGE_1, second),
        differences=(
            ZERO,
            DTYPE,
            SCHEDULE,
            "Dropout in the Q-Former is 0 (LAVIS: BERT's 0.1); `model.connectors.image.dropout=0.1` gives it back.",
            "The end of an answer is learned and stops generation: a line break after OPT, as in LAVIS; the token that "
            "OPT opens its text with is not learned (LAVIS, which masks padding only, learns it from the last query). "
            "That token stands once: after the pictures, or first of all where there is none, as in transformers.",
        ),
        choices=(
            "The prefix and the rest that a caption is split into for Flan-T5 are not published with the code: user "
            "text is the encoder's side, the answer the decoder's, and a caption without a prefix has an empty user "
            "text.",
        ),
        verified=(TOWER, QFORMER, WHOLE, FIRST, LAVIS, TINY),
    )


def opt(dim: int, mlp: int) -> dict[str, Any]:
    """An OPT of 32 blocks, as transformers writes it."""
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": dim,
        "word_embed_proj_dim": dim,
        "ffn_dim": mlp,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "dropout": 0.0,
    }


def flan_t5(dim: int, mlp: int, heads: int) -> dict[str, Any]:
    """A Flan-T5 of 24 blocks a side, with the exact GELU that LAVIS runs it with (Flan-T5's own is the tanh form)."""
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": dim,
        "d_kv": 64,
        "d_ff": mlp,
        "num_layers": 24,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",
        "dropout_rate": 0.0,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


TEXT = {"vocab": 30523, "positions": 512}  # BERT's words, and one that opens a text that is written


def stage_1() -> VLMConfig:
    """The first stage: the tower and the Q-Former with its text half, no language model. ``"chiasm.presets.blip2:
    stage_1"`` names it; the tokenizer is BERT's with ``[DEC]``, id 30522, added.
    """
    return VLMConfig.parse(
        {
            "model": {
                "type": "query_text",
                "encoders": {"image": eva_clip_vit_g14()},
                "connectors": {"image": {"type": "qformer", "text": TEXT, "project": False}},
                "dim": 256,
                "start": 30522,
            },
            "processing": {
                "template": "blip2_caption",
                "media": {"image": {"type": "image", "placeholder": None, "size": 224, "fit": "squash"}},
                "max_length": 512,
            },
        }
    )


@published(
    "blip2-opt-2.7b",
    _system(STAGE_2),
    base={"encoders.image": "EVA-CLIP ViT-g/14", "connectors.image": "bert-base-uncased", "lm": "facebook/opt-2.7b"},
    parameters=3_744_679_936,
    licences=OPT,
)
def blip2_opt_27b() -> VLMConfig:
    """BLIP-2 on OPT-2.7B."""
    return VLMConfig.parse(
        {
            "model": {
                "type": "splice",
                "encoders": {"image": eva_clip_vit_g14()},
                "connectors": {"image": {"type": "qformer"}},
                "lm": {"type": "hf", "config": opt(2560, 10240)},
                "media": {"image": {"encoders": ["image"], "connector": "image", "merge": {"type": "flat"}}},
            },
            "processing": {
                "template": "blip2_opt",
                "media": {"image": {"type": "image", "size": 224, "fit": "squash"}},
                "max_length": 512,
                "add_bos": False,
            },
        }
    )


@published(
    "blip2-opt-6.7b",
    _system(STAGE_2),
    base={"encoders.image": "EVA-CLIP ViT-g/14", "connectors.image": "bert-base-uncased", "lm": "facebook/opt-6.7b"},
    parameters=7_752_738_304,
    licences=OPT,
)
def blip2_opt_67b() -> VLMConfig:
    """BLIP-2 on OPT-6.7B."""
    return blip2_opt_27b().edit(**{"model.lm.config": opt(4096, 16384)})


@published(
    "blip2-flan-t5-xl",
    _system(STAGE_2_T5),
    base={"encoders.image": "EVA-CLIP ViT-g/14", "connectors.image": "bert-base-uncased", "lm": "google/flan-t5-xl"},
    parameters=3_942_446_592,
    licences=FLAN,
)
def blip2_flan_t5_xl() -> VLMConfig:
    """BLIP-2 on Flan-T5-XL: the picture and the question go to its encoder, the answer to its decoder."""
    return blip2_opt_27b().edit(
        **{
            "model.lm.config": flan_t5(2048, 5120, 32),
            "processing.template": "blip2_t5",
            "processing.target": "decoder",
            "processing.add_bos": None,
        }
    )


@published(
    "blip2-flan-t5-xxl",
    _system(STAGE_2_T5),
    base={"encoders.image": "EVA-CLIP ViT-g/14", "connectors.image": "bert-base-uncased", "lm": "google/flan-t5-xxl"},
    parameters=12_229_596_672,
    licences=FLAN,
)
def blip2_flan_t5_xxl() -> VLMConfig:
    """BLIP-2 on Flan-T5-XXL."""
    return blip2_flan_t5_xl().edit(**{"model.lm.config": flan_t5(4096, 10240, 64)})
