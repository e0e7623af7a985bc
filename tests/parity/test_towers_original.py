"""CLIP folders of OpenAI and of open_clip: sizes, weights, pixels, cleaning, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from towers_kit import Held
from weights import lively

import chiasm
from chiasm.compose import build_model
from chiasm.convert import maps_towers
from chiasm.convert.engine import export_tensors
from chiasm.convert.rules import AnyRule
from chiasm.errors import CheckpointError
from chiasm.fusion.dual_tower import DualTower
from chiasm.presets import original_clip

pytestmark = pytest.mark.data
WORDS = {"type": "text", "vocab": 49408, "dim": 64, "depth": 1, "heads": 1, "mlp": 256, "positions": 77}
VIT = {
    "type": "vit", "image_size": 32, "patch": 8, "dim": 128, "depth": 2, "heads": 2, "mlp": 512, "norm_eps": 1e-5,
    "activation": "quick_gelu", "patch_bias": False, "pre_norm": True, "select": "cls",
}  # fmt: skip
RESNET = {"type": "resnet", "image_size": 64, "blocks": [1, 2, 1, 1], "width": 8}
MARKS = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}


def network(tower: dict[str, Any], pool: dict[str, Any], **text: Any) -> Any:
    config = {
        "dim": 24,
        "encoders": {"image": tower, "text": {**WORDS, **text}},
        "connectors": {"image": pool, "text": {"type": "pooled", "pool": "last"}},
    }
    return lively(build_model(DualTower.Config.parse(config)))


def write(folder: Path, model: Any, rules: list[AnyRule], shared: Path, marks: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = export_tensors(model.state_dict(), rules)
    if marks:
        state |= {name: torch.tensor(value) for name, value in MARKS.items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, str(folder / "model.safetensors"))
    shutil.copy(shared / "weights/tokenizers/clip/bpe_simple_vocab_16e6.txt.gz", folder)


CASES = {
    "vit": (VIT, {"type": "pooled"}, maps_towers.clip_openai),
    "resnet": (RESNET, {"type": "clip_pool", "grid": [2, 2], "heads": 4}, maps_towers.clip_openai_resnet),
}


@pytest.mark.parametrize("name", CASES)
def test_openai(name: str, shared_data: Path, tmp_path: Path):
    """Every size is read from the tensors, as ``build_model`` does; the three integers are left out."""
    tower, pool, rules = CASES[name]
    model = network(tower, pool)
    write(tmp_path / "openai", model, rules(), shared_data)
    vlm = chiasm.load(tmp_path / "openai")
    assert vlm.config.model == model.config
    state = vlm.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert vlm.tokenizer.suffix == [49407] and vlm.config.processing.template.clean == "clip"
    assert vlm.config.processing.media["image"].crop_rounding == "round"
    shown = [Image.new("RGB", (40, 70), color) for color in ("red", "green")]
    assert vlm.classify(images=shown, labels=["cat", "dog"]).shape == (2, 2)
    if name == "vit":
        vlm.export(tmp_path / "out", format="openai_clip")
        written, given = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "openai"))
        assert written.keys() == given.keys() and all(torch.equal(written[key], given[key]) for key in given)


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip(quick: bool, shared_data: Path, tmp_path: Path):
    model = network(VIT | {"activation": "quick_gelu" if quick else "gelu"}, {"type": "pooled"},
                    activation="quick_gelu" if quick else "gelu")  # fmt: skip
    write(tmp_path, model, maps_towers.clip_openai(), shared_data, marks=False)
    vision = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    table: dict[str, Any] = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash", "interpolation": "bilinear"},
    }
    if quick:
        table["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(table))
    vlm = chiasm.load(tmp_path)
    assert vlm.config.model == model.config
    image = vlm.config.processing.media["image"]
    assert (image.fit, image.resample, image.mean, image.std) == ("squash", "bilinear", (0.5,) * 3, (0.25,) * 3)
    vlm.export(tmp_path / "out", format="open_clip")
    told = json.loads((tmp_path / "out/open_clip_config.json").read_text())
    assert original_clip.configured(told["model_cfg"], "") == original_clip.configured(table["model_cfg"], "")
    assert {k: told["preprocess_cfg"][k] for k in table["preprocess_cfg"]} == table["preprocess_cfg"]
    written, given = load_file(tmp_path / "out/open_clip_model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert written.keys() == given.keys() and all(torch.equal(written[key], given[key]) for key in given)
    if not quick:
        with pytest.raises(CheckpointError, match=r"activation is 'gelu', 'quick_gelu' there"):
            vlm.export(tmp_path / "no", format="openai_clip")
    table["model_cfg"]["vision_cfg"]["qk_norm"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="qk_norm"):
        chiasm.load(tmp_path)


def test_published_sizes_of_open_clip():
    """H/14, g/14, bigG/14: heads of 80, 88 and 104, where OpenAI's rule of 64 would be wrong."""
    for vision, text, expected in (
        ({"layers": 32, "width": 1280, "head_width": 80}, {"width": 1024, "heads": 16, "layers": 24}, (16, 5120)),
        ({"layers": 40, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637},
         {"width": 1024, "heads": 16, "layers": 24}, (16, 6144)),
        ({"layers": 48, "width": 1664, "head_width": 104, "mlp_ratio": 4.9231},
         {"width": 1280, "heads": 20, "layers": 32}, (16, 8192)),
    ):  # fmt: skip
        c = {"embed_dim": 1024, "vision_cfg": {"patch_size": 14, **vision}, "text_cfg": text}
        found = original_clip.configured(c, "x")
        tower = found["encoders"]["image"]
        model = DualTower.Config.parse({k: v for k, v in found.items() if k != "image_size"})
        assert original_clip.configured(original_clip.written(model), "x") == found
        assert (tower["heads"], tower["mlp"], tower["activation"]) == (*expected, "gelu")


