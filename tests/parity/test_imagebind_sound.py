"""Sounds: the filter bank of transformers, resampling against tones, ImageBind's tower against torch's own attention,
and Video-LLaMA's branch for sounds against transformers' query transformer.
"""

from __future__ import annotations

import math
import wave
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_minigpt import given, lavis_names
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

import chiasm
from chiasm.connectors.hierarchical import Timeline
from chiasm.convert import maps_blip
from chiasm.encoders.imagebind import ImageBindAudio
from chiasm.errors import CheckpointError, ConfigError, DataError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.presets.video_llama import heard
from chiasm.processing.audio import AudioFrontEnd, bands, filter_bank, resampled
from chiasm.processing.base import Place
from chiasm.types import Audio, Tokens

RNG = torch.Generator().manual_seed(11)
PLACE = Place("s", 0, 1)
FLOOR = 1.192092955078125e-07


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- processing


def theirs(samples: np.ndarray) -> np.ndarray:
    """The bank of ``ASTFeatureExtractor``, ``[L, 128]``."""
    mels = mel_filter_bank(257, 128, 20, 8000, 16000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    return spectrogram(
        samples, window_function(400, "hann", periodic=False), frame_length=400, hop_length=160, fft_length=512,
        power=2.0, center=False, preemphasis=0.97, mel_filters=mels, log_mel="log", mel_floor=FLOOR,
        remove_dc_offset=True,
    ).T  # fmt: skip


def test_the_filter_bank_is_transformers():
    tone = torch.sin(torch.arange(32000, dtype=torch.float64) * 0.3) * 0.4 + 0.02 * noise(32000) + 0.1
    found, expected = filter_bank(tone, 16000, 128), torch.from_numpy(theirs(tone.numpy()))
    assert found.shape == (198, 128) == tuple(expected.shape) and found.std() > 1
    torch.testing.assert_close(found, expected.double(), atol=1e-4, rtol=0)


def test_bands_are_triangles():
    """Neighbours add up to one between the middles of the first and last; nothing beyond half the rate."""
    table = bands(16000, 512, 20)
    inside = table.sum(1)[10:200]
    torch.testing.assert_close(inside, torch.ones_like(inside))
    assert (table[-1] == 0).all() and (table >= 0).all() and (table.sum(0) > 0).all()


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_tones_keep_their_pitch_at_another_rate(rate: int):
    """A tone below half of both rates is the same function of time; one above it is gone."""
    t, wanted = torch.arange(rate, dtype=torch.float64) / rate, torch.arange(16000, dtype=torch.float64) / 16000
    found = resampled(torch.sin(2 * math.pi * 1000 * t), rate, 16000)
    assert len(found) == 16000
    middle = slice(200, -200)
    torch.testing.assert_close(found[middle], torch.sin(2 * math.pi * 1000 * wanted)[middle], atol=2e-3, rtol=0)
    if rate > 20000:
        assert resampled(torch.sin(2 * math.pi * 10000 * t), rate, 16000)[middle].abs().max() < 1e-2


def test_pieces_lie_evenly():
    """The first begins with the recording, the last ends with it (pytorchvideo's sampler)."""
    front_end = AudioFrontEnd(AudioFrontEnd.Config(clips=3, seconds=2.0))
    assert front_end.spans(16000 * 6) == [(0, 32000), (32000, 64000), (64000, 96000)]
    assert front_end.spans(16000 * 3) == [(0, 32000), (8000, 40000), (16000, 48000)]
    assert front_end.spans(8000) == [(0, 8000)] * 3
    one = AudioFrontEnd(AudioFrontEnd.Config(clips=1))
    assert one.spans(16000 * 6) == [(0, 32000)]


def test_a_piece_is_normalised_and_filled():
    sound = (0.2 * noise(2, 16000 * 3)).numpy()
    config = AudioFrontEnd.Config(clips=2, channels="first")
    item = AudioFrontEnd(config)(Audio(sound, rate=16000), PLACE)
    assert (
        item.inputs.shape == (2, 1, 128, 204) and item.layout.shape == config.unit_shape and item.inputs.is_contiguous()
    )
    for unit, start in zip(item.inputs, (0, 16000), strict=True):
        piece = sound[0, start : start + 32000]
        bank = theirs(piece - piece.mean()).T
        expected = (np.pad(bank, ((0, 0), (0, 6))) + 4.268) / 9.138
        assert np.abs(unit[0].numpy() - expected).max() < 1e-4
    both = AudioFrontEnd(config.model_copy(update={"channels": "mean"}))(Audio(sound, rate=16000), PLACE)
    alone = AudioFrontEnd(config)(Audio(sound.mean(0), rate=16000), PLACE)
    assert torch.equal(both.inputs, alone.inputs) and not torch.equal(both.inputs, item.inputs)


def wav(samples: np.ndarray, rate: int = 16000) -> bytes:
    data = BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return data.getvalue()


def test_files_bytes_addresses_and_samples_are_one_sound(tmp_path: Path):
    import base64

    pcm = (3000 * noise(20000).numpy()).astype(np.int16)
    path = tmp_path / "sound.wav"
    path.write_bytes(wav(pcm))
    url = "data:audio/wav;base64," + base64.b64encode(wav(pcm)).decode()
    front_end = AudioFrontEnd(AudioFrontEnd.Config())
    expected = front_end(Audio(pcm, rate=16000), PLACE).inputs
    assert expected.std() > 0.1
    for data in (path, str(path), wav(pcm), url, pcm / 32768):
        rate = 16000 if isinstance(data, np.ndarray) else None
        assert torch.equal(front_end(Audio(data, rate=rate), PLACE).inputs, expected)


@pytest.mark.parametrize(
    "data, rate, message",
    [
        (b"not a sound at all", None, "not a sound that can be opened"),
        ([0.1, 0.2], None, "need their rate"),
        ([], 16000, "0 samples"),
        ([float("nan")] * 5000, 16000, "no numbers"),
        ([0.1] * 400000, 16000, "longer than the limit of 20 s"),
        (wav(np.zeros(400000)), None, "longer than the limit of 20 s"),
        (wav(np.zeros(0)), None, "0 samples"),
        ("nowhere.wav", None, "does not exist"),
        ("http://host/a.wav", None, "nothing is fetched"),
        ([0.1] * 5000, 44101, "resample it first"),
        (np.zeros((1, 2, 3)), 16000, "shape [1, 2, 3]"),
        (5, 16000, "cannot be made from int"),
    ],
)
def test_bad_sounds_are_one_clear_error(data: Any, rate: int | None, message: str):
    front_end = AudioFrontEnd(AudioFrontEnd.Config(max_seconds=20))
    with pytest.raises(DataError) as told:
        front_end(Audio(data, rate=rate), PLACE)
    assert message in str(told.value) and str(told.value).startswith(str(PLACE))


@pytest.mark.data
def test_real_recordings(shared_data: Path):
    """Files of several kinds and rates open; what is spoken differs from what is silent."""
    front_end = AudioFrontEnd(AudioFrontEnd.Config(clips=2))
    made = {
        path.name: front_end(Audio(path), PLACE).inputs
        for path in sorted((shared_data / "audio" / "clips").iterdir())[:8]
        if path.suffix in (".wav", ".flac")
    }
    assert len(made) >= 5 and all(torch.isfinite(x).all() and x.std() > 0.1 for x in made.values())
    assert len({float(x.mean()) for x in made.values()}) == len(made)


# --------------------------------------------------------------------------------------------------------------- tower

SMALL = {"bins": 12, "frames": 20, "patch": 4, "stride": 3, "dim": 16, "depth": 2, "heads": 2, "mlp": 24, "out": 6}


def reference(tower: ImageBindAudio, x: Tensor) -> Tensor:
    """The published formulas with torch's ``MultiheadAttention(add_bias_kv=True)``, which is what the authors use."""
    c = tower.config
    x = torch.nn.functional.conv2d(x, tower.patch.weight, stride=c.stride)  # [U, D, rows, columns]
    x = torch.stack([x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])], dim=1)
    x = torch.nn.functional.layer_norm(x, (c.dim,), tower.patch_norm.weight, tower.patch_norm.bias, 1e-5)
    x = torch.cat([tower.cls.view(1, 1, -1).repeat(len(x), 1, 1), x], 1) + tower.positions

    def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
        spread = x.var(-1, unbiased=False, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt() * layer.weight + layer.bias

    for block in tower.blocks:
        theirs, ours = nn.MultiheadAttention(c.dim, c.heads, add_bias_kv=True, batch_first=True).to(x), block.attn
        theirs.in_proj_weight.data = torch.cat([ours.q.weight, ours.k.weight, ours.v.weight])
        theirs.in_proj_bias.data = torch.cat([ours.q.bias, ours.k.bias, ours.v.bias])
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        theirs.bias_k.data, theirs.bias_v.data = ours.extra_key.view(1, 1, -1), ours.extra_value.view(1, 1, -1)
        seen = norm(block.norm1, x)
        x = x + theirs(seen, seen, seen, need_weights=False)[0]
        hidden = norm(block.norm2, x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    x = norm(tower.norm, x)[:, 0] @ tower.proj.weight.T
    return 20.0 * x / x.norm(dim=-1, keepdim=True)


def small_tower() -> ImageBindAudio:
    tower = ImageBindAudio(ImageBindAudio.Config(**SMALL)).double()
    for p in tower.parameters():
        p.data = p.data + 0.2 * torch.randn(p.shape, generator=RNG, dtype=torch.float64)
    return tower


@torch.no_grad()
def test_the_tower_is_imagebinds():
    tower, x = small_tower(), noise(3, 1, 12, 20)
    found = tower(x)
    assert found.x.shape == (3, 1, 6) and tower.config.patches == 18
    torch.testing.assert_close(found.x[:, 0], reference(tower, x), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.x.norm(dim=-1), torch.full((3, 1), 20.0, dtype=torch.float64))
    assert (found.x[0] - found.x[1]).abs().max() > 0.1
    one = tower(x[:1]).x
    torch.testing.assert_close(one, found.x[:1], atol=1e-12, rtol=1e-12)


def test_every_parameter_of_the_tower_runs():
    tower = small_tower()
    (tower(noise(2, 1, 12, 20)).x * noise(2, 1, 6)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-9 for p in tower.parameters())


def test_published_size():
    """``imagebind_huge``: its tower for sounds, by the shapes of its released file."""
    with torch.device("meta"):
        tower = ImageBindAudio(ImageBindAudio.Config())
    block = 4 * (768 * 768 + 768) + 2 * 768 + 768 * 3072 + 3072 + 3072 * 768 + 768 + 4 * 768
    rest = 768 * 256 + 2 * 768 + 768 + 229 * 768 + 2 * 768 + 768 * 1024
    assert sum(p.numel() for p in tower.parameters()) == 12 * block + rest == 86_235_648


def test_other_sizes_are_refused():
    tower = small_tower()
    with pytest.raises(DataError, match=r"shape \(1, 12, 20\) was expected, got \(1, 12, 21\)"):
        tower(noise(1, 1, 12, 21))
    with pytest.raises(ConfigError, match="hold no patch"):
        ImageBindAudio.Config(bins=8)


# ------------------------------------------------------------------------------------------------- Video-LLaMA's branch

TINY_LM = Path(chiasm.__file__).parent / "weights" / "tiny-lm"


@torch.no_grad()
def test_the_branch_is_video_llamas():
    """Positions on ImageBind's vectors, transformers' Q-Former of blocks that all cross, one linear layer."""
    width, dim, out = 24, 32, 16
    ours = Timeline(Timeline.Config(dim=dim, heads=4, mlp=64, queries=4), {"audio": width}, out).eval()
    for p in ours.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=RNG) + p
    config = transformers.Blip2QFormerConfig(
        hidden_size=dim, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        cross_attention_frequency=1, encoder_hidden_size=width,
    )  # fmt: skip
    theirs = transformers.Blip2QFormerModel(config).eval()
    given(theirs, ours.body, maps_blip.qformer_blip2())
    theirs, ours = theirs.double(), ours.double()
    x, runs = noise(3 + 8, 1, width), (3, 8)
    found = ours(Tokens(x, runs=runs)).x
    for row, pieces in enumerate(x.split(list(runs))):
        heard_ = pieces[:, 0] + ours.positions[: len(pieces)]
        state = theirs(query_embeds=ours.queries[None], encoder_hidden_states=heard_[None]).last_hidden_state
        expected = state @ ours.proj.weight.T + ours.proj.bias
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-10, rtol=1e-10)
    with pytest.raises(DataError, match="9 units does not fit the 8 positions"):
        ours(Tokens(noise(9, 1, width), runs=(9,)))


