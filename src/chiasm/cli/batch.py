"""``chiasm batch``: a file of requests in OpenAI's batch format, answered; a run that was cut goes on."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from chiasm.cli.options import loading, quantized

MB = 1 << 20


@click.command("batch")
@click.argument("source", metavar="INPUT.jsonl", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", "word", required=True, metavar="[NAME=]MODEL", help="A folder or hub name.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="JSONL of answers.")
@click.option("--flying", default=16, show_default=True, type=click.IntRange(1), help="Requests made at a time.")
@click.option("--slots", default=8, show_default=True, type=click.IntRange(1), help="Answers written at a time.")
@click.option("--max-length", type=click.IntRange(16), help="Tokens of a conversation. Default: the model's limit.")
@click.option("--max-new-tokens", default=4096, show_default=True, type=click.IntRange(1), help="Of an answer.")
@click.option("--media-host", multiple=True, help="Fetch pictures from example.com, *.example.com, or *.")
@click.option("--media-root", type=click.Path(exists=True, file_okay=False), help="Read pictures by file:// below it.")
@click.option(
    "--ray", "actors", type=click.IntRange(1), metavar="ACTORS", help="On a Ray cluster, with so many models."
)
@quantized
@loading
def command(source: Path, word: str, out: Path, flying: int, actors: int | None, **settings: Any) -> None:
    """Answer every request of INPUT.jsonl (OpenAI's batch format) with MODEL.

    Run again with the same files after an interruption: what OUT answers is not asked again. The exit status is 1 where
    a line failed: refused by the server, or no request at all.
    """
    try:
        from chiasm.serve import batch, batch_ray
    except ImportError as error:
        raise click.ClickException(f"requests need {error.name}: pip install 'chiasm[serve]'") from None
    from rich.console import Console
    from rich.progress import Progress

    settings["flying"] = flying
    served: Any = None
    options: Any = None
    if actors is None:
        served, options = open_batch(word, settings)
    else:
        from chiasm.cli.serve import _named, check
        from chiasm.infer.cluster import everywhere

        name, path = _named(word)  # the actors find it where this process does
        check(path)
        word = f"{name}={everywhere(path)}"
        settings["media_root"] = settings["media_root"] and everywhere(settings["media_root"])
    output = batch.Output(out, "" if served is None else served.fingerprint)
    with source.open("rb") as file:
        total = sum(1 for line in file if line.strip())
    click.echo(f"{total} requests, {len(output.known)} answered before", err=True)
    lines = batch.pending(source, output.known)
    try:
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("batch", total=total, completed=len(output.known))

            def done(answer: dict[str, Any]) -> None:
                output.add(answer)
                progress.advance(bar)

            if served is None:
                batch_ray.run(partial(open_batch, word, settings), source, lines, done, flying, actors or 1)
            else:
                batch.run(served, options, lines, done, flying)
    finally:
        output.close()
        if served is not None and served.service is not None:
            served.service.stop()
    if not output.failed:
        click.echo(f"{out}: all {output.answered} answered" if output.answered else f"{source}: no request", err=True)
        return
    click.echo(f"the first that failed, {output.first}", err=True)
    click.echo(
        f"{out}: {output.failed} of {output.answered} lines failed; see its lines with an error, or a status_code of "
        "400 or more",
        err=True,
    )
    click.get_current_context().exit(1)


def open_batch(word: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The model, started, and the options of its application."""
    from chiasm.cli.serve import _loader, _named
    from chiasm.errors import CheckpointError
    from chiasm.serve.options import Served, ServeOptions

    name, path = _named(word)
    flying = settings["flying"]
    service = {"slots": settings["slots"], "max_length": settings["max_length"], "quantize": settings["quantize"]}
    service |= {"max_queue_requests": 8 * flying, "max_queue_tokens": 1 << 40}
    where = settings["device"], settings["dtype"], settings["ignore_fingerprint"]
    served = Served(name, _loader(path, *where, service))
    served.load()
    if served.error is not None:
        raise CheckpointError(f"{path}: {served.error}") from served.error
    limits = {"new_tokens": settings["max_new_tokens"], "requests": flying, "request_seconds": 86400.0}
    limits |= {"held_bytes": 1024 * MB}
    media = {"hosts": settings["media_host"], "root": settings["media_root"]}
    return served, ServeOptions.parse({"page": False, "limits": limits, "media": media}, where="batch")
