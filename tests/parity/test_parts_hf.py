"""Towers and language models alone, as transformers saves them, read into parts of ours; and back, bit by bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hf_folders import CLASSES, TEXT, VISION, photo, randomise, save_folder, small_tokenizer
from safetensors.torch import load_file
from test_llava_hf import conversations, reference

import chiasm
from chiasm.checkpoints.parts import read_part
from chiasm.convert import maps
from chiasm.convert.engine import export_tensors, load_weights
from chiasm.convert.io import Loaded
from chiasm.errors import CheckpointError
from chiasm.lm.decoder import Decoder
from chiasm.model_config import VLMConfig
from chiasm.presets.hf_parts import read_lm, read_tower, write_lm, write_tower

SMALL_LM = {"type": "decoder", "vocab": 32, "dim": 16, "depth": 1, "heads": 2, "mlp": 16, "max_positions": 64}
SMALL_VIT = {"type": "vit", "image_size": 16, "patch": 8, "dim": 16, "depth": 1, "heads": 2, "mlp": 16}


def compose(tower: Any = SMALL_VIT, lm: Any = SMALL_LM) -> chiasm.VLM:
    model = {
        "type": "splice",
        "encoders": {"image": tower},
        "connectors": {"image": {"type": "linear"}},
        "lm": lm,
        "media": {"image": {"merge": {"type": "flat"}}},
    }
    config = VLMConfig.parse({"model": model, "processing": {"template": "simple"}})
    return chiasm.build(config).eval()


TEXT_SIDE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
TOWERS: dict[str, Any] = {
    "clip vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
    "clip whole": lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT_SIDE, vision_config=VISION)),
    "siglip vision": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
    "siglip whole": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(text_config=TEXT_SIDE, vision_config=VISION)
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)),
    "vit classifier": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VISION)),
}


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("name", list(TOWERS))
def test_towers(tmp_path: Path, name: str, layer: int):
    theirs = randomise(TOWERS[name]())
    theirs.save_pretrained(tmp_path / "t")
    config = read_part(tmp_path / "t", "encoders.image", layer=layer)
    vlm = compose(tower=config).load_part("encoders.image", tmp_path / "t")
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    inner = theirs.vision_model if "whole" in name else theirs.vit if "classifier" in name else theirs
    with torch.no_grad():
        expected = inner(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
        found = vlm.model.encoders["image"](pixels).x
    torch.testing.assert_close(found, expected[:, expected.shape[1] - found.shape[1] :], atol=1e-5, rtol=0)
    if name == "dinov2":
        return
    _, rules = write_tower(config)
    state = {k.removeprefix("encoders.image."): v for k, v in vlm.state_dict().items() if k.startswith("encoders.")}
    on_disk = load_file(tmp_path / "t" / "model.safetensors")
    back = export_tensors(state, rules)
    for tensor_name, tensor in back.items():
        at = tensor_name if tensor_name in on_disk else tensor_name.removeprefix("vision_model.")
        at = at if at in on_disk else "vit." + at
        assert torch.equal(on_disk[at], tensor), tensor_name
    assert len(back) == len(state)


def test_a_tower_without_its_last_block(tmp_path: Path):
    """OneVision's tower is SigLIP less one block; the spare block is dropped, nothing else."""
    theirs = randomise(TOWERS["siglip vision"]())
    theirs.save_pretrained(tmp_path / "t")
    config = read_part(tmp_path / "t", "encoders.image")
    shorter = compose(tower=config.edit(depth=2)).load_part("encoders.image", tmp_path / "t")
    whole = compose(tower=config.edit(layer=-2)).load_part("encoders.image", tmp_path / "t")
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(shorter.model.encoders["image"](pixels).x, whole.model.encoders["image"](pixels).x)
    history = shorter.config.provenance.history
    assert any("16 tensors left out" in line and "after the 2 blocks that this model has" in line for line in history)
    assert any("pooling or projection head" in line for line in history)
    with pytest.raises(CheckpointError, match=r"encoders.image: .*depth is 4 here, 3 there"):
        compose(tower=config.edit(depth=4)).load_part("encoders.image", tmp_path / "t")
    with pytest.raises(CheckpointError, match=r"activation is 'quick_gelu' here, 'gelu_tanh' there"):
        compose(tower=config.edit(activation="quick_gelu")).load_part("encoders.image", tmp_path / "t")


LMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3 rope": {
        "model_type": "llama",
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        },
    },
    "llama linear rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "phi3": {
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "olmo2": {},
    "gemma": {"head_dim": 16},
}


@pytest.mark.parametrize("name", list(LMS))
def test_language_models(tmp_path: Path, name: str):
    kind = LMS[name].get("model_type", name)
    values = {**TEXT, "bos_token_id": 0, "eos_token_id": 1, **LMS[name]}
    values.pop("model_type", None)
    theirs = randomise(transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values)))
    theirs.save_pretrained(tmp_path / "t", max_shard_size="20KB")
    assert len(list((tmp_path / "t").glob("*.safetensors"))) > 1
    vlm = compose(lm=read_part(tmp_path / "t", "lm")).load_part("lm", tmp_path / "t")
    assert (vlm.config.model.lm.type == "decoder") == (kind not in ("olmo2", "gemma"))
    ids = torch.randint(4, 400, (2, 17), generator=torch.Generator().manual_seed(1))
    ones, positions = torch.ones_like(ids), torch.arange(17).expand(2, -1)
    with torch.no_grad():
        expected = theirs(ids).logits
        found = vlm.model.lm.head(vlm.model.lm(vlm.model.lm.embed(ids), positions, ones))
    scale = max(1.0, float(expected.abs().max()) / 10)
    torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=0)
    written, rules = write_lm(vlm.config.model.lm)
    state = {k.removeprefix("lm."): v for k, v in vlm.state_dict().items() if k.startswith("lm.")}
    back = export_tensors(state, rules)
    on_disk: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "t").glob("*.safetensors"):
        on_disk |= load_file(file)
    assert on_disk.keys() <= back.keys() and back.keys() - on_disk.keys() <= {"lm_head.weight"}
    assert all(torch.equal(tensor, back[key]) for key, tensor in on_disk.items())
    again = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(written.pop("model_type"), **written)
    )
    again.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, expected, atol=1e-5 * scale, rtol=0)


