"""Nothing of a checkpoint is run, and no change of prompt or pixels goes unnoticed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
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
