"""Files as they lie about: names that are no UTF-8, look like markup or hold a new line, and formats nothing reads."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from retrieve_kit import picture, towers

from chiasm.cli import main
from chiasm.errors import DataError
from chiasm.vlm import load

BAD = b"bad\xff\xfename.png"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(towers().save(tmp_path_factory.mktemp("model") / "towers"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pics"
    for i, name in enumerate(("plain.png", "[red]markup.png", "two\nlines.png", "日本 🙂.png")):
        picture(root / name, i)
    (root / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    os.symlink(".", root / "loop")
    os.symlink("nothing.png", root / "dangling.png")
    return root


def run(*words: object, fails: bool = False) -> str:
    done = CliRunner().invoke(main, [str(w) for w in words])
    assert (done.exit_code != 0) == fails and not isinstance(done.exception, UnicodeError), done.output
    return done.output


def nameless(root: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("this system's names are texts")
    shutil.copy(root / "plain.png", os.fsencode(str(root)) + b"/" + BAD)


def test_a_name_that_is_no_text_is_told_and_left_out(folder: Path, saved: str):
    nameless(folder)
    out, page = folder.parent / "out.jsonl", folder.parent / "page.html"
    told = " ".join(
        run("classify", folder, "--model", saved, "--labels", "a,b", "--out", out, "--report", page).split()
    )
    assert "4 pictures" in told and "3 pictures cannot be read" in told and "no UTF-8; rename the file" in told
    broken = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines() if "broken" in line]
    assert {row["picture"] for row in broken} == {"bad\\udcff\\udcfename.png", "dangling.png", "phone.heic"}
    assert "bad\\udcff" in page.read_text(encoding="utf-8")
    told = " ".join(run("index", folder, "--model", saved).split())
    assert "7 new" in told and "3 pictures cannot be read" in told and "(4 images)" in told
    assert "7 as before" in run("index", folder)


def test_reasons_say_the_name_once(folder: Path, saved: str):
    told = run("index", folder, "--model", saved)
    line = next(line for line in told.splitlines() if "dangling" in line)
    assert "sample" not in line and "medium" not in line and line.startswith("  dangling.png: picture")


def test_names_are_shown_to_the_letter(folder: Path, saved: str):
    told = run("classify", folder, "--model", saved, "--labels", "a,b")
    assert "[red]markup.png" in told and "two\\nlines.png" in told and "日本 🙂.png" in told
    run("index", folder, "--model", saved)
    found = run("search", "a red circle", "--in", folder)
    assert "[red]markup.png" in found and "two\\nlines.png" in found


def test_a_picture_that_is_not_there_is_no_text(folder: Path, saved: str):
    run("index", folder, "--model", saved)
    assert "there is no such picture" in run("search", folder / "gone.png", "--in", folder, fails=True)
    assert "cosine" in run("search", "a red circle like cat.png", "--in", folder), "words are a text"


def test_one_label_is_always_right_and_so_refused(folder: Path, saved: str):
    assert "is 1 whatever a picture shows" in " ".join(
        run("classify", folder, "--model", saved, "--labels", "red", fails=True).split()
    )
    with pytest.raises(DataError, match="one label, 'red'"):
        load(saved).classify(images=[str(folder / "plain.png")], labels=["red"])
