"""Every ``chiasm`` command of the written pages and of the recipes' heads names a verb and options that there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from chiasm.cli import VERBS, main

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*.yaml")])
BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINE = re.compile(r"^(?:# |\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/|torchrun .*? -m )?chiasm (.*)$", re.MULTILINE)
INLINE = re.compile(r"`(?:\.venv/bin/)?chiasm ([^`\n]+)`")


def commands(text: str, is_recipe: bool) -> Iterator[list[str]]:
    """The words behind ``chiasm`` of each command, without remarks; forms with ``[...]`` or ``…`` stand for several."""
    found = [text] if is_recipe else BLOCK.findall(text)
    lines = [line for block in found for line in LINE.findall(block.replace("\\\n", " "))]
    for line in [*lines, *INLINE.findall(text)]:
        try:
            words = shlex.split(re.split(r"\s+#|\s{2,}\(|\s*\|\s|\s*>\s|\s*&&", line)[0])
        except ValueError:
            continue  # a sentence with an apostrophe
        if words and not any(sign in line for sign in ("…", "...", "[")):
            yield words


def wrong(words: list[str]) -> str | None:
    """What the command line does not know, or None."""
    verb, *rest = words
    if verb.startswith("-"):
        return None
    if verb not in VERBS:
        return f"verb {verb!r}"
    command = main.get_command(click.Context(main), verb)
    assert command is not None
    if isinstance(command, click.Group):
        if not rest or rest[0] not in command.commands:
            return None if not rest or rest[0].startswith("-") else f"{verb} {rest[0]!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        command.make_parser(click.Context(command)).parse_args(list(rest))
    except click.UsageError as error:
        return error.format_message()
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page: Path) -> None:
    faults = {}
    for words in commands(page.read_text(encoding="utf-8"), page.suffix == ".yaml"):
        if told := wrong(words):
            faults[" ".join(words)] = told
    assert not faults


def test_faults_are_found() -> None:
    text = "```\nchiasm train a.yaml --tinny\n```\n`chiasm tarin x`, `chiasm chat M [P] --not`, `chiasm env --json`\n"
    assert [bool(wrong(words)) for words in commands(text, False)] == [True, True, False]
    assert len(list(commands((ROOT / "README.md").read_text(encoding="utf-8"), False))) >= 10
