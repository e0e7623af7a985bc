"""What transformers has no class for: MiniGPT's strips and its released file, Video-LLaMA's two levels; and clips of
InstructBLIP, for which it has one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hf_folders import randomise
from PIL import Image

import chiasm
from chiasm.checkpoints import minigpt4 as released
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
    released.load(model, tmp_path / "pretrained.pth", allow_pickle=True)
    assert torch.equal(layer.weight, values["llama_proj.weight"])
    assert torch.equal(layer.bias, values["llama_proj.bias"])
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"connectors.image.proj.weight", "connectors.image.proj.bias"}
    torch.save({"model": values | {"other.weight": noise(2, 2)}}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"other\.weight"):
        released.load(model, tmp_path / "more.pth", allow_pickle=True)
    torch.save({"model": {"llama_proj.weight": values["llama_proj.weight"]}}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="bias"):
        released.load(model, tmp_path / "less.pth", allow_pickle=True)


def test_released_projection_needs_its_layer(tmp_path: Path):
    model = build_model(chiasm.preset("llava-1.5-7b", tiny=True).model)
    with pytest.raises(CheckpointError, match=r"fills the linear layer connectors\.image\.proj"):
        released.load(model, tmp_path / "any.pth", allow_pickle=True)


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


def replaced(batch: Batch, pixels: torch.Tensor) -> Batch:
    batch.media["video"].inputs = pixels
    return batch


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
