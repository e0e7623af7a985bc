"""A LLaVA data set with faults planted at known places, for the tests of ``chiasm check``."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

LONG = 120  # tokens; the recipes of these tests cut at it


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def dataset(folder: Path, count: int, seed: int = 0, share: float = 0.05) -> dict[str, set[int]]:
    """``count`` samples with different pictures; ``share`` of them with a fault. Returns kind → planted places."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    records: list[Any] = []
    for i in range(count):
        color = (i * 37 % 256, i * 91 % 256, i % 256)
        Image.new("RGB", (16 + i % 9, 16 + i % 7), color).save(pictures / f"{i}.png")
        records.append({"id": f"s{i}", "image": f"{i}.png", "conversations": talk(f"<image>\nWhat {i}?", f"red {i}")})
    places = random.Random(seed).sample(range(count), max(len(FAULTS), round(share * count)))
    planted: dict[str, set[int]] = {}
    for turn, i in enumerate(places):
        kind, plant = FAULTS[turn % len(FAULTS)]
        plant(records[i], pictures / f"{i}.png")
        planted.setdefault(kind, set()).add(i)
    lines = [json.dumps(record) for record in records]
    for i in planted["record"]:
        lines[i] = lines[i][:-9]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return planted


def missing(record: Any, path: Path) -> None:
    path.unlink()


def directory(record: Any, path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(record: Any, path: Path) -> None:
    path.write_bytes(b"")


def web_page(record: Any, path: Path) -> None:
    path.write_text("<html><body>404</body></html>")


def oversized(record: Any, path: Path) -> None:
    """A header that says 60,000 by 60,000 pixels."""
    size = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size))
    path.write_bytes(png + struct.pack(">I", 9) + b"IDAT" + bytes(13))


def two_placeholders(record: Any, path: Path) -> None:
    record["conversations"][0]["value"] += " <image>"


def no_answer(record: Any, path: Path) -> None:
    record["conversations"][1]["value"] = "  "


def role(record: Any, path: Path) -> None:
    record["conversations"][1]["from"] = "bot"


def broken_line(record: Any, path: Path) -> None:
    """The line is cut when the file is written."""


def long_question(record: Any, path: Path) -> None:
    record["conversations"][0]["value"] += " and" * LONG


FAULTS = [
    ("missing_picture", missing),
    ("picture_is_folder", directory),
    ("empty_picture", empty),
    ("broken_picture", web_page),
    ("oversized_picture", oversized),
    ("placeholders", two_placeholders),
    ("empty_answer", no_answer),
    ("role", role),
    ("record", broken_line),
    ("too_long", long_question),
]


def truncated(path: Path) -> None:
    """A picture whose header is right and whose pixels are cut off."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "PNG")
    path.write_bytes(buffer.getvalue()[:900])
