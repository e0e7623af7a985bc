"""Folders of transformers' BLIP-2 and InstructBLIP: the same ids, logits, gradients and text.

Reference: ``Blip2ForConditionalGeneration`` with OPT and with Flan-T5, ``InstructBlipForConditionalGeneration`` with
Llama, tiny, every weight drawn anew (transformers starts queries at zero and the tower almost there). Its processor
class needs torchvision: its image processor gives the pixels, and ids are put together as its code says, the
picture's tokens before the token that opens the text.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hf_folders import photo, randomise, small_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import chiasm
from chiasm.errors import CheckpointError, ConfigError, DataError, FingerprintError

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.02,
}
READS = {"vocab_size": 80, "max_position_embeddings": 96}
QFORMER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
QUESTIONS = ["Question: what is shown? Short answer:", "Describe the image in detail: colours, shapes and words."]


def opt(vocab: int, tokenizer: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": vocab,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def t5(vocab: int, tokenizer: Any) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "vocab_size": vocab,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def llama(vocab: int, tokenizer: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def bert_tokenizer() -> Any:
    """A WordPiece tokenizer as BERT's, on a few words: lower case, [CLS] before, [SEP] after."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(97 + i) for i in range(26)]
    words = [*special, *letters, *("##" + a for a in letters), *".:?,", "question", "image", "what", "the", "short"]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)])
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **named)


