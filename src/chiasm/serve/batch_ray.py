"""The same on a Ray cluster (extra ``ray``): each actor loads the model once and answers lines of the file.

Only this process writes the answers, so a run that was cut goes on here too. Lines travel as their numbers: all
machines must see the input, and the model, under the same path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from chiasm.errors import ChiasmError
from chiasm.infer.cluster import joined, told
from chiasm.serve import batch
from chiasm.serve.options import Served, ServeOptions

Opening = Callable[[], tuple[Served, ServeOptions]]


class Answering:
    """One actor: a model, and numbers of lines to answers."""

    def __init__(self, opening: Opening, path: str, flying: int):
        self.why = ""
        try:
            self.served, self.options = opening()
        except ChiasmError as error:  # told in a row: an actor that raises is made again, with pages of traces
            self.why = str(error)
        self.path, self.flying = path, flying
        with Path(path).open("rb") as file:
            self.places = np.cumsum([0, *map(len, file)])

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """``number``, ``problem`` → ``answer``, each a line of the output, and ``why`` there is none."""
        if self.why:
            return {"answer": np.array([""], dtype=object), "why": np.array([self.why], dtype=object)}
        lines = [(int(n), self._text(int(n)), str(p)) for n, p in zip(rows["number"], rows["problem"], strict=True)]
        answers: list[str] = []
        batch.run(self.served, self.options, lines, lambda answer: answers.append(json.dumps(answer)), self.flying)
        return {"answer": np.array(answers, dtype=object), "why": np.array([""] * len(answers), dtype=object)}

    def _text(self, number: int) -> str:
        start, end = self.places[number - 1 : number + 1]
        with Path(self.path).open("rb") as file:
            file.seek(int(start))
            return file.read(int(end - start)).decode("utf-8", errors="surrogateescape")


def run(
    opening: Opening, path: Path, lines: Iterable[batch.Line], done: batch.Answered, flying: int, actors: int
) -> None:
    """Answer lines of the file ``path``. Raises ConfigError where ray is not installed, ChiasmError where it fails."""
    ray = joined()
    import torch

    rows = [{"number": number, "problem": problem} for number, _, problem in lines]
    if not rows:
        return
    share = -(-len(rows) // actors)  # of one actor
    blocks = min(len(rows), max(actors, min(len(rows) // flying, 64 * actors)))
    found = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        Answering,
        batch_size=min(4 * flying, share),
        compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_kwargs={"opening": opening, "path": str(path.resolve()), "flying": flying},
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    with told():
        for part in found.iter_batches(batch_size=None, batch_format="numpy"):
            for answer, why in zip(part["answer"], part["why"], strict=True):
                if why:
                    raise ChiasmError(f"an actor of the Ray cluster failed: {why}")
                done(json.loads(answer))


__all__ = ["Answering", "run"]
