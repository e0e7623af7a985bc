"""Models composed from parts of other checkpoints; building, chatting; the rules of names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import CONFIG, build, make_tokenizer, messages
from PIL import Image
from safetensors.torch import load_file, save_file

import chiasm
import chiasm.model_config
from chiasm.checkpoints.parts import read_part
from chiasm.convert import maps
from chiasm.convert.engine import export_tensors, load_weights
from chiasm.convert.io import Loaded, open_weights, write_weights
from chiasm.convert.rules import Alias, Drop, merge, plan_import, prefixed, rename, split, squeeze, transpose
from chiasm.errors import CheckpointError, ConfigError

# ---------------------------------------------------------------------------------------------------------------- parts


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


# ---------------------------------------------------------------------------------------------------------- build, chat


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


# ---------------------------------------------------------------------------------------------------------------- rules


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


def test_a_base_with_another_tokenizer_is_refused(saved: Path, tmp_path: Path):
    """Both vocabularies are as long, so that all shapes fit: every word would be read as another."""
    base = llama_folder(tmp_path / "base")
    table = json.loads((saved / "tokenizer.json").read_text())
    vocab = table["model"]["vocab"]
    one, two = [token for token in vocab if len(token) == 1][5:7]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (base / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=r"2 of 2[0-9][0-9] tokens differ: every word would be read as another"):
        chiasm.load(saved).load_part("lm", base)
    chiasm.load(saved).load_part("lm", base / "model.safetensors")  # asked for
    (base / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
    chiasm.load(saved).load_part("lm", base)
