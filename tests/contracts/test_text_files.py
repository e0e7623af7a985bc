"""Text files that people hand in: UTF-8 or one line that names the file, and lines end at line feeds alone."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from chiasm.checkpoints.hub import local_folder
from chiasm.cli import main
from chiasm.cli.env import command as env
from chiasm.cli.options import parts
from chiasm.compose import as_device
from chiasm.config import load_yaml, parse_overrides, read_lines, read_text
from chiasm.data.quarantine import Quarantine, Quarantined
from chiasm.data.sources.records import read_records
from chiasm.errors import CheckpointError, ConfigError, DataError
from chiasm.train.log import terminal
from chiasm.train.recipe import Recipe

ODD = "one\u2028two\u0085three\x0cfour"  # str.splitlines cuts at each of these, JSON allows them within a string


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(f"{ODD}\n\nlast", encoding="utf-8")
    assert read_lines(file) == [ODD, "", "last"]
    file.write_bytes(b"a\r\nb\r\n")
    assert read_lines(file) == ["a", "b"]
    file.write_bytes(b"")
    assert read_lines(file) == []


def test_a_record_may_hold_a_line_separator(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    odd = ODD.replace("\x0c", "")  # a control character, which JSON escapes
    file.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in (odd, "b")), encoding="utf-8")
    assert [record["text"] for record in read_records(str(file))] == [odd, "b"]


def test_a_quarantine_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    entries = [Quarantined("data", 3, f"id {ODD}", "record", ODD), Quarantined("data", 4, "b", "record", "m")]
    found = Quarantine.read(str(Quarantine(entries).write(tmp_path / "q.jsonl")))
    assert [found.entries["data"][i] for i in (3, 4)] == entries


@pytest.mark.parametrize("name", ["none.yaml", "latin.yaml", "tab.yaml", "folder"])
def test_a_recipe_that_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: é\n".encode("latin-1"))
    (tmp_path / "tab.yaml").write_text("name: x\n\tstages: []\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_yaml(tmp_path / name)
    said = str(caught.value)
    assert name in said and "\n" not in said
    if name == "tab.yaml":
        assert "line 2, column 1" in said


def test_what_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xe9\n")
    with pytest.raises(DataError, match=r"a\.txt: byte 3 is not UTF-8"):
        read_text(tmp_path / "a.txt")


def test_an_override_that_is_not_yaml_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"'\{a: ' is not YAML") as caught:
        parse_overrides(["model.lm={a: "])
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/there/report.html")

    monkeypatch.setattr(env, "callback", refused)
    done = CliRunner().invoke(main, ["env"])
    assert done.exit_code == 1 and done.output == "Error: /there/report.html: Permission denied\n"


def test_a_typing_error_within_a_list_is_answered_with_the_nearest_key() -> None:
    stage = {"name": "a", "lrr": 1e-3}
    with pytest.raises(ConfigError, match=r"unknown key 'stages\.0\.lrr'; did you mean 'lr'\?"):
        Recipe.parse({"model": {}, "data": {}, "stages": [stage]})
    entry = {"source": {"type": "playground"}, "wieght": 2}
    with pytest.raises(ConfigError, match=r"unknown key 'data\.a\.wieght'; did you mean 'weight'\?"):
        Recipe.parse({"model": {}, "data": {"a": entry}, "stages": [{"name": "a", "lr": 1e-3}]})


def test_what_is_no_file_is_the_question(tmp_path: Path) -> None:
    picture = tmp_path / "a"
    picture.touch()
    long = "What is in this picture, " * 20  # longer than a file's name may be
    assert parts((str(picture), long)) == ([str(picture)], long)
    assert parts((str(picture), "")) == ([str(picture)], "")


@pytest.mark.parametrize("device", ["gpu", "cuda:9", "mps:7"])
def test_a_device_that_is_not_there_is_one_line(device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        as_device(device)


def test_the_folder_of_a_run_is_answered_with_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no model, but .*model does"):
        local_folder(tmp_path)


@pytest.mark.parametrize("name", ["none", "empty"])
def test_serve_refuses_a_wrong_folder_before_it_listens(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(main, ["serve", str(tmp_path / name), "--port", "0"])
    assert done.exit_code == 1 and "http://" not in done.output
    assert ("config.json is missing" if name == "empty" else "there is no folder") in done.output


def test_lines_of_a_run_in_a_file_are_not_broken_at_80(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal().width == 120  # pytest's own output is no terminal either
    monkeypatch.setenv("COLUMNS", "90")
    assert terminal().width == 90
