"""Checkpoints of a running stage: written to the side and renamed, so that a killed save leaves nothing half done.

A folder ``step-000200`` holds ``weights.safetensors`` (the float32 masters of what is trained),
``optimizer.safetensors`` (their moments, and the states of all random generators) and ``state.json`` (the step, which
is also the place in the data, and what a run must agree with to go on from here). ``buffers.safetensors`` holds what
changes without being learned. What is frozen is not written, only a mark of it that tells another model.

Several ranks write one folder. With ``parallel: replicate`` its files are those of one process; with ``shard`` a folder
``pieces`` in torch's distributed format takes the place of the two. Either is read by any number of ranks, in either
mode. ``generators.safetensors`` holds the random states of each rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chiasm.data import randomness
from chiasm.errors import CheckpointError
from chiasm.train.distributed import ALONE, Alone, like
from chiasm.train.optim import Masters
from chiasm.train.proof import moving


def save(
    folder: Path,
    step: int,
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    ranks: Alone = ALONE,
) -> None:
    """Write ``folder/step-…``, then remove all but the newest ``keep`` and the best. Called by all ranks at once.

    The best has the lowest ``state["held_out"]``, the held-out loss at its step, among those that have one. A write
    that fails leaves what was there before.
    """
    final = folder / f"step-{step:06d}"
    aside = folder / f".{final.name}.{ranks.gather(os.getpid(), 'the checkpoint')[0]}"
    try:
        _save(final, aside, masters, optimizer, {"step": step, **state}, keep, ranks)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _save(
    final: Path,
    aside: Path,
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    ranks: Alone,
) -> None:
    if ranks.first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    generators = ranks.gather(randomness.state() | randomness.accelerator_states(), "the checkpoint")
    if ranks.sharded:
        from chiasm.train import shard

        shard.write(aside / "pieces", masters, optimizer, ranks.talk)
        ranks.wait("the checkpoint's pieces")
    if ranks.first:
        if not ranks.sharded:
            _write(aside, masters, optimizer, generators[0])
        _write_buffers(aside / "buffers.safetensors", masters.model)
        if ranks.count > 1:
            each = {f"{rank}/{key}": value for rank, found in enumerate(generators) for key, value in found.items()}
            save_file(each, aside / "generators.safetensors")
        _publish(final.parent, final, aside, state, keep)
    ranks.wait("the finished checkpoint")


def _write(aside: Path, masters: Masters, optimizer: torch.optim.Optimizer, generators: dict[str, Tensor]) -> None:
    weights = {name: p.detach().cpu().contiguous() for name, p in masters.masters.items()}
    save_file(weights, aside / "weights.safetensors")
    moments = dict(generators)
    for name, p in masters.masters.items():
        for key, value in optimizer.state.get(p, {}).items():
            moments[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(moments, aside / "optimizer.safetensors")


def _publish(folder: Path, final: Path, aside: Path, state: dict[str, Any], keep: int) -> None:
    """Make what was written aside the checkpoint, in one step."""
    (aside / "state.json").write_text(json.dumps(state, indent=1))
    for file in aside.iterdir():
        flush(file)
    flush(aside)
    remove(final)
    os.replace(aside, final)
    flush(folder)
    found = checkpoints(folder)
    chosen = best(folder)
    for old in found[:-keep]:
        if old != chosen:
            remove(old)


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a stage, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss; None where no checkpoint has one."""
    scores = {p: json.loads((p / "state.json").read_text()).get("held_out") for p in checkpoints(folder)}
    known = {p: score for p, score in scores.items() if score is not None}
    return min(known, key=lambda p: (known[p], p.name)) if known else None


def remove(path: Path) -> None:
    """Remove a checkpoint: out of sight in one step, so that a kill on the way leaves no half of one."""
    if path.exists():
        gone = path.with_name(f".{path.name}.old.{os.getpid()}")
        os.replace(path, gone)
        shutil.rmtree(gone)


