"""Tokenizers published as bare vocabularies, written as ``tokenizer.json``: CLIP's BPE, BERT's WordPiece, SigLIP's.

    bpe_simple_vocab_16e6.txt.gz              openai/CLIP
    vocab.json, merges.txt                    CLIP in the layout of transformers 4
    vocab.txt                                 BERT
    spiece.model                              SigLIP (sentencepiece)

References: ``simple_tokenizer.py`` of openai/CLIP d05afc4; ``CLIPTokenizer``, ``BertTokenizer`` and ``SiglipTokenizer``
of transformers 5.23. CLIP's cleaning of texts (ftfy, HTML entities) and SigLIP's (punctuation) are the template's:
``chiasm.processing.clean``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.config import read_lines
from chiasm.errors import CheckpointError

CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # of the file's 262,144 CLIP keeps the first
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def vocabulary_files(folder: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """What a folder's vocabulary says as ``tokenizer.json`` (or ``tokenizer.model``) and its configuration.

    ``config`` is the folder's ``tokenizer_config.json``. Empty where the folder holds no vocabulary that is known.
    """
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if (folder / CLIP_FILE).is_file():
        return _clip(*_openai(folder / CLIP_FILE), config)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() and kind == "CLIPTokenizer":
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = read_lines(folder / "merges.txt")
        return _clip(vocab, [line for line in lines if line and not line.startswith("#version")], config)
    if (folder / "vocab.txt").is_file():
        return _bert(read_lines(folder / "vocab.txt"), config)
    if (folder / "spiece.model").is_file() and kind in ("SiglipTokenizer", ""):
        ends = {"add_bos_token": False, "add_eos_token": True, "eos_token": "</s>", "pad_token": "</s>"}
        table = ends | {k: v for k, v in config.items() if v is not None}
        return {
            "tokenizer.model": (folder / "spiece.model").read_bytes(),
            "tokenizer_config.json": _json({**table, "add_eos_token": True, "legacy": True}),
        }
    return {}


def _openai(path: Path) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges of OpenAI's file: bytes, bytes that end a word, merges, the two control tokens."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = lines[1 : 1 + MERGES]
    if len(merges) != MERGES:
        raise CheckpointError(f"{path} holds {len(merges)} merges, CLIP needs {MERGES}; it is not whole")
    letters = _letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {token: index for index, token in enumerate([*tokens, START, END])}, merges


def _letters() -> list[str]:
    """The 256 bytes as visible characters, in GPT-2's order: those that are visible first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]


def _clip(vocab: dict[str, int], merges: list[str], config: Mapping[str, Any]) -> dict[str, bytes]:
    body = {
        "version": "1.0",
        "added_tokens": [_special(token, vocab[token], normalized=False) for token in (START, END)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, vocab[END]],
            "cls": [START, vocab[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                {"type": "Replace", "pattern": {"String": "</w>"}, "content": " "},
                {"type": "Strip", "content": " ", "start": 0, "stop": 1},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "vocab": vocab,
            "merges": merges,
        },
    }
    table = {"tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "pad_token": END}
    table["unk_token"] = END
    return {"tokenizer.json": _json(body), "tokenizer_config.json": _json(table | _plain(config))}


def _bert(tokens: list[str], config: Mapping[str, Any]) -> dict[str, bytes]:
    vocab = {token: index for index, token in enumerate(tokens)}
    lost = [token for token in BERT_SPECIALS if token not in vocab]
    if lost:
        raise CheckpointError(f"vocab.txt lacks {', '.join(lost)}: it is not a BERT vocabulary")
    lower = bool(config.get("do_lower_case", True))
    cls, sep = (("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"]))
    body = {
        "version": "1.0",
        "added_tokens": [_special(token, vocab[token], normalized=False) for token in BERT_SPECIALS],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": bool(config.get("tokenize_chinese_chars", True)),
            "strip_accents": config.get("strip_accents"),
            "lowercase": lower,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": list(sep), "cls": list(cls)},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }
    table = {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "pad_token": "[PAD]", "do_lower_case": lower}
    return {"tokenizer.json": _json(body), "tokenizer_config.json": _json(table | _plain(config))}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _special(token: str, index: int, normalized: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": True}
    return {"id": index, "content": token, **flags}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
