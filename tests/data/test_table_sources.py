"""Tars of pairs, parquet files, saved data sets, and JSON by byte offsets: by number, in workers, in bounded memory."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image as Pillow

from chiasm.data.sources import lines
from chiasm.data.sources.lines import Records
from chiasm.data.sources.rows import Columns
from chiasm.data.sources.webdataset import WebDataset
from chiasm.errors import ConfigError, DataError
from chiasm.processing.base import Place
from chiasm.processing.open import open_picture
from chiasm.types import Image, Message, Text


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", (8, 8), (number, 2 * number, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pairs(folder: Path, shards: int = 3, each: int = 5) -> str:
    for shard in range(shards):
        members = []
        for i in range(each):
            n = shard * each + i
            members += [(f"part/{n:06}.png", picture(n)), (f"part/{n:06}.txt", f"picture {n}\n".encode())]
        tar(folder / f"{shard}.tar", members)
    return str(folder / "*.tar")


def test_pairs_in_tars(tmp_path):
    source = WebDataset(WebDataset.Config(file=pairs(tmp_path), prompt="What?", task="caption"))
    assert len(source) == 15
    for index in (14, 0, 7):
        example = source[index]
        assert example.id == f"part/{index:06}" == source.id_of(index) and example.task == "caption"
        assert example.messages == (
            Message("user", (Image(picture(index)), Text("What?"))),
            Message("assistant", (Text(f"picture {index}"),)),
        )
    pixel = open_picture(source[9].messages[0].media[0].data, Place("s", 0, 1)).getpixel((3, 3))
    assert pixel == (9, 18, 7) and source.hint(9) == 512 + len("picture 9\n")
    assert pickle.loads(pickle.dumps(source))[11] == source[11]
    with pytest.raises(IndexError):
        source[15]


def test_json_and_several_pictures_in_tars(tmp_path):
    talk = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The first."}]
    record = {"conversations": talk, "uid": "x1"}
    tar(tmp_path / "a.tar", [("7.0.jpg", b"one"), ("7.1.jpg", b"two"), ("7.json", json.dumps(record).encode())])
    columns = Columns(id="uid", conversation="conversations", images="picture")
    example = WebDataset(WebDataset.Config(file=str(tmp_path / "a.tar"), columns=columns))[0]
    assert example.id == "x1"
    assert example.messages[0].parts == (Image(b"one"), Text(" or "), Image(b"two"), Text("?"))


def test_the_index_of_tars_is_made_once(tmp_path, monkeypatch):
    config = WebDataset.Config(file=pairs(tmp_path), index=str(tmp_path / "index.npz"))
    first = WebDataset(config)
    monkeypatch.setattr("chiasm.data.sources.webdataset._indexed", None)  # calling it would fail
    again = WebDataset(config)
    assert [again[i] for i in range(15)] == [first[i] for i in range(15)]
    monkeypatch.undo()
    tar(tmp_path / "0.tar", [("new.png", picture(1)), ("new.txt", b"fresh")])
    assert WebDataset(config)[0].id == "new"  # changed archives: a new index


def test_tars_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\*.tar: 0 files match"):
        WebDataset(WebDataset.Config(file=str(tmp_path / "none*.tar")))
    tar(tmp_path / "a.tar.gz", [("1.png", picture(1))], "w:gz")
    with pytest.raises(DataError, match=r"a.tar.gz: cannot be read as an uncompressed tar"):
        WebDataset(WebDataset.Config(file=str(tmp_path / "a.tar.gz")))
    tar(tmp_path / "b.tar", [("1.png", picture(1)), ("1.cls", b"3")])
    with pytest.raises(DataError, match=r"sample '1': has nothing for columns.answer = 'txt'; it has picture"):
        WebDataset(WebDataset.Config(file=str(tmp_path / "b.tar")))[0]


def test_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from chiasm.data.sources.parquet import Parquet

    for shard in range(2):
        numbers = range(shard * 10, shard * 10 + 10)
        table = pa.table(
            {
                "key": [f"k{n}" for n in numbers],
                "image": [{"bytes": picture(n), "path": f"{n}.png"} for n in numbers],
                "paths": [[f"{n}.png", "b.png"] for n in numbers],
                "question": [f"Is it {n}?" if n % 2 else None for n in numbers],
                "answer": [f"yes {n}" for n in numbers],
                "talk": [
                    [{"from": "human", "value": "<image><image>A?"}, {"from": "gpt", "value": f"{n}"}] for n in numbers
                ],
                "unused": [b"x" * 1000 for _ in numbers],
            }
        )
        pq.write_table(table, tmp_path / f"{shard}.parquet", row_group_size=3)
    columns = Columns(id="key", images="image", question="question", answer="answer")
    source = Parquet(Parquet.Config(file=str(tmp_path / "*.parquet"), columns=columns, prompt="What?"))
    assert len(source) == 20
    for n in (19, 0, 11, 3, 10, 9):
        asked = f"Is it {n}?" if n % 2 else "What?"
        assert source[n].id == f"k{n}"
        assert source[n].messages == (
            Message("user", (Image(picture(n)), Text(asked))),
            Message("assistant", (Text(f"yes {n}"),)),
        )
    assert len(source._kept) == 2 and pickle.loads(pickle.dumps(source))[12] == source[12]
    talk = Columns(conversation="talk", images="paths")
    example = Parquet(Parquet.Config(file=str(tmp_path / "1.parquet"), columns=talk, media="m"))[2]
    assert example.messages[0].parts == (Image("m/12.png"), Image("m/b.png"), Text("A?")) and example.id == "2"
    with pytest.raises(ConfigError, match=r"columns\.images is 'imagee', which is no column; did you mean 'image'"):
        wrong = Columns(images="imagee", answer="answer")
        Parquet(Parquet.Config(file=str(tmp_path / "*.parquet"), columns=wrong))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"bad.parquet: cannot be read as a parquet file"):
        Parquet(Parquet.Config(file=str(tmp_path / "bad.parquet"), columns=columns))


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    from chiasm.data.sources.hf_dataset import HFDataset

    rows = {
        "images": [[Pillow.open(io.BytesIO(picture(n)))] for n in range(6)],
        "texts": [[{"user": f"Q{n}", "assistant": f"A{n}"}, {"user": "R", "assistant": "S"}] for n in range(6)],
    }
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
        }
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table, "test": table.select([4])}).save_to_disk(str(tmp_path / "saved"))
    columns = Columns(conversation="texts", images="images")
    config = HFDataset.Config(folder=str(tmp_path / "saved"), split="train", columns=columns, place="first")
    source = HFDataset(config)
    assert len(source) == 6
    example = source[4]
    assert [(m.role, m.text) for m in example.messages] == [
        *(("user", "Q4"), ("assistant", "A4"), ("user", "R"), ("assistant", "S")),
    ]
    shown = open_picture(example.messages[0].media[0].data, Place("s", 0, 1))
    assert shown.getpixel((0, 0)) == (4, 8, 7) and not example.messages[2].media
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    with pytest.raises(ConfigError, match="split is 'trian'; did you mean 'train'"):
        HFDataset(HFDataset.Config(folder=str(tmp_path / "saved"), split="trian", columns=columns))
    with pytest.raises(DataError, match="cannot be read as a saved data set"):
        HFDataset(HFDataset.Config(folder=str(tmp_path), columns=columns))


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_json_by_byte_offsets(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    records = [{"id": i, "t": ('é漢字😀"q\\ [{}]' * (i % 5)), "n": [1, {"a": 2.5}]} for i in range(200)]
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=False, indent=1 if chunk == 64 else None))
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    for name in ("a.json", "a.jsonl"):
        found = Records(str(tmp_path / name))
        assert [found[i] for i in range(len(found))] == records
        assert pickle.loads(pickle.dumps(found))[77] == records[77]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"b": oops}]', "line 2, column 8: Expecting value"),
        ('[{"a": 1} {"b": 2}]', "line 1, column 11: a comma or the end of the list"),
        ('[{"a": 1},', "line 1, column 11"),
        ('{"a": 1}', "a list of records was expected"),
        ("", "a list of records was expected"),
    ],
)
def test_lists_that_are_no_json(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Records(str(tmp_path / "a.json"))


def test_a_file_that_changes_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    found = Records(str(path))
    path.write_text('{"a": 1, "more": 2}\n')
    with pytest.raises(DataError, match="changed since it was opened"):
        found[1]


MEMORY = """
import resource, sys
from chiasm.data.sources.llava_json import LlavaJson
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = LlavaJson(LlavaJson.Config(file=sys.argv[1]))
index = len(source.records.offsets.tobytes()) + len(source.records.lines or b"") * 8
for i in range(0, len(source), 7):
    source[i]
