"""Presets: their published sizes, tokens, conventions and records, and that the tiny form is the same system."""

from __future__ import annotations

import fnmatch
import json
from functools import cache

import pytest
import torch
from PIL import Image as Pillow

from chiasm.compose import build_model, check_counts
from chiasm.config import diff
from chiasm.errors import RegistryError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import VLMConfig
from chiasm.presets import preset, presets, record_of
from chiasm.presets.anatomy import count_tokens, flow, parts
from chiasm.presets.page import describe
from chiasm.presets.tiny import tiny_side
from chiasm.processing.processor import Processor
from chiasm.processing.templates import TEMPLATES
from chiasm.vlm import unit_shapes

NAMES = [record.name for record in presets() if hasattr(record.function().model, "lm")]  # those that write

# The published configurations, as transformers writes them (llava-hf's config.json files; the models' own for widths).
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_224 = CLIP | {"image_size": 224}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}


def text(kind, dim, mlp, depth, heads, kv_heads, vocab, tied=False):
    return {
        "model_type": kind,
        "hidden_size": dim,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


VICUNA_7B = text("llama", 4096, 11008, 32, 32, 32, 32000)
VICUNA_13B = text("llama", 5120, 13824, 40, 40, 40, 32000)
QWEN2_05B = text("qwen2", 896, 4864, 24, 14, 2, 151936, tied=True)
QWEN2_7B = text("qwen2", 3584, 18944, 28, 28, 4, 152064)
QWEN2_72B = text("qwen2", 8192, 29568, 80, 64, 8, 152064)
QWEN15_05B = text("qwen2", 1024, 2816, 24, 16, 16, 151936, tied=True)
QWEN15_7B = text("qwen2", 4096, 11008, 32, 32, 32, 151936)

PUBLISHED = {  # preset → class of transformers, tower, language model
    "llava-1.5-7b": ("Llava", CLIP, VICUNA_7B),
    "llava-1.5-13b": ("Llava", CLIP, VICUNA_13B),
    "llava-1.5-hd-7b": ("LlavaNext", CLIP_224, VICUNA_7B),
    "llava-1.5-hd-13b": ("LlavaNext", CLIP_224, VICUNA_13B),
    "llava-next-vicuna-7b": ("LlavaNext", CLIP, VICUNA_7B),
    "llava-next-vicuna-13b": ("LlavaNext", CLIP, VICUNA_13B),
    "llava-next-mistral-7b": ("LlavaNext", CLIP, text("mistral", 4096, 14336, 32, 32, 8, 32000)),
    "llava-next-hermes-34b": ("LlavaNext", CLIP, text("llama", 7168, 20480, 60, 56, 8, 64000)),
    "llava-next-llama3-8b": ("LlavaNext", CLIP, text("llama", 4096, 14336, 32, 32, 8, 128256)),
    "llava-next-video-7b": ("LlavaNextVideo", CLIP, VICUNA_7B),
    "llava-next-interleave-0.5b": ("Llava", SIGLIP, QWEN15_05B),
    "llava-next-interleave-7b": ("Llava", SIGLIP, QWEN15_7B),
    "llava-onevision-0.5b": ("LlavaOnevision", SIGLIP, QWEN2_05B),
    "llava-onevision-7b": ("LlavaOnevision", SIGLIP, QWEN2_7B),
    "llava-onevision-72b": ("LlavaOnevision", SIGLIP, QWEN2_72B),
}


@cache
def sizes(name):
    """Parameters of each part, counted on the meta device."""
    return {row.place: row.parameters for row in parts(record_of(name).config())}


def reference_count(name, rows=None):
    transformers = pytest.importorskip("transformers")
    system, tower, lm = PUBLISHED[name]
    config = getattr(transformers, f"{system}Config")(
        vision_config=dict(tower),
        text_config=lm | ({"vocab_size": rows} if rows else {}),
        tie_word_embeddings=lm["tie_word_embeddings"],
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{system}ForConditionalGeneration")(config)
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_record(name):
    assert sum(sizes(name).values()) == record_of(name).parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_transformers(name):
    assert reference_count(name) == record_of(name).parameters
    if record_of(name).transformers:
        number, rows = record_of(name).transformers
        assert reference_count(name, rows) == number
        wider = build_model(record_of(name).config().edit(**{"model.lm.vocab": rows}).model, device="meta")
        assert sum(parameter.numel() for parameter in wider.parameters()) == number


CLIP_L = ["blip2-clip-l-opt-2.7b", "blip2-clip-l-flan-t5-xl"]
FAMILY = ("blip2-", "instructblip-", "minigpt-4-vicuna-")  # towers, queries and language models of one class
BLIP2 = [name for name in NAMES if name.startswith(FAMILY) and name not in CLIP_L]


@pytest.mark.parametrize("name", BLIP2)
def test_parameters_of_blip2_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    record = record_of(name)
    lm = record.config().model.lm
    text_config = lm.config if lm.type == "hf" else {"7b": VICUNA_7B, "13b": VICUNA_13B}[name.split("-")[-1]]
    text_config = text_config | ({"vocab_size": 32001} if lm.type == "decoder" and name[0] == "i" else {})
    kind, qformer = ("InstructBlip", {"vocab_size": 30523}) if name.startswith("instruct") else ("Blip2", {})
    config = getattr(transformers, f"{kind}Config")(vision_config={}, qformer_config=qformer, text_config=text_config)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if text_config["model_type"] == "t5":  # Flan-T5 has its own head; transformers 5 gives it when it loads one
        assert model.language_model.lm_head.weight is model.language_model.shared.weight
        count += text_config["vocab_size"] * text_config["d_model"]
    assert count == record.parameters


def flan_head(text_config):
    """Flan-T5's own head, which transformers 5 does not build before it loads one."""
    return text_config["vocab_size"] * text_config["d_model"] if text_config["model_type"] == "t5" else 0


def of_transformers(kind, config):
    """A model of transformers on the meta device, counted."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CLIP_L)
def test_parameters_of_blip2_with_clip(name):
    """CLIP's tower of 23 blocks, whose last norm stands for LAVIS's, and a Q-Former over its width."""
    transformers = pytest.importorskip("transformers")
    plain = {key: value for key, value in CLIP_224.items() if key != "model_type"} | {"num_hidden_layers": 23}
    lm = record_of(name).config().model.lm.config
    text_config = transformers.AutoConfig.for_model(**lm)
    kind, dim = ("T5ForConditionalGeneration", 2048) if lm["model_type"] == "t5" else ("OPTForCausalLM", 2560)
    count = of_transformers("CLIPVisionModel", transformers.CLIPVisionConfig(**plain))
    count += of_transformers("Blip2QFormerModel", transformers.Blip2QFormerConfig(encoder_hidden_size=1024))
    count += of_transformers(kind, text_config) + flan_head(lm) + 32 * 768 + 769 * dim
    assert count == record_of(name).parameters


STRIPS = {"minigpt-4-llama-2-7b": 224, "minigpt-v2": 448}  # pixels
CLIPS = {"video-llama-7b": VICUNA_7B, "video-llama-13b": VICUNA_13B}


def llama_count(lm):
    transformers = pytest.importorskip("transformers")
    plain = {key: value for key, value in lm.items() if key != "model_type"}
    return of_transformers("LlamaForCausalLM", transformers.LlamaConfig(**plain))


@pytest.mark.parametrize("name", STRIPS)
def test_parameters_of_strips(name):
    transformers = pytest.importorskip("transformers")
    tower = of_transformers("Blip2VisionModel", transformers.Blip2VisionConfig(image_size=STRIPS[name]))
    assert tower + llama_count(VICUNA_7B) + (4 * 1408 + 1) * 4096 == record_of(name).parameters


@pytest.mark.parametrize("name", CLIPS)
def test_parameters_of_two_levels(name):
    """Two of transformers' Q-Formers; 32 queries a level, 32 positions, one linear layer."""
    transformers = pytest.importorskip("transformers")
    small = transformers.Blip2QFormerConfig(num_hidden_layers=2, cross_attention_frequency=1, encoder_hidden_size=768)
    count = of_transformers("Blip2VisionModel", transformers.Blip2VisionConfig())
    count += sum(of_transformers("Blip2QFormerModel", c) for c in (transformers.Blip2QFormerConfig(), small))
    rest = 3 * 32 * 768 + 769 * CLIPS[name]["hidden_size"]
    assert count + llama_count(CLIPS[name]) + rest == record_of(name).parameters


SOUNDS = {"video-llama-7b-audio": VICUNA_7B, "video-llama-13b-audio": VICUNA_13B}


@pytest.mark.parametrize("name", SOUNDS)
def test_parameters_of_a_branch_for_sounds(name):
    """The vision branch; transformers' Q-Former on vectors of 1024; 8 queries, 8 positions, one layer; the tower's are
    counted in ``tests/parity/test_imagebind_sound.py``.
    """
    transformers = pytest.importorskip("transformers")
    small = transformers.Blip2QFormerConfig(num_hidden_layers=2, cross_attention_frequency=1, encoder_hidden_size=1024)
    branch = of_transformers("Blip2QFormerModel", small) + 8 * 768 + 8 * 1024 + 769 * SOUNDS[name]["hidden_size"]
    vision = record_of(name.removesuffix("-audio")).parameters
    assert vision + branch + 86_235_648 == record_of(name).parameters


MAPPED, SKETCH = "minigpt-5", "minigpt-gated-sketch"


def test_parameters_of_minigpt_5():
    """BLIP-2 with a Llama of eight more rows; the mapper is two linear layers, torch's transformer and 77 vectors."""
    transformers = pytest.importorskip("transformers")
    text_config = VICUNA_7B | {"vocab_size": 32008}
    config = transformers.Blip2Config(vision_config={}, qformer_config={}, text_config=text_config)
    count = of_transformers("Blip2ForConditionalGeneration", config)
    with torch.device("meta"):
        mapper = torch.nn.Transformer(1024, 8, 4, 4, 4096)
    count += sum(p.numel() for p in mapper.parameters()) + 4097 * 1024 + 1025 * 1024 + 77 * 1024
    assert count == record_of(MAPPED).parameters


def test_parameters_of_the_gated_sketch():
    transformers = pytest.importorskip("transformers")
    plain = {key: value for key, value in CLIP_224.items() if key != "model_type"} | {"num_hidden_layers": 23}
    count = of_transformers("CLIPVisionModel", transformers.CLIPVisionConfig(**plain))
    count += of_transformers("Blip2VisionModel", transformers.Blip2VisionConfig())
    count += of_transformers("Blip2QFormerModel", transformers.Blip2QFormerConfig(encoder_hidden_size=1024))
    gate = 1409 * 1024 + 2049 * 1024
    assert count + gate + llama_count(VICUNA_7B) + 32 * 768 + 769 * 4096 == record_of(SKETCH).parameters


IDEFICS = {"idefics-9b": 2, "idefics-9b-instruct": 3, "idefics-80b": 2, "idefics-80b-instruct": 3}
OPENFLAMINGO = {  # class of transformers, its configuration, what it lacks, width of the language model, blocks
    "openflamingo-3b": ("Mpt", {"d_model": 2048, "n_layers": 24, "n_heads": 16}, 24 * 2 * 2048, 2048, 24),
    "openflamingo-4b": (
        "GPTNeoX",
        {
            **{"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240},
            **{"rotary_pct": 1.0, "use_parallel_residual": False},
        },
        0,
        2560,
        16,
    ),
    "openflamingo-9b": ("Mpt", {"d_model": 4096, "n_layers": 32, "n_heads": 32}, 0, 4096, 8),
}


@pytest.mark.parametrize("name", IDEFICS)
def test_parameters_of_idefics_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    large = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 22016}
    config = transformers.IdeficsConfig(
        **(large if "80b" in name else {}),
        additional_vocab_size=IDEFICS[name],
        cross_layer_interval=4,
        qk_layer_norms=True,
        use_resampler=True,
        vision_config={"embed_dim": 1280},
        perceiver_config={"use_resampler": True, "qk_layer_norms_perceiver": True},
    )
    with torch.device("meta"):
        model = transformers.IdeficsForVisionText2Text(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == record_of(name).parameters


@pytest.mark.parametrize("name", OPENFLAMINGO)
def test_parameters_of_openflamingo(name):
    """Tower and language model of transformers, the resampler's published size, and each block by its formula."""
    transformers = pytest.importorskip("transformers")
    kind, values, lacking, dim, blocks = OPENFLAMINGO[name]
    plain = {key: value for key, value in CLIP_224.items() if key != "model_type"}
    with torch.device("meta"):
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**plain))
        language = getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}Config")(vocab_size=50280, **values)
        )
    both = sum(p.numel() for model in (tower, language) for p in model.parameters())
    each = 2 * dim + dim * 512 + 2 * 1024 * 512 + 512 * dim + 2 * dim + 8 * dim * dim + 2
    assert both + lacking + 63_019_008 + blocks * each == record_of(name).parameters


