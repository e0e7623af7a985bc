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

from chiasm.errors import ConfigError
from chiasm.serve import batch
from chiasm.serve.options import Served, ServeOptions

Opening = Callable[[], tuple[Served, ServeOptions]]


class Answering:
    """One actor: a model, and numbers of lines to answers."""

    def __init__(self, opening: Opening, path: str, flying: int):
        self.served, self.options = opening()
        self.path, self.flying = path, flying
        with Path(path).open("rb") as file:
            self.places = np.cumsum([0, *map(len, file)])

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """``number``, ``problem`` → ``answer``, each a line of the output."""
        lines = [(int(n), self._text(int(n)), str(p)) for n, p in zip(rows["number"], rows["problem"], strict=True)]
        answers: list[str] = []
        batch.run(self.served, self.options, lines, lambda answer: answers.append(json.dumps(answer)), self.flying)
        return {"answer": np.array(answers, dtype=object)}

    def _text(self, number: int) -> str:
        start, end = self.places[number - 1 : number + 1]
        with Path(self.path).open("rb") as file:
            file.seek(int(start))
            return file.read(int(end - start)).decode("utf-8", errors="surrogateescape")


def run(
    opening: Opening, path: Path, lines: Iterable[batch.Line], done: batch.Answered, flying: int, actors: int
) -> None:
    """Answer lines of the file ``path``. Raises ConfigError where ray is not installed."""
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs the package ray: pip install 'chiasm[ray]'") from None
    import torch

    rows = [{"number": number, "problem": problem} for number, _, problem in lines]
    if not rows:
        return
    found = ray.data.from_items(rows, override_num_blocks=max(1, min(len(rows) // flying, 64 * actors))).map_batches(
        Answering,
        batch_size=4 * flying,
        compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_kwargs={"opening": opening, "path": str(path.resolve()), "flying": flying},
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    for part in found.iter_batches(batch_size=None, batch_format="numpy"):
        for answer in part["answer"]:
            done(json.loads(answer))


__all__ = ["Answering", "run"]