def make(kind: str, folder: Path) -> Any:
    """A random model of the class, saved as transformers saves it."""
    tokenizer = small_tokenizer()
    if kind.endswith("t5"):  # T5's tokenizer opens a text with nothing and ends it
        ends = [("</s>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", "$A </s> $B </s>", ends)
    vocab = len(tokenizer) + 16
    text = {"opt": opt, "t5": t5, "instruct": llama, "instruct t5": t5}[kind](vocab, tokenizer)
    name, reads = ("InstructBlip", READS) if kind.startswith("instruct") else ("Blip2", {})
    config = getattr(transformers, f"{name}Config")(
        vision_config=VISION,
        qformer_config=QFORMER | reads,
        text_config=text,
        num_query_tokens=5,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    if kind.endswith("t5"):
        assert config.text_config.dense_act_fn == "gelu", "LAVIS runs Flan-T5 with the exact GELU"
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        config.text_config.tie_word_embeddings = False
        model.language_model.config.tie_word_embeddings = False
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = transformers.BlipImageProcessorPil(size={"height": 28, "width": 28})
    images.save_pretrained(folder)
    reader = bert_tokenizer()
    if reads:
        reader.save_pretrained(folder / "qformer_tokenizer")
    written = kind.endswith("t5")
    return SimpleNamespace(
        written=written,
        model=model,
        tokenizer=tokenizer,
        images=images,
        folder=folder,
        reader=reader if reads else None,
    )


@pytest.fixture(scope="module", params=["opt", "t5", "instruct", "instruct t5"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(request.param, tmp_path_factory.mktemp(request.param) / "folder")


def inputs(made: Any, question: str, picture: Any) -> dict[str, Any]:
    """What transformers' processor gives: picture tokens, then the text with what its tokenizer adds."""
    ids = [made.tokenizer.convert_tokens_to_ids("<image>")] * 5 + made.tokenizer(question).input_ids
    pixels = made.images(picture, return_tensors="pt").pixel_values
    extra = {}
    if made.reader is not None:
        read = made.reader(question, return_tensors="pt")
        extra = {"qformer_input_ids": read.input_ids, "qformer_attention_mask": read.attention_mask}
    mask = torch.ones(1, len(ids)).long()
    return {"input_ids": torch.tensor([ids]), "attention_mask": mask, "pixel_values": pixels, **extra}


def talk(question: str, picture: Any, answer: str | None = None) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def ours(made: Any) -> Any:
    return chiasm.load(made.folder)


PICTURES = [photo(61, 37, 1), photo(30, 85, 2)]


@torch.no_grad()
def test_ids_pixels_and_logits(made: Any, ours: Any):
    alone = []
    for question, picture in zip(QUESTIONS, PICTURES, strict=True):
        theirs = inputs(made, question, picture)
        batch = ours.processor.batch([talk(question, picture)], add_generation_prompt=True)
        assert batch.input_ids.tolist() == theirs["input_ids"].tolist()
        if not made.written:
            expected = made.model(**theirs).logits
            found = ours.model(batch, logits="all").logits
        else:
            start = torch.tensor([[made.tokenizer.pad_token_id, 30, 41, 52]])
            expected = made.model(**theirs, decoder_input_ids=start).logits
            batch.target_ids, batch.target_mask = start, torch.ones_like(start).bool()
            found = ours.model(batch, logits="all").logits
        assert torch.equal(batch.media["image"].inputs, theirs["pixel_values"])
        if made.reader is not None:
            assert batch.media["image"].cond.ids.tolist() == theirs["qformer_input_ids"].tolist()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        alone.append(expected[0, -1])
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    swapped = inputs(made, QUESTIONS[0], PICTURES[1])
    extra = {} if not made.written else {"decoder_input_ids": start}
    assert (made.model(**swapped, **extra).logits[0, -1] - alone[0]).abs().max() > 1e-3, "the picture must matter"


def test_gradients_of_queries_projection_and_pixels(made: Any, ours: Any):
    picture, question = PICTURES[0], QUESTIONS[0]
    batch = ours.processor.batch([talk(question, picture, "two dogs")], train=True)
    output = ours.model(batch, logits="labels")
    loss = torch.nn.functional.cross_entropy(output.logits, output.targets)
    ours.model.zero_grad()
    loss.backward()
    theirs = inputs(made, question, picture)
    made.model.zero_grad()
    if not made.written:
        labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
        theirs |= {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}
        logits = made.model(**theirs).logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
    else:
        logits = made.model(**theirs, decoder_input_ids=batch.target_ids[:, :-1].contiguous()).logits
        expected = torch.nn.functional.cross_entropy(logits[0], batch.target_ids[0, 1:])
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    connector = ours.model.connectors["image"]
    pairs = [
        (connector.queries.grad, made.model.query_tokens.grad[0]),
        (connector.proj.weight.grad, made.model.language_projection.weight.grad),
        (
            ours.model.encoders["image"].patch.weight.grad,
            made.model.vision_model.embeddings.patch_embedding.weight.grad,
        ),
    ]
    for mine, theirs_grad in pairs:
        assert theirs_grad.abs().max() > 1e-4
        torch.testing.assert_close(mine, theirs_grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_same_text(made: Any, ours: Any, beams: int):
    """Greedy and by beams, each alone and as a batch of unequal lengths; a line break ends an answer after OPT."""
    newline = made.tokenizer("\n", add_special_tokens=False).input_ids
    stops = [
        made.tokenizer.eos_token_id,
        *(newline if made.model.config.model_type == "blip-2" and not made.written else []),
    ]
    expected = []
    for question, picture in zip(QUESTIONS, PICTURES, strict=True):
        theirs = inputs(made, question, picture)
        ids = made.model.generate(
            **theirs, max_new_tokens=12, do_sample=False, num_beams=beams, eos_token_id=stops, length_penalty=0.5
        )
        written = ids[0, theirs["input_ids"].shape[1] if not made.written else 0 :]
        expected.append(made.tokenizer.decode(written, skip_special_tokens=True).split("\n")[0])
    talks = [talk(question, picture) for question, picture in zip(QUESTIONS, PICTURES, strict=True)]
    options = {"max_new_tokens": 12, "num_beams": beams, "length_penalty": 0.5}
    found = [ours.generate(t, **options) for t in talks]
    assert [text.split("\n")[0] for text in found] == expected
    assert ours.generate(talks, **options) == found
    assert all(expected), "empty answers compare nothing"


def test_saved_again_in_our_layout(made: Any, ours: Any, tmp_path: Path):
    ours.save(tmp_path / "own")
    again = chiasm.load(tmp_path / "own")
    mine, theirs = ours.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert again.config.model.hash() == ours.config.model.hash()
    options = {"max_new_tokens": 6}
    question = talk(QUESTIONS[0], PICTURES[0])
    assert again.generate(question, **options) == ours.generate(question, **options)
    second = tmp_path / "own" / "instruction_tokenizer.json"
    assert second.is_file() == (made.reader is not None)
    if made.reader is not None:  # two letters exchanged: the Q-Former would read other words than it was trained on
        second.write_text(second.read_text().replace('"w"', '"?w"').replace('"h"', '"w"').replace('"?w"', '"h"'))
        with pytest.raises(FingerprintError):
            chiasm.load(tmp_path / "own")


@torch.no_grad()
def test_exported_folder_is_that_of_transformers(made: Any, ours: Any, tmp_path: Path):
    """Its class opens what we write and holds the same bits; its tokenizers and ours give the same ids of it."""
    ours.export(tmp_path / "out")
    theirs, told = type(made.model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    before, after = made.model.state_dict(), theirs.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    given = inputs(made, QUESTIONS[0], PICTURES[0])
    if made.written:
        given["decoder_input_ids"] = torch.tensor([[made.tokenizer.pad_token_id, 5, 9]])
    assert torch.equal(theirs.eval()(**given).logits, made.model(**given).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(QUESTIONS[0]).input_ids == made.tokenizer(QUESTIONS[0]).input_ids
    if made.reader is not None:
        reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "qformer_tokenizer")
        assert reader(QUESTIONS[0]).input_ids == made.reader(QUESTIONS[0]).input_ids
    images = transformers.BlipImageProcessorPil.from_pretrained(tmp_path / "out")
    pixels = images(PICTURES[0], return_tensors="pt").pixel_values
    assert torch.equal(pixels, given["pixel_values"])
    again = chiasm.load(tmp_path / "out")
    assert again.config.model.hash() == ours.config.model.hash()
    question = talk(QUESTIONS[0], PICTURES[0])
    assert again.generate(question, max_new_tokens=6) == ours.generate(question, max_new_tokens=6)


def test_what_a_folder_cannot_hold_is_not_exported(made: Any, ours: Any, tmp_path: Path):
    from chiasm.vlm import VLM

    spoken = ours.processor.config.template.edit(user_turn={"prefix": "Question: "})
    processing = ours.processor.config.model_copy(update={"template": spoken})
    processor = type(ours.processor)(processing, ours.tokenizer, ours.config.model.count)
    changed = VLM(ours.config.model_copy(update={"processing": processing}), ours.model, processor)
    with pytest.raises(CheckpointError, match=r"no counterpart of: processing.template.user_turn.prefix is 'Question"):
        changed.export(tmp_path / "out")
    assert not any((tmp_path / "out").iterdir()), "nothing is left of it"
    ours.export(tmp_path / "out")
    ours.export(tmp_path / "out")  # over an older one
    assert ours.config.model.hash() == chiasm.load(tmp_path / "out").config.model.hash()


def test_the_instruction_matters_and_is_not_cut(made: Any, ours: Any):
    """The same picture and prompt give other vectors when the Q-Former reads something else."""
    if made.reader is None:
        pytest.skip("BLIP-2's Q-Former reads no instruction")
    batch = ours.processor.batch([talk(q, PICTURES[0]) for q in QUESTIONS], add_generation_prompt=True)
    media = batch.media["image"]
    assert media.cond.mask.sum(1).tolist() != [media.cond.ids.shape[1]] * 2, "one of the two must be padded"
    with torch.no_grad():
        vectors = ours.model.encode("image", media, batch.ids, {})
        assert (vectors[:5] - vectors[5:]).abs().max() > 1e-3
        alone = ours.processor.batch([talk(QUESTIONS[0], PICTURES[0])], add_generation_prompt=True)
        single = ours.model.encode("image", alone.media["image"], alone.ids, {})
    torch.testing.assert_close(vectors[:5], single, atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match=r"sample '0': its instruction has \d+ tokens .* at most 96"):
        ours.processor.batch([talk("what " * 100, PICTURES[0])], add_generation_prompt=True)
    media.cond = None
    with pytest.raises(
        DataError, match="sample '0': connector 'image' reads the instruction, but the batch holds none"
    ):
        ours.model(batch)
    processing = ours.config.processing
    with pytest.raises(ConfigError, match="no second vocabulary"):
        chiasm.build(ours.config, device="meta", tokenizer=plain_tokenizer(made))
    assert processing.instruction.max_length == 96


def plain_tokenizer(made: Any) -> Any:
    """The folder's tokenizer without the one that reads instructions."""
    from chiasm.lm.tokenizer import Tokenizer as Ours
    from chiasm.lm.tokenizer_files import SECOND, TokenizerFiles

    content = Ours.from_folder(made.folder).files.content
    return Ours(TokenizerFiles.parse({k: v for k, v in content.items() if not k.startswith(SECOND)}))


def test_what_is_refused(made: Any, tmp_path: Path):
    import json
    import shutil

    shutil.copytree(made.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    values = json.loads(path.read_text())
    for changes, message in (
        ({"image_token_index": None}, "names no image_token_index"),
        ({"text_config": None}, "no text_config"),
        ({"num_query_tokens": 6}, r"\[5, 24\] in the file, \[6, 24\] in the model"),
    ):
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(CheckpointError, match=message):
            chiasm.load(tmp_path / "copy")