@pytest.mark.parametrize(("name", "lm"), [("llava-1-7b", VICUNA_7B), ("llava-1-13b", VICUNA_13B)])
def test_parameters_of_a_linear_connector(name, lm):
    """transformers has no class with a linear connector: the sum of its tower, its language model and one matrix."""
    transformers = pytest.importorskip("transformers")

    def plain(config):
        return {key: value for key, value in config.items() if key != "model_type"}

    with torch.device("meta"):
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**plain(CLIP_224)))
        language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**plain(lm)))
    expected = sum(p.numel() for model in (tower, language) for p in model.parameters())
    assert expected + (1024 + 1) * lm["hidden_size"] == record_of(name).parameters


def test_every_preset_was_compared():
    bridges = {*BLIP2, *CLIP_L, *STRIPS, *CLIPS, *SOUNDS, MAPPED, SKETCH}
    assert set(NAMES) == {*PUBLISHED, *bridges, *IDEFICS, *OPENFLAMINGO, "llava-1-7b", "llava-1-13b"}


CONNECTORS = {
    "llava-1-7b": 4_198_400,
    "llava-1-13b": 5_248_000,
    "llava-1.5-7b": 20_979_712,
    "llava-1.5-13b": 31_467_520,
    "llava-next-mistral-7b": 20_979_712,
    "llava-onevision-0.5b": 1_836_800,
    "llava-onevision-7b": 16_980_992,
}


