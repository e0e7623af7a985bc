"""``chiasm export``: write a model in another library's layout."""

from __future__ import annotations

from pathlib import Path

import click

from chiasm.cli.options import MODEL, loading, open_model


@click.command("export")
@MODEL
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "layout",
    default="hf",
    show_default=True,
    type=click.Choice(["hf", "lavis", "open_clip", "openai_clip"]),
    help="hf: transformers; lavis: BLIP-2 in LAVIS; open_clip, openai_clip: CLIP.",
)
@loading
def command(
    model: str, out: Path, layout: str, device: str | None, dtype: str | None, ignore_fingerprint: bool
) -> None:
    """Write MODEL to OUT so that transformers, and servers that read its layout, load it."""
    vlm = open_model(model, device or "cpu", dtype, ignore_fingerprint)
    vlm.export(out, format=layout)
    click.echo(f"wrote {out}")
