"""Tokenizer folders for tests, made from real vocabularies, and a toy medium with a known number of tokens."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from chiasm import registry
from chiasm.errors import DataError
from chiasm.processing.base import FrontEnd, FrontEndConfig, Place
from chiasm.types import Layout, Media, MediaItem


@dataclass(frozen=True)
class Dot(Media):
    """A medium whose data is the number of its tokens."""

    kind = "dot"


class DotFrontEnd(FrontEnd):
    class Config(FrontEndConfig):
        type: str = "dot"
        placeholder: str | None = "<image>"

    kind = "dot"

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        if not isinstance(medium.data, int):
            raise DataError(f"{place}: a dot is an integer")
        return MediaItem("dot", torch.full((1, 2), float(medium.data)), Layout(1, (2,), original=(40, 80)), None)


def count_dot(kind: str, layout: Layout) -> int:
    """Five tokens each."""
    return 5


registry.register("modality", "dot")(Dot)
registry.register("front_end", "dot")(DotFrontEnd)

CONTROLS = (
    *("<|im_start|>", "<|im_end|>", "<image>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
)


def gpt2(folder: Path, data: Path) -> Path:
    """GPT-2's byte-level BPE, with the control tokens of chat templates."""
    lines = (data / "gpt2" / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines if line]
    vocab = json.loads((data / "gpt2" / "encoder.json").read_text(encoding="utf-8"))
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.add_special_tokens(["<|endoftext|>", *CONTROLS])
    return _write(folder, made, {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"})


def qwen(folder: Path, data: Path) -> Path:
    """Qwen2.5, as transformers reads and saves it, with a token for pictures."""
    made = AutoTokenizer.from_pretrained(data / "qwen2.5-vl")
    made.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    made.save_pretrained(folder)
    return folder


def spm(folder: Path, model: Path, **config: object) -> Path:
    """A sentencepiece model alone, with ``<image>`` after its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, folder / "tokenizer.model")
    size = sentencepiece.SentencePieceProcessor(model_file=str(model)).get_piece_size()
    image = {"content": "<image>", "special": True, "normalized": False}
    values = {"added_tokens_decoder": {str(size): image}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def llama(model: Path, legacy: bool) -> LlamaTokenizer:
    """A sentencepiece model as transformers' Llama tokenizer, made by transformers' own conversion rule."""
    source = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [source.id_to_piece(i) for i in range(source.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    scores = {piece: source.get_score(i) for i, piece in enumerate(pieces)}
    merges = generate_merges(vocab, scores, skip_tokens=pieces[:3])
    made = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
    made.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return made


def llama_prepend(model: Path) -> Tokenizer:
    """The same as published tokenizer.json files have it: a normalizer that prepends ``▁`` to every section."""
    made = llama(model, legacy=True)._tokenizer
    made = Tokenizer.from_str(made.to_str())
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def words(folder: Path) -> Path:
    """A word-level tokenizer of a tiny model: its control tokens are entries that only the configuration names."""
    entries = [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "<image>",
        "A",
        "cat",
        "dog",
        "Yes",
        ".",
        "?",
        "What",
        "is",
        "it",
        "no",
        "Q",
        ":",
    ]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(entries)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return _write(folder, made, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})


def _write(folder: Path, made: Tokenizer, config: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def save(made: LlamaTokenizer, folder: Path) -> Path:
    made.save_pretrained(folder)
    return folder


def all_folders(root: Path, shared: Path) -> dict[str, Path]:
    """Every kind of tokenizer, by name."""
    data = shared / "weights" / "tokenizers"
    mistral = data / "mistral" / "tokenizer.model.v1"
    folders = {
        "gpt2": gpt2(root / "gpt2", data),
        "qwen": qwen(root / "qwen", data),
        "mistral-spm": spm(root / "mistral-spm", mistral, legacy=True),
        "mistral-spm-new": spm(root / "mistral-spm-new", mistral, legacy=False),
        "mistral-v3": spm(root / "mistral-v3", data / "mistral" / "tokenizer.model.v3", legacy=False),
        "stories": spm(root / "stories", shared / "weights" / "stories260K" / "tokenizer.model"),
        "llama": save(llama(mistral, legacy=True), root / "llama"),
        "llama-new": save(llama(mistral, legacy=False), root / "llama-new"),
        "words": words(root / "words"),
    }
    prepend = llama_prepend(mistral)
    prepend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folders["llama-prepend"] = _write(root / "llama-prepend", prepend, named)
    return folders