def test_internlm2_is_ungrouped(rng: torch.Generator):
    """InternLM2 keeps, for each key head, its queries, the key and the value under one another: by its own formula."""
    part = read_lm(
        {
            **{"model_type": "internlm2", "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2},
            **{"num_hidden_layers": 1, "intermediate_size": 24, "vocab_size": 40, "bias": False},
        }
    )
    assert isinstance(part.config, Decoder.Config)
    lm = Decoder(part.config)
    q, k, v = (torch.randn(n * 4, 32, generator=rng) for n in (8, 2, 2))
    rows = []
    for group in range(2):
        rows += [q[group * 16 : group * 16 + 16], k[group * 4 : group * 4 + 4], v[group * 4 : group * 4 + 4]]
    ours = lm.state_dict() | {f"layers.0.attn.{n}_proj.weight": x for n, x in zip("qkv", (q, k, v), strict=True)}
    theirs = export_tensors(ours, part.rules)
    assert torch.equal(theirs["model.layers.0.attention.wqkv.weight"], torch.cat(rows))
    assert {"model.tok_embeddings.weight", "output.weight", "model.layers.0.feed_forward.w3.weight"} <= theirs.keys()
    load_weights(lm, Loaded("memory", theirs), part.rules)
    assert all(torch.equal(lm.state_dict()[name], tensor) for name, tensor in ours.items())


def test_old_tables_of_angles_are_dropped():
    lm = Decoder(Decoder.Config.parse(SMALL_LM))
    state = export_tensors(lm.state_dict(), maps.llama())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    plan = load_weights(lm, Loaded("memory", state), maps.llama())
    assert list(plan.dropped) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


OTHERS = {
    "olmo2 inside": ({"model_type": "olmo2"}, {}),
    "gemma inside": ({"model_type": "gemma", "head_dim": 16}, {}),
    "dinov2 inside": ({}, {"model_type": "dinov2"}),
    "vit inside": ({}, {"model_type": "vit"}),
}


@pytest.mark.parametrize("layout", ["saved", "v5"])
@pytest.mark.parametrize("name", list(OTHERS))
def test_other_models_of_transformers_inside_llava(tmp_path: Path, name: str, layout: str):
    """What our own parts do not express comes in through the ``hf`` parts."""
    tokenizer = small_tokenizer()
    text, vision = OTHERS[name]
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT, **ends, **text},
        vision_config={"model_type": "clip_vision_model", **VISION, **vision},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = randomise(getattr(transformers, CLASSES["llava"] + "ForConditionalGeneration")(config))
    folder = save_folder(tmp_path / "x", "llava", model, tokenizer, layout)
    made = SimpleNamespace(kind="llava", model=model, tokenizer=tokenizer, folder=folder)
    vlm = chiasm.load(folder)
    batch = conversations()["batch"]
    theirs = reference(made, batch)
    ours = vlm.processor.batch(batch, add_generation_prompt=True, padding_side="left")
    real = theirs["attention_mask"].bool()
    # By itself transformers counts positions from the padding on. Rotary angles then round differently, which Gemma
    # amplifies beyond the tolerance; counted from the first token they are the same.
    theirs["position_ids"] = (theirs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected, found = model(**theirs).logits[real], vlm.model(ours, logits="all").logits[real]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    again = chiasm.load(vlm.save(tmp_path / "own"))
    assert torch.equal(again.model(ours, logits="all").logits[real], found)
    vlm.export(tmp_path / "out")
    exported = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(exported(**theirs).logits[real], expected, atol=1e-5, rtol=0)


def test_a_siglip_tower_read_by_default_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="has no class vector: it would drop a patch"):
        tokenizer = small_tokenizer()
        from hf_folders import make_model

        model = make_model("llava_onevision", tokenizer, vision_feature_select_strategy="default")
        chiasm.load(save_folder(tmp_path / "x", "llava_onevision", model, tokenizer))


def test_pictures_reach_the_tower(tmp_path: Path):
    """A part read from a folder is really used: other tower weights give other answers."""
    outputs = []
    for seed in (0, 1):
        theirs = randomise(TOWERS["clip vision"](), seed)
        theirs.save_pretrained(tmp_path / str(seed))
        tower = read_tower(transformers.CLIPVisionConfig(**VISION).to_dict()).config
        vlm = compose(tower=tower).load_part("encoders.image", tmp_path / str(seed))
        pixels = torch.from_numpy(__import__("numpy").array(photo(28, 28))).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            outputs.append(vlm.model.encoders["image"](pixels).x)
    assert (outputs[0] - outputs[1]).abs().max() > 0.1
