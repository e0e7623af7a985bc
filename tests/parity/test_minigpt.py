"""What transformers has no class for: MiniGPT's strips and its released file, Video-LLaMA's two levels; and clips of
InstructBLIP, for which it has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_folders import photo, randomise, small_tokenizer
from PIL import Image
from test_blip2_hf import bert_tokenizer

import chiasm
from chiasm.checkpoints import minigpt4 as released_layer
from chiasm.checkpoints.parts import load_part
from chiasm.compose import build_model
from chiasm.connectors.hierarchical import Hierarchical
from chiasm.connectors.neighbours import Neighbours
from chiasm.convert import maps_blip
from chiasm.convert.engine import export_tensors, load_weights
from chiasm.convert.io import open_weights
from chiasm.convert.rules import AnyRule
from chiasm.errors import CheckpointError, ConfigError
from chiasm.fusion.splice import Splice
from chiasm.lm.tokenizer import Tokenizer
from chiasm.presets import hf_blip2
from chiasm.presets.hf_parts import read_lm
from chiasm.presets.minigpt_v2 import asked
from chiasm.types import Batch, Condition, Count, Layout, MediaBatch, Tokens

RNG = torch.Generator().manual_seed(5)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG)


# --------------------------------------------------------------------------------------------------------------- strips


@torch.no_grad()
def test_strips_are_four_patches_of_a_row():
    """Token t is the sum over j of W[:, j-th quarter] x[row t // (C/4), column 4(t mod C/4) + j]."""
    rows, columns, width, out = 3, 8, 5, 7
    ours = Neighbours(Neighbours.Config(factor=4), {"image": width}, out).double()
    x = noise(2, rows * columns, width).double()
    picture = x.view(2, rows, columns, width)
    expected = torch.zeros(2, rows * columns // 4, out, dtype=torch.float64)
    for token in range(expected.shape[1]):
        row, first = divmod(token * 4, columns)
        for j in range(4):
            quarter = ours.proj.weight[:, j * width : (j + 1) * width]
            expected[:, token] += picture[:, row, first + j] @ quarter.T
    found = ours(Tokens(x, grid=(rows, columns)))
    torch.testing.assert_close(found.x, expected + ours.proj.bias, atol=1e-12, rtol=1e-12)
    assert found.grid == (3, 2) and ours.config.count(Count(24, (3, 8))) == Count(6, (3, 2))
    squares = picture[:, :2].reshape(2, 1, 2, 4, 2, width).transpose(2, 3).reshape(2, -1, 4 * width)
    assert (squares[:, 0] - x.reshape(2, -1, 4 * width)[:, 0]).abs().max() > 0.1, "a square is another order"


def test_strips_must_divide():
    with pytest.raises(ConfigError, match=r"257 tokens cannot be joined by 4; leave the class vector out"):
        Neighbours.Config().count(Count(257))


# -------------------------------------------------------------------------------------------------------- released file


@pytest.mark.parametrize("name", ["minigpt-4-vicuna-7b", "minigpt-4-llama-2-7b", "video-llama-7b"])
def test_released_projection(name: str, tmp_path: Path):
    model = build_model(chiasm.preset(name, tiny=True).model)
    layer = model.connectors["image"].proj
    before = {n: p.clone() for n, p in model.named_parameters()}
    values = {"llama_proj.weight": noise(*layer.weight.shape), "llama_proj.bias": noise(*layer.bias.shape)}
    torch.save({"model": values}, tmp_path / "pretrained.pth")
    released_layer.load(model, tmp_path / "pretrained.pth", allow_pickle=True)
    assert torch.equal(layer.weight, values["llama_proj.weight"])
    assert torch.equal(layer.bias, values["llama_proj.bias"])
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"connectors.image.proj.weight", "connectors.image.proj.bias"}
    torch.save({"model": values | {"other.weight": noise(2, 2)}}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"other\.weight"):
        released_layer.load(model, tmp_path / "more.pth", allow_pickle=True)
    torch.save({"model": {"llama_proj.weight": values["llama_proj.weight"]}}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="bias"):
        released_layer.load(model, tmp_path / "less.pth", allow_pickle=True)


def test_released_projection_needs_its_layer(tmp_path: Path):
    model = build_model(chiasm.preset("llava-1.5-7b", tiny=True).model)
    with pytest.raises(CheckpointError, match=r"fills the linear layer connectors\.image\.proj"):
        released_layer.load(model, tmp_path / "any.pth", allow_pickle=True)


# ----------------------------------------------------------------------------------------------------------- two levels

BODY = {"dim": 16, "heads": 2, "mlp": 24}


@torch.no_grad()
def test_two_levels_are_video_llamas():
    """Frame queries, positions, clip queries, one linear layer: transformers' Q-Formers in float64."""
    ours = Hierarchical(
        Hierarchical.Config.parse(
            {
                "type": "hierarchical",
                "frame": {**BODY, "depth": 3},
                "frame_queries": 3,
                "frames": 4,
                "clip": {**BODY, "depth": 2, "cross_every": 1},
                "queries": 2,
            }
        ),
        {"image": 6},
        10,
    ).double()
    for parameter in ours.parameters():
        parameter.copy_(noise(*parameter.shape) * 0.3)
    common = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "hidden_dropout_prob": 0.0}
    common |= {"attention_probs_dropout_prob": 0.0}
    levels = []
    for part, depth, every, width in (("frame", 3, 2, 6), ("clip", 2, 1, 16)):
        config = transformers.Blip2QFormerConfig(
            **common, num_hidden_layers=depth, cross_attention_frequency=every, encoder_hidden_size=width
        )
        theirs = transformers.Blip2QFormerModel(config).double().eval()
        given(theirs, getattr(ours, part), maps_blip.qformer_blip2())
        levels.append(theirs)
    x = noise(4, 5, 6).double()
    found = ours(Tokens(x, runs=(3, 1))).x
    for row, (start, stop) in enumerate(((0, 3), (3, 4))):
        queries = ours.frame_queries.expand(stop - start, -1, -1)
        frames = levels[0](query_embeds=queries, encoder_hidden_states=x[start:stop]).last_hidden_state
        memory = (frames + ours.positions[: stop - start, None]).reshape(1, -1, 16)
        states = levels[1](query_embeds=ours.queries[None], encoder_hidden_states=memory).last_hidden_state
        torch.testing.assert_close(found[row : row + 1], ours.proj(states), atol=1e-10, rtol=1e-10)


