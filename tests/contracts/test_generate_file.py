"""``chiasm generate --input``: what is not understood is refused with its line, and nothing is left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_kit import build, make_tokenizer
from click.testing import CliRunner, Result
from PIL import Image

from chiasm.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return build(make_tokenizer(folder / "tokenizer")).save(folder / "model")


def run(model: Path, tmp_path: Path, rows: list[Any], *words: str) -> Result:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return CliRunner().invoke(main, ["generate", str(model), "--input", str(file), "--max-new-tokens", "2", *words])


def asked(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*content, {"type": "text", "text": "x\u2028y"}]}]


def test_every_row_is_answered(model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    rows = [{"messages": asked()}, {"id": "b", "messages": asked({"type": "image", "image": str(tmp_path / "a.png")})}]
    done = run(model, tmp_path, rows, "--output", str(tmp_path / "out.jsonl"))
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["1", "b"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": asked(), "images": ["a.png"]}, "line 2: unknown key 'images'"),  # they would never be looked at
        ({"id": "b"}, "line 2: needs a 'messages' list"),
        ({"id": "b", "messages": asked({"type": "image", "image": "none.png"})}, "batch from 'a' to 'b': sample '1'"),
    ],
)
def test_a_bad_row_is_named(model: Path, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    done = run(model, tmp_path, [{"id": "a", "messages": asked()}, row])
    assert done.exit_code == 1 and said in done.output


def test_an_answer_to_a_prompt_goes_to_no_file(model: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["generate", str(model), "x", "--output", str(tmp_path / "out.jsonl")])
    assert done.exit_code == 2 and "--output takes the answers to --input" in done.output
