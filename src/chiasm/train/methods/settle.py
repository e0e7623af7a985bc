"""The end of a stage that trained by methods: the adapter is written, what can be merged is merged, with the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chiasm import compose
from chiasm.model_config import MethodRecord
from chiasm.train.methods.base import own_parameters
from chiasm.train.methods.files import save_adapter
from chiasm.train.methods.merge import merge, mergeable
from chiasm.train.methods.table import records
from chiasm.train.plan import Plan


def settle(vlm: Any, plan: Plan, folder: Path, base: str | Path | None) -> str | None:
    """Write the adapter of a finished stage into ``folder`` and merge LoRA into the model.

    Prompts, prefixes and bottleneck adapters stay in the model, which says so in its configuration. So does QLoRA: a
    merged model would take eight times the memory of its 4-bit weights (``chiasm merge`` does it). Gives a line for the
    user; None where the stage used no method. Raises CheckpointError where the merged model answers otherwise.
    """
    own = own_parameters(vlm.model)
    if not own:
        return None
    save_adapter(vlm, folder, base, [name for name, rate in plan.rates.items() if rate is not None])
    told = f"adapter in {folder}"
    if mergeable(vlm.model) and not any(record[0].quantises for record in records(vlm.model)):
        proof = merge(vlm)
        event = f"merged: {proof}"
        vlm.config = vlm.config.model_copy(update={"provenance": vlm.config.provenance.add(event)})
        told += f"; {proof}"
    left = tuple(MethodRecord(method=m, modules=names) for m, names in compose.installed(vlm.model))
    vlm.config = vlm.config.model_copy(update={"methods": left})
    return told
