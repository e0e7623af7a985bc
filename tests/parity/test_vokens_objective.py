"""MiniGPT-5's training: the sum by its formula in float64, from transformers' text tower and torch's transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_vokens import theirs_of

import chiasm
from chiasm.errors import ConfigError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.train.objectives import objective
from chiasm.train.objectives.vokens import VokenObjective

WORDS = "src/chiasm/weights/tiny-lm"
TOKENS = [f"[IMG{i}]" for i in range(8)]
FIRST = 881  # behind the last of the tokenizer
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"vocab_size": 1024, "max_position_embeddings": 12, "hidden_act": "gelu", "eos_token_id": 2, "bos_token_id": 1}
TALKS = [("a red circle", "two blue squares are here"), ("green", "a green star"), ("what is this", None)]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A diffusion model's text tower as its folder holds it, and transformers' class with the same weights."""
    torch.manual_seed(5)
    made = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("text_encoder")
    made.save_pretrained(folder)
    return folder, made


@pytest.fixture(scope="module")
def vlm() -> Any:
    torch.manual_seed(3)
    config = chiasm.preset("minigpt-5", tiny=True).edit(**{"model.lm.vocab": 896, "model.vokens.first": FIRST})
    made = chiasm.build(config, tokenizer=Tokenizer.from_folder(WORDS).with_controls(TOKENS))
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.normal_(0, 0.2 if parameter.ndim > 1 else 0.8)
    return made


def spec(folder: Path, **options: Any) -> dict[str, Any]:
    values = json.loads((folder / "config.json").read_text())
    sizes = {"dim": 32, "depth": 2, "heads": 4, "mlp": 48, "vocab": 1024, "positions": 12, "activation": "gelu"}
    assert values["model_type"] == "clip_text_model"
    reader = {"tower": {"type": "text", **sizes}, "weights": str(folder), "tokenizer": WORDS}
    return {"type": "vokens", "reader": reader, "dropped": 0.0} | options


def batch(vlm: Any, pack: bool = False) -> Any:
    """Two answers that end with a picture, one without words, as a template writes them."""
    processor = vlm.processor
    turns = {"user_turn": {"prefix": "", "suffix": " "}, "answer": {"prompt": "", "end": "".join(TOKENS)}}
    template = {"type": "turns", **turns, "media_suffix": ""}
    config = type(processor.config).parse(processor.config.dump() | {"template": template})
    processor = type(processor)(config, processor.tokenizer, processor.counter)
    talks = [
        [{"role": "user", "content": said}, {"role": "assistant", "content": answer or "?"}] for said, answer in TALKS
    ]
    return processor.batch(talks, train=True, pack=pack)


def expected(vlm: Any, theirs: Any, found: Any, learn: str = "answer") -> float:
    """The published sum, sample by sample, in float64. ``theirs`` reads ids as the reader does."""
    model, words = vlm.model, Tokenizer.from_folder(WORDS)
    mapper = theirs_of(model.mapper.double(), model.config.vokens)
    theirs = theirs.double()
    hidden = model.float()(found, logits=None).hidden.double()
    model.mapper.double()
    total = 0.0
    for row, (_, answer) in enumerate(TALKS):
        ids = found.input_ids[row][found.segment_ids[row] != 0].tolist()
        start = ids.index(FIRST)
        learned = [i for i in range(1, len(ids)) if bool(found.loss_mask[row, i])]
        if learn == "pictures":
            learned = [start, start + 7]
        logits = hidden[row] @ model.lm.lm_head.weight.double().T
        text = sum(float(logits[i - 1].logsumexp(0) - logits[i - 1, ids[i]]) for i in learned) / len(learned)
        states = hidden[row : row + 1, start - 1 : start + 7]
        states = model.mapper.fc2(torch.nn.functional.gelu(model.mapper.fc1(states)))
        mapped = mapper(states.transpose(0, 1), model.mapper.queries[:, None]).transpose(0, 1)
        read = [*words.prefix, *words.encode(answer or "?"), *words.suffix][:5]
        wanted = theirs(torch.tensor([read + [0] * (5 - len(read))])).last_hidden_state
        total += 0.01 * text + 0.1 * float((mapped - wanted).square().mean())
    model.float()
    theirs.float()
    return total


