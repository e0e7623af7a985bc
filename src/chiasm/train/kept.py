"""Proof that nothing learned is lost between the last step and the disk: in a merge, and in the saved folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from chiasm.convert.io import open_weights
from chiasm.errors import CheckpointError, ConfigError
from chiasm.train.marks import marks
from chiasm.train.plan import matches
from chiasm.train.proof import ProofError


@contextlib.contextmanager
def through_merge(model: nn.Module, trained: Iterable[str], moved: bool = True) -> Iterator[None]:
    """What is done inside may merge the parameters ``trained`` into others, but may lose and change nothing else.

    A trained parameter that is still there afterwards must be as it was; one that is gone must have left a trace in the
    weight beside it (``moved``: it is known to have left its beginning, where it adds nothing). Raises ProofError.
    """
    trained = list(trained)
    before = marks(dict(model.named_parameters()))
    yield
    now = marks(dict(model.named_parameters()))
    lost, same, other = [], [], []
    for name in trained:
        beside = name.rpartition(".")[0] + ".weight"
        if name in now:
            if now[name] != before.get(name, now[name]):
                other.append(name)
        elif beside not in now:
            lost.append(name)
        elif moved and now[beside] == before.get(beside):
            same.append(beside)
    bases = {name.rpartition(".")[0] + ".weight" for name in trained}
    other += [n for n in before.keys() & now.keys() if n not in bases and n not in trained and now[n] != before[n]]
    lost += [n for n in before if n not in now and n not in trained]
    for names, what in ((lost, "are gone"), (same, "are as before the merge"), (other, "changed")):
        if names:
            raise ProofError(
                f"after the merge {len(names)} tensors {what} ({_some(sorted(set(names)))}): what was trained would be "
                "lost; use the adapter file of the stage with its base model, and report this as a fault"
            )


def check_saved(model: nn.Module, folder: str | Path) -> int:
    """Compare a saved folder with the model in memory, bit by bit; returns the number of tensors compared.

    Raises CheckpointError naming a part or tensor that is missing or differs: a lost connector, for instance.
    """
    saved = open_weights(folder)
    wanted: Mapping[str, Tensor] = model.state_dict()
    missing = sorted(wanted.keys() - saved.info.keys())
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(wanted)} tensors of the trained model were not saved "
            f"({_some(missing)}); the model in memory is whole: save it again, and report this as a fault"
        )
    for name, tensor in wanted.items():
        if marks({name: saved.read(name)}) != marks({name: tensor}):
            raise CheckpointError(
                f"{folder}: tensor {name!r} differs from the trained model's ({tuple(saved.info[name].shape)} "
                f"{saved.info[name].dtype} on disk, {tuple(tensor.shape)} {tensor.dtype} in memory); save it again"
            )
    return len(wanted)


def check_reach(table: Mapping[str, Any], trained: Iterable[str]) -> None:
    """Raise ConfigError where a method of a plan reaches into a part that an earlier row freezes, without naming it.

    ``{"encoders": "freeze", "*attn*": "lora(r=8)"}`` would put LoRA on the frozen tower: what was meant is unknown.
    """
    trained = list(trained)
    rows = list(table.items())
    for number, (frozen, action) in enumerate(rows):
        if action != "freeze" or any(c in frozen for c in "*?["):
            continue
        for pattern, later in rows[number + 1 :]:
            method = isinstance(later, Mapping) or (isinstance(later, str) and "(" in later) or _registered(later)
            found = [n for n in trained if matches(frozen, n) and matches(pattern, n)] if method else []
            if found and pattern[0] in "*?[":
                raise ConfigError(
                    f"the plan's row {pattern!r} ({later}) reaches {len(found)} tensors of {frozen!r}, which a row "
                    f"before it freezes ({_some(found)}); name the part that is meant, as in 'lm.{pattern}', or put "
                    f"the row {frozen!r}: freeze last"
                )


def _registered(action: Any) -> bool:
    from chiasm import registry

    return isinstance(action, str) and action in registry.names("method")


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
