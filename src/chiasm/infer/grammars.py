"""Answers that follow a JSON schema, a regular expression or a grammar, by llguidance (extra ``constraints``).

Reference: https://github.com/guidance-ai/llguidance, which keeps a parser of the text so far and says, before each
token, which tokens of the vocabulary it could go on with. What it cannot hold an answer to is refused when the
constraint is made, never left out in silence.

The vocabulary is told as the bytes of its tokens. Control tokens, media and whatever ends an answer have no bytes, so
that no text reaches them; an end of the vocabulary's own stands for "the answer may end here".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.infer.words import Words

END = b"<|end of the answer|>"
WHITE = r"( |\n {0,8})?"
"""White space between the parts of JSON: none, a space, or a new line. Without a bound some models never end it."""
MOST = 1000
"""Parts of a grammar, or of a schema with references. Chains of some thousand end llguidance 1.9 by a full stack, and
the process with it; without references its JSON reader bounds the depth by itself."""
PROBE = '{"a": [1, 2.5, true], "b c": "it is"}'
_vocabularies: WeakKeyDictionary[Any, dict[tuple[int, ...], Vocabulary]] = WeakKeyDictionary()


class Guided:
    """An answer that a grammar of llguidance describes. ``name`` and ``form`` are for messages. Raises DataError."""

    name = "grammar"

    def __init__(self, text: str):
        self.text = text
        problem = _called(lambda: _library().LLMatcher.validate_grammar(self.text), self.name)
        if problem and not problem.startswith("WARNING"):
            raise DataError(f"the {self.name} cannot be followed: {_short(problem)}", "constraint")

    def start(self, tokenizer: Any) -> GuidedState:
        """The state of a new answer. Raises DataError for a tokenizer whose tokens are not pieces of text."""
        words = vocabulary(tokenizer)
        text = _after_a_space(self.text) if words.spaced else self.text
        matcher = _called(lambda: _library().LLMatcher(words.tokenizer, text, log_level=0), self.name)
        if matcher.is_error():
            raise DataError(f"the {self.name} cannot be followed: {_short(matcher.get_error())}", "constraint")
        return GuidedState(matcher, words, tuple(tokenizer.stop_ids), self.name)


class JsonSchema(Guided):
    """The answer is JSON that is valid under ``schema``: an object as ``json`` reads it, or a pydantic model's class.

    Keys come in the order of ``properties``. ``{"type": "object"}`` is any object.
    """

    name = "JSON schema"

    def __init__(self, schema: Any):
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        if not isinstance(schema, dict):
            raise DataError(f"a JSON schema is an object, this is {type(schema).__name__}", "constraint")
        nodes, referring = _size(schema)
        if referring and nodes > MOST:
            raise DataError(
                f"the JSON schema has $ref and {nodes} objects and lists; at most {MOST} can be followed", "constraint"
            )
        rules = {"lenient": False, "whitespace_flexible": True, "whitespace_pattern": WHITE}
        try:
            text = _library().LLMatcher.grammar_from_json_schema(schema, overrides=rules)
        except (ValueError, TypeError) as error:
            raise DataError(f"the JSON schema cannot be followed: {_short(str(error))}", "constraint") from None
        super().__init__(text)


class Regex(Guided):
    """The answer matches a regular expression from its beginning to its end, in the syntax of Rust's ``regex``."""

    name = "regular expression"

    def __init__(self, pattern: str):
        super().__init__(_library().LLMatcher.grammar_from_regex(pattern))


class Grammar(Guided):
    """The answer is derived from ``start`` of a grammar in llguidance's form of Lark's syntax."""

    def __init__(self, text: str):
        parts = sum(map(text.count, "([{:"))
        if parts > MOST:
            raise DataError(f"the grammar has {parts} rules and groups; at most {MOST} can be followed", "constraint")
        super().__init__(_library().LLMatcher.grammar_from_lark(text))


