"""The weights of one part of a model, read from a folder or file of another model: a base language model, a tower.

The part's own configuration must be that of the folder, key by key; tensors are then as strict as for a whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm import registry
from chiasm.checkpoints import halves, minigpt4, openflamingo, video_llama
from chiasm.config import PartConfig
from chiasm.connectors.qformer import QFormer
from chiasm.convert import maps, maps_blip, maps_imagebind, maps_towers
from chiasm.convert.engine import load_weights
from chiasm.convert.io import open_weights, read_json
from chiasm.convert.rules import Alias, AnyRule, Drop, Plan, Rule, prefixed, rename
from chiasm.encoders.vit import ViT
from chiasm.errors import CheckpointError, ConfigError, nearest
from chiasm.fusion.base import Fusion
from chiasm.lm.decoder import Decoder
from chiasm.lm.gpt import GPT
from chiasm.model_config import VLMConfig
from chiasm.presets.checkpoint import Options
from chiasm.presets.hf_parts import Part, read_lm, read_tower, same_part
from chiasm.presets.hf_towers import text_tower


def load_part(model: Fusion, part: str, path: str | Path, allow_pickle: bool = False) -> Plan:
    """Fill the part of ``model`` called ``part`` from ``path``; gives the plan. Raises CheckpointError, ConfigError.

    A query transformer may be given in halves: see ``halves``.
    """
    path = Path(path)
    for whole_file in (openflamingo, minigpt4, video_llama):
        if part == whole_file.NAME:
            return whole_file.load(model, path, allow_pickle)
    if part == "connectors.image" + video_llama.FRAME:
        return video_llama.load_frame(model, path, allow_pickle)
    part, half = halves.split(part)
    config = part_config_of(model.config, part)
    if half and not isinstance(config, QFormer.Config):
        raise ConfigError(f"{part} is of type {config.type!r}, which has no {half}; only a 'qformer' has halves")
    weights = open_weights(path, allow_pickle)
    table = (path if path.is_dir() else path.parent) / "config.json"
    bare = path.is_file() and part.startswith("connectors.")  # such a file stands beside any configuration
    values = read_json(table) if table.is_file() and not bare else None
    if not isinstance(config, QFormer.Config):
        whole, rules, _ = _rules(part, config, values, table.parent)
        return load_weights(model, weights, rules, part=part + ".", others=whole)
    held = halves.held_by_lavis(weights)
    if held is not None:
        whole, rules = True, maps_blip.lavis_qformer(part, config.text is not None)
        rules += [rename(kind + "_proj.{leaf}", part + ".proj.{leaf}") for kind in ("opt", "t5", "llm")]
    elif isinstance(values, Mapping) and values.get("model_type") == "bert":
        names = tuple(n for n in model.state_dict() if n.startswith(part + ".") and not halves.not_of_bert(n))
        return load_weights(model, weights, halves.bert(part, config, values, str(path)), part=names)
    else:
        whole, rules, theirs = _rules(part, config, values, table.parent)
        held = halves.held_by(theirs if isinstance(theirs, QFormer.Config) else config)
    names = halves.wanted(model.state_dict(), part, half, held, str(path))
    return load_weights(model, weights, rules, part=names, others=whole or bool(half))


def part_config_of(config: Any, part: str) -> PartConfig:
    """The configuration of a part by its name. Raises ConfigError that names the parts there are."""
    known: dict[str, PartConfig] = {} if getattr(config, "lm", None) is None else {"lm": config.lm}
    for group in ("encoders", "connectors"):
        known |= {f"{group}.{name}": c for name, c in (getattr(config, group, None) or {}).items()}
    if part not in known:
        raise ConfigError(f"the model has no part {part!r}; {nearest(part, known)}")
    return known[part]


def read_part(folder: str | Path, part: str = "lm", **options: Any) -> PartConfig:
    """The configuration of the part that a folder holds: ``read_part(folder, "lm")``, to compose a model around it.

    ``options`` for encoders: ``layer`` and ``select``. Raises CheckpointError or ConfigError.
    """
    values = read_json(Path(folder) / "config.json")
    if str(values.get("format", "")).startswith("chiasm/"):
        return part_config_of(VLMConfig.parse(values).model, part)
    return (read_lm(values) if part == "lm" else read_tower(values, **options)).config


def _rules(part: str, config: PartConfig, values: Any, folder: Path) -> tuple[bool, list[AnyRule], PartConfig | None]:
    """Whether the files are of a whole model (of which one part is taken), the rules, and the part's configuration
    there, where it is told.
    """
    if not isinstance(values, Mapping):
        return False, _bare(part, config), None
    if str(values.get("format", "")).startswith("chiasm/"):
        other = VLMConfig.parse(values, where=str(folder / "config.json"))
        theirs = part_config_of(other.model, part)
        _agree(config, theirs, part, folder)
        return True, [rename("{rest}", "{rest}")], theirs
    for name in registry.names("checkpoint"):
        reader = registry.get("checkpoint", name)()
        alone = reader.of_towers and part.startswith("encoders.") and part != "encoders.text"
        if reader.recognises(values) and not alone:
            found = reader.read(folder, values, Options(template="plain"))
            theirs = part_config_of(found.config.model, part)
            _agree(config, theirs, part, folder)
            return True, found.rules, theirs
    if part == "lm":
        return False, prefixed(_language_model(config, read_lm(values), folder), "", "lm."), None
    if part == "encoders.text" and values.get("model_type") == "clip_text_model":
        _agree(config, text_tower(values, str(folder)), part, folder)
        rooms = ("embeddings", "encoder", "final_layer_norm")  # transformers 5 writes them without a prefix
        bare = [Alias(name + ".{rest}", f"text_model.{name}." + "{rest}") for name in rooms]
        return False, [*bare, *maps_towers.text_hf()], None
    if part.startswith("encoders."):
        return False, prefixed(_tower(config, values, part, folder), "", part + "."), None
    return False, _bare(part, config), None


def _bare(part: str, config: PartConfig) -> list[AnyRule]:
    """Files without a configuration: the original LLaVA's projector, ImageBind's, or our own names, with or without the
    part's.
    """
    prefix = part + "."
    if part.startswith("connectors.") and config.type in ("mlp", "linear"):
        theirs = maps.projector_mlp() if config.type == "mlp" else maps.projector_linear()
        return [
            Alias("model.mm_projector.{rest}", "{rest}"),
            Alias("mm_projector.{rest}", "{rest}"),
            *prefixed(theirs, "", prefix),
            rename(prefix + "{rest}", prefix + "{rest}"),
        ]
    own: list[AnyRule] = [Alias(prefix + "{rest}", "{rest}"), rename("{rest}", prefix + "{rest}")]
    return [*prefixed(maps_imagebind.audio(), "", prefix), *own] if config.type == "imagebind_audio" else own


def _language_model(config: PartConfig, found: Part, folder: Path) -> list[AnyRule]:
    theirs, rules = found.config, found.rules
    both: Any = (config, theirs)
    alike = type(config) is type(theirs) and isinstance(config, (Decoder.Config, GPT.Config))
    if alike and both[0].vocab != both[1].vocab:
        rules = [_resized(rule, both[0].vocab) for rule in rules]
        theirs = theirs.model_copy(update={"vocab": both[0].vocab})
    if alike and not any(getattr(c, "rope_scaling", None) for c in both):  # then only a limit, and no arithmetic
        theirs = theirs.model_copy(update={"max_positions": both[0].max_positions})
    _agree(config, theirs, "lm", folder)
    return rules


def _resized(rule: AnyRule, rows: int) -> AnyRule:
    """A vocabulary of ``rows``: those that the file does not have become the mean of those it has, those past the last
    are cut off (they pad a published table; a tokenizer with more tokens than rows is refused elsewhere).
    """
    if not isinstance(rule, Rule) or rule.ours not in (("embedding.weight",), ("lm_head.weight",)):
        return rule

    def into_ours(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        table = tensors[0]
        more = max(0, rows - len(table))
        mean = table.float().mean(0, keepdim=True).to(table.dtype)
        return [torch.cat([table[:rows], mean.expand(more, -1)])]

    return replace(rule, forward=into_ours, backward=lambda tensors: list(tensors))


def _tower(config: PartConfig, values: Mapping[str, Any], part: str, folder: Path) -> list[AnyRule]:
    if not isinstance(config, ViT.Config):
        found = read_tower(values, getattr(config, "layer", None), getattr(config, "select", "patch"))
        _agree(config, found.config, part, folder)
        return found.rules
    found = read_tower(values)
    theirs, rules = found.config, found.rules
    if isinstance(theirs, ViT.Config) and config.depth < theirs.depth:
        spare = range(config.depth, theirs.depth)
        why = f"stands after the {config.depth} blocks that this model has"
        stems = ("vision_model.encoder.layers", "encoder.layer")
        rules = [*_drops(spare, stems, why), *rules]
        theirs = theirs.model_copy(update={"depth": config.depth})
    _agree(config, theirs, part, folder)
    return rules


def _drops(blocks: range, stems: tuple[str, ...], why: str) -> list[AnyRule]:
    return [Drop(f"{stem}.{i}." + "{rest}", why) for stem in stems for i in blocks]


def _agree(ours: PartConfig, theirs: PartConfig, part: str, folder: Path) -> None:
    """Raises CheckpointError that lists the keys in which the two configurations differ."""
    if isinstance(ours, QFormer.Config) and isinstance(theirs, QFormer.Config):
        ours, theirs = halves.same_sizes(ours, theirs)
    differences = same_part(ours, theirs)
    if differences:
        listed = ", ".join(f"{key} is {a!r} here, {b!r} there" for key, (a, b) in list(differences.items())[:6])
        raise CheckpointError(
            f"{part}: the configuration is not that of {folder}: {listed}; take it over with "
            f"chiasm.checkpoints.parts.read_part({str(folder)!r}, {part!r}), or set these keys"
        )
