"""An index over a folder: what it finds, how it follows the folder, what a kill leaves, and what it refuses."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
import torch
from retrieve_kit import picture, towers

from chiasm.errors import ChiasmError, ConfigError, DataError
from chiasm.retrieve import Index
from chiasm.retrieve.index import HOLES

NAMES = sorted(f"{'a' if i % 2 else 'b/c'}/{i:02}.png" for i in range(12))


def open_index(tmp_path: Path, vlm, **options) -> Index:
    return Index.open(tmp_path / "index", vlm, **options)


def listed(index: Index, vlm, photos: Path) -> dict[str, float]:
    """Every item by name, asked with one picture of the folder."""
    return {hit.name: hit.score for hit in index.search(photos / "b" / "c" / "10.png", k=100)}


def by_hand(vlm, photos: Path, names: list[str], query: torch.Tensor) -> dict[str, float]:
    vectors = vlm.embed(images=[str(photos / n) for n in names])
    return dict(zip(names, (vectors @ query[0]).tolist(), strict=True))


def same(found: dict[str, float], wanted: dict[str, float]) -> bool:
    return found.keys() == wanted.keys() and all(abs(found[n] - wanted[n]) < 1e-5 for n in wanted)


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_text_and_pictures_find_each_other(tmp_path, vlm, photos, engine):
    index = open_index(tmp_path, vlm, engine=engine)
    update = index.update_folder(photos, batch=5)
    assert (update.added, update.changed, update.removed, update.kept) == (14, 0, 0, 0)
    assert sorted(name for name, _ in update.broken) == ["broken.jpg", "empty.png"]
    assert all("broken.jpg" in why for name, why in update.broken if name == "broken.jpg")
    assert index.catalogue.counts() == {"image": (12, 2)}

    hits = index.search("a red circle", k=5)  # text → picture
    wanted = by_hand(vlm, photos, NAMES, vlm.embed(texts=["a red circle"]))
    order = sorted(wanted, key=lambda n: -wanted[n])
    assert [hit.name for hit in hits] == order[:5] and same(
        {h.name: h.score for h in hits}, {n: wanted[n] for n in order[:5]}
    )
    assert hits[0].path == photos / order[0] and hits[0].path.is_file()

    own = index.search(photos / "a" / "03.png", k=3)  # picture → picture: itself first
    assert own[0].name == "a/03.png" and own[0].score == pytest.approx(1, abs=1e-5) and own[1].score < 0.9999

    texts = ["a blue star", "two rings", "a small cross"]
    assert index.update_texts(texts).added == 3
    told = index.search(photos / "a" / "03.png", k=3, among="text")  # picture → text
    scores = vlm.embed(texts=texts) @ vlm.embed(images=[str(photos / "a" / "03.png")])[0]
    assert [hit.name for hit in told] == [texts[i] for i in scores.argsort(descending=True)] and told[0].path is None


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_it_follows_the_folder(tmp_path, vlm, photos, engine):
    index = open_index(tmp_path, vlm, engine=engine)
    index.update_folder(photos)
    (photos / NAMES[0]).unlink()  # deleted
    picture(photos / NAMES[1], 77)  # changed
    picture(photos / "new" / "one.png", 78)  # new
    picture(photos / "broken.jpg", 79)  # mended
    before = listed(index, vlm, photos)
    index.close()

    index = open_index(tmp_path, vlm)
    asked: list[str] = []
    own = index._embedder(4, 0)

    def counted(given, kind, broken):
        asked.extend(given)
        return own(given, kind, broken)

    update = index.update_folder(photos, embedder=counted)
    assert (update.added, update.changed, update.removed, update.kept) == (1, 2, 1, 11)
    assert {Path(a).relative_to(photos).as_posix() for a in asked} == {NAMES[1], "new/one.png", "broken.jpg"}
    names = [*NAMES[1:], "new/one.png", "broken.jpg"]
    query = vlm.embed(images=[str(photos / "b" / "c" / "10.png")])
    after = listed(index, vlm, photos)
    assert same(after, by_hand(vlm, photos, names, query))
    assert abs(after[NAMES[1]] - before[NAMES[1]]) > 1e-4, "the changed picture has another vector"
    assert index.update_folder(photos).kept == 14
    # Many deletions: the files are written anew without the holes, and the same things are found.
    for name in names[3:9]:
        (photos / name).unlink()
    index.update_folder(photos)
    left = [n for n in names if n not in names[3:9]]
    assert same(listed(index, vlm, photos), by_hand(vlm, photos, left, query))
    store = getattr(index.stores["image"], "store", index.stores["image"])
    assert len(store.removed) <= HOLES * store.rows and store.rows < 14


def test_an_interrupted_run_goes_on(tmp_path, vlm, photos):
    index = open_index(tmp_path, vlm)
    own = index._embedder(4, 0)

    def stops(given, kind, broken):
        for number, found in enumerate(own(given, kind, broken)):
            if number == 2:
                raise KeyboardInterrupt
            yield found

    with pytest.raises(KeyboardInterrupt):
        index.update_folder(photos, embedder=stops)
    done = index.catalogue.counts()["image"]
    assert 0 < done[0] < 12
    index.close()
    for suffix in (".f32", ".i8", ".loss"):  # a kill in the middle of a write: half a vector that nothing names
        with (tmp_path / "index" / f"image{suffix}").open("ab") as file:
            file.write(b"\x01" * 7)

    index = open_index(tmp_path, vlm)
    update = index.update_folder(photos, batch=4)
    assert update.added == 14 - sum(done) and update.kept == sum(done)
    query = vlm.embed(images=[str(photos / "b" / "c" / "10.png")])
    assert same(listed(index, vlm, photos), by_hand(vlm, photos, NAMES, query))


def test_two_writers_do_not_meet(tmp_path, vlm, photos):
    one, other = open_index(tmp_path, vlm), open_index(tmp_path, vlm)
    with one.catalogue.writing(), pytest.raises(DataError, match="another process is changing this index"):
        other.update_folder(photos)
    assert other.update_folder(photos).added == 14
    assert listed(one, vlm, photos).keys() == set(NAMES), "a reader sees what is committed"


def test_another_model_is_refused_with_the_difference(tmp_path, vlm, photos):
    index = open_index(tmp_path, vlm)
    index.update_folder(photos)
    for other, told in (
        (towers(seed=1), r"weights: their hash was \w+, is \w+ now"),
        (towers(resample="bicubic"), "processing: media.image.resample was 'bilinear', is 'bicubic' now"),
        (towers().to(torch.float64), "float32, these are float64"),
    ):
        with pytest.raises(ConfigError, match=told):
            open_index(tmp_path, other)
    assert open_index(tmp_path, towers()).update_folder(photos).kept == 14, "the same model made again is the same"


def test_bad_input(tmp_path, vlm, photos):
    index = open_index(tmp_path, vlm)
    with pytest.raises(DataError, match="holds no images to search among, it holds nothing"):
        index.search("red")
    with pytest.raises(DataError, match="is no folder"):
        index.update_folder(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds 0 pictures"):
        index.update_folder(tmp_path / "none")
    index.update_folder(photos)
    for query in ("", "   \n"):
        with pytest.raises(DataError, match="query is empty"):
            index.search(query)
    with pytest.raises(DataError, match="k is 0"):
        index.search("red", k=0)
    with pytest.raises(DataError, match=r"no texts to search among.*--texts FILE"):
        index.search("red", among="text")
    with pytest.raises(DataError, match=r"nowhere\.png"):
        index.search(photos / "nowhere.png")
    with pytest.raises(DataError, match="not those of"):
        index.update_folder(tmp_path / "none")
    photos.rename(tmp_path / "away")  # a drive that is not mounted: what was indexed is not thrown away
    photos.mkdir()
    with pytest.raises(DataError, match="holds 0 pictures now, the index 14"):
        index.update_folder(photos)
    with pytest.raises(DataError, match="text 2 of 2 is empty"):
        index.update_texts(["a", " "])
    index.close()
    os.truncate(tmp_path / "index" / "image.f32", 40)
    with pytest.raises(DataError, match="the catalogue counts 12; the index is damaged"):
        open_index(tmp_path, vlm).search("red")
    sqlite3.connect(tmp_path / "index" / "catalogue.sqlite").close()
    (tmp_path / "index" / "catalogue.sqlite").write_bytes(b"no data base" * 100)
    with pytest.raises(ChiasmError, match="cannot be read"):
        open_index(tmp_path, vlm)
