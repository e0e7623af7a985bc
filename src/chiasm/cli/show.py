"""``chiasm show``: what a preset or a saved model is made of."""

from __future__ import annotations

import click

from chiasm.cli.options import OVERRIDES


@click.command("show")
@click.argument("name", metavar="PRESET|FOLDER")
@OVERRIDES
@click.option("--yaml", "as_yaml", is_flag=True, help="The whole configuration, to edit and train from.")
@click.option("--tiny", is_flag=True, help="The preset's tiny form.")
def command(name: str, overrides: tuple[str, ...], as_yaml: bool, tiny: bool) -> None:
    """Parts, widths, token counts and provenance of a preset or a saved folder."""
    from pathlib import Path

    import yaml

    import chiasm
    from chiasm.config import parse_overrides

    if Path(name).is_dir():
        from chiasm.vlm import read_config

        config = read_config(name)
    else:
        config = chiasm.preset(name, tiny=tiny)
    config = config.edit(**parse_overrides(overrides))
    if as_yaml:
        click.echo(yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True, width=120))
        return
    from chiasm.presets.page import describe

    click.echo(describe(config))
