"""Checkpoints are strict, self-describing and safe: what does not fit is refused by name, nothing else is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import chiasm
import chiasm.model_config
from chiasm.checkpoints.parts import read_part
from chiasm.convert import maps
from chiasm.convert.engine import export_tensors, load_weights
from chiasm.convert.io import Loaded, open_weights, replaced_folder, write_weights
from chiasm.convert.rules import Alias, Drop, merge, plan_import, prefixed, rename, split, squeeze, transpose
from chiasm.errors import CheckpointError, ConfigError, FingerprintError

SPECIALS = ["<s>", "</s>", "<pad>", "<image>"]
CONFIG: dict[str, Any] = {
    "model": {
        "type": "splice",
        "encoders": {
            "image": {"type": "vit", "image_size": 16, "patch": 8, "dim": 16, "depth": 2, "heads": 2, "mlp": 24}
        },
        "connectors": {"image": {"type": "mlp"}},
        "lm": {
            "type": "decoder",
            "vocab": 300,
            "dim": 16,
            "depth": 2,
            "heads": 2,
            "mlp": 24,
            "max_positions": 512,
            "tied": False,
        },
        "media": {"image": {"merge": {"type": "flat"}}},
    },
    "processing": {"template": "vicuna_v1", "media": {"image": {"type": "image", "size": 16}}},
    "provenance": {"licences": {"data": "CC BY 4.0"}, "paper": "arXiv:2304.08485"},
}


def make_tokenizer(folder: Path) -> Path:
    """The bytes and a few control tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours with random, non-degenerate weights."""
    root = tmp_path_factory.mktemp("saved")
    vlm = build(make_tokenizer(root / "tokenizer"))
    return vlm.save(root / "model")


def build(tokenizer: Path, **changes: Any) -> chiasm.VLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = chiasm.model_config.VLMConfig.parse(CONFIG).edit(**changes)
        vlm = chiasm.build(config, tokenizer=tokenizer)
    for parameter in vlm.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return vlm.eval()


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)


def messages() -> list[dict[str, Any]]:
    picture = Image.linear_gradient("L").convert("RGB").resize((20, 30))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}]


# --------------------------------------------------------------------------------------------------------- our folder


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


# ------------------------------------------------------------------------------------------------------ strict tensors


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
    with pytest.raises(ConfigError, match="format 'chiasm/99', this version of chiasm reads 'chiasm/1'"):
        chiasm.load(tmp_path)


def test_a_hub_name_without_a_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import huggingface_hub

    def fail(*_: Any, **kwargs: Any) -> None:
        assert not any(pattern.endswith((".py", ".bin")) for pattern in kwargs["allow_patterns"])
        raise OSError("Network is unreachable\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"no folder 'nobody/nothing' here.*Network is unreachable$"):
        chiasm.load("nobody/nothing")


# --------------------------------------------------------------------------------------------------------- shards


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


# --------------------------------------------------------------------------------------------------------- pickles


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


# --------------------------------------------------------------------------------------------------------- fingerprint


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


# --------------------------------------------------------------------------------------------------------- parts


def llama_folder(folder: Path, vocab: int = 300, **changes: Any) -> Path:
    """A language model alone, as transformers writes it."""
    folder.mkdir()
    source = build(make_tokenizer(folder / "t"), **{"model.lm.vocab": vocab})
    tensors = export_tensors({n[3:]: t for n, t in source.state_dict().items() if n.startswith("lm.")}, maps.llama())
    write_weights(folder, tensors)
    values = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(values | changes))
    return folder


def test_a_model_is_composed_from_parts(saved: Path, tmp_path: Path):
    base = llama_folder(tmp_path / "base")
    assert read_part(base, "lm").dim == 16
    config = chiasm.model_config.VLMConfig.parse(CONFIG).with_weights(**{"lm": base, "encoders.image": saved})
    vlm = chiasm.build(config, tokenizer=saved)
    state, other = vlm.state_dict(), chiasm.load(saved).state_dict()
    assert torch.equal(state["lm.norm.weight"], load_file(base / "model.safetensors")["model.norm.weight"])
    assert torch.equal(state["encoders.image.positions"], other["encoders.image.positions"])
    assert not torch.equal(state["connectors.image.layers.0.weight"], other["connectors.image.layers.0.weight"])
    assert vlm.config.provenance.base == {"lm": str(base), "encoders.image": str(saved)}
    again = chiasm.load(vlm.save(tmp_path / "composed"))
    assert again.config.weights == {} and again.config.provenance.base["lm"] == str(base)


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 1e-6), ("rope_theta", 5e5), ("hidden_act", "gelu"), ("num_key_value_heads", 1)]
)
def test_a_part_with_another_configuration_is_refused(saved: Path, tmp_path: Path, key: str, value: Any):
    """Also where all shapes agree: other numbers would come out without a word."""
    base = llama_folder(tmp_path / "base", **{key: value})
    names = {"rms_norm_eps": "norm_eps", "hidden_act": "activation", "num_key_value_heads": "kv_heads"}
    with pytest.raises(CheckpointError, match=f"lm: the configuration is not that of .*{names.get(key, key)} is"):
        chiasm.load(saved).load_part("lm", base)


def test_rows_of_vocabulary_that_a_base_lacks_are_its_mean(saved: Path, tmp_path: Path):
    base = llama_folder(tmp_path / "base", vocab=290)
    vlm = chiasm.load(saved).load_part("lm", base)
    rows = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    table = vlm.model.lm.embedding.weight
    assert torch.equal(table[:290], rows)
    torch.testing.assert_close(table[290:], rows.mean(0).expand(10, -1))


def test_a_connector_alone(saved: Path, tmp_path: Path):
    """The projector file of LLaVA's first stage, with its long names, as a pickle and as safetensors."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"0.weight": (16, 16), "0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
    tensors = {f"model.mm_projector.{k}": torch.randn(s, generator=generator) for k, s in shapes.items()}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    save_file(tensors, tmp_path / "projector.safetensors")
    vlm = chiasm.load(saved)
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        vlm.load_part("connectors.image", tmp_path / "mm_projector.bin")
    for name in ("mm_projector.bin", "projector.safetensors"):
        vlm = chiasm.load(saved).load_part("connectors.image", tmp_path / name, allow_pickle=True)
        assert torch.equal(vlm.state_dict()["connectors.image.layers.2.weight"], tensors["model.mm_projector.2.weight"])


