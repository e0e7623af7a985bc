"""Sentencepiece models that fairseq numbers in its own way: XLM-R's, and BEiT-3's ``beit3.spm``.

The model's own first three pieces are ``<unk> <s> </s>``; fairseq counts ``<s> <pad> </s> <unk>``, then the rest one
higher, and ``<mask>`` at the end. Reference: ``XLMRobertaTokenizer`` of transformers 4 (that of transformers 5 does not
read a sentencepiece file). The numbering is written into a copy of the model, so that everything else stays the same.
"""

from __future__ import annotations

import json
from pathlib import Path

from chiasm.errors import CheckpointError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.lm.tokenizer_files import TokenizerFiles
from chiasm.lm.tokenizer_spm import _processor, _varint, _written

NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # kinds of pieces in sentencepiece's ModelProto
OWN = ["<unk>", "<s>", "</s>"]
FIRST = [("<s>", CONTROL), ("<pad>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN)]
NAMED = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def fairseq_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a ``.spm`` or ``.model`` file, as fairseq numbers it. Saves as a folder like any other.

    Raises CheckpointError where the file does not begin with ``<unk> <s> </s>``.
    """
    place = Path(path)
    model = place.read_bytes()
    own = _processor(model, str(place.parent))
    begins = [own.id_to_piece(i) for i in range(min(3, own.get_piece_size()))]
    if begins != OWN:
        raise CheckpointError(f"{place}: begins with {begins}, fairseq's numbering is known for {OWN} only")
    config = {**NAMED, "add_bos_token": True, "add_eos_token": True, "legacy": True}
    content = {"tokenizer.model": renumbered(model), "tokenizer_config.json": json.dumps(config).encode()}
    return Tokenizer(TokenizerFiles.parse(content, str(place)))


def renumbered(model: bytes) -> bytes:
    """The ModelProto with its first three pieces replaced by fairseq's four, and ``<mask>`` as the last."""
    out, place, count = bytearray(), 0, 0
    pieces = bytearray(b"".join(_piece(name, kind) for name, kind in FIRST))
    while place < len(model):
        tag, place = _varint(model, place)
        size, place = _varint(model, place)
        body = model[place : place + size]
        place += size
        whole = _written(tag) + _written(size) + body
        if tag >> 3 != 1:
            out += whole
            continue
        count += 1
        if count > len(OWN):
            pieces += whole
    return bytes(pieces + _piece("<mask>", CONTROL) + out)


def _piece(name: str, kind: int) -> bytes:
    """One SentencePiece message: its text (field 1), a score of 0 (field 2), its kind (field 3)."""
    text = name.encode()
    body = bytes([1 << 3 | 2]) + _written(len(text)) + text + bytes([2 << 3 | 5, 0, 0, 0, 0]) + bytes([3 << 3, kind])
    return bytes([1 << 3 | 2]) + _written(len(body)) + body
