"""``chiasm chat``: a conversation in the terminal."""

from __future__ import annotations

from typing import Any

import click

from chiasm.cli.options import MODEL, loading, open_model, parts, sampling, user_message

HELP = """/image PATH   add a picture (or a video) to the next message
/clear        forget the conversation
/help         this list
/quit         leave (also Ctrl-D)"""


@click.command("chat")
@MODEL
@click.argument("words", nargs=-1, metavar="[PICTURE]... [QUESTION]")
@click.option("--system", default=None, help="System prompt.")
@sampling
@loading
def command(
    model: str,
    words: tuple[str, ...],
    system: str | None,
    device: str | None,
    dtype: str | None,
    ignore_fingerprint: bool,
    **settings: Any,
) -> None:
    """Talk to MODEL about pictures. With a QUESTION: answer it and end. Without: open a conversation."""
    pictures, question = parts(words)
    settings["stop"] = list(settings["stop"])
    vlm = open_model(model, device, dtype, ignore_fingerprint)
    history: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    if question is not None:
        _answer(vlm, history, pictures, question, settings)
        return
    click.echo(f"{model}. /help lists the commands.")
    _converse(vlm, history, pictures, settings)


def _converse(vlm: Any, history: list[dict[str, Any]], pictures: list[str], settings: dict[str, Any]) -> None:
    from pathlib import Path

    from chiasm.errors import ChiasmError

    head = len(history)
    while True:
        if pictures:
            click.secho("with " + ", ".join(pictures), dim=True)
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return
        if word == "/help":
            click.echo(HELP)
        elif word == "/clear":
            del history[head:]
            pictures = []
        elif word == "/image":
            path = rest.strip().strip("'\"")
            if Path(path).is_file():
                pictures.append(path)
            else:
                click.secho(f"no file {path!r}", fg="red")
        elif line.startswith("/"):
            click.secho(f"unknown command {word}; /help lists them", fg="red")
        elif line:
            kept = len(history)
            try:
                _answer(vlm, history, pictures, line, settings)
                pictures = []
            except ChiasmError as error:
                del history[kept:]
                click.secho(str(error), fg="red")
            except KeyboardInterrupt:
                del history[kept:]
                click.secho(" (stopped; this turn is forgotten)", dim=True)


def _answer(vlm: Any, history: list[dict[str, Any]], pictures: list[str], text: str, settings: dict[str, Any]) -> None:
    history.append(user_message(pictures, text))
    streams = settings["num_beams"] == 1
    answer = vlm.generate(history, stream=streams, **settings)
    pieces = []
    for piece in answer if streams else [answer]:
        click.echo(piece, nl=False)
        pieces.append(piece)
    click.echo()
    history.append({"role": "assistant", "content": "".join(pieces)})
