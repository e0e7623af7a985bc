"""Folders of transformers' LLaVA classes: the same ids, pixels, logits and text; and back by export.

Reference: the models and processors of transformers, tiny and random, saved to disk. Those of LlavaNextVideo and
LlavaOnevision need torchvision, which is not used here: their image-processor classes give the pixels, and the token
arithmetic of their processor classes (their unbound methods) gives the ids.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hf_folders import (
    CLASSES,
    PINPOINTS,
    VISION,
    image_processor,
    make_model,
    make_processor,
    photo,
    save_folder,
    small_tokenizer,
)

import chiasm

KINDS = ("llava", "llava_next", "llava_next_video", "llava_onevision")
QUESTION, LONGER = "What is shown?", "Describe the two pictures in detail, first this one:"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each class: the reference model, the tokenizer, and its folder."""
    root = tmp_path_factory.mktemp("hf")
    made = {}
    for kind in KINDS:
        tokenizer = small_tokenizer()
        model = make_model(kind, tokenizer)
        made[kind] = SimpleNamespace(
            kind=kind, model=model, tokenizer=tokenizer, folder=save_folder(root / kind, kind, model, tokenizer)
        )
    return made


def conversations() -> dict[str, list[list[dict[str, Any]]]]:
    """Batches: one picture, several, none, and rows of unequal lengths."""
    one, two, three = photo(61, 37, 1), photo(30, 85, 2), photo(57, 57, 3)

    def user(text: str, *images: Any) -> dict[str, Any]:
        pictures = [{"type": "image", "image": image} for image in images]
        return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}

    def answer(text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}

    return {
        "one": [[user(QUESTION, one)]],
        "several": [[user(LONGER, one, two)]],
        "two turns": [[user(QUESTION, two), answer("A dog."), user("And here?", three)]],
        "none": [[user("The quick brown fox?")]],
        "batch": [[user(QUESTION, one)], [user("Name a fox.")], [user(LONGER, three, two)]],
    }


# ------------------------------------------------------------------------------------------------------ the reference


