"""The processor: conversations in, samples and batches out. The one renderer of training, evaluation, chat and serving.

A medium is opened by the front end of its kind, its tokens are counted before any model runs, its one placeholder
becomes that many ids, and their places are its slots. What is learned from is marked while the conversation is
rendered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from chiasm import registry
from chiasm.config import Config, PartConfig, part
from chiasm.errors import ConfigError, DataError, nearest
from chiasm.processing import tools as tooling
from chiasm.processing.base import Counter, FrontEnd, Place, TokenizerLike
from chiasm.processing.box import BoxFormat, region_of, seen_regions
from chiasm.processing.collate import collate, pack
from chiasm.processing.cut import check_answers, cut
from chiasm.processing.jinja import JinjaConfig, resolved
from chiasm.processing.labels import tell
from chiasm.processing.masking import Masker, Masking
from chiasm.processing.messages import parse
from chiasm.processing.shown import Shows, TokenRow, rows
from chiasm.processing.template import Template
from chiasm.processing.templates import template
from chiasm.types import Batch, Box, Conversation, Encoding, MediaItem, Message, Piece, Sample, Text


def _template(values: Any) -> Any:
    """The data of a named template; a string with a colon or a registered type passes to the registry."""
    if not isinstance(values, str) or ":" in values or values in registry.names("template"):
        return values
    return template(values)


class Instruction(Config):
    """The text of the last user turn, for a connector that reads it with the tokenizer's second vocabulary.

    ``max_length`` counts its tokens, with those that open and end it; a longer text is refused.
    """

    max_length: int = 512


class ProcessingConfig(Config):
    """How conversations become samples.

    ``template`` is the name of a published template or a template's own data; saved is the data. ``media`` names the
    front end of each kind of media. ``target="decoder"`` puts the last answer on the decoder's side (encoder-decoder
    models).
    """

    template: Annotated[part("template"), BeforeValidator(_template)]  # type: ignore[valid-type]
    media: dict[str, part("front_end")] = Field(default_factory=dict)  # type: ignore[valid-type]
    max_length: int | None = None  # tokens of a sample; longer ones lose their end, never a part of a medium
    padding_side: Literal["right", "left"] = "right"
    add_bos: bool | None = None  # None: as the tokenizer does
    target: Literal["sequence", "decoder"] = "sequence"
    decoder_start: str | None = None  # the token that opens the decoder's side; None: the padding token
    box: BoxFormat = BoxFormat()
    instruction: Instruction | None = None  # for connectors that read it
    stop_strings: tuple[str, ...] = ()  # further strings that generation stops on
    max_media: int | None = Field(default=None, ge=0)  # media of a conversation, shots included; more are refused
    labels: tuple[str, ...] = ()  # the answers of a model that classifies, in the order of its classes
    answers: bool = False  # what people answered goes along as tokens, for a model that writes answers
    masking: Masking | None = None  # words hidden in training, for objectives that fill them


class Processor:
    """Renders conversations. ``counter(kind, layout)`` gives the tokens of a medium: ``model.config.count``."""

    def __init__(self, config: ProcessingConfig, tokenizer: TokenizerLike, counter: Counter):
        if isinstance(config.template, JinjaConfig):
            config = config.model_copy(update={"template": resolved(config.template, tokenizer.chat_template)})
        self.config, self.tokenizer, self.counter = config, tokenizer, counter
        self.front_ends: dict[str, FrontEnd] = {
            kind: registry.get("front_end", c.type)(c) for kind, c in config.media.items()
        }
        placeholders = {kind: c.placeholder or "" for kind, c in config.media.items()}
        self.template: Template = self._make(config.template, placeholders)
        lacking = [token for token in self.template.controls if token not in tokenizer.specials]
        if lacking:
            raise ConfigError(
                f"the template writes {', '.join(map(repr, lacking))}, which this tokenizer does not have as control "
                "tokens: they would be read as ordinary text; choose a template that fits the tokenizer or add the "
                "tokens to it"
            )
        if config.instruction and getattr(tokenizer, "instruction", None) is None:
            raise ConfigError(
                "processing.instruction is set, but the tokenizer has no second vocabulary to read it with: "
                "tokenizer.with_instruction(other), or a folder that holds instruction_tokenizer.json"
            )
        self._masker = Masker(config.masking, tokenizer) if config.masking else None
        self._end_ids, self._end_string = self._answer_end()
        self._always = self._always_trained()
        self.fill_id = next(i for i in (tokenizer.pad_id, tokenizer.unk_id, 0) if i is not None)

    def _make(self, values: PartConfig, placeholders: dict[str, str]) -> Template:
        cls = registry.get("template", values.type)
        return cls(values, tokens=self.tokenizer.tokens, placeholders=placeholders)

    def __reduce__(self) -> Any:
        return Processor, (self.config, self.tokenizer, self.counter)

    def __repr__(self) -> str:
        media = "".join(f", {kind} by {config.type}" for kind, config in self.config.media.items())
        return f"Processor(template {self.config.template.type}{media}, {self.tokenizer!r})"

    # ------------------------------------------------------------------------------------------------ one sample

    def __call__(
        self,
        messages: Conversation,
        id: str = "",
        add_generation_prompt: bool = False,
        train: bool = False,
        max_length: int | None = None,
        answers: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Sample:
        """One conversation → ``Sample``: ``input_ids [T]``, ``loss_mask [T]``, media with slots.

        ``answers`` are what several people answered (``labels``, ``answers``). ``tools`` are OpenAI's.

        Raises DataError that names the sample; ConfigError where ``train`` is asked of a template that ends answers
        with nothing generation stops on.
        """
        hide = train and self._masker is not None
        if self.template.beside:
            add_generation_prompt = train = False  # there is no answer to ask for or to learn
        if train:
            self.check()
        parsed = parse(messages, id)
        items = self._open(parsed, id)
        parsed = self._boxes(parsed, items, id)
        items = self._instructed(parsed, items, id)
        if train:
            check_answers(parsed, id)
        target = None
        if self.config.target == "decoder" and parsed[-1].role == "assistant" and not add_generation_prompt:
            target, parsed = self._target(parsed, id), parsed[:-1]
            add_generation_prompt = True
        pieces = tooling.render(self.template, parsed, add_generation_prompt, f"sample {id!r}", tools, train)
        sample = self._sample(id, pieces, items, target)
        limit = max_length if max_length is not None else self.config.max_length
        sample = cut(sample, limit, train, prompt=add_generation_prompt)
        tell(sample, self.config, self.tokenizer, parsed, answers)
        if hide and self._masker is not None:
            sample.masked_ids, sample.masked = self._masker(sample.input_ids)
        sample.origin = Shows(self)
        return sample

    def batch(
        self,
        conversations: Sequence[Conversation],
        ids: Sequence[str] | None = None,
        add_generation_prompt: bool = False,
        train: bool = False,
        padding_side: Literal["right", "left"] | None = None,
        pack: bool = False,
    ) -> Batch:
        """Several conversations → ``Batch``, padded ``[B, T]`` or, with ``pack``, one after the other in one row."""
        names = list(ids) if ids is not None else [str(i) for i in range(len(conversations))]
        if len(names) != len(conversations):
            raise DataError(f"{len(names)} ids for {len(conversations)} conversations; give one for each")
        samples = [self(c, n, add_generation_prompt, train) for c, n in zip(conversations, names, strict=True)]
        return self.collate(samples, padding_side, pack)

    def collate(
        self, samples: Sequence[Sample], padding_side: Literal["right", "left"] | None = None, packed: bool = False
    ) -> Batch:
        """Samples → ``Batch`` with this processor's padding."""
        if packed:
            return pack(samples, sum(len(s) for s in samples), self.fill_id)
        return collate(samples, self.fill_id, padding_side or self.config.padding_side)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of generated ids."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special)

    # ------------------------------------------------------------------------------------------------ stopping

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids generation stops on: the template's end of an answer, EOS, and the checkpoint's own list."""
        eos = () if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,)
        return tuple(dict.fromkeys([*self._end_ids, *eos, *self.tokenizer.generation_stops]))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings generation stops on: the template's end of an answer where that is no control token."""
        own = (self._end_string,) if self._end_string else ()
        return tuple(dict.fromkeys([*own, *self.config.stop_strings]))

    def check(self) -> None:
        """Raises ConfigError where a model trained with this template would never stop generating."""
        if not self.template.beside and not self._end_ids and not self._end_string:
            name = self.config.template.type
            raise ConfigError(
                f"template {name!r} closes an answer with nothing that generation stops on, so a model trained with it "
                "would not learn to stop; set answer_end (for instance the tokenizer's EOS token) or choose another "
                "template"
            )

    def _answer_end(self) -> tuple[tuple[int, ...], str]:
        """The control tokens that close an answer, or the string that does where it holds none."""
        if not self.template.end:
            return (), ""
        ids = self.tokenizer.encode_pieces([Piece(self.template.end, literal=True)]).ids
        controls = set(self.tokenizer.specials.values())
        found = tuple(i for i in ids if i in controls)[:1]
        return found, "" if found else self.template.end

    def _always_trained(self) -> frozenset[int]:
        text = self.template.also_trained
        if not text:
            return frozenset()
        controls = set(self.tokenizer.specials.values())
        ids = {i for i in self.tokenizer.encode_pieces([Piece(text, literal=True)]).ids if i in controls}
        newline = self.tokenizer.encode_pieces([Piece("\n")]).ids
        return frozenset(ids | ({newline[0]} if len(newline) == 1 else set()))

    # ------------------------------------------------------------------------------------------------ inspection

    def prompt(self, messages: Conversation, add_generation_prompt: bool = True, tools: Any = None) -> str:
        """The rendered conversation as a readable string, each medium as its placeholder (or ``<kind>``)."""
        parsed = tuple(
            replace(m, parts=tuple(Text(repr(p)) if isinstance(p, Box) else p for p in m.parts))
            for m in parse(messages)
        )
        media = [m for message in parsed for m in message.media]
        pieces = tooling.render(self.template, parsed, add_generation_prompt, "prompt", tools)
        return "".join(p.text or (f"<{media[p.medium].kind}>" if p.medium is not None else "") for p in pieces)

    def table(self, sample: Sample) -> list[TokenRow]:
        """Every token of a sample with its text, whether it is learned, and the medium whose slot it is."""
        return rows(self, sample)

    # ------------------------------------------------------------------------------------------------ steps

    def _open(self, messages: Sequence[Message], id: str) -> list[MediaItem]:
        """Every medium through its front end, in the order of the conversation."""
        media = [medium for message in messages for medium in message.media]
        most = self.config.max_media
        if most is not None and len(media) > most:
            raise DataError(
                f"sample {id!r}: the conversation holds {len(media)} media, this model takes at most {most}: leave out "
                "shots, or raise processing.max_media",
                "too_long",
            )
        totals: dict[str, int] = {}
        for medium in media:
            totals[medium.kind] = totals.get(medium.kind, 0) + 1
        seen: dict[str, int] = {}
        items = []
        for medium in media:
            kind = medium.kind
            if kind not in self.front_ends:
                told = f"sample {id!r}: this model takes no {kind}; {nearest(kind, self.front_ends)}"
                raise DataError(told, "medium")
            place = Place(id, seen.get(kind, 0), totals[kind])
            items.append(self.front_ends[kind](medium, place))
            seen[kind] = seen.get(kind, 0) + 1
        return items

    def _boxes(self, messages: tuple[Message, ...], items: Sequence[MediaItem], id: str) -> tuple[Message, ...]:
        """Box parts become text; they follow what the front end does with the picture they lie in."""
        if not any(isinstance(p, Box) for message in messages for p in message.parts):
            return messages
        regions = seen_regions(messages, items, self.front_ends.get("image"), id)

        def write(box: Box) -> Text:
            return Text(self.config.box.write(box, region_of(box, regions, id), f"sample {id!r}"))

        return tuple(replace(m, parts=tuple(write(p) if isinstance(p, Box) else p for p in m.parts)) for m in messages)

    def boxes(self, text: str, messages: Conversation, image: int = 0, id: str = "") -> list[Box]:
        """The boxes that an answer about picture number ``image`` gives, in that picture's pixels. Raises DataError."""
        parsed = parse(messages, id)
        regions = seen_regions(parsed, self._open(parsed, id), self.front_ends.get("image"), id)
        region = region_of(Box((0, 0, 0, 0), image), regions, id)
        return [Box(xyxy, image) for xyxy in self.config.box.read(text, region)]

    def _instructed(self, messages: Sequence[Message], items: list[MediaItem], id: str) -> list[MediaItem]:
        """Every medium with the ids of the instruction, where the model reads it."""
        if self.config.instruction is None:
            return items
        reader: Any = self.tokenizer.instruction  # type: ignore[attr-defined]
        text = next((m.text for m in reversed(messages) if m.role == "user"), "")
        ids = [*reader.prefix, *reader.encode_pieces([Piece(text)]).ids, *reader.suffix]
        if len(ids) > self.config.instruction.max_length:
            raise DataError(
                f"sample {id!r}: its instruction has {len(ids)} tokens for the connector, which reads at most "
                f"{self.config.instruction.max_length}; shorten it, or raise processing.instruction.max_length as far "
                "as the connector has positions",
                "too_long",
            )
        return [replace(item, cond=torch.tensor(ids, dtype=torch.long)) for item in items]

    def _target(self, messages: Sequence[Message], id: str) -> list[int]:
        """The decoder's side: start token, last answer, end."""
        start = self.tokenizer.specials.get(self.config.decoder_start or "", self.fill_id)
        if self.config.decoder_start and self.config.decoder_start not in self.tokenizer.specials:
            known = nearest(self.config.decoder_start, self.tokenizer.specials)
            raise ConfigError(f"decoder_start {self.config.decoder_start!r} is no token of the tokenizer; {known}")
        if messages[-1].media:
            raise DataError(f"sample {id!r}: an answer on the decoder's side holds a medium; only text can stand there")
        end = Piece(self.template.end, literal=True)
        return [start, *self.tokenizer.encode_pieces([Piece(messages[-1].text), end]).ids]

    def _sample(self, id: str, pieces: Sequence[Piece], items: list[MediaItem], target: list[int] | None) -> Sample:
        """Encode, expand placeholders, record slots and the loss mask."""
        encoding = self.tokenizer.encode_pieces(pieces)
        if self.template.beside:
            return self._beside(id, pieces, encoding, items)
        ids, mask = self._opening(encoding)
        placed: dict[int, MediaItem] = {}
        for index, (first, last) in zip(encoding.ids, encoding.spans, strict=True):
            medium = pieces[first].medium
            if medium is not None:
                item = items[medium]
                count = self.counter(item.kind, item.layout)
                placed[medium] = replace(item, slots=torch.arange(len(ids), len(ids) + count))
                ids += [index if index >= 0 else self.fill_id] * count
                mask += [False] * count
                continue
            learned = any(p.train for p in pieces[first : last + 1])
            ids.append(index)
            mask.append(learned or (index in self._always and any(p.literal for p in pieces[first : last + 1])))
        missing = [f"{items[i].kind} {i + 1}" for i in range(len(items)) if i not in placed]
        if missing:
            raise DataError(
                f"sample {id!r}: the template wrote no place for {', '.join(missing)} of {len(items)} media"
            )
        if self.config.target == "decoder":  # the encoder's side ends as the tokenizer ends a text, answer or no answer
            mask = [False] * len(mask)
            ids += self.tokenizer.suffix
            mask += [False] * len(self.tokenizer.suffix)
        media = [placed[i] for i in range(len(items))]
        side = torch.tensor(target, dtype=torch.long) if target is not None else None
        return Sample(id, torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.bool), media, side)

    def _beside(self, id: str, pieces: Sequence[Piece], encoding: Encoding, items: list[MediaItem]) -> Sample:
        """The text by itself, and media that take no slot of it. Without a text there are no ids."""
        ids: list[int] = []
        lost = 0
        if pieces:
            if not encoding.ids:
                raise DataError(f"sample {id!r}: the text {pieces[0].text!r} gives 0 tokens; write another", "empty")
            given = [*self._opening(encoding)[0], *encoding.ids]
            ids = self.template.close(given, self.tokenizer.suffix, self.fill_id)
            lost = max(0, len(given) + len(self.tokenizer.suffix) - len(ids))
        media = [replace(item, slots=torch.zeros(0, dtype=torch.long)) for item in items]
        learned = torch.zeros(len(ids), dtype=torch.bool)
        return Sample(id, torch.tensor(ids, dtype=torch.long), learned, media, lost=lost)

    def _opening(self, encoding: Encoding) -> tuple[list[int], list[bool]]:
        """BOS, unless the template has written it."""
        prefix = list(self.tokenizer.prefix)
        if self.config.add_bos is not None:
            bos = getattr(self.tokenizer, "bos_id", None)
            if self.config.add_bos and bos is None:
                raise ConfigError("add_bos is set but the tokenizer has no BOS token; name it or leave add_bos out")
            prefix = [bos] if self.config.add_bos else []
        if prefix and encoding.ids[: len(prefix)] == prefix:
            prefix = []
        return prefix, [False] * len(prefix)


def trained_text(processor: Processor, sample: Sample) -> Iterator[str]:
    """The text of each run of trained tokens: what a model learns to say."""
    run: list[int] = []
    for index, learned in zip([*sample.input_ids.tolist(), 0], [*sample.loss_mask.tolist(), False], strict=True):
        if learned:
            run.append(index)
        elif run:
            yield processor.tokenizer.decode(run, skip_special=False)
            run = []
