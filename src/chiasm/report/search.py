"""The results of a search as one HTML file with the pictures in it."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader

from chiasm.errors import DataError
from chiasm.processing.base import Place
from chiasm.processing.open import open_picture
from chiasm.report.run import picture_url
from chiasm.retrieve import Hit, Index


def write_page(path: Path, query: str | Path, hits: list[Hit], index: Index) -> Path:
    """Write the page; it refers to no other file. A picture that went since it was indexed is said to be gone."""
    env = Environment(loader=PackageLoader("chiasm.report", "pages"), autoescape=True, trim_blocks=True)
    cards = [(hit, None if hit.path is None else _picture(hit.path)) for hit in hits]
    asked = _picture(query) if isinstance(query, Path) else None
    counts = {kind: good for kind, (good, _) in index.catalogue.counts().items()}
    page = env.get_template("search.html").render(
        query=str(query), asked=asked, cards=cards, counts=counts, model=index.catalogue.fact("model"), root=index.root
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _picture(path: Path) -> str | None:
    try:
        return picture_url(open_picture(str(path), Place(path.name, 0, 1)))
    except DataError:
        return None
