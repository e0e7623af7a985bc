"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

F = Callable[..., Any]

MODEL = click.argument("model", metavar="MODEL")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def loading(command: F) -> F:
    """``--device``, ``--dtype`` and ``--ignore-fingerprint`` of every verb that loads a model."""
    for option in (
        click.option("--device", default=None, help="cpu, cuda, cuda:1, mps. Default: the best there is."),
        click.option(
            "--dtype", default=None, type=click.Choice(["float32", "bfloat16", "float16"]), help="Number type."
        ),
        click.option(
            "--ignore-fingerprint",
            is_flag=True,
            help="Load although prompt, pixels or configuration changed; it is recorded.",
        ),
    ):
        command = option(command)
    return command


def sampling(command: F) -> F:
    """The decoding options of ``generate`` and ``chat``."""
    for option in (
        click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1)),
        click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0 is greedy."),
        click.option("--top-p", default=None, type=click.FloatRange(0, 1)),
        click.option("--top-k", default=None, type=click.IntRange(1)),
        click.option("--num-beams", default=1, show_default=True, type=click.IntRange(1)),
        click.option("--repetition-penalty", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True)),
        click.option("--stop", multiple=True, help="Stop at this text; may be given several times."),
        click.option("--seed", default=None, type=int, help="Makes sampling repeatable."),
    ):
        command = option(command)
    return command


quantized = click.option(
    "--quantize",
    type=click.Choice(["int8", "int4"]),
    help="Weights of the language model, or of two towers; for dtype bfloat16 on CPUs.",
)


def open_model(
    model: str, device: str | None, dtype: str | None, ignore_fingerprint: bool, quantize: str | None = None
) -> Any:
    """Load a model folder or hub name onto the asked or the best device."""
    import torch

    import chiasm

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = getattr(torch, dtype) if dtype else None
    return chiasm.load(model, device=device, dtype=kind, ignore_fingerprint=ignore_fingerprint, quantize=quantize)


def parts(words: tuple[str, ...]) -> tuple[list[str], str | None]:
    """Split ``PICTURE... QUESTION``: the words that name files are pictures, the one that does not is the question."""
    pictures = [word for word in words if _exists(word) or Path(word).suffix.lower() in PICTURES | VIDEOS | SOUNDS]
    rest = [word for word in words if word not in pictures]
    if len(rest) > 1:
        raise click.UsageError(
            f"{len(rest)} questions given ({rest[0]!r}, {rest[1]!r}, ...); put the question in quotes"
        )
    return pictures, rest[0] if rest else None


def _exists(word: str) -> bool:
    """Whether a word names a file: neither an empty word does nor one too long for a name, as questions may be."""
    try:
        return bool(word.strip()) and Path(word).exists()
    except OSError:
        return False


PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".m4a", ".aac"}


def user_message(files: list[str], text: str) -> dict[str, Any]:
    """A user turn: the files as image, video or audio parts, then the text."""
    content: list[dict[str, Any]] = []
    for file in files:
        suffix = Path(file).suffix.lower()
        kind = "video" if suffix in VIDEOS else "audio" if suffix in SOUNDS else "image"
        content.append({"type": kind, kind: file})
    content.append({"type": "text", "text": text})
    return {"role": "user", "content": content}


def plain(text: str) -> Any:
    """A text for a table of the terminal, to the letter: brackets are no markup, and a line stays one line."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
