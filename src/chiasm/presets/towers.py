"""Models of two towers at every published size: CLIP, open_clip's larger ones, SigLIP, SigLIP 2 and ALIGN.

Papers: CLIP (arXiv:2103.00020), OpenCLIP (arXiv:2212.07143), SigLIP (arXiv:2303.15343), SigLIP 2 (arXiv:2502.14786),
ALIGN (arXiv:2102.05918). Sizes from ``model_configs`` of open_clip 89fb801 and the configurations of transformers.

The presets of a family differ in numbers only, so each is a row of a table and one function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from chiasm.encoders.resnet import clip_resnet
from chiasm.encoders.vit import ViT, clip_vit_b16, clip_vit_b32, clip_vit_l14, siglip_b16, siglip_l16
from chiasm.model_config import VLMConfig
from chiasm.presets.record import Stage, System, published
from chiasm.processing.image import CLIP_MEAN, CLIP_STD

VECTORS = (
    "Vectors, scores and the loss of small random models within 1e-5 of transformers', folders in and out. "
    "`tests/parity/test_towers_hf.py`, `tests/parity/test_dual_tower.py`"
)
ORIGINAL = (
    "The authors' layout: sizes read from shapes alone, weights under their names, the residual network against its "
    "formula in float64. `tests/parity/test_towers_original.py`, `tests/parity/test_clip_resnet.py`"
)
TOKENS = (
    "Token ids: 40 strings equal to those of the authors' libraries, texts cleaned as theirs. "
    "`tests/golden/test_tower_tokenizers.py`"
)
PIXELS = "Pixels: equal to the golden values of the authors' transform. `tests/golden/test_visual_tokens.py`"
ORDER = (
    "A palette or transparent picture is made RGB before it is resized; openai/CLIP does it after, which differs by up "
    "to 3.8 standard deviations on such pictures."
)
BOUND = "The scale's bound of 100 holds in evaluation by itself; openai/CLIP and transformers have it in no model."


def stage(**values: Any) -> Stage:
    """A stage in which everything learns from captions."""
    known: dict[str, Any] = {"trains": ("*",), "epochs": None, "template": "the caption alone"}
    return Stage(**(known | values))


CLIP_STAGE = stage(
    name="contrast",
    data=("400M pairs of the web (WIT, not published)",),
    lr=5e-4,
    batch=32768,
    epochs=32,
    max_length=77,
    source="the paper, tables 18 to 20; 4e-4 for L/14, and one epoch more at 336 pixels with 2e-5",
    warmup=2000,
    weight_decay=0.2,
)
CLIP = System(
    family="CLIP",
    paper="Learning Transferable Visual Models From Natural Language Supervision (arXiv:2103.00020)",
    arxiv="2103.00020",
    released="2021-01",
    reference="openai/CLIP, d05afc4",
    stages=(CLIP_STAGE,),
    differences=(ORDER, BOUND),
    verified=(VECTORS, ORIGINAL, TOKENS, PIXELS),
)
OPEN_CLIP = System(
    family="OpenCLIP",
    paper="Reproducible Scaling Laws for Contrastive Language-Image Learning (arXiv:2212.07143)",
    arxiv="2212.07143",
    released="2022-12",
    reference="open_clip, 89fb801",
    stages=(
        stage(
            name="contrast",
            data=("LAION-2B",),
            lr=None,
            batch=None,
            max_length=77,
            source="the paper: rates and batches by size",
            warmup=None,
            weight_decay=0.2,
        ),
    ),
    differences=(ORDER, BOUND),
    choices=("Pixels are normalised as OpenAI's; some checkpoints of LAION have other numbers in their own files.",),
    verified=(VECTORS, ORIGINAL, TOKENS),
)
_SIGMOID = stage(
    name="sigmoid",
    data=("WebLI, English",),
    lr=1e-3,
    batch=32768,
    max_length=64,
    source="the paper, appendix: ScalingViT-Adafactor, beta2 0.95",
    warmup=None,
    weight_decay=1e-4,
)
SIGLIP = System(
    family="SigLIP",
    paper="Sigmoid Loss for Language Image Pre-Training (arXiv:2303.15343)",
    arxiv="2303.15343",
    released="2023-03",
    reference="google-research/big_vision; transformers 5.23",
    stages=(_SIGMOID,),
    differences=("The scale starts at 10 and the bias at -10, as in the paper; transformers starts both at 0.",),
    verified=(VECTORS, TOKENS),
)
SIGLIP_2 = System(
    family="SigLIP 2",
    paper="SigLIP 2: Multilingual Vision-Language Encoders with Improved Semantic Understanding, Localization, and "
    "Dense Features (arXiv:2502.14786)",
    arxiv="2502.14786",
    released="2025-02",
    reference="google-research/big_vision; transformers 5.23",
    stages=(
        stage(
            name="sigmoid, captioning, self-distillation",
            data=("WebLI, 109 languages",),
            lr=1e-3,
            batch=32768,
            max_length=64,
            source="the paper, section 2 (the sigmoid part; its decoder and teacher are not in the checkpoints)",
            warmup=None,
            weight_decay=1e-4,
        ),
    ),
    differences=SIGLIP.differences,
    choices=(
        "Texts are lower case and nothing else is taken out, as in transformers; open_clip takes out punctuation.",
    ),
    verified=(VECTORS,),
)
ALIGN = System(
    family="ALIGN",
    paper="Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision "
    "(arXiv:2102.05918)",
    arxiv="2102.05918",
    released="2021-02",
    reference="kakaobrain/coyo-align; transformers 5.23",
    stages=(
        stage(
            name="contrast",
            data=("1.8B noisy pairs; Kakao Brain's checkpoint: COYO-700M",),
            lr=1e-3,
            batch=16384,
            max_length=64,
            source="the paper, section 4.1: LAMB, labels smoothed by 0.1",
            schedule="linear",
            warmup=10000,
            weight_decay=1e-5,
        ),
    ),
    differences=("The running averages of its norms move by 0.01 a step; transformers' momentum makes it 0.99.",),
    verified=(VECTORS, TOKENS),
)
WEB = {"code": "Apache-2.0", "pictures": "of their owners, collected from the web"}
LICENCES = {
    "CLIP": WEB | {"reference code and weights": "MIT (OpenAI)"},
    "OpenCLIP": WEB | {"reference code and weights": "MIT (LAION, open_clip)"},
    "SigLIP": WEB | {"reference code and weights": "Apache-2.0 (Google)"},
    "SigLIP 2": WEB | {"reference code and weights": "Apache-2.0 (Google)"},
    "ALIGN": WEB | {"reference code": "Apache-2.0 (transformers)", "weights": "see the card of kakaobrain/align-base"},
}

# ------------------------------------------------------------------------------------------------------------- parts

READ_CLASS: dict[str, Any] = {"layer": -1, "select": "cls", "post_norm": "applied"}
_GELU: dict[str, Any] = READ_CLASS | {"activation": "gelu"}


def _clip(tower: Any, dim: int, text: int, heads: int, depth: int = 12, activation: str = "quick_gelu") -> VLMConfig:
    size = tower.image_size
    image: dict[str, Any] = {"type": "pooled"}
    if tower.type == "resnet":
        image = {"type": "clip_pool", "grid": [size // 32, size // 32], "heads": tower.width * 32 // 64}
    words = {"dim": text, "heads": heads, "depth": depth, "mlp": 4 * text, "activation": activation}
    return VLMConfig.parse(
        {
            "model": {
                "type": "dual_tower",
                "dim": dim,
                "encoders": {"image": tower, "text": {"type": "text", **words}},
                "connectors": {"image": image, "text": {"type": "pooled", "pool": "last"}},
            },
            "processing": {
                "template": {"type": "pair", "length": 77, "clean": "clip"},
                "media": {"image": front_end(size, "crop", CLIP_MEAN, CLIP_STD, crop_rounding="round")},
            },
        }
    )


def _siglip(
    tower: ViT.Config, vocab: int, clean: str, length: int = 64, text: tuple[int, int, int, int] | None = None
) -> VLMConfig:
    dim, depth, heads, mlp = text or (tower.dim, tower.depth, tower.heads, tower.mlp)
    words = {"vocab": vocab, "dim": dim, "depth": depth, "heads": heads, "mlp": mlp, "positions": length}
    kind = {"activation": "gelu_tanh", "norm_eps": 1e-6, "causal": False}
    return VLMConfig.parse(
        {
            "model": {
                "type": "dual_tower",
                "dim": tower.dim,
                "encoders": {"image": tower, "text": {"type": "text", **words, **kind}},
                "connectors": {
                    "image": {"type": "map_head", "heads": tower.heads, "mlp": tower.mlp},
                    "text": {"type": "pooled", "pool": "last", "project": "linear_bias"},
                },
                "scale_init": 10.0,
                "max_scale": None,
                "bias_init": -10.0,
            },
            "processing": {
                "template": {"type": "pair", "length": length, "fill": True, "clean": clean},
                "media": {"image": front_end(tower.image_size, "squash", (0.5,) * 3, (0.5,) * 3)},
            },
        }
    )


def front_end(size: int, fit: str, mean: tuple[float, ...], std: tuple[float, ...], **more: Any) -> dict[str, Any]:
    """A picture front end without a placeholder."""
    return {"type": "image", "placeholder": None, "size": size, "fit": fit, "mean": mean, "std": std, **more}


def _large(size: int, patch: int, dim: int, depth: int, heads: int, mlp: int) -> ViT.Config:
    """A tower of open_clip, with the exact GELU."""
    sizes = {"image_size": size, "patch": patch, "dim": dim, "depth": depth, "heads": heads, "mlp": mlp}
    return ViT.Config(**(_GELU | sizes | {"norm_eps": 1e-5, "patch_bias": False, "pre_norm": True}))


def _so400m(size: int, patch: int) -> ViT.Config:
    return siglip_l16(size, patch=patch, dim=1152, depth=27, heads=16, mlp=4304)


def _with_resnet(net: str, dim: int, text: int, heads: int) -> VLMConfig:
    return _clip(clip_resnet(net), dim, text, heads)


def _with_vit(tower: Callable[..., ViT.Config], size: int, dim: int, text: int, heads: int) -> VLMConfig:
    return _clip(tower(size, **READ_CLASS), dim, text, heads)


def _open_clip(sizes: tuple[int, int, int, int, int, int], dim: int, text: tuple[int, int, int]) -> VLMConfig:
    width, heads, depth = text
    return _clip(_large(*sizes), dim, width, heads, depth, "gelu")


def _siglip_of(
    net: str, size: int, vocab: int, clean: str, length: int, text: tuple[int, int, int, int] | None = None
) -> VLMConfig:
    return _siglip(_TOWERS[net](size), vocab, clean, length, text)


# ----------------------------------------------------------------------------------------------------------- presets

Make = Callable[[], VLMConfig]


def enter(name: str, system: System, parameters: int, words: str, make: Make, counted: str = "") -> None:
    """One preset: a function with its words, entered with its record."""

    def function() -> VLMConfig:
        return make()

    function.__doc__, function.__name__, function.__qualname__ = words, name, name
    counted = counted or "transformers' class of this system, built on the meta device"
    published(name, system, base={}, parameters=parameters, licences=LICENCES[system.family], counted=counted)(function)


BY_AUTHORS = "the authors' class, built on the meta device"
for _name, _net, _dim, _text, _heads, _count in (
    ("clip-rn50", "RN50", 1024, 512, 8, 102_007_137),
    ("clip-rn101", "RN101", 512, 512, 8, 119_688_033),
    ("clip-rn50x4", "RN50x4", 640, 640, 10, 178_300_601),
    ("clip-rn50x16", "RN50x16", 768, 768, 12, 290_979_217),
    ("clip-rn50x64", "RN50x64", 1024, 1024, 16, 623_258_305),
):
    enter(
        _name, CLIP, _count, f"CLIP with the residual network {_net}.",
        partial(_with_resnet, _net, _dim, _text, _heads), BY_AUTHORS,
    )  # fmt: skip
for _name, _tower, _dim, _text, _heads, _count, _words in (
    ("clip-vit-b32", clip_vit_b32, 512, 512, 8, 151_277_313, "CLIP ViT-B/32: the fastest of OpenAI's."),
    ("clip-vit-b16", clip_vit_b16, 512, 512, 8, 149_620_737, "CLIP ViT-B/16."),
    ("clip-vit-l14", clip_vit_l14, 768, 768, 12, 427_616_513, "CLIP ViT-L/14."),
):
    enter(
        _name, CLIP, _count, _words,
        partial(_with_vit, _tower, 224, _dim, _text, _heads),
    )  # fmt: skip
enter(
    "clip-vit-l14-336", CLIP, 427_944_193, "CLIP ViT-L/14 at 336 pixels: the best of OpenAI's.",
    partial(_with_vit, clip_vit_l14, 336, 768, 768, 12),
)  # fmt: skip
for _name, _tower_sizes, _dim, _text_sizes, _count in (
    ("openclip-vit-h14", (224, 14, 1280, 32, 16, 5120), 1024, (1024, 16, 24), 986_109_441),
    ("openclip-vit-g14", (224, 14, 1408, 40, 16, 6144), 1024, (1024, 16, 24), 1_366_678_273),
    ("openclip-vit-bigg14", (224, 14, 1664, 48, 16, 8192), 1280, (1280, 20, 32), 2_539_567_105),
):
    enter(
        _name, OPEN_CLIP, _count, f"OpenCLIP {_name.removeprefix('openclip-')}, trained on LAION-2B; the exact GELU.",
        partial(_open_clip, _tower_sizes, _dim, _text_sizes),
    )  # fmt: skip

SIGLIP_COUNTS = {
    ("b16", 224): 203_155_970, ("b16", 256): 203_202_050, ("b16", 384): 203_447_810, ("b16", 512): 203_791_874,
    ("l16", 256): 652_150_786, ("l16", 384): 652_478_466,
    ("so400m-14", 224): 877_360_306, ("so400m-14", 384): 877_960_498,
}  # fmt: skip
_TOWERS: dict[str, Callable[[int], ViT.Config]] = {
    "b32": lambda size: siglip_b16(size, patch=32),
    "b16": siglip_b16,
    "l16": siglip_l16,
    "so400m-14": lambda size: _so400m(size, 14),
    "so400m-16": lambda size: _so400m(size, 16),
    "giant-16": lambda size: siglip_l16(size, dim=1536, depth=40, heads=16, mlp=6144),
}
SO400M = (1152, 27, 16, 4304)
SIGLIP_2_COUNTS = {
    ("b32", 256): 376_856_066,
    ("b16", 224): 375_187_970, ("b16", 256): 375_234_050, ("b16", 384): 375_479_810, ("b16", 512): 375_823_874,
    ("l16", 256): 881_526_786, ("l16", 384): 881_854_466, ("l16", 512): 882_313_218,
    ("so400m-14", 224): 1_135_463_602, ("so400m-14", 384): 1_136_008_498,
    ("so400m-16", 256): 1_135_670_962, ("so400m-16", 384): 1_136_039_602, ("so400m-16", 512): 1_136_555_698,
    ("giant-16", 256): 1_871_393_906, ("giant-16", 384): 1_871_885_426,
}  # fmt: skip
for (_net, _size), _count in SIGLIP_COUNTS.items():
    _length = 16 if (_net, _size) == ("so400m-14", 224) else 64
    enter(
        f"siglip-{_net}-{_size}", SIGLIP, _count, f"SigLIP {_net} at {_size} pixels; texts of {_length} tokens.",
        partial(_siglip_of, _net, _size, 32000, "siglip", _length),
    )  # fmt: skip
for (_net, _size), _count in SIGLIP_2_COUNTS.items():
    enter(
        f"siglip2-{_net}-{_size}", SIGLIP_2, _count, f"SigLIP 2 {_net} at a fixed {_size} pixels, many languages.",
        partial(_siglip_of, _net, _size, 256000, "lower", 64, SO400M if _net == "giant-16" else None),
    )  # fmt: skip


@published(
    "align-base",
    ALIGN,
    base={"encoders.text": "bert-base-uncased"},
    parameters=172_117_841,
    licences=LICENCES["ALIGN"],
    counted="transformers' class of this system, built on the meta device",
)
def align_base() -> VLMConfig:
    """ALIGN with EfficientNet-B7 and BERT-base, as Kakao Brain trained it."""
    image = front_end(289, "squash", (0.5,) * 3, (0.5,) * 3, shortest_edge=346)
    return VLMConfig.parse(
        {
            "model": {
                "type": "dual_tower",
                "dim": 640,
                "encoders": {"image": {"type": "efficientnet"}, "text": {"type": "bert", "pooler": "unused"}},
                "connectors": {
                    "image": {"type": "pooled", "pool": "mean", "project": "none"},
                    "text": {"type": "pooled", "pool": "first", "project": "linear_bias"},
                },
                "scale": "divisor",
                "scale_init": 1.0,
                "max_scale": None,
            },
            "processing": {"template": {"type": "pair", "length": 64}, "media": {"image": image}},
        }
    )
