"""Labelled pictures: both layouts, the splits, and what is refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from chiasm.data.sources.labelled import Labelled
from chiasm.errors import ConfigError, DataError

LABELS = np.array([0, 1, 2, 1, 0, 2, 1], np.uint8)
IMAGES = np.arange(7 * 4 * 5, dtype=np.uint8).reshape(7, 4, 5)


def source(**config) -> Labelled:
    return Labelled(Labelled.Config.parse(config))


def npz(folder: Path) -> str:
    np.savez(folder / "x.npz", images=IMAGES, labels=LABELS, class_names=np.array(["cat", "dog", "owl"]))
    return str(folder / "x.npz")


def idx(folder: Path) -> tuple[str, str]:
    (folder / "i.gz").write_bytes(gzip.compress(struct.pack(">HBBIII", 0, 8, 3, 7, 4, 5) + IMAGES.tobytes()))
    (folder / "l").write_bytes(struct.pack(">HBBI", 0, 8, 1, 7) + LABELS.tobytes())
    return str(folder / "i.gz"), str(folder / "l")


def test_both_layouts_say_the_same(tmp_path):
    one = source(file=npz(tmp_path), templates=("a {}", "the {}"))
    images, labels = idx(tmp_path)
    other = source(file=images, labels=labels, names=("cat", "dog", "owl"), templates=("a {}", "the {}"))
    for i in range(7):
        a, b = one[i], other[i]
        assert a.answers == b.answers == (["cat", "dog", "owl"][LABELS[i]],)
        assert a.messages[-1].text == b.messages[-1].text == ("a ", "the ")[i % 2] + a.answers[0]
        assert np.array_equal(a.messages[0].media[0].data, IMAGES[i])
        assert np.array_equal(b.messages[0].media[0].data, IMAGES[i])


def test_splits_share_nothing(tmp_path):
    ids = {
        s: {source(file=npz(tmp_path), split=s, every=3)[i].id for i in range(n)}
        for s, n in (("train", 4), ("test", 3))
    }
    assert not ids["train"] & ids["test"] and len(ids["train"] | ids["test"]) == 7


def test_refusals(tmp_path):
    images, labels = idx(tmp_path)
    with pytest.raises(DataError, match="holds no labels"):
        source(file=images)
    with pytest.raises(DataError, match="has label 2, but 2 names"):
        source(file=images, labels=labels, names=("a", "b"))
    with pytest.raises(DataError, match="does not begin as an idx file"):
        source(file=labels, labels=npz(tmp_path))
    with pytest.raises(DataError, match="cannot be read"):
        source(file=str(tmp_path / "none.npz"))
    with pytest.raises(ConfigError, match="needs a place"):
        source(file=images, templates=("name",))
