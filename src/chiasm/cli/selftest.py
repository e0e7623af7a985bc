"""``chiasm selftest``: promises of the package, tried on the user's own recipe."""

from __future__ import annotations

from pathlib import Path

import click

from chiasm.cli.options import OVERRIDES


@click.group("selftest")
def command() -> None:
    """Try a promise of the package on your own recipe."""


@command.command("resume")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@OVERRIDES
@click.option("--tiny", is_flag=True, help="The recipe's tiny form.")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1), help="Runs that are killed.")
@click.option("--kills", default=3, show_default=True, type=click.IntRange(1), help="Kills of a run, at most.")
@click.option("--steps", default=6, show_default=True, type=click.IntRange(2), help="Steps of each stage, at most.")
@click.option("--save-every", default=1, show_default=True, type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--seed", default=0, show_default=True, help="Chooses the moments of the kills.")
@click.option("--out", type=click.Path(path_type=Path), help="An empty folder to work in. Default: a temporary one.")
def resume(
    recipe: Path,
    overrides: tuple[str, ...],
    tiny: bool,
    runs: int,
    kills: int,
    steps: int,
    save_every: int,
    seed: int,
    out: Path | None,
) -> None:
    """Kill RECIPE at random moments, resume it, and compare its end with an undisturbed one, bit by bit."""
    import tempfile

    from chiasm.config import parse_overrides
    from chiasm.train import load_recipe
    from chiasm.train.selftest import selftest

    made = load_recipe(recipe, parse_overrides(overrides), tiny=tiny)
    with tempfile.TemporaryDirectory() as folder:
        outcome = selftest(made, out or Path(folder) / "selftest", runs, steps, save_every, seed, kills, click.echo)
    click.echo(outcome.told())
    if not outcome.equal:
        raise SystemExit(1)
