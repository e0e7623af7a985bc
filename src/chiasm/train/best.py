"""The model of a stage's lowest held-out loss, kept beside its checkpoints in a folder that ``chiasm.load`` reads.

    held-out loss → lower than before? → the whole model aside → takes the place of the folder ``best``

It outlives the stage, a kill at any moment and a resume: the old one stays until the new one is whole. With methods in
the model (LoRA) it is not merged yet; ``chiasm merge`` does that.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from chiasm.convert.io import write_json
from chiasm.train.checkpoint import flush
from chiasm.train.distributed import ALONE, Alone, whole
from chiasm.train.optim import Masters

Save = Callable[[Path, Mapping[str, Tensor], int], None]
NAME = "held_out.json"


class Best:
    """``folder`` and who writes it: ``save(folder, tensors, step)``, with the float32 values of all parameters by name.

    ``known`` is what ``folder`` holds, ``{"step", "loss"}``; None before the first held-out loss.
    """

    def __init__(self, folder: Path, save: Save):
        self.folder, self.save = folder, save
        self.old = folder.with_name(f".{folder.name}.old")
        self.known: dict[str, Any] | None = None

    def begin(self, resume: bool, first: bool = True) -> None:
        """Take up what an interrupted run left, or remove what an earlier one did. ``first``: this rank writes."""
        if first:
            if resume and self.old.is_dir() and not self.folder.is_dir():
                os.replace(self.old, self.folder)  # the kill came between the two moves
            for left in [self.old, *self.folder.parent.glob(f".{self.folder.name}.new.*")]:
                shutil.rmtree(left, ignore_errors=True)
            if not resume:
                shutil.rmtree(self.folder, ignore_errors=True)
        path = self.folder / NAME
        self.known = json.loads(path.read_text()) if resume and path.is_file() else None

    def seen(self, step: int, loss: float, masters: Masters, ranks: Alone = ALONE) -> dict[str, Any]:
        """The held-out loss after ``step``. Writes the model where it is the lowest; gives what the log says of that.

        Called by all ranks at once.
        """
        if not math.isfinite(loss) or (self.known is not None and loss >= self.known["loss"]):
            return {}
        ranks.reshard()  # else frozen weights would be those gathered for the held-out loss, in what it computes with
        tensors = {name: whole(tensor) for name, tensor in masters.tensors().items()}  # all ranks meet here
        self.known = {"step": step, "loss": loss}
        if ranks.first:
            self._write(tensors, step)
        ranks.wait("the best model")
        return {"best/step": step, "best/loss": loss, "best/folder": str(self.folder)}

    def told(self) -> str:
        """In a line; empty where nothing was kept."""
        if self.known is None:
            return ""
        return f"lowest held-out loss {self.known['loss']:.4f} after step {self.known['step']}: model in {self.folder}"

    def _write(self, tensors: Mapping[str, Tensor], step: int) -> None:
        aside = self.folder.with_name(f".{self.folder.name}.new.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self.save(aside, tensors, step)
            write_json(aside / NAME, self.known)
            for file in aside.iterdir():
                flush(file)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if self.folder.is_dir():
            os.replace(self.folder, self.old)
        os.replace(aside, self.folder)
        flush(self.folder.parent)
        shutil.rmtree(self.old, ignore_errors=True)
