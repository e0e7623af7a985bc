"""``chiasm classify``: pictures sorted into classes by words, or by a linear probe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from chiasm.cli.options import loading, open_model, plain, quantized

PATH = click.Path(path_type=Path)
SHOWN = 20  # pictures told of in the terminal


@click.command("classify")
@click.argument("folder", type=PATH)
@click.option("--model", required=True, help="A model of two towers: a folder or a hub name.")
@click.option("--labels", default=None, help="Classes, a,b,c; or a file with one a line. Default: FOLDER's folders.")
@click.option("--templates", default=None, help="A set ('imagenet', 'plain', ...), one prompt with {}, or a file.")
@click.option("--probe", default=None, type=PATH, help="Fit a linear layer to this folder, one folder a class.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Classes kept of each picture.")
@click.option("--independent", is_flag=True, help="Each label for itself (models with a sigmoid loss).")
@click.option("--out", default=None, type=PATH, help="Write every answer here, as JSON lines.")
@click.option("--report", default=None, type=PATH, help="Write a page with the pictures here (.html).")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1))
@click.option("--workers", default=2, show_default=True, type=click.IntRange(0), help="Threads that decode pictures.")
@quantized
@loading
def command(
    folder: Path,
    model: str,
    labels: str | None,
    templates: str | None,
    probe: Path | None,
    quantize: str | None,
    device: str | None,
    dtype: str | None,
    ignore_fingerprint: bool,
    **options: Any,
) -> None:
    """Sort the pictures of FOLDER into classes that are named in words.

    Where FOLDER has one folder a class, the share that is right is told too. Pictures that cannot be read are listed
    and left out.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from chiasm.errors import ConfigError
    from chiasm.eval.classify import probe_folder, zero_shot_folder

    if probe is not None and (labels or templates or options["independent"]):
        raise ConfigError("--probe takes its classes from the folders it is fitted to; leave --labels and prompts out")
    console = Console()
    words, forms = _labels(labels), _templates(templates, folder, labels)
    vlm = open_model(model, device, dtype, ignore_fingerprint, quantize)
    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        shared: dict[str, Any] = {
            "top": options["top"],
            "batch": options["batch_size"],
            "workers": options["workers"],
            "progress": lambda done, of: bar.update(task, completed=done, total=of),
        }
        if probe is not None:
            result = probe_folder(vlm, folder, probe, **shared)
        else:
            result = zero_shot_folder(vlm, folder, words, forms, options["independent"], **shared)
    _told(console, result)
    if options["out"] is not None:
        _written(options["out"], result)
        console.print(f"Answers: {options['out']}", highlight=False, soft_wrap=True)
    if options["report"] is not None:
        from chiasm.report.classify import write_page

        page = write_page(options["report"], result.record() | {"model": model}, *_cards(result))
        console.print(f"Report: {page}", highlight=False, soft_wrap=True)


def _labels(given: str | None) -> list[str] | None:
    from chiasm.config import read_lines

    if given is None:
        return None
    if Path(given).is_file():
        return read_lines(given)
    return given.split(",")


def _templates(given: str | None, folder: Path, labels: str | None) -> Any:
    """A file's lines, a set's name, a prompt; by default ImageNet's 80 prompts for its folders, else one."""
    from chiasm.config import read_lines
    from chiasm.eval.classify import IMAGENET

    if given is not None and Path(given).is_file():
        return [line for line in read_lines(given) if line.strip()]
    if given is not None:
        return given
    whole = labels is None and folder.is_dir() and sum(p.is_dir() for p in folder.iterdir()) == IMAGENET
    return "imagenet" if whole else "plain"


def _told(console: Any, result: Any) -> None:
    from rich.table import Table

    table = Table("picture", "classes", box=None, pad_edge=False)
    for answer in result.answers[:SHOWN]:
        shares = "  ".join(f"{result.labels[index]} {share:.1%}" for index, share in answer.top)
        table.add_row(plain(answer.name), plain(shares))
    console.print(table, highlight=False)
    if len(result.answers) > SHOWN:
        console.print(f"… and {len(result.answers) - SHOWN} more", highlight=False)
    console.print(f"{len(result.answers)} pictures, {result.how}; {result.seconds:.1f} s", highlight=False)
    if result.judged:
        five = f", top-5 {result.accuracy(5):.2%}" if len(result.labels) > 5 else ""
        console.print(f"top-1 {result.accuracy():.2%}{five} of {result.judged} pictures in folders", highlight=False)
    if result.broken:
        console.print(f"{len(result.broken)} pictures cannot be read and are left out:", highlight=False)
        for _, why in result.broken[:10]:
            console.print(f"  {why}", highlight=False, markup=False, soft_wrap=True)
        if len(result.broken) > 10:
            console.print(f"  … and {len(result.broken) - 10} more", highlight=False)


def _written(path: Path, result: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for answer in result.answers:
            top = [{"label": result.labels[index], "probability": share} for index, share in answer.top]
            truth = {} if answer.truth is None else {"truth": result.labels[answer.truth]}
            file.write(json.dumps({"picture": answer.name, "top": top, **truth}, ensure_ascii=False) + "\n")
        for name, why in result.broken:
            file.write(json.dumps({"picture": name, "broken": why}, ensure_ascii=False) + "\n")


def _cards(result: Any) -> tuple[list[dict[str, Any]], list[tuple[str, int, int]], list[tuple[str, str]]]:
    """What the page shows of each picture, the classes with their counts, and what is broken."""
    cards = [
        {
            "name": answer.name,
            "path": result.folder / answer.name,
            "top": [(result.labels[index], share) for index, share in answer.top],
            "truth": None if answer.truth is None else result.labels[answer.truth],
            "right": answer.truth is None or answer.top[0][0] == answer.truth,
        }
        for answer in result.answers
    ]
    return cards, result.classes(), result.broken
