"""Every relative link of the written pages leads to a file that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def dead(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere; anchors after ``#`` must be headings of the page they name."""
    found = []
    for match in LINK.finditer(CODE.sub("", page.read_text(encoding="utf-8"))):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(link)
    return found


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links: lower case, marks left out, blanks as hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    assert not dead(page), f"{page.relative_to(ROOT)} links to what is not there: {', '.join(dead(page))}"


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](b.md) [here](#one-two) [c](#three) `[code](none.md)` [web](https://x.org)\n")
    assert dead(page) == ["b.md", "#three"]


def test_the_index_names_every_page() -> None:
    """``docs/README.md`` links to each page of ``docs/``; those of presets and decisions stand in their own indexes."""
    for index in (ROOT / "docs/README.md", ROOT / "docs/decisions/README.md", ROOT / "docs/presets/README.md"):
        listed = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", index.read_text("utf-8"))}
        pages = set(index.parent.glob("*.md")) - {index}
        if index.parent.name == "docs":
            pages |= set(index.parent.glob("training/*.md"))
        missing = sorted(page.name for page in pages - listed)
        assert not missing, f"{index.relative_to(ROOT)} does not name {', '.join(missing)}"


def test_numbers_of_decisions_are_unique() -> None:
    numbers = [page.name.split("-")[0] for page in (ROOT / "docs/decisions").glob("[0-9]*.md")]
    assert sorted(set(numbers)) == sorted(numbers), f"a number twice: {sorted(numbers)}"