@pytest.mark.parametrize(("name", "parameters"), CONNECTORS.items())
def test_published_connector_sizes(name, parameters):
    assert sizes(name)["connectors.image"] == parameters


def test_newline_is_one_vector_and_only_where_it_is_used():
    assert sizes("llava-next-vicuna-7b")["newline"] == 4096
    assert sizes("llava-onevision-72b")["newline"] == 8192
    assert "newline" not in sizes("llava-1.5-7b") and "newline" not in sizes("llava-next-interleave-7b")


# ------------------------------------------------------------------------------------------------------ tokens

TABLE = [  # width, height, LLaVA-1, LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, in the authors' convention
    (640, 480, 256, 576, 2340, 2929),
    (1024, 899, 256, 576, 2634, 6551),
    (1920, 1080, 256, 576, 1948, 7269),
    (672, 672, 256, 576, 2928, 3699),
    (1000, 300, 256, 576, 2182, 2779),
    (500, 375, 256, 576, 2340, 1728),
    (384, 384, 256, 576, 2928, 1485),
    (336, 336, 256, 576, 1176, 1485),
    (320, 240, 256, 576, 1026, 1317),
    (316, 503, 256, 576, 1526, 1905),
    (4000, 3000, 256, 576, 2340, 7309),
]
SYSTEMS = ("llava-1-13b", "llava-1.5-7b", "llava-next-hermes-34b", "llava-onevision-0.5b")


