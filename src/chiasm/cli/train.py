"""``chiasm train``: a recipe's stages, one after the other."""

from __future__ import annotations

from pathlib import Path

import click

from chiasm.cli.options import OVERRIDES


@click.command("train")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@OVERRIDES
@click.option("--tiny", is_flag=True, help="The recipe's tiny form: the same steps on a small model and little data.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in the recipe's folder.")
def command(recipe: Path, overrides: tuple[str, ...], tiny: bool, resume: bool) -> None:
    """Train by the YAML file RECIPE; words like stages.0.lr=1e-3 override its keys."""
    from chiasm.config import parse_overrides
    from chiasm.train import load_recipe, train

    train(load_recipe(recipe, parse_overrides(overrides), tiny=tiny), resume=resume)