def given(theirs: torch.nn.Module, body: torch.nn.Module, rules: list[AnyRule]) -> None:
    """transformers' Q-Former with the weights of ours."""
    state = {f"body.{name}": tensor for name, tensor in body.state_dict().items()}
    theirs.load_state_dict(export_tensors(state, rules))


# -------------------------------------------------------------------------------------------------- InstructBLIP, clips

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QFORMER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 80,
    "max_position_embeddings": 96,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
FRAMES, QUERIES, CLIP = 4, 5, 89


def test_clips_of_instructblip(tmp_path: Path):
    """Two clips with instructions of unequal lengths: the vectors of all frames, logits, and the queries' gradient."""
    config = transformers.InstructBlipVideoConfig(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=LLAMA,
        num_query_tokens=QUERIES,
        video_token_index=CLIP,
    )
    theirs = transformers.InstructBlipVideoForConditionalGeneration(config)
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    lm = read_lm(config.text_config.to_dict())
    vision = hf_blip2.VISION | VISION
    model = {
        "type": "splice",
        "encoders": {"image": hf_blip2.tower(vision, "here")},
        "connectors": {"image": hf_blip2.bridge(hf_blip2.QFORMER | QFORMER, QUERIES, True, "here")},
        "lm": lm.config,
        "media": {"video": {"encoders": ["image"], "connector": "image", "merge": {"type": "flat"}}},
    }
    ours = build_model(Splice.Config.parse(model)).eval()
    load_weights(ours, open_weights(tmp_path), hf_blip2.rules(vision, maps_blip.qformer_instruct(), lm.rules))

    pixels = noise(2, FRAMES, 3, 28, 28)
    read = torch.randint(1, 80, (2, 7), generator=RNG)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    words = torch.randint(1, 80, (2, 6), generator=RNG)
    count = FRAMES * QUERIES
    ids = torch.cat((torch.full((2, count), CLIP), words), dim=1)
    expected = theirs(
        pixel_values=pixels, qformer_input_ids=read, qformer_attention_mask=mask.long(), input_ids=ids
    ).language_model_outputs.logits
    width = ids.shape[1]
    slots = (torch.arange(2)[:, None] * width + torch.arange(count)).flatten()
    layouts = [Layout(FRAMES, (3, 28, 28), original=(28, 28))] * 2
    media = MediaBatch(pixels.flatten(0, 1), layouts, slots, [count] * 2, [0, 1], cond=Condition(read, mask))
    places = torch.arange(width).expand(2, -1)
    ones = torch.ones(2, width, dtype=torch.long)
    batch = Batch(ids, places, ones, ones.bool(), {"video": media}, ["a", "b"])
    found = ours(batch, logits="all").logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected[0, -1] - expected[1, -1]).abs().max() > 1e-3
    weight = noise(*expected.shape)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    mine, other = ours.connectors["image"].queries.grad, theirs.query_tokens.grad[0]
    assert other.abs().max() > 1e-3
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    turned = ours(replaced(batch, pixels.flip(1).flatten(0, 1)), logits="all").logits
    assert (turned - found).abs().max() > 1e-3, "the order of frames must matter"


