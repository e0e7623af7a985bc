"""Checkpoints are strict and self-describing: what does not fit is refused by name, all of it in one error."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import CONFIG, change, messages

import chiasm
import chiasm.model_config
from chiasm.convert.io import replaced_folder
from chiasm.errors import CheckpointError, ConfigError, FingerprintError

# ----------------------------------------------------------------------------------------------------------- our folder


def test_a_folder_says_everything_about_itself(saved: Path, tmp_path: Path):
    """Loaded in a new process, from a folder of another name: the same numbers."""
    vlm = chiasm.load(saved)
    batch = vlm.processor.batch([messages()], add_generation_prompt=True)
    logits = vlm.model(batch, logits="last").logits
    moved = shutil.copytree(saved, tmp_path / "qwen-lora-siglip llama 7")  # a name that means nothing
    script = (
        "import sys, torch, chiasm\nfrom PIL import Image\n"
        "vlm = chiasm.load(sys.argv[1])\n"
        "picture = Image.linear_gradient('L').convert('RGB').resize((20, 30))\n"
        "parts = [{'type': 'image', 'image': picture}, {'type': 'text', 'text': 'What is it?'}]\n"
        "m = [{'role': 'user', 'content': parts}]\n"
        "b = vlm.processor.batch([m], add_generation_prompt=True)\n"
        "torch.save(vlm.model(b, logits='last').logits, sys.argv[2])\n"
    )
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", script, str(moved), str(out)], check=True)
    assert torch.equal(torch.load(out, weights_only=True), logits)
    assert sorted(p.name for p in saved.iterdir()) == [
        "config.json",
        "fingerprint.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_licences_and_history_are_carried(saved: Path, tmp_path: Path):
    vlm = chiasm.load(saved)
    assert vlm.config.provenance.licences == {"data": "CC BY 4.0"}
    again = chiasm.load(vlm.save(tmp_path / "again"))
    assert again.config.provenance == vlm.config.provenance


def test_no_socket_is_opened(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert chiasm.load(saved).num_parameters() > 0


def test_types_and_devices(saved: Path):
    assert chiasm.load(saved).dtype == torch.float32
    vlm = chiasm.load(saved, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}
    vlm.generate(messages(), max_new_tokens=2)
    with pytest.raises(ConfigError, match="unknown dtype 'flaot16'"):
        chiasm.load(saved, dtype="flaot16")


def test_a_value_beyond_a_narrower_type_is_refused(copy: Path):
    change(copy, lambda t: t["lm.norm.weight"].fill_(1e20))
    with pytest.raises(CheckpointError, match=r"'lm.norm.weight' does not fit into torch.float16.*1e\+20"):
        chiasm.load(copy, dtype="float16")


def test_training_what_was_loaded_leaves_the_file_alone(copy: Path):
    before = (copy / "model.safetensors").read_bytes()
    vlm = chiasm.load(copy)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.add_(1.0)
    assert (copy / "model.safetensors").read_bytes() == before
    assert not torch.equal(chiasm.load(copy).state_dict()["lm.norm.weight"], vlm.state_dict()["lm.norm.weight"])
    assert all(p.requires_grad for p in vlm.parameters())


# ------------------------------------------------------------------------------------------------------- strict tensors


def rename_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm.layers.1.mlp.up_proj.weights"] = tensors.pop("lm.layers.1.mlp.up_proj.weight")


FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "deleted": (
        lambda t: t.pop("lm.norm.weight"),
        r"1 tensors of the model are not in the file: 'lm.norm.weight' \[16\]",
    ),
    "renamed": (
        rename_one,
        r"'lm.layers.1.mlp.up_proj.weights' \[24, 16\].*not in the file: 'lm.layers.1.mlp.up_proj.weight'",
    ),
    "extra": (
        lambda t: t.update(spare=torch.ones(3)),
        r"1 tensors of the file have no place in the model: 'spare' \[3\]",
    ),
    "mis-shaped": (
        lambda t: t.update({"lm.norm.weight": torch.ones(17)}),
        r"'lm.norm.weight' is \[17\] in the file, \[16\] in the model",
    ),
    "nan": (
        lambda t: t["encoders.image.positions"].view(-1)[3:5].fill_(float("nan")),
        r"'encoders.image.positions' holds 2 .*NaN",
    ),
    "infinite": (lambda t: t["lm.norm.weight"][0:1].fill_(float("inf")), r"'lm.norm.weight' holds 1 values"),
    "integers": (lambda t: t.update({"lm.norm.weight": torch.ones(16, dtype=torch.int32)}), "torch.int32 in the file"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_tensor_that_does_not_fit_is_named(copy: Path, fault: str):
    how, message = FAULTS[fault]
    change(copy, how)
    with pytest.raises(CheckpointError, match=message):
        chiasm.load(copy)


def test_all_faults_come_in_one_error(copy: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors)[:6]:
            del tensors[name]
        tensors.update(spare=torch.ones(3), odd=torch.ones(2))
        tensors["lm.norm.weight"] = torch.ones(4)

    change(copy, spoil)
    with pytest.raises(CheckpointError) as caught:
        chiasm.load(copy)
    text = str(caught.value)
    assert "2 tensors of the file have no place" in text and "6 tensors of the model are not in the file" in text
    assert "and 2 more" in text and "1 tensors have another shape" in text and str(copy) in text


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_truncated_files_are_refused(copy: Path, size: int):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model.safetensors: no whole safetensors file"):
        chiasm.load(copy)


def test_missing_files_are_named(copy: Path):
    (copy / "fingerprint.json").rename(copy / "kept.json")
    with pytest.raises(FingerprintError, match=r"fingerprint.json is missing"):
        chiasm.load(copy)
    (copy / "kept.json").rename(copy / "fingerprint.json")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        chiasm.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        chiasm.load(copy)


def test_folders_that_are_none(tmp_path: Path, saved: Path):
    with pytest.raises(CheckpointError, match=r"there is no folder 'no/such/folder'"):
        chiasm.load("no/such/folder")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        chiasm.load(saved / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"no reader knows this config.json \(model_type 'llama'.*load_part"):
        chiasm.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        chiasm.load(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "chiasm/99"}')
    with pytest.raises(CheckpointError, match="format 'chiasm/99', this version of chiasm reads 'chiasm/1'"):
        chiasm.load(tmp_path)


def test_a_hub_name_without_a_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import huggingface_hub

    def fail(*_: Any, **kwargs: Any) -> None:
        assert not any(pattern.endswith((".py", ".bin")) for pattern in kwargs["allow_patterns"])
        raise OSError("Network is unreachable\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"no folder 'nobody/nothing' here.*Network is unreachable$"):
        chiasm.load("nobody/nothing")


# --------------------------------------------------------------------------------------------------------------- shards


def test_shards(saved: Path, tmp_path: Path):
    vlm = chiasm.load(saved)
    vlm.save(tmp_path / "s", max_shard=4000)
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert all(p.stat().st_size < 4000 + 2000 + 300 * 16 * 4 for p in (tmp_path / "s").glob("*.safetensors"))
    again = chiasm.load(tmp_path / "s").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in vlm.state_dict().items())


def test_shards_and_index_must_agree(saved: Path, tmp_path: Path):
    folder = chiasm.load(saved).save(tmp_path / "s", max_shard=4000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    for weight_map, message in (
        ({k: v for k, v in index["weight_map"].items() if k != first}, f"not in the index.*{first}"),
        ({**index["weight_map"], "ghost": index["weight_map"][first]}, "have no shard.*'ghost'"),
        ({**index["weight_map"], first: "../elsewhere.safetensors"}, "a shard outside its folder"),
        ({**index["weight_map"], first: "gone.safetensors"}, "names shard 'gone.safetensors', which is missing"),
    ):
        path.write_text(json.dumps({**index, "weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            chiasm.load(folder)


def test_saving_again_leaves_nothing_stale(saved: Path, tmp_path: Path):
    vlm = chiasm.load(saved)
    folder = vlm.save(tmp_path / "s", max_shard=4000)
    (folder / "log.jsonl").write_text("mine")
    vlm.save(folder)
    assert sorted(p.name for p in folder.glob("*.safetensors")) == ["model.safetensors"]
    assert not (folder / "model.safetensors.index.json").exists() and (folder / "log.jsonl").read_text() == "mine"
    assert chiasm.load(folder).num_parameters() == vlm.num_parameters()


def test_a_save_that_fails_changes_nothing(copy: Path):
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    with pytest.raises(RuntimeError), replaced_folder(copy) as aside:
        (aside / "config.json").write_text("{}")
        raise RuntimeError("the disk is full")
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


def test_a_save_cut_off_between_files_is_no_checkpoint(copy: Path, monkeypatch: pytest.MonkeyPatch):
    """Never new weights under an old configuration: without config.json the folder is refused."""
    vlm = chiasm.load(copy)
    moved: list[Any] = []
    replace = os.replace

    def cut(source: Any, target: Any) -> None:
        if Path(target).parent == copy and len(moved) == 2:
            raise KeyboardInterrupt
        if Path(target).parent == copy:
            moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        vlm.save(copy)
    monkeypatch.undo()
    assert len(moved) == 2 and not [p for p in copy.iterdir() if p.is_dir()]
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        chiasm.load(copy)
    vlm.save(copy)  # the model in memory is whole, though it was read from there
    assert torch.equal(chiasm.load(copy).state_dict()["lm.norm.weight"], vlm.state_dict()["lm.norm.weight"])


def test_what_cannot_be_saved(saved: Path, tmp_path: Path):
    vlm = chiasm.load(saved)
    with torch.no_grad():
        vlm.model.lm.norm.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"1 tensors hold NaN or infinity \(lm.norm.weight\)"):
        vlm.save(tmp_path / "x")
    with pytest.raises(CheckpointError, match="no memory"):
        chiasm.build(CONFIG, device="meta").save(tmp_path / "x")
    assert not (tmp_path / "x").exists()
