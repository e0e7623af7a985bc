"""What a check of the data found: tables in the terminal, one HTML file with the pictures of the worst, and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chiasm.data.base import Example
from chiasm.data.check import KINDS, Finding, Kind, Summary
from chiasm.data.mixture import Mixture
from chiasm.errors import ChiasmError
from chiasm.report.run import picture_urls

SHOWN = 12  # findings of a kind on the page
WIDTH, HEIGHT = 640, 120  # of a histogram


@dataclass(frozen=True)
class Card:
    """One finding on the page, with its pictures where they can be opened."""

    finding: Finding
    said: str
    pictures: list[str]


@dataclass(frozen=True)
class Group:
    """All findings of one kind."""

    kind: Kind
    count: int
    cards: list[Card]


def show(summary: Summary, console: Console) -> None:
    """The numbers of each source, and how many findings of each kind there are with one example."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("source", overflow="fold")
    for column in ("samples", "bad", "pictures", "text only", "tokens", "95 %", "longest", "media", "learned"):
        table.add_column(column, justify="right")
    for s in summary.sources:
        lengths = [f"{s.mean:.0f}", f"{s.p95:,}", f"{s.longest:,}", f"{s.media:.0f}", f"{s.targets:.0f}"]
        known = lengths if s.longest else ["–"] * 5
        bad = Text(f"{s.bad:,}", style="bold red" if s.bad else "")
        table.add_row(Text(s.name), f"{s.samples:,}", bad, f"{s.pictures:,}", f"{s.text_only:,}", *known)
    console.print(table)
    if summary.longest:
        long = summary.longest
        console.print(
            f"longest sample: {long.id!r} of {long.source}, number {long.index}: {long.tokens:,} tokens, "
            f"{long.media:,} of media",
            highlight=False,
            markup=False,
        )
    if not summary.findings:
        console.print("[green]nothing found[/]")
        return
    table = Table(box=None, header_style="bold")
    for column in ("found", "", "for instance"):
        table.add_column(column, justify="right" if column == "found" else "left", overflow="fold")
    for name, kind in KINDS.items():
        if summary.counts[name]:
            one = next(f for f in summary.findings if f.kind == name)
            style = "red" if kind.fault else "yellow"
            table.add_row(f"{summary.counts[name]:,}", Text(kind.title, style=style), Text(_short(one.message)))
    console.print()
    console.print(table)
    share = 100 * summary.bad / max(1, summary.samples)
    told = f"{summary.bad:,} of {summary.samples:,} samples ({share:.3g} %) would stop training" if summary.bad else ""
    console.print(told or "[green]no sample would stop training[/]", highlight=False)


def write_json(summary: Summary, path: Path) -> Path:
    """Numbers and all findings."""
    rows = [{**vars(f), "fault": f.fault} for f in summary.findings]
    path.write_text(json.dumps(summary.dump() | {"findings": rows}, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def write_page(summary: Summary, mixture: Mixture, path: Path, title: str) -> Path:
    """The page; it refers to no other file. Pictures are read from ``mixture``."""
    env = Environment(loader=PackageLoader("chiasm.report", "pages"), autoescape=True, trim_blocks=True)
    env.filters.update(number=lambda n: f"{n:,.0f}", bars=_bars)
    groups = []
    for name, kind in KINDS.items():
        found = [f for f in summary.findings if f.kind == name]
        if found:
            groups.append(Group(kind, len(found), [_card(f, mixture) for f in found[:SHOWN]]))
    longest = None
    if summary.longest:
        told = f"{summary.longest.tokens:,} tokens, {summary.longest.media:,} of them of media"
        longest = _card(
            Finding(summary.longest.source, summary.longest.index, summary.longest.id, "too_long", told), mixture
        )
    page = env.get_template("check.html").render(title=title, s=summary, groups=groups, longest=longest)
    path.write_text(page, encoding="utf-8")
    return path


def _card(finding: Finding, mixture: Mixture) -> Card:
    try:
        example = mixture[mixture.names.index(finding.source), finding.index]
    except Exception:  # its record is what is wrong
        return Card(finding, "", [])
    said = " ".join(f"{m.role}: {m.text.strip()}" for m in example.messages)
    return Card(finding, _short(said, 300), _pictures(example))


def _pictures(example: Example) -> list[str]:
    try:
        return picture_urls(example)
    except (ChiasmError, OSError, ValueError):
        return []


def _bars(histogram: Any) -> Markup:
    """A histogram of lengths as SVG. Numbers only, so nothing in it needs escaping."""
    if not histogram:
        return Markup("")
    most = max(n for _, _, n in histogram)
    wide = WIDTH / len(histogram)
    parts = [
        f'<svg class="bars" viewBox="0 0 {WIDTH} {HEIGHT + 18}" role="img" aria-label="samples by number of tokens">'
    ]
    for i, (low, high, n) in enumerate(histogram):
        tall = HEIGHT * n / most
        parts.append(
            f'<rect x="{i * wide:.1f}" y="{HEIGHT - tall:.1f}" width="{max(1.0, wide - 1):.1f}" height="{tall:.1f}">'
            f"<title>{low} to {high - 1} tokens: {n} samples</title></rect>"
        )
    parts.append(f'<text x="0" y="{HEIGHT + 14}">{histogram[0][0]:,} tokens</text>')
    parts.append(f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{histogram[-1][1] - 1:,}</text></svg>')
    return Markup("".join(parts))


def _short(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