def tiny(seed: int) -> Any:
    tokenizer = Tokenizer.from_folder(TINY_LM)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = chiasm.preset("video-llama-7b-audio", tiny=True, vocab=tokenizer.vocab_size)
        return chiasm.build(config, tokenizer=tokenizer).eval()


def test_files_of_both_branches(tmp_path: Path):
    """ImageBind's file into the tower, the audio branch's into its Q-Former; the other branch stays as it was."""
    source, target = tiny(1), tiny(2)
    tower, names = source.model.encoders["audio"], {}
    for name, tensor in tower.state_dict().items():
        block, _, rest = name.removeprefix("blocks.").partition(".")
        at = f"modality_trunks.audio.blocks.{block}."
        if name in ("cls", "positions"):
            key = {"cls": "cls_token", "positions": "pos_embedding_helper.pos_embed"}[name]
            names["modality_preprocessors.audio." + key] = tensor.view(1, -1, tensor.shape[-1])
        elif name.startswith("patch"):
            stem = name.replace("patch_norm", "norm_layer").replace("patch.", "proj.")
            names["modality_preprocessors.audio.rgbt_stem." + stem] = tensor
        elif rest.endswith(("extra_key", "extra_value")):
            names[at + "attn.bias_" + rest[11]] = tensor.view(1, 1, -1)
        elif rest.startswith(("attn.out", "norm", "mlp")):
            rest = rest.replace("attn.out", "attn.out_proj").replace("norm1", "norm_1").replace("norm2", "norm_2")
            names[at + rest] = tensor
        elif name.startswith("norm") or name == "proj.weight":
            names["modality_heads.audio." + name.replace("norm", "0").replace("proj", "2")] = tensor
    for i, block in enumerate(tower.blocks):
        for leaf in ("weight", "bias"):
            three = [getattr(getattr(block.attn, x), leaf).detach() for x in "qkv"]
            names[f"modality_trunks.audio.blocks.{i}.attn.in_proj_{leaf}"] = torch.cat(three)
    names["modality_postprocessors.audio.1.log_logit_scale"] = torch.tensor(3.0)
    names["modality_trunks.vision.blocks.0.norm_1.weight"] = torch.ones(3)
    torch.save(names, tmp_path / "imagebind_huge.pth")
    target.load_part("encoders.audio", tmp_path / "imagebind_huge.pth", allow_pickle=True)
    found = target.model.encoders["audio"].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tower.state_dict().items())

    branch = source.model.connectors["audio"]
    released = lavis_names(branch.body, "audio_", branch.queries)
    released |= {"audio_position_embedding.weight": branch.positions, "audio_encoder.x": torch.ones(1)}
    released |= {f"audio_llama_proj.{leaf}": getattr(branch.proj, leaf) for leaf in ("weight", "bias")}
    torch.save({"model": released}, tmp_path / "audio.pth")
    before = {n: t.clone() for n, t in target.model.connectors["image"].state_dict().items()}
    target.load_part("video_llama", tmp_path / "audio.pth", allow_pickle=True)
    after = target.model.connectors
    assert all(torch.equal(after["audio"].state_dict()[n], t) for n, t in branch.state_dict().items())
    assert all(torch.equal(after["image"].state_dict()[n], t) for n, t in before.items())
    del released["audio_query_tokens"]
    torch.save({"model": released}, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match=r"connectors\.audio\.queries"):
        target.load_part("video_llama", tmp_path / "broken.pth", allow_pickle=True)


