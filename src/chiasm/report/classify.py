"""Classified pictures as one HTML file: each with its likeliest classes, wrong ones first, and counts by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from chiasm.errors import DataError
from chiasm.processing.base import Place
from chiasm.processing.open import open_picture
from chiasm.report.run import picture_url

MOST = 200  # pictures on a page


def write_page(
    path: Path,
    record: Mapping[str, Any],
    cards: Sequence[Mapping[str, Any]],
    classes: Sequence[tuple[str, int, int]],
    broken: Sequence[tuple[str, str]],
) -> Path:
    """Write the page; it refers to no other file.

    ``cards``: ``name``, ``path``, ``top`` (label and probability pairs), ``truth``, ``right``. ``classes``: name, true
    members, found. ``broken``: name and reason.
    """
    ordered = sorted(cards, key=lambda card: card["right"])  # a stable order: wrong ones first
    shown = [dict(card) | {"url": _picture(card["path"])} for card in ordered[:MOST]]
    env = Environment(loader=PackageLoader("chiasm.report", "pages"), autoescape=True, trim_blocks=True)
    page = env.get_template("classify.html").render(
        record=record, cards=shown, more=len(cards) - len(shown), classes=classes, broken=broken
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _picture(path: Path) -> str | None:
    try:
        return picture_url(open_picture(str(path), Place(path.name, 0, 1)))
    except DataError:
        return None