def reference(made: Any, batch: list[Any]) -> dict[str, Any]:
    """What transformers gives its model for a batch: left-padded ids, mask, pictures."""
    pictures = [
        [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        for messages in batch
    ]
    prompts = [prompt(made, messages) for messages in batch]
    flat = [p for row in pictures for p in row]
    if made.kind in ("llava", "llava_next"):
        processor = make_processor(made.kind, made.tokenizer)
        return dict(processor(images=flat or None, text=prompts, return_tensors="pt", padding=True))
    images: dict[str, Any] = {}
    if flat:
        nested = [row for row in pictures if row]
        pixels = image_processor(made.kind)(nested if made.kind == "llava_onevision" else flat, return_tensors="pt")
        images = dict(pixels)
    expanded = expand(made, prompts, images)
    return {**made.tokenizer(expanded, return_tensors="pt", padding=True), **images}


def prompt(made: Any, messages: list[Any]) -> str:
    stripped = [
        {
            "role": m["role"],
            "content": [{k: v for k, v in part.items() if k in ("type", "text")} for part in m["content"]],
        }
        for m in messages
    ]
    template = (made.folder / "chat_template.jinja").read_text()
    return made.tokenizer.apply_chat_template(
        stripped, chat_template=template, tokenize=False, add_generation_prompt=True
    )


def expand(made: Any, prompts: list[str], images: dict[str, Any]) -> list[str]:
    """Each placeholder repeated as often as the processor class of transformers says, without building one."""
    cls = getattr(transformers, CLASSES[made.kind] + "Processor")
    stand_in = cls.__new__(cls)
    stand_in.image_processor = SimpleNamespace(image_grid_pinpoints=made.model.config.image_grid_pinpoints)
    stand_in.image_token, stand_in.num_image_tokens, stand_in.patch_size = "<image>", 16, 7
    stand_in.num_additional_image_tokens, stand_in.vision_aspect_ratio = 1, "anyres_max_4"
    stand_in.vision_feature_select_strategy = made.model.config.vision_feature_select_strategy
    index, texts = 0, []
    for text in prompts:
        pieces = text.split("<image>")
        for i in range(len(pieces) - 1):
            pieces[i] += cls.replace_image_token(stand_in, images, index)
            index += 1
        texts.append("".join(pieces))
    return texts


def real_units(made: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The tiles of all pictures, without the padding of the reference's batch."""
    pixels = inputs["pixel_values"]
    if pixels.ndim == 4:
        return pixels
    grid = made.model.config.image_grid_pinpoints
    module = transformers.models.llava_next.modeling_llava_next
    counts = [module.image_size_to_num_patches(size, grid, VISION["image_size"]) for size in inputs["image_sizes"]]
    if "batch_num_images" in inputs:
        alone = [n == 1 for n in inputs["batch_num_images"].tolist() for _ in range(n)]
        counts = [count if single else 1 for count, single in zip(counts, alone, strict=True)]
    return torch.cat([row[:count] for row, count in zip(pixels, counts, strict=True)])


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", list(conversations()))
@pytest.mark.parametrize("kind", KINDS)
def test_ids_pixels_logits_and_text_are_those_of_transformers(folders: dict[str, Any], kind: str, name: str):
    made, batch = folders[kind], conversations()[name]
    theirs = reference(made, batch)
    vlm = chiasm.load(made.folder)
    ours = vlm.processor.batch(batch, add_generation_prompt=True, padding_side="left")
    real = theirs["attention_mask"].bool()
    assert torch.equal(ours.segment_ids != 0, real)
    assert torch.equal(ours.input_ids[real], theirs["input_ids"][real])
    if "pixel_values" in theirs:
        assert torch.equal(ours.media["image"].inputs, real_units(made, theirs))
    with torch.no_grad():
        expected = made.model(**theirs).logits
        found = vlm.model(ours, logits="all").logits
    assert expected[real].std() > 0.5  # nothing degenerate
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)
    texts = vlm.generate(batch, max_new_tokens=6)
    with torch.no_grad():
        made.model.generation_config.eos_token_id = made.tokenizer.eos_token_id
        ids = made.model.generate(**theirs, max_new_tokens=6, do_sample=False, pad_token_id=3)
    assert texts == made.tokenizer.batch_decode(ids[:, real.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_counts(folders: dict[str, Any], kind: str):
    vlm = chiasm.load(folders[kind].folder)
    logits = []
    for seed in (1, 9):
        content = [{"type": "image", "image": photo(61, 37, seed)}, {"type": "text", "text": QUESTION}]
        batch = vlm.processor.batch([[{"role": "user", "content": content}]])
        logits.append(vlm.model(batch, logits="last").logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llava_next_video", "llava_onevision"])
def test_video_tokens_and_logits(folders: dict[str, Any], kind: str):
    """Frames of the size the tower takes, so that no resize of the video processor (torchvision's) matters."""
    made = folders[kind]
    vlm = chiasm.load(made.folder)
    frames = [photo(28, 28, seed) for seed in range(3)]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "What happens?"}]
    batch = vlm.processor.batch([[{"role": "user", "content": content}]], add_generation_prompt=True)
    units = batch.media["video"].inputs
    fitted = torch.from_numpy(image_processor("llava", **stats(kind))(frames, return_tensors="np")["pixel_values"])
    assert torch.equal(units, fitted)
    cls = getattr(transformers, CLASSES[kind] + "Processor")
    stand_in = cls.__new__(cls)
    stand_in.video_token, stand_in.patch_size, stand_in.num_image_tokens = "<video>", 7, 16
    text = cls.replace_video_token(stand_in, {"pixel_values_videos": units[None]}, 0)
    video = made.tokenizer.convert_tokens_to_ids("<video>")
    assert int((batch.input_ids == video).sum()) == text.count("<video>")
    with torch.no_grad():
        expected = made.model(input_ids=batch.input_ids, pixel_values_videos=units[None]).logits
        found = vlm.model(batch, logits="all").logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def stats(kind: str) -> dict[str, Any]:
    return {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if kind == "llava_onevision" else {}


@pytest.mark.parametrize("layout", ["v4", "v5"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_key_layouts(folders: dict[str, Any], kind: str, layout: str, tmp_path: Path):
    made = folders[kind]
    other = save_folder(tmp_path / "x", kind, made.model, made.tokenizer, layout)
    one, two = chiasm.load(made.folder).state_dict(), chiasm.load(other).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_export_is_read_by_transformers(folders: dict[str, Any], kind: str, tmp_path: Path):
    made = folders[kind]
    chiasm.load(made.folder).export(tmp_path / "out", format="hf")
    cls = getattr(transformers, CLASSES[kind] + "ForConditionalGeneration")
    model, report = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = made.model.state_dict()
    again = model.state_dict()
    assert theirs.keys() == again.keys()
    assert all(torch.equal(theirs[name], again[name]) for name in theirs)
    inputs = reference(made, conversations()["batch"])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, made.model(**inputs).logits, atol=1e-5, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("What is <image> this?").input_ids == made.tokenizer("What is <image> this?").input_ids
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False, backend="pil")
    pixels = images([photo(61, 37, 1)], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, image_processor(kind)([photo(61, 37, 1)], return_tensors="pt")["pixel_values"])
    if kind in ("llava", "llava_next"):
        processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", use_fast=False, backend="pil")
        text = prompt(made, conversations()["one"][0])
        ids = processor(images=[photo(61, 37, 1)], text=text, return_tensors="pt")["input_ids"]
        assert torch.equal(ids, reference(made, conversations()["one"])["input_ids"])
    assert torch.equal(  # and we read our own export
        chiasm.load(tmp_path / "out").state_dict()["lm.embedding.weight"],
        theirs["model.language_model.embed_tokens.weight"],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again_is_the_same(folders: dict[str, Any], kind: str, tmp_path: Path):
    vlm = chiasm.load(folders[kind].folder)
    vlm.save(tmp_path / "own", max_shard=60_000)
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 1
    moved = (tmp_path / "own").rename(tmp_path / "a name that says nothing")
    again = chiasm.load(moved)
    assert again.config.model == vlm.config.model and again.config.processing == vlm.config.processing
    batch = conversations()["batch"]
    one = vlm.model(vlm.processor.batch(batch, add_generation_prompt=True), logits="all").logits
    two = again.model(again.processor.batch(batch, add_generation_prompt=True), logits="all").logits
    assert torch.equal(one, two)
    assert vlm.generate(batch, max_new_tokens=5) == again.generate(batch, max_new_tokens=5)


LMS = {
    "llama tied": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7, "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
}


@pytest.mark.parametrize("name", list(LMS))
def test_language_models_inside_llava(name: str, tmp_path: Path):
    tokenizer = small_tokenizer()
    tied = {"tie_word_embeddings": True} if "tied" in name else {}
    model = make_model("llava_next", tokenizer, text=LMS[name], **tied)
    folder = save_folder(tmp_path / "x", "llava_next", model, tokenizer)
    made = SimpleNamespace(kind="llava_next", model=model, tokenizer=tokenizer, folder=folder)
    vlm = chiasm.load(folder)
    assert vlm.config.model.lm.type == "decoder"
    batch = conversations()["batch"]
    theirs = reference(made, batch)
    ours = vlm.processor.batch(batch, add_generation_prompt=True, padding_side="left")
    real = theirs["attention_mask"].bool()
    with torch.no_grad():
        expected, found = model(**theirs).logits[real], vlm.model(ours, logits="all").logits[real]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    vlm.export(tmp_path / "out")
    again = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(**theirs).logits[real], expected, atol=1e-5, rtol=0)


def test_padding_of_llava_pictures(tmp_path: Path):
    """LlavaImageProcessor with do_pad: LLaVA-1.5's own square."""
    tokenizer = small_tokenizer()
    model = make_model("llava", tokenizer)
    folder = save_folder(tmp_path / "x", "llava", model, tokenizer)
    reference = transformers.LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"] = json.loads(reference.to_json_string())
    path.write_text(json.dumps(values))
    vlm = chiasm.load(folder)
    picture = photo(61, 37, 4)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    ours = vlm.processor.batch([[{"role": "user", "content": content}]]).media["image"].inputs
    assert torch.equal(ours, reference([picture], return_tensors="pt")["pixel_values"])
    vlm.export(tmp_path / "out")
    again = transformers.LlavaImageProcessorPil.from_pretrained(tmp_path / "out")
    assert torch.equal(ours, again([picture], return_tensors="pt")["pixel_values"])


def test_sharded_without_a_network_and_in_a_half_type(
    folders: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = folders["llava_onevision"]
    folder = save_folder(tmp_path / "a name that says nothing", made.kind, made.model, made.tokenizer)
    (folder / "model.safetensors").unlink()
    made.model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    one, two = chiasm.load(folder).state_dict(), chiasm.load(made.folder).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in two)
    half = chiasm.load(folder, dtype=torch.float16)
    half.save(tmp_path / "half")
    assert chiasm.load(tmp_path / "half").dtype == torch.float16  # as stored


def test_vocabulary_rows_beyond_the_tokenizer_are_kept(folders: dict[str, Any]):
    made = folders["llava"]
    rows = made.model.config.text_config.vocab_size
    assert rows > len(made.tokenizer)
    assert chiasm.load(made.folder).config.model.lm.vocab == rows


def test_pinpoints_that_disagree_are_refused(folders: dict[str, Any], tmp_path: Path):
    made = folders["llava_next"]
    folder = save_folder(tmp_path / "x", "llava_next", made.model, made.tokenizer, image_grid_pinpoints=PINPOINTS[:2])
    with pytest.raises(chiasm.ChiasmError, match="image_grid_pinpoints differ"):
        chiasm.load(folder)
