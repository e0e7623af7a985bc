"""Answers that are held to choices, schemas, expressions and grammars: any model's are valid, whatever it would say."""

from __future__ import annotations

import gc
import json
import re
import sys
import threading
import weakref
from pathlib import Path
from typing import Literal

import jsonschema
import pydantic
import pytest
import torch
from click.testing import CliRunner, Result
from serving_kit import tiny
from tokenizers import Tokenizer as Made
from tokenizers import decoders, models, normalizers, pre_tokenizers

from chiasm.cli import main
from chiasm.errors import ChiasmError, ConfigError, DataError
from chiasm.infer.constraints import Choices, Grammar, JsonSchema, Regex
from chiasm.infer.grammars import vocabulary
from chiasm.infer.sampling import Sampling
from chiasm.infer.service import Request, Service
from chiasm.lm.tokenizer import Tokenizer
from chiasm.types import Message, Piece, Text

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

import tokenizer_kit

COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue", "größer"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
SCHEMAS = {
    "object": COLOURS,
    "list": {"type": "array", "items": COLOURS, "minItems": 1, "maxItems": 2},
    "string": {"type": "string", "minLength": 1, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}$"},
    "number": {"type": "integer", "minimum": -7, "maximum": 300},
    "either": {"anyOf": [{"const": None}, {"type": "array", "items": {"enum": [1, 2.5]}, "maxItems": 3}]},
    "parts": {
        "$defs": {"p": {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}, "additionalProperties": False}},
        "type": "object",
        "properties": {"first": {"$ref": "#/$defs/p"}, "second": {"$ref": "#/$defs/p"}},
        "required": ["first", "second"],
        "additionalProperties": False,
    },
}
CHAIN = {
    "$ref": "#/$defs/a0",
    "$defs": {
        **{f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(1000)},
        "a1000": {"type": "object"},
    },
}
QUESTION = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module")
def service(vlm):
    made = Service(vlm, slots=6, max_length=480, threads=1)
    made.start()
    yield made
    made.stop()


def asked(constraint, seed: int = 0, tokens: int = 300, **sampling) -> Request:
    chosen = Sampling(max_new_tokens=tokens, temperature=1.0, seed=seed, **sampling)
    return Request([Message("user", (Text("What is it?"),))], chosen, constraint)


def valid(text: str, schema: dict) -> object:
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema).validate(value)
    return value


# ------------------------------------------------------------------------------------------------- a tiny model


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_random_model_writes_what_the_schema_says(service, name):
    constraint = JsonSchema(SCHEMAS[name])
    ended = [service.submit(asked(constraint, seed)).result(120) for seed in range(6)]
    for text, finish in ended:
        assert finish.reason == "stop", (text, finish)
        valid(text, SCHEMAS[name])
    assert len({text for text, _ in ended}) > 1  # the model still chooses


def test_a_random_model_writes_any_object(service):
    for seed in range(4):
        text, finish = service.submit(asked(JsonSchema({"type": "object"}), seed)).result(120)
        assert text.startswith("{")
        if finish.reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_side_by_side_and_alone_are_the_same(vlm, service):
    constraints = [JsonSchema(COLOURS), Regex("[0-9]{3}-(x|y)+"), Choices(["yes", "no", "yes, very"]), None]
    requests = [asked(constraints[seed % 4], seed, 60) for seed in range(8)]
    handles = [service.submit(request) for request in requests]
    together = [handle.result(120)[0] for handle in handles]
    assert together == [service.submit(request).result(120)[0] for request in requests]
    for request, text in zip(requests, together, strict=True):
        values = {**request.sampling.model_dump(), "constraint": request.constraint}
        assert vlm.generate(QUESTION, **values) == text
        assert vlm.generate(QUESTION, use_cache=False, **values) == text
        assert "".join(vlm.generate(QUESTION, stream=True, **values)) == text


def test_many_rows_of_one_call(vlm):
    answers = vlm.generate([QUESTION] * 5, constraint=JsonSchema(COLOURS), max_new_tokens=80, return_details=True)
    for answer in answers:
        assert answer.reason in ("constraint", "stop")
        valid(answer.text, COLOURS)


def test_expressions_and_grammars(service):
    for seed in range(5):
        text, finish = service.submit(asked(Regex(r"(ab|/[0-9]+){2,5}\."), seed)).result(60)
        assert finish.reason == "stop" and re.fullmatch(r"(ab|/[0-9]+){2,5}\.", text)
        text, finish = service.submit(asked(Grammar('start: "a" b\nb: "(" b ")" | "x"'), seed)).result(60)
        middle = text.removeprefix("a")
        depth = middle.count("(")
        assert finish.reason in ("stop", "length") and (
            finish.reason == "length" or middle == "(" * depth + "x" + ")" * depth
        )


