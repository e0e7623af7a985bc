"""R@K against a count by hand, ties, several captions, shared captions, re-ranking, and the protocol files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from retrieve_kit import ROOT, picture, towers
from torch.nn.functional import normalize

from chiasm import preset
from chiasm.cli import main
from chiasm.errors import DataError
from chiasm.eval.retrieval import KS, Pairs, evaluate, read_protocol, recall
from chiasm.types import Image, Message, Text
from chiasm.vlm import build


def drawn(images: int, per: int) -> tuple[torch.Tensor, torch.Tensor, Pairs]:
    """Vectors of pictures and of ``per`` texts each, near enough that some are found."""
    generator = torch.Generator().manual_seed(5)
    x = normalize(torch.randn(images, 8, generator=generator), dim=1)
    owners = [i // per for i in range(images * per)]
    y = normalize(x[owners] + 0.9 * torch.randn(len(owners), 8, generator=generator), dim=1)
    return x, y, Pairs(list(range(images)), [f"t{i}" for i in range(len(owners))], [[o] for o in owners])


def slowly(scores: torch.Tensor, right: list[list[int]]) -> dict[int, float]:
    """R@K by sorting, one query after the other."""
    found = dict.fromkeys(KS, 0)
    for row, wanted in zip(scores.tolist(), right, strict=True):
        order = sorted(range(len(row)), key=lambda i: -row[i])
        for k in KS:
            found[k] += any(i in wanted for i in order[:k])
    return {k: n / len(right) for k, n in found.items()}


@pytest.mark.parametrize("per", [1, 5])
def test_counted_by_hand(monkeypatch, per):
    monkeypatch.setattr("chiasm.eval.retrieval.CHUNK", 7)
    x, y, pairs = drawn(40, per)
    found = recall(x, y, pairs)
    back = [[t for t, o in enumerate(pairs.owners) if o == [i]] for i in range(40)]
    assert found.towers.text == slowly(x @ y.T, back) and found.towers.image == slowly(y @ x.T, pairs.owners)
    assert 0 < found.towers.image[1] < found.towers.image[10] < 1 and found.reranked is None
    assert [name for name, _, _ in found.rows()][:2] == ["picture → text, R@1", "picture → text, R@5"]


def test_ties_count_against():
    same = torch.ones(20, 8) / 8**0.5
    pairs = Pairs(list(range(20)), [str(i) for i in range(20)], [[i] for i in range(20)])
    found = recall(same, same, pairs)
    assert found.towers.total == 0, "a model that makes one vector of everything finds nothing"


def test_a_text_of_several_pictures_is_right_for_all():
    pairs = Pairs.of([("a.png", "red"), ("b.png", "blue"), ("c.png", "red")])
    assert pairs.texts == ["red", "blue"] and pairs.owners == [[0, 2], [1]]
    red, blue = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert recall(torch.stack([red, blue, red]), torch.stack([red, blue]), pairs).towers.total == 6


def test_reranking_has_its_own_column():
    x, y, pairs = drawn(30, 2)
    asked: list[tuple[int, int]] = []

    def oracle(images, texts):
        asked.extend(zip(images, texts, strict=True))
        return torch.tensor([float(pairs.owners[t] == [i]) for i, t in zip(images, texts, strict=True)])

    found = recall(x, y, pairs, oracle, candidates=4)
    plain = recall(x, y, pairs)
    assert found.towers == plain.towers, "the towers' column does not change"
    first = {(i, t) for i in range(30) for t in (x[i] @ y.T).topk(4).indices.tolist()}
    first |= {(i, t) for t in range(60) for i in (y[t] @ x.T).topk(4).indices.tolist()}
    assert asked == sorted(first), "each pair once, those of a picture one after the other"
    # An oracle finds exactly what was among the first four candidates.
    for way in ("text", "image"):
        inside = sum(r <= 4 for r in found.ranks[way]) / len(found.ranks[way])
        again = getattr(found.reranked, way)
        assert again[1] >= getattr(plain.towers, way)[1] and (way == "text" or again == dict.fromkeys(KS, inside))


def test_several_vectors_of_a_picture():
    """As BLIP-2's queries: the nearest one counts, in both directions."""
    x, y, pairs = drawn(25, 2)
    generator = torch.Generator().manual_seed(8)
    many = torch.stack([normalize(torch.randn(25, 8, generator=generator), dim=1) - 2 * x, x, -x], 1)  # [I, 3, D]
    best = torch.einsum("ikd,td->itk", many, y).amax(2)
    found = recall(many, y, pairs)
    back = [[2 * i, 2 * i + 1] for i in range(25)]
    assert found.towers.text == slowly(best, back) and found.towers.image == slowly(best.T, pairs.owners)


def protocol(folder: Path) -> Path:
    records = []
    for i in range(6):
        picture(folder / "val2014" / f"{i}.png", i)
        sentences = [{"raw": f" caption {j} of {i} "} for j in range(6 if i == 1 else 5)]
        split = "train" if i == 5 else "test"
        records.append({"filename": f"{i}.png", "filepath": "val2014", "split": split, "sentences": sentences})
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"dataset": "coco", "images": records}))
    return file


