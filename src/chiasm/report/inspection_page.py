"""The inspection as a terminal picture and as a self-contained HTML page."""

from __future__ import annotations

import base64
import io
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chiasm.processing.shown import TokenRow
from chiasm.report.inspection import Walk


def visible(text: str) -> str:
    """A token's text with its spaces and newlines to be seen."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") if not text.strip() else text.replace("\n", "⏎")


def runs(tokens: list[TokenRow]) -> list[dict[str, object]]:
    """Tokens grouped: a run of one medium's slots, or a run of text."""
    result = []
    for medium, rows in groupby(tokens, key=lambda row: row.medium):
        found = list(rows)
        result.append({"medium": medium, "count": len(found), "rows": found})
    return result


def write_page(walk: Walk, path: str | Path) -> Path:
    """The walk as one HTML file without any other."""
    env = Environment(loader=PackageLoader("chiasm.report", "pages"), autoescape=True)
    env.filters.update(visible=visible, url=data_url)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(env.get_template("inspection.html").render(w=walk, runs=runs(walk.tokens)), encoding="utf-8")
    return path


def data_url(picture: Image.Image) -> str:
    """A picture as a PNG data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def show(walk: Walk, console: Console | None = None) -> None:
    """The walk in the terminal: tokens coloured by loss, stages as a table, the next token's candidates."""
    console = console or Console()
    console.print(f"[bold]{walk.title}[/]  " + ", ".join(f"{v} {k}" for k, v in walk.counts.items()))
    line = Text()
    for run in runs(walk.tokens):
        if run["medium"] is not None:
            line.append(f"⟨{run['medium']} × {run['count']}⟩", style="black on bright_blue")
            continue
        for row in run["rows"]:  # type: ignore[attr-defined]
            line.append(row.text, style="black on green" if row.trained else "")
    console.print(line)
    console.print("[dim]green: learned from · blue: slots of a medium[/]\n")
    for medium in walk.media:
        console.print(medium)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("stage", "shape", "what it is"):
        table.add_column(column, overflow="fold")
    for stage in walk.stages:
        table.add_row(Text(stage.name), Text(stage.shape), f"{stage.what} [dim]{stage.numbers}[/]")
    console.print(table)
    console.print("\n[bold]next token[/]")
    for text, p in walk.candidates:
        console.print(Text(f"  {100 * p:5.1f} %  {'█' * round(30 * p):30}  {visible(text)!r}"))
    if walk.answer:
        console.print(Text.assemble(("\nanswer  ", "bold"), walk.answer))
