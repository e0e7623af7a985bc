"""Nothing of a checkpoint is run, and no change of prompt or pixels goes unnoticed."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import build, make_tokenizer
from safetensors.torch import load_file

import chiasm
import chiasm.model_config
from chiasm.errors import CheckpointError, FingerprintError

# -------------------------------------------------------------------------------------------------------------- pickles


class Bomb:
    """Unpickled by an unguarded loader, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_a_pickle_never_runs(copy: Path, tmp_path: Path, name: str, allow: bool):
    (copy / "model.safetensors").unlink()
    witness = tmp_path / "witness"
    torch.save({"lm.norm.weight": Bomb(witness)}, copy / name)
    with pytest.raises(
        CheckpointError, match="pass allow_pickle=True" if not allow else "cannot be read as plain tensors"
    ):
        chiasm.load(copy, allow_pickle=allow)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Bomb(witness)))
    assert witness.exists()  # so the bomb was a real one


def test_a_plain_pickle_is_read_where_it_is_allowed(copy: Path):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="can run code when it is opened"):
        chiasm.load(copy)
    state = chiasm.load(copy, allow_pickle=True).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


# ---------------------------------------------------------------------------------------------------------- fingerprint


def edit_config(folder: Path, key: str, value: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    *steps, last = key.split(".")
    node = values
    for step in steps:
        node = node[step]
    assert node[last] != value
    node[last] = value
    path.write_text(json.dumps(values))


CHANGES = {
    "processing.template.system": ("You are a parrot.", r"probe 'text': token \d+ was \d+ '.*', is \d+ '.*' now"),
    "processing.media.image.resample": (
        "bilinear",
        r"pixel \[0, \d, \d+, \d+\] \(unit, channel, row, column\) was .*, is",
    ),
    "processing.media.image.mean": ([0.5, 0.5, 0.5], r"pixel \[0, 0, 0, 0\] .* was -?[\d.]+, is -?[\d.]+ now"),
    "processing.media.image.fit": ("squash", "pixel"),
    "processing.template.user_turn.suffix": ("", "token"),
    "processing.add_bos": (True, r"token 0 was \d+ '.*', is 0 '<s>' now"),
}


@pytest.mark.parametrize("key", list(CHANGES))
def test_a_changed_prompt_or_pixel_is_refused(copy: Path, key: str):
    value, message = CHANGES[key]
    edit_config(copy, key, value)
    with pytest.raises(FingerprintError, match=message):
        chiasm.load(copy)


def test_a_changed_tokenizer_is_refused(copy: Path):
    path = copy / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    path.write_text(json.dumps(values))
    with pytest.raises(FingerprintError, match="token"):
        chiasm.load(copy)


def test_a_rare_word_is_not_exchanged_in_silence(copy: Path):
    """No probe holds these two."""
    path = copy / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    vocab["Ă"], vocab["ă"] = vocab["ă"], vocab["Ă"]
    path.write_text(json.dumps(values))
    with pytest.raises(
        FingerprintError, match=r"tokenizer.json is not the file that was saved: its SHA-256 was \w{12}, is"
    ):
        chiasm.load(copy)
    assert "SHA-256" in chiasm.load(copy, ignore_fingerprint=True).config.provenance.ignored_fingerprint[0]


def test_a_changed_stop_token_is_refused(copy: Path):
    (copy / "generation_config.json").write_text('{"eos_token_id": [1, 77]}')
    with pytest.raises(FingerprintError, match=r"generation stopped at ids \[1\], stops at \[1, 77\] now"):
        chiasm.load(copy)


def test_an_ignored_fingerprint_is_recorded_for_ever(copy: Path, tmp_path: Path):
    edit_config(copy, "processing.media.image.resample", "bilinear")
    vlm = chiasm.load(copy, ignore_fingerprint=True)
    assert "pixel" in vlm.config.provenance.ignored_fingerprint[0]
    again = chiasm.load(vlm.save(tmp_path / "next"))  # its own fingerprint now
    assert again.config.provenance.ignored_fingerprint == vlm.config.provenance.ignored_fingerprint
    assert again.config.provenance.history[-1] == "loaded although its fingerprint differed"


# -------------------------------------------------------------------------------------------------------- configuration

# Each of these fits the same tensors and the same prompts and pixels, and gives another model.
EDITS = {
    "model.lm.rope_theta": (20000.0, "model.lm.rope_theta was 10000.0, is 20000.0 now"),
    "model.lm.norm_eps": (1e-6, "model.lm.norm_eps was 1e-05, is 1e-06 now"),
    "model.lm.activation": ("gelu", "model.lm.activation was 'silu', is 'gelu' now"),
    "model.lm.heads": (4, "model.lm.heads was 2, is 4 now"),
    "model.encoders.image.layer": (-2, "model.encoders.image.layer was -1, is -2 now"),
    "model.encoders.image.norm_eps": (1e-5, "model.encoders.image.norm_eps was 1e-06, is 1e-05 now"),
    "model.connectors.image.activation": ("silu", "model.connectors.image.activation was 'gelu', is 'silu' now"),
    "processing.max_length": (5000, "processing.max_length was None, is 5000 now"),
}


@pytest.mark.parametrize("key", list(EDITS))
def test_an_edited_configuration_is_refused(copy: Path, key: str):
    value, message = EDITS[key]
    edit_config(copy, key, value)
    with pytest.raises(
        FingerprintError, match=rf"edited after it was saved: {re.escape(message)}\. Restore config"
    ) as e:
        chiasm.load(copy)
    assert "ignore_fingerprint=True" in str(e.value) and str(copy) in str(e.value)


def test_a_deleted_key_is_an_edit(tmp_path: Path):
    folder = build(make_tokenizer(tmp_path / "t"), **{"model.lm.rope_theta": 500.0}).save(tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    del values["model"]["lm"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(FingerprintError, match=r"model.lm.rope_theta was 500.0, is 10000.0 now"):
        chiasm.load(folder)


def test_who_means_an_edit_says_so_and_it_is_recorded(copy: Path, tmp_path: Path):
    edit_config(copy, "model.lm.rope_theta", 20000.0)
    edit_config(copy, "processing.add_bos", True)
    with pytest.raises(FingerprintError, match=r"token 0 was .*; its configuration was edited .*rope_theta"):
        chiasm.load(copy)
    vlm = chiasm.load(copy, ignore_fingerprint=True)
    assert vlm.config.model.lm.rope_theta == 20000.0
    prompt, edit = vlm.config.provenance.ignored_fingerprint
    assert "token 0" in prompt and "model.lm.rope_theta was 10000.0, is 20000.0 now" in edit
    assert vlm.config.provenance.history[-1] == "loaded although its fingerprint differed"
    again = chiasm.load(vlm.save(tmp_path / "next"))  # what it is now is what it was saved as
    assert again.config.provenance == vlm.config.provenance


def test_without_a_tokenizer_too(copy: Path, tmp_path: Path):
    vlm = chiasm.load(copy)
    bare = chiasm.VLM(vlm.config, vlm.model).save(tmp_path / "bare")
    assert not chiasm.load(bare).has_processor and not chiasm.load(bare).config.provenance.history
    edit_config(bare, "model.lm.rope_theta", 20000.0)
    with pytest.raises(FingerprintError, match=r"rope_theta was 10000.0"):
        chiasm.load(bare)


def test_a_method_s_numbers_are_part_of_it(copy: Path, tmp_path: Path):
    from chiasm.train.methods.lora import LoRA, LoRAConfig

    vlm = chiasm.load(copy)
    method = LoRA(LoRAConfig.parse({"type": "lora", "targets": [".*"], "r": 2, "alpha": 4.0}))
    method.install(vlm.model, "lm.layers.0.attn.q_proj")
    folder = vlm.save(tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    values["methods"][0]["method"]["alpha"] = 8.0
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(FingerprintError, match=r"methods.0.method.alpha was 4.0, is 8.0 now"):
        chiasm.load(folder)


def test_a_folder_from_before_loads_and_says_so(copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = copy / "fingerprint.json"
    stored = json.loads(path.read_text())
    del stored["config"]
    path.write_text(json.dumps(stored))
    vlm = chiasm.load(copy)
    assert "before configurations were part of it" in vlm.config.provenance.history[-1]
    assert str(copy) in caplog.text and "config.json cannot be noticed" in caplog.text
    again = vlm.save(tmp_path / "next")
    edit_config(again, "model.lm.rope_theta", 20000.0)
    with pytest.raises(FingerprintError, match="rope_theta"):
        chiasm.load(again)


@pytest.mark.parametrize("damage", ["[]", '{"version": 1, "config": 3}', "{"])
def test_a_damaged_fingerprint_is_one_error(copy: Path, damage: str):
    (copy / "fingerprint.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"fingerprint"):
        chiasm.load(copy)
