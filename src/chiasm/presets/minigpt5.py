"""MiniGPT-5: MiniGPT-4 whose text may hold eight tokens that stand for a picture; and the documents' gated sketch.

Paper: MiniGPT-5 (arXiv:2310.02239). Reference: eric-ai-lab/MiniGPT-5 21308c1.

The project's source documents draw MiniGPT-5 as a gate over two encoders, ``g·clip + (1 − g)·lvg``, then a
Q-Former and a linear layer. Its code has neither gate nor second encoder: pictures go in as in MiniGPT-4; new is
how they come out. Both are offered: ``minigpt-5`` is the published one without the diffusion model,
``minigpt-gated-sketch`` the drawn one. What "lvg" is the documents do not say; here EVA-CLIP ViT-g stands for it.

Differences by design: see ``fusion/vokens.py``; the diffusion model is not part of this package.
"""

from __future__ import annotations

from dataclasses import replace

from chiasm.encoders.vit import eva_clip_vit_g14
from chiasm.model_config import VLMConfig
from chiasm.presets import evidence
from chiasm.presets.blip2 import QFORMER, TINY, TOWER
from chiasm.presets.blip2_clip import clip_l
from chiasm.presets.minigpt4 import BASE, MINIGPT_4, VICUNA, vicuna_7b
from chiasm.presets.record import Stage, System, published

VOKENS = tuple(f"[IMG{i}]" for i in range(8))
CODE = "eric-ai-lab/MiniGPT-5, 21308c1"
NEW = ("lm.embedding.weight", "lm.lm_head.weight")

MINIGPT_5 = System(
    family="MiniGPT-5",
    paper="MiniGPT-5: Interleaved Vision-and-Language Generation via Generative Vokens (arXiv:2310.02239)",
    arxiv="2310.02239",
    released="2023-10",
    reference=CODE,
    stages=(
        Stage(
            name="pictures of captions",
            data=("CC3M",),
            trains=(*NEW, "mapper.*"),
            rates={"mapper.*": 2e-4},
            lr=2e-5,
            batch=48,
            epochs=2,
            max_length=None,
            template="its own prompt",
            source="model.py: of both tables only the rows of the eight tokens get a gradient",
            schedule="linear",
            warmup=1000,
        ),
        Stage(
            name="interleaved",
            data=("VIST or MMDialog",),
            trains=(
                *NEW,
                *(f"lm.layers.*.attn.{x}_proj.*" for x in "qv"),
                "mapper.encoder*",
                "mapper.decoder*",
            ),
            lr=2e-5,
            batch=None,
            epochs=None,
            max_length=None,
            template="its own prompt",
            source="model.py: LoRA of rank 8, alpha 16 on q and v; the linear layers and the 77 vectors stay",
            schedule="linear",
            warmup=1000,
        ),
    ),
    differences=(
        "The source documents' gate over two encoders does not exist in its code; it is `minigpt-gated-sketch`.",
        "The diffusion model is not part of the package: `model.pictured(batch)` gives the features it reads, 77 of "
        "width 1024. The objective `vokens` trains the first stage by the other two terms of the published sum, the "
        "text's loss and the distance to a text tower's features of the caption (`recipes/minigpt5.yaml`); the third, "
        "the diffusion model's own error, and with it the second stage, is a loop of one's own "
        "(`fusion.vokens.voken_loss`).",
        "The reference's AdamW shrinks the old rows of both tables though they have no gradient; here the new rows are "
        "parameters of their own while they learn (`rows(first=32000)` in a recipe's plan).",
    ),
    choices=(
        "The vocabulary has 32,000 rows and one for each of the eight tokens `[IMG0]` to `[IMG7]`, whose rows begin as "
        "the mean of the others. The reference adds one for its placeholder, which needs none here.",
    ),
    verified=(
        TOWER,
        QFORMER,
        "The mapper: `torch.nn.Transformer` with its norms first and two linear layers before it, in float64; that it "
        "reads the states one position before the vokens, in padded batches. `tests/parity/test_vokens.py`",
        "The sum of losses: its formula in float64, with the features of transformers' `CLIPTextModel` read from its "
        "folder; padded, packed and one by one alike. `tests/parity/test_vokens_objective.py`",
        TINY,
    ),
)


@published(
    "minigpt-5",
    MINIGPT_5,
    base=BASE | {"connectors.image": "MiniGPT-4", "lm": "Vicuna-7B v0"},
    parameters=7_955_644_928,
    licences=VICUNA | {"reference code and weights": "Apache-2.0 (MiniGPT-5), BSD-3-Clause (MiniGPT-4, LAVIS)"},
    counted="transformers' class of BLIP-2 with a Llama of 32,008 rows, `torch.nn.Transformer`, the rest by formula",
)
def minigpt_5() -> VLMConfig:
    """MiniGPT-5 on Vicuna-7B v0, without the diffusion model: it reads pictures, and maps its eight tokens."""
    dump = vicuna_7b().dump()
    dump["model"] |= {"type": "vokens", "vokens": {"first": 32000}}
    dump["model"]["lm"]["vocab"] = 32000 + len(VOKENS)
    return VLMConfig.parse(dump)


SKETCH = System(
    family="gated sketch",
    paper="no publication: the project's source documents",
    released="2026-11",
    reference="none; MiniGPT-4's recipe, with the gate and the query transformer learning",
    stages=tuple(
        replace(stage, trains=("connectors.image.*",), source="no published run; MiniGPT-4's numbers")
        for stage in MINIGPT_4.stages
    ),
    differences=(
        "The source documents ascribe this to MiniGPT-4 and MiniGPT-5, which have no gate. A published gate between "
        "two encoders is LLaVA-HR's: `model.connectors.image.mode=residual_tanh`.",
    ),
    choices=("What the second encoder, 'lvg', is, the documents do not say: EVA-CLIP ViT-g/14 here.",),
    verified=(
        TOWER,
        evidence.CLIP,
        "The gate by its formula in float64, with its gradients. `tests/parity/test_bridges.py`",
        TINY,
    ),
)


@published(
    "minigpt-gated-sketch",
    SKETCH,
    base={"encoders.image": "CLIP ViT-L/14", "encoders.detail": "EVA-CLIP ViT-g/14", "lm": "Vicuna-7B v0"},
    parameters=8_123_265_536,
    licences=VICUNA | {"image encoder": "MIT (CLIP, EVA-CLIP)"},
    counted="transformers' two towers, its Q-Former, its Llama, and gate and linear layers by their formulas",
)
def minigpt_gated_sketch() -> VLMConfig:
    """The source documents' gate: g·CLIP + (1 − g)·EVA for every channel of every patch, a Q-Former, a linear layer."""
    return vicuna_7b().edit(
        **{
            "model.encoders": {
                "image": clip_l().model_copy(update={"select": "patch"}),
                "detail": eva_clip_vit_g14(select="patch"),
            },
            "model.connectors.image": {"type": "gate", "mode": "convex", "then": {"type": "qformer"}},
            "model.media.image.encoders": ["image", "detail"],
        }
    )
