"""Folders of transformers' ViLT classes, in and out: the same ids, pixels, logits and labels.

``ViltProcessor`` needs torchvision: its picture processor's PIL form and its tokenizer are called one by one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import chiasm
from chiasm.errors import CheckpointError
from parity.weights import randomise

transformers = pytest.importorskip("transformers")
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "blue",
    "dog",
    "cat",
    "##s",
    "two",
    "on",
    "grass",
    "?",
]
CLASSES = {
    "ViltModel": {},
    "ViltForMaskedLM": {},
    "ViltForQuestionAnswering": {"id2label": {0: "two", 1: "red", 2: "a dog"}, "label2id": {}},
    "ViltForImageAndTextRetrieval": {},
    "ViltForImagesAndTextClassification": {"num_images": 2, "modality_type_vocab_size": 3, "num_labels": 2},
}
SAID = ["two dogs on grass ?", "a red cat"]


def folder(path: Path, kind: str) -> tuple[Path, Any, Any]:
    (path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(str(path / "vocab.txt"))
    config = transformers.ViltConfig(
        **SIZES, vocab_size=len(WORDS), image_size=64, patch_size=32, max_position_embeddings=10, **CLASSES[kind]
    )
    model = randomise(getattr(transformers, kind)(config))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    ViltImageProcessorPil(size={"shortest_edge": 64}).save_pretrained(path)
    return path, model, tokenizer


def pictures(count: int) -> list[Image.Image]:
    sizes = [(90, 70), (64, 130), (100, 100), (80, 64)]
    noise = (torch.randint(256, (h, w, 3), generator=torch.Generator().manual_seed(h)).byte() for w, h in sizes)
    return [Image.fromarray(values.numpy()) for values in noise][:count]


def messages(images: int) -> list[Any]:
    shown = pictures(2 * images)
    return [
        [{"role": "user", "content": [*({"type": "image", "image": p} for p in shown[i::2]), said]}]
        for i, said in enumerate(SAID)
    ]


def wanted(model: Any, tokenizer: Any, images: int) -> Any:
    text = tokenizer(SAID, padding=True, return_tensors="pt")
    text.pop("token_type_ids", None)
    seen = ViltImageProcessorPil(size={"shortest_edge": 64})(pictures(2 * images), return_tensors="pt")
    pixels, mask = seen["pixel_values"], seen["pixel_mask"]
    if images > 1:
        pixels, mask = (torch.stack((x[0::2], x[1::2])) for x in (pixels, mask))
    with torch.no_grad():
        return model(**text, pixel_values=pixels, pixel_mask=mask)


def answers(vlm: chiasm.VLM, kind: str) -> torch.Tensor:
    batch = vlm.processor.batch(messages(vlm.config.model.images))
    with torch.no_grad():
        if kind == "ViltModel":
            return vlm.model(batch).named["pooled"]
        if kind == "ViltForMaskedLM":
            return vlm.model.fill(batch)[batch.segment_ids != 0]
        if kind == "ViltForImageAndTextRetrieval":
            return vlm.model.match(batch)
        return vlm.model.classify(batch)


def theirs(model: Any, tokenizer: Any, kind: str, images: int) -> torch.Tensor:
    out = wanted(model, tokenizer, images)
    if kind == "ViltModel":
        return out.pooler_output
    if kind == "ViltForMaskedLM":
        return out.logits[tokenizer(SAID, padding=True, return_tensors="pt")["attention_mask"].bool()]
    return out.logits[:, 0] if kind == "ViltForImageAndTextRetrieval" else out.logits


@pytest.mark.parametrize("kind", CLASSES)
def test_in_and_out(kind: str, tmp_path: Path) -> None:
    source, model, tokenizer = folder(tmp_path, kind)
    vlm = chiasm.load(source)
    images = vlm.config.model.images
    found, expected = answers(vlm, kind), theirs(model, tokenizer, kind, images)
    assert torch.allclose(found, expected, atol=1e-5), float((found - expected).abs().max())
    vlm.export(tmp_path / "out", format="hf_vilt")
    back = getattr(transformers, kind).from_pretrained(tmp_path / "out").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert torch.allclose(theirs(back, tokenizer, kind, images), expected, atol=1e-6)
    again = chiasm.load(vlm.save(tmp_path / "own"))
    assert torch.allclose(answers(again, kind), found, atol=1e-6)
    if kind == "ViltForQuestionAnswering":
        assert vlm.processor.config.labels == ("two", "red", "a dog")
        assert back.config.id2label[2] == "a dog"


def test_a_head_with_a_matrix_of_its_own(tmp_path: Path) -> None:
    """The released file has both biases and a matrix that is not the embedding's: it must be kept."""
    source, _, _ = folder(tmp_path, "ViltForMaskedLM")
    tensors = load_file(source / "model.safetensors")
    assert "mlm_score.decoder.weight" not in tensors
    own = torch.randn(len(WORDS), 32, generator=torch.Generator().manual_seed(9))
    tensors["mlm_score.decoder.weight"] = own
    tensors["mlm_score.bias"] = tensors["mlm_score.decoder.bias"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    vlm = chiasm.load(source)
    assert not vlm.config.model.tied and torch.equal(vlm.model.word_scores.decoder.weight, own)
    tensors.pop("mlm_score.decoder.bias")  # as files of transformers 4 have it
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert torch.equal(chiasm.load(source).model.word_scores.decoder.bias, tensors["mlm_score.bias"])
    tensors["mlm_score.decoder.bias"] = tensors["mlm_score.bias"] + 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'mlm_score\.bias' must be equal to 'mlm_score\.decoder\.bias'"):
        chiasm.load(source)


def test_what_no_class_holds_is_refused(tmp_path: Path) -> None:
    source, _, _ = folder(tmp_path, "ViltModel")
    vlm = chiasm.load(source)
    edited = chiasm.build(
        vlm.config.edit(**{"model.tasks": {"match": True, "words": True}, "model.norm_eps": 1e-6}),
        tokenizer=vlm.tokenizer,
    )
    with pytest.raises(CheckpointError, match=r"the matching head \(tasks\.match\); norms with two epsilons"):
        edited.export(tmp_path / "out", format="hf_vilt")