def test_protocol_files(tmp_path, vlm):
    pairs = read_protocol(protocol(tmp_path), tmp_path)
    assert len(pairs.images) == 5 and len(pairs.texts) == 25 and pairs.texts[5] == "caption 0 of 1"
    assert len(read_protocol(tmp_path / "dataset_coco.json", tmp_path, per_image=None).texts) == 26
    lists = [{"image": "val2014/0.png", "caption": ["a", "b"]}, {"image": "val2014/1.png", "caption": "c"}]
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps(lists))
    other = read_protocol(tmp_path / "coco_karpathy_test.json", tmp_path)
    assert other.texts == ["a", "b", "c"] and other.owners == [[0], [0], [1]]
    found = evaluate(vlm, pairs, batch=2)
    x, y = vlm.embed(images=pairs.images), vlm.embed(texts=pairs.texts)
    assert found.towers.image == slowly(y @ x.T, pairs.owners)
    with pytest.raises(DataError, match="0 pictures of split 'tests'; did you mean 'test'"):
        read_protocol(tmp_path / "dataset_coco.json", tmp_path, split="tests")
    with pytest.raises(DataError, match=r"5 of the 5 pictures .* --images"):
        read_protocol(tmp_path / "dataset_coco.json", tmp_path / "elsewhere")
    (tmp_path / "other.json").write_text("[3]")
    with pytest.raises(DataError, match="is no protocol file"):
        read_protocol(tmp_path / "other.json", tmp_path)


def test_the_verb(tmp_path):
    saved = towers().save(tmp_path / "model")
    words = [
        "recall",
        str(saved),
        str(protocol(tmp_path)),
        "--images",
        str(tmp_path),
        "--out",
        str(tmp_path / "r.json"),
    ]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0 and "two towers" in done.output and "5 pictures, 25 texts" in done.output
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert len(rows) == 7 and all(row["reranked"] is None for row in rows)


def fused(name: str) -> Any:
    """A matching model in its tiny form, with random weights everywhere."""
    config = preset(name, tiny=True, vocab=1024)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vlm = build(config, tokenizer=ROOT / "src" / "chiasm" / "weights" / "tiny-lm")
        for p in vlm.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return vlm.eval()


@pytest.mark.parametrize("name", ["vilt-b32-retrieval", "albef-retrieval"])
def test_the_verb_with_a_second_judge(tmp_path, name):
    """Every candidate of a small protocol is judged, so the second column is the judge's own order."""
    saved, judge = towers().save(tmp_path / "model"), fused(name)
    file = protocol(tmp_path)
    words = ["recall", str(saved), str(file), "--images", str(tmp_path), "--out", str(tmp_path / "r.json")]
    words += ["--matcher", str(judge.save(tmp_path / "judge")), "--candidates", "40", "--batch-size", "7"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0 and "re-ranked" in done.output
    told = json.loads((tmp_path / "r.json").read_text())
    pairs = read_protocol(file, tmp_path)
    talks = [[Message("user", (Image(i), Text(t)))] for i in pairs.images for t in pairs.texts]
    with torch.no_grad():
        scores = judge.model.match(judge.processor.batch(talks)).view(5, 25)
    back = [list(range(5 * i, 5 * i + 5)) for i in range(5)]
    wanted = [*slowly(scores, back).values(), *slowly(scores.T, pairs.owners).values()]
    assert [row["reranked"] for row in told["rows"]] == pytest.approx([*wanted, sum(wanted)])
    assert len({round(float(s), 4) for s in scores.flatten()}) > 20, "the judge tells pairs apart"
    assert told["candidates"] == 40 and told["matcher"].endswith("judge")


def test_texts_that_lose_their_end_are_counted(tmp_path):
    """As the published runs do, a caption that is too long is cut, and the table says how many were."""
    saved, judge = towers().save(tmp_path / "model"), fused("vilt-b32-retrieval").save(tmp_path / "judge")
    picture(tmp_path / "0.png", 0)
    captions = ["short", "a red car beside a blue house " * 40, "a red car " * 8]
    (tmp_path / "list.json").write_text(json.dumps([{"image": "0.png", "caption": captions}]))
    words = ["recall", str(saved), str(tmp_path / "list.json"), "--images", str(tmp_path), "--matcher", str(judge)]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "r.json")], catch_exceptions=False)
    output = " ".join(done.output.split())
    assert "1 of 3 texts are longer than the towers read" in output, output
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["shortened"] == 1 and told["shortened_by_matcher"] >= 1


def test_a_model_can_be_its_own_judge(tmp_path):
    """ALBEF finds by its vectors and judges by its fusion; a model that cannot judge is refused."""
    saved, file = fused("albef-retrieval").save(tmp_path / "albef"), protocol(tmp_path)
    words = ["recall", str(saved), str(file), "--images", str(tmp_path), "--matcher", str(saved), "--candidates", "2"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0 and "re-ranked" in done.output
    words[words.index("--matcher") + 1] = str(towers().save(tmp_path / "model"))
    done = CliRunner().invoke(main, words)
    assert done.exit_code != 0 and "does not judge pairs" in " ".join(done.output.split())
