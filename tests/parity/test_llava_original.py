"""Folders in the layout of LLaVA's authors, against transformers' models with the same tensors.

The folders are made here from tiny random models of transformers by the table of names in the reference notes; what
LLaVA does differently (axes, padding, prompts) is checked against numbers and strings, not against this package.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hf_folders import PINPOINTS, make_model, photo, small_tokenizer
from safetensors.torch import save_file

import chiasm
from chiasm.errors import CheckpointError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def original_names(model: Any) -> dict[str, torch.Tensor]:
    """Names as LLaVA's own code saves them."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        for old, new in (
            ("model.language_model.", "model."),
            ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
            ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        renamed[name] = tensor.clone()
    return renamed


def write(folder: Path, model: Any, tokenizer: Any, tower_inside: bool = True, **keys: Any) -> SimpleNamespace:
    """The folder of a checkpoint, and beside it one of the tower it names."""
    folder.mkdir(parents=True)
    text, tensors = model.config.text_config, original_names(model)
    inside = {k: v for k, v in tensors.items() if tower_inside or "vision_tower" not in k}
    save_file(inside, folder / "model.safetensors")
    rope = text.rope_parameters["rope_theta"]
    values = {k: v for k, v in text.to_dict().items() if k not in ("rope_parameters", "architectures")}
    values |= {"model_type": "llava_llama", "rope_theta": rope, "mm_vision_tower": "somebody/a-tower"}
    values |= {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 16, "mm_vision_select_layer": -2}
    values |= {"mm_vision_select_feature": "patch", "tokenizer_model_max_length": 2048}
    (folder / "config.json").write_text(json.dumps(values | keys))
    tokenizer.save_pretrained(folder)
    tower = folder.parent / (folder.name + " tower")
    vision = transformers.CLIPVisionModel(model.config.vision_config)
    vision.load_state_dict(model.model.vision_tower.state_dict())
    vision.save_pretrained(tower)
    return SimpleNamespace(folder=folder, tower=tower)


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


def picture(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = small_tokenizer()
    made.chat_template = None
    return made


@pytest.mark.parametrize("inside", [True, False], ids=["tower inside", "tower beside"])
def test_llava_15(tmp_path: Path, tokenizer: Any, inside: bool):
    model = make_model("llava", tokenizer)
    at = write(tmp_path / "x", model, tokenizer, inside, image_aspect_ratio="pad")
    vlm = chiasm.load(at.folder, vision_tower=at.tower, template={"type": "turns", **plain_vicuna()})
    image = photo(61, 37, 1)
    batch = vlm.processor.batch([[user(picture(image), "What is it?")]], add_generation_prompt=True)
    pixels = transformers.LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.media["image"].inputs, pixels)
    ids = batch.input_ids.clone().view(-1)
    assert len(batch.media["image"].slots) == 16
    ids[batch.media["image"].slots] = model.config.image_token_index
    with torch.no_grad():
        expected = model(input_ids=ids.view_as(batch.input_ids), pixel_values=pixels).logits
        found = vlm.model(batch, logits="all").logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def plain_vicuna() -> dict[str, Any]:
    return {
        "system": SYSTEM,
        "system_turn": {"suffix": " "},
        "user_turn": {"prefix": "USER: ", "suffix": " "},
        "answer": {"prompt": "ASSISTANT:", "lead": " ", "end": "{eos}"},
    }


def test_llava_next_with_its_own_conventions(tmp_path: Path, tokenizer: Any):
    """A picture whose best resolution does not depend on the order of the axes: equal to transformers."""
    model = make_model("llava_next", tokenizer)
    swapped = [[b, a] for a, b in PINPOINTS]
    keys = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": swapped}
    at = write(tmp_path / "x", model, tokenizer, **keys)
    vlm = chiasm.load(at.folder, vision_tower=at.tower)
    tiling = vlm.config.processing.media["image"].tiling
    assert tiling.axes == "wh" and [list(p) for p in tiling.pinpoints] == swapped
    assert vlm.config.model.media["image"].merge.rounding == "trunc"
    image = photo(100, 35, 2)
    batch = vlm.processor.batch([[user(picture(image), "What is it?")]], add_generation_prompt=True)
    reference = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
    )([image], return_tensors="pt")
    assert torch.equal(batch.media["image"].inputs, reference["pixel_values"][0])
    ids = batch.input_ids.clone().view(-1)
    ids[batch.media["image"].slots] = model.config.image_token_index
    with torch.no_grad():
        expected = model(input_ids=ids.view_as(batch.input_ids), **reference).logits
        found = vlm.model(batch, logits="all").logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_ties_go_to_the_first_in_its_own_axes(tmp_path: Path, tokenizer: Any):
    """The same literal list: portrait for LLaVA, landscape for transformers, where a small picture fits both alike."""
    model = make_model("llava_next", tokenizer)
    keys = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    at = write(tmp_path / "x", model, tokenizer, **keys)
    vlm = chiasm.load(at.folder, vision_tower=at.tower)
    sample = vlm.processor([user(picture(photo(20, 20)), "?")])
    assert sample.media[0].layout.grid == (2, 1)  # (rows, columns): pinpoint (28, 56) is (width, height)