def test_unknown_parts_are_named(saved: Path):
    with pytest.raises(ConfigError, match=r"no part 'llm'; did you mean 'lm'"):
        chiasm.load(saved).load_part("llm", saved)


# --------------------------------------------------------------------------------------------------------- build, chat


def test_a_model_without_a_tokenizer_says_so():
    vlm = chiasm.build(CONFIG, device="meta")
    assert vlm.num_parameters() > 0 and not vlm.has_processor
    with pytest.raises(ConfigError, match="has no tokenizer"):
        vlm.generate(messages())


def test_a_tokenizer_with_too_many_ids_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"ids up to \d+ but the language model 200 rows"):
        build(make_tokenizer(tmp_path), **{"model.lm.vocab": 200})


def test_chat_remembers(saved: Path):
    chat = chiasm.load(saved).chat(system="Be brief.", max_new_tokens=4)
    chat.say("What is it?", images=[Image.new("RGB", (9, 9), "red")])
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    again = chiasm.load(saved).generate([*chat.messages, {"role": "user", "content": "And now?"}], max_new_tokens=4)
    assert chat.say("And now?") == again
    with pytest.raises(chiasm.ChiasmError):
        chat.say("Broken.", images=["/no/such/picture.png"])
    assert len(chat.messages) == 5
    chat.clear()
    assert len(chat.messages) == 1


# --------------------------------------------------------------------------------------------------------- rules


def test_rules_go_both_ways(rng: torch.Generator):
    rules = [
        split("l.{i}.qkv.{leaf}", ["b.{i}.q.{leaf}", "b.{i}.k.{leaf}", "b.{i}.v.{leaf}"], (4, 2, 2)),
        merge(["gate.{leaf}", "up.{leaf}"], "both.{leaf}", (3, 5)),
        transpose("conv.weight", "linear.weight"),
        squeeze("cls", "class_vector", leading=2),
        rename("{rest}", "other.{rest}"),
    ]
    theirs = {
        "l.0.qkv.weight": torch.randn(8, 3, generator=rng),
        "l.11.qkv.bias": torch.randn(8, generator=rng),
        "gate.weight": torch.randn(3, 2, generator=rng),
        "up.weight": torch.randn(5, 2, generator=rng),
        "conv.weight": torch.randn(2, 7, generator=rng),
        "cls": torch.randn(1, 1, 6, generator=rng),
        "a.b": torch.randn(2, generator=rng),
    }
    plan = plan_import(theirs, rules)
    ours: dict[str, torch.Tensor] = {}
    for step in plan.steps:
        ours.update(zip(step.targets, step.change([theirs[n] for n in step.sources]), strict=True))
    assert ours["b.11.k.bias"].shape == (2,) and ours["linear.weight"].shape == (7, 2)
    assert ours["both.weight"].shape == (8, 2) and ours["class_vector"].shape == (6,)
    back = export_tensors(ours, rules)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_a_fused_tensor_without_its_companion_is_named():
    module = torch.nn.Linear(2, 8, bias=False)
    weights = Loaded("memory", {"gate": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match=r"'gate' \(needs 'up'\)"):
        load_weights(module, weights, [merge(["gate", "up"], "weight", (3, 5))])


def test_two_spellings_of_one_tensor_are_refused():
    rules = [Alias("new.{rest}", "old.{rest}"), rename("old.{rest}", "{rest}")]
    with pytest.raises(CheckpointError, match=r"'old.x' and 'new.x' of the file are one tensor"):
        plan_import(["old.x", "new.x"], rules)


def test_a_tied_head_must_be_the_embedding():
    vlm = chiasm.build(CONFIG | {"model": {**CONFIG["model"], "lm": {**CONFIG["model"]["lm"], "tied": True}}})
    rules = prefixed(maps.llama(tied=True), "", "")
    state = export_tensors(vlm.model.lm.state_dict(), rules)
    assert "lm_head.weight" not in state
    same = Loaded("memory", state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    load_weights(vlm.model.lm, same, rules)
    other = Loaded("memory", state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' must be equal to 'model.embed_tokens.weight'"):
        load_weights(vlm.model.lm, other, rules)


def test_what_is_dropped_has_a_reason():
    plan = plan_import(["head.weight", "x"], [Drop("head.{rest}", "belongs to another task"), rename("x", "x")])
    assert plan.dropped == {"head.weight": "belongs to another task"}


def test_files_are_read_lazily(saved: Path):
    weights = open_weights(saved)
    assert weights.info["lm.embedding.weight"].shape == (300, 16)
    assert weights.dtype() == torch.float32
