"""``chiasm demo``: the main job end to end."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("demo")
@click.option(
    "--out", default="runs/demo", show_default=True, type=click.Path(path_type=Path), help="Where results go."
)
@click.option(
    "--steps",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Share of the training steps, for a quick look.",
)
def command(out: Path, steps: float) -> None:
    """Train a small vision-language model on drawn pictures, evaluate it, write a report and a folder to chat with."""
    from chiasm.demo import run

    run(out, share=steps)
