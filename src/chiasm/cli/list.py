"""``chiasm list``: presets and parts by name."""

from __future__ import annotations

import click

KINDS = [
    "presets",
    "encoders",
    "connectors",
    "lms",
    "fusions",
    "merges",
    "templates",
    "sources",
    "front_ends",
    "objectives",
    "tasks",
    "metrics",
]


WIDE = 240


@click.command("list")
@click.argument("kind", type=click.Choice(KINDS), required=False, metavar="[KIND]")
def command(kind: str | None) -> None:
    """Names that configurations and commands understand. Without KIND: all of them.

    KIND is presets, encoders, connectors, lms, fusions, merges, templates, sources, front_ends, objectives, tasks or
    metrics.
    """
    from rich.console import Console
    from rich.table import Table

    from chiasm import registry

    console = Console()
    if not console.is_terminal:
        console.width = WIDE  # a file or a pipe gets every name whole
    if kind in (None, "presets"):
        from chiasm.presets import presets

        table = Table(title="Presets", title_justify="left", box=None, header_style="bold")
        table.add_column("name", no_wrap=True, min_width=28)
        table.add_column("system", no_wrap=True, min_width=22)
        table.add_column("paper", overflow="ellipsis", no_wrap=True)
        for record in presets():
            table.add_row(record.name, record.family, record.paper)
        console.print(table)
    for plural in KINDS[1:] if kind is None else [k for k in (kind,) if k != "presets"]:
        names = registry.names(plural.removesuffix("s"))
        if plural == "templates":
            from chiasm.processing.templates import TEMPLATES

            names += sorted(TEMPLATES)  # published ones, which are data of type "turns"
        names = names or ["none"]
        console.print(f"[bold]{plural}[/]  " + "  ".join(names), soft_wrap=True)
