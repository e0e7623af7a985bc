"""Strict nested configurations: frozen, typed, an unknown key is an error that names the nearest known ones.

A part's configuration is a ``PartConfig`` nested in the part's class as ``Config``; its ``type`` is the part's
registered name. ``part("connector")`` makes a field that takes any connector's configuration, as a dict or an object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError

from chiasm import registry
from chiasm.errors import ChiasmError, ConfigError, DataError, nearest

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration. Frozen; ``parse`` gives readable errors, ``edit`` returns a changed copy."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

    @classmethod
    def parse(cls: type[C], values: Mapping[str, Any] | C, where: str = "") -> C:
        """Validate ``values``. Raises ConfigError that names the key, the place and the nearest known keys."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where or cls.__qualname__}: a table of keys was expected, got {values!r:.80}")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_explain(cls, error, where)) from None

    def edit(self: C, **changes: Any) -> C:
        """A copy with dotted changes: ``cfg.edit(**{"model.lm.layers": 2})`` or ``cfg.edit(max_length=128)``."""
        return type(self).parse(override(self.dump(), changes))

    def dump(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, as written to JSON and YAML."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the sorted JSON form."""
        return hashlib.sha256(json.dumps(self.dump(), sort_keys=True).encode()).hexdigest()[:12]


class PartConfig(Config):
    """A configuration that says which registered part it belongs to."""

    type: str


def part(kind: str) -> Any:
    """Field type: the configuration of any part of this ``kind``, found by its ``type``."""

    def parse(values: Any) -> Any:
        if isinstance(values, PartConfig):
            return values
        if isinstance(values, str):
            values = {"type": values}
        if not isinstance(values, Mapping) or "type" not in values:
            raise ConfigError(f"a {kind} needs a 'type'; {nearest('', registry.names(kind))}")
        entry = registry.get(kind, values["type"])
        kinds = registry.kinds_of(entry)
        if (kinds and kind not in kinds) or not issubclass(getattr(entry, "Config", type), PartConfig):
            what = f"is a part of kind {kinds[0]!r}" if kinds else "has no Config that is a PartConfig"
            raise ConfigError(f"{values['type']!r} {what}, and a {kind} is wanted; {nearest('', registry.names(kind))}")
        return entry.Config.parse(values, where=f"{kind} {values['type']!r}")

    return Annotated[SerializeAsAny[PartConfig], BeforeValidator(parse)]


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with dotted keys replaced. Missing tables are made; a number steps into a list (``stages.0.lr``)."""
    result: dict[str, Any] = json.loads(json.dumps(values))
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        node: Any = result
        for step in path:
            if isinstance(node, dict) and node.get(step) is None:
                node[step] = {}
            node = node[_key(node, step, dotted)]
        key = _key(node, last, dotted)
        node[key] = value.dump() if isinstance(value, Config) else value
    return result


def _key(node: Any, step: str, dotted: str) -> Any:
    """``step`` as a key of a table or an index of a list. Raises ConfigError."""
    if isinstance(node, dict):
        return step
    if isinstance(node, list):
        if step.isdigit() and int(step) < len(node):
            return int(step)
        raise ConfigError(f"override {dotted!r}: {step!r} is not an index of a list of {len(node)}")
    raise ConfigError(f"override {dotted!r}: {step!r} would go into {node!r}, which is not a table")


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """``["train.lr=1e-3", "model.lm.layers=2"]`` as a dict; the right sides are YAML."""
    changes = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {word!r} is not of the form key=value")
        changes[key] = read_scalar(value)
    return changes


def read_scalar(text: str) -> Any:
    """A YAML value, with ``1e-3`` read as a number (YAML 1.1 wants ``1.0e-3``). Raises ConfigError."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is not YAML ({_one_line(error)}); put a text with such signs in quotes") from None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a dict, numbers like ``1e-3`` included. Raises ConfigError."""
    try:
        values = yaml.safe_load(read_text(path, ConfigError))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({_one_line(error)})") from None
    if not isinstance(values, dict):
        held = "is empty" if values is None else f"holds {type(values).__name__}"
        raise ConfigError(f"{path}: {held}, a table of keys was expected")
    return _numbers(values)


def read_text(path: str | Path, kind: type[ChiasmError] = DataError) -> str:
    """The text of a UTF-8 file. Raises an error of ``kind`` that names the file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise kind(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file, ended by line feeds alone. Raises DataError.

    ``str.splitlines`` would also cut at U+2028 and others, which JSON may hold within a string.
    """
    lines = read_text(path).split("\n")
    return lines if lines[-1] else lines[:-1]


def diff(a: Config | Mapping[str, Any], b: Config | Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two configurations differ, with both values (None where a side lacks the key)."""
    left, right = dict(flatten(a)), dict(flatten(b))
    return {k: (left.get(k), right.get(k)) for k in sorted(left.keys() | right.keys()) if left.get(k) != right.get(k)}


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaf values."""
    values = values.dump() if isinstance(values, Config) else values
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and value[:1].isdigit() and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + str(getattr(error, "problem", None) or " ".join(str(error).split()))


def _explain(cls: type[BaseModel], error: ValidationError, where: str) -> str:
    lines = []
    places = [problem["loc"] for problem in error.errors()]
    for problem in error.errors():
        path = ".".join(str(p) for p in problem["loc"])
        here = problem["loc"]
        if problem["type"] == "too_short" and any(len(p) > len(here) and p[: len(here)] == here for p in places):
            continue  # a list whose item is wrong has no item, says pydantic
        if problem["type"] == "extra_forbidden":
            owner = _owner(cls, problem["loc"][:-1])
            known = owner.model_fields if owner else cls.model_fields
            lines.append(f"unknown key {path!r}; {nearest(str(problem['loc'][-1]), known)}")
        elif problem["type"] == "missing":
            lines.append(f"missing key {path!r}")
        else:
            said = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{path}: {said}, got {problem['input']!r}" if path else said)
    return f"{where or cls.__qualname__}: " + "; ".join(lines)


def _owner(cls: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel] | None:
    """The configuration class that a nested key belongs to, where it can be told from the annotations."""
    kind: Any = cls
    for step in path:
        kind = _within(kind, str(step))
    tables = [one for one in _choices(kind) if isinstance(one, type) and issubclass(one, BaseModel)]
    return tables[0] if len(tables) == 1 else None


def _within(kind: Any, step: str) -> Any:
    """The annotation of a field of a configuration, of a list's items, or of a table's values; None: not told."""
    for one in _choices(kind):
        if isinstance(one, type) and issubclass(one, BaseModel) and step in one.model_fields:
            return one.model_fields[step].annotation
        if get_origin(one) in (list, tuple, dict):
            return [item for item in get_args(one) if item is not Ellipsis][-1]
    return None


def _choices(kind: Any) -> list[Any]:
    """The members of a union, or the annotation itself."""
    return list(get_args(kind)) if get_origin(kind) in (Union, UnionType) else [kind]