print(len(source), index, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_memory_does_not_hold_the_texts(tmp_path, name):
    """20,000 records of 2 kB are 40 MB of text, and would be over 100 MB of objects."""
    talk = [{"from": "human", "value": "q" * 1200}, {"from": "gpt", "value": "a" * 800}]
    with (tmp_path / name).open("w") as file:
        end = {"a.json": ",\n", "a.jsonl": "\n"}[name]
        file.write("[" if name == "a.json" else "")
        for i in range(20_000):
            file.write(json.dumps({"id": f"s{i}", "conversations": talk}) + (end if i < 19_999 else ""))
        file.write("]" if name == "a.json" else "")
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    count, index, grown = map(int, ran.stdout.split())
    assert count == 20_000 and index <= 16 * count and grown < 16_000_000, (index, grown)


def test_check_of_tars(tmp_path):
    """Pictures in memory: broken, empty and repeated ones are found, by number, in worker processes too."""
    from chiasm.data.check import check_all
    from chiasm.data.check import run as check_run
    from chiasm.data.mixture import Entry, Mixture

    members = []
    for n in range(40):
        data = {5: b"", 11: picture(11)[:30], 23: b"<html>", 31: picture(30)}.get(n, picture(n))
        members += [(f"{n:03}.png", data), (f"{n:03}.txt", b"  " if n == 17 else f"p {n}".encode())]
    del members[2 * 36 + 1]
    tar(tmp_path / "a.tar", members)
    mixture = Mixture({"pairs": Entry(source={"type": "webdataset", "file": str(tmp_path / "a.tar")})})
    wanted = {
        5: "empty_picture",
        11: "broken_picture",
        17: "empty_answer",
        23: "broken_picture",
        31: "duplicate_picture",
        36: "record",
    }
    alone = check_all(mixture, workers=0)
    assert {f.index: f.kind for f in alone.findings if f.kind != "odd_picture"} == wanted
    assert {f.id for f in alone.findings if f.index == 36} == {"036"} and alone.bad == 5
    size, check_run.SIZE = check_run.SIZE, 8
    try:
        assert check_all(mixture, workers=2).findings == alone.findings
    finally:
        check_run.SIZE = size