def test_every_choice_and_nothing_else(service):
    texts = ["yes", "no", "yes, very", "größer als 東京", "a\nb"]
    found = {service.submit(asked(Choices(texts), seed)).result(60)[0] for seed in range(40)}
    assert found <= set(texts) and len(found) > 2
    for text in texts:
        assert service.submit(asked(Choices([text]))).result(60)[0] == text


def test_a_cut_answer_ends_for_its_length(service):
    text, finish = service.submit(asked(JsonSchema(COLOURS), tokens=9)).result(60)
    assert (finish.reason, finish.completion_tokens) == ("length", 9) and text.lstrip().startswith("{")
    whole, _ = service.submit(asked(JsonSchema(COLOURS))).result(60)
    assert whole.startswith(text)


def test_a_stop_string_still_stops(service):
    whole, _ = service.submit(asked(JsonSchema(COLOURS))).result(60)
    text, finish = service.submit(asked(JsonSchema(COLOURS), stop=('"sure',))).result(60)
    assert finish.reason == "stop" and text == whole[: whole.index('"sure')]


def test_probabilities_of_what_was_chosen(service):
    handle = service.submit(asked(JsonSchema(COLOURS), logprobs=2))
    told = [logprob for piece in handle for logprob in piece.logprobs]
    text = b"".join(one.bytes for one in told).decode()
    valid(text, COLOURS)
    assert all(len(one.top) == 2 and one.logprob <= 0 for one in told)


def test_many_threads_share_one_constraint(service):
    constraint, found = JsonSchema(COLOURS), []

    def ask(seed: int) -> None:
        found.append(service.submit(asked(constraint, seed)).result(120)[0])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len([valid(text, COLOURS) for text in found]) == 8


def test_a_class_of_pydantic_is_a_schema(service):
    class Look(pydantic.BaseModel, extra="forbid"):
        colour: Literal["red", "blue"]
        count: int = pydantic.Field(ge=0, le=20)

    text, _ = service.submit(asked(JsonSchema(Look))).result(60)
    assert Look.model_validate_json(text).count <= 20


def test_the_command(vlm, tmp_path):
    vlm.save(tmp_path / "model")
    (tmp_path / "schema.json").write_text(json.dumps(COLOURS))
    rows = [{"id": str(i), "messages": QUESTION} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*words: object) -> Result:
        return CliRunner().invoke(main, ["generate", str(tmp_path / "model"), *map(str, words)])

    valid(run("What?", "--json-schema", tmp_path / "schema.json").output, COLOURS)
    assert run("What?", "--choices", "yes, no").output.strip() in ("yes", "no")
    run("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--choices", "yes,no")
    assert {json.loads(line)["text"] for line in (tmp_path / "out.jsonl").open()} <= {"yes", "no"}
    (tmp_path / "schema.json").write_text("{")
    for words in (["--json-schema", tmp_path / "schema.json"], ["--choices", "yes,,no"]):
        wrong = run("What?", *words)
        assert wrong.exit_code and isinstance(wrong.exception, (SystemExit, ChiasmError))


# ------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: JsonSchema({"type": "nonsense"}), "nonsense"),
        (lambda: JsonSchema({"not": {"type": "string"}}), "not"),
        (lambda: JsonSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: JsonSchema({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: JsonSchema({"type": "string", "pattern": "((("}), "regex"),
        (lambda: JsonSchema({"$ref": "http://127.0.0.1/x"}), "127.0.0.1"),
        (lambda: JsonSchema({"enum": []}), "nsatisfiable"),
        (lambda: JsonSchema("string"), "object"),
        (lambda: Regex("((("), "regular expression"),
        (lambda: Regex("a(?=b)"), "regular expression"),
        (lambda: Grammar("start: x"), "grammar"),
        (lambda: Grammar(""), "grammar"),
        (lambda: JsonSchema(CHAIN), "$ref"),  # these two ended the whole process
        (lambda: Grammar("start: x0\n" + "\n".join(f"x{i}: x{i + 1}" for i in range(4500)) + '\nx4500: "a"'), "rules"),
        (lambda: Choices([]), "choices"),
        (lambda: Choices(["a", ""]), "empty"),
    ],
)
def test_what_cannot_be_followed_is_one_clear_error(make, says):
    with pytest.raises(DataError) as caught:
        make()
    message = str(caught.value)
    assert says in message and "\n" not in message and len(message) < 400