def test_a_clip_and_its_sound(tmp_path: Path):
    """The demo's question; an answer depends on the sound; a folder keeps all; a batch equals each alone."""
    vlm = tiny(3)
    frames = [Image.new("RGB", (20, 20), (40 * i, 10, 90)) for i in range(5)]
    t = np.arange(8000) / 16000
    sounds = [Audio(np.sin(2 * np.pi * f * t), rate=16000) for f in (300, 2500)]
    talks = [heard("What is it?", sound.data, frames) for sound in sounds]
    for talk, sound in zip(talks, sounds, strict=True):
        talk[0]["content"][1]["rate"] = sound.rate
    sample = vlm.processor(talks[0], add_generation_prompt=True)
    text = vlm.processor.decode([i for i in sample.input_ids.tolist() if i != vlm.processor.tokenizer.id_of("<image>")])
    assert [item.kind for item in sample.media] == ["audio", "video"]
    assert [len(item.slots) for item in sample.media] == [4, 8]
    assert "based on the sound that:" in text and "you see that <Video></Video>." in text.replace("> <", "><")
    both = vlm.model(vlm.processor.batch(talks, add_generation_prompt=True), logits="last").logits
    each = [vlm.model(vlm.processor.batch([t], add_generation_prompt=True), logits="last").logits for t in talks]
    torch.testing.assert_close(both, torch.cat(each), atol=1e-5, rtol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-4
    vlm.save(tmp_path / "model")
    again = chiasm.load(tmp_path / "model")
    assert again.generate(talks, max_new_tokens=4) == vlm.generate(talks, max_new_tokens=4)
