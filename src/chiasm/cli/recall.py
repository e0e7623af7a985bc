"""``chiasm recall``: R@1, R@5 and R@10 on the protocol files of COCO and Flickr30k."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from chiasm.cli.options import MODEL, loading, open_model, quantized

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("recall")
@MODEL
@click.argument("protocol", type=FILE)
@click.option("--images", required=True, type=click.Path(path_type=Path), help="The folder that its paths begin in.")
@click.option("--split", default="test", show_default=True)
@click.option("--captions", default=5, show_default=True, type=click.IntRange(0), help="Of each picture; 0: all.")
@click.option("--matcher", default=None, help="A model that judges pairs: ranks each query's first candidates again.")
@click.option(
    "--candidates", default=128, show_default=True, type=click.IntRange(1), help="How many (ALBEF COCO: 256)."
)
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1))
@click.option("--workers", default=2, show_default=True, type=click.IntRange(0))
@click.option("--out", default=None, type=click.Path(path_type=Path), help="Also write the numbers as JSON.")
@quantized
@loading
def command(
    model: str,
    protocol: Path,
    images: Path,
    split: str,
    captions: int,
    matcher: str | None,
    candidates: int,
    batch_size: int,
    workers: int,
    out: Path | None,
    **loads: Any,
) -> None:
    """Score MODEL, of two towers, on the file PROTOCOL: Karpathy's dataset_coco.json, or a list as ALBEF has it.

    With --matcher a second column: what MODEL found first, ranked again by a model that reads picture and text together
    (ViLT, ALBEF, BLIP-2's first stage; it may be MODEL itself).
    """
    from rich.console import Console
    from rich.progress import Progress

    from chiasm.eval import matcher as matching
    from chiasm.eval.retrieval import evaluate, read_protocol

    pairs = read_protocol(protocol, images, split, captions or None)
    vlm = open_model(model, **loads)
    other = vlm if matcher in (None, model) else open_model(matcher, **loads)
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("pictures", total=len(pairs.images))
        judge = None
        if matcher is not None:
            shown = bar.add_task("pairs", total=None)
            judge = matching.Judge(
                other, pairs, batch_size, lambda done, of: bar.update(shown, completed=done, total=of)
            )
        found = evaluate(
            vlm,
            pairs,
            judge,
            candidates,
            batch=batch_size,
            workers=workers,
            advance=lambda done, _: bar.update(task, completed=done),
        )
    _told(console, found, judge)
    if out is not None:
        rows = [{"measure": n, "towers": a, "reranked": b} for n, a, b in found.rows()]
        told = {"model": model, "protocol": pairs.name, "pictures": len(pairs.images), "texts": len(pairs.texts)}
        told |= {"matcher": matcher, "candidates": found.candidates, "shortened": found.shortened}
        told |= {"shortened_by_matcher": len(judge.shortened)} if judge else {}
        out.write_text(json.dumps(told | {"rows": rows}, indent=1), encoding="utf-8")


def _told(console: Any, found: Any, judge: Any) -> None:
    """The table, and how many texts lost their end."""
    from rich.table import Table

    pairs = found.pairs
    title = f"{pairs.name}: {len(pairs.images):,} pictures, {len(pairs.texts):,} texts"
    table = Table(title=title, title_justify="left", header_style="bold", box=None)
    for column in ("", "two towers", "re-ranked"):
        table.add_column(column, justify="right" if column else "left")
    for name, own, again in found.rows():
        table.add_row(name, f"{100 * own:.1f}", "" if again is None else f"{100 * again:.1f}")
    console.print(table)
    for who, count in (("the towers", found.shortened), ("the matcher", len(judge.shortened) if judge else 0)):
        if count:
            console.print(f"{count:,} of {len(pairs.texts):,} texts are longer than {who} read and lost their end.")
