"""Adapter files exchanged with ``peft``, both ways: LLaVA classes of transformers, and a causal language model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hf_folders import TEXT, make_model, randomise, save_folder, small_tokenizer
from test_llava_hf import conversations, reference

import chiasm
from chiasm.checkpoints.parts import read_part
from chiasm.errors import CheckpointError
from chiasm.train.methods.files import load_adapter, save_adapter
from chiasm.train.methods.lora import change
from chiasm.train.methods.merge import merge
from chiasm.train.plan import apply, prepare, resolve

peft = pytest.importorskip("peft")
BATCH = conversations()["batch"]


def randomised(model: Any, seed: int = 3) -> Any:
    """LoRA matrices and what else is trained: random and not small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name.lower() or p.requires_grad:
                p.copy_(0.15 * torch.randn(p.shape, generator=generator))
    return model.eval()


def with_methods(vlm: Any, table: dict[str, str]) -> Any:
    prepare(vlm.model, table)
    apply(vlm.model, resolve(vlm.model, table, 1e-3))
    randomised(vlm.model)
    return vlm


@pytest.fixture(scope="module", params=["llava", "llava_next", "llava_onevision"])
def llava(request, tmp_path_factory) -> Any:
    """A tiny LLaVA of transformers and its folder."""
    tokenizer = small_tokenizer()
    model = make_model(request.param, tokenizer)
    folder = save_folder(tmp_path_factory.mktemp("peft") / request.param, request.param, model, tokenizer)
    return SimpleNamespace(kind=request.param, model=model, tokenizer=tokenizer, folder=folder)


@torch.no_grad()
def apart(vlm: Any, model: Any, made: Any) -> float:
    """The largest difference of logits at real positions."""
    inputs = reference(made, BATCH)
    batch = vlm.processor.batch(BATCH, add_generation_prompt=True, padding_side="left")
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[real]
    assert expected.std() > 0.3
    return float((vlm.model(batch, logits="all").logits[real] - expected).abs().max())


def test_ours_is_read_by_peft(llava: Any, tmp_path: Path):
    table = {"*": "freeze", "encoders": "lora(r=2, alpha=3)", "connectors": "train"}
    table |= {"lm": "lora(r=4, alpha=8)", "lm.layers.1": "lora(r=3, alpha=8, targets=[q_proj, down_proj])"}
    vlm = with_methods(chiasm.load(llava.folder), table)
    assert apart(vlm, llava.model, llava) > 0.1
    save_adapter(vlm, tmp_path / "adapter", llava.folder)
    assert not (tmp_path / "adapter" / "trained.safetensors").exists()
    read = peft.PeftModel.from_pretrained(copy.deepcopy(llava.model), tmp_path / "adapter").eval()
    assert apart(vlm, read, llava) <= 1e-5
    assert apart(chiasm.load(tmp_path / "adapter"), read, llava) <= 1e-5
    assert apart(vlm, read.merge_and_unload(), llava) <= 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_is_read_by_us(llava: Any, tmp_path: Path, rslora: bool):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        use_rslora=rslora,
        target_modules=["q_proj", "v_proj", "down_proj", "fc1"],
        modules_to_save=["multi_modal_projector"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 9},
    )
    model = peft.get_peft_model(copy.deepcopy(llava.model), config)
    randomised(model)
    model.save_pretrained(tmp_path / "adapter")
    vlm = load_adapter(tmp_path / "adapter", llava.folder)
    assert apart(vlm, llava.model, llava) > 0.1
    assert apart(vlm, model, llava) <= 1e-5
    assert merge(vlm).gap <= 1e-5
    assert apart(vlm, model, llava) <= 1e-5
    vlm.save(tmp_path / "merged")
    assert apart(chiasm.load(tmp_path / "merged"), model, llava) <= 1e-5


def test_qlora_matrices_are_read_by_peft(llava: Any, tmp_path: Path):
    """The files hold the matrices alone: ``peft`` makes of them the change that ours is."""
    vlm = with_methods(chiasm.load(llava.folder), {"*": "freeze", "lm": "qlora(r=2, alpha=4)"})
    save_adapter(vlm, tmp_path / "adapter", llava.folder)
    read = peft.PeftModel.from_pretrained(copy.deepcopy(llava.model), tmp_path / "adapter").eval()
    theirs = read.base_model.model.model.language_model.layers[1].mlp.up_proj.get_delta_weight("default")
    assert torch.allclose(change(vlm.model.lm.layers[1].mlp.up_proj), theirs, atol=1e-6) and theirs.std() > 0.01
    again = chiasm.load(tmp_path / "adapter")
    assert {m.method.type for m in again.config.methods} == {"qlora"}
    assert apart(vlm, read, llava) == apart(again, read, llava) > 1e-3


def causal(tmp_path: Path) -> tuple[Any, Any]:
    """A causal language model of transformers, and ours in a model that no LLaVA class can hold."""
    config = transformers.LlamaConfig(**TEXT)
    theirs = randomise(transformers.LlamaForCausalLM(config))
    theirs.save_pretrained(tmp_path / "lm")
    vit = {"type": "vit", "image_size": 8, "patch": 4, "dim": 16, "depth": 2, "heads": 2, "mlp": 24}
    lm = read_part(tmp_path / "lm", "lm")
    model = {"type": "splice", "encoders": {"image": vit}, "connectors": {"image": {"type": "linear"}}, "lm": lm}
    media = {"image": {"type": "image", "size": 8, "fit": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}}
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    weights = {"lm": str(tmp_path / "lm")}
    values = {"model": model, "processing": {"template": "simple", "media": media}, "weights": weights}
    return theirs, chiasm.build(values, tokenizer=tmp_path / "tokenizer").eval()


@torch.no_grad()
def text_apart(vlm: Any, theirs: Any) -> float:
    ids = torch.randint(10, 400, (2, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9).expand(2, 9)
    lm = vlm.model.lm
    ours = lm.head(lm(lm.embed(ids), positions, torch.ones_like(ids)))
    return float((ours - theirs(input_ids=ids).logits).abs().max())


def test_causal_language_model_both_ways(tmp_path: Path):
    theirs, vlm = causal(tmp_path)
    assert text_apart(vlm, theirs) <= 1e-5
    with_methods(vlm, {"*": "freeze", "lm": "lora(r=3, alpha=5)"})
    save_adapter(vlm, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours").eval()
    assert text_apart(vlm, theirs) > 0.1 and text_apart(vlm, read) <= 1e-5

    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    randomised(model)
    model.save_pretrained(tmp_path / "theirs")
    fresh = causal(tmp_path)[1]
    assert text_apart(load_adapter(tmp_path / "theirs", fresh), model) <= 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_other_adapters_are_refused(llava: Any, tmp_path: Path, change: dict[str, Any], words: str):
    model = peft.get_peft_model(copy.deepcopy(llava.model), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        load_adapter(tmp_path, llava.folder)
