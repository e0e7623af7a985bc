"""Folders that transformers wrote with two towers: read, compared, exported, and read by transformers again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, normalizers, processors
from tokenizers.models import BPE
from towers_kit import hf_align, hf_clip, hf_siglip, hf_siglip2
from transformers import (
    AlignModel,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    EfficientNetImageProcessor,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipImageProcessor,
    SiglipModel,
)
from weights import lively

import chiasm
from chiasm.errors import CheckpointError
from chiasm.lm.tokenizer_vocab import _letters
from chiasm.vlm import VLM

TEXTS = ["a cat", "two dogs run over the field", "red"]
LINES = ["a photo of a cat and a dog", "two dogs run over the red field", "the quick brown fox jumps over it"] * 20


def pictures() -> list[Image.Image]:
    values = np.random.default_rng(1)
    return [Image.fromarray(values.integers(0, 255, size, dtype=np.uint8)) for size in ((50, 41, 3), (33, 60, 3))]


def clip_folder(folder: Path) -> Any:
    letters = [*_letters(), *(letter + "</w>" for letter in _letters()), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(letters)}, merges=[])
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    model = hf_clip()
    config = model.config
    config.text_config.vocab_size, config.text_config.max_position_embeddings = len(letters), 40
    config.text_config.bos_token_id, config.text_config.eos_token_id = len(letters) - 2, len(letters) - 1
    model = lively(CLIPModel(config))
    model.save_pretrained(folder)
    return model


def siglip_folder(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=written, vocab_size=50, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(written.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    model = lively(hf_siglip())
    model.save_pretrained(folder)
    return model


def siglip2_folder(folder: Path) -> Any:
    """Gemma's kind of tokenizer, a ``tokenizer.json``; texts end with ``<eos>`` and are filled with ``<pad>``."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "▁"]
    made = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, padding_side="right", **named).save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20).save_pretrained(folder)
    model = lively(hf_siglip2())
    model.save_pretrained(folder)
    return model


def align_folder(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs", "run", "##s", "red", "the"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    sizes = {"size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    EfficientNetImageProcessor(
        **sizes, rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, include_top=False
    ).save_pretrained(folder)
    model = lively(hf_align())
    with torch.no_grad():
        model.temperature.fill_(0.07)
    model.save_pretrained(folder)
    return model


FOLDERS: dict[str, Any] = {
    "clip": clip_folder, "siglip": siglip_folder, "siglip2": siglip2_folder, "align": align_folder,
}  # fmt: skip
CLASSES = {"clip": CLIPModel, "siglip": SiglipModel, "siglip2": Siglip2Model, "align": AlignModel}
SIGMOID = ("siglip", "siglip2")  # texts are filled, and what fills them is read


@pytest.fixture(scope="module", params=FOLDERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any, VLM]:
    folder = tmp_path_factory.mktemp("towers") / request.param
    theirs = FOLDERS[request.param](folder)
    return request.param, folder, theirs, chiasm.load(folder)


def given(vlm: VLM) -> Any:
    shown = [{"role": "user", "content": [{"type": "image", "image": picture}]} for picture in pictures()]
    images = vlm.processor.batch([[turn] for turn in shown])
    texts = vlm.processor.batch([[{"role": "user", "content": text}] for text in TEXTS])
    texts.media = images.media
    return texts


def seen(theirs: Any, batch: Any) -> dict[str, Any]:
    """The pictures as the class wants them."""
    media = batch.media["image"]
    if not isinstance(theirs, Siglip2Model):
        return {"pixel_values": media.inputs}
    grids = torch.tensor([layout.grid for layout in media.layouts])
    mask = (torch.arange(media.inputs.shape[1]) < grids.prod(1, keepdim=True)).int()
    return {"pixel_values": media.inputs, "spatial_shapes": grids, "pixel_attention_mask": mask}


def run(theirs: Any, batch: Any, masked: bool) -> Any:
    with torch.no_grad():
        return theirs(
            **seen(theirs, batch),
            input_ids=batch.input_ids,
            attention_mask=batch.segment_ids if masked else None,
        )


def test_logits_and_losses(case: tuple[str, Path, Any, VLM]):
    kind, _, theirs, vlm = case
    batch = given(vlm)
    expected = run(theirs, batch, kind not in SIGMOID)
    with torch.no_grad():
        got = vlm.model(batch).named
    torch.testing.assert_close(got["logits_per_image"], expected.logits_per_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vlm.embed(images=pictures()), expected.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vlm.embed(texts=TEXTS, truncate=True), expected.text_embeds, atol=1e-5, rtol=1e-5)
    batch.input_ids, batch.segment_ids = batch.input_ids[:2], batch.segment_ids[:2]  # as many texts as pictures
    with torch.no_grad():
        logits = vlm.model(batch).named["logits_per_image"]
        mask = None if kind in SIGMOID else batch.segment_ids
        loss = theirs(**seen(theirs, batch), input_ids=batch.input_ids, attention_mask=mask, return_loss=True).loss
    if kind in SIGMOID:
        signs = 2 * torch.eye(2) - 1
        ours = -F.logsigmoid(signs * logits).sum(-1).mean()
    else:
        smooth = {"label_smoothing": 0.1 if kind == "align" else 0.0}
        right = torch.arange(2)
        ours = (F.cross_entropy(logits, right, **smooth) + F.cross_entropy(logits.T, right, **smooth)) / 2
    torch.testing.assert_close(ours, loss, atol=1e-5, rtol=1e-5)


