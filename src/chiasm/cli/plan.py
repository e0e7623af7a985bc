"""``chiasm plan``: what a recipe will train, and how much memory that takes, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import click

from chiasm.cli.options import OVERRIDES


@click.command("plan")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@OVERRIDES
@click.option("--tiny", is_flag=True, help="The recipe's tiny form.")
@click.option("--samples", default=1000, show_default=True, type=click.IntRange(1), help="Looked at for the longest.")
def command(recipe: Path, overrides: tuple[str, ...], tiny: bool, samples: int) -> None:
    """Print each stage's plan (part, parameters, method, learning rate) and its memory for the longest sample.

    No weights are read.
    """
    from rich.console import Console
    from rich.table import Table

    from chiasm.config import parse_overrides
    from chiasm.train import load_recipe
    from chiasm.train.forecast import foresee
    from chiasm.train.log import print_plan

    console = Console()
    for seen in foresee(load_recipe(recipe, parse_overrides(overrides), tiny=tiny), samples):
        print_plan(console, seen.stage.name, seen.plan)
        table = Table(header_style="bold", box=None)
        table.add_column("memory")
        table.add_column("GB", justify="right")
        for name, size in seen.memory.table() if seen.memory else []:
            table.add_row(name, f"{size / 1e9:.3f}", style="bold" if name == "peak" else None)
        console.print(table if seen.memory else f"no forecast: {seen.why}")
        console.print(
            f"a batch of {seen.stage.batch_size} like the longest of {seen.looked} samples ({seen.longest_id}: "
            f"{seen.longest} positions), {seen.stage.dtype}\n",
            highlight=False,
            soft_wrap=True,
        )
