"""The command line in bad company: Ctrl-C, pipes, narrow and old terminals, files that are not what they seem."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import chiasm
import chiasm.train.compare
import chiasm.vlm
from chiasm.cli import VERBS, main
from chiasm.presets import presets

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "llava-1.5.yaml"


def run(*words: str) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_eighty_columns(verb: str):
    shown = CliRunner().invoke(main, [verb, "--help"], terminal_width=80)
    assert shown.exit_code == 0 and all(len(line) <= 80 for line in shown.output.splitlines())
    wrong = run(verb, "--no-such-option")
    assert wrong.exit_code == 2 and "No such option '--no-such-option'" in wrong.output


FILES: dict[str, tuple[bytes | None, str]] = {
    "missing.yaml": (None, "does not exist|No such file"),
    "empty.yaml": (b"", "is empty, a table of keys was expected"),
    "bytes.yaml": (bytes(range(256)), "byte 128 is not UTF-8"),
    "list.yaml": (b"- a\n", "holds list, a table of keys was expected"),
    "broken.yaml": (b"a: [1", "not YAML"),
    "typo.yaml": (b"naem: x\n", "unknown key 'naem'; did you mean 'name'"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verb", ["train", "plan", "check"])
def test_a_recipe_that_is_none(tmp_path: Path, verb: str, name: str):
    content, said = FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run(verb, tmp_path / name)
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit)
    assert any(part in done.output for part in said.split("|")) and name in done.output


LONG: dict[str, tuple[str, ...]] = {
    "train": (str(RECIPE), "--tiny"),
    "eval": ("model", str(ROOT / "recipes" / "demo.yaml")),
    "chat": ("model", "hello"),
    "generate": ("model", "hello"),
    "inspect": ("model", "hello"),
    "export": ("model", "out"),
    "diff": ("model", "other"),
    "merge": ("model", "out"),
}


@pytest.mark.parametrize("verb", LONG)
def test_ctrl_c_is_one_line_and_130(verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    for place in ("chiasm.vlm.load", "chiasm.train.compare.load", "chiasm.train.train"):
        monkeypatch.setattr(place, interrupted)
    monkeypatch.setattr(chiasm, "load", interrupted, raising=False)
    done = run(verb, *LONG[verb])
    assert done.exit_code == 130, done.output
    assert done.output.strip().startswith("Stopped") and "Traceback" not in done.output
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]


def test_lists_are_whole_in_a_pipe():
    done = CliRunner().invoke(main, ["list", "presets"], env={"COLUMNS": "80"})
    assert done.exit_code == 0 and "\x1b" not in done.output and "…" not in done.output
    for record in presets():
        assert record.name in done.output and record.paper in done.output


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "utf-8"])
def test_terminals_that_cannot_write_every_sign(encoding: str, monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    main(["show", "llava-1.5-7b", "--tiny"], standalone_mode=False)
    sys.stdout.flush()
    text = written.getvalue().decode("utf-8" if encoding == "ascii" else encoding)  # click takes ASCII for a mistake
    assert "connectors.image" in text and ("▼" in text) == (encoding != "iso-8859-1") and "\x1b" not in text


@pytest.mark.parametrize("word", ["mine:Source", "llava_json"])
def test_a_source_is_no_recipe(word: str):
    done = run("check", word)
    assert done.exit_code == 1 and f"a SOURCE is written type={word}" in done.output


def test_a_file_of_lines_is_no_prompt(tmp_path: Path):
    done = run("generate", "model", tmp_path / "lines.jsonl")
    assert done.exit_code == 2 and "--input" in done.output
