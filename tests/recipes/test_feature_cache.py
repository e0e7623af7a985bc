"""Stored features: equal losses, nothing opened or encoded twice, and never another medium's or encoder's features."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from rich.console import Console
from tiny_run import renderer, source, tiny_vlm, write_pictures

from chiasm.data.features import FeatureCache, FeatureStore
from chiasm.data.features.cache import StoredRenderer
from chiasm.data.features.content import Contents, weights_hash
from chiasm.data.mixture import Entry, Mixture
from chiasm.errors import ConfigError
from chiasm.processing.base import Place
from chiasm.train.log import read_log
from chiasm.train.loop import StageRun
from chiasm.train.recipe import Stage
from chiasm.types import Image, Layout, Tokens, Video


def fit(vlm, data: Path, out: Path, **settings) -> tuple[StageRun, list[float], str]:
    """A run of three epochs; its losses and what it printed."""
    settings = {"name": "s", "plan": "align", "steps": 9, "batch_size": 3, "lr": 1e-2, "log_every": 1} | settings
    console = Console(file=io.StringIO(), width=200)
    mixture = Mixture({"colors": Entry(source=source(data))})
    run = StageRun(
        vlm.model, renderer(vlm, pack=settings.get("pack", False)), Stage(**settings), mixture, out, None, console
    )
    run.fit()
    return run, [r["loss"] for r in read_log(out / "log.jsonl")], console.file.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


@pytest.mark.parametrize("settings", [{}, {"pack": True}, {"workers": 2}, {"dtype": "bf16"}, {"plan": "instruct"}])
def test_cached_equals_uncached(data, tmp_path, settings):
    plain = fit(tiny_vlm(tmp_path), data, tmp_path / "plain", **settings)[1]
    folder = str(tmp_path / "features")
    first = fit(tiny_vlm(tmp_path), data, tmp_path / "first", feature_cache=folder, **settings)[1]
    run, second, _ = fit(tiny_vlm(tmp_path), data, tmp_path / "second", feature_cache=folder, **settings)
    bound = 2e-2 if settings.get("dtype") == "bf16" else 1e-6
    assert len(plain) == 9 and plain[0] != plain[-1]
    assert max(abs(a - b) for a, b in zip(plain, first, strict=True)) <= bound
    assert first == second  # stored once, read always
    assert run.features.encoded == 0 and run.features.read > 9


def test_from_the_second_epoch_on_nothing_is_opened_or_encoded(data, tmp_path, monkeypatch):
    vlm = tiny_vlm(tmp_path)
    opened, encoded = [], []
    front_end, encoder = vlm.processor.front_ends["image"], vlm.model.encoders["image"]
    original = type(front_end).open
    monkeypatch.setattr(type(front_end), "open", lambda s, d, p: opened.append(str(d)) or original(s, d, p))
    encoder.register_forward_hook(lambda m, i, o: encoded.append(len(i[0])))
    _, _, told = fit(vlm, data, tmp_path / "run", feature_cache=str(tmp_path / "features"), steps=12)
    assert len(opened) == len(set(opened)) == 8 and sum(encoded) == 8  # 12 steps of 3 see each of 8 pictures 4 times
    assert "8 media stored" in told and "encoding saved" in told


def test_off_when_the_encoder_trains(data, tmp_path):
    run, _, told = fit(
        tiny_vlm(tmp_path), data, tmp_path / "run", plan="end_to_end", feature_cache=str(tmp_path / "features")
    )
    assert not run.features.stores and "off, the encoder of image trains" in told
    assert not (tmp_path / "features").exists()


def test_another_encoder_or_type_has_another_folder(data, tmp_path):
    folder = tmp_path / "features"
    fit(tiny_vlm(tmp_path), data, tmp_path / "a", feature_cache=str(folder), steps=1)
    other = tiny_vlm(tmp_path)
    last = list(other.model.encoders["image"].parameters())[-1]
    with torch.no_grad():
        last.view(-1)[-1] += 1e-3
    fit(other, data, tmp_path / "b", feature_cache=str(folder), steps=1)
    fit(tiny_vlm(tmp_path), data, tmp_path / "c", feature_cache=str(folder), steps=1, dtype="bf16")
    assert len(list(folder.iterdir())) == 3
    assert weights_hash(other.model.encoders["image"]) != weights_hash(tiny_vlm(tmp_path).model.encoders["image"])


def test_a_changed_picture_is_another(data, tmp_path):
    picture = data / "pictures" / "0.png"
    contents = Contents()
    before = contents.of(Image(str(picture)))
    assert before and before == Contents().of(Image(picture)) != contents.of(Image(str(data / "pictures" / "1.png")))
    assert contents.of(Image(picture.read_bytes())) and contents.of(Image(str(data / "missing.png"))) == ""
    Pillow.new("RGB", (16, 16), (1, 2, 3)).save(picture)
    assert contents.of(Image(str(picture))) != before


def test_content_tells_apart_what_looks_alike():
    contents = Contents()
    pixels = np.arange(48, dtype=np.uint8)
    palette = Pillow.fromarray(pixels.reshape(4, 12)).convert("P")
    other = palette.copy()
    other.putpalette([255 - v for v in palette.getpalette()])
    media = [
        Image(pixels.reshape(4, 4, 3)),
        Image(pixels.reshape(2, 8, 3)),
        Image(palette),
        Image(other),
        Video([palette, other]),
        Video([other, palette]),
        Video([palette, other], fps=2.0),
    ]
    marks = [contents.of(medium) for medium in media]
    assert all(marks) and len(set(marks)) == len(marks)
    assert contents.of(Image(object())) == ""


def tokens(value: float, dtype: torch.dtype = torch.float32) -> dict[str, Tokens]:
    return {"a": Tokens(torch.full((2, 4, 3), value, dtype=dtype), grid=(2, 2)), "b": Tokens(torch.ones(2, 1, 5))}


LAYOUT = Layout(2, (3, 8, 8), (1, 1), (5, 9))


def write(folder: str, number: int) -> None:
    store = FeatureStore(folder)
    for i in range(20):
        store.add([(f"{number}-{i}-{j}", LAYOUT, tokens(100 * number + i + j / 8)) for j in range(3)])


def test_several_writers_share_a_folder(tmp_path):
    reader = FeatureStore(tmp_path)
    assert reader.get("0-0-0") is None
    processes = [multiprocessing.get_context("fork").Process(target=write, args=(str(tmp_path), n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for n in range(3):
        for i in range(20):
            got = reader.get(f"{n}-{i}-2")
            assert torch.equal(got["a"].x, tokens(100 * n + i + 2 / 8)["a"].x) and got["a"].grid == (2, 2)
    assert len(reader) == 180 and reader.layout("1-1-1") == LAYOUT
    assert pickle.loads(pickle.dumps(reader)).layout("1-1-1") == LAYOUT


def test_a_killed_write_is_not_seen(tmp_path):
    store = FeatureStore(tmp_path)
    store.add([("whole", LAYOUT, tokens(1.0, torch.bfloat16))])
    index = next(tmp_path.glob("*.index"))
    line = json.dumps([{"key": "half", "layout": [], "dtype": "float32", "at": {}, "bytes": 0}])
    with index.open("a") as stream:
        stream.write(line[:20])
    again = FeatureStore(tmp_path)
    assert again.get("half") is None and torch.equal(again.get("whole")["a"].x, tokens(1.0, torch.bfloat16)["a"].x)


def test_the_limit_holds_and_training_goes_on(data, tmp_path):
    store = FeatureStore(tmp_path / "s", limit=200)
    assert store.add([("x", LAYOUT, tokens(1.0))]) == 1 and store.add([("y", LAYOUT, tokens(1.0))]) == 0
    assert store.get("y") is None
    vlm = tiny_vlm(tmp_path)
    vlm.model.requires_grad_(False)
    cache = FeatureCache(tmp_path / "features", vlm.model, limit=1)
    mixture = Mixture({"colors": Entry(source=source(data))})
    for _ in range(2):
        batch = cache.fill(cache.renderer(renderer(vlm)).batch([mixture[0, 0], mixture[0, 1]]))
        assert batch.media["image"].features["image"].x.shape == (2, 4, 32)
    assert cache.encoded == 4 and cache.read == 0


def test_a_removed_store_is_an_error_that_names_it(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    vlm.model.requires_grad_(False)
    cache = FeatureCache(tmp_path / "features", vlm.model)
    plain = renderer(vlm)
    stored = cache.renderer(plain)
    assert isinstance(stored, StoredRenderer) and isinstance(pickle.loads(pickle.dumps(stored)), StoredRenderer)
    mixture = Mixture({"colors": Entry(source=source(data))})
    cache.fill(stored.batch([mixture[0, 0]]))
    batch = stored.batch([mixture[0, 0]])
    assert batch.media["image"].inputs.shape == (0, 3, 16, 16)
    fresh = FeatureCache(tmp_path / "other", vlm.model)
    with pytest.raises(ConfigError, match="are gone"):
        fresh.fill(batch)
    assert stored.processor.front_ends["image"].layout(Image(str(data / "pictures" / "0.png")), Place("x", 0, 1)).units
