"""The tokenizers of text towers: CLIP's and BERT's against golden ids of the official libraries, SigLIP's against
transformers; typed control tokens stay text.
"""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, BertTokenizer, CLIPTokenizer, SiglipTokenizer

from chiasm.lm.tokenizer import Tokenizer
from chiasm.processing.clean import cleaner

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "weights/tokenizers/golden_encodings.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def clip(shared_data: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared_data / "weights/tokenizers/clip")


@pytest.fixture(scope="module")
def bert(shared_data: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared_data / "weights/tokenizers/bert-base-uncased")


def test_clip_equals_openai(clip: Tokenizer, golden: dict[str, Any]):
    pytest.importorskip("ftfy")
    expected = golden["encodings"]["clip"]
    clean = cleaner("clip")
    got = [clip.encode(clean(text)) for text in golden["strings"]]
    assert len(got) == 40 and got == expected["ids_without_sot_eot"]
    assert (clip.prefix, clip.suffix) == ([expected["sot"]], [expected["eot"]]) and len(clip) == 49408


def test_bert_equals_the_library(bert: Tokenizer, golden: dict[str, Any]):
    got = [bert.encode(text, special=True) for text in golden["strings"]]
    assert len(got) == 40 and got == golden["encodings"]["bert-base-uncased"]["ids"]
    assert len(bert) == 30522 and bert.id_of("[MASK]") == 103


def test_typed_control_tokens_stay_text(clip: Tokenizer, bert: Tokenizer):
    assert not {49406, 49407} & set(clip.encode("a <|endoftext|> b <|startoftext|>"))
    assert clip.encode("<|endoftext|>", literal=True) == [49407]
    assert not {101, 102, 103} & set(bert.encode("[CLS] a [MASK] b [SEP]"))
    assert bert.encode("[MASK]", literal=True) == [103]


def test_clip_reads_the_layout_of_transformers(clip: Tokenizer, shared_data: Path, tmp_path: Path):
    """``vocab.json`` and ``merges.txt``, and the ``tokenizer.json`` that version 5 writes from them."""
    with gzip.open(shared_data / "weights/tokenizers/clip/bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as f:
        merges = f.read().split("\n")[1:48895]
    vocab = json.loads(clip.files.content["tokenizer.json"])["model"]["vocab"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}), encoding="utf-8")
    theirs = CLIPTokenizer(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges])
    theirs.save_pretrained(tmp_path / "new")
    texts = ["a photo of a cat", "Ünïcödé 日本 3.14 don't", "  two  spaces\n", "😀 emoji 🚀🚀"]
    for folder in (old, tmp_path / "new"):
        ours = Tokenizer.from_folder(folder)
        for text in texts:
            assert ours.encode(text, special=True) == theirs(text).input_ids == clip.encode(text, special=True)
    assert clip.decode(clip.encode("a photo of a cat, 3 dogs")) == "a photo of a cat , 3 dogs"


def test_saved_and_read_again(clip: Tokenizer, bert: Tokenizer, tmp_path: Path):
    for name, tokenizer in (("clip", clip), ("bert", bert)):
        tokenizer.save(tmp_path / name)
        again = Tokenizer.from_folder(tmp_path / name)
        assert again.encode("A cat on a mat", special=True) == tokenizer.encode("A cat on a mat", special=True)
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs("a cat on a mat").input_ids == tokenizer.encode("a cat on a mat", special=True)


def test_bert_equals_transformers(bert: Tokenizer, shared_data: Path):
    theirs = BertTokenizer(str(shared_data / "weights/tokenizers/bert-base-uncased/vocab.txt"))
    for text in ("An Élan vital, déjà vu!", "unbelievable 12345", "a [unused1] token", "tab\tand\u200bzero"):
        assert bert.encode(text, special=True) == theirs(text).input_ids


def test_siglip_equals_transformers(tmp_path: Path, shared_data: Path):
    """A sentencepiece model of SigLIP's kind (unigram, ``</s>`` is 1), trained here on real sentences.

    transformers' class needs the protobuf package, which nothing here does; where it is absent only its documented
    rule is compared: the pieces of "<unk>▁text" without those of "<unk>", then ``</s>``.
    """
    with gzip.open(shared_data / "text/tinyshakespeare.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()[:4000]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in lines if line), model_writer=model, vocab_size=500, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    ours, clean = Tokenizer.from_folder(tmp_path), cleaner("siglip")
    plain = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    skip = len(plain.encode("<unk>"))
    texts = ("A photo of a Cat.", "two  dogs, and: (one) king!", "What say'st thou?", "café 12", "thou_art", "I")
    for text in texts:
        assert ours.encode(clean(text), special=True) == [*plain.encode("<unk>▁" + clean(text))[skip:], 1]
    assert ours.pad_id == ours.eos_id == 1
    pytest.importorskip("google.protobuf")
    theirs = SiglipTokenizer(str(tmp_path / "spiece.model"))
    theirs.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path, tmp_path / "saved"):
        ours = Tokenizer.from_folder(folder)
        for text in texts:
            assert ours.encode(clean(text), special=True) == theirs(text).input_ids
