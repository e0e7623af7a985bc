"""``chiasm index`` and ``chiasm search`` from a saved model to a page of pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from retrieve_kit import picture, towers

from chiasm.cli import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    return str(towers().save(tmp_path_factory.mktemp("model") / "towers"))


def run(*words: object, fails: bool = False) -> str:
    done = CliRunner().invoke(main, [str(w) for w in words], catch_exceptions=False)
    assert (done.exit_code != 0) == fails, done.output
    return re.sub(r"\s+", " ", done.output)


def test_index_and_search(tmp_path: Path, photos: Path, saved: str):
    texts = tmp_path / "texts.txt"
    texts.write_text("a blue star\n\ntwo rings\n")
    told = run("index", photos, "--model", saved, "--texts", texts)
    assert "14 new, 0 changed, 0 deleted, 0 as before" in told and "Texts: 2 new" in told
    assert "2 pictures cannot be read" in told and "broken.jpg" in told and "(12 images, 2 texts)" in told
    picture(photos / "more.png", 50)
    assert "1 new, 0 changed, 0 deleted, 14 as before" in run("index", photos), "the index knows its model"

    told = run("search", "a red circle", "--in", photos, "-k", 3)
    page = (photos / ".chiasm-index" / "search.html").read_text()
    assert page.count("<li") == 3 and page.count("data:image/") == 3 and "a red circle" in page and "cosine" in told
    assert "http" not in re.sub(r"data:[^\"]*", "", page), "the page needs no other file"
    like = [json.loads(line) for line in run_lines("search", photos / "a" / "01.png", "--in", photos, "--json")]
    assert like[0]["name"] == "a/01.png" and like[0]["score"] > 0.999 and len(like) == 10
    (photos / "a" / "01.png").rename(tmp_path / "asked.png")
    page = tmp_path / "page.html"
    told = run("search", tmp_path / "asked.png", "--in", photos / ".chiasm-index", "--html", page, "-k", 2)
    assert "the file is gone or broken" in page.read_text() and "Like " in page.read_text()
    among = run("search", tmp_path / "asked.png", "--in", photos, "--for", "text")
    assert "two rings" in among and "a blue star" in among
    assert "&lt;b&gt;" in text_of(run_page(photos, "<b>red</b>")), "a query is no markup"


def test_texts_too_long_are_listed(tmp_path: Path, photos: Path, saved: str):
    texts = tmp_path / "texts.txt"
    texts.write_text("a blue star\n" + "a red car beside a blue house " * 40 + "\n")
    told = run("index", photos, "--model", saved, "--texts", texts)
    assert "1 texts cannot be read" in told and "tokens, this model reads" in told and "1 texts)" in told
    assert "tokens, this model reads" in run("search", "a red car " * 90, "--in", photos, fails=True)


def run_lines(*words: object) -> list[str]:
    done = CliRunner().invoke(main, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def run_page(photos: Path, query: str) -> Path:
    run("search", query, "--in", photos)
    return photos / ".chiasm-index" / "search.html"


def text_of(path: Path) -> str:
    return path.read_text()


def test_refusals(tmp_path: Path, photos: Path, saved: str):
    assert "names its model; give one with --model" in run("index", photos, fails=True)
    assert "is no folder" in run("index", tmp_path / "nowhere", "--model", saved, fails=True)
    assert "holds no index" in run("search", "red", "--in", photos, fails=True)
    run("index", photos, "--model", saved)
    assert "the query is empty" in run("search", " ", "--in", photos, fails=True)
    other = towers(seed=5).save(tmp_path / "other")
    assert "made by another model" in run("search", "red", "--in", photos, "--model", other, fails=True)
    assert "made by another model" in run("index", photos, "--model", other, fails=True)


@pytest.mark.slow
def test_ray(tmp_path: Path, photos: Path, saved: str):
    """A local cluster gives the vectors of this process, and the same list of broken pictures."""
    ray = pytest.importorskip("ray")
    from chiasm.retrieve import Index
    from chiasm.retrieve.ray import embedder
    from chiasm.vlm import load

    vlm = load(saved)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        shared, alone = Index.open(tmp_path / "ray", vlm), Index.open(tmp_path / "alone", vlm)
        update = shared.update_folder(photos, embedder=embedder(saved, actors=2, batch=4))
        assert sorted(update.broken) == sorted(alone.update_folder(photos).broken)
        found, wanted = (i.search("a red circle", k=20) for i in (shared, alone))
        assert [(h.name, round(h.score, 5)) for h in found] == [(h.name, round(h.score, 5)) for h in wanted]
    finally:
        ray.shutdown()