@pytest.mark.parametrize(("width", "height", "expected"), [(w, h, row) for w, h, *row in TABLE])
def test_picture_tokens(width, height, expected):
    assert [count_tokens(preset(name), "image", (width, height)) for name in SYSTEMS] == expected


def test_tokens_of_several_pictures_and_of_clips():
    assert count_tokens(preset("llava-onevision-7b"), "image", (640, 480), of=2) == 730  # padded, one newline
    assert count_tokens(preset("llava-next-vicuna-7b"), "image", (640, 480), of=2) == 2340  # tiled like one alone
    assert count_tokens(preset("llava-next-interleave-7b"), "image", (640, 480), of=5) == 729
    assert count_tokens(preset("llava-next-video-7b"), "video", (640, 480)) == 32 * 144
    assert count_tokens(preset("llava-onevision-7b"), "video", (640, 480)) == 32 * 196 + 1


def test_hd_tokens_by_the_formula():
    """640 x 480 goes into 3 x 2 tiles of 16 x 16 patches; int(640 * 32 / 480) = 42 of the 48 columns stay."""
    assert count_tokens(preset("llava-1.5-hd-13b"), "image", (640, 480)) == 256 + 32 * (42 + 1)


@pytest.mark.parametrize("name", NAMES)
def test_longest_picture_fits_the_language_model(name):
    config = preset(name)
    longest = max(count_tokens(config, kind, (960, 1160)) for kind in config.processing.media)
    lm = config.model.lm
    if lm.type == "hf":  # T5's positions are relative
        reach = lm.config.get("max_position_embeddings", float("inf"))
    else:
        scaling = getattr(lm, "rope_scaling", None)
        reach = lm.max_positions * (scaling.factor if scaling else 1)
    assert longest < config.processing.max_length <= reach


