"""``chiasm check``: every sample of a data set, before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("check")
@click.argument("words", nargs=-1, required=True, metavar="RECIPE [KEY=VALUE]... | SOURCE...")
@click.option("--tiny", is_flag=True, help="The recipe's tiny form.")
@click.option("--model", default=None, help="With SOURCE: the folder of a model, to count tokens with.")
@click.option("--max-length", default=None, type=click.IntRange(1), help="With SOURCE: tokens that training cuts at.")
@click.option("--deep", is_flag=True, help="Decode every picture and clip; otherwise only headers are read.")
@click.option("--smallest", default=16, show_default=True, help="Pictures with a side below it are remarked.")
@click.option("--aspect", default=20.0, show_default=True, help="So are those with sides that differ by more than it.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder of results. Default: OUT/check.")
@click.option(
    "--write-quarantine", type=click.Path(path_type=Path), help="List the bad samples here, for data.quarantine."
)
@click.option("--also", multiple=True, metavar="KIND", help="A kind of remark that goes to the quarantine file too.")
@click.option("--workers", default=None, type=click.IntRange(0), help="Processes. Default: one for each processor.")
@click.option("--fresh", is_flag=True, help="Begin anew where an earlier check was killed.")
@click.pass_context
def command(ctx: click.Context, words: tuple[str, ...], **options: Any) -> None:
    """Look at every sample of a RECIPE's data, or of SOURCEs such as type=llava_json,file=a.json,images=dir.

    Counts, lengths, missing, broken, odd and repeated pictures, placeholders, empty answers, roles, ids. Writes a
    report (check.html), all findings (check.json) and, on demand, a quarantine file. A check that was killed goes on
    where it was. The exit status is 1 where a sample would stop training, unless a quarantine file takes it in.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from chiasm.data.check import Rules, check_all
    from chiasm.report.check import show, write_json, write_page

    _known_kinds(options["also"])
    console = Console()
    mixture, ways, title, out = _subject(words, options)
    out.mkdir(parents=True, exist_ok=True)
    rules = Rules(deep=options["deep"], tiny=options["smallest"], aspect=options["aspect"])
    columns = (TextColumn("looking at samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("check")
        summary = check_all(
            *(mixture, ways, rules, out),
            workers=options["workers"],
            fresh=options["fresh"],
            advance=lambda done, of: bar.update(task, completed=done, total=of),
        )
    show(summary, console)
    written = [write_page(summary, mixture, out / "check.html", title), write_json(summary, out / "check.json")]
    quarantine = options["write_quarantine"]
    if quarantine:
        found = summary.quarantine(options["also"])
        written.append(found.write(quarantine))
        console.print(
            f"{len(found)} samples in quarantine; in the recipe: data.quarantine: {quarantine}", highlight=False
        )
    click.echo(f"wrote {', '.join(map(str, written))} in {summary.seconds:.1f} s")
    if summary.bad and not quarantine:
        ctx.exit(1)


def _known_kinds(kinds: tuple[str, ...]) -> None:
    from chiasm.data.check import KINDS
    from chiasm.errors import ConfigError, nearest

    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--also {kind!r}: unknown kind; {nearest(kind, KINDS)}")


def _subject(words: tuple[str, ...], options: dict[str, Any]) -> tuple[Any, Any, str, Path]:
    """The mixture, how each source is rendered, a title and the folder of results."""
    from chiasm import registry
    from chiasm.config import parse_overrides
    from chiasm.data.check import Way
    from chiasm.data.mixture import Mixture
    from chiasm.errors import ConfigError
    from chiasm.train import load_recipe
    from chiasm.train.recipe import ModelSpec
    from chiasm.train.ways import everything, open_processor, ways

    if "=" not in words[0]:
        if options["model"] or options["max_length"]:
            raise ConfigError("--model and --max-length belong to SOURCE; a recipe has its own: override its keys")
        if not Path(words[0]).exists() and (":" in words[0] or words[0] in registry.names("source")):
            raise ConfigError(f"{words[0]} is no recipe; a SOURCE is written type={words[0]}")
        recipe = load_recipe(Path(words[0]), parse_overrides(words[1:]), tiny=options["tiny"])
        return (
            everything(recipe),
            ways(recipe),
            recipe.name,
            options["out"] or Path(recipe.out) / "check",
        )
    entries = dict(_entry(word) for word in words)
    if len(entries) < len(words):
        raise ConfigError("two sources have the same name; give each its own with name=...")
    found = {}
    if options["model"]:
        processor = open_processor(ModelSpec(folder=options["model"]))
        found = {name: Way(processor, options["max_length"] or processor.config.max_length) for name in entries}
    elif options["max_length"]:
        raise ConfigError("--max-length needs --model: without a tokenizer no tokens are counted")
    return Mixture(entries), found, ", ".join(entries), options["out"] or Path("check")


def _entry(word: str) -> tuple[str, Any]:
    """``type=llava_json,file=a.json,name=a`` as a name and a mixture's entry."""
    from chiasm.config import parse_overrides
    from chiasm.data.mixture import Entry

    values = parse_overrides(word.split(","))
    name = str(values.pop("name", values.get("type", "source")))
    return name, Entry.parse({"source": values}, where=word)
