"""``chiasm inspect``: a sample as the model sees it, walked through the model."""

from __future__ import annotations

from pathlib import Path

import click

from chiasm.cli.options import MODEL, loading, open_model, parts, user_message


@click.command("inspect")
@MODEL
@click.argument("words", nargs=-1, metavar="[PICTURE]... [QUESTION]")
@click.option(
    "--recipe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take the sample from its training data.",
)
@click.option("--index", default=0, show_default=True, help="Which example of the recipe's data.")
@click.option("--held-out", is_flag=True, help="Of the recipe's held-out data.")
@click.option(
    "--html", default="inspect.html", show_default=True, type=click.Path(path_type=Path), help="Where the page goes."
)
@click.option(
    "--look", "looks", multiple=True, help="Also where it looked for this word of its answer; * is all of it."
)
@loading
def command(
    model: str,
    words: tuple[str, ...],
    recipe: Path | None,
    index: int,
    held_out: bool,
    html: Path,
    looks: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    ignore_fingerprint: bool,
) -> None:
    """Show tokens coloured by loss, tiles as pictures and every stage's shape, in the terminal and as a page.

    With PICTURE and QUESTION: the prompt as generation sees it. With --recipe: an example as training sees it.
    """
    from chiasm.report.inspection import walk
    from chiasm.report.inspection_page import show, write_page

    if (recipe is None) == (not words):
        raise click.UsageError("give either a QUESTION (with pictures) or --recipe FILE")
    vlm = open_model(model, device, dtype, ignore_fingerprint)
    if recipe is None:
        pictures, question = parts(words)
        if question is None:
            raise click.UsageError(f"{len(pictures)} pictures and no question; add the question in quotes")
        asked = [None if word == "*" else word for word in looks]
        found = walk(vlm, [user_message(pictures, question)], name=question, looks=asked)
    else:
        from chiasm.data.mixture import Mixture
        from chiasm.errors import DataError
        from chiasm.train import load_recipe

        run = load_recipe(recipe)
        mixture = Mixture(run.held_out if held_out else run.data, run.seed)
        refs = mixture.first()
        if not 0 <= index < len(refs):
            raise DataError(f"--index {index}: the recipe's data holds examples 0 to {len(refs) - 1}")
        example = mixture[refs[index]]
        found = walk(vlm, example.messages, train=True, name=example.id)
    show(found)
    click.echo(f"\nwrote {write_page(found, html)}")
