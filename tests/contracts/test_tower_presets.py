"""Presets of two towers: published sizes, the published configurations, tiny forms that run and learn."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from checkpoint_kit import make_tokenizer
from PIL import Image

from chiasm.compose import build_model, check_counts
from chiasm.config import diff
from chiasm.fusion.dual_tower import DualTower
from chiasm.lm.silent import Silent
from chiasm.lm.tokenizer import Tokenizer
from chiasm.presets import preset, presets, record_of
from chiasm.presets.hf_towers import exported, network
from chiasm.presets.page import describe, page
from chiasm.processing.processor import Processor

NAMES = [record.name for record in presets() if isinstance(record.function().model, DualTower.Config)]
# One of each way the parts are put together, for what takes time.
KINDS = [
    "clip-rn50", "clip-vit-b32", "openclip-vit-h14", "siglip-b16-224", "siglip2-giant-16-256", "siglip2-b16-naflex",
    "align-base",
]  # fmt: skip


@cache
def size(name: str) -> int:
    return sum(p.numel() for p in build_model(record_of(name).config().model, device="meta").parameters())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_record(name: str):
    assert size(name) == record_of(name).parameters


IN_CLASS = [name for name in KINDS if not name.startswith("clip-rn")]


@pytest.mark.parametrize("name", IN_CLASS)
def test_parameters_are_those_of_transformers(name: str):
    """The class, built on the meta device from the sizes that the papers give (through the writer of its layout)."""
    transformers = pytest.importorskip("transformers")
    kind, values = exported(record_of(name).config().model)
    title = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2", "align": "Align"}[kind]
    with torch.device("meta"):
        model = getattr(transformers, f"{title}Model")(getattr(transformers, f"{title}Config")(**values))
    assert sum(p.numel() for p in model.parameters()) == size(name)


# Published by the authors or their libraries, typed in here and in no other place.
KNOWN = {
    "clip-vit-b32": 151_277_313,  # openai/CLIP's README and open_clip's table agree
    "clip-vit-b16": 149_620_737,
    "clip-vit-l14": 427_616_513,
    "clip-rn50": 102_007_137,  # openai/CLIP's class, run on the meta device
    "clip-rn101": 119_688_033,
    "clip-rn50x4": 178_300_601,
    "clip-rn50x16": 290_979_217,
    "clip-rn50x64": 623_258_305,
    "siglip-b16-224": 203_155_970,
    "siglip-so400m-14-384": 877_960_498,
    "align-base": 172_117_841,
}


@pytest.mark.parametrize(("name", "parameters"), KNOWN.items())
def test_published_sizes(name: str, parameters: int):
    assert size(name) == parameters


# config.json of openai/clip-vit-base-patch32 and google/siglip-base-patch16-224, as far as they set sizes
HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "clip-vit-b32": (
        "clip",
        {
            "projection_dim": 512,
            "text_config": {"eos_token_id": 2},
            "vision_config": {"patch_size": 32},
        },
    ),
    "siglip-b16-224": (
        "siglip",
        {
            "text_config": {"vocab_size": 32000},
            "vision_config": {"patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "image_size": 224},
        },
    ),
    "align-base": ("align", {"vision_config": {"image_size": 289}}),
    # google/siglip2-base-patch16-naflex
    "siglip2-b16-naflex": (
        "siglip2",
        {
            "text_config": {"vocab_size": 256000, "hidden_act": "gelu_pytorch_tanh"},
            "vision_config": {"num_patches": 256},
        },
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_presets_are_what_the_reader_makes_of_the_published_configuration(name: str):
    kind, values = HUB[name]
    read = DualTower.Config.parse(network(kind, values, "hub"))
    found = diff(preset(name).model, read)
    found.pop("scale_init", None)  # ln(1 / 0.07), which transformers rounds to 2.6592
    assert not found


@pytest.mark.parametrize("name", NAMES)
def test_counts_and_records(name: str):
    record = record_of(name)
    config = record.config()
    front = config.processing.media["image"]
    tiny = preset(name, tiny=True)
    small = tiny.processing.media["image"]
    naflex = front.type == "naflex"
    unit = (small.patches, small.patch**2 * 3) if naflex else small.unit_shape
    check_counts(tiny.model, {"image": unit})
    assert config.provenance.preset == name and config.provenance.licences
    tower = config.model.encoders["image"]
    assert front.patch == tower.patch if naflex else front.size == tower.image_size
    assert front.placeholder is None
    assert config.processing.template.length <= config.model.encoders["text"].positions
    assert not record.system.arxiv or f"arXiv:{record.system.arxiv}" in record.paper


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(make_tokenizer(tmp_path_factory.mktemp("towers")))


@pytest.mark.parametrize("name", KINDS)
def test_tiny_form_runs_and_learns(name: str, tokenizer: Tokenizer):
    config = preset(name, tiny=True, vocab=len(tokenizer))
    model = build_model(config.model).train()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())) * 0.05)
    processor = Processor(config.processing, tokenizer, config.model.count)
    turns = [
        [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (50, 70), color)}, text]}]
        for color, text in (("red", "a red one"), ("green", "green"), ("navy", "it is blue"))
    ]
    out = model(processor.batch(turns))
    scores = out.named["logits_per_image"]
    assert scores.shape == (3, 3) and scores.std() > 1e-5
    torch.nn.functional.cross_entropy(scores, torch.arange(3)).backward()
    idle = {f"encoders.{k}.{n}" for k, e in model.encoders.items() if hasattr(e, "unused") for n in e.unused()}
    # a bias that is the same in every score moves no softmax
    lost = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()} - {"logit_bias"}
    assert lost <= idle


def test_pages_say_how_pictures_and_texts_go():
    words = describe(preset("siglip-b16-224"))
    assert "[1, 196, 768]" in words and "[1, 64, 768]" in words and "logit_bias" in words
    text = page(record_of("clip-vit-b32"))
    assert "## From a text to its vector" in text and "151,277,313" in text and "at most 100" in text


# ------------------------------------------------------------------------------------- the plain vision transformer

CLASSIFIERS = [record.name for record in presets() if record.family == "ViT"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_parameters_of_classifiers(name: str):
    """Against the paper's table of sizes by hand: patches, class vector, positions, blocks, norm, head."""
    tower = preset(name).model.encoders["image"]
    d, m, p = tower.dim, tower.mlp, tower.patch
    block = 4 * (d * d + d) + 2 * d * m + m + d + 4 * d
    places = (tower.image_size // p) ** 2 + 1
    expected = 3 * p * p * d + d + d + places * d + tower.depth * block + 2 * d + 1000 * (d + 1)
    assert size(name) == record_of(name).parameters == expected


def test_a_published_classifier():
    assert size("vit-b16-224") == 86_567_656  # timm and transformers
    config = preset("vit-b16-224", tiny=True)
    model = build_model(config.model)
    pictures = [[{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (40, 30), c)}]}] for c in
                ("red", "blue")]  # fmt: skip
    scores = model(Processor(config.processing, Silent(), config.model.count).batch(pictures)).logits
    assert scores.shape == (2, 10)
    assert "[1, 1, 1000]" in describe(preset("vit-l16-384")) and "## From a picture" in page(record_of("vit-b16-224"))
