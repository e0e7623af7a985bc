"""Folders of transformers' Idefics: the same ids, pixels, masks, logits, gradients and text.

Reference: ``IdeficsForVisionText2Text``, tiny, every weight drawn anew and gates between 0.2 and 1.2 (they start at 0,
where a gated block does nothing and a comparison sees nothing).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hf_folders import photo, small_tokenizer

import chiasm
from chiasm.compose import build_model
from chiasm.errors import CheckpointError
from chiasm.vlm import VLM

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
VISION = {
    "embed_dim": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
PERCEIVER = {
    "use_resampler": True,
    "resampler_n_latents": 3,
    "resampler_depth": 2,
    "resampler_n_heads": 2,
    "resampler_head_dim": 5,
}
KINDS: dict[str, dict[str, Any]] = {
    "base": {"interval": 2, "norms": True, "gate": "float", "end": False},
    "instruct": {"interval": 1, "norms": False, "gate": "vector", "end": True},
}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.requires_grad_()  # transformers freezes the language model and the tower when it builds them
            noise = torch.randn(p.shape, generator=generator)
            gate = "alpha" in name
            norm = "norm" in name and name.endswith("weight")
            p.copy_(0.7 + 0.2 * noise.clamp(-2.5, 2.5) if gate else 1 + 0.2 * noise if norm else 0.12 * noise)
    return model.eval()


def make(kind: str, folder: Path) -> Any:
    """A random model, saved with the tokenizer and the image processor as transformers saves them."""
    options = KINDS[kind]
    tokenizer = small_tokenizer()
    base = len(tokenizer) - 1  # <image> moves to the end, as in the released tokenizers
    added = [FAKE, "<picture>", *([END] if options["end"] else [])]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    values = json.loads(tokenizer.backend_tokenizer.to_str().replace('"<image>"', '"<old>"'))
    values = json.loads(json.dumps(values).replace('"<picture>"', '"<image>"'))
    core = type(tokenizer.backend_tokenizer).from_str(json.dumps(values))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=[FAKE, IMAGE, *([END] if options["end"] else [])],
    )
    assert tokenizer.convert_tokens_to_ids(FAKE) == base + 1 == len(tokenizer) - len(added)
    config = transformers.IdeficsConfig(
        vocab_size=len(tokenizer) - len(added),
        additional_vocab_size=len(added),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        cross_layer_interval=options["interval"],
        qk_layer_norms=options["norms"],
        alpha_type=options["gate"],
        use_resampler=True,
        vision_config=VISION,
        perceiver_config=PERCEIVER | {"qk_layer_norms_perceiver": options["norms"]},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = randomise(transformers.IdeficsForVisionText2Text(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = transformers.IdeficsImageProcessorPil(size={"height": 28, "width": 28})
    images.save_pretrained(folder)
    processor = transformers.IdeficsProcessor.__new__(
        transformers.IdeficsProcessor
    )  # its own constructor wants torchvision
    return SimpleNamespace(
        kind=kind, model=model, tokenizer=tokenizer, images=images, folder=folder, processor=processor
    )


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(request.param, tmp_path_factory.mktemp(request.param) / "folder")


@pytest.fixture(scope="module")
def ours(made: Any) -> Any:
    return chiasm.load(made.folder)


ONE, TWO, THREE = photo(61, 37, 1), photo(30, 85, 2), photo(44, 44, 3)


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [p if isinstance(p, str) else {"type": "image", "image": p} for p in parts]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TALKS = {
    "one": [[user(ONE, "Describe the image.")]],
    "late": [[user(" A text that comes before its picture, ", TWO, "and what is it?")]],
    "neighbours": [[user(ONE, TWO, "What is shown?")]],
    "shots": [[user(ONE, "What?"), said("A cat."), user(THREE, "And this?"), said("A dog."), user(TWO, "And here?")]],
    "none": [[user(" The quick brown fox?")]],
    "batch": [[user(ONE, "What?")], [user(" Name a fox.")], [user(" First ", THREE, "then ", TWO, "what?")]],
}


def reference(made: Any, talks: list[Any], prompts: list[list[Any]]) -> dict[str, Any]:
    """What ``IdeficsProcessor`` gives its model, put together from its own functions."""
    from transformers.models.idefics import processing_idefics as theirs

    texts, pictures = [], []
    for prompt in prompts:
        text, found, after_image = made.tokenizer.bos_token, [], False
        for item in prompt:
            if isinstance(item, str):
                text, after_image = text + item, False
            else:
                text += (IMAGE if after_image else FAKE + IMAGE) + FAKE
                found.append(item)
                after_image = True
        texts.append(text)
        pictures.append(found)
    inputs = made.tokenizer(texts, add_special_tokens=False, padding="longest", return_tensors="pt")
    most = max(1, *(len(found) for found in pictures)) if len(pictures) > 1 else max(1, len(pictures[0]))
    pixels = torch.zeros(len(texts), most, 3, 28, 28)
    for row, found in enumerate(pictures):
        if found:
            pixels[row, : len(found)] = made.images(found, return_tensors="pt")
    if any(pictures):
        mask, _ = theirs.image_attention_mask_for_packed_input_ids(inputs.input_ids, made.tokenizer, "pt")
        mask = theirs.incremental_to_binary_attention_mask(mask, "pt", num_classes=most)
    else:
        mask = torch.zeros(*inputs.input_ids.shape, 1, dtype=torch.bool)
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "pixel_values": pixels,
        "image_attention_mask": mask,
    }


def prompts_of(made: Any, talks: list[Any]) -> list[list[Any]]:
    """Texts and pictures as the examples in transformers write them."""
    end = END if KINDS[made.kind]["end"] else ""
    found = []
    for talk in talks:
        prompt: list[Any] = []
        for turn in talk:
            if turn["role"] == "user":
                body = [p if isinstance(p, str) else p["image"] for p in turn["content"]]
                prompt += ["User:", *body, f"{end}\n"]
            else:
                prompt += [f"Assistant: {turn['content']}{end}\n"]
        found.append([*prompt, "Assistant:"])
    return found


@torch.no_grad()
@pytest.mark.parametrize("case", TALKS)
def test_ids_pixels_and_logits(made: Any, ours: Any, case: str):
    talks = TALKS[case]
    theirs = reference(made, talks, prompts_of(made, talks))
    batch = ours.processor.batch(talks, add_generation_prompt=True, padding_side="left")
    assert batch.input_ids.tolist() == theirs["input_ids"].tolist()
    expected = made.model(**theirs).logits
    output = ours.model(batch, logits="all")
    real = batch.segment_ids != 0
    torch.testing.assert_close(output.logits[real], expected[real], atol=1e-5, rtol=1e-5)
    if "image" in batch.media:
        shown = [p for row, mask in zip(theirs["pixel_values"], held(talks), strict=True) for p in row[:mask]]
        assert torch.equal(batch.media["image"].inputs, torch.stack(shown))
        swapped = theirs | {"pixel_values": theirs["pixel_values"].flip(-1) * 0.5}
        assert (made.model(**swapped).logits - expected)[real].abs().max() > 1e-3, "the picture must matter"


def held(talks: list[Any]) -> list[int]:
    return [
        sum(isinstance(p, dict) for turn in talk if turn["role"] == "user" for p in turn["content"]) for talk in talks
    ]


@torch.no_grad()
def test_all_earlier_pictures(made: Any, ours: Any):
    """The model of transformers takes any mask: with every earlier picture in it, it is ours with attend='all'."""
    from chiasm.compose import build_model

    talks = TALKS["shots"]
    theirs = reference(made, talks, prompts_of(made, talks))
    last = theirs["image_attention_mask"]
    theirs["image_attention_mask"] = last.flip(-1).cumsum(-1).flip(-1)
    assert (theirs["image_attention_mask"] != last).any()
    wide = build_model(ours.config.model.edit(attend="all")).eval()
    wide.load_state_dict(ours.model.state_dict())
    batch = ours.processor.batch(talks, add_generation_prompt=True)
    torch.testing.assert_close(wide(batch, logits="all").logits, made.model(**theirs).logits, atol=1e-5, rtol=1e-5)


def test_gradients(made: Any, ours: Any):
    talks = [[*talk, said("two dogs")] for talk in TALKS["batch"]]
    batch = ours.processor.batch(talks, train=True, padding_side="left")
    output = ours.model(batch, logits="labels")
    ours.model.zero_grad()
    torch.nn.functional.cross_entropy(output.logits, output.targets).backward()
    theirs = reference(made, talks, prompts_of(made, TALKS["batch"]))
    theirs["input_ids"], theirs["attention_mask"] = batch.input_ids, (batch.segment_ids != 0).long()
    from transformers.models.idefics import processing_idefics as functions

    mask, _ = functions.image_attention_mask_for_packed_input_ids(batch.input_ids, made.tokenizer, "pt")
    theirs["image_attention_mask"] = functions.incremental_to_binary_attention_mask(mask, "pt", num_classes=2)
    made.model.zero_grad()
    logits = made.model(**theirs).logits
    labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    ).backward()
    theirs_model, block = made.model.model, ours.model.cross[1]
    gated = theirs_model.gated_cross_attn_layers[1]
    pairs = {
        "latents": (ours.model.connectors["image"].latents, theirs_model.perceiver_resampler.latents),
        "attention gate": (block.attn_gate, gated.alpha_cross_attn),
        "perceptron gate": (block.mlp_gate, gated.alpha_dense),
        "keys": (block.k.weight, gated.cross_attn.k_proj.weight),
        "perceptron": (block.mlp.gate.weight, gated.mlp.gate_proj.weight),
        "pixels": (
            ours.model.encoders["image"].patch.weight,
            theirs_model.vision_model.embeddings.patch_embedding.weight,
        ),
    }
    for name, (mine, other) in pairs.items():
        assert other.grad.abs().max() > 1e-4, f"{name}: the comparison is empty"
        torch.testing.assert_close(mine.grad, other.grad.view_as(mine.grad), atol=1e-4, rtol=1e-4, msg=name)
    rows = made.model.config.vocab_size
    embedding = torch.cat(
        [theirs_model.embed_tokens.weight.grad, theirs_model.embed_tokens.additional_embedding.weight.grad]
    )
    assert len(embedding) > rows
    torch.testing.assert_close(ours.model.lm.embedding.weight.grad, embedding, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_same_text(made: Any, ours: Any, beams: int):
    """Alone and as a batch of unequal lengths, greedily and by beams; pieces of a stream joined are the text."""
    talks = TALKS["batch"] + TALKS["shots"]
    stops = [made.tokenizer.eos_token_id] + (
        [made.tokenizer.convert_tokens_to_ids(END)] if KINDS[made.kind]["end"] else []
    )
    expected = []
    for talk in talks:
        theirs = reference(made, [talk], prompts_of(made, [talk]))
        ids = made.model.generate(
            **theirs, max_new_tokens=10, do_sample=False, num_beams=beams, eos_token_id=stops, length_penalty=0.5
        )
        expected.append(made.tokenizer.decode(ids[0, theirs["input_ids"].shape[1] :], skip_special_tokens=True))
    options = {"max_new_tokens": 10, "num_beams": beams, "length_penalty": 0.5}
    cut = [text.split("\n")[0] if made.kind == "base" else text for text in expected]
    assert [ours.generate(talk, **options) for talk in talks] == cut
    assert ours.generate(talks, **options) == cut
    assert ours.generate(talks, use_cache=False, **options) == cut
    assert any(cut), "empty answers compare nothing"
    assert "".join(ours.generate(talks[0], stream=True, **options)) == cut[0]


def test_saved_again_and_exported(made: Any, ours: Any, tmp_path: Path):
    ours.save(tmp_path / "own")
    again = chiasm.load(tmp_path / "own")
    assert again.config.model.hash() == ours.config.model.hash()
    assert again.generate(TALKS["shots"][0], max_new_tokens=6) == ours.generate(TALKS["shots"][0], max_new_tokens=6)
    ours.export(tmp_path / "out", format="hf")
    theirs = transformers.IdeficsForVisionText2Text.from_pretrained(tmp_path / "out").eval()
    mine, other = theirs.state_dict(), made.model.state_dict()
    assert mine.keys() == other.keys()
    for key, value in other.items():
        torch.testing.assert_close(mine[key], value, atol=0, rtol=0)
    back = chiasm.load(tmp_path / "out").state_dict()
    assert all(torch.equal(back[k], v) for k, v in ours.state_dict().items())


def test_older_files_name_the_square_by_one_number(made: Any, ours: Any, tmp_path: Path):
    shutil.copytree(made.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "preprocessor_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "size"} | {"image_size": 28}))
    assert chiasm.load(tmp_path / "copy").config.processing == ours.config.processing


def test_what_is_refused(made: Any, ours: Any, tmp_path: Path):
    shutil.copytree(made.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    values = json.loads(path.read_text())
    for changes, message in (
        ({"use_resampler": False}, "use_resampler=false"),
        ({"cross_layer_interval": 3}, "cross_layer_interval=3 over 4 layers"),
        (
            {"perceiver_config": values["perceiver_config"] | {"resampler_n_latents": 4}},
            r"\[3, 16\] in the file, \[4, 16\]",
        ),
    ):
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(CheckpointError, match=message):
            chiasm.load(tmp_path / "copy")
    odd = ours.config.edit(**{"model.attend": "all"})  # the class looks at the last picture only
    other = VLM(odd, build_model(odd.model), ours.processor)
    with pytest.raises(CheckpointError, match=r"no counterpart of: attend is 'all', there 'last'"):
        other.export(tmp_path / "odd", format="hf")
