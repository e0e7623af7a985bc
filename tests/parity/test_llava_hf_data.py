"""Real tokenizers and real weights: Qwen2.5 and Mistral vocabularies in LLaVA folders, a LLaVA around stories260K."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hf_folders import make_model, photo, save_folder
from test_llava_hf import conversations, reference
from test_llava_original import picture, user, write

import chiasm
from chiasm.checkpoints.parts import read_part
from chiasm.config import Config
from chiasm.errors import CheckpointError
from chiasm.model_config import VLMConfig

pytestmark = pytest.mark.data


def qwen(data: Path) -> Any:
    """Qwen2.5's byte-level BPE with LLaVA-OneVision's two placeholders."""
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(
        data / "weights" / "tokenizers" / "qwen2.5-vl", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    tokenizer.chat_template = None
    return tokenizer


def mistral(data: Path, **options: Any) -> Any:
    """Mistral's SentencePiece vocabulary (Llama's class) with LLaVA's placeholder and padding."""
    import sentencepiece
    from transformers.convert_slow_tokenizer import generate_merges

    path = str(data / "weights" / "tokenizers" / "mistral" / "tokenizer.model.v1")
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocab, {piece: model.get_score(i) for i, piece in enumerate(pieces)})
    tokenizer = transformers.LlamaTokenizer(
        vocab=vocab, merges=merges, add_bos_token=True, padding_side="left", **options
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    return tokenizer


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_real_tokenizers(shared_data: Path, tmp_path: Path, kind: str):
    tokenizer = qwen(shared_data) if kind == "llava_onevision" else mistral(shared_data)
    model = make_model(kind, tokenizer)
    folder = save_folder(tmp_path / "x", kind, model, tokenizer)
    made = SimpleNamespace(kind=kind, model=model, tokenizer=tokenizer, folder=folder)
    vlm = chiasm.load(folder)
    for name, batch in conversations().items():
        theirs = reference(made, batch)
        ours = vlm.processor.batch(batch, add_generation_prompt=True, padding_side="left")
        real = theirs["attention_mask"].bool()
        assert torch.equal(ours.input_ids[real], theirs["input_ids"][real]), name
        with torch.no_grad():
            expected, found = model(**theirs).logits[real], vlm.model(ours, logits="all").logits[real]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        with torch.no_grad():
            ids = model.generate(**theirs, max_new_tokens=4, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        texts = tokenizer.batch_decode(ids[:, real.shape[1] :], skip_special_tokens=True)
        assert vlm.generate(batch, max_new_tokens=4) == texts, name
    vlm.save(tmp_path / "own")
    again = chiasm.load(tmp_path / "own").processor.batch(conversations()["batch"], add_generation_prompt=True)
    ours = vlm.processor.batch(conversations()["batch"], add_generation_prompt=True)
    assert torch.equal(again.input_ids, ours.input_ids)


def test_ids_of_the_original_llava(shared_data: Path, tmp_path: Path):
    """``tokenizer_image_token``: the text before and after the picture is encoded by itself, the first BOS is kept."""
    import sentencepiece

    fast = mistral(shared_data)
    model = make_model("llava", fast)
    at = write(tmp_path / "x", model, fast, image_aspect_ratio="pad")
    (at.folder / "tokenizer.json").unlink()
    path = shared_data / "weights" / "tokenizers" / "mistral" / "tokenizer.model.v1"
    shutil.copy(path, at.folder / "tokenizer.model")
    (at.folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": True}
        )
    )
    vlm = chiasm.load(at.folder, vision_tower=at.tower)
    sample = vlm.processor([user(picture(photo(30, 30)), "What is it?")], add_generation_prompt=True)
    encode = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
    text = vlm.processor.prompt([user(picture(photo(30, 30)), "What is it?")])
    before, after = text.split("<image>")
    assert before.endswith("USER: ") and after == "\nWhat is it? ASSISTANT:"
    slots = sample.media[0].slots
    assert slots is not None and len(slots) == 16
    ids = sample.input_ids.tolist()
    assert ids[: int(slots[0])] == [1, *encode(before)]
    assert ids[int(slots[-1]) + 1 :] == encode(after)


# ------------------------------------------------------------------------------------------------------- stories260K


def composed(data: Path, lm: Config | None = None) -> VLMConfig:
    base = data / "weights" / "stories260K"
    model = {
        "type": "splice",
        "encoders": {
            "image": {"type": "vit", "image_size": 16, "patch": 8, "dim": 24, "depth": 2, "heads": 2, "mlp": 48}
        },
        "connectors": {"image": {"type": "mlp"}},
        "lm": lm or read_part(base, "lm"),
        "media": {"image": {"merge": {"type": "flat"}}},
    }
    processing = {"template": "simple", "media": {"image": {"type": "image", "size": 16, "placeholder": None}}}
    return VLMConfig.parse(
        {"model": model, "processing": processing, "weights": {"lm": str(base)}, "tokenizer": str(base)}
    )


def test_a_llava_around_stories260k(shared_data: Path, tmp_path: Path):
    """Its weights give the published logits; the composed model trains, is saved, and answers."""
    base = shared_data / "weights" / "stories260K"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vlm = chiasm.build(composed(shared_data))
    expected = json.loads((base / "expected.json").read_text())
    ids = torch.tensor([expected["prompt_ids_for_logits"]])
    positions, ones = torch.arange(ids.shape[1])[None], torch.ones_like(ids)
    with torch.no_grad():
        hidden = vlm.model.lm(vlm.model.lm.embed(ids), positions, ones)
        logits = vlm.model.lm.head(hidden)[0]
    torch.testing.assert_close(logits[-1], torch.tensor(expected["last_position_logits_float32"]), atol=1e-4, rtol=1e-4)
    assert logits.argmax(-1).tolist() == expected["per_position_argmax"]

    question = {
        "role": "user",
        "content": [picture(photo(20, 20, 1)), {"type": "text", "text": "What is in the park?"}],
    }
    batch = vlm.processor.batch([[question, {"role": "assistant", "content": "A big red ball."}]], train=True)
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        output = vlm.model(batch)
        loss = torch.nn.functional.cross_entropy(output.logits, output.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    vlm.save(tmp_path / "trained")
    again = chiasm.load(tmp_path / "trained")
    assert again.generate([question], max_new_tokens=20) == "A big red ball."
    assert again.config.provenance.base["lm"] == str(base)


def test_a_changed_base_configuration_is_refused(shared_data: Path):
    base = shared_data / "weights" / "stories260K"
    wrong = read_part(base, "lm").edit(kv_heads=8, norm_eps=1e-6)
    with pytest.raises(CheckpointError, match=r"kv_heads is 8 here, 4 there, norm_eps is 1e-06 here, 1e-05 there"):
        chiasm.build(composed(shared_data, wrong))
