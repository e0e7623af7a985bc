"""Tokenizers against golden ids of the official libraries, and against transformers; control tokens cannot be typed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from chiasm.errors import CheckpointError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.types import Piece

pytestmark = pytest.mark.data
NAMES = [
    "gpt2",
    "qwen",
    "mistral-spm",
    "mistral-spm-new",
    "mistral-v3",
    "stories",
    "llama",
    "llama-new",
    "llama-prepend",
    "words",
]
GOLDEN = {
    "gpt2": "gpt2",
    "qwen": "qwen2.5",
    "mistral-spm": "mistral-v1",
    "mistral-spm-new": "mistral-v1",
    "mistral-v3": "mistral-v3",
    "stories": "stories260K-tok512",
    "llama": "mistral-v1",
    "llama-new": "mistral-v1",
    "llama-prepend": "mistral-v1",
}
CONVERSATIONS = [
    "<s>[INST] <image>\nWhat is it? [/INST] A cat. </s><s>[INST] Sure? [/INST]",
    "USER: <image>\nWhat is it? ASSISTANT: 日本語 </s>USER: hm ASSISTANT:",
    "<image><image> two\n\n <image>",
    "a</s>b</s> c </s>  d",
    "</s>",
    " leading</s>",
]


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> dict:
    return json.loads((shared_data / "weights/tokenizers/golden_encodings.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids(name: str, tokenizers: dict, golden: dict) -> None:
    expected = golden["encodings"][GOLDEN[name]]["ids"]
    # transformers' Metaspace puts no prefix before a text that opens with a space; sentencepiece does.
    metaspace = name in ("llama", "llama-new")
    for text, ids in zip(golden["strings"], expected, strict=True):
        if not (metaspace and text.startswith(" ")):
            assert tokenizers[name].encode(text) == ids, text


@pytest.mark.parametrize("name", GOLDEN)
def test_round_trip_and_stream(name: str, tokenizers: dict, golden: dict) -> None:
    tokenizer, entry = tokenizers[name], golden["encodings"][GOLDEN[name]]
    expected = entry.get("decoded", golden["strings"])
    for text, ids, true in zip(golden["strings"], entry["ids"], expected, strict=True):
        decoded = tokenizer.decode(ids)
        if name != "qwen" or text.isascii():  # Qwen normalises to NFC
            assert decoded == true
        parts = list(tokenizer.decode_stream(ids))
        assert "".join(parts) == decoded
        assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_cannot_be_typed(name: str, tokenizers: dict) -> None:
    tokenizer = tokenizers[name]
    assert {tokenizer.specials[t] for t in tokenizer.specials} and tokenizer.specials
    controls = set(tokenizer.specials.values()) - {tokenizer.unk_id}
    for token, index in tokenizer.specials.items():
        for text in (token, f"a {token} b", f"{token}{token}"):
            assert not controls & set(tokenizer.encode(text)), (token, text)
        assert index in tokenizer.encode(token, literal=True)
    between = tokenizer.encode_pieces([Piece("x <"), Piece("s", literal=True), Piece("> y")])
    assert not controls & set(between.ids)


@pytest.mark.parametrize("name", ["gpt2", "qwen", "llama", "llama-new"])
def test_literals_equal_transformers(name: str, tokenizers: dict, tokenizer_folders: dict) -> None:
    # transformers does not save "legacy" and would read the folder as not legacy
    legacy = {"legacy": True} if name == "llama" else {}
    reference = AutoTokenizer.from_pretrained(tokenizer_folders[name], **legacy)
    for text in CONVERSATIONS:
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizers[name].encode(text, literal=True) == expected, text
    assert tokenizers[name].encode("hello", special=True) == reference("hello")["input_ids"]


@pytest.mark.parametrize(("name", "twin"), [("mistral-spm", "llama-prepend"), ("mistral-spm-new", "llama-new")])
def test_sentencepiece_equals_tokenizer_json(name: str, twin: str, tokenizers: dict) -> None:
    for text in CONVERSATIONS:
        if twin == "llama-new" and text.startswith(" "):
            continue  # Metaspace puts no prefix there, the slow tokenizer does
        ids = tokenizers[name].encode(text, literal=True)
        assert ids == tokenizers[twin].encode(text, literal=True), text
        assert tokenizers[name].decode(ids) == tokenizers[twin].decode(ids)
    assert tokenizers[name].encode("hello", special=True) == tokenizers[twin].encode("hello", special=True)


def test_prefix_spaces_of_sections(tokenizers: dict) -> None:
    text = "USER: <image>\nhi</s>USER: b"
    old, new = (tokenizers[n].encode(text, literal=True) for n in ("mistral-spm", "mistral-spm-new"))
    assert old == tokenizers["llama-prepend"].encode(text, literal=True)
    assert old != new and len(old) > len(new)


@pytest.mark.parametrize("name", NAMES)
def test_private_use_characters_in_text(name: str, tokenizers: dict) -> None:
    tokenizer = tokenizers[name]
    if name == "words":
        return  # every unknown word is <unk>
    text = "".join(chr(0xF0000 + i) for i in (0, 1, 5)) + " and \U00100001"
    ids = tokenizer.encode_pieces([Piece("a"), Piece("</s><image>", literal=True), Piece(text)]).ids
    assert text in tokenizer.decode(ids) or name == "qwen"
    expected = tokenizer.encode("</s><image>" if "</s>" in tokenizer.specials else "<image>", literal=True)
    assert set(expected) & set(tokenizer.specials.values()) <= set(ids)


@pytest.mark.parametrize("name", NAMES)
def test_spans_name_the_pieces(name: str, tokenizers: dict) -> None:
    tokenizer = tokenizers[name]
    pieces = [
        Piece("What is it?"),
        Piece("<image>", medium=0),
        Piece(" cat 日本 ", train=True),
        Piece("</s>", literal=True),
        Piece("", literal=True),
        Piece("dog"),
    ]
    encoding = tokenizer.encode_pieces(pieces)
    firsts = [first for first, _ in encoding.spans]
    assert firsts == sorted(firsts) and len(encoding.ids) == len(firsts)
    assert sum(pieces[first].medium is not None for first in firsts) == 1
    for number, piece in enumerate(pieces):
        own = [i for i, (a, b) in zip(encoding.ids, encoding.spans) if a <= number <= b]
        if piece.text and piece.medium is None and name != "words":
            assert piece.text.strip() in tokenizer.decode(own, skip_special=False)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_pickle(name: str, tokenizers: dict, tokenizer_folders: dict, tmp_path: Path) -> None:
    tokenizer = tokenizers[name]
    tokenizer.save(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (tokenizer_folders[name] / file.name).read_bytes()
    for other in (Tokenizer.from_folder(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        for text in CONVERSATIONS:
            assert other.encode(text, literal=True) == tokenizer.encode(text, literal=True)
        assert other.specials == tokenizer.specials and other.prefix == tokenizer.prefix


def test_folders_that_are_no_tokenizer(tmp_path: Path, tokenizer_folders: dict) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folders["words"] / "tokenizer.json").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": 9}))
    with pytest.raises(CheckpointError, match=r"'<image>' should have id 9 but the vocabulary gives it 4"):
        Tokenizer.from_folder(tmp_path)


def test_truncated_sentencepiece_model(tmp_path: Path, tokenizer_folders: dict) -> None:
    model = (tokenizer_folders["stories"] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


def test_generation_stops_and_chat_template(tmp_path: Path, tokenizer_folders: dict) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folders["words"] / "tokenizer.json").read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.generation_stops == (2, 3)
    assert tokenizer.chat_template == "{{ 1 }}"


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-new", "llama-prepend"])
@pytest.mark.parametrize("flags", ["lstrip", "rstrip", "normalized", "single_word", "none"])
def test_flags_of_added_tokens(name: str, flags: str, tokenizer_folders: dict, tmp_path: Path) -> None:
    """Renaming a token changes nothing of how its flags act: ids equal those of the library on the same string."""
    reference = Library.from_file(str(tokenizer_folders[name] / "tokenizer.json"))
    values = {flag: flag == flags for flag in ("lstrip", "rstrip", "normalized", "single_word")}
    reference.add_tokens([AddedToken("<tag>", special=False, **values), AddedToken("  ", normalized=False)])
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    texts = ["a <tag> b", "<tag>", " <tag>\n\n c", "x<tag>y", "a  b <tag><tag>  <tag> .", "日<tag>本"]
    for text in texts:
        assert tokenizer.encode(text, literal=True) == reference.encode(text, add_special_tokens=False).ids, text
    assert tokenizer.specials["<tag>"] not in tokenizer.encode("a <tag> b")
    assert reference.token_to_id("  ") in tokenizer.encode("a  b"), "white space stays ordinary"
