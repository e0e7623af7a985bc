"""What can be refused is refused before the first step, in one message with the sample, numbers and remedy."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from tiny_run import model_config, source, tokenizer_folder, write_pictures

from chiasm.errors import ChiasmError, ConfigError, DataError
from chiasm.train import Recipe, load_recipe, train

QUIET = Console(file=io.StringIO())


def recipe(folder: Path, **changes: Any) -> Recipe:
    values = {
        "model": {"config": model_config(), "tokenizer": str(tokenizer_folder(folder / "tokenizer"))},
        "data": {"colors": {"source": source(folder)}},
        "stages": [{"name": "align", "plan": "align", "steps": 2, "batch_size": 2, "lr": 1e-3}],
        "out": str(folder / "run"),
    }
    return Recipe.parse(values).edit(**changes)


def refused(folder: Path, match: str, kind: type[ChiasmError] = DataError, **changes: Any) -> str:
    with pytest.raises(kind, match=match) as caught:
        train(recipe(folder, **changes), console=QUIET)
    assert not list(folder.glob("run/*/log.jsonl")), "a step was taken"
    return str(caught.value)


def change(folder: Path, number: int, **values: Any) -> None:
    file = folder / "train.json"
    records = json.loads(file.read_text())
    records[number].update(values)
    file.write_text(json.dumps(records))


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def test_the_recipe_itself_runs(folder):
    vlm = train(recipe(folder), console=QUIET)
    assert (folder / "run" / "model" / "config.json").is_file() and (folder / "run" / "report.html").is_file()
    assert "stage align: 2 steps of 2 samples" in vlm.config.provenance.history[-1]


def test_missing_picture(folder):
    (folder / "pictures" / "5.png").unlink()
    refused(folder, r"'p5'.*5\.png")


def test_truncated_picture(folder):
    path = folder / "pictures" / "5.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:900])
    refused(folder, r"'p5'.*5\.png")


def test_zero_byte_picture(folder):
    (folder / "pictures" / "5.png").write_bytes(b"")
    assert "0 bytes" in refused(folder, r"'p5'.*5\.png")


def test_huge_picture(folder):
    """The header says 20,000 by 20,000: refused before a pixel is decoded."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )
    (folder / "pictures" / "5.png").write_bytes(png)
    assert "400000000" in refused(folder, r"'p5'")


def test_picture_path_that_is_a_folder(folder):
    (folder / "pictures" / "5.png").unlink()
    (folder / "pictures" / "5.png").mkdir()
    refused(folder, r"'p5'.*5\.png.*(folder|directory)")


def test_several_bad_samples_are_told_together(folder):
    for i in (1, 4, 6):
        (folder / "pictures" / f"{i}.png").unlink()
    message = refused(folder, "3 of the 8 samples")
    assert all(f"'p{i}'" in message for i in (1, 4, 6))


def test_placeholders_and_media_that_do_not_agree(folder):
    change(folder, 2, conversations=turns("<image> and <image>?", "red"))
    refused(folder, "'p2': has 2 placeholders .* but 1 media")


def test_empty_answer(folder):
    change(folder, 2, conversations=turns("<image>\nWhat?", ""))
    refused(folder, "'p2'")


def test_answer_cut_off_whole(folder):
    change(folder, 2, conversations=turns("<image>\n" + "long question " * 10, "red"))
    message = refused(folder, "'p2'", **{"stages.0.max_length": 100})
    assert "100" in message


def test_unknown_role(folder):
    change(folder, 2, conversations=[{"from": "robot", "value": "hi <image>"}])
    refused(folder, "'p2', turn 1: unknown role 'robot'")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("stages.0.learning_rate", 1, "unknown key 'stages.0.learning_rate'"),
        ("stages.0.plan", "aligned", "unknown plan 'aligned'"),
        ("stages.0.plan", {"*": "train", "encoder": "freeze"}, "'encoder' matches 0 of"),
        ("stages.0.plan", {"*": "frozen"}, "unknown action 'frozen' in a plan; did you mean 'freeze'"),
        ("stages.0.plan", {"lm": "train"}, "says nothing about"),
        ("stages.0.plan", {"*": "0"}, "learning rate is 0.0; it must be above 0"),
        ("stages.0.plan", {"*": "freeze"}, "freezes all"),
        ("stages.0.objective", "next_tokens", "unknown objective 'next_tokens'; did you mean 'next_token'"),
        ("stages.0.epochs", 1, "steps is 2 and epochs is 1"),
        ("stages.0.data", ["colours"], "unknown data source 'colours'; did you mean 'colors'"),
        ("data.colors.source.type", "llava_jsn", "unknown source 'llava_jsn'"),
        ("model.config.model.connectors.image.type", "mpl", "unknown connector 'mpl'; did you mean 'mlp'"),
        ("model.config.model.lm.dims", 3, "unknown key 'dims'; did you mean 'dim'"),
        ("model.preset", "llava-1.5-7b", "exactly one of preset, folder and config"),
        (
            "held_out",
            {"x": {"source": "playground", "metric": "exactly"}},
            "unknown metric 'exactly'; did you mean 'exact'",
        ),
    ],
)
def test_configuration(folder, key, value, match):
    with pytest.raises(ChiasmError, match=match):
        train(recipe(folder, **{key: value}), console=QUIET)
    assert not list(folder.glob("run/*/log.jsonl"))


def test_unknown_preset(folder):
    refused(folder, "unknown preset 'llava-1.5-8b'; did you mean", ChiasmError, model={"preset": "llava-1.5-8b"})


def test_missing_tokenizer(folder):
    refused(folder, "model.tokenizer is missing", ConfigError, **{"model.tokenizer": None})


def test_recipe_files(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: {preset: a}\ndata: {}\nstages: [{name: s, steps: 1, lr: 1e-3}]\ntiny: {stages.0.lr: 5e-4}\n"
    )
    assert load_recipe(file).stages[0].lr == 1e-3
    assert load_recipe(file, tiny=True).stages[0].lr == 5e-4
    assert load_recipe(file, {"stages.0.lr": 2e-3, "seed": 4}, tiny=True).stages[0].lr == 2e-3
    with pytest.raises(ConfigError, match=r"r\.yaml: unknown key 'sed'; did you mean 'seed'"):
        load_recipe(file, {"sed": 4})
    file.write_text("model: {preset: a}\ndata: {}\nstages: [{name: s, steps: 1, lr: 1e-3}]\n")
    with pytest.raises(ConfigError, match="has no tiny form"):
        load_recipe(file, tiny=True)