# ------------------------------------------------------------------------------------------------------ conventions

TEMPLATE_OF = {
    "llava-1-7b": "llava_v0",
    "llava-1.5-7b": "vicuna_v1",
    "llava-1.5-hd-13b": "vicuna_v1",
    "llava-next-vicuna-13b": "vicuna_v1",
    "llava-next-mistral-7b": "mistral_instruct",
    "llava-next-hermes-34b": "chatml_direct",
    "llava-next-llama3-8b": "llava_llama_3",
    "llava-next-video-7b": "vicuna_v1",
    "llava-next-interleave-7b": "qwen_1_5",
    "llava-onevision-72b": "qwen_1_5",
    "blip2-opt-6.7b": "blip2_opt",
    "instructblip-vicuna-13b": "instructblip",
    "instructblip-flan-t5-xl": "blip2_t5",
    "blip2-flan-t5-xxl": "blip2_t5",
    "openflamingo-9b": "openflamingo",
    "idefics-80b": "idefics",
    "idefics-9b-instruct": "idefics_instruct",
}


@pytest.mark.parametrize(("name", "template"), TEMPLATE_OF.items())
def test_templates(name, template):
    assert preset(name).processing.template == TEMPLATES[template]


@pytest.mark.parametrize("name", NAMES)
def test_conventions_are_the_authors(name):
    config = preset(name)
    image, tower = config.processing.media["image"], config.model.encoders["image"]
    assert image.size == tower.image_size
    assert image.background == ((127, 127, 127) if image.mean[0] == 0.5 else (122, 116, 104))
    read = (tower.layer, tower.post_norm, tower.select)
    if name in OPENFLAMINGO:
        assert read == (-1, "unused", "patch") and image.fit == "crop" and tower.activation == "quick_gelu"
    elif name in IDEFICS:
        assert read == (-1, "unused", "cls_patch") and image.fit == "squash" and tower.activation == "gelu"
    elif name == SKETCH:  # both towers' patches, so that one grid lies on the other
        assert read == (-1, "applied", "patch") and config.model.encoders["detail"].select == "patch"
    elif tower.depth == 39 or name in CLIP_L:
        assert read == (-1, "applied", "patch" if name in STRIPS else "cls_patch") and image.fit == "squash"
        assert tower.activation == ("quick_gelu" if name in CLIP_L else "gelu")
    else:
        assert read == ((-1, "unused", "patch") if tower.depth == 26 else (-2, "unused", "patch"))
    if image.tiling:
        assert image.tiling.axes == "wh" and config.model.media["image"].merge.rounding == "trunc"


