"""``chiasm train``: a recipe's stages, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from chiasm.cli.options import OVERRIDES


@click.command("train")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@OVERRIDES
@click.option("--tiny", is_flag=True, help="The recipe's tiny form: the same steps on a small model and little data.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in the recipe's folder.")
@click.option("--force", is_flag=True, help="Remove what another recipe's run left in the folder, and begin anew.")
def command(recipe: Path, overrides: tuple[str, ...], tiny: bool, resume: bool, force: bool) -> None:
    """Train by the YAML file RECIPE; words like stages.0.lr=1e-3 override its keys."""
    from chiasm.config import parse_overrides
    from chiasm.train import load_recipe, train

    loaded = load_recipe(recipe, parse_overrides(overrides), tiny=tiny)
    try:
        train(loaded, resume=resume, force=force)
    except KeyboardInterrupt:
        click.echo(_stopped(loaded), err=True)
        raise SystemExit(130) from None


def _stopped(recipe: Any) -> str:
    """What a run that was stopped by hand left, and how to go on."""
    from chiasm.train.checkpoint import checkpoints

    folders = [Path(recipe.out) / stage.name for stage in recipe.stages]
    finished = [folder.name for folder in folders if (folder / "done.json").is_file()]
    kept = [path for folder in folders for path in checkpoints(folder / "checkpoints")]
    if kept:
        return f"Stopped. The newest checkpoint is {kept[-1]}: the same command with --resume goes on from it"
    if finished:
        return f"Stopped. Finished before: {', '.join(finished)}; the same command with --resume goes on after it"
    return "Stopped. There is no checkpoint to go on from: a stage's save_every says how often one is written"
