"""``chiasm diff``: what two models differ in."""

from __future__ import annotations

import click


@click.command("diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--names", is_flag=True, help="List every tensor that only one of them has, or that changed its shape.")
def command(first: str, second: str, names: bool) -> None:
    """Tensors of each part that changed from model A to model B and by how much, and changes of configuration, prompt
    and pixels.
    """
    from rich.console import Console
    from rich.table import Table

    from chiasm.train.compare import compare

    found = compare(first, second)
    console = Console()
    if found.same:
        console.print("no difference: tensors, configuration, prompt and pixels are equal", highlight=False)
        return
    table = Table(header_style="bold", box=None)
    for title in ("part", "tensors", "changed", "largest change", "relative", "only in A", "only in B"):
        table.add_column(title, justify="left" if title == "part" else "right")
    for part in found.parts:
        gone = sum(name.startswith("-") for name in part.only)
        numbers = (f"{part.largest:.2e}", f"{part.relative:.2%}") if part.changed else ("", "")
        style = None if part.changed or part.only else "dim"
        table.add_row(
            *(part.part, str(part.tensors), str(part.changed), *numbers, str(gone), str(len(part.only) - gone)),
            style=style,
        )
    console.print(table)
    if names:
        for line in [line for part in found.parts for line in (*part.only, *part.reshaped)]:
            console.print(f"  {line}", highlight=False)
    for key, (a, b) in found.config.items():
        console.print(f"  config {key}: {a!r} → {b!r}", highlight=False, soft_wrap=True)
    for line in found.prompt:
        console.print(f"  {line}", highlight=False, soft_wrap=True)
