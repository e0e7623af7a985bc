"""The command line: one small file a verb, imported only when the verb is used, so that ``--help`` is quick."""

from __future__ import annotations

import io
import sys
from importlib import import_module

import click

from chiasm import __version__

VERBS = {
    "demo": "Train a small model on pictures, evaluate it, and write a report (the main job).",
    "train": "Train a model by a recipe.",
    "plan": "What a recipe will train, and the memory it needs, before anything is loaded.",
    "check": "Look at every sample of a data set before training, on the CPU.",
    "eval": "Score a model on held-out examples, with true and with shuffled pictures.",
    "chat": "Talk to a model about pictures.",
    "serve": "Answer requests of OpenAI's clients, and a chat page, over HTTP.",
    "generate": "Answer one prompt, or every line of a JSONL file.",
    "batch": "Answer a file of requests in OpenAI's batch format; a run that was cut goes on.",
    "classify": "Sort pictures into classes that are named in words, without training.",
    "index": "Index a folder of pictures, to be searched by words and by pictures.",
    "search": "Find pictures by words, pictures by pictures, or texts by pictures.",
    "recall": "Score retrieval on the protocol files of COCO and Flickr30k.",
    "selftest": "Try a promise of the package on your own recipe: that a killed run resumes to the same bits.",
    "inspect": "Show a sample as the model sees it and walk it through the model.",
    "list": "Presets and parts by name.",
    "show": "What a preset or a saved model is made of.",
    "diff": "What two models differ in: tensors by part, configuration, prompt and pixels.",
    "merge": "Merge an adapter into its base, with the proof that nothing changed.",
    "export": "Write a model in the layout of transformers.",
    "env": "Versions, processors and memory of this machine.",
}


class Verbs(click.Group):
    """Finds a verb's command in the file of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of their use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb, imported now."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"chiasm.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, with the nearest verbs in the error."""
        from chiasm.errors import nearest

        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"unknown verb {args[0]!r}; {nearest(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs and their one-line helps, without importing them."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> object:
        """Turns the package's errors, and a file that cannot be read or written, into one line and exit status 1.

        Ctrl-C is one line and status 130, as shells expect. A sign that the terminal cannot write becomes "?".
        """
        from chiasm.errors import ChiasmError

        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            raise SystemExit(130) from None
        except ChiasmError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.filename is None or error.strerror is None:  # not of a file: a fault to be seen whole
                raise
            raise click.ClickException(f"{error.filename}: {error.strerror}") from None


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="chiasm")
def main() -> None:
    """Chiasm: compose a vision-language model from parts, train it, evaluate it, talk to it.

    Any setting can be overridden with key=value words, for instance: chiasm train recipe.yaml stages.0.lr=1e-3
    """