def test_pictures_of_each_system():
    fits = {name: preset(name).processing.media["image"] for name in NAMES}
    assert [fits[n].fit for n in ("llava-1-7b", "llava-1.5-7b", "llava-onevision-7b")] == ["crop", "pad", "squash"]
    assert fits["llava-next-llama3-8b"].tiling.pinpoints == (
        (336, 672),
        (672, 336),
        (672, 672),
        (1008, 336),
        (336, 1008),
    )
    onevision = fits["llava-onevision-7b"]
    assert len(onevision.tiling.pinpoints) == 36 and onevision.several == "pad"
    assert onevision.tiling.pinpoints[:2] == ((384, 384), (384, 768))
    assert len(fits["llava-1.5-hd-13b"].tiling.pinpoints) == 14


# ------------------------------------------------------------------------------------------------------ records


FIRST_RATE = {"LLaVA-1": 2e-3, "Idefics": None, "MiniGPT-v2": None, "MiniGPT-5": 2e-5} | dict.fromkeys(
    (
        "BLIP-2",
        "InstructBLIP",
        "InstructBLIP-Video",
        "OpenFlamingo",
        "MiniGPT-4",
        "Video-LLaMA",
        "gated sketch",
        "Video-LLaMA, both branches",
    ),
    1e-4,
)


@pytest.mark.parametrize("name", NAMES)
def test_records_are_complete(name):
    record = record_of(name)
    config = record.config()
    assert config.provenance.preset == name and config.provenance.licences and config.provenance.paper == record.paper
    assert VLMConfig.parse(json.loads(json.dumps(config.dump()))).hash() == config.hash()
    assert record.system.arxiv is None or f"arXiv:{record.system.arxiv}" in record.paper
    first = FIRST_RATE.get(record.family, 1e-3)
    assert len(record.stages) >= (1 if name in OPENFLAMINGO else 2) and record.stages[0].lr == first
    built = [n for n, _ in build_model(preset(name, tiny=True).model, device="meta").named_parameters()]
    for stage in record.stages:
        assert stage.template in TEMPLATES or " " in stage.template
        for pattern in (*stage.trains, *stage.rates):
            if pattern != "newline" or "newline" in built:
                assert fnmatch.filter(built, pattern), f"{name}: pattern {pattern} of stage {stage.name} names nothing"


def test_presets_differ_from_each_other():
    hashes = {record.function().hash() for record in presets()}
    assert len(hashes) == len(presets())


def test_unknown_preset_says_which_are_near():
    with pytest.raises(RegistryError, match=r"unknown preset 'llava-1\.5-8b'.*'llava-1\.5-7b'"):
        preset("llava-1.5-8b")


def test_a_preset_from_outside_the_package():
    config = preset("chiasm.presets.llava:llava_15_7b", tiny=True)
    assert config.model.lm.vocab == 512


def test_describe_prints_parts_flow_and_tokens():
    words = describe(preset("llava-next-vicuna-7b"))
    for expected in ("7,062,906,880", "1024 to 4096", "[5, 3, 336, 336]", "576 + 36 x (48 + 1) = 2340", "[1, 32000]"):
        assert expected in words


def test_flow_ends_at_the_vocabulary():
    steps = flow(preset("llava-next-video-7b"), "video")
    assert [step.shape for step in steps][:4] == [
        (32, 3, 336, 336),
        (32, 576, 1024),
        (32, 144, 1024),
        (32, 144, 4096),
    ]
    assert steps[-1].shape == (1, 32000)


# ------------------------------------------------------------------------------------------------------ tiny forms