def test_a_tower_that_is_nowhere_is_asked_for(tmp_path: Path, tokenizer: Any):
    model = make_model("llava", tokenizer)
    at = write(tmp_path / "x", model, tokenizer, tower_inside=False)
    with pytest.raises(CheckpointError, match=r"'somebody/a-tower' is none of the known ones.*vision_tower=FOLDER"):
        chiasm.load(at.folder)
    at = write(
        tmp_path / "y", model, tokenizer, False, mm_vision_tower="openai/clip-vit-large-patch14", mm_hidden_size=1024
    )
    with pytest.raises(CheckpointError, match="does not hold the weights of its tower 'openai/clip-vit-large-patch14'"):
        chiasm.load(at.folder)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mm_projector_type": "pooler"}, "mm_projector_type 'pooler' is not supported"),
        ({"mm_patch_merge_type": "spatial_unpadd"}, "did you mean 'spatial_unpad'"),
        ({"image_aspect_ratio": "crop_split"}, "image_aspect_ratio 'crop_split' is not supported"),
        ({"mm_hidden_size": 17}, "mm_hidden_size is 17, but the tower 'somebody/a-tower' has width 16"),
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt' is not supported"),
        ({"mm_projector_type": "mlp3x_gelu"}, r"not in the file: 'mm_projector.4.bias'"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path: Path, tokenizer: Any, keys: dict[str, Any], message: str):
    at = write(tmp_path / "x", make_model("llava", tokenizer), tokenizer, **keys)
    with pytest.raises(CheckpointError, match=message):
        chiasm.load(at.folder, vision_tower=at.tower)


def test_export_names_what_transformers_cannot_hold(tmp_path: Path, tokenizer: Any):
    model = make_model("llava_next", tokenizer)
    tensors = {"mm_projector_type": "linear", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    at = write(tmp_path / "x", model, tokenizer, image_aspect_ratio="anyres", **tensors)
    from safetensors.torch import load_file

    state = load_file(at.folder / "model.safetensors")
    for name in ("weight", "bias"):
        state[f"model.mm_projector.{name}"] = state.pop(f"model.mm_projector.0.{name}")
        state.pop(f"model.mm_projector.2.{name}")
    save_file(state, at.folder / "model.safetensors")
    vlm = chiasm.load(at.folder, vision_tower=at.tower)
    with pytest.raises(CheckpointError, match="no class of transformers has a counterpart of connector 'linear'"):
        vlm.export(tmp_path / "out")
    at = write(
        tmp_path / "y", model, tokenizer, image_aspect_ratio="anyres", **{**tensors, "mm_projector_type": "mlp2x_gelu"}
    )
    vlm = chiasm.load(at.folder, vision_tower=at.tower)
    with pytest.raises(CheckpointError, match="rounding='trunc' has no counterpart"):
        vlm.export(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no export to 'gguf'"):
        vlm.export(tmp_path / "out", format="gguf")


def test_onevision_layout(tmp_path: Path, tokenizer: Any):
    """SigLIP: the last block of the tower's own folder is deleted, the state before the last norm is read."""
    model = make_model("llava_onevision", tokenizer)
    folder, tower = tmp_path / "x", tmp_path / "tower"
    keys = {"image_aspect_ratio": "anyres_max_4", "mm_patch_merge_type": "spatial_unpad"}
    keys |= {"image_grid_pinpoints": "(1x1),...,(4x4)", "model_type": "llava_qwen", "mm_newline_position": "one_token"}
    folder_at = write_onevision(folder, tower, model, tokenizer, keys)
    vlm = chiasm.load(folder_at, vision_tower=tower)
    assert vlm.config.model.encoders["image"].depth == 3 and vlm.config.model.lm.qkv_bias
    assert vlm.config.processing.template.dump()["answer"]["prompt"] == "<|im_start|>assistant\n"
    image = photo(61, 37, 3)
    batch = vlm.processor.batch([[user(picture(image), "What is it?")]], add_generation_prompt=True)
    from hf_folders import image_processor

    reference = dict(image_processor("llava_onevision")([[image]], return_tensors="pt"))
    assert torch.equal(batch.media["image"].inputs, reference["pixel_values"][0])
    ids = batch.input_ids.clone().view(-1)
    ids[batch.media["image"].slots] = model.config.image_token_index
    with torch.no_grad():
        expected = model(input_ids=ids.view_as(batch.input_ids), **reference).logits
        found = vlm.model(batch, logits="all").logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def write_onevision(folder: Path, tower: Path, model: Any, tokenizer: Any, keys: dict[str, Any]) -> Path:
    folder.mkdir()
    text = model.config.text_config
    save_file(original_names(model), folder / "model.safetensors")
    values = {k: v for k, v in text.to_dict().items() if k not in ("rope_parameters", "architectures")}
    values |= {"rope_theta": 10000.0, "mm_vision_tower": "somebody/siglip", "mm_projector_type": "mlp2x_gelu"}
    (folder / "config.json").write_text(json.dumps(values | {"mm_vision_select_layer": -2} | keys))
    tokenizer.save_pretrained(folder)
    config = transformers.SiglipVisionConfig(**{**model.config.vision_config.to_dict(), "num_hidden_layers": 4})
    transformers.SiglipVisionModel(config).save_pretrained(tower)
    return folder
