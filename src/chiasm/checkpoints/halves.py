"""What of a query transformer goes from one stage of training to the next.

A query transformer has a half that queries run through and a half that text does. BLIP-2's first stage trains both and
has no projection; its second drops the text half and adds the projection; InstructBLIP wants both halves and the
projection. So a connector may be loaded from a folder that lacks the projection (it keeps its own), or that holds a
text half it does not have, but never from one that lacks the text half it needs. Two folders can give a half each:

    weights: {connectors.image.text_half: runs/first/model, connectors.image.query_half: runs/second/model}

And a first stage begins with BERT, whose perceptron both halves get a copy of (LAVIS: in the first stage only; loaded
into a later one, its query half would be random). Queries and cross-attention have nothing to begin with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chiasm.connectors.qformer import QFormer
from chiasm.convert import maps_blip
from chiasm.convert.io import Weights
from chiasm.convert.maps_blip import WORDS
from chiasm.convert.rules import Alias, AnyRule, Change, Drop, Rule, rename
from chiasm.errors import CheckpointError, ConfigError

HALVES = ("text_half", "query_half")


@dataclass(frozen=True)
class Held:
    """Which of the optional pieces a file holds."""

    text: bool
    project: bool


def split(part: str) -> tuple[str, str]:
    """``connectors.image.text_half`` as the part and the half; any other name as it is, with an empty half."""
    stem, _, last = part.rpartition(".")
    return (stem, last) if last in HALVES else (part, "")


def is_text(name: str) -> bool:
    """Whether a parameter of a query transformer belongs to its text half."""
    return ".body.text." in name or ".text_mlp." in name or ".text_norm." in name


def held_by(config: QFormer.Config) -> Held:
    """What a connector of this configuration holds."""
    return Held(config.text is not None, config.project)


def held_by_lavis(weights: Weights) -> Held | None:
    """What a file with LAVIS's names holds; None for one that has other names."""
    if "query_tokens" not in weights.info:
        return None
    projections = ("opt_proj.weight", "t5_proj.weight", "llm_proj.weight")
    return Held(WORDS in weights.info, any(name in weights.info for name in projections))


def wanted(names: Iterable[str], part: str, half: str, held: Held, origin: str) -> tuple[str, ...]:
    """The parameters of ``part`` to fill from a file that holds so much. CheckpointError for a lost text half."""
    own = [name for name in names if name.startswith(part + ".")]
    if half:
        own = [name for name in own if is_text(name) == (half == "text_half")]
    if half == "text_half" and not own:
        raise ConfigError(f"{part} has no text half: give its configuration 'text', or leave {part}.text_half out")
    if not held.text and any(map(is_text, own)):
        raise CheckpointError(lost(part, origin))
    return tuple(name for name in own if held.project or not name.startswith(part + ".proj."))


def lost(part: str, origin: str) -> str:
    """What is said where a text half is needed and not there."""
    return (
        f"{part} reads text, but {origin} holds no text half of it: BLIP-2's second stage drops it, and a random one "
        f"would read nothing. Load the first stage's checkpoint; or the two halves from two folders: weights "
        f"{{{part}.text_half: FIRST_STAGE, {part}.query_half: {origin}}}"
    )


def bert(part: str, config: QFormer.Config, values: Mapping[str, Any], origin: str) -> list[AnyRule]:
    """The rules that fill a query transformer from a ``BertModel``.

    Words that BERT does not have begin as the mean of those it has. Raises CheckpointError where sizes differ.
    """
    text = config.text
    pairs = {
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
    }
    if text is not None:
        pairs["max_position_embeddings"] = text.positions
    wrong = [f"{key} is {mine} here, {values.get(key)} there" for key, mine in pairs.items() if values.get(key) != mine]
    if wrong:
        raise CheckpointError(f"{part}: the configuration is not that of {origin}: {', '.join(wrong)}")
    layer, ours, found = "encoder.layer.{i}.", part + ".body.layers.{i}.", []
    for theirs, mine in maps_blip.BERT.items():
        copies = [
            mine.replace("text_", "query_"),
            *([mine] if text is not None or not mine.startswith("text_") else []),
        ]
        targets = tuple(dict.fromkeys(ours + name + ".{leaf}" for name in copies))
        found.append(Rule((layer + theirs + ".{leaf}",), targets, _copies(len(targets))))
    rules: list[AnyRule] = [
        Alias("bert.{rest}", "{rest}"),
        Alias("{rest}.gamma", "{rest}.weight"),
        Alias("{rest}.beta", "{rest}.bias"),
        *found,
        rename("embeddings.LayerNorm.{leaf}", part + ".body.norm.{leaf}"),
        *(Drop(name, "has no place in a query transformer") for name in ("pooler.{rest}", "cls.{rest}")),
        Drop("embeddings.token_type_embeddings.weight", "a query transformer has no token types"),
        Drop("embeddings.position_ids", "is computed from the configuration"),
    ]
    for kind in ("word", "position"):
        table = f"embeddings.{kind}_embeddings.weight"
        if text is None:
            rules.append(Drop(table, maps_blip.NO_TEXT))
            continue
        rows = text.vocab - int(values.get("vocab_size", text.vocab)) if kind == "word" else 0
        rules.append(Rule((table,), (f"{part}.body.text.{kind}s.weight",), _with_rows(rows)))
    return rules


def _copies(count: int) -> Change:
    """As many copies of one tensor."""
    return lambda tensors: [tensors[0].clone() for _ in range(count)]


def _with_rows(count: int) -> Change:
    """A table with ``count`` rows more, each the mean of those it has."""

    def longer(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        table = tensors[0]
        mean = table.float().mean(0, keepdim=True).to(table.dtype)
        return [torch.cat([table, mean.expand(max(0, count), -1)])]

    return longer


def not_of_bert(name: str) -> bool:
    """Whether a parameter of a query transformer has no counterpart in BERT."""
    return ".cross" in name or name.endswith(".queries") or ".proj." in name


def same_sizes(ours: QFormer.Config, theirs: QFormer.Config) -> tuple[QFormer.Config, QFormer.Config]:
    """Both configurations without what may differ between the stages, to be compared."""
    free = {"text": None, "instruction": False, "project": True, "dropout": 0.0}
    if ours.text is not None and theirs.text is not None:
        free.pop("text")
    return ours.model_copy(update=free), theirs.model_copy(update=free)
