"""The files of a tokenizer: what is read beside ``tokenizer.json`` or ``tokenizer.model``, and what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiasm.errors import CheckpointError
from chiasm.lm.tokenizer_vocab import vocabulary_files

NAMES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
# A second tokenizer, for connectors that read the instruction in a vocabulary of their own (InstructBLIP's Q-Former).
SECOND = "instruction_"
SECOND_FOLDER = "qformer_tokenizer"  # where transformers keeps it
NAMES += tuple(SECOND + name for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"))
ROLES = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class Added:
    """A token beyond the model's own vocabulary, with the flags of the tokenizers library."""

    content: str
    id: int | None = None  # None: the next free one
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False

    @classmethod
    def read(cls, value: Any, index: int | None = None, special: bool = True) -> Added:
        """From a string or from the table that configuration files hold."""
        if isinstance(value, str):
            return cls(value, index, special)
        flags = ("special", "lstrip", "rstrip", "normalized", "single_word")
        return cls(value["content"], value.get("id", index), **{k: bool(value[k]) for k in flags if k in value})


@dataclass
class TokenizerFiles:
    """The bytes of the files, and what they say. Only what pickles."""

    place: str
    content: dict[str, bytes]  # file name → bytes, exactly as read
    json: dict[str, Any] | None = None  # tokenizer.json, unless the backend is sentencepiece
    config: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    named: dict[str, str] = field(default_factory=dict)  # "bos" | "eos" | "pad" | "unk" → token
    added: list[Added] = field(default_factory=list)
    chat_template: str | None = None
    generation_stops: tuple[int, ...] = ()
    instruction: TokenizerFiles | None = None

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Read a folder. Raises CheckpointError where it holds no tokenizer that is understood."""
        content = {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}
        second = folder / SECOND_FOLDER
        content |= {
            name: p.read_bytes()
            for name in NAMES
            if (p := second / name.removeprefix(SECOND)).is_file() and name.startswith(SECOND)
        }
        if not content.keys() & {"tokenizer.json", "tokenizer.model"} and folder.is_dir():
            config = json.loads(content.get("tokenizer_config.json", b"{}"))
            content |= vocabulary_files(folder, config)
        if not content.keys() & {"tokenizer.json", "tokenizer.model"}:
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise CheckpointError(
                f"{folder}: neither tokenizer.json nor tokenizer.model is there (found: {found}); a tokenizer of "
                "transformers writes tokenizer.json with save_pretrained"
            )
        return cls.parse(content, str(folder))

    @classmethod
    def parse(cls, content: dict[str, bytes], place: str = "tokenizer") -> TokenizerFiles:
        """From the bytes of the files."""

        def table(name: str) -> dict[str, Any]:
            if name not in content:
                return {}
            try:
                value = json.loads(content[name])
            except ValueError as error:
                raise CheckpointError(f"{place}/{name}: {error}") from None
            if not isinstance(value, dict):
                raise CheckpointError(f"{place}/{name}: holds {type(value).__name__}, a table was expected")
            return value

        config, special_map = table("tokenizer_config.json"), table("special_tokens_map.json")
        body = table("tokenizer.json") if "tokenizer.json" in content else None
        stops = table("generation_config.json").get("eos_token_id")
        files = cls(place, content, body, config)
        files.named = _named(config, special_map)
        files.added = _added(body or {}, config, special_map, table("added_tokens.json"), files.named)
        other = {name.removeprefix(SECOND): held for name, held in content.items() if name.startswith(SECOND)}
        files.instruction = cls.parse(other, f"{place}, for instructions") if other else None
        files.chat_template = _chat_template(content, config, table("chat_template.json"))
        files.generation_stops = tuple(stops) if isinstance(stops, list) else () if stops is None else (int(stops),)
        return files


def _named(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for role in ROLES:
        value = config.get(f"{role}_token") or special_map.get(f"{role}_token")
        if value:
            named[role] = value if isinstance(value, str) else value["content"]
    return named


def _added(
    body: Mapping[str, Any],
    config: Mapping[str, Any],
    special_map: Mapping[str, Any],
    added_tokens: Mapping[str, int],
    named: Mapping[str, str],
) -> list[Added]:
    """Every added token once, the first mention wins: tokenizer.json, configuration, added_tokens.json, named."""
    found: dict[str, Added] = {}

    def enter(token: Added) -> None:
        found.setdefault(token.content, token)

    for value in body.get("added_tokens", []):
        enter(Added.read(value))
    for index, value in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        enter(Added.read(value, int(index)))
    for token, index in sorted(added_tokens.items(), key=lambda item: item[1]):
        enter(Added(token, index, special=token in named.values()))
    for token in named.values():
        enter(Added(token))
    for source in (config, special_map):
        extra = [*_listed(source.get("additional_special_tokens")), *_listed(source.get("extra_special_tokens"))]
        for value in extra:
            enter(Added.read(value))
        for key in ("image_token", "video_token", "audio_token"):
            if source.get(key):
                enter(Added.read(source[key]))
    return list(found.values())


def _listed(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else list(value or [])


def _chat_template(content: Mapping[str, bytes], config: Mapping[str, Any], separate: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in content:
        return content["chat_template.jinja"].decode("utf-8")
    template = separate.get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
