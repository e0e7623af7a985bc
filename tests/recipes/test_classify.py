"""``chiasm classify``: labels, folders as classes, scores, a probe, a page; bad pictures and bad labels."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))
from towers import two_towers

from chiasm.cli import main
from chiasm.errors import ConfigError, DataError
from chiasm.eval.classify import probe_folder, zero_shot_folder
from chiasm.vlm import VLM

COLOURS = {"red": (220, 30, 40), "dark_green": (20, 120, 40), "blue": (30, 60, 210)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return two_towers(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def saved(clip: VLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip.save(tmp_path_factory.mktemp("saved") / "model")


def tree(folder: Path, each: int, seed: int) -> Path:
    """Noisy squares of three colours, a folder each."""
    values = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            noisy = np.clip(np.array(colour) + values.normal(0, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("shown") / "test", 4, 1)


def test_folders_are_classes_and_are_scored(clip: VLM, shown: Path):
    result = zero_shot_folder(clip, shown, batch=5, workers=2)
    assert result.labels == ["blue", "dark green", "red"] and len(result.answers) == result.judged == 12
    files = [str(shown / answer.name) for answer in result.answers]
    shares = clip.classify(images=files, labels=result.labels, templates=["a photo of a {}."])
    right = 0
    for answer, row in zip(result.answers, shares, strict=True):
        assert answer.top[0][0] == int(row.argmax()) and answer.top[0][1] == pytest.approx(float(row.max()), abs=1e-5)
        assert sum(share for _, share in answer.top) == pytest.approx(1, abs=1e-5)
        right += int(row.argmax()) == result.labels.index(answer.name.split("/")[0].replace("_", " "))
    assert result.accuracy() == right / 12 and result.accuracy(5) == 1
    assert sum(count for _, count, _ in result.classes()) == 12


def test_given_labels_meet_folders_by_name(clip: VLM, shown: Path):
    result = zero_shot_folder(clip, shown, labels=["Dark Green", "yellow", "red"], top=2)
    assert result.judged == 8 and {len(answer.top) for answer in result.answers} == {2}


def test_imagenet_folders_have_the_published_names(clip: VLM, tmp_path: Path):
    from chiasm.eval.classify import classes_of

    folders = [f"n{10_000_000 + i}" for i in range(1000)]
    names, places = classes_of(tmp_path, folders, None)
    assert names[0] == "tench" and names[:2] == ["tench", "goldfish"] and len(names) == 1000
    assert places[folders[999]] == 999  # by number, because two names stand twice


def test_the_probe_learns(clip: VLM, shown: Path, tmp_path: Path):
    pytest.importorskip("sklearn")
    train = tree(tmp_path / "train", 6, 2)
    (train / "red" / "broken.png").write_bytes(b"nothing")
    result = probe_folder(clip, shown, train, c=10.0)
    assert result.labels == ["blue", "dark_green", "red"] and "18 pictures of 3 classes" in result.how
    assert result.accuracy() == 1.0 and len(result.broken) == 1
    with pytest.raises(DataError, match="1 classes"):
        probe_folder(clip, shown, one(tmp_path))


def one(folder: Path) -> Path:
    (folder / "one" / "red").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "one" / "red" / "a.png")
    return folder / "one"


def test_the_verb(saved: Path, shown: Path, tmp_path: Path):
    flat = tmp_path / "pictures"
    flat.mkdir()
    for i, colour in enumerate(COLOURS.values()):
        Image.new("RGB", (30, 20), colour).save(flat / f"{i}.jpg")
    (flat / "bad <b>.jpg").write_bytes(b"no picture")
    words = ["classify", str(flat), "--model", str(saved), "--labels", "red,green", "--device", "cpu", "--workers", "0"]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "o.jsonl"), "--report", str(tmp_path / "o.html")])
    assert done.exit_code == 0, done.output
    assert "3 pictures, 2 classes by 1 prompt each" in done.output and "1 pictures cannot be read" in done.output
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["picture"] for row in rows] == ["0.jpg", "1.jpg", "2.jpg", "bad <b>.jpg"] and "broken" in rows[-1]
    assert {entry["label"] for entry in rows[0]["top"]} == {"red", "green"}
    page = (tmp_path / "o.html").read_text()
    assert page.count('<li class="card') == 3 and "data:image/" in page
    assert "bad &lt;b&gt;.jpg" in page and "bad <b>" not in page
    done = CliRunner().invoke(main, ["classify", str(shown), "--model", str(saved), "--device", "cpu"])
    assert done.exit_code == 0 and "top-1" in done.output and "of 12 pictures in folders" in done.output


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--labels", "red,,blue"], "label 2 of 3 is empty"),
        (["--labels", "red, blue,red"], "label 3 of 3, 'red', is label 1 too"),
        (["--labels", "red", "--templates", "imagnet"], "did you mean 'imagenet"),
        (["--labels", "red", "--probe", "."], "leave --labels"),
        ([], "has no folders to take the classes from"),
    ],
)
def test_bad_input(more: list[str], told: str, saved: Path, tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    done = CliRunner().invoke(main, ["classify", str(tmp_path), "--model", str(saved), "--device", "cpu", *more])
    assert done.exit_code == 1 and told in " ".join(done.output.split())


def test_no_pictures(clip: VLM, tmp_path: Path):
    with pytest.raises(DataError, match="holds 0 pictures"):
        zero_shot_folder(clip, tmp_path, labels=["a"])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="sigmoid"):
        zero_shot_folder(clip, tmp_path, labels=["a"], independent=True)