def test_grammars_reach_no_control_token(service):
    """Neither by its name nor by its number, and a fault ends that answer alone."""
    index = service.vlm.tokenizer.id_of("<image>")
    for text in (f"start: <[{index}]>", "start: <image>", "start: <|image|>"):
        try:
            written, finish = service.submit(asked(Grammar(text))).result(60)
        except DataError:
            continue
        assert finish.reason == "error" and isinstance(finish.error, DataError) and written == ""
    assert service.submit(asked(Choices(["well"]))).result(60)[0] == "well" and service.healthy


def test_beams_and_missing_library(vlm, monkeypatch):
    with pytest.raises(ConfigError, match="num_beams"):
        vlm.generate(QUESTION, constraint=Choices(["a"]), num_beams=2)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"chiasm\[constraints\]"):
        JsonSchema(COLOURS)


def test_nothing_is_kept_of_a_model_that_is_gone(tmp_path):
    vlm = tiny(tmp_path / "tokenizer")
    valid(vlm.generate(QUESTION, constraint=JsonSchema(COLOURS)), COLOURS)
    held = weakref.ref(vlm.tokenizer)
    del vlm
    gc.collect()
    assert held() is None


# ------------------------------------------------------------------------------------------------- real vocabularies


class Facts:
    """What a constraint is told of a tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer, self.stop_ids = tokenizer, (tokenizer.eos_id,)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def written(constraint, tokenizer, seed: int, most: int = 400) -> str:
    """The answer of a model whose every logit is noise."""
    facts, generator = Facts(tokenizer), torch.Generator().manual_seed(seed)
    state, ids = constraint.start(facts), []
    while not state.done:
        token = int(state.mask(torch.randn(len(tokenizer) + 13, generator=generator)).argmax())
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        state.advance(token)
        assert len(ids) < most
    return tokenizer.decode(ids)


@pytest.mark.data
@pytest.mark.parametrize("kind", ["bytes", "pieces", "pieces-new", "pieces-json"])
def test_vocabularies_of_real_tokenizers(shared_data, tmp_path, kind):
    tokenizer = real(kind, tmp_path, shared_data)
    words = vocabulary(Facts(tokenizer))
    assert words.spaced == kind.startswith("pieces")
    assert not any(words.bytes[i] for i in tokenizer.specials.values())
    for text in ("a red, round thing: größer als 東京 🙂", '{"a": [1, 2]}'):
        ids = tokenizer.encode_pieces([Piece(text)]).ids
        if tokenizer.unk_id not in ids:
            assert b"".join(words.bytes[i] for i in ids).decode().removeprefix(" " * words.spaced) == text
    for name in ("object", "string", "pattern", "number", "parts"):
        constraint = JsonSchema(SCHEMAS[name])
        for seed in range(2):
            valid(written(constraint, tokenizer, seed), SCHEMAS[name])
    for seed in range(3):
        assert re.fullmatch(r"[a-z]{3}( [0-9])+x", written(Regex(r"[a-z]{3}( [0-9])+x"), tokenizer, seed))
        assert re.fullmatch(r" [ab]x", written(Regex(r" [ab]x"), tokenizer, seed))
        assert re.fullmatch(r"a(xb|[0-9])c", written(Grammar('start: "a" b "c"\nb: "xb" | /[0-9]/'), tokenizer, seed))


def real(kind: str, folder: Path, data: Path) -> Tokenizer:
    tokens = data / "weights" / "tokenizers"
    stories = data / "weights" / "stories260K" / "tokenizer.model"
    makers = {
        "bytes": lambda: tokenizer_kit.gpt2(folder, tokens),
        "pieces": lambda: tokenizer_kit.spm(folder, tokens / "mistral" / "tokenizer.model.v1", legacy=True),
        "pieces-new": lambda: tokenizer_kit.spm(folder, stories, legacy=False),
        "pieces-json": lambda: tokenizer_kit.save(tokenizer_kit.llama(stories, legacy=False), folder),
    }
    return Tokenizer.from_folder(makers[kind]())


def test_a_tokenizer_that_does_not_spell_is_refused(tmp_path):
    """One that lower-cases and splits words: its tokens are not the bytes of a text."""
    letters = [*'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,.']
    vocab = {token: i for i, token in enumerate(["[UNK]", "[SEP]", *letters, *("##" + letter for letter in letters)])}
    made = Made(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[UNK]", "[SEP]"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[SEP]", "unk_token": "[UNK]"}))
    facts = Facts(Tokenizer.from_folder(tmp_path))
    with pytest.raises(DataError, match="held to choices"):
        JsonSchema(COLOURS).start(facts)
    Choices(["red"]).start(facts)