class GuidedState:
    """One answer that follows a grammar."""

    def __init__(self, matcher: Any, words: Vocabulary, stop_ids: tuple[int, ...], name: str):
        self.matcher, self.words, self.name = matcher, words, name
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.long)

    @property
    def done(self) -> bool:
        """Whether the answer is complete and nothing could follow."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    def mask(self, logits: Tensor) -> Tensor:
        """``logits [V]`` → minus infinity at tokens that no valid answer goes on with. Raises DataError."""
        bits = np.frombuffer(_called(self.matcher.compute_bitmask, self.name), dtype=np.uint8)
        self._check()
        may = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()  # [W], the last of words.size is END
        kept = torch.zeros(logits.shape, dtype=torch.bool)
        count = min(self.words.size, len(kept))
        kept[:count] = may[:count] & self.words.writes[:count]  # [V]
        if may[self.words.size]:
            kept[self.stop_ids] = True
        return logits.masked_fill(~kept.to(logits.device), -torch.inf)

    def advance(self, token: int) -> None:
        """``token`` was chosen. Raises DataError where the library gives up on the grammar."""
        _called(lambda: self.matcher.consume_token(token), self.name)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            problem = _short(self.matcher.get_error())
            raise DataError(f"the {self.name} could not be followed to its end: {problem}", "constraint")


class Vocabulary:
    """The tokens of a tokenizer as bytes. ``spaced``: its decoder takes a space off the beginning of a text."""

    def __init__(self, tokenizer: Any, silent: Sequence[int]):
        words = Words(SimpleNamespace(decode=tokenizer.decode, tokenizer=tokenizer))
        self.size = len(tokenizer)
        hidden = {*silent, *tokenizer.specials.values()}
        known = [i for i in range(self.size) if i not in hidden and tokenizer.token_of(i) is not None]
        self.bytes = [b""] * self.size
        for index in known:
            self.bytes[index] = words(index)[1]
        self.writes = torch.tensor([bool(data) for data in self.bytes])
        self.spaced = self._read(tokenizer)
        self.tokenizer = _library().LLTokenizer(_Wrapped(self.bytes, tokenizer), eos_token=self.size)

    def _read(self, tokenizer: Any) -> bool:
        """Whether decoding takes a space off. Raises DataError where it does anything else to the bytes."""
        ids = [i for i in tokenizer.encode(PROBE) if self.bytes[i]]
        spelled = b"".join(self.bytes[i] for i in ids).decode("utf-8", errors="replace")
        read = tokenizer.decode(ids)
        if read not in (spelled, spelled.removeprefix(" ")):
            raise DataError(
                f"this tokenizer reads {_short(read)!r} where its tokens spell {_short(spelled)!r}: answers can be "
                "held to choices, not to schemas, expressions or grammars",
                "constraint",
            )
        space = next((i for i, data in enumerate(self.bytes) if data[:1] == b" " and data.strip().isalpha()), None)
        return space is not None and not tokenizer.decode([space]).startswith(" ")


class _Wrapped:
    """A vocabulary as llguidance asks for it.

    It encodes text that a grammar leaves no choice about, and lets only the first of those tokens follow. The tokens
    must spell exactly that text, so the space that some tokenizers put before a text is not left there.
    """

    is_tokenizer_wrapper, _accepts_bytes, bos_token_id = True, False, None

    def __init__(self, tokens: list[bytes], tokenizer: Any):
        self.tokens = [*tokens, END]
        self.eos_token_id, self.special_token_ids = len(tokens), [len(tokens)]
        self._ids = {data: index for index, data in enumerate(tokens) if data}
        self._longest = max(map(len, tokens))
        self._tokenizer = ref(tokenizer)  # what is remembered of a tokenizer must not keep it

    def __call__(self, text: str) -> list[int]:
        tokenizer, wanted = self._tokenizer(), text.encode()
        if tokenizer is not None:
            for start in (text, text.removeprefix(" ")):
                ids = tokenizer.encode(start)
                if b"".join(self.tokens[i] for i in ids) == wanted:
                    return ids
        return self._greedy(wanted)

    def _greedy(self, data: bytes) -> list[int]:
        ids: list[int] = []
        place = 0
        while place < len(data):
            ends = range(min(len(data), place + self._longest), place, -1)
            end = next((end for end in ends if data[place:end] in self._ids), None)
            if end is None:  # the tokenizer cannot write it: the mask will say so
                return ids
            ids.append(self._ids[data[place:end]])
            place = end
        return ids


def vocabulary(tokenizer: Any) -> Vocabulary:
    """The vocabulary of what a constraint is told of a tokenizer; made once."""
    owner, silent = getattr(tokenizer, "tokenizer", tokenizer), tuple(sorted(tokenizer.stop_ids))
    held = _vocabularies.setdefault(owner, {})
    if silent not in held:
        held[silent] = Vocabulary(owner, silent)
    return held[silent]


def _after_a_space(text: str) -> str:
    """The grammar behind one space, which the decoder takes off again: as the tokenizer writes the text itself."""
    inner = json.loads(text)["grammars"][0] if text.startswith("{") else {"lark_grammar": text}
    return json.dumps({"grammars": [{"lark_grammar": 'start: " " @inner'}, {**inner, "name": "inner"}]})


def _size(schema: Any) -> tuple[int, bool]:
    """Objects and lists in a schema, and whether any refers to another."""
    nodes, referring, left = 0, False, [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            nodes += 1
            referring |= isinstance(value, dict) and any("ref" in str(key).lower() for key in value)
            left.extend(value.values() if isinstance(value, dict) else value)
    return nodes, referring


def _called(call: Callable[[], Any], name: str) -> Any:
    """The library's answer. Its rare panics are no ``Exception``; they become a DataError too."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
            raise
        raise DataError(f"the {name} cannot be followed: the library llguidance fails on it", "constraint") from None


def _short(problem: str, most: int = 240) -> str:
    text = " ".join(problem.split("<state>")[0].split())
    return text if len(text) <= most else text[:most] + "..."


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError("this constraint needs the package llguidance: pip install 'chiasm[constraints]'") from None
    return llguidance


__all__ = ["Grammar", "Guided", "JsonSchema", "Regex"]