@torch.no_grad()
def test_folders_of_clips(tmp_path: Path):
    """``InstructBlipVideo…``: read, asked with a clip of its four frames, written, and read by transformers again."""
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    vocab = len(tokenizer) + 16
    clip = tokenizer.convert_tokens_to_ids("<video>")
    config = transformers.InstructBlipVideoConfig(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=LLAMA | {"vocab_size": vocab, "pad_token_id": tokenizer.pad_token_id},
        num_query_tokens=QUERIES,
        video_token_index=clip,
    )
    theirs = transformers.InstructBlipVideoForConditionalGeneration(config).eval()
    randomise(theirs)
    reader = bert_tokenizer()
    images = transformers.BlipImageProcessorPil(size={"height": 28, "width": 28})
    for save in (theirs, tokenizer, images):
        save.save_pretrained(tmp_path / "in")
    reader.save_pretrained(tmp_path / "in" / "qformer_tokenizer")
    ours = chiasm.load(tmp_path / "in")

    frames = [photo(61, 37, seed) for seed in range(FRAMES)]
    question = "what is the short question?"
    content = [{"type": "video", "video": frames}, {"type": "text", "text": question}]
    batch = ours.processor.batch([[{"role": "user", "content": content}]], add_generation_prompt=True)
    ids = [clip] * FRAMES * QUERIES + tokenizer(question).input_ids
    assert batch.input_ids.tolist() == [ids]
    read = reader(question, return_tensors="pt")
    pixels = torch.cat([images(frame, return_tensors="pt").pixel_values for frame in frames])[None]
    expected = theirs(
        pixel_values=pixels,
        qformer_input_ids=read.input_ids,
        qformer_attention_mask=read.attention_mask,
        input_ids=torch.tensor([ids]),
    ).language_model_outputs.logits
    torch.testing.assert_close(ours.model(batch, logits="all").logits, expected, atol=1e-5, rtol=1e-5)

    ours.export(tmp_path / "out")
    again = transformers.InstructBlipVideoForConditionalGeneration.from_pretrained(tmp_path / "out")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert chiasm.load(tmp_path / "out").config.model.hash() == ours.config.model.hash()


def replaced(batch: Batch, pixels: torch.Tensor) -> Batch:
    batch.media["video"].inputs = pixels
    return batch


def lavis_names(level: Any, prefix: str, queries: torch.Tensor) -> dict[str, torch.Tensor]:
    """A query transformer of ours under LAVIS's names, written down from its source."""
    names = {
        "attn.q": "attention.self.query",
        "attn.k": "attention.self.key",
        "attn.v": "attention.self.value",
        "attn.out": "attention.output.dense",
        "attn_norm": "attention.output.LayerNorm",
        "cross.q": "crossattention.self.query",
        "cross.k": "crossattention.self.key",
        "cross.v": "crossattention.self.value",
        "cross.out": "crossattention.output.dense",
        "cross_norm": "crossattention.output.LayerNorm",
        "query_mlp.fc1": "intermediate_query.dense",
        "query_mlp.fc2": "output_query.dense",
        "query_norm": "output_query.LayerNorm",
    }
    found = {f"{prefix}query_tokens": queries[None]}
    for name, tensor in level.state_dict().items():
        if name.startswith("norm."):
            found[f"{prefix}Qformer.bert.embeddings.LayerNorm.{name[5:]}"] = tensor
            continue
        _, number, rest = name.split(".", 2)
        stem, leaf = rest.rsplit(".", 1)
        found[f"{prefix}Qformer.bert.encoder.layer.{number}.{names[stem]}.{leaf}"] = tensor
    return found


