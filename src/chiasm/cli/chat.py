"""``chiasm chat``: a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from chiasm.cli.options import MODEL, loading, open_model, parts, quantized, sampling

if TYPE_CHECKING:
    from rich.console import Console

    from chiasm.cli.talk import Talk

HELP = """\
cat.png what is this?   a picture's path, typed, pasted or dragged here, goes with the message
/image PATH …           add pictures (or clips) to the next message; alone: those that wait
/paste                  add the picture in the clipboard
/retry                  another answer to the last message
/look WORD              where the model looked when it wrote a word of its last answer
/set NAME VALUE         temperature, max_new_tokens, top_p, top_k, seed, repetition_penalty, num_beams, stop,
                        system; "none" takes it back; alone: what is set
/history                what was said
/clear                  forget the conversation
/save FILE, /load FILE  the conversation as JSON, pictures inside
/help, /quit            this list; leave (also Ctrl-D). Ctrl-C stops an answer. A \\ at the end: the line goes on."""


@click.command("chat")
@MODEL
@click.argument("words", nargs=-1, metavar="[PICTURE]... [QUESTION]")
@click.option("--system", default=None, help="System prompt.")
@click.option("--load", "saved", type=click.Path(exists=True, dir_okay=False), help="Go on with a saved conversation.")
@click.option("--preview/--no-preview", default=None, help="Show pictures in the terminal. Default: where it can.")
@sampling
@loading
@quantized
def command(
    model: str,
    words: tuple[str, ...],
    system: str | None,
    saved: str | None,
    preview: bool | None,
    device: str | None,
    dtype: str | None,
    ignore_fingerprint: bool,
    quantize: str | None,
    **settings: Any,
) -> None:
    """Talk to MODEL about pictures. With a QUESTION: answer it and end. Without: open a conversation."""
    from rich.console import Console

    from chiasm.cli.talk import Talk

    pictures, question = parts(words)
    settings["stop"] = list(settings["stop"])
    console = Console(highlight=False)
    talk = Talk(open_model(model, device, dtype, ignore_fingerprint, quantize), settings, system)
    if saved is not None:
        talk.load(saved)
    talk.waiting = list(pictures)
    if question is not None:
        _stream(console, talk.say(question))
        return
    shows = console.is_terminal if preview is None else preview
    Session(console, talk, shows, model).run()


class Session:
    """The loop: a line, and what it asks for."""

    def __init__(self, console: Console, talk: Talk, shows: bool, name: str):
        self.console, self.talk, self.shows, self.name = console, talk, shows, name
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.note(HELP),
            "/image": self.image,
            "/paste": lambda _: self.paste(),
            "/retry": lambda _: self.answer(self.talk.retry()),
            "/look": self.look,
            "/set": self.set,
            "/history": lambda _: self.history(),
            "/clear": lambda _: self.clear(),
            "/save": self.save,
            "/load": self.load,
        }

    def run(self) -> None:
        """Until /quit or the end of the input."""
        from chiasm.infer.service import Service

        service = Service(self.talk.vlm, slots=1)
        service.start()
        self.talk.service = service
        try:
            self._lines()
        finally:
            service.stop(0)
        self.console.print()

    def _lines(self) -> None:
        from chiasm.cli.terminal import lines_of
        from chiasm.errors import ChiasmError

        self.note(f"{self.name}. /help lists the commands.")
        self._waiting(self.talk.waiting)
        for line in lines_of("> "):
            word, _, rest = line.strip().partition(" ")
            if word in ("/quit", "/exit"):
                break
            try:
                self._do(word, rest.strip(), line)
            except ChiasmError as error:
                self.fault(str(error))
            except KeyboardInterrupt:
                self.note("(stopped)")

    def _do(self, word: str, rest: str, line: str) -> None:
        from chiasm.cli.terminal import files_in, missing
        from chiasm.errors import nearest

        if word in self.commands:
            self.commands[word](rest)
            return
        files, text = files_in(line)
        self._waiting(files)
        self.talk.waiting += files
        lost = missing(text)
        if any("/" in name for name in lost):
            self.fault(f"there is no file {lost[0]}; nothing was sent")
            return
        if lost:
            self.note(f"(there is no file {lost[0]} here: the message goes without it)")
        if text.startswith("/") and not files:
            self.fault(f"unknown command {word}; {nearest(word, self.commands)}")
        elif text:
            self.answer(self.talk.say(text))

    def answer(self, pieces: Iterator[str]) -> None:
        """Write an answer as it comes, then how fast it came."""
        _stream(self.console, pieces)
        spoken = self.talk.spoken
        rate = f" · {spoken.rate:.1f} tokens/s" if spoken.rate else ""
        self.note(f"{spoken.tokens} token{'s' * (spoken.tokens != 1)} · first after {spoken.first:.2f} s{rate}")

    def image(self, rest: str) -> None:
        """Add pictures, or tell which wait."""
        from chiasm.cli.terminal import files_in

        if not rest:
            names = [picture if isinstance(picture, str) else "a pasted picture" for picture in self.talk.waiting]
            self.note("waiting: " + (", ".join(names) or "none"))
            return
        files, left = files_in(rest)
        if left or not files:
            self.fault(f"no picture or clip {left!r}")
        self._waiting(files)
        self.talk.waiting += files

    def paste(self) -> None:
        """Add the picture in the clipboard."""
        from PIL import Image, ImageGrab

        try:
            found = ImageGrab.grabclipboard()
        except (OSError, NotImplementedError) as error:
            self.fault(f"the clipboard cannot be read here ({error}); drag the file here, or give its path")
            return
        pictures: list[Any] = [found] if isinstance(found, Image.Image) else list(found or [])
        if not pictures:
            self.fault("the clipboard holds no picture")
        self._waiting(pictures)
        self.talk.waiting += pictures

    def _waiting(self, pictures: list[Any]) -> None:
        """Show pictures that were added."""
        from PIL import Image

        from chiasm.cli.terminal import clean, preview

        for picture in pictures:
            opened = picture if isinstance(picture, Image.Image) else None
            with suppress(OSError, Image.DecompressionBombError):  # a clip, or damaged: the model's front end will say
                opened = opened or Image.open(picture)
                name = clean(picture) if isinstance(picture, str) else "picture"
                self.note(f"+ {name}, {opened.width}×{opened.height}")
                if self.shows:
                    opened.draft("RGB", (256, 256))
                    self.console.print(preview(opened, min(48, self.console.width - 2)))
                continue
            self.note(f"+ {clean(str(picture))}")

    def look(self, rest: str) -> None:
        """The pictures, dark where the model did not look."""
        from chiasm.cli.terminal import overlay, preview
        from chiasm.errors import DataError
        from chiasm.processing.base import Place
        from chiasm.processing.messages import parse
        from chiasm.processing.open import open_picture

        turns = self.talk.messages
        if not turns or turns[-1]["role"] != "assistant":
            raise DataError("there is no answer to look into yet")
        found = self.talk.vlm.look(turns[:-1], turns[-1]["content"], rest or None)
        pictures = [part for message in parse(turns[:-1]) for part in message.media if part.kind == "image"]
        for heat in found.heats:
            of = "of all attention" if found.method == "attention" else "of all heat"
            self.note(
                f"{heat.kind} {heat.index + 1}: {100 * heat.share:.0f} % {of} ({found.method}, {found.word.text!r})"
            )
            if heat.kind == "image" and self.shows:
                opened = open_picture(pictures[heat.index].data, Place("look", heat.index, len(pictures)))
                self.console.print(preview(overlay(opened, heat.values), min(60, self.console.width - 2), 18))

    def set(self, rest: str) -> None:
        """Change a setting, or tell all."""
        name, _, value = rest.partition(" ")
        if name:
            self.talk.set(name, value.strip())
        shown = {"system": self.talk.system, **self.talk.settings}
        self.note("  ".join(f"{key}={value}" for key, value in shown.items() if value not in (None, [])))

    def history(self) -> None:
        """What was said."""
        from rich.text import Text

        from chiasm.cli.terminal import clean

        for turn in self.talk.messages:
            content = turn["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            told = " ".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in parts)
            self.console.print(Text.assemble((f"{turn['role']}: ", "bold"), clean(told)))

    def clear(self) -> None:
        """Forget the conversation."""
        self.talk.clear()
        self.note("forgotten")

    def save(self, rest: str) -> None:
        """Write the conversation."""
        if not rest:
            self.fault("give a file: /save talk.json")
            return
        self.note(f"wrote {self.talk.save(rest)}")

    def load(self, rest: str) -> None:
        """Read a conversation."""
        if not rest:
            self.fault("give a file: /load talk.json")
            return
        self.talk.load(rest)
        self.history()

    def note(self, text: str) -> None:
        """A line that is not the model's."""
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def fault(self, text: str) -> None:
        """A line about what went wrong."""
        from chiasm.cli.terminal import clean

        self.console.print(clean(text), style="red", markup=False, soft_wrap=True)


def _stream(console: Console, pieces: Iterator[str]) -> None:
    """Write pieces as they come, without what could steer the terminal."""
    from chiasm.cli.terminal import clean
    from chiasm.errors import ChiasmError

    begun = False
    try:
        for piece in pieces:
            console.out(clean(piece), end="", highlight=False)
            console.file.flush()
            begun = True
    except ChiasmError:
        if begun:
            console.out("")
        raise
    except BaseException:
        console.out("")
        raise
    finally:
        getattr(pieces, "close", lambda: None)()
    console.out("")