@torch.no_grad()
@pytest.mark.parametrize("learn", ["answer", "pictures"])
def test_the_sum_by_its_formula(vlm: Any, tower: Any, learn: str):
    vlm.model.eval()
    made = objective(spec(tower[0], learn=learn), vlm.processor)
    found = batch(vlm)
    loss = made(vlm.model, found)
    wanted = expected(vlm, tower[1], found, learn)
    assert loss.weight == 3
    assert float(loss.total) == pytest.approx(wanted, rel=2e-6)
    assert float(loss.parts["features"][0]) > 0 and loss.parts["features"][1] == 3


def test_cut_and_packed_is_the_same_step(vlm: Any, tower: Any):
    """Padded, packed, and one sample at a time: the same loss, and the same gradient of mapper and language model."""
    vlm.model.eval()
    made = objective(spec(tower[0]), vlm.processor)
    found = []
    for way in ("padded", "packed", "alone"):
        vlm.model.zero_grad()
        whole = batch(vlm, pack=way == "packed")
        parts = [whole] if way != "alone" else [rows(whole, i) for i in range(3)]
        losses = [made(vlm.model, part) for part in parts]
        total = sum(loss.total for loss in losses)
        total.backward()
        names = ("mapper.fc1.weight", "lm.embedding.weight", "lm.layers.0.attn.q_proj.weight")
        found.append((total.detach(), *(vlm.model.get_parameter(n).grad.clone() for n in names)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.abs().sum() > 0
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def rows(whole: Any, i: int) -> Any:
    from chiasm.types import Batch

    real = whole.segment_ids[i] != 0
    cut = [getattr(whole, n)[i : i + 1, real] for n in ("input_ids", "positions", "segment_ids", "loss_mask")]
    return Batch(*cut, {}, [whole.ids[i]], sources=whole.sources[i : i + 1])


def test_whose_words_a_picture_shows(vlm: Any, tower: Any):
    made = objective(spec(tower[0]), vlm.processor)
    assert isinstance(made, VokenObjective)
    found = batch(vlm)
    starts = [row.index(FIRST) for row in found.input_ids.tolist()]
    said = [made.words(found, i, start) for i, start in enumerate(starts)]
    assert said == ["two blue squares are here", "a green star", "?"]
    found.loss_mask[0] &= found.input_ids[0] >= FIRST  # a caption that is given, not learned
    assert made.words(found, 0, starts[0]) == "a red circle two blue squares are here"


def test_pictures_without_words(vlm: Any, tower: Any):
    """In training a share of pictures has its states and its words set to nothing: their mapper sees zeros."""
    made = objective(spec(tower[0], dropped=0.999999), vlm.processor)
    vlm.model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        loss = made(vlm.model, batch(vlm))
        nothing = vlm.model.mapper(torch.zeros(1, 8, 64))
        wanted = made.reader([""], "cpu")
    vlm.model.eval()
    assert float(loss.parts["features"][0]) == pytest.approx(3 * float((nothing - wanted).square().mean()), rel=1e-5)


def test_what_is_refused(vlm: Any, tower: Any):
    wrong = spec(tower[0])
    wrong["reader"] = wrong["reader"] | {"tower": wrong["reader"]["tower"] | {"dim": 64}}
    with pytest.raises(ConfigError, match="features of width 64, the mapper 5 of width 32"):
        objective(wrong, vlm.processor)(vlm.model, batch(vlm))
    plain = Tokenizer.from_folder(WORDS)
    made = objective(spec(tower[0]))
    made.tokenizer = plain
    with pytest.raises(ConfigError, match="881 is no control token of this tokenizer: add them"):
        made(vlm.model, batch(vlm))
    llava = chiasm.build(chiasm.preset("llava-1.5-7b", tiny=True, vocab=881), tokenizer=WORDS).model
    with pytest.raises(ConfigError, match="trains a model of type 'vokens', got 'splice'"):
        objective(spec(tower[0]), vlm.processor)(llava, batch(vlm))
