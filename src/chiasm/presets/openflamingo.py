"""OpenFlamingo: a frozen CLIP, a resampler, gated blocks between the layers of a frozen language model.

Paper: OpenFlamingo (arXiv:2308.01390), after Flamingo (arXiv:2204.14198). Reference: mlfoundations/open_flamingo
655f693. Flamingo itself, with Chinchilla and an NFNet, was never released; ``FLAMINGO`` says how it differs.

The released file holds what was trained. Around it belong the language model's and CLIP's own files:

    config = chiasm.preset("openflamingo-9b").with_weights(lm="mpt-7b", **{"encoders.image": "clip-vit-large-patch14"})
    vlm = chiasm.build(config, tokenizer="openflamingo-tokenizer").load_part("openflamingo", "checkpoint.pt", True)
"""

from __future__ import annotations

from chiasm.encoders.vit import clip_vit_l14
from chiasm.lm.gpt import GPT
from chiasm.model_config import VLMConfig
from chiasm.presets.record import Stage, System, published

CODE = "mlfoundations/open_flamingo, 655f693"
TRAINED = ("connectors.*", "cross.*", "lm.embedding.*")
VOCAB = 50280  # the tokenizer's 50,277 tokens, <|endofchunk|>, <image> and <PAD>
LICENCE = {
    "code": "Apache-2.0",
    "reference code and weights": "MIT (OpenFlamingo)",
    "image encoder": "MIT (CLIP)",
    "data": "the licences of LAION-2B and Multimodal C4, whose pictures and pages are their owners'",
    "language model": "Apache-2.0",
}

FLAMINGO = (
    "Flamingo (3B, 9B, 80B; nothing was released) has blocks before every layer, every 4th or every 7th, perceptrons "
    "that square a ReLU (`activation=squared_relu` in blocks and resampler), learned times of frames in the resampler "
    "(`frames`), an NFNet-F6 and Chinchilla; in training a text sees the picture before or after it, by chance. "
    "All but the last two are options here."
)
EMBEDDING = (
    "OpenFlamingo masks the gradient of the embedding but for the rows of its two new tokens, which weight decay then "
    "reaches in one of its modes; here a plan trains the table whole, or freezes it. Where the head is a matrix of its "
    "own (4B), its new rows are never trained there."
)
LEAK = (
    "A text before the first picture sees none in any mode; in OpenFlamingo, where every earlier picture may be seen, "
    "it looks at all later ones (`only_attend_immediate_media=False`; not the mode of the released models)."
)
TOWER = (
    "Patches are those before CLIP's last norm, which open_clip applies to them since version 2.23, after the training."
)
BLOCKS = (
    "Resampler, masks, gated blocks and an MPT around them: the whole forward pass within 1e-7 of the published "
    "formulas, written out in float64, with open gates, text before the first picture, several pictures and none. "
    "`tests/parity/test_cross_attention.py`"
)
LMS = (
    "The language model: logits of small random MPT and GPT-NeoX models within 1e-5 of transformers'; MPT-1B's norms "
    "over queries and keys, which transformers' class lacks, against their formula. `tests/parity/test_gpt.py`"
)
FILES = (
    "The released layout, duplicates and all, written by the test under OpenFlamingo's names from its own modules' "
    "shapes, read strictly. `tests/parity/test_openflamingo_files.py`"
)
TINY = (
    "The tiny form: a batch of one picture, none and two equals each alone, and an answer depends on its own picture "
    "only; every parameter that runs gets a gradient once the gates are open. `tests/contracts/test_presets.py`"
)