def test_pixels_are_those_of_transformers(case: tuple[str, Path, Any, VLM]):
    kind, folder, _, vlm = case
    if kind == "siglip2":
        pytest.skip("see tests/parity/test_naflex.py")
    cls = {"clip": CLIPImageProcessor, "siglip": SiglipImageProcessor, "align": EfficientNetImageProcessor}[kind]
    theirs = cls.from_pretrained(folder)  # without torchvision: the one that resizes with Pillow
    expected = theirs(pictures(), return_tensors="pt").pixel_values
    got = given(vlm).media["image"].inputs
    torch.testing.assert_close(got, expected.float(), atol=1e-6, rtol=1e-6)


def test_ids_are_those_of_transformers(case: tuple[str, Path, Any, VLM]):
    kind, folder, _, vlm = case
    if kind == "siglip":
        pytest.skip("transformers needs protobuf for it; see tests/golden/test_tower_tokenizers.py")
    cls = {"clip": CLIPTokenizer, "align": BertTokenizer, "siglip2": PreTrainedTokenizerFast}[kind]
    theirs = cls.from_pretrained(folder)
    batch = vlm.processor.batch([[{"role": "user", "content": text}] for text in TEXTS])
    filled: Any = {"padding": "max_length", "max_length": 32} if kind == "siglip2" else {"padding": True}
    expected = theirs(TEXTS, return_tensors="pt", **filled)
    if kind == "siglip2":
        assert torch.equal(batch.input_ids, expected.input_ids) and batch.segment_ids.all()
        return
    assert torch.equal(batch.segment_ids, expected.attention_mask)
    kept = expected.attention_mask.bool()
    assert torch.equal(batch.input_ids[kept], expected.input_ids[kept])


def test_exported_and_read_by_transformers(case: tuple[str, Path, Any, VLM], tmp_path: Path):
    kind, folder, theirs, vlm = case
    vlm.export(tmp_path / "out")
    again = CLASSES[kind].from_pretrained(tmp_path / "out").eval()
    batch = given(vlm)
    expected, got = run(theirs, batch, kind not in SIGMOID), run(again, batch, kind not in SIGMOID)
    torch.testing.assert_close(got.logits_per_image, expected.logits_per_image, atol=1e-6, rtol=1e-6)
    ours, back = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "model.safetensors")
    back = {k: v for k, v in back.items() if not k.endswith(("position_ids", "token_type_ids"))}
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name], back[name]) for name in ours)
    third = chiasm.load(tmp_path / "out")
    assert third.config.model == vlm.config.model
    assert third.config.processing.media == vlm.config.processing.media
    assert torch.equal(third.embed(texts=TEXTS, truncate=True), vlm.embed(texts=TEXTS, truncate=True))


def test_parameters_are_as_many(case: tuple[str, Path, Any, VLM]):
    _, _, theirs, vlm = case
    assert vlm.num_parameters() == sum(p.numel() for p in theirs.parameters())


# -------------------------------------------------------------------------------------------- the end of a CLIP's text


def test_the_old_end_id_is_read_as_transformers_reads_it(tmp_path: Path):
    theirs = clip_folder(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(values))
    vlm, old = chiasm.load(tmp_path), CLIPModel.from_pretrained(tmp_path).eval()
    batch = given(vlm)
    torch.testing.assert_close(vlm.embed(texts=TEXTS), run(old, batch, True).text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        run(theirs, batch, True).text_embeds, run(old, batch, True).text_embeds, atol=1e-6, rtol=1e-6
    )


def test_a_tokenizer_with_another_end_is_refused(tmp_path: Path):
    clip_folder(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["eos_token_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"ends a text with ids \[513\].*pools at id 7"):
        chiasm.load(tmp_path)


def test_parts_of_a_folder_go_into_another_model(tmp_path: Path):
    """Each tower, and a connector, from a whole CLIP's folder into a fresh model."""
    clip_folder(tmp_path)
    whole = chiasm.load(tmp_path)
    fresh = chiasm.build(whole.config, tokenizer=tmp_path)
    for part in ("encoders.image", "encoders.text", "connectors.text"):
        fresh.load_part(part, tmp_path)
    ours, theirs = fresh.state_dict(), whole.state_dict()
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert ours.keys() - same <= {"connectors.image.proj.weight", "logit_scale"}