def clean(folder: Path) -> list[str]:
    """Remove what a killed save left behind; returns the names."""
    left = [p for p in folder.glob(".step-*") if p.is_dir()]
    for path in left:
        shutil.rmtree(path)
    return sorted(p.name for p in left)


def restore(
    path: Path,
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    expected: dict[str, Any],
    ranks: Alone = ALONE,
) -> int:
    """Put a checkpoint's state into masters, model, optimizer and random generators; returns its step.

    Raises CheckpointError where the run is another one than the checkpoint's: ``expected`` must equal what was saved.
    """
    state = json.loads((path / "state.json").read_text())
    for key, value in expected.items():
        if state.get(key) != value:
            raise CheckpointError(
                f"{path}: was written by a run with {key} {state.get(key)!r}, this one has {value!r}; "
                "resume with the same recipe and model, or start in another folder"
            )
    if (path / "pieces").is_dir():
        from chiasm.train import shard

        names = shard.read(path / "pieces", masters, optimizer, ranks.talk)
        _same_names(path, names, set(masters.masters))
    else:
        _read(path, masters, optimizer)
    masters.publish()
    _read_buffers(path / "buffers.safetensors", masters.model)
    each = path / "generators.safetensors"
    if each.is_file():
        mark = f"{ranks.rank}/"
        randomness.restore({k.removeprefix(mark): v for k, v in load_file(each).items() if k.startswith(mark)})
    elif ranks.first:
        randomness.restore(load_file(path / "optimizer.safetensors"))
    return int(state["step"])


def _read(path: Path, masters: Masters, optimizer: torch.optim.Optimizer) -> None:
    """Masters and moments from whole tensors."""
    weights = load_file(path / "weights.safetensors")
    _same_names(path, set(weights), set(masters.masters))
    moments = load_file(path / "optimizer.safetensors")
    fused = bool(optimizer.defaults.get("fused"))  # else the count of steps stays on the CPU

    def placed(key: str, value: Tensor, p: Tensor) -> Tensor:
        if key == "step":
            return value.to(p.device) if fused else value
        return like(value.to(p.device), p)

    with torch.no_grad():
        for name, p in masters.masters.items():
            p.copy_(like(weights[name], p))
            kept = {k.rpartition("/")[2]: v for k, v in moments.items() if k.rpartition("/")[0] == name}
            if kept:
                optimizer.state[p] = {k: placed(k, v, p) for k, v in kept.items()}


def _write_buffers(path: Path, model: nn.Module) -> None:
    """Saved buffers, and those that the model says move; tables that a part computes when it is built are not written.

    Names that share a tensor each get their own copy.
    """
    wanted = set(model.state_dict(keep_vars=True)) | set(moving(model))
    found = {n: b.detach().cpu().clone() for n, b in model.named_buffers(remove_duplicate=False) if n in wanted}
    if found:
        save_file(found, path)


@torch.no_grad()
def _read_buffers(path: Path, model: nn.Module) -> None:
    """What training changes though nothing learns it: momentum copies, queues, running statistics."""
    saved = load_file(path) if path.is_file() else {}
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


def digest(model: nn.Module, plan_rates: dict[str, float | None]) -> str:
    """A short mark of the frozen parameters: names, shapes and 16 values of each."""
    mark = hashlib.sha256()
    for name, p in model.named_parameters():
        if plan_rates[name] is None:
            flat = p.detach().flatten()
            places = torch.arange(16, device=flat.device) * (flat.numel() - 1) // 15
            few = flat[places].double().cpu()
            mark.update(f"{name}{tuple(p.shape)}".encode() + few.numpy().tobytes())
    return mark.hexdigest()[:12]


def _same_names(path: Path, saved: set[str], wanted: set[str]) -> None:
    if saved != wanted:
        missing, extra = sorted(wanted - saved), sorted(saved - wanted)
        raise CheckpointError(
            f"{path}: holds {len(saved)} trained tensors, this stage trains {len(wanted)}; "
            f"missing {missing[:3]}, not trained here {extra[:3]}; resume with the plan it was started with"
        )


def flush(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
