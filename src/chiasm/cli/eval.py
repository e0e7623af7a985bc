"""``chiasm eval``: score a model on held-out examples."""

from __future__ import annotations

from pathlib import Path

import click

from chiasm.cli.options import MODEL, OVERRIDES, loading, open_model, quantized


@click.command("eval")
@MODEL
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@OVERRIDES
@click.option("--out", default=None, type=click.Path(path_type=Path), help="Folder of results. Default: MODEL/eval.")
@click.option("--limit", default=None, type=click.IntRange(1), help="Only the first so many examples of each source.")
@click.option("--batch-size", default=None, type=click.IntRange(1), help="Default: the recipe's.")
@click.option("--max-new-tokens", default=None, type=click.IntRange(1), help="Default: the recipe's.")
@click.option("--no-shuffled", is_flag=True, help="Leave out the control with shuffled pictures.")
@click.option("--tiny", is_flag=True, help="The recipe's tiny form, as it was trained.")
@loading
@quantized
def command(
    model: str,
    recipe: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    limit: int | None,
    batch_size: int | None,
    max_new_tokens: int | None,
    no_shuffled: bool,
    tiny: bool,
    device: str | None,
    dtype: str | None,
    ignore_fingerprint: bool,
    quantize: str | None,
) -> None:
    """Score MODEL on the held-out sources of the YAML file RECIPE and write a table, every answer, and a report."""
    from rich.console import Console

    from chiasm.config import parse_overrides
    from chiasm.eval import evaluate_recipe
    from chiasm.train import load_recipe
    from chiasm.train.distributed import started
    from chiasm.train.model import best_device

    loaded = load_recipe(recipe, parse_overrides(overrides), tiny=tiny)  # its faults are told before a model is read
    with started(best_device(device or "auto")) as ranks:  # under torchrun each rank answers its share
        vlm = open_model(model, device, dtype, ignore_fingerprint, quantize)
        evaluate_recipe(
            vlm,
            loaded,
            out=out or Path(model) / "eval",
            console=None if ranks.first else Console(quiet=True),
            ranks=ranks if ranks.count > 1 else None,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            shuffled=False if no_shuffled else None,
        )
