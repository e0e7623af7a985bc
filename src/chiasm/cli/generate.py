"""``chiasm generate``: answers without a conversation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from chiasm.cli.options import MODEL, loading, open_model, parts, quantized, sampling, user_message
from chiasm.cli.terminal import clean


@click.command("generate")
@MODEL
@click.argument("words", nargs=-1, metavar="[PICTURE]... PROMPT")
@click.option(
    "--input", "source", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSONL of {id, messages}."
)
@click.option("--output", type=click.Path(path_type=Path), help="JSONL of {id, text}. Default: standard output.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1))
@click.option("--system", default=None, help="System prompt.")
@click.option(
    "--json-schema",
    "schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The answer is JSON that is valid under this JSON schema.",
)
@click.option("--choices", help="The answer is one of these: yes,no.")
@sampling
@quantized
@loading
def command(
    model: str,
    words: tuple[str, ...],
    source: Path | None,
    output: Path | None,
    batch_size: int,
    system: str | None,
    schema: Path | None,
    choices: str | None,
    device: str | None,
    dtype: str | None,
    ignore_fingerprint: bool,
    quantize: str | None,
    **settings: Any,
) -> None:
    """Answer one PROMPT about the pictures (streamed), or every conversation of a JSONL file (in batches)."""
    if (source is None) == (not words):
        raise click.UsageError("give either a prompt or --input FILE.jsonl")
    if source is None and output is not None:
        raise click.UsageError("--output takes the answers to --input; the answer to a prompt goes to standard output")
    settings["stop"] = list(settings["stop"])
    settings["constraint"] = _constraint(schema, choices)
    if source is None:
        pictures, prompt = parts(words)
        if prompt is None:
            raise click.UsageError(f"{len(pictures)} pictures and no prompt; add the prompt in quotes")
        if prompt.endswith(".jsonl"):
            raise click.UsageError(f"{prompt} would be a prompt: give --input {prompt} to answer its lines")
        vlm = open_model(model, device, dtype, ignore_fingerprint, quantize)
        messages = [user_message(pictures, prompt)]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        streams = settings["num_beams"] == 1
        answer = vlm.generate(messages, stream=streams, **settings)
        shown = clean if sys.stdout.isatty() else str  # a file gets what the model wrote, to the letter
        for piece in answer if streams else [answer]:
            click.echo(shown(piece), nl=False)
        click.echo()
        return
    vlm = open_model(model, device, dtype, ignore_fingerprint, quantize)
    _file(vlm, source, output, batch_size, system, settings)


def _constraint(schema: Path | None, choices: str | None) -> Any:
    if schema is not None and choices is not None:
        raise click.UsageError("give either --json-schema or --choices")
    if schema is None and choices is None:
        return None
    from chiasm.config import read_text
    from chiasm.errors import ConfigError
    from chiasm.infer.constraints import Choices, JsonSchema

    if choices is not None:
        return Choices([choice.strip() for choice in choices.split(",")])
    assert schema is not None
    try:
        return JsonSchema(json.loads(read_text(schema)))
    except ValueError as error:
        raise ConfigError(f"{schema}: not JSON ({error})") from None


def _file(vlm: Any, source: Path, output: Path | None, size: int, system: str | None, settings: dict[str, Any]) -> None:
    from rich.progress import track

    from chiasm.config import read_lines
    from chiasm.errors import DataError

    rows = [_row(line, number, source) for number, line in enumerate(read_lines(source), 1) if line.strip()]
    if not rows:
        raise DataError(f"{source}: holds no line; each is an object with messages")
    head = [] if system is None else [{"role": "system", "content": system}]
    aside = output and output.with_name(f"{output.name}.part")  # cut off, it is not taken for the whole
    with click.open_file(str(aside) if aside else "-", "w", encoding="utf-8") as sink:
        for start in track(range(0, len(rows), size), description="generate", disable=output is None):
            group = rows[start : start + size]
            try:
                texts = vlm.generate([head + row["messages"] for row in group], **settings)
            except DataError as error:  # which counts from 0 within the batch
                raise DataError(f"{source}, batch from {group[0]['id']!r} to {group[-1]['id']!r}: {error}") from None
            for row, text in zip(group, texts, strict=True):
                sink.write(json.dumps({"id": row["id"], "text": text}, ensure_ascii=False) + "\n")
            sink.flush()
    if aside and output:
        aside.replace(output)


def _row(line: str, number: int, source: Path) -> dict[str, Any]:
    from chiasm.errors import DataError

    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{source}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict) or "messages" not in row:
        raise DataError(f"{source}, line {number}: needs a 'messages' list, as chat messages with role and content")
    from chiasm.data.sources.messages import KEYS
    from chiasm.data.sources.records import known_keys

    known_keys(row, KEYS, f"{source}, line {number}")  # pictures beside the messages would never be seen
    row.setdefault("id", str(number))
    return row