OPEN_FLAMINGO = System(
    family="OpenFlamingo",
    paper="OpenFlamingo: An Open-Source Framework for Training Large Autoregressive Vision-Language Models "
    "(arXiv:2308.01390)",
    arxiv="2308.01390",
    released="2023-06",
    reference=CODE,
    stages=(
        Stage(
            name="mix",
            data=("LAION-2B pairs, loss x 0.2", "Multimodal C4 documents of at most 6 pictures, loss x 1"),
            trains=TRAINED,
            lr=1e-4,
            batch=None,
            epochs=None,
            max_length=256,
            template="openflamingo",
            source="open_flamingo/scripts/run_train.py and its README; both losses in every step",
            schedule="constant",
            warmup=1875,
            last_lr=1e-4,
            weight_decay=0.1,
        ),
    ),
    differences=(
        "The source documents name InstructBLIP for cross-attention; in it only the bridge crosses, and the language "
        "model reads a prefix. This is the published family whose language model looks at pictures itself; "
        "InstructBLIP is offered as published, under query transformers.",
        LEAK,
        TOWER,
        EMBEDDING,
        "A picture's text ends with `<|endofchunk|>`, which is learned and stops generation; the end-of-text token "
        "that the reference writes after the last chunk of a training sample is left out.",
        "The text between a chunk's end and the next picture is a user's turn and not learned, as in the reference's "
        "masking of Multimodal C4.",
        "Keys and values of pictures are computed once for an answer; the reference computes them at every token.",
    ),
    choices=(
        FLAMINGO,
        "At most 33 pictures (32 shots and the question, as evaluated): `processing.max_media`.",
    ),
    verified=(BLOCKS, LMS, FILES, TINY),
)


def mpt_1b() -> GPT.Config:
    """MPT-1B-RedPajama-200b (MosaicGPT): 24 blocks of width 2048, ALiBi, norms over queries and keys, no biases."""
    return GPT.Config(
        vocab=VOCAB, dim=2048, depth=24, heads=16, mlp=8192, positions="alibi", bias=False, qk_norm=True, tied=True
    )


def mpt_7b() -> GPT.Config:
    """MPT-7B: 32 blocks of width 4096, ALiBi, no biases."""
    return GPT.Config(vocab=VOCAB, dim=4096, depth=32, heads=32, mlp=16384, positions="alibi", bias=False, tied=True)


def redpajama_3b() -> GPT.Config:
    """RedPajama-INCITE-3B (GPT-NeoX): 32 blocks of width 2560, rotary over whole heads, one after the other."""
    return GPT.Config(vocab=VOCAB, dim=2560, depth=32, heads=32, mlp=10240)


SAME = "The instruction-tuned release is this configuration around another language model: "
COUNTED = (
    "transformers' classes of tower and language model on the meta device, plus resampler and blocks by their formula"
)


@published(
    "openflamingo-3b",
    OPEN_FLAMINGO,
    base={"encoders.image": "openai/clip-vit-large-patch14", "lm": "mosaicml/mpt-1b-redpajama-200b"},
    parameters=2_558_330_928,
    counted=COUNTED,
    licences=LICENCE,
    notes=(SAME + "mpt-1b-redpajama-200b-dolly (OpenFlamingo-3B-vitl-mpt1b-langinstruct).",),
)
def openflamingo_3b() -> VLMConfig:
    """OpenFlamingo-3B: MPT-1B with a block before every layer."""
    return VLMConfig.parse(
        {
            "model": {
                "type": "cross_attention",
                "encoders": {"image": clip_vit_l14(layer=-1)},
                "connectors": {"image": {"type": "resampler", "project": False}},
                "lm": mpt_1b(),
                "placement": {"every": 1, "rule": "before_last"},
            },
            "processing": {
                "template": "openflamingo",
                "media": {"image": {"type": "image", "size": 224, "fit": "crop", "crop_rounding": "round"}},
                "max_length": 2047,
                "max_media": 33,
            },
        }
    )


@published(
    "openflamingo-4b",
    OPEN_FLAMINGO,
    base={"encoders.image": "openai/clip-vit-large-patch14", "lm": "togethercomputer/RedPajama-INCITE-Base-3B-v1"},
    parameters=4_039_029_792,
    counted=COUNTED,
    licences=LICENCE,
    notes=(SAME + "RedPajama-INCITE-Instruct-3B-v1 (OpenFlamingo-4B-vitl-rpj3b-langinstruct).",),
)
def openflamingo_4b() -> VLMConfig:
    """OpenFlamingo-4B: RedPajama-INCITE-3B with a block before every second layer."""
    return openflamingo_3b().edit(**{"model.lm": redpajama_3b(), "model.placement.every": 2})


@published(
    "openflamingo-9b",
    OPEN_FLAMINGO,
    base={"encoders.image": "openai/clip-vit-large-patch14", "lm": "anas-awadalla/mpt-7b"},
    parameters=8_130_678_800,
    counted=COUNTED,
    licences=LICENCE,
)
def openflamingo_9b() -> VLMConfig:
    """OpenFlamingo-9B: MPT-7B with a block before every fourth layer."""
    return openflamingo_3b().edit(**{"model.lm": mpt_7b(), "model.placement.every": 4})
