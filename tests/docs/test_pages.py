"""The generated pages are those that the presets give today, and every file that the documentation names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chiasm.presets import page, presets

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "presets"


@pytest.mark.parametrize("record", presets(), ids=lambda record: record.name)
def test_page_is_up_to_date(record):
    written = (PAGES / f"{record.name}.md").read_text(encoding="utf-8")
    assert written == page.page(record), f"docs/presets/{record.name}.md is out of date: run `make docs`"


def test_index_is_up_to_date():
    written = (PAGES / "README.md").read_text(encoding="utf-8")
    assert written == page.index(presets()), "docs/presets/README.md is out of date: run `make docs`"


def test_no_page_of_a_preset_that_is_no_more():
    assert {p.stem for p in PAGES.glob("*.md")} == {record.name for record in presets()} | {"README"}


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"
    for target in re.findall(r"`((?:tests|src|docs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / target).exists(), f"{path.name} names {target}, which is not there"
