"""``chiasm index``: vectors of the pictures of a folder, to be searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from chiasm.cli.options import loading, open_model, quantized

PATH = click.Path(path_type=Path)


@click.command("index")
@click.argument("folder", type=PATH)
@click.option("--model", default=None, help="A model of two towers. Default: the one that made the index.")
@click.option("--index", "place", default=None, type=PATH, help="Folder of the index. Default: FOLDER/.chiasm-index.")
@click.option("--texts", default=None, type=PATH, help="Also index the lines of this file, for pictures to find.")
@click.option("--engine", default=None, type=click.Choice(["exact", "faiss"]), help="Default: exact.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1))
@click.option("--workers", default=2, show_default=True, type=click.IntRange(0), help="Threads that decode pictures.")
@click.option("--ray", default=None, type=click.IntRange(1), help="Share the work among so many Ray actors.")
@quantized
@loading
def command(
    folder: Path,
    model: str | None,
    place: Path | None,
    texts: Path | None,
    engine: str | None,
    batch_size: int,
    workers: int,
    ray: int | None,
    quantize: str | None,
    device: str | None,
    dtype: str | None,
    ignore_fingerprint: bool,
) -> None:
    """Index the pictures in FOLDER and its folders; again: only what is new, changed or deleted.

    Pictures that cannot be read are listed and left out. A run that is stopped goes on where it was.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from chiasm.config import read_lines
    from chiasm.errors import ConfigError, DataError
    from chiasm.retrieve import Index
    from chiasm.retrieve.index import FOLDER

    console = Console()
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder; give one that holds pictures")
    place = place or folder / FOLDER
    vlm, name = opened(place, model, device, dtype, ignore_fingerprint, quantize)
    index = Index.open(place, vlm, engine, made_by=name)  # type: ignore[arg-type]
    embedder = None
    if ray is not None:
        from chiasm.retrieve.ray import embedder as shared

        if quantize is not None:
            raise ConfigError("--ray and --quantize do not go together: the actors load the model as it is")
        embedder = shared(name, actors=ray, batch=batch_size, dtype=dtype)
    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        update = index.update_folder(
            folder, embedder, lambda done, of: bar.update(task, completed=done, total=of), batch_size, workers
        )
    told = f"{update.added} new, {update.changed} changed, {update.removed} deleted, {update.kept} as before"
    console.print(f"Pictures: {told}; {update.seconds:.1f} s", highlight=False)
    if texts is not None:
        lines = [line.strip() for line in read_lines(texts)]
        found = index.update_texts([line for line in lines if line], batch=batch_size)
        console.print(f"Texts: {found.added} new, {found.removed} deleted, {found.kept} as before", highlight=False)
    _told(console, index)
    held = ", ".join(f"{good:,} {kind}s" for kind, (good, _) in sorted(index.catalogue.counts().items()))
    console.print(f"Index: {place} ({held})", highlight=False, soft_wrap=True)


def _told(console: Any, index: Any) -> None:
    """What could not be read, the first ten of each kind."""
    for kind, noun in (("image", "pictures"), ("text", "texts")):
        broken = list(index.catalogue.broken(kind))
        if broken:
            console.print(f"{len(broken)} {noun} cannot be read and are left out:", highlight=False)
        for item in broken[:10]:
            name = item.name if len(item.name) <= 60 else item.name[:57] + "..."
            console.print(f"  {name}: {item.why}", highlight=False, markup=False, soft_wrap=True)
        if len(broken) > 10:
            console.print(f"  … and {len(broken) - 10} more", highlight=False)


def opened(
    place: Path, model: str | None, device: str | None, dtype: str | None, ignore: bool, quantize: str | None = None
) -> tuple[object, str]:
    """The model that is asked for, or the one that an index says it was made by, in its number type; and its name."""
    from chiasm.errors import DataError
    from chiasm.retrieve.catalogue import Catalogue
    from chiasm.retrieve.index import CATALOGUE

    if model is None and (place / CATALOGUE).is_file():
        catalogue = Catalogue(place / CATALOGUE)
        model, made = catalogue.fact("model"), catalogue.fact("mark") or {}
        dtype, quantize = dtype or made.get("dtype"), quantize or made.get("quantized")
        catalogue.close()
    if not model:
        raise DataError(f"{place}: there is no index that names its model; give one with --model")
    name = str(Path(model).resolve()) if Path(model).exists() else model
    return open_model(name, device, dtype, ignore, quantize), name
