"""LoRA files of ``peft``: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written.

Reference: ``peft`` 0.21, ``LoraConfig`` and ``save_and_load.py``. A layer's matrices are called
``base_model.model.<module>.lora_A.weight [r, in]`` and ``….lora_B.weight [out, r]``, layers trained in full
``base_model.model.<parameter>``. Names of modules here are theirs, without that prefix.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from chiasm.convert.io import open_weights, read_json, write_json
from chiasm.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OTHER = (  # options that change what the matrices mean, or add others; all are off by default
    *("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "trainable_token_indices", "megatron_config", "velora_config", "monteclora_config"),
    *("arrow_config", "kasa_config"),
)


@dataclass
class Matrices:
    """The change of one layer: ``(alpha / r) · b a``."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    alpha: float

    @property
    def r(self) -> int:
        """The rank."""
        return len(self.a)


@dataclass
class PeftFile:
    """An adapter: changed layers by module name, tensors trained in full by parameter name."""

    layers: dict[str, Matrices]
    full: dict[str, Tensor] = field(default_factory=dict)
    dropout: float = 0.0
    base: str | None = None


def read(folder: Path) -> PeftFile:
    """The adapter in a folder. Raises CheckpointError for another kind of adapter, or where a matrix lacks its twin."""
    config = read_json(folder / CONFIG)
    _only_lora(config, folder)
    weights = open_weights(folder / WEIGHTS)
    halves: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for key in weights.info:
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{folder}: tensor {key!r} does not begin with {PREFIX!r}, as peft's do")
        found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", key[len(PREFIX) :])
        if found is not None:
            halves.setdefault(found[1], {})[found[2]] = weights.read(key)
        elif ".lora_" in key:
            raise CheckpointError(f"{folder}: tensor {key!r} is no change of a linear layer; only those are read")
        else:
            full[re.sub(r"\.modules_to_save(\.default)?\.", ".", key[len(PREFIX) :])] = weights.read(key)
    single = [name for name, pair in halves.items() if len(pair) < 2]
    if single:
        raise CheckpointError(f"{folder}: {len(single)} layers have one of two matrices, the first is {single[0]!r}")
    layers = {
        name: Matrices(pair["A"], pair["B"], _alpha(config, name, len(pair["A"]))) for name, pair in halves.items()
    }
    return PeftFile(layers, full, float(config.get("lora_dropout") or 0.0), config.get("base_model_name_or_path"))


def write(folder: Path, adapter: PeftFile, modules_to_save: tuple[str, ...] = ()) -> None:
    """Write an adapter for ``peft``. ``modules_to_save`` are the modules that ``adapter.full`` holds."""
    tensors = {PREFIX + name: tensor for name, tensor in adapter.full.items()}
    for name, pair in adapter.layers.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": pair.a, f"{PREFIX}{name}.lora_B.weight": pair.b}
    ranks = Counter(pair.r for pair in adapter.layers.values()).most_common()
    alphas = Counter(pair.alpha for pair in adapter.layers.values()).most_common()
    r, alpha = (ranks[0][0], alphas[0][0]) if ranks else (8, 8.0)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _whole(alpha),
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "target_modules": sorted(adapter.layers),
        "modules_to_save": sorted(modules_to_save) or None,
        "rank_pattern": {f"^{re.escape(n)}": pair.r for n, pair in adapter.layers.items() if pair.r != r},
        "alpha_pattern": {
            f"^{re.escape(n)}": _whole(pair.alpha) for n, pair in adapter.layers.items() if pair.alpha != alpha
        },
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, values)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file of copies."""
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(owned, str(path), {"format": "pt"})


def _only_lora(config: Any, folder: Path) -> None:
    """Raises CheckpointError for what is not LoRA, or LoRA with an option that changes its arithmetic."""
    kind = config.get("peft_type") if isinstance(config, Mapping) else None
    if kind != "LORA":
        raise CheckpointError(f"{folder / CONFIG}: peft_type is {kind!r}; only 'LORA' is read")
    on = [name for name in OTHER if config.get(name)]
    if config.get("bias", "none") != "none":
        on.append("bias")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        on.append("init_lora_weights")  # PiSSA, OLoRA, CorDA and LoftQ change the base model's weights too
    if on:
        listed = ", ".join(f"{name}={config[name]!r}" for name in on)
        raise CheckpointError(f"{folder / CONFIG}: {listed} is not supported; convert the adapter to plain LoRA")


def _alpha(config: Mapping[str, Any], name: str, r: int) -> float:
    """The layer's alpha, such that its change is (alpha / r) · b a."""
    alpha = float(config.get("lora_alpha", 8))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = float(value)
            break
    return alpha * math.sqrt(r) if config.get("use_rslora") else alpha


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