def test_files_of_video_llama(tmp_path: Path):
    """BLIP-2's Q-Former into the first level; the released file into the rest; what is not whole is refused."""
    config = chiasm.preset("video-llama-7b", tiny=True)

    def made(seed: int) -> Any:
        torch.manual_seed(seed)
        model = build_model(config.model)
        randomise(model)
        return model

    source, target = made(1), made(2)
    theirs, mine = source.connectors["image"], target.connectors["image"]
    blip2 = lavis_names(theirs.frame, "", theirs.frame_queries)
    text = {"Qformer.bert.embeddings.word_embeddings.weight": torch.ones(3, 3), "temp": torch.ones(())}
    torch.save({"model": blip2 | text | {"visual_encoder.cls_token": torch.ones(1)}}, tmp_path / "blip2.pth")
    clip = mine.clip.state_dict()
    load_part(target, "connectors.image.frame", tmp_path / "blip2.pth", allow_pickle=True)
    for name, tensor in theirs.frame.state_dict().items():
        assert torch.equal(mine.frame.state_dict()[name], tensor)
    assert torch.equal(mine.frame_queries, theirs.frame_queries)
    assert all(torch.equal(mine.clip.state_dict()[n], clip[n]) for n in clip), "the second level stays as it was"

    released = lavis_names(theirs.clip, "video_", theirs.queries)
    released |= {"video_frame_position_embedding.weight": theirs.positions}
    released |= {"llama_proj.weight": theirs.proj.weight, "llama_proj.bias": theirs.proj.bias}
    torch.save({"model": released | {"audio_query_tokens": torch.ones(1)}}, tmp_path / "video.pth")
    load_part(target, "video_llama", tmp_path / "video.pth", allow_pickle=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor), name
    del released["video_query_tokens"]
    torch.save({"model": released}, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match=r"connectors\.image\.queries"):
        load_part(target, "video_llama", tmp_path / "broken.pth", allow_pickle=True)
    other = build_model(chiasm.preset("minigpt-4-vicuna-7b", tiny=True).model)
    with pytest.raises(CheckpointError, match="fills a connector 'image' of type 'hierarchical'"):
        load_part(other, "video_llama", tmp_path / "video.pth", allow_pickle=True)


# ------------------------------------------------------------------------------------- answers, and what a folder keeps

NEW = [
    "blip2-clip-l-opt-2.7b",
    "instructblip-video-vicuna-7b",
    "minigpt-4-vicuna-7b",
    "minigpt-4-llama-2-7b",
    "minigpt-v2",
    "minigpt-5",
    "minigpt-gated-sketch",
    "video-llama-7b",
]


@pytest.mark.parametrize("name", NEW)
def test_answers_and_folders(name: str, tmp_path: Path):
    """The same answer before and after a folder, to a picture and, where clips are read, to a clip."""
    tokenizer = Tokenizer.from_folder(Path(chiasm.__file__).parent / "weights" / "tiny-lm")
    tokenizer = tokenizer.with_instruction(tokenizer) if name.startswith("instructblip") else tokenizer
    torch.manual_seed(2)
    vlm = chiasm.build(chiasm.preset(name, tiny=True, vocab=tokenizer.vocab_size), tokenizer=tokenizer)
    picture = Image.fromarray((torch.rand(20, 30, 3, generator=RNG) * 255).to(torch.uint8).numpy())
    media = [{"type": "image", "image": picture}]
    if "video" in vlm.config.processing.media:
        media.append({"type": "video", "video": [picture] * 5})
    talks = [[{"role": "user", "content": [m, {"type": "text", "text": "What is this?"}]}] for m in media]
    answers = vlm.generate(talks, max_new_tokens=5)
    assert len(answers) == len(media) and all(isinstance(text, str) for text in answers)
    vlm.save(tmp_path / "model")
    again = chiasm.load(tmp_path / "model")
    mine, theirs = vlm.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert again.generate(talks, max_new_tokens=5) == answers


def test_tasks_of_minigpt_v2():
    assert asked("vqa", "What is this?") == "[vqa] What is this?"
    with pytest.raises(ConfigError, match="MiniGPT-v2 has no task 'vqq'"):
        asked("vqq", "What is this?")
    image = chiasm.preset("minigpt-v2").processing.media["image"]
    assert image.size == 448 and chiasm.preset("minigpt-v2").count("image", Layout(1, (3, 448, 448))) == 256
