"""``chiasm search``: the nearest pictures or texts of an index."""

from __future__ import annotations

import json
from pathlib import Path

import click

from chiasm.cli.options import PICTURES, loading, plain, quantized

PATH = click.Path(path_type=Path)


@click.command("search")
@click.argument("query")
@click.option("--in", "where", default=Path("."), type=PATH, help="The indexed folder, or its index. Default: here.")
@click.option("--for", "among", default="image", show_default=True, type=click.Choice(["image", "text"]))
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="How many results.")
@click.option("--html", default=None, type=PATH, help="The page of results. Default: search.html in the index.")
@click.option("--json", "as_json", is_flag=True, help="Results as JSON lines, and no page.")
@click.option("--model", default=None, help="Default: the model that made the index.")
@quantized
@loading
def command(
    query: str,
    where: Path,
    among: str,
    k: int,
    html: Path | None,
    as_json: bool,
    model: str | None,
    quantize: str | None,
    device: str | None,
    dtype: str | None,
    ignore_fingerprint: bool,
) -> None:
    """Find what is nearest to QUERY, a text or the path of a picture, and show it on a page."""
    from rich.console import Console
    from rich.table import Table

    from chiasm.cli.index import opened
    from chiasm.errors import DataError
    from chiasm.report.search import write_page
    from chiasm.retrieve import Index
    from chiasm.retrieve.index import CATALOGUE, FOLDER

    if not query.strip():
        raise DataError("the query is empty; give a text such as 'a red car', or the path of a picture")
    if Path(query).suffix.lower() in PICTURES and len(query.split()) == 1 and not Path(query).is_file():
        raise DataError(f"{query}: there is no such picture; give the path of one, or a text of several words")
    place = where if (where / CATALOGUE).is_file() else where / FOLDER
    if not (place / CATALOGUE).is_file():
        raise DataError(f"{where}: holds no index; make one: chiasm index {where} --model MODEL, or name it with --in")
    vlm, name = opened(place, model, device, dtype, ignore_fingerprint, quantize)
    index = Index.open(place, vlm, made_by=name)
    is_picture = Path(query).suffix.lower() in PICTURES and Path(query).is_file()
    hits = index.search(Path(query) if is_picture else query, k, among)  # type: ignore[arg-type]
    if as_json:
        for hit in hits:
            path = None if hit.path is None else str(hit.path)
            click.echo(json.dumps({"name": hit.name, "score": round(hit.score, 6), "path": path}, ensure_ascii=False))
        return
    console = Console()
    table = Table(box=None, header_style="bold")
    table.add_column("cosine", justify="right")
    table.add_column("text" if among == "text" else "picture", overflow="fold")
    for hit in hits:
        table.add_row(f"{hit.score:.3f}", plain(hit.name))
    console.print(table)
    page = write_page(html or place / "search.html", Path(query) if is_picture else query, hits, index)
    console.print(f"Page: {page}", highlight=False, soft_wrap=True)