def test_a_bare_file_that_may_be_either_is_refused(shared_data: Path, tmp_path: Path):
    write(tmp_path, network(VIT, {"type": "pooled"}), maps_towers.clip_openai(), shared_data, marks=False)
    with pytest.raises(CheckpointError, match="which GELU"):
        chiasm.load(tmp_path)


def test_a_program_is_not_run(tmp_path: Path):
    class Net(torch.nn.Linear):
        pass

    torch.jit.save(torch.jit.trace(Net(2, 2), torch.zeros(1, 2)), str(tmp_path / "ViT-B-32.pt"))
    for place in (tmp_path, tmp_path / "ViT-B-32.pt"):
        with pytest.raises(CheckpointError, match=r"TorchScript archive.*model\.safetensors"):
            chiasm.load(place, allow_pickle=True)


def test_a_missing_tensor_is_named(shared_data: Path, tmp_path: Path):
    write(tmp_path, network(VIT, {"type": "pooled"}), maps_towers.clip_openai(), shared_data)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual.proj"]
    save_file(state, str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"visual\.proj"):
        chiasm.load(tmp_path)


def test_shapes_alone_tell_the_sizes():
    """ViT-B/32 as published, without memory."""
    config = {
        "dim": 512,
        "encoders": {
            "image": {**VIT, "image_size": 224, "patch": 32, "dim": 768, "depth": 12, "heads": 12, "mlp": 3072},
            "text": {**WORDS, "dim": 512, "depth": 12, "heads": 8, "mlp": 2048},
        },
        "connectors": {"image": {"type": "pooled"}, "text": {"type": "pooled", "pool": "last"}},
    }
    model = build_model(DualTower.Config.parse(config), device="meta")
    assert sum(p.numel() for p in model.parameters()) == 151_277_313
    found = original_clip.inferred(Held(export_tensors(model.state_dict(), maps_towers.clip_openai())))
    found.pop("image_size")
    assert DualTower.Config.parse(found) == model.config
