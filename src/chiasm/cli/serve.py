"""``chiasm serve``: models behind OpenAI's chat completions, and a page to talk to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from chiasm.cli.options import loading

MB = 1 << 20


@click.command("serve", context_settings={"auto_envvar_prefix": "CHIASM_SERVE"})
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]MODEL...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: every one.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--api-key", "keys", multiple=True, help="Who may ask. Better in a file or in CHIASM_API_KEY.")
@click.option("--api-key-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="One key a line.")
@click.option("--allow-host", "hosts", multiple=True, help="A name that Host may say. Default: localhost, or any.")
@click.option("--cors-origin", "origins", multiple=True, help="A web page's origin that may ask. Default: none.")
@click.option(
    "--media-host", multiple=True, help="Fetch pictures from example.com, *.example.com, or *. Default: none."
)
@click.option(
    "--media-root", type=click.Path(exists=True, file_okay=False), help="Read pictures of this folder by file://."
)
@click.option("--max-pictures", default=16, show_default=True, type=click.IntRange(0), help="Of one request.")
@click.option("--max-pixels", default=50_000_000, show_default=True, type=click.IntRange(1), help="Of one picture.")
@click.option("--max-body", default=32, show_default=True, type=click.IntRange(1), help="Megabytes of a request.")
@click.option("--max-new-tokens", default=4096, show_default=True, type=click.IntRange(1), help="Of an answer.")
@click.option("--slots", default=8, show_default=True, type=click.IntRange(1), help="Answers written at a time.")
@click.option("--queue", default=64, show_default=True, type=click.IntRange(0), help="Answers that may wait.")
@click.option("--max-length", type=click.IntRange(16), help="Tokens of a conversation. Default: the model's limit.")
@click.option("--prefix-cache", default=1024, show_default=True, type=click.IntRange(0), help="Megabytes.")
@click.option("--quantize", type=click.Choice(["int8", "int4"]), help="Weights of the language model.")
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(0, 2), help="Where none is asked.")
@click.option("--drain", default=30.0, show_default=True, type=click.FloatRange(0), help="Seconds after SIGTERM.")
@click.option("--page/--no-page", default=True, show_default=True, help="The chat page at /.")
@loading
def command(
    models: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    ignore_fingerprint: bool,
    slots: int,
    queue: int,
    max_length: int | None,
    prefix_cache: int,
    quantize: str | None,
    **settings: Any,
) -> None:
    """Serve MODEL (a folder or hub name) at http://HOST:PORT/v1, each under its NAME or its folder's.

    The folder "model" of a run has the run's name: runs/demo/model is served as demo.

    Every option can be set in the environment, as CHIASM_SERVE_PORT=8000.
    """
    try:
        from chiasm.serve.app import create_app
        from chiasm.serve.run import run
    except ImportError as error:
        raise click.ClickException(f"serving needs {error.name}: pip install 'chiasm[serve]'") from None
    import logging

    from chiasm.serve.options import Served

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    options = _options(settings)
    if options.host not in ("127.0.0.1", "localhost", "::1") and not options.keys:
        click.secho(f"listening on {options.host} without an API key: anyone who reaches it may use it", fg="yellow")
    served = {}
    for word in models:
        name, path = _named(word)
        if name in served:
            raise click.UsageError(f"two models are called {name!r}; name them: first=FOLDER second=FOLDER")
        check(path)
        service: dict[str, Any] = {"slots": slots, "max_queue_requests": queue, "max_length": max_length}
        service |= {"prefix_cache_bytes": prefix_cache * MB, "quantize": quantize}
        served[name] = Served(name, _loader(path, device, dtype, ignore_fingerprint, service))
    click.echo(f"models {', '.join(served)} at http://{options.host}:{options.port}/v1")
    if options.page:
        click.echo(f"page to talk to them at http://{options.host}:{options.port}/")
    raise SystemExit(run(create_app(served, options), options))


def _options(settings: dict[str, Any]) -> Any:
    from chiasm.config import read_lines
    from chiasm.serve.options import ServeOptions

    keys = [*settings["keys"]]
    keys += [key for key in os.environ.get("CHIASM_API_KEY", "").split(",") if key]
    if settings["api_key_file"] is not None:
        keys += [line.strip() for line in read_lines(settings["api_key_file"]) if line.strip()]
    return ServeOptions.parse(
        {
            **{name: settings[name] for name in ("host", "port", "hosts", "origins", "page", "temperature")},
            "keys": keys,
            "drain_seconds": settings["drain"],
            "limits": {"body_bytes": settings["max_body"] * MB, "new_tokens": settings["max_new_tokens"]},
            "media": {
                "hosts": settings["media_host"],
                "root": settings["media_root"],
                "pictures": settings["max_pictures"],
                "picture_pixels": settings["max_pixels"],
                "request_pixels": 2 * settings["max_pixels"],
            },
        },
        where="serve",
    )


def check(path: str) -> None:
    """A wrong folder is told of now, not by every request, or every actor. Raises CheckpointError."""
    from chiasm.checkpoints.folder import is_adapter
    from chiasm.checkpoints.hub import checked
    from chiasm.presets.checkpoint import table_of

    if checked(path).is_dir() and not is_adapter(Path(path)):
        table_of(Path(path))


def _named(word: str) -> tuple[str, str]:
    """``name=path``, or a path whose last component is the name; that of a run's ``model`` folder is the run's."""
    name, equals, path = word.partition("=")
    if equals and name and "/" not in name:
        return name, path
    folder = Path(word).resolve()
    if not folder.is_dir():
        return word, word
    return (folder.parent.name or folder.name) if folder.name == "model" else folder.name, word


def _loader(path: str, device: str | None, dtype: str | None, ignore: bool, settings: dict[str, Any]) -> Any:
    def load() -> tuple[Any, Any]:
        from chiasm.cli.options import open_model
        from chiasm.infer.service import Service, writes

        vlm = open_model(path, device, dtype, ignore)
        if not writes(vlm.model):  # two towers, a classifier: there is nothing to write with
            return None, vlm
        service = Service(vlm, **settings)
        service.start()
        return service, vlm

    return load
