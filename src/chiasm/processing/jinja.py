"""``"jinja"``: any chat template of a checkpoint, rendered so that texts of users stay texts and spans are known.

The template runs in jinja2's sandbox with every text replaced by one private-use character; the true texts are put in
afterwards. A template may trim or otherwise touch a text, so the result is proved: it must equal, character for
character, what the template gives with the true texts. Where it does not, that is an error.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from chiasm import registry
from chiasm.errors import ConfigError, DataError
from chiasm.processing import tagged
from chiasm.processing import tools as tooling
from chiasm.processing.template import Template, TemplateConfig
from chiasm.processing.tools import Form
from chiasm.types import Call, Media, Message, Piece, Text

BASES = range(0x100000, 0x10F000, 0x1000)  # where the private-use characters that stand for texts may begin
BEGIN, END = "\U000ff001", "\U000ff002"  # around what a {% generation %} block renders


class JinjaConfig(TemplateConfig):
    """A chat template by its source, as a checkpoint carries it."""

    type: str = "jinja"
    source: str | None = None  # None: the tokenizer's own chat template; what is saved is always the text
    variables: dict[str, Any] = Field(default_factory=dict)  # further variables of the template
    date: str | None = None  # year-month-day for templates that ask for today's date; None: today
    answer_end: str = ""  # written after every answer, for templates that end answers with nothing generation stops on


@registry.register("template", "jinja")
class JinjaTemplate(Template):
    """Renders with a chat template.

    Learned is what ``{% generation %}`` blocks render; where the template has none, each answer from the end of its
    generation prompt through the literal that closes it.
    """

    Config = JinjaConfig

    def __init__(self, config: JinjaConfig, tokens: Mapping[str, str], placeholders: Mapping[str, str]):
        super().__init__(config, tokens, placeholders)
        if config.source is None:
            raise ConfigError(
                "template 'jinja' has no source and the tokenizer carries no chat template; give one by name"
            )
        self._template = _compile(config.source)
        self._lists = self._takes_lists()
        self.end = self._find_end()
        self._gap = self._lead()
        self.form = self._find_form()
        self.learns_calls = re.search(r"{%[-+]?\s*generation\b", config.source) is not None

    # ------------------------------------------------------------------------------------------------ rendering

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, where: str) -> list[Piece]:
        """See the contract. Raises DataError where the template refuses or changes a text beyond trimming."""
        return self.render_tools(messages, add_generation_prompt, where, None)

    def render_tools(
        self, messages: Sequence[Message], add_generation_prompt: bool, where: str, tools: Sequence[Any] | None
    ) -> list[Piece]:
        """See the contract. Strings of tools, calls and results are texts as a user's are."""
        if (tools or tooling.involved(messages)) and self.form is None:
            tooling.refuse(messages, where, tools)
        texts = [p.text for m in messages for p in m.parts if isinstance(p, Text)]
        calls = {call: tooling.told(call, where) for m in messages for call in m.calls}
        marks = tooling.Marks([*(tools or ()), *calls.values()])
        base = _free_base([*texts, *marks.texts], where)
        names = [chr(base + i) for i in range(len(texts) + len(marks.texts))]
        marks.place(base + len(texts))
        marked = {call: marks(value) for call, value in calls.items()}
        outline = self._run(messages, names, add_generation_prompt, where, marks(tools or ()), marked)
        truth = self._run(messages, texts, add_generation_prompt, where, tools, calls)
        named = [calls[call]["name"] for m in messages for call in m.calls]
        named += [tool.get("function", {}).get("name", "") for tool in tools or ()]
        results = [names[i] for i, m in enumerate(_owners(messages)) if m.role == "tool"]
        if any(name not in outline for name in [*results, *(marks.names[name] for name in named if name)]):
            raise DataError(f"{where}: the chat template leaves out a tool, a call or a result", "tools")
        escaped = [m.role == "tool" for m in _owners(messages)] + [True] * len(marks.texts)
        written = _fit(outline, truth, base, [*texts, *marks.texts], escaped, where)
        return self._pieces(messages, outline, base, len(names), written, where)

    def _pieces(
        self, messages: Sequence[Message], outline: str, base: int, count: int, written: Sequence[str], where: str
    ) -> list[Piece]:
        """The outline cut at its characters, the n-th of which stands for the n-th text ``written``."""
        owners = _owners(messages)
        waiting = iter(written)
        pieces, inside = [], False
        for run in re.split(f"([{BEGIN}{END}]|{_one_of(base, count)})", outline):
            if run in (BEGIN, END):
                inside = run == BEGIN
            elif len(run) == 1 and base <= ord(run) < base + count:
                index = ord(run) - base
                owner = owners[index] if index < len(owners) else None
                answer = owner is not None and owner.role == "assistant"
                learn = answer and owner is not None and owner.train is not False
                pieces.append((Piece(next(waiting), train=learn), inside))
                closed = index + 1 >= len(owners) or owners[index + 1] is not owner
                if answer and self.config.answer_end and closed:
                    pieces.append((Piece(self.config.answer_end, literal=True, train=learn), inside))
                    inside = False  # what a block renders after the end is never generated
            elif run:
                pieces += [(piece, inside) for piece in self._media(run)]
        self._check_media(messages, [p for p, _ in pieces], where)
        numbered = _number([p for p, _ in pieces], messages, self.placeholders)
        if BEGIN in outline:
            skipped = any(m.role == "assistant" and m.train is False for m in messages)
            if skipped:
                raise DataError(
                    f"{where}: 'train': false cannot be told apart in a template with {{% generation %}} blocks"
                )
            return [_train(p, flag) for p, (_, flag) in zip(numbered, pieces, strict=True)]
        return self._learn(numbered)

    def _run(
        self,
        messages: Sequence[Message],
        texts: Sequence[str],
        prompt: bool,
        where: str,
        tools: Sequence[Any] | None = None,
        calls: Mapping[Call, Any] | None = None,
        **more: Any,
    ) -> str:
        try:
            return self._template.render(
                messages=self._messages(messages, iter(texts), calls or {}),
                add_generation_prompt=prompt,
                tools=list(tools) if tools else None,
                documents=None,
                raise_exception=_refuse,
                strftime_now=self._now,
                **{**self.tokens, **self.config.variables, **more},
            )
        except Exception as error:  # a template may raise anything
            raise DataError(f"{where}: the chat template refuses this conversation: {error}") from None

    def _messages(self, messages: Sequence[Message], texts: Any, calls: Mapping[Call, Any]) -> list[dict[str, Any]]:
        """The form chat templates read: content as a list of parts, or as a string with placeholders."""
        out = []
        for message in messages:
            content: Any = []
            for part in message.parts:
                if isinstance(part, Text):
                    content.append({"type": "text", "text": next(texts)})
                elif isinstance(part, Media):
                    content.append({"type": part.kind})
            if not self._lists or message.role == "tool" or (message.calls and not content):
                content = "".join(
                    part["text"] if part["type"] == "text" else self.placeholders.get(part["type"], "") + "\n"
                    for part in content
                )
            out.append({"role": message.role, "content": content, **tooling.fields(message, messages, calls)})
        return out

    def _media(self, literal: str) -> list[Piece]:
        """A literal cut at the placeholders that the template wrote in it."""
        words = [re.escape(p) for p in self.placeholders.values() if p]
        if not words:
            return [Piece(literal, literal=True)]
        runs = re.split("(" + "|".join(sorted(words, key=len, reverse=True)) + ")", literal)
        return [Piece(r, medium=0) if i % 2 else Piece(r, literal=True) for i, r in enumerate(runs) if r]

    def _check_media(self, messages: Sequence[Message], pieces: Sequence[Piece], where: str) -> None:
        for kind in {medium.kind for message in messages for medium in message.media} | self.placeholders.keys():
            token = self.placeholders.get(kind) or ""
            given = sum(medium.kind == kind for message in messages for medium in message.media)
            written = sum(p.medium is not None and p.text == token for p in pieces)
            if given != written:
                raise DataError(
                    f"{where}: the conversation has {given} of kind {kind!r} but the chat template writes the "
                    f"placeholder "
                    f"{token!r} {written} times; give the front end the placeholder that the template writes"
                )

    def _learn(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Without ``{% generation %}``: answers with what closes them, and the space between prompt and answer."""
        result: list[Piece] = []
        before: Piece | None = None
        for piece in pieces:
            answer = piece.train and not piece.literal
            if answer and self._gap and result and result[-1].literal and result[-1].text.endswith(self._gap):
                head = result.pop().text[: -len(self._gap)]
                result += [Piece(head, literal=True)] * bool(head) + [Piece(self._gap, literal=True, train=True)]
            closes = before is not None and before.train and not before.literal and self.end
            if closes and piece.literal and not piece.train and piece.text.startswith(self.end):
                rest = piece.text[len(self.end) :]
                result += [Piece(self.end, literal=True, train=True)] + [Piece(rest, literal=True)] * bool(rest)
            else:
                result.append(piece)
            before = piece
        return result

    # ------------------------------------------------------------------------------------------------ what it is like

    def _takes_lists(self) -> bool:
        """True where the template reads content as a list of parts; a list given to others is printed as it is."""
        name = chr(BASES[0])
        self._lists = True
        try:
            text = self._run([Message("user", (Text(name),))], [name], False, "probe")
        except DataError:
            return False
        return name in text and "'type'" not in text and '"type"' not in text

    def _find_end(self) -> str:
        """The literal that closes an answer, through its last visible character; empty where there is none."""
        if self.config.answer_end:
            return self.config.answer_end
        names = [chr(BASES[0] + i) for i in range(2)]
        probe = [Message("user", (Text(names[0]),)), Message("assistant", (Text(names[1]),))]
        try:
            text = self._run(probe, names, False, "probe")
        except DataError:
            return ""
        tail = text.partition(names[1])[2].replace(BEGIN, "").replace(END, "")
        return tail.rstrip()

    def _find_form(self) -> Form | None:
        """How this template writes a call; None where it tells a model of no tools, or writes what cannot be read."""
        form = self._written(tooling.json_form, tooling.SIMPLE)
        if form is None:
            return self._written(tagged.tag_form, tagged.ARGUMENTS) or self._written(tagged.python_form, tagged.ONE)
        if not form.opening.strip():
            trained = self._written(tagged.python_form, tagged.ONE, builtin_tools=[tagged.NAME])
            return form if trained is None else replace(form, python=replace(trained, closing=""))
        return form

    def _written(self, read: Callable[[str, str], Any], arguments: Mapping[str, Any], **more: Any) -> Any:
        """What ``read`` finds in the answer that calls a tool with ``arguments``.

        The call is not the last message where the template allows: some write an empty thought before the last answer.
        """
        messages, tools = tooling.probe(arguments)
        calls = {call: tooling.told(call, "probe") for call in messages[1].calls}
        for count in (3, 2) if self.end else (2,):
            texts = [tooling.ASKED] * count
            try:
                prompt = self._run(messages[:1], texts, True, "probe", tools, **more)
                whole = self._run(messages[:count], texts, False, "probe", tools, calls, **more)
            except DataError:
                continue
            prompt, whole = (text.replace(BEGIN, "").replace(END, "") for text in (prompt, whole))
            end = self.end or self.tokens.get("eos_token", "")
            form = read(tooling.behind(prompt, whole), end) if tagged.NAME in prompt else None
            if form is not None:
                return form
        return None

    def _lead(self) -> str:
        """What stands between the generation prompt and an answer."""
        names = [chr(BASES[0] + i) for i in range(2)]
        probe = [Message("user", (Text(names[0]),)), Message("assistant", (Text(names[1]),))]
        try:
            prompt = self._run(probe[:1], names, True, "probe").replace(BEGIN, "").replace(END, "")
            whole = self._run(probe, names, False, "probe").replace(BEGIN, "").replace(END, "")
        except DataError:
            return ""
        head = whole.partition(names[1])[0]
        return head[len(prompt) :] if head.startswith(prompt) else ""

    def _now(self, form: str) -> str:
        day = datetime.date.fromisoformat(self.config.date) if self.config.date else datetime.date.today()
        return day.strftime(form)


def resolved(config: JinjaConfig, chat_template: str | None) -> JinjaConfig:
    """The configuration with everything written out: the tokenizer's template and, where it is read, today's date."""
    source = config.source if config.source is not None else chat_template
    dated = source is not None and "strftime_now" in source and config.date is None
    date = datetime.date.today().isoformat() if dated else config.date
    return JinjaConfig(**{**config.dump(), "source": source, "date": date})


def _compile(source: str) -> Any:
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %} ... {% endgeneration %}``: what an assistant generates, put between two marks."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (BEGIN, END))
            return [begin, *body, end]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from None


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _free_base(texts: Sequence[str], where: str) -> int:
    """The first of a run of private-use characters that no text holds."""
    used = {ord(c) for text in texts if not text.isascii() for c in text if ord(c) >= 0xFF000}
    if {ord(BEGIN), ord(END)} & used or len(texts) > 0x1000:
        raise DataError(f"{where}: more than 4096 texts, or a text with the private-use characters U+FF001, U+FF002")
    for base in BASES:
        if not any(base <= code < base + len(texts) for code in used):
            return base
    raise DataError(f"{where}: the texts use the whole private-use plane 16 of Unicode; one run of it must stay free")


def _owners(messages: Sequence[Message]) -> list[Message]:
    """The message of each text."""
    return [message for message in messages for part in message.parts if isinstance(part, Text)]


def _one_of(base: int, count: int) -> str:
    """The pattern of the characters that stand for texts."""
    return f"[{chr(base)}-{chr(base + count - 1)}]" if count else "(?!)"


def _variants(text: str, escaped: bool) -> list[str]:
    """What templates are known to make of a text: trimmed on a side, or of newlines only, past a thought, or JSON."""
    found = [text, text.strip(), text.rstrip(), text.lstrip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")]
    if "</think>" in text:
        found += [text.split("</think>")[-1].lstrip("\n"), text.split("</think>")[-1].strip()]
    if escaped:
        found += [json.dumps(variant, ensure_ascii=False)[1:-1] for variant in found]
    return list(dict.fromkeys(found))


def _fit(
    outline: str, truth: str, base: int, texts: Sequence[str], escaped: Sequence[bool], where: str
) -> tuple[str, ...]:
    """What each character of the outline stands for, so that the outline filled is exactly the truth."""
    runs = re.split(f"({_one_of(base, len(texts))})", outline)
    order = [ord(run) - base for run in runs[1::2]]
    stack: list[tuple[int, int, tuple[str, ...]]] = []
    if truth.startswith(runs[0]):
        stack.append((0, len(runs[0]), ()))
    while stack:
        done, place, chosen = stack.pop()
        if done == len(order):
            if place == len(truth):
                return chosen
            continue
        literal = runs[2 * done + 2]
        for variant in reversed(_variants(texts[order[done]], escaped[order[done]])):
            if truth.startswith(variant + literal, place):
                stack.append((done + 1, place + len(variant) + len(literal), (*chosen, variant)))
    raise DataError(f"{where}: the chat template changes a text in a way that cannot be followed; use another template")


def _number(pieces: Sequence[Piece], messages: Sequence[Message], placeholders: Mapping[str, str]) -> list[Piece]:
    """The n-th placeholder of a kind stands for the n-th medium of that kind."""
    waiting: dict[str, list[int]] = {}
    for index, medium in enumerate(m for message in messages for m in message.media):
        waiting.setdefault(placeholders.get(medium.kind, ""), []).append(index)
    return [Piece(p.text, medium=waiting[p.text].pop(0)) if p.medium is not None else p for p in pieces]


def _train(piece: Piece, train: bool) -> Piece:
    return Piece(piece.text, piece.literal, train and piece.medium is None, piece.medium)