MAY_DIFFER = (
    "model.encoders.*.image_size",
    "model.encoders.*.dim",
    "model.encoders.*.depth",
    "model.encoders.*.heads",
    "model.encoders.*.mlp",
    "model.encoders.*.patch",
    "model.connectors.image.queries",
    "model.connectors.image.dim",
    "model.connectors.image.depth",
    "model.connectors.image.heads",
    "model.connectors.image.mlp",
    "model.connectors.image.head_dim",
    "model.connectors.image.text.vocab",
    "model.connectors.image.frame_queries",
    "model.connectors.image.then.*",
    "model.vokens.*",
    "model.connectors.image.frame.*",
    "model.connectors.image.clip.*",
    "model.blocks.heads",
    "model.blocks.head_dim",
    "model.blocks.mlp",
    "model.placement.every",
    "model.lm.config.vocab_size",
    "model.lm.config.hidden_size",
    "model.lm.config.word_embed_proj_dim",
    "model.lm.config.ffn_dim",
    "model.lm.config.num_hidden_layers",
    "model.lm.config.num_attention_heads",
    "model.lm.config.max_position_embeddings",
    "model.lm.config.d_*",
    "model.lm.config.num_layers",
    "model.lm.config.num_heads",
    "model.lm.vocab",
    "model.lm.dim",
    "model.lm.depth",
    "model.lm.heads",
    "model.lm.kv_heads",
    "model.lm.mlp",
    "processing.media.*.size",
    "processing.media.*.frames",
    *(f"processing.media.audio.{size}" for size in ("clips", "seconds", "bins")),
    *(f"model.encoders.audio.{size}" for size in ("stride", "bins", "frames", "out")),
    *(f"model.connectors.audio.{size}" for size in ("queries", "dim", "heads", "mlp")),
    "processing.media.image.tiling.pinpoints",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Every byte is a token; the control tokens of all templates."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    around = ["<|endofchunk|>", "<fake_token_around_image>", "<end_of_utterance>"]
    turns = [*around, "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    core.add_special_tokens(["<s>", "</s>", "<pad>", "<image>", *turns])
    core.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    made = Tokenizer.from_folder(folder)
    return made.with_instruction(made)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_form_differs_in_size_only(name):
    for key, (full, small) in diff(preset(name), preset(name, tiny=True)).items():
        assert any(fnmatch.fnmatch(key, pattern) for pattern in MAY_DIFFER), f"{key}: {full} became {small}"
    assert sum(row.parameters for row in parts(preset(name, tiny=True))) < 400_000


def test_tiny_sides_keep_parity_and_rest():
    assert [tiny_side(side, 14) for side in (224, 336, 384)] == [16, 24, 30]  # 4, 6 and 7 patches, 2 pixels over


def colours(generator, size):
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Pillow.fromarray(values.numpy())


def talk(*media):
    kinds = [
        m if isinstance(m, dict) else {"type": (kind := "video" if isinstance(m, list) else "image"), kind: m}
        for m in media
    ]
    words = {"type": "text", "text": "What is this?"}
    return [{"role": "user", "content": [*kinds, words]}, {"role": "assistant", "content": "A colour."}]


def tone(hertz):
    """A quarter of a second and a bit, as a part of a message."""
    samples = torch.sin(torch.arange(5000) * (2 * torch.pi * hertz / 16000))
    return {"type": "audio", "audio": samples, "rate": 16000}


def open_gates(model):
    """Gated blocks start shut: nothing behind a gate is seen, and nothing there has a gradient."""
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.7)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_form_runs(name, tokenizer, rng):
    """One picture, none, two, and a clip in one batch: counts hold, an answer depends on its own picture alone."""
    config = preset(name, tiny=True, vocab=tokenizer.vocab_size)
    torch.manual_seed(1)
    model = build_model(config.model).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=rng)
    if name in CLIP_L:  # a small gain before all blocks leaves of a picture what the norm behind them makes of biases
        model.encoders["image"].pre_norm.weight.data.fill_(1.0)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm) and name in SOUNDS):
        norm.weight.data += 1.0  # small gains, one behind the other, leave little of a medium
    open_gates(model)
    check_counts(config.model, unit_shapes(config))
    processor = Processor(config.processing, tokenizer, config.model.count)
    first, second = colours(rng, (31, 17)), colours(rng, (40, 60))
    talks = [talk(first), talk(), talk(first, second)]
    if "video" in config.processing.media:
        talks.append(talk([colours(rng, (20, 20)) for _ in range(6)]))
    if "audio" in config.processing.media:
        talks += [talk(tone(440)), talk(first, tone(300))]
    with torch.no_grad():
        before = [model(processor.batch([t], train=True), logits="labels").logits for t in talks]
        batch = processor.batch(talks, train=True)
        together = model(batch, logits="labels")
        changed = model(processor.batch([talk(second), *talks[1:]], train=True), logits="labels")
    for row, alone in enumerate(before):
        torch.testing.assert_close(together.logits[together.target_rows == row], alone, atol=1e-4, rtol=1e-4)
    assert (changed.logits[changed.target_rows == 0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(changed.logits[changed.target_rows == 1], before[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_tiny_form_learns(name, tokenizer, rng):
    config = preset(name, tiny=True, vocab=tokenizer.vocab_size)
    model = build_model(config.model)
    processor = Processor(config.processing, tokenizer, config.model.count)
    media = [colours(rng, (31, 17)), *([tone(440)] if "audio" in config.processing.media else [])]
    batch = processor.batch([talk(*media)], train=True)
    open_gates(model)
    output = model(batch, logits="labels")
    torch.nn.functional.cross_entropy(output.logits, output.targets).backward()
    idle = {f"encoders.image.{n}" for n in model.encoders["image"].unused()}
    connector = model.connectors["image"]
    idle |= {f"connectors.image.{n}" for n in connector.unused()} if hasattr(connector, "unused") else set()
    idle |= {n for n, _ in model.named_parameters() if n.startswith("mapper.")}  # learns from pictures to be painted
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == idle


# ------------------------------------------------------------------------------------------------------ authors' files

# config.json of the authors' checkpoints; each preset must be what the reader of their layout makes of it.
LLAMA_7B = {
    "model_type": "llava_llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "tokenizer_padding_side": "right",
}
AUTHORS = {
    "llava-1.5-7b": LLAMA_7B | {"image_aspect_ratio": "pad", "tokenizer_model_max_length": 2048},
    "llava-next-vicuna-7b": LLAMA_7B
    | {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "mm_patch_merge_type": "spatial_unpad",
        "tokenizer_model_max_length": 4096,
    },
    "llava-next-mistral-7b": LLAMA_7B
    | {
        "model_type": "llava_mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "mm_patch_merge_type": "spatial_unpad",
        "tokenizer_model_max_length": 4096,
    },
    "llava-onevision-7b": {
        "model_type": "llava_qwen",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_spatial_pool_mode": "bilinear",
        "mm_newline_position": "one_token",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "tokenizer_model_max_length": 32768,
        "tokenizer_padding_side": "right",
    },
}


@pytest.mark.parametrize(("name", "values"), AUTHORS.items())
def test_presets_are_what_the_authors_configurations_say(name, values, tokenizer, tmp_path):
    """The reader of the authors' layout was written apart from the presets: the two must agree on every option."""
    from safetensors.torch import save_file

    from chiasm.presets.checkpoint import Options
    from chiasm.presets.original_llava import OriginalLlava

    tokenizer.save(tmp_path)
    save_file({"model.vision_tower.vision_tower.vision_model.any": torch.zeros(1)}, tmp_path / "model.safetensors")
    ours = preset(name)
    options = Options(template=ours.processing.template)
    read = OriginalLlava().read(tmp_path, values, options).config
    found = {key: pair for key, pair in diff(ours, read).items() if not key.startswith("provenance")}
    heads = ours.model.lm.heads
    same = {"model.lm.kv_heads": (None, heads)}  # two ways of saying that keys are not grouped
    unread = ("processing.media.*placeholder", "processing.media.video.image.several")  # no such token; never tiled
    found = {k: v for k, v in found.items() if v != same.get(k) and not any(fnmatch.fnmatch(k, u) for u in unread)}
    assert not found


def test_describe_a_model_of_other_parts():
    """Parts of transformers and a modality of pictures only: nothing is taken from a name or a type."""
    pytest.importorskip("transformers")
    tower = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "image_size": 24}
    tower |= {"patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
    lm = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 2, "vocab_size": 260}
    config = preset("llava-1.5-7b", tiny=True).edit(
        **{
            "model.encoders.image": {"type": "hf", "config": tower, "layer": -2},
            "model.lm": {"type": "hf", "config": lm},
        }
    )
    words = describe(config)
    assert "encoders.image (hf)" in words and "[1, 260]" in words and "32 to 48" in words


def test_a_tiny_form_with_another_template(tokenizer):
    config = preset("llava-onevision-0.5b", tiny=True, vocab=300).edit(**{"processing.template": "simple"})
    processor = Processor(config.processing, tokenizer, config.model.count)
    assert processor.prompt([{"role": "user", "content": "Hello?"}]) == "Q: Hello?\nA:"
