"""BEiT-3's and XLM-R's numbering of a sentencepiece model, against the rule: piece i is i + 1, unknown is 3."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

from chiasm.errors import CheckpointError
from chiasm.lm.fairseq import fairseq_tokenizer
from chiasm.lm.tokenizer import Tokenizer
from chiasm.types import Piece

LINES = [
    "a red square on the grass, a photo of two dogs",
    "the cat sat on the mat and looked at a yellow bird",
    "Ein Zug fährt durch die Stadt. Une ville près de la mer.",
    "three people are playing in the snow near the old bridge",
] * 5
TEXTS = ["a red square", "  Two   dogs — on the grass!", "zug 雪 🙂", "<s> is text, <mask> too", "X"]


def model(path: Path, **options: int) -> Path:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=out, vocab_size=90, hard_vocab_limit=False, **options
    )
    path.write_bytes(out.getvalue())
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_ids(tmp_path: Path, text: str) -> None:
    path = model(tmp_path / "beit3.spm")
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = fairseq_tokenizer(path)
    wanted = [index + 1 if index else 3 for index in own.encode(text)]
    assert tokenizer.encode(text, special=True) == [0, *wanted, 2]
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").encode(text) == wanted
    if 3 not in wanted:
        assert tokenizer.decode(wanted) == own.decode(own.encode(text))


def test_names(tmp_path: Path) -> None:
    path = model(tmp_path / "beit3.spm")
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    tokenizer = fairseq_tokenizer(path)
    assert tokenizer.specials == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": size + 1}
    assert tokenizer.vocab_size == size + 2  # the released model: 64010
    assert tokenizer.encode_pieces([Piece("<mask>", literal=True)]).ids == [size + 1]
    assert size + 1 not in tokenizer.encode("<mask>")  # text forges no control token


def test_another_order_is_refused(tmp_path: Path) -> None:
    path = model(tmp_path / "other.model", bos_id=0, eos_id=1, unk_id=2)
    with pytest.raises(CheckpointError, match="fairseq's numbering is known for"):
        fairseq_tokenizer(path)
